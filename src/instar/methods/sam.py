"""SAM: sharpness-aware minimisation of the adversarial loss (Foret et al. 2021)."""

from __future__ import annotations

from dataclasses import replace

from instar.method import Method
from instar.methods.pgd_at import pgd_at
from instar.schedules import Schedule
from instar.weightspace import SAM


def at_sam(
    *,
    rho: float | Schedule = 0.05,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """AT-SAM: adversarial training whose gradient is taken at the sharpest point near the weights.

    Equation:
        min_θ mean_i CE(f_{θ+v}(x′_i), y_i),   v = ρ g / ‖g‖₂ with g the gradient of that loss at θ

    On any other method: ``--set perturbation="SAM(0.05)"``; with ``natural`` it is plain SAM.

    Args:
        rho: ρ, length of the step in weight space.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With ρ = 0 it is PGD-AT.

    Raises:
        UserError: A negative ρ, or an impossible radius, step or norm.

    Example:
        >>> at_sam()
        Method(PGD(), CrossEntropy(), perturbation=SAM())

    Source: Foret et al. 2021, Eq. 2 with p = 2.
    Deviations: the loss is adversarial, which the paper does not consider.
    """
    return replace(pgd_at(eps=eps, step_size=step_size, steps=steps, norm=norm), perturbation=SAM(rho))
