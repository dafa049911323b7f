"""BatchNorm while several processes share a batch: global statistics, everybody's own, or frozen ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from instar.errors import unknown
from instar.parallel import Group

KINDS = ("sync", "local", "frozen")
"""``"sync"``: statistics of the global batch. ``"local"``: of each process's share, running statistics averaged after
each step. ``"frozen"``: the running statistics of the network that training began from, never updated."""


@contextlib.contextmanager
def normalised_by(network: nn.Module, kind: str, group: Group) -> Iterator[None]:
    """Lets the BatchNorm layers of a network work in one of `KINDS`, and leaves them as they were found.

    Layers of foreign code are included, if they are subclasses of PyTorch's that call ``batch_norm`` of
    ``torch.nn.functional``. In eval mode they do what they always do.

    Args:
        network: Any network.
        kind: One of `KINDS`. In a single process ``"sync"`` and ``"local"`` change nothing.
        group: The processes that share each batch.

    Raises:
        UserError: An unknown kind.

    Example:
        >>> net = nn.BatchNorm2d(1)
        >>> with normalised_by(net, "frozen", Group()):
        ...     net.train()(torch.full((1, 1, 1, 1), 3.0)).item()
        2.9999849796295166
        >>> type(net).__name__, net.running_mean.item()
        ('BatchNorm2d', 0.0)

    Source: Ioffe & Szegedy 2015. PyTorch's ``SyncBatchNorm`` does the same as ``"sync"`` on GPUs only, and once
        differentiable only, which GradAlign is not.
    """
    if kind not in KINDS:
        raise unknown("kind of BatchNorm", kind, KINDS)
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if kind == "local" or (kind == "sync" and group.alone):
        layers = []
    found = [type(layer) for layer in layers]
    for layer in layers:
        mixin: type = _Frozen if kind == "frozen" else _Synchronised
        # The module's name is what tracers know a layer by.
        layer.__class__ = type(type(layer).__name__, (mixin, type(layer)), {"__module__": type(layer).__module__})
        layer._group = group  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, kind_before in zip(layers, found, strict=True):
            layer.__class__ = kind_before
            del layer._group


def average_running_statistics(network: nn.Module, group: Group) -> None:
    """Put the mean over processes in the place of every running mean and variance."""
    if group.alone:
        return
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    running = [b for layer in layers for b in (layer.running_mean, layer.running_var) if b is not None]
    group.add_up(running)
    for buffer in running:
        buffer.div_(group.size)


class _Frozen:
    """Uses the running statistics, whatever mode the layer is in."""

    def forward(self, x: Tensor) -> Tensor:
        training, self.training = self.training, False  # type: ignore[has-type]
        try:
            out: Tensor = super().forward(x)  # type: ignore[misc]
        finally:
            self.training = training
        return out


class _Synchronised:
    """Takes the statistics over all processes where it would take those of the batch."""

    training: bool
    _group: Group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            own: Tensor = super().forward(x)  # type: ignore[misc]
            return own
        with _GlobalStatistics(self._group):
            shared: Tensor = super().forward(x)  # type: ignore[misc]
        return shared


class _GlobalStatistics(TorchFunctionMode):
    """Answers calls of ``torch.nn.functional.batch_norm``, so that a layer keeps all else that it does."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._group = group

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return batch_norm(self._group, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def batch_norm(
    group: Group,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` with statistics over all processes; differentiable any number of times.

    Args:
        group: The processes; each brings at least one instance.
        input: (b, C, ...), this process's instances.
        running_mean: (C,), updated in place, or None.
        running_var: (C,), updated in place with the unbiased variance of the global batch, or None.
        weight: (C,) or None.
        bias: (C,) or None.
        training: False uses the running statistics.
        momentum: Share of the new statistics in the running ones.
        eps: Added to the variance.

    Returns:
        (b, C, ...), in the type of `input`.
    """
    if not training or group.alone:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    count = x.numel() // x.shape[1]
    own = x.mean(dims)
    squares = (x - own.view(shape)).square().sum(dims)
    # Everybody's count, mean and sum of squares about that mean, in one message: sums of squares about 0 would cancel.
    mine = torch.stack([torch.full_like(own, count), own, squares])
    row = torch.zeros(group.size, 1, 1, dtype=x.dtype, device=x.device)
    row[group.rank] = 1
    counts, means, sums = group.sum_through(row * mine).unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    variance = (sums + counts * (means - mean).square()).sum(0) / total
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((variance * total / (total - 1)).to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    out = (x - mean.view(shape)) * scale.view(shape)
    out = out if bias is None else out + bias.view(shape)
    return out.to(input.dtype)
