"""PGD adversarial training (Madry et al. 2018)."""

from __future__ import annotations

from instar.attacks import PGD
from instar.method import Method
from instar.schedules import Schedule
from instar.signals import CrossEntropy
from instar.threat import ball


def pgd_at(
    *,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """Adversarial training: minimise the cross-entropy at the worst point that PGD finds.

    Equation:
        min_θ mean_i CE(f_θ(x′_i), y_i),   x′_i = PGD on CE from a uniform start in the ball

    Args:
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack in the same unit.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With eps = 0 it is natural training.

    Raises:
        UserError: An impossible radius, step or norm.

    Example:
        >>> pgd_at()
        Method(PGD(), CrossEntropy())

    Source: Madry et al. 2018, Eq. 2.1; setting of Rice et al. 2020 and Pang et al. 2021.
    Deviations: BatchNorm uses its running statistics in the attack (Pang et al. found this no worse in robustness and
        better in clean accuracy); Rice et al. attack in train mode: ``--set attack.mode=train``.
    """
    return Method(PGD(ball(norm, eps), steps=steps, step_size=step_size), CrossEntropy())
