"""Terms of training losses and objectives of attacks."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from instar.errors import UserError
from instar.evidence import UNLABELLED, Evidence
from instar.expression import value
from instar.schedules import Schedule
from instar.signals.algebra import Signal


def check_choice(owner: str, name: str, given: object, allowed: tuple[object, ...]) -> None:
    """Refuse a field that is none of the `allowed` values.

    Raises:
        UserError: With the allowed values.
    """
    if given not in allowed:
        raise UserError(f"{name} of {owner} must be one of {', '.join(map(repr, allowed))}; got {given!r}")


@value
class CrossEntropy(Signal):
    """Cross-entropy of the logits with the label, in nats.

    CE(z, y) = −log softmax(z)_y, or −Σ_k t_k log softmax(z)_k with a soft target t.

    Attributes:
        of: Which logits: ``"adv"`` (default), ``"clean"``, ``"anchor"`` or ``"anchor_adv"`` (see `Evidence`).
        smoothing: Label smoothing s in [0, 1): the target becomes (1 − s) · onehot + s / K (the library convention;
            s of Bag of Tricks corresponds to s · K / (K − 1) here). 0 uses the plain label.

    Raises:
        UserError: Another name of logits, or a smoothing outside of [0, 1).

    Example:
        >>> from instar.evidence import Evidence
        >>> e = Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), adv=torch.tensor([[0.0, 0.0]]))
        >>> CrossEntropy()(e)
        tensor([0.6931])

    An instance without a label (−1) and without a soft target contributes 0.
    """

    of: str = "adv"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_choice("CrossEntropy", "of", self.of, ("adv", "clean", "anchor", "anchor_adv"))
        if not 0 <= self.smoothing < 1:
            raise UserError(f"smoothing must be in [0, 1); got {self.smoothing}")

    @property
    def needs(self) -> frozenset[str]:
        """The logits it reads."""
        return frozenset({self.of})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Cross-entropy (B,)."""
        logits = evidence.logits(self.of)
        if evidence.target is None:
            return F.cross_entropy(
                logits, evidence.y, reduction="none", ignore_index=UNLABELLED, label_smoothing=self.smoothing
            )
        target = evidence.target.to(logits.dtype)
        if self.smoothing:
            # Rows of zeros, of instances without a label, stay zero.
            share = target.sum(1, keepdim=True) / logits.shape[1]
            target = (1 - self.smoothing) * target + self.smoothing * share
        return -(target * F.log_softmax(logits, 1)).sum(1)


@value
class KL(Signal):
    """TRADES' consistency term: KL(p(x) ‖ p(x′)) = Σ_k p_k(x) (log p_k(x) − log p_k(x′)), in nats.

    The clean distribution is the target; gradient flows through both. As an attack objective p(x) is a constant,
    because the clean logits are computed once, without a graph.

    Attributes:
        of: Which adversary x′ is: ``"adv"``, or ``"other"`` for the first of the further ones (see `Several`).

    Raises:
        UserError: Another name.

    Example:
        >>> from instar.evidence import Evidence
        >>> z = torch.tensor([[1.0, -1.0]])
        >>> KL()(Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), clean=z, adv=z))
        tensor([0.])

    Source: Zhang et al. 2019 (TRADES), Eq. 5. Summed over classes; the mean over the batch is the step's.
    """

    of: str = "adv"

    vanishes_at_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the field."""
        check_choice("KL", "of", self.of, ("adv", "other"))

    @property
    def needs(self) -> frozenset[str]:
        """Clean and adversarial logits."""
        return frozenset({"clean", "adv" if self.of == "adv" else "others"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Divergence (B,), non-negative up to rounding."""
        p = F.log_softmax(evidence.logits("clean"), 1)
        q = F.log_softmax(evidence.logits(self.of), 1)
        return (p.exp() * (p - q)).sum(1)


@value
class Margin(Signal):
    """How far the best wrong class leads: max_{j≠y} z_j − z_y, in logits. Positive means misclassified.

    As an attack objective it is the margin loss of Carlini and Wagner, which flat or scaled logits do not mislead.

    Attributes:
        of: Which logits: ``"adv"`` (default), ``"clean"`` or ``"anchor"``.
        cap: Largest value, beyond which there is no gradient: 50 in the attack of GAIR-RST, a curriculum's bound in
            SAT's hinge. +inf (default) does not cap. May be a `Schedule`.

    Raises:
        UserError: Another name of logits, or a cap that is NaN.

    Example:
        >>> from instar.evidence import Evidence
        >>> e = Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), adv=torch.tensor([[2.0, 0.5, 1.0]]))
        >>> Margin()(e)
        tensor([-1.])

    Source: Carlini & Wagner 2017, loss f6; the cap is its confidence κ.
    """

    of: str = "adv"
    cap: float | Schedule = math.inf

    def __post_init__(self) -> None:
        """Check the fields."""
        check_choice("Margin", "of", self.of, ("adv", "clean", "anchor"))
        if not isinstance(self.cap, Schedule) and math.isnan(self.cap):
            raise UserError("cap of Margin must be a number or inf; got nan")

    @property
    def needs(self) -> frozenset[str]:
        """The logits it reads."""
        return frozenset({self.of})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Margin (B,)."""
        if isinstance(self.cap, Schedule):
            raise UserError(f"cap is still the schedule {self.cap!r}: use method.at(progress) first")
        margin = lead(evidence.logits(self.of), evidence.y)
        return margin if self.cap == math.inf else margin.clamp_max(self.cap)


def lead(scores: Tensor, y: Tensor) -> Tensor:
    """Score of the best wrong class minus that of the true one.

    Args:
        scores: (B, K), logits or probabilities, K ≥ 2.
        y: Labels (B,).

    Returns:
        (B,), with gradient to both scores. Instances without a label (−1) get −inf.

    Example:
        >>> lead(torch.tensor([[0.2, 0.8]]), torch.tensor([0]))
        tensor([0.6000])
    """
    known = y != UNLABELLED
    place = y.clamp_min(0).unsqueeze(1)
    true = scores.gather(1, place).squeeze(1)
    # Masked by −inf, not by 0: a product with 0 would hide negative scores behind the masked class.
    wrong = scores.scatter(1, place, float("-inf")).amax(1)
    return torch.where(known, wrong - true, torch.full_like(true, float("-inf")))


@value
class LogitShift(Signal):
    """Squared distance the attack moves the logits: ‖f(x′) − f(x)‖² = Σ_k (z′_k − z_k)².

    Both ends carry gradient. It is summed over classes, not averaged. The other distances are for ablations:

    ==============  ======================================================
    ``l2``          Σ_k (z′_k − z_k)² (published)
    ``l1``          Σ_k |z′_k − z_k|
    ``softmax_l2``  Σ_k (p′_k − p_k)²
    ``kl``          KL(p ‖ p′)
    ``loss``        |CE(z′, y) − CE(z, y)|; 0 for an instance without label
    ==============  ======================================================

    Attributes:
        reference: Where the clean logits come from: ``"anchor"`` (unperturbed weights, ISEAT) or ``"clean"``.
        distance: A name of the table.
        detach: Which end carries no gradient: ``"none"`` (published), ``"clean"`` or ``"adv"``.
        of: Where the adversarial logits come from: ``"adv"`` (perturbed weights, ISEAT) or ``"anchor_adv"``
            (unperturbed ones).

    Raises:
        UserError: An unknown name.

    Source: Li & Spratling 2023 (ISEAT), official code; Kannan et al. 2018 (ALP) for the plain pairing.
    """

    reference: str = "anchor"
    distance: str = "l2"
    detach: str = "none"
    of: str = "adv"

    vanishes_at_clean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        check_choice("LogitShift", "reference", self.reference, ("anchor", "clean"))
        check_choice("LogitShift", "distance", self.distance, ("l2", "l1", "softmax_l2", "kl", "loss"))
        check_choice("LogitShift", "detach", self.detach, ("none", "clean", "adv"))
        check_choice("LogitShift", "of", self.of, ("adv", "anchor_adv"))

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits and the reference."""
        return frozenset({self.of, self.reference})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Distance (B,)."""
        moved, clean = evidence.logits(self.of), evidence.logits(self.reference)
        moved = moved.detach() if self.detach == "adv" else moved
        clean = clean.detach() if self.detach == "clean" else clean
        if self.distance == "l2":
            return (moved - clean).square().sum(1)
        if self.distance == "l1":
            return (moved - clean).abs().sum(1)
        if self.distance == "loss":
            losses = [F.cross_entropy(z, evidence.y, reduction="none", ignore_index=UNLABELLED) for z in (moved, clean)]
            return (losses[0] - losses[1]).abs()
        p, q = F.log_softmax(clean, 1), F.log_softmax(moved, 1)
        if self.distance == "kl":
            return (p.exp() * (p - q)).sum(1)
        return (q.exp() - p.exp()).square().sum(1)
