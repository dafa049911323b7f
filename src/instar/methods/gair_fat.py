"""GAIR-FAT: GAIRAT's weights on friendly adversarial examples (Zhang et al. 2021)."""

from __future__ import annotations

from instar.attacks import PGD
from instar.method import Method
from instar.methods.gairat import check_steps, geometry_weight
from instar.schedules import Schedule, Steps
from instar.signals import CrossEntropy, Patience
from instar.threat import ball


def gair_fat(
    *,
    patience: float | Schedule = Steps(0, ((40 / 120, 3), (70 / 120, 6))),
    shift: float | Schedule = 0.0,
    burn_in: float = 0.5,
    weight: str = "tanh",
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """GAIR-FAT: friendly adversarial training that weighs an instance more, the fewer steps suffice to fool it.

    Equation:
        min_θ mean_i ω̂_i CE(f_θ(x′_i), y_i),   ω̂_i as in GAIRAT,
        x′_i = the PGD iterate τ steps after the first misclassified one

    Args:
        patience: τ; 0 for 40 of 120 epochs, then 3, then 6 for the last 50.
        shift: λ after the burn-in; 0 in the official script.
        burn_in: Share of the run with uniform weights; 60 of 120 epochs.
        weight: ``"tanh"``, ``"sigmoid"``, ``"discrete"`` or ``"constant"``.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Largest number of attack steps K, at least 2.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With λ = ∞ it is FAT with this patience, with τ ≥ K GAIRAT.

    Raises:
        UserError: A negative τ, fewer than 2 steps, λ of NaN, or an impossible radius, step or norm.

    Example:
        >>> gair_fat(patience=0, burn_in=0)
        Method(PGD(stop=Patience()), GeometryWeight(0.0) * CrossEntropy())

    Source: Zhang et al. 2021, Algorithm 3 of the paper's repository; official code for the schedules.
    Deviations: the batch keeps its order. The official code reorders it and, behind the burn-in, pairs the reordered
        images with labels in the original order; that is not reproduced.
    """
    check_steps(steps)
    attack = PGD(ball(norm, eps), steps=steps, step_size=step_size, stop=Patience(patience))
    return Method(attack, geometry_weight(shift, burn_in, weight) * CrossEntropy())
