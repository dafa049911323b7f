"""ALP: adversarial logit pairing (Kannan et al. 2018)."""

from __future__ import annotations

from instar.attacks import PGD
from instar.errors import UserError
from instar.method import Method
from instar.schedules import Schedule, lowest
from instar.signals import CrossEntropy, LogitShift
from instar.threat import ball


def alp(
    *,
    pairing: float | Schedule = 0.5,
    clean: float | Schedule = 0.0,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """ALP: adversarial training that pulls the logits of an image and of its adversary together.

    Equation:
        min_θ mean_i [ CE(f(x′_i), y_i) + c CE(f(x_i), y_i) + λ ‖f(x_i) − f(x′_i)‖² ]

    Args:
        pairing: λ, weight of the squared distance (summed over classes); 0.5 in the original.
        clean: c, weight of the clean cross-entropy; 0 leaves it out.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With λ = c = 0 it is PGD-AT; it is ISEAT with uniform weights and without weight perturbation.

    Raises:
        UserError: A negative weight, or an impossible radius, step or norm.

    Example:
        >>> alp().loss
        CrossEntropy() + 0.5 * LogitShift('clean')

    Source: Kannan et al. 2018, section 3.
    Deviations: one adversarial batch instead of half clean and half adversarial images.
    Known criticism: its ImageNet model was broken by attacks with more steps (Engstrom et al. 2018): judge it by
        AutoAttack.
    """
    if not min(lowest(pairing), lowest(clean)) >= 0:
        raise UserError(f"pairing and clean of ALP must be at least 0; got {pairing} and {clean}")
    attack = PGD(ball(norm, eps), steps=steps, step_size=step_size)
    loss = CrossEntropy() + pairing * LogitShift("clean")
    return Method(attack, loss + clean * CrossEntropy("clean") if clean else loss)
