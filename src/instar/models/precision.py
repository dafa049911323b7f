"""Layers that keep float32 where bfloat16 would lose the attack: the first convolution and the classification head.

Under ``torch.autocast`` with bfloat16 an image in [0, 1] is rounded by up to 0.5/255 (bfloat16 has 8 significant
bits), 6 % of an eps of 8/255, and logits are rounded by up to 0.2 % of their size, which makes ties. Both layers cost
little in float32.

How they stay correct under ``torch.fx``: the tracer runs Python code once and would forget the ``with`` block that
switches autocast off. The arithmetic therefore lives in functions registered by ``torch.fx.wrap``, which every tracer
records as one node. ``torch.fx.symbolic_trace`` shows them as ``call_function`` nodes; :func:`trace` keeps the layers
whole (``call_module`` of an ``nn.Conv2d`` or ``nn.Linear`` subclass), which is what a folding of BatchNorm looks for.
"""

from __future__ import annotations

import contextlib

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional


@torch.fx.wrap
def float_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """A convolution in the type of its weight, whatever autocast asks for.

    Args:
        x: Images (B, C, H, W), of any floating type.
        weight: Filters (O, C // groups, h, w); their type is the type of the result.
        bias: One value an output channel (O,), or None.
        stride: As in ``torch.nn.functional.conv2d``.
        padding: As there.
        dilation: As there.
        groups: As there.

    Returns:
        The convolution (B, O, H', W') in ``weight.dtype``.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     float_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), None, (1, 1), (0, 0), (1, 1), 1).dtype
        torch.float32
    """
    with without_autocast(x.device.type):
        return functional.conv2d(x.to(weight.dtype), weight, bias, stride, padding, dilation, groups)


@torch.fx.wrap
def float_linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An affine map in the type of its weight, whatever autocast asks for.

    Args:
        features: (B, D), of any floating type.
        weight: (K, D); its type is the type of the result.
        bias: (K,), or None.

    Returns:
        ``features @ weight.T + bias`` (B, K) in ``weight.dtype``.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     float_linear(torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(2, 3), None)
        tensor([[3., 3.]])
    """
    with without_autocast(features.device.type):
        return functional.linear(features.to(weight.dtype), weight, bias)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast does nothing.

    Args:
        device_type: ``tensor.device.type``.

    Returns:
        The context manager.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast("cpu"):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    if device_type == "meta":  # autocast does not know it, and there is nothing to round
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


class FloatStemConv2d(nn.Conv2d):
    """A first convolution in the type of its weights (float32), under autocast too; otherwise a plain ``nn.Conv2d``.

    Its output is float32 under autocast too; the next layer that autocast knows converts it.

    Example:
        >>> stem = FloatStemConv2d(3, 4, 3)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     stem(torch.zeros(1, 3, 8, 8)).dtype
        torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of images (B, C, H, W), in ``self.weight.dtype``."""
        return float_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FloatLinear(nn.Linear):
    """A linear layer in the type of its weights (float32), under autocast too; otherwise a plain ``nn.Linear``.

    Example:
        >>> head = FloatLinear(5, 2)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     head(torch.zeros(1, 5, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def forward(self, features: Tensor) -> Tensor:
        """The logits (B, K) of features (B, D), in ``self.weight.dtype``."""
        return float_linear(features, self.weight, self.bias)


class _LayerTracer(torch.fx.Tracer):
    """A tracer that keeps the layers of this file whole, as it keeps those of ``torch.nn``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FloatStemConv2d | FloatLinear) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> torch.fx.GraphModule:
    """The graph of a model in which every convolution is a module, the float32 stem included.

    Args:
        model: Any network that ``torch.fx`` can trace; all of this package's own can.

    Returns:
        A graph module that shares the parameters and buffers of ``model``.

    Example:
        >>> net = nn.Sequential(FloatStemConv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> [node.op for node in trace(net).graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    return torch.fx.GraphModule(model, _LayerTracer().trace(model))
