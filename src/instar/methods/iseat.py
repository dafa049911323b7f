"""ISEAT: instance-adaptive smoothness enhanced adversarial training (Li & Spratling 2023)."""

from __future__ import annotations

from instar.attacks import PGD, Zero
from instar.errors import UserError
from instar.method import Method
from instar.schedules import Ramp, Schedule, Steps
from instar.signals import CrossEntropy, LogitShift, LossGap, RankWeight
from instar.threat import ball
from instar.weightspace import AWP


def iseat(
    *,
    smoothness: float | Schedule = Steps(0.0, ((0.5, 0.1),)),
    gamma: float | Schedule = 7e-3,
    weight: str = "rank",
    distance: str = "l2",
    detach: str = "none",
    joint: bool = True,
    warm_start: float = 0.0,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """ISEAT: smooth the loss in input and weights together, more for the more vulnerable instances.

    Equation:
        L = mean_i CE(f_{θ+v}(x′_i), y_i) + λ mean_i w_i ‖f_{θ+v}(x′_i) − f_θ(x_i)‖²,
        w_i = rank_i / B of the vulnerability CE(f_{θ+v}(x′_i), y_i) − CE(f_θ(x_i), y_i),
        v_l = γ ‖θ_l‖ g_l / ‖g_l‖ with g the gradient of mean CE(f_θ(x′), y)

    Args:
        smoothness: λ; 0 until the first drop of the learning rate (100 of 200 epochs), then 0.1.
        gamma: γ of the weight perturbation; 0.007 for WRN-34-10.
        weight: Ablation: ``"rank"`` (published), ``"uniform"``, ``"reversed"``, ``"proportional"`` or ``"top"``, all of
            the same mean; see `RankWeight`.
        distance: Ablation: ``"l2"`` (published, squared), ``"l1"``, ``"softmax_l2"``, ``"kl"`` or ``"loss"``; see
            `LogitShift`.
        detach: Ablation: ``"none"`` (published: both logits carry gradient), ``"clean"`` or ``"adv"``.
        joint: Ablation: whether the adversarial logits of the smoothness term and of the vulnerability live at the
            perturbed weights (published), or at the weights themselves.
        warm_start: Share of the run over which ε and the step grow from 0, without weight perturbation; 5 of 200
            epochs with the official code's option, which is off by default.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With λ = 0 it is AT-AWP; with γ = 0 as well it is PGD-AT attacked in train mode. With uniform
        weights and γ = 0 it is ALP.

    Raises:
        UserError: A negative γ, an unknown ablation, a warm start of what is a schedule already, or an impossible
            radius, step or norm.

    Example:
        >>> iseat(smoothness=0.1).loss
        CrossEntropy() + 0.1 * (RankWeight(LossGap()) * LogitShift())

    Source: Li & Spratling 2023, abstract and official code (its tables were not available to us): no random start,
        attack in train mode with updates of BatchNorm, both logits differentiable.
    Deviations: the vulnerability's clean loss is that of the anchor forward; the official code takes it from its first
        clean pass, which sees the same batch and weights. The warm start begins at ε / 5 where the code begins at 0.
    """
    if warm_start:
        if isinstance(gamma, Schedule) or isinstance(eps, Schedule) or isinstance(step_size, Schedule):
            raise UserError("warm_start makes schedules of gamma, eps and step_size: give it numbers, or no warm start")
        gamma = Steps(0.0, ((warm_start, float(gamma)),))
        eps, step_size = Ramp(0.0, float(eps), 0.0, warm_start), Ramp(0.0, float(step_size), 0.0, warm_start)
    of = "adv" if joint else "anchor_adv"
    smooth = RankWeight(LossGap(of=of), weight) * LogitShift(distance=distance, detach=detach, of=of)
    attack = PGD(ball(norm, eps), steps=steps, step_size=step_size, start=Zero(), mode="train")
    perturbation = AWP(gamma, ascend=CrossEntropy())
    return Method(attack, CrossEntropy() + smoothness * smooth, perturbation=perturbation, updates_bn=("adv",))
