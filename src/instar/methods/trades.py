"""TRADES (Zhang et al. 2019)."""

from __future__ import annotations

from instar.attacks import PGD, Gaussian
from instar.method import Method
from instar.schedules import Schedule
from instar.signals import KL, CrossEntropy
from instar.threat import ball


def trades(
    *,
    beta: float | Schedule = 6.0,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """TRADES: clean cross-entropy, plus how far the attack can move the prediction.

    Equation:
        min_θ mean_i [ CE(f(x_i), y_i) + β KL(p(x_i) ‖ p(x′_i)) ],
        x′_i = PGD on the same KL from x_i + 0.001 · N(0, 1)

    Args:
        beta: β, weight of the consistency term; 6 in the paper (1 leans to clean accuracy).
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With β = 0 it is natural training.

    Raises:
        UserError: An impossible radius, step or norm.

    Example:
        >>> trades().loss
        CrossEntropy('clean') + 6.0 * KL()

    Source: Zhang et al. 2019, Eq. 5 and official code (no stop-gradient on p(x); attack in eval mode).
    Deviations: one clean forward instead of two (the same loss and gradient; BatchNorm's running statistics see the
        clean batch once per step, not twice).
    """
    attack = PGD(ball(norm, eps), KL(), steps=steps, step_size=step_size, start=Gaussian(0.001))
    return Method(attack, CrossEntropy("clean") + beta * KL())
