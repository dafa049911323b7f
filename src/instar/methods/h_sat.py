"""H-SAT: curriculum by the curvature of the loss in the weights (Sitawarin et al. 2021), a reconstruction."""

from __future__ import annotations

from instar.attacks import PGD
from instar.errors import UserError, unknown
from instar.method import Method
from instar.schedules import Ramp, Schedule, lowest
from instar.signals import CrossEntropy, Exceeds, GaussNewtonCurvature, HessianCurvature, LastLayerCurvature, Signal
from instar.threat import ball

ESTIMATORS: dict[str, Signal] = {
    "last_layer": LastLayerCurvature(),
    "gauss_newton": GaussNewtonCurvature(),
    "power": HessianCurvature(),
}
"""The difficulties by the name that the recipe knows them by."""


def h_sat(
    *,
    bound: float | Schedule = Ramp(0.2, 1.0, 0.3, 0.7),
    estimator: str = "last_layer",
    strict: bool = False,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """H-SAT: adversarial training whose attack on an instance stops once the loss is curved enough there.

    Equation:
        min_θ mean_i CE(f_θ(x′_i), y_i),   x′_i = the first PGD iterate with ψ(x′) > λ(epoch), or the last one,
        ψ ~ largest eigenvalue of the Hessian of CE(f_θ(x′), y) in θ, normalised to at most 1

    Args:
        bound: λ in [0, 1], rising with training.
        estimator: ``"last_layer"`` (closed form, 2 μ(p), costs nothing), ``"gauss_newton"`` (each instance, all
            weights) or ``"power"`` (one value for the batch, power iteration with warm start); the last two are
            relative to the largest value along the full attack. Each is asked before every attack step. In units of a
            forward and full backward pass of the same images (ResNet-18 of width 16, CPU) a check costs 0.001
            (``"last_layer"``), 3 (``"power"``, warm) and about 15 (``"gauss_newton"``).
        strict: Whether the step that crosses the bound is taken back.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Largest number of attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With λ ≥ 1 it is PGD-AT, bit for bit and at its cost, for all three.

    Raises:
        UserError: An unknown estimator, a negative bound, or an impossible radius, step or norm.

    Example:
        >>> h_sat(bound=0.5).attack.stop
        Exceeds(LastLayerCurvature(), 0.5)

    Source: Sitawarin et al. 2021 for the objective and the early stop.
    Deviations: a reconstruction. How the authors estimate and normalise the eigenvalue, how often, and the schedule of
        λ are not public: estimators, normalisation and defaults here are ours. Say so with every number.
    """
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS)
    if not lowest(bound) >= 0:
        raise UserError(f"bound of H-SAT must be at least 0, the smallest curvature there is; got {bound}")
    stop = Exceeds(ESTIMATORS[estimator], bound)
    attack = PGD(ball(norm, eps), steps=steps, step_size=step_size, stop=stop, overshoot=not strict)
    return Method(attack, CrossEntropy())
