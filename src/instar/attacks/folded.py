"""A copy of the model for eval-mode attacks: BatchNorm folded away, half precision inside, no weight gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils import fusion

from instar.errors import first_line
from instar.models.heads import logit_scale
from instar.models.normalize import Normalize
from instar.models.precision import FloatLinear, trace, without_autocast
from instar.modes import forward_mode


class FoldingError(Exception):
    """A model has no folded stand-in: it cannot be traced, or the copy does not give the same logits."""


def fold(model: nn.Module, images: Tensor, *, dtype: torch.dtype | None = None, channels_last: bool = True) -> Folded:
    """A stand-in for any model, made only if it gives the same logits.

    Args:
        model: The model, also of foreign code. One whose forward branches on what it sees, or on how often it was
            called, has no stand-in.
        images: Some images (B, C, H, W) that both are compared on, beside others made of them, in the model's own
            precision.
        dtype: See `Folded`.
        channels_last: See `Folded`.

    Returns:
        The stand-in.

    Raises:
        FoldingError: With the reason; attack the model itself then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        >>> type(fold(net, torch.rand(2, 3, 4, 4))).__name__
        'Folded'
    """
    with forward_mode(model, "eval"), torch.no_grad():
        try:
            before = _state(model)
            plain = Folded(model, channels_last=channels_last)
            pairs = [(plain(probe), model(probe)) for probe in (images, *_probes(images))]
            changed = _state(model) != before
        except Exception as error:  # foreign code fails to trace in any way it likes
            raise FoldingError(first_line(error)) from None
        if changed:
            raise FoldingError("the model changes as it is called, which a copy of its graph would not")
        if not all(_same(ours, theirs) for ours, theirs in pairs):
            raise FoldingError("the folded copy gives other logits")
        return plain if dtype is None else Folded(model, dtype=dtype, channels_last=channels_last)


PROBES = 8
"""Images of each further input that a stand-in is compared on."""
SMALL = 16
"""Buffers of so many values, such as counters, are compared by value: a new tensor may take an old one's place."""


def _probes(images: Tensor) -> list[Tensor]:
    """Inputs that a forward which looks at its input, or at how often it was called, treats in another way.

    A graph is traced once, so that a branch which Python took then is taken ever after.
    """
    few = images[:PROBES]
    moved = few + 8 / 255 * torch.ones_like(few).cumsum(3).remainder(2).mul(2).sub(1)  # stripes, as noise has them
    return [few[:1], few.flip(0), moved.clamp(0.0, 1.0), 1 - few, torch.zeros_like(few), torch.ones_like(few), few]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max().clamp_min(1e-12)), equal_nan=True
    )


def _state(model: nn.Module) -> list[object]:
    """What a forward pass in eval mode may not change: buffers, and plain values that modules keep."""
    found: list[object] = []
    for name, buffer in model.named_buffers():
        found.append((name, buffer._version, buffer.tolist() if buffer.numel() <= SMALL else None))
    for name, module in model.named_modules():
        for key, item in vars(module).items():
            if isinstance(item, (bool, int, float, str, type(None))):
                found.append((name, key, item))
            elif isinstance(item, (list, dict)) and not key.startswith("_"):
                found.append((name, key, len(item)))
    return found


class _Cast(nn.Module):
    """Changes the precision, and the memory layout that convolutions of that precision are fast in."""

    def __init__(self, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.dtype, self.memory_format = dtype, memory_format

    def forward(self, x: Tensor) -> Tensor:
        """`x` in the other precision."""
        return x.to(dtype=self.dtype, memory_format=self.memory_format)


class Folded(nn.Module):
    """A frozen stand-in for a model in eval mode, for attacks: same logits, less work.

    BatchNorm that follows a convolution becomes part of its weights; parameters carry no gradient, so that backward
    computes input gradients only and keeps no activations for weights; everything behind the first convolution may run
    in half precision, while the input, the normalisation and the first convolution stay in the model's own (bfloat16
    would round an image in [0, 1] by up to 0.5/255). `refresh` copies the model's current weights, once a step.

    Args:
        model: The model to stand in for. It is traced with ``torch.fx``.
        dtype: Precision behind the first convolution; None keeps the model's.
        channels_last: Whether to run convolutions in NHWC memory order.

    Raises:
        torch.fx.proxy.TraceError: The model's forward depends on its data in a way that cannot be traced; attack the
            model itself then.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> x = torch.rand(2, 3, 4, 4)
        >>> bool(torch.allclose(Folded(net)(x), net(x), atol=1e-6))
        True
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None = None, channels_last: bool = True) -> None:
        super().__init__()
        self.logit_scale: Tensor | float = 1.0
        self._net = trace(copy.deepcopy(model).eval().requires_grad_(False))
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._pairs = _fold_in_place(self._net)
        self._dtype = dtype
        self._compiled: Callable[[Tensor], Tensor] | None = None
        self._shape: torch.Size | None = None
        self._note: Callable[[str], None] = lambda line: None
        self._whole = {
            name for name, module in self._net.named_modules() if isinstance(module, FloatLinear | Normalize)
        }
        if dtype is not None:
            self._whole |= _cast_after_first_convolution(self._net, dtype, self._format)
        self._net.graph.lint()
        self._net.recompile()
        self._net.to(memory_format=self._format)
        self.refresh(model)
        self.eval()

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Take over the weights and running statistics that `model` has now."""
        self.logit_scale = logit_scale(model)
        modules = dict(model.named_modules())
        source = dict(model.named_parameters()) | dict(model.named_buffers())
        folded = {name for pair in self._pairs for name in pair}
        for conv_name, norm_name in self._pairs:
            conv, norm = modules[conv_name], modules[norm_name]
            weight, bias = fusion.fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            target = self._net.get_submodule(conv_name)
            _put(target, "weight", weight, self._precision(conv_name, weight), self._format)
            _put(target, "bias", bias, self._precision(conv_name, bias), self._format)
        for name, module in self._net.named_modules():
            if name in folded:
                continue
            for key in [*module._parameters, *module._buffers]:
                new = source.get(f"{name}.{key}" if name else key)
                if new is not None:
                    _put(module, key, new, self._precision(name, new), self._format)

    def _precision(self, name: str, like: Tensor) -> torch.dtype:
        """What a tensor of this module is kept in: BatchNorm takes float32 statistics beside half-precision images."""
        norm = isinstance(self._net.get_submodule(name), nn.modules.batchnorm._NormBase)
        if self._dtype is None or norm or name in self._whole or not like.is_floating_point():
            return like.dtype
        return self._dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) for images (B, C, H, W), in at least the model's own precision."""
        given = x.contiguous(memory_format=self._format)
        with without_autocast(x.device.type):
            logits = None if self._compiled is None else self._by_compiled(given)
            logits = self._net(given) if logits is None else logits
        return logits.to(x.dtype)

    def compile_passes(self, note: Callable[[str], None] = lambda line: None) -> None:
        """Let PyTorch compile the forward and the backward pass, for images of the shape that comes first.

        Images of any other shape (the rest of a data set, a batch that instances leave) take the uncompiled network:
        each shape would be compiled anew. `refresh` writes in place, so that nothing is compiled again after it. The
        compiling itself happens in the first passes and takes seconds to minutes.

        Args:
            note: Told when PyTorch cannot compile this network, which then runs uncompiled.
        """
        # This copy's own generated code, not a method that all copies share: PyTorch counts recompilations by code.
        self._compiled = torch.compile(self._net.forward, dynamic=False)
        self._note = note

    def _by_compiled(self, x: Tensor) -> Tensor | None:
        """The logits, or None where they must come from the uncompiled network."""
        assert self._compiled is not None
        first = self._shape is None
        self._shape = x.shape if self._shape is None else self._shape
        if x.shape != self._shape:
            return None
        try:
            if first:  # the backward pass, too, fails here or never
                with torch.enable_grad():
                    leaf = x.detach().requires_grad_()
                    torch.autograd.grad(self._compiled(leaf).sum(), leaf)
            return self._compiled(x)
        except Exception as error:  # PyTorch's compilers fail in any way they like
            self._compiled = None
            self._note(f"PyTorch cannot compile this network, which runs uncompiled: {first_line(error)}")
            return None

    def train(self, mode: bool = True) -> Folded:
        """Stays in eval mode: the running statistics are in the weights."""
        return super().train(False)


def _put(module: nn.Module, key: str, new: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Set a parameter or buffer, in place where shape and precision allow, so that nothing is allocated per step."""
    held = getattr(module, key)
    if held is not None and held.shape == new.shape and held.dtype == dtype and held.device == new.device:
        held.copy_(new)
        return
    made = new.detach().to(dtype, copy=True)
    if made.ndim == 4:
        made = made.contiguous(memory_format=memory_format)
    if key in module._buffers:
        module._buffers[key] = made
    else:
        module._parameters[key] = nn.Parameter(made, requires_grad=False)


def _fold_in_place(net: torch.fx.GraphModule) -> list[tuple[str, str]]:
    """Route around every BatchNorm whose only input is a convolution that nobody else reads; returns the pairs."""
    modules: dict[str, Any] = dict(net.named_modules())
    calls: dict[str, int] = {}
    for node in net.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    pairs = []
    for node in list(net.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or not isinstance(modules[str(before.target)], nn.Conv2d):
            continue
        norm = modules[str(node.target)]
        used_once = calls[str(node.target)] == calls[str(before.target)] == 1 and len(before.users) == 1
        if not used_once or not norm.track_running_stats:
            continue
        node.replace_all_uses_with(before)
        net.graph.erase_node(node)
        pairs.append((str(before.target), str(node.target)))
    net.graph.eliminate_dead_code()
    return pairs


def _cast_after_first_convolution(
    net: torch.fx.GraphModule, dtype: torch.dtype, memory_format: torch.memory_format
) -> set[str]:
    """Put a cast behind the first convolution, or behind the input if there is none; returns what precedes it."""
    modules = dict(net.named_modules())
    net.add_submodule("_cast", _Cast(dtype, memory_format))
    for node in net.graph.nodes:
        first = node.op == "call_module" and isinstance(modules[str(node.target)], nn.Conv2d)
        if first or (node.op == "placeholder" and not any(isinstance(m, nn.Conv2d) for m in modules.values())):
            with net.graph.inserting_after(node):
                cast = net.graph.call_module("_cast", (node,))
            node.replace_all_uses_with(cast)
            cast.args = (node,)
            return {str(node.target)} if first else set()
    return set()
