"""MAIL: margins as instance weights (Liu et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from instar.attacks import PGD, Gaussian
from instar.errors import UserError
from instar.evidence import UNLABELLED, Evidence
from instar.expression import value
from instar.method import Method
from instar.schedules import Schedule, Steps
from instar.signals import KL, CrossEntropy, ProbabilityGap, Signal
from instar.threat import ball


@value
class ProbabilityMarginWeight(Signal):
    """MAIL's weight: ω = 3 σ(slope · (PM + bias)), PM = max_{j≠y} p_j(x′) − p_y(x′), detached, not normalised.

    Attributes:
        slope: Steepness; 0 gives the constant 1.5.
        bias: Shift of the margin at which the weight is half of its largest.

    Source: Liu et al. 2021 (MAIL), official code.
    """

    slope: float = 10.0
    bias: float = -0.5

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits."""
        return frozenset({"adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Weights (B,) in (0, 3); 1 for an instance without a label."""
        weight = (3 * torch.sigmoid(self.slope * (ProbabilityGap()(evidence) + self.bias))).detach()
        return torch.where(evidence.y == UNLABELLED, torch.ones_like(weight), weight)


@value
class After(Signal):
    """1 before the gate opens, the weight afterwards: w^gate with gate 0, then 1.

    Attributes:
        weight: The weight.
        gate: 0 or 1; a `Schedule` opens it.
    """

    weight: Signal
    gate: float | Schedule

    def __call__(self, evidence: Evidence) -> Tensor:
        """Weights (B,)."""
        if isinstance(self.gate, Schedule):
            raise UserError(f"gate is still the schedule {self.gate!r}: use method.at(progress) first")
        weight = self.weight(evidence)
        return weight if self.gate else torch.ones_like(weight)


def mail_at(
    *,
    slope: float = 10.0,
    bias: float = -0.5,
    burn_in: float = 75 / 120,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """MAIL-AT: adversarial training weighted by the probability margin of the adversarial example.

    Equation:
        min_θ mean_i ω_i CE(f_θ(x′_i), y_i),   ω_i = 3 σ(slope (PM_i + bias)),
        PM_i = max_{j≠y} p_j(x′_i) − p_y(x′_i)

    Args:
        slope: Steepness; 10 in the paper.
        bias: −0.5 in the paper.
        burn_in: Share of the run with weights of 1; 75 of 120 epochs.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. During the burn-in it is PGD-AT.

    Raises:
        UserError: An impossible radius, step or norm.

    Example:
        >>> mail_at(burn_in=0).loss
        ProbabilityMarginWeight() * CrossEntropy()

    Source: Liu et al. 2021; official code.
    Deviations: none known.
    Known criticism: as every method that weights the cross-entropy, judge it by AutoAttack (reported 44.2 against
        44.9 for plain adversarial training).
    """
    weight = _gated(ProbabilityMarginWeight(slope, bias), burn_in)
    return Method(PGD(ball(norm, eps), steps=steps, step_size=step_size), weight * CrossEntropy())


def mail_trades(
    *,
    beta: float | Schedule = 6.0,
    slope: float = 2.0,
    bias: float = 0.0,
    burn_in: float = 75 / 120,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """MAIL-TRADES: TRADES whose consistency term is weighted by the probability margin.

    Equation:
        min_θ mean_i [ CE(f(x_i), y_i) + β ω_i KL(p(x_i) ‖ p(x′_i)) ],   ω_i = 3 σ(slope (PM_i + bias))

    Args:
        beta: β of TRADES.
        slope: Steepness; 2 in the paper.
        bias: 0 in the paper.
        burn_in: Share of the run with weights of 1; 75 of 120 epochs.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. During the burn-in it is TRADES.

    Raises:
        UserError: An impossible radius, step or norm.

    Example:
        >>> mail_trades(burn_in=0).loss
        CrossEntropy('clean') + 6.0 * (ProbabilityMarginWeight(2.0, bias=0.0) * KL())

    Source: Liu et al. 2021; official code.
    Deviations: none known.
    """
    weight = _gated(ProbabilityMarginWeight(slope, bias), burn_in)
    attack = PGD(ball(norm, eps), KL(), steps=steps, step_size=step_size, start=Gaussian(0.001))
    return Method(attack, CrossEntropy("clean") + beta * (weight * KL()))


def _gated(weight: Signal, burn_in: float) -> Signal:
    return After(weight, Steps(0, ((burn_in, 1),))) if burn_in else weight
