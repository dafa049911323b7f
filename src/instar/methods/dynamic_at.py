"""Dynamic-AT: attacks that converge further as training goes on (Wang et al. 2019)."""

from __future__ import annotations

from torch import Tensor

from instar.attacks import PGD
from instar.errors import UserError
from instar.evidence import Evidence
from instar.expression import value
from instar.method import Method
from instar.schedules import Ramp, Schedule, lowest
from instar.signals import Below, CrossEntropy, Signal
from instar.threat import ball


@value
class StationarityGap(Signal):
    """FOSC, the first-order stationarity condition: how far the linearised objective can still rise in the ball.

    c(x^k) = ε ‖g‖₁ − ⟨x^k − x, g⟩ with g the gradient of the attack's objective at x^k; 0 at a maximum of the
    linearisation. For other norms than ℓ∞ the dual norm takes the place of ℓ₁.

    Source: Wang et al. 2019, Eq. 5.
    """

    @property
    def needs(self) -> frozenset[str]:
        """The attack's own gradient."""
        return frozenset({"input_grad"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """The gap (B,), non-negative inside the ball."""
        gradient = evidence.input_grad
        if gradient is None or evidence.ball is None or evidence.x_adv is None:
            raise UserError("StationarityGap is a measure for stop rules of attacks in a ball")
        done = ((evidence.x_adv - evidence.x) * gradient).flatten(1).sum(1)
        # Never negative inside the ball but by rounding, by which a bound of 0 would stop what it must not.
        return (evidence.ball.support(gradient) - done).clamp_min(0)


def dynamic_at(
    *,
    bound: float | Schedule = Ramp(0.5, 0.0, 0.0, 0.8),
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """Dynamic-AT: adversarial training whose attack on an instance stops once it has converged well enough.

    Equation:
        min_θ mean_i CE(f_θ(x′_i), y_i),   x′_i = the first PGD iterate with c(x′) < c_t, or the last one,
        c(x) = ε ‖∇CE‖₁ − ⟨x − x_i, ∇CE⟩

    Args:
        bound: c_t, falling to 0 with training; from 0.5 to 0 over 80 % of the run (30 of 70 epochs on MNIST).
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Largest number of attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With a bound of 0 it is PGD-AT.

    Raises:
        UserError: A negative bound, or an impossible radius, step or norm.

    Example:
        >>> dynamic_at(bound=0.2)
        Method(PGD(stop=Below(StationarityGap(), 0.2)), CrossEntropy())

    Source: Wang et al. 2019; the baseline of SAT's training code for the schedule.
    Deviations: the bound falls from the first epoch on, one epoch earlier than c_max (1 − e / E′).
    """
    if not lowest(bound) >= 0:
        raise UserError(f"bound of Dynamic-AT must be at least 0, the smallest gap there is; got {bound}")
    stop = Below(StationarityGap(), bound)
    return Method(PGD(ball(norm, eps), steps=steps, step_size=step_size, stop=stop), CrossEntropy())
