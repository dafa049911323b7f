"""P-SAT: curriculum by the probability gap (Sitawarin et al. 2021; ATES in earlier versions)."""

from __future__ import annotations

from instar.attacks import PGD
from instar.errors import UserError
from instar.method import Method
from instar.schedules import Ramp, Schedule
from instar.signals import CrossEntropy, Exceeds, ProbabilityGap
from instar.threat import ball


def p_sat(
    *,
    bound: float | Schedule = Ramp(0, 0.4, 0.3, 0.7),
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """P-SAT: adversarial training whose attack on an instance stops once the instance is hard enough.

    Equation:
        min_θ mean_i CE(f_θ(x′_i), y_i),   x′_i = the first PGD iterate with ψ(x′) > λ(epoch), or the last one,
        ψ(x) = max_{j≠y} p_j(x) − p_y(x)

    Args:
        bound: λ in [−1, 1], rising with training; from 0 to 0.4 between 30 % and 70 % of the run on CIFAR. On MNIST
            the official setting is ``Steps(0, ((30/70, 1/3), (45/70, 2/3), (60/70, 1)))``.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Largest number of attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With λ ≥ 1 it is PGD-AT, with λ = 0 FAT with τ = 0.

    Raises:
        UserError: A bound below −1 (it would train on noise), or an impossible radius, step or norm.

    Example:
        >>> p_sat(bound=0.4)
        Method(PGD(stop=Exceeds(ProbabilityGap(), 0.4)), CrossEntropy())

    Source: Sitawarin et al. 2021; training code of the authors for the rule (the step that crosses is kept) and the
        schedules.
    Deviations: none.
    """
    if not isinstance(bound, Schedule) and not bound >= -1:
        raise UserError(f"bound of P-SAT must be at least -1, the smallest gap there is; got {bound}")
    stop = Exceeds(ProbabilityGap(), bound)
    return Method(PGD(ball(norm, eps), steps=steps, step_size=step_size, stop=stop), CrossEntropy())
