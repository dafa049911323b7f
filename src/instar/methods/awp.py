"""AWP: adversarial weight perturbation (Wu et al. 2020). On any other method: ``--set perturbation="AWP(5e-3)"``."""

from __future__ import annotations

from dataclasses import replace

from instar.method import Method
from instar.methods.mart import mart
from instar.methods.pgd_at import pgd_at
from instar.methods.trades import trades
from instar.schedules import Schedule, Steps
from instar.weightspace import AWP


def at_awp(
    *,
    gamma: float | Schedule = 1e-2,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """AT-AWP: adversarial training whose gradient is taken at adversarially perturbed weights.

    Equation:
        min_θ max_v mean_i CE(f_{θ+v}(x′_i), y_i),   v_l = γ ‖θ_l‖ g_l / ‖g_l‖ with g the gradient of that loss at θ

    Args:
        gamma: γ, relative length of the perturbation of each weight tensor.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With γ = 0 it is PGD-AT.

    Raises:
        UserError: A negative γ, or an impossible radius, step or norm.

    Example:
        >>> at_awp()
        Method(PGD(), CrossEntropy(), perturbation=AWP(0.01))

    Source: Wu et al. 2020; official code.
    Deviations: the attack runs in eval mode; the official code's in train mode (``--set attack.mode=train``).
    """
    base = pgd_at(eps=eps, step_size=step_size, steps=steps, norm=norm)
    return replace(base, perturbation=AWP(gamma))


def trades_awp(
    *,
    beta: float | Schedule = 6.0,
    gamma: float | Schedule = Steps(0.0, ((10 / 200, 5e-3),)),
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """TRADES-AWP: TRADES whose gradient is taken at adversarially perturbed weights.

    Equation:
        min_θ max_v mean_i [ CE(f_{θ+v}(x_i), y_i) + β KL(p_{θ+v}(x_i) ‖ p_{θ+v}(x′_i)) ],   v as in AT-AWP

    Args:
        beta: β of TRADES.
        gamma: γ; 0 for 10 of 200 epochs, then 0.005.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With γ = 0 it is TRADES.

    Raises:
        UserError: A negative γ, or an impossible radius, step or norm.

    Example:
        >>> trades_awp(gamma=5e-3).perturbation
        AWP()

    Source: Wu et al. 2020; official code (warm-up of 10 epochs).
    Deviations: see `trades`.
    """
    base = trades(beta=beta, eps=eps, step_size=step_size, steps=steps, norm=norm)
    return replace(base, perturbation=AWP(gamma))


def mart_awp(
    *,
    beta: float | Schedule = 6.0,
    gamma: float | Schedule = 5e-3,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """MART-AWP: MART whose gradient is taken at adversarially perturbed weights.

    Equation:
        the loss of MART at θ + v,   v as in AT-AWP

    Args:
        beta: β of MART.
        gamma: γ; ours, as the value for MART is not stated in what we have.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With γ = 0 it is MART.

    Raises:
        UserError: A negative γ, or an impossible radius, step or norm.

    Example:
        >>> mart_awp().perturbation
        AWP()

    Source: Wu et al. 2020.
    Deviations: see `mart`.
    """
    base = mart(beta=beta, eps=eps, step_size=step_size, steps=steps, norm=norm)
    return replace(base, perturbation=AWP(gamma))
