"""How BatchNorm behaves in a forward pass: a visible choice, because published methods differ in nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from instar.errors import UserError

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


@contextmanager
def captured_features(model: nn.Module, *, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Keeps what goes into the model's head, the penultimate features, of every forward in between.

    Args:
        model: A module whose last layer is its attribute `head`.
        wanted: False captures nothing and asks nothing of the model.

    Yields:
        A list that grows by (B, D) with every forward.

    Raises:
        UserError: The model has no `head`.
    """
    captured: list[Tensor] = []
    head = getattr(model, "head", None)
    if not wanted:
        yield captured
        return
    if not isinstance(head, nn.Module):
        raise UserError("a signal needs features: the model must have a sub-module `head` that they go into")
    handle = head.register_forward_pre_hook(lambda _, inputs: captured.append(full(inputs[0])))
    try:
        yield captured
    finally:
        handle.remove()


def full(logits: Tensor) -> Tensor:
    """Logits in at least float32: losses, softmaxes and ranks of half precision would be the noise they are made of."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
