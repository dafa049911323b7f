"""FAT: friendly adversarial training (Zhang et al. 2020)."""

from __future__ import annotations

from dataclasses import replace

from instar.attacks import PGD, Attack
from instar.method import Method
from instar.methods.mart import mart
from instar.methods.trades import trades
from instar.schedules import Schedule, Steps
from instar.signals import CrossEntropy, Patience
from instar.threat import ball


def fat(
    *,
    patience: float | Schedule = Steps(0, ((50 / 120, 1), (90 / 120, 2))),
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """FAT: adversarial training on friendly examples, which stop soon after they cross the decision boundary.

    Equation:
        min_θ mean_i CE(f_θ(x′_i), y_i),   x′_i = the PGD iterate τ steps after the first misclassified one

    Args:
        patience: τ; 0 for 50 of 120 epochs, then 1, then 2 for the last 30, as the official code.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Largest number of attack steps K.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With τ ≥ K it is PGD-AT.

    Raises:
        UserError: A negative τ, or an impossible radius, step or norm.

    Example:
        >>> fat(patience=1)
        Method(PGD(stop=Patience(1)), CrossEntropy())

    Source: Zhang et al. 2020, Algorithm 1; official code for the schedule.
    Deviations: the batch keeps its order (the official code reorders it); the optional noise of standard deviation
        0.001 on every step is left out.
    """
    stop = Patience(patience)
    return Method(PGD(ball(norm, eps), steps=steps, step_size=step_size, stop=stop), CrossEntropy())


def fat_trades(
    *,
    patience: float | Schedule = Steps(0, ((30 / 85, 1), (50 / 85, 2), (70 / 85, 3))),
    beta: float | Schedule = 6.0,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """FAT-TRADES: TRADES on friendly examples.

    Equation:
        min_θ mean_i [ CE(f(x_i), y_i) + β KL(p(x_i) ‖ p(x′_i)) ],
        x′_i = the iterate of PGD on that KL, τ steps after the first misclassified one

    Args:
        patience: τ; 0, then 1, 2 and 3 from epochs 30, 50 and 70 of 85 on.
        beta: β of TRADES.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Largest number of attack steps K.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With τ ≥ K it is TRADES.

    Raises:
        UserError: A negative τ, or an impossible radius, step or norm.

    Example:
        >>> fat_trades(patience=1).attack.stop
        Patience(1)

    Source: Zhang et al. 2020; official code for the schedule.
    Deviations: as `fat` and `trades`.
    """
    base = trades(beta=beta, eps=eps, step_size=step_size, steps=steps, norm=norm)
    return replace(base, attack=_patient(base.attack, patience))


def fat_mart(
    *,
    patience: float | Schedule = Steps(0, ((20 / 85, 1), (40 / 85, 2), (60 / 85, 3), (80 / 85, 4))),
    beta: float | Schedule = 6.0,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """FAT-MART: MART on friendly examples.

    Equation:
        the loss of MART,   x′_i = the PGD iterate τ steps after the first misclassified one

    Args:
        patience: τ; one more every 20 of 85 epochs, up to 4.
        beta: β of MART.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Largest number of attack steps K.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With τ ≥ K it is MART.

    Raises:
        UserError: A negative τ, or an impossible radius, step or norm.

    Example:
        >>> fat_mart(patience=1).attack.stop
        Patience(1)

    Source: Zhang et al. 2020; official code for the schedule.
    Deviations: as `fat` and `mart`.
    """
    base = mart(beta=beta, eps=eps, step_size=step_size, steps=steps, norm=norm)
    return replace(base, attack=_patient(base.attack, patience))


def _patient(attack: Attack, patience: float | Schedule) -> Attack:
    assert isinstance(attack, PGD)
    return replace(attack, stop=Patience(patience))
