"""Classification heads: what turns features (B, D) into logits (B, K)."""

from __future__ import annotations

import math

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

from instar.errors import UserError, unknown
from instar.expression import value
from instar.models.precision import FloatLinear, without_autocast

HEADS = ("linear", "cosine")


@torch.fx.wrap
def cosine_logits(features: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """Scaled cosine similarities, ``scale * (cos(features, weight_k) + bias_k)``, in the type of ``weight``.

    Args:
        features: (B, D).
        weight: One direction a class (K, D).
        bias: (K,), or None.
        scale: Number without dimensions.

    Returns:
        Logits (B, K).

    Example:
        >>> cosine_logits(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]]), None, torch.tensor(8.0))
        tensor([[8., 0.]])
    """
    with without_autocast(features.device.type):
        directions = functional.normalize(features.to(weight.dtype), dim=1)
        return scale * functional.linear(directions, functional.normalize(weight, dim=1), bias)


class Cosine(nn.Linear):
    """A cosine head: logits are ``s * z`` with ``z_k = cos(h, W_k) + b_k``.

    The scale s is a buffer and part of the output, so that every attack, evaluation and export sees the scaled logits:
    attacks on z itself (range [-1, 1]) overstate robustness.

    Args:
        in_features: Length D of the features.
        classes: Number of classes K.
        scale: s > 0, the inverse temperature; 8 is SPAT's published value.
        bias: Whether z has a bias, as SPAT's code has; hypersphere embedding (HE) has none.

    Raises:
        UserError: If ``scale`` is not positive.

    Source:
        SPAT (arXiv 2210.15068), section 3, and its code; Pang et al. 2020, "Boosting Adversarial Training with
        Hypersphere Embedding", equation 5.
    Deviations:
        SPAT's code overwrites W with its unit rows at every forward and takes the gradient at those as free variables;
        here W is normalised inside the function, so the gradient lies in the tangent space (the radial part, which the
        next normalisation removes, is gone). Values are equal.

    Example:
        >>> head = Cosine(2, 3, scale=8.0, bias=False)
        >>> h = torch.tensor([[1.0, 2.0]])
        >>> bool(torch.allclose(head(h), head(5 * h)))
        True
    """

    scale: Tensor

    def __init__(self, in_features: int, classes: int, *, scale: float = 8.0, bias: bool = True) -> None:
        if not scale > 0:
            raise UserError(f"scale of a cosine head must be positive; got {scale!r}. SPAT uses 8, HE 15.")
        super().__init__(in_features, classes, bias=bias)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, features: Tensor) -> Tensor:
        """The scaled logits (B, K) of features (B, D)."""
        return cosine_logits(features, self.weight, self.bias, self.scale)

    def extra_repr(self) -> str:
        """The sizes and the scale as they print."""
        return f"{super().extra_repr()}, scale={self.scale.item():g}"


@value
class CosineHead:
    """What a method may require of its model: a cosine head with this scale.

    Attributes:
        scale: s > 0, the factor on the logits.
        bias: Whether the head has a bias.

    Raises:
        UserError: `scale` is not a positive number.

    Example:
        >>> CosineHead(8.0).lacking(nn.Sequential())
        'the model has no attribute `head` that is a cosine head'
        >>> net = nn.Module()
        >>> net.head = Cosine(4, 2, scale=8.0)
        >>> CosineHead(8.0).lacking(net) is None, CosineHead(5.0).lacking(net)
        (True, 'its cosine head has the scale 8, not 5')
    """

    scale: float = 8.0
    bias: bool = True

    def __post_init__(self) -> None:
        """Check the scale."""
        if not 0 < self.scale < math.inf:
            raise UserError(f"scale of a cosine head must be positive; got {self.scale}. SPAT uses 8, HE 15.")

    def lacking(self, model: nn.Module, *, look_at_scale: bool = True) -> str | None:
        """What `model` lacks, in words; None if it has all. Looking at the scale waits for the device."""
        head = getattr(model, "head", None)
        if not isinstance(head, Cosine):
            return "the model has no attribute `head` that is a cosine head"
        if look_at_scale and not math.isclose(head.scale.item(), self.scale, rel_tol=1e-6):
            return f"its cosine head has the scale {head.scale.item():g}, not {self.scale:g}"
        return None


def logit_scale(model: nn.Module) -> Tensor | float:
    """What a model multiplies its logits by: the scale of its cosine head, 1 without one.

    Example:
        >>> logit_scale(nn.Linear(2, 2))
        1.0
    """
    kept = getattr(model, "logit_scale", None)
    head = getattr(model, "head", None)
    return kept if kept is not None else head.scale if isinstance(head, Cosine) else 1.0


def build_head(kind: str, in_features: int, classes: int, *, scale: float = 8.0, bias: bool = True) -> nn.Linear:
    """A head by name; both kinds compute in float32 under autocast.

    Args:
        kind: ``"linear"`` or ``"cosine"``.
        in_features: Length D of the features.
        classes: Number of classes K.
        scale: Logit scale of the cosine head; the linear head has none.
        bias: Whether the head has a bias.

    Returns:
        A module (B, D) -> (B, K) with ``weight`` (K, D) and ``bias``.

    Raises:
        UserError: If ``kind`` is unknown.

    Example:
        >>> build_head("linear", 4, 10)
        FloatLinear(in_features=4, out_features=10, bias=True)
    """
    if kind == "linear":
        return FloatLinear(in_features, classes, bias=bias)
    if kind == "cosine":
        return Cosine(in_features, classes, scale=scale, bias=bias)
    raise unknown("head", kind, HEADS)
