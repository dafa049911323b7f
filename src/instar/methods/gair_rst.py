"""GAIR-RST: two adversaries of each instance, mixed by its geometry (Zhang et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from instar.attacks import PGD, Gaussian, Several
from instar.errors import UserError
from instar.evidence import Evidence
from instar.expression import value
from instar.method import Method
from instar.methods.gairat import check_steps
from instar.schedules import Schedule, Steps
from instar.signals import KL, CrossEntropy, Margin, Signal
from instar.threat import ball

PLAIN_ABOVE = 10
"""λ above which the official code trains plain TRADES and runs no margin attack."""


@value
class AttackableShare(Signal):
    """How much of an instance's loss belongs to the first adversary: q = (1 + tanh(λ + K / 2 − κ)) / 2.

    Near 1 for attackable instances (small κ), near 0 for guarded ones; not normalised over the batch, without gradient.

    Attributes:
        shift: λ; +inf gives exactly 1. May be a `Schedule`.

    Raises:
        UserError: λ of NaN.

    Source: Zhang et al. 2021, official code of GAIR-RST.
    """

    shift: float | Schedule = 3.0

    def __post_init__(self) -> None:
        """Check λ."""
        if not isinstance(self.shift, Schedule) and math.isnan(self.shift):
            raise UserError("shift of AttackableShare (λ) must be a number or inf; got nan")

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the attack's own record."""
        return frozenset({"kappa"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Shares (B,) in [0, 1]."""
        if isinstance(self.shift, Schedule):
            raise UserError(f"shift is still the schedule {self.shift!r}: use method.at(progress) first")
        if evidence.kappa is None:
            raise UserError("AttackableShare needs an attack that counts κ; this Evidence has none")
        like = evidence.clean if evidence.clean is not None else evidence.x
        return torch.sigmoid(2 * (self.shift + evidence.budget / 2 - evidence.kappa.to(like.dtype)))


def gair_rst(
    *,
    beta: float | Schedule = 6.0,
    shift: float | Schedule = 3.0,
    burn_in: float = 0.5,
    confidence: float = 50.0,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """GAIR-RST: TRADES on a mixture of its own adversary and a margin adversary, by the instance's geometry.

    Equation:
        min_θ mean_i [ CE(f(x_i), y_i) + β ( q_i KL(p(x_i) ‖ p(x′_i)) + (1 − q_i) KL(p(x_i) ‖ p(x″_i)) ) ],
        q_i = (1 + tanh(λ + K/2 − κ_i)) / 2,   x′ = PGD on the KL,   x″ = PGD on min(max_{j≠y} z_j − z_y, confidence)

    The weights of an instance sum to 1: nothing is down-weighted. Combine it with extra data (``--extra``) as the
    published models do.

    Args:
        beta: β of TRADES.
        shift: λ after the burn-in; 3 in the official code. A `Schedule` takes the place of the
            burn-in too.
        burn_in: Share of the run with plain TRADES (RST), for which the margin attack is not run; 100 of 200 epochs.
        confidence: Cap of the margin attack, in logits.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attacks; the official code uses 0.007.
        steps: Steps of each attack, at least 2.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. During the burn-in, and with λ > 10, it is TRADES, in loss, gradient and cost.

    Raises:
        UserError: Fewer than 2 steps, λ of NaN, or an impossible radius, step or norm.

    Example:
        >>> gair_rst(burn_in=0).loss.left
        CrossEntropy('clean')

    Source: Zhang et al. 2021, official code of GAIR-RST (89.36 % clean, 59.64 % AutoAttack with WRN-28-10 and 500,000
        pseudo-labelled images).
    Deviations: the clean prediction is computed once a step; BatchNorm's statistics see the margin adversary's forward
        not at all (the official order is x′, x″, x).
    """
    check_steps(steps)
    around = ball(norm, eps)
    kl = PGD(around, KL(), steps=steps, step_size=step_size, start=Gaussian(0.001))
    margin = PGD(around, Margin(cap=confidence), steps=steps, step_size=step_size, start=Gaussian(0.001))
    if not isinstance(shift, Schedule) and shift > PLAIN_ABOVE:
        shift = math.inf
    gate: float | Schedule = 0 if shift == math.inf else 1
    share = AttackableShare(shift)
    if (
        gate and burn_in and not isinstance(shift, Schedule)
    ):  # with λ = ∞ the share is exactly 1, and the gate is closed
        gate = Steps(0, ((burn_in, 1),))
        share = AttackableShare(Steps(math.inf, ((burn_in, float(shift)),)))
    mixture = share * KL() + gate * ((1 - share) * KL("other"))
    return Method(Several(kl, (margin,), gate), CrossEntropy("clean") + beta * mixture)
