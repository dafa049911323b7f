"""How BatchNorm behaves in a forward pass: a visible choice, because published methods differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MODES = ("eval", "train", "batch")
"""``"eval"``: running statistics. ``"train"``: batch statistics, which also update the running ones, once a forward.
``"batch"``: batch statistics, running ones untouched."""


@contextmanager
def forward_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Puts every module into `mode` and leaves all of them as they were found, also after an error.

    Args:
        model: Any module.
        mode: One of `MODES`.

    Yields:
        Nothing. In mode ``"batch"`` the buffers are restored at the end; in mode ``"train"`` they stay updated.

    Example:
        >>> net = nn.BatchNorm1d(2).train()
        >>> with forward_mode(net, "eval"):
        ...     net.training
        False
        >>> net.training
        True
    """
    found = [(module, module.training) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()] if mode == "batch" else []
    for module, _ in found:
        module.training = mode != "eval"
    try:
        yield
    finally:
        for module, training in found:
            module.training = training
        with torch.no_grad():
            for buffer, before in kept:
                buffer.data.copy_(before)  # unseen by autograd: a loss computed before may still want its buffers


def full(logits: Tensor) -> Tensor:
    """Logits in at least float32: losses, softmaxes and ranks of half precision would be the noise they are made of."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
