"""GAIRAT: geometry-aware instance-reweighted adversarial training (Zhang et al. 2021)."""

from __future__ import annotations

import math

from instar.attacks import PGD
from instar.errors import UserError
from instar.method import Method
from instar.schedules import Schedule, Steps, lowest
from instar.signals import CrossEntropy, GeometryWeight
from instar.threat import ball


def gairat(
    *,
    shift: float | Schedule = -1.0,
    burn_in: float = 0.5,
    weight: str = "tanh",
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """GAIRAT: adversarial training that weighs an instance more, the fewer attack steps suffice to fool it.

    Equation:
        min_θ mean_i ω̂_i CE(f_θ(x′_i), y_i),   ω̂_i = B ω_i / Σ_j ω_j,
        ω_i = (1 + tanh(λ + 5 (1 − 2 κ_i / K))) / 2,   κ_i = #{k < K : x_i^k is classified correctly}

    During the burn-in λ = ∞: the weights are exactly 1 and the method is PGD-AT, bit for bit.

    Args:
        shift: λ after the burn-in; −1 in the paper, smaller concentrates the weight. +inf stays PGD-AT. A `Schedule`
            takes the place of the burn-in too.
        burn_in: Share of the run with uniform weights; 60 of 120 epochs in the paper. Above 1 it counts epochs.
        weight: ``"tanh"`` (paper), ``"sigmoid"``, ``"discrete"`` or ``"constant"`` (official code).
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Attack steps, at least 2.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method.

    Raises:
        UserError: Fewer than 2 steps, λ of NaN, an unknown weight function, or an impossible radius or step.

    Example:
        >>> gairat()
        Method(PGD(), GeometryWeight(Steps(inf, changes=((0.5, -1.0),))) * CrossEntropy())

    Source: Zhang et al. 2021, Algorithms 1 and 2, Eq. 6; official code for the uniform start and eval-mode attack.
    Deviations: for odd K see `GeometryWeight`.
    Known criticism: reweighting flattens logits and misleads PGD on cross-entropy: reported 55-58 % under PGD-20 are
        33-42 % under AutoAttack (Hitaj et al. 2021). Judge it by AutoAttack or a margin loss.
    """
    check_steps(steps)
    attack = PGD(ball(norm, eps), steps=steps, step_size=step_size)
    return Method(attack, geometry_weight(shift, burn_in, weight) * CrossEntropy())


def check_steps(steps: int | Schedule) -> None:
    """Refuse an attack by whose length no instances can be ranked.

    Raises:
        UserError: Fewer than 2 steps.
    """
    if lowest(steps) < 2:
        raise UserError(f"GAIRAT ranks instances by the steps they survive: steps must be at least 2; got {steps}")


def geometry_weight(shift: float | Schedule, burn_in: float, weight: str) -> GeometryWeight:
    """GAIRAT's weight behind a burn-in with uniform weights (λ = ∞); a schedule of λ takes the burn-in's place.

    Raises:
        UserError: λ of NaN, or an unknown weight function.
    """
    if isinstance(shift, Schedule) or burn_in == 0:
        return GeometryWeight(shift, weight)
    GeometryWeight(shift, weight)  # made once without a schedule, so that a wrong λ is refused before training begins
    return GeometryWeight(Steps(math.inf, ((burn_in, float(shift)),)), weight)
