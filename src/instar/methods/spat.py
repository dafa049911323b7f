"""SPAT: self-paced adversarial training with reweighted hard class pairs (Hou et al. 2022)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from instar.attacks import PGD, Gaussian
from instar.errors import UserError
from instar.evidence import UNLABELLED, Evidence
from instar.expression import value
from instar.method import Method
from instar.models.heads import CosineHead
from instar.schedules import Schedule
from instar.signals import Signal
from instar.signals.losses import check_choice
from instar.threat import ball


@value
class SelfPacedCrossEntropy(Signal):
    """Cross-entropy of logits that each class modulates at its own pace, from its own cosine z (the logits over s).

    =============  ==================================================  ===================================
    form           true class                                          wrong class j
    =============  ==================================================  ===================================
    ``"plain"``    u_y = s (1 + m − z_y) z_y                           u_j = s (m + z_j) z_j
    ``"margin"``   u_y = s (1 + m − z_y)(z_y + m − 1)                  u_j = s (z_j + m)²
    =============  ==================================================  ===================================

    A class that is far from where it should be gets the larger factor: of the wrong ones the most similar, the hard
    pair. In the plain form the push on z_y turns around above (1 + m) / 2 and a class below −m / 2 is pulled up again.

    Attributes:
        margin: m, at least 0.
        form: ``"plain"`` (published code) or ``"margin"`` (its first version, monotone up to z_y = 1).
        of: Which logits: ``"clean"`` (published), ``"adv"`` or ``"anchor"``.
        detach: Whether the factors carry no gradient; the published code lets them carry it.

    Raises:
        UserError: A negative margin, an unknown form or name of logits.

    Example:
        >>> e = Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), clean=torch.zeros(1, 10), scale=8.0)
        >>> SelfPacedCrossEntropy()(e)  # ln 10, whatever s and m are
        tensor([2.3026])

    Source: Hou et al. 2022, official code (its printed equations were not available to us).
    """

    margin: float = 0.2
    form: str = "plain"
    of: str = "clean"
    detach: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_at_least_zero("margin of SelfPacedCrossEntropy (m)", self.margin)
        check_choice("SelfPacedCrossEntropy", "form", self.form, ("plain", "margin"))
        check_choice("SelfPacedCrossEntropy", "of", self.of, ("clean", "adv", "anchor"))

    @property
    def needs(self) -> frozenset[str]:
        """The logits it reads."""
        return frozenset({self.of})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Loss (B,); 0 for an instance without a label. A soft target takes the place of the label in the sum."""
        logits = evidence.logits(self.of)
        z = logits / evidence.scale
        true = torch.zeros_like(z, dtype=torch.bool).scatter_(1, evidence.y.clamp_min(0).unsqueeze(1), True)
        seen = z.detach() if self.detach else z
        factor = torch.where(true, 1 + self.margin - seen, self.margin + seen)
        base = z if self.form == "plain" else torch.where(true, z + self.margin - 1, z + self.margin)
        modulated = evidence.scale * factor * base
        if evidence.target is None:
            return F.cross_entropy(modulated, evidence.y, reduction="none", ignore_index=UNLABELLED)
        return -(evidence.target.to(modulated.dtype) * F.log_softmax(modulated, 1)).sum(1)


@value
class SelfPacedKL(Signal):
    """Consistency of the two predictions, class by class: Σ_c r_c (r_c + n), r_c = p_c (log p_c − log q_c).

    It equals Σ_c r_c² + n KL(p ‖ q): the hard pair's class, whose r is large, weighs more than in the plain KL, to
    which it tends (over n) as n grows. p = softmax of the clean logits, q of the adversarial ones; gradient flows
    through both. As an attack objective p is a constant.

    Attributes:
        offset: n, at least 0.
        detach: Whether the factors r + n carry no gradient; the published code lets them carry it.

    Raises:
        UserError: A negative offset.

    Source: Hou et al. 2022, official code.
    """

    offset: float = 0.2
    detach: bool = False

    vanishes_at_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the field."""
        _check_at_least_zero("offset of SelfPacedKL (n)", self.offset)

    @property
    def needs(self) -> frozenset[str]:
        """Clean and adversarial logits."""
        return frozenset({"clean", "adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Loss (B,), non-negative up to rounding."""
        p = F.log_softmax(evidence.logits("clean"), 1)
        q = F.log_softmax(evidence.logits("adv"), 1)
        r = p.exp() * (p - q)
        factor = (r.detach() if self.detach else r) + self.offset
        return (r * factor).sum(1)


def _check_at_least_zero(name: str, number: float) -> None:
    if not number >= 0:
        raise UserError(f"{name} must be at least 0; got {number}")


def spat(
    *,
    beta: float | Schedule = 6.0,
    scale: float = 8.0,
    margin: float = 0.2,
    offset: float = 0.2,
    form: str = "plain",
    detach: bool = False,
    head_bias: bool = False,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """SPAT: reweight hard class pairs at their own pace, and keep their predictions consistent under attack.

    Equation:
        min_θ mean_i [ CE(u(x_i), y_i) + β Σ_c r_ic (r_ic + n) ],   r_ic = p_c(x_i) log(p_c(x_i) / p_c(x′_i)),
        u_y = s (1 + m − z_y) z_y,  u_j = s (m + z_j) z_j,   z_c = cos(features, W_c),  p = softmax(s z),
        x′_i = PGD on the second term from x_i + 0.001 · N(0, 1)

    Args:
        beta: β, weight of the consistency term.
        scale: s, the factor on the cosines; 8 for WRN-34-10, 5 in the first version of the code, for ResNet-18. The
            model's head multiplies by it, so that every attack and evaluation sees s z.
        margin: m.
        offset: n.
        form: ``"plain"`` or ``"margin"``; see `SelfPacedCrossEntropy`.
        detach: Whether the self-paced factors carry no gradient.
        head_bias: Whether the cosine head has a bias. The official code's has one; multiplied by s and squared by the
            self-pacing it runs away at learning rates above the official 0.1 (on digits with our usual 0.2 the loss
            grew beyond 1e14 in two epochs), so it is off by default.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method, which requires a cosine head. With n → ∞ and β / n fixed its second term is that of TRADES on the
        logits s z; with β = 0 it is natural training on modulated logits.

    Raises:
        UserError: A negative m or n, an unknown form, or an impossible scale, radius, step or norm.

    Example:
        >>> spat().loss
        SelfPacedCrossEntropy() + 6.0 * SelfPacedKL()

    Source: Hou et al. 2022; official code (factors not detached, gradient through both predictions, eval-mode attack).
    Deviations: the head normalises its weights inside the graph instead of overwriting them, so that their gradient has
        no radial part; the clean prediction is computed once in the attack (the same images); no bias by default.
    """
    robust = SelfPacedKL(offset, detach)
    attack = PGD(ball(norm, eps), robust, steps=steps, step_size=step_size, start=Gaussian(0.001))
    accurate = SelfPacedCrossEntropy(margin, form, detach=detach)
    return Method(attack, accurate + beta * robust, requires=CosineHead(float(scale), head_bias))
