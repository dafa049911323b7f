"""P-SAT: curriculum by the probability gap (Sitawarin et al. 2021; ATES in earlier versions)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.attacks import PGD, Attack, Start, Uniform
from instar.attacks.attack import counts
from instar.errors import UserError, unknown
from instar.evidence import UNLABELLED, Adversary, Batch, Evidence
from instar.expression import value
from instar.method import Method
from instar.models.heads import logit_scale
from instar.modes import forward_mode, full
from instar.schedules import Ramp, Schedule, lowest
from instar.signals import CrossEntropy, Exceeds, Margin, ProbabilityGap, Signal
from instar.signals.difficulty import check_bound
from instar.threat import Ball, ball


@value
class ClippedCrossEntropy(Signal):
    """Cross-entropy without gradient once the true class's probability is down to a floor: −max(log p_y, log floor).

    Attributes:
        floor: Smallest probability that the attack still pushes down, in [0, 1]; 0 is the plain cross-entropy. May be
            a `Schedule`.

    Raises:
        UserError: A floor outside of [0, 1].

    Source: Sitawarin et al. 2021, training code (``clipped_ce``).
    """

    floor: float | Schedule

    def __post_init__(self) -> None:
        """Check the floor."""
        if not isinstance(self.floor, Schedule) and not 0 <= self.floor <= 1:
            raise UserError(f"floor of ClippedCrossEntropy must be a probability in [0, 1]; got {self.floor}")

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits."""
        return frozenset({"adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Loss (B,)."""
        if isinstance(self.floor, Schedule):
            raise UserError(f"floor is still the schedule {self.floor!r}: use method.at(progress) first")
        loss = F.cross_entropy(evidence.logits("adv"), evidence.y, reduction="none", ignore_index=UNLABELLED)
        return loss.clamp_max(-math.log(self.floor)) if self.floor else loss


@value
class LinearisedStep(Attack):
    """FGSM-SAT: one step along the gradient of a difficulty, as long as takes it to the bound if it were linear.

    x′ = Π(x₀ + t · steepest(g)),   t = clip((bound − ψ(x₀)) / ‖g‖_*, 0, reach · ε),   g = ∇ψ(x₀),   x₀ = start(x),

    with ‖·‖_* the dual norm and Π onto the ball of reach · ε and the box.

    Attributes:
        ball: The threat model.
        bound: Difficulty to reach; may be a `Schedule`.
        difficulty: The signal ψ.
        reach: Length of the longest step and radius of the result, in units of ε; 1.25 in training.
        start: First iterate.
        mode: How BatchNorm behaves: ``"eval"``, ``"train"`` or ``"batch"``.

    Raises:
        UserError: A bound that is NaN, or a reach that is not positive.

    Source: Sitawarin et al. 2021, training code (FGSM-ATES).
    """

    ball: Ball
    bound: float | Schedule
    difficulty: Signal = ProbabilityGap()
    reach: float = 1.25
    start: Start = Uniform()
    mode: str = "eval"

    budget: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the bound and the reach."""
        check_bound("LinearisedStep", self.bound)
        if not 0 < self.reach < math.inf:
            raise UserError(f"reach of LinearisedStep must be a positive number; got {self.reach}")

    @property
    def needs(self) -> frozenset[str]:
        """What the difficulty reads."""
        return self.difficulty.needs

    @property
    def limit(self) -> Ball:
        """The ball of radius reach · ε."""
        most = 1.0 if self.ball.norm == "Linf" else math.inf
        return replace(self.ball, eps=min(self.reach * self.ball.radius, most))

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Run the attack; see `Attack`.

        Raises:
            UserError: `bound` is still a schedule.
        """
        if isinstance(self.bound, Schedule):
            raise UserError(f"bound is still the schedule {self.bound!r}: use method.at(progress) first")
        limit = self.limit
        with forward_mode(model, self.mode), torch.no_grad():
            start = batch.part.drawn(lambda images: self.start(images, self.ball, generator), batch.x)
            at = start.detach().requires_grad_()
            with torch.enable_grad():
                evidence = Evidence(x=batch.x, y=batch.y, adv=full(model(at)), x_adv=at, scale=logit_scale(model))
                difficulty = self.difficulty(evidence)
                known = batch.y != UNLABELLED  # without a label there is no gap to close
                (gradient,) = torch.autograd.grad(torch.where(known, difficulty, 0.0).sum(), at)
            slope = replace(limit, eps=1.0).support(gradient)
            length = (self.bound - difficulty.detach()).clamp_min(0) / (slope + 1e-9)
            length = torch.where(known, length, torch.zeros_like(length)).clamp_max(limit.radius)
            step = length.view(-1, 1, 1, 1) * self.ball.steepest(gradient, at)
            moved = limit.project(start + step, batch.x)
            right = evidence.logits("adv").argmax(1) == batch.y
        none = counts(batch.y)
        return Adversary(x=moved, kappa=none + right, inspected=none + 1, moves=none + (length > 0), budget=self.budget)


OBJECTIVES = ("stop", "clipped_ce", "hinge")


def p_sat(
    *,
    bound: float | Schedule | None = None,
    by: str = "stop",
    strict: bool = False,
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
        bound: The curriculum's bound; its meaning follows `by`, and None is the usual one. For ``"stop"`` it is λ in
            [−1, 1], rising with training, from 0 to 0.4 between 30 % and 70 % of the run on CIFAR; on MNIST the
            official setting is ``Steps(0, ((30/70, 1/3), (45/70, 2/3), (60/70, 1)))``. For ``"clipped_ce"`` it is the
            smallest probability of the true class that is attacked (usual: from 0.5 to 0 over the same epochs), for
            ``"hinge"`` the largest margin in logits (usual: from 0 to 10).
        by: What holds the attack back: ``"stop"`` ends it (published), ``"clipped_ce"`` and ``"hinge"`` clip its
            objective (the authors' code has both as options).
        strict: Whether the step that crosses the bound is taken back, so that ψ(x′) ≤ λ holds where it can. The
            official code keeps it.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Largest number of attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With λ ≥ 1 (or a floor of 0) it is PGD-AT, with λ = 0 FAT with τ = 0; with an infinite hinge it is
        adversarial training against the margin attack.

    Raises:
        UserError: A bound below −1 (it would train on noise), strict without a stop, or an impossible radius, step or
            norm.

    Example:
        >>> p_sat(bound=0.4)
        Method(PGD(stop=Exceeds(ProbabilityGap(), 0.4)), CrossEntropy())

    Source: Sitawarin et al. 2021; training code of the authors for the rule (the step that crosses is kept), the
        schedules and the two clipped objectives.
    Deviations: none. The usual bounds of the clipped objectives are ours, for none are published.
    """
    if by not in OBJECTIVES:
        raise unknown("way to hold the attack back", by, OBJECTIVES)
    if strict and by != "stop":
        raise UserError(f"strict takes back the step that crosses the bound: it goes with by='stop', not {by!r}")
    attack = PGD(ball(norm, eps), steps=steps, step_size=step_size)
    if by == "clipped_ce":
        floor = Ramp(0.5, 0.0, 0.3, 0.7) if bound is None else bound
        return Method(replace(attack, objective=ClippedCrossEntropy(floor)), CrossEntropy())
    if by == "hinge":
        cap = Ramp(0.0, 10.0, 0.3, 0.7) if bound is None else bound
        return Method(replace(attack, objective=Margin(cap=cap)), CrossEntropy())
    stop = Exceeds(ProbabilityGap(), check_gap(Ramp(0, 0.4, 0.3, 0.7) if bound is None else bound))
    return Method(replace(attack, stop=stop, overshoot=not strict), CrossEntropy())


def check_gap(bound: float | Schedule) -> float | Schedule:
    """Refuse a bound that no probability gap ever meets: training would see nothing but random starts.

    Raises:
        UserError: It is, at some time of the run, below −1.
    """
    if not lowest(bound) >= -1:
        raise UserError(f"bound of P-SAT must be at least -1, the smallest gap there is; got {bound}")
    return bound


def fgsm_sat(
    *,
    bound: float | Schedule = Ramp(0, 0.4, 0.3, 0.7),
    reach: float = 1.25,
    eps: float | Schedule = 8 / 255,
    norm: str = "Linf",
) -> Method:
    """FGSM-SAT: P-SAT's curriculum with one step, as long as takes the instance to the bound.

    Equation:
        min_θ mean_i CE(f_θ(x′_i), y_i),   x′_i = Π(x_i + η + t_i sign ∇ψ(x_i + η)),
        t_i = clip((λ − ψ(x_i + η)) / ‖∇ψ‖₁, 0, reach · ε),   η uniform in the ball

    Args:
        bound: λ, rising with training.
        reach: Longest step and radius of the training images, in units of ε.
        eps: Radius in the unit of inputs in [0, 1].
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method, a fifth of the cost of PGD-AT. An instance that is hard enough at its random start stays there.

    Raises:
        UserError: A bound below −1, or an impossible reach, radius or norm.

    Example:
        >>> fgsm_sat(bound=0.4).attack
        LinearisedStep(Linf(8/255), 0.4)

    Source: Sitawarin et al. 2021, training code (cyclic learning rate with a peak of 0.2, 30 epochs).
    Deviations: none known.
    """
    attack = LinearisedStep(ball(norm, eps), check_gap(bound), reach=reach)
    return Method(attack, CrossEntropy())
