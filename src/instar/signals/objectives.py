"""Objectives of adaptive attacks: what cross-entropy alone does not see."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from instar.errors import UserError
from instar.evidence import UNLABELLED, Evidence
from instar.expression import value
from instar.signals.algebra import Signal


@value
class Scaled(Signal):
    """A signal of α·z instead of the logits z: with cross-entropy, the logit-scaling attack.

    Cross-entropy spreads its direction over the wrong classes in proportion to their probability. With flat logits
    that is all of them, and a large α brings it to the best one; with saturated logits the float32 softmax is one-hot
    and has no gradient, and a small α brings it back.

    Attributes:
        objective: The signal.
        alpha: α, positive. 1 changes nothing.

    Raises:
        UserError: `alpha` is not a positive number.

    Example:
        >>> from instar.signals import CrossEntropy
        >>> e = Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), adv=torch.tensor([[1.0, 0.0]]))
        >>> bool(Scaled(CrossEntropy(), 10.0)(e) < CrossEntropy()(e))
        True

    Source: Hitaj et al. 2021 (LSA), there with cross-entropy.
    """

    objective: Signal
    alpha: float

    def __post_init__(self) -> None:
        """Check the factor."""
        if not 0 < self.alpha < math.inf:
            raise UserError(f"alpha of Scaled must be a positive number; got {self.alpha}")

    def __call__(self, evidence: Evidence) -> Tensor:
        """The signal of the scaled logits (B,)."""
        names = ("clean", "adv", "anchor", "anchor_adv")
        found = {name: getattr(evidence, name) for name in names}
        scaled = {name: self.alpha * logits for name, logits in found.items() if logits is not None}
        return self.objective(replace(evidence, **scaled))


@value
class TargetedMargin(Signal):
    """How far one chosen wrong class leads: z_t − z_y, in logits.

    The target t is the wrong class with the rank-th largest *clean* logit, so it does not change along an attack.

    Attributes:
        rank: 1 for the best wrong class, up to K − 1.

    Raises:
        UserError: A rank below 1; at the call, one that is larger than there are wrong classes.

    Example:
        >>> z = torch.tensor([[2.0, 0.5, 1.0]])
        >>> e = Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), clean=z, adv=z)
        >>> [TargetedMargin(rank)(e).item() for rank in (1, 2)]
        [-1.0, -1.5]

    Source: Gowal et al. 2019 (MultiTargeted); targets in the order of clean logits as in AutoAttack.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.rank < 1:
            raise UserError(f"rank of TargetedMargin must be at least 1; got {self.rank}")

    @property
    def needs(self) -> frozenset[str]:
        """Clean logits choose the target."""
        return frozenset({"clean", "adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Margin of the target (B,); −inf for instances without a label."""
        logits, clean = evidence.logits("adv"), evidence.logits("clean").detach()
        if self.rank >= clean.shape[1]:
            raise UserError(f"rank of TargetedMargin must be at most {clean.shape[1] - 1} here; got {self.rank}")
        known = evidence.y != UNLABELLED
        place = evidence.y.clamp_min(0).unsqueeze(1)
        order = clean.scatter(1, place, -math.inf).argsort(dim=1, descending=True, stable=True)
        target = order[:, self.rank - 1 : self.rank]
        lead = (logits.gather(1, target) - logits.gather(1, place)).squeeze(1)
        return torch.where(known, lead, torch.full_like(lead, -math.inf))
