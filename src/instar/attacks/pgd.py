"""Projected gradient descent: the one inner loop of training and evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from instar.attacks.attack import Attack, counts
from instar.attacks.start import Start, Uniform
from instar.errors import UserError
from instar.evidence import Adversary, Batch, Evidence
from instar.expression import value
from instar.modes import MODES, forward_mode, full
from instar.schedules import Schedule
from instar.signals import CrossEntropy, Signal
from instar.signals.losses import check_choice
from instar.threat import Ball, Linf

MOST_STEPS = 1_000_000
_FOR_OBJECTIVE = frozenset({"clean", "adv"})
_FOR_STOP = _FOR_OBJECTIVE | {"kappa", "input_grad"}


@value
class PGD(Attack):
    """Projected gradient ascent on a signal, inside a ball and the box [0, 1].

    x⁰ = start(x);   x^{k+1} = Π(x^k + step_size · steepest(∇ objective(x^k))),   k = 0 … K − 1

    κ counts, before each step, the iterates that are still classified correctly. The last iterate is returned and not
    inspected. Only gradients with respect to the input are computed.

    Attributes:
        ball: Where the attack may go.
        objective: What it maximises; any `Signal` of clean and adversarial logits. Clean logits are computed once,
            in the attack's mode and without gradient.
        steps: K, the largest number of steps, at least 0; may be a `Schedule`.
        step_size: Length of a step in the norm of the ball, in the unit of the inputs; may be a `Schedule`.
        start: First iterate.
        mode: How BatchNorm behaves: ``"eval"``, ``"train"`` or ``"batch"`` (see `instar.modes`).
        stop: A rule (boolean `Signal`) that ends the attack on an instance before a step is taken; None never does. A
            stopped instance keeps its place in the batch, no longer moves and is no longer inspected: its κ freezes.

    Raises:
        UserError: A negative number of steps, a step size that is not a positive number, an unknown mode, or a signal
            that needs what an attack cannot give.

    Example:
        >>> from instar.evidence import Batch
        >>> PGD(Linf(4/255), steps=20)
        PGD(Linf(4/255), steps=20)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> found = PGD(Linf(0.1), step_size=0.05)(net, Batch(torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 0])))
        >>> bool(((found.x - 0.5).abs() <= 0.1 + 1e-6).all()), found.budget
        (True, 10)

    Source: Madry et al. 2018; κ from Zhang et al. 2021 (GAIRAT), Algorithm 1.
    """

    ball: Ball = Linf(8 / 255)
    objective: Signal = CrossEntropy()
    steps: int | Schedule = 10
    step_size: float | Schedule = 2 / 255
    start: Start = Uniform()
    mode: str = "eval"
    stop: Signal | None = None

    def __post_init__(self) -> None:
        """Check the fields that are numbers already."""
        check_choice("PGD", "mode", self.mode, MODES)
        if not isinstance(self.steps, Schedule):
            if isinstance(self.steps, bool) or self.steps != int(self.steps) or not 0 <= self.steps <= MOST_STEPS:
                raise UserError(f"steps of PGD must be a whole number of at least 0; got {self.steps}")
            object.__setattr__(self, "steps", int(self.steps))
        if not isinstance(self.step_size, Schedule) and not 0 <= self.step_size < math.inf:
            raise UserError(f"step_size of PGD must be a positive number such as 2/255; got {self.step_size}")
        if not isinstance(self.step_size, Schedule) and self.ball.norm == "Linf" and self.step_size > 1:
            raise UserError(
                f"step_size of PGD in Linf must be at most 1 because inputs lie in [0, 1]; got {self.step_size:g}. "
                f"Did you mean {self.step_size:g}/255?"
            )
        for name, signal, known in (("objective", self.objective, _FOR_OBJECTIVE), ("stop", self.stop, _FOR_STOP)):
            if signal is not None and (lacking := signal.needs - known):
                raise UserError(
                    f"{name} of PGD must be a signal of clean and adversarial logits; {signal!r} needs "
                    f"{', '.join(sorted(lacking))}"
                )

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Run the attack; see `Attack`.

        Raises:
            UserError: `steps` or `step_size` is still a schedule.
        """
        if isinstance(self.steps, Schedule) or isinstance(self.step_size, Schedule):
            raise UserError("steps or step_size is still a schedule: resolve it first with method.at(progress)")
        x, y = batch.x, batch.y
        kappa, inspected, moves = counts(y), counts(y), counts(y)
        active = torch.ones_like(y, dtype=torch.bool)
        needs = self.objective.needs | (self.stop.needs if self.stop else frozenset())
        with forward_mode(model, self.mode), torch.no_grad():
            clean = full(model(x)) if "clean" in needs else None
            moved = self.start(x, self.ball, generator)
            for _ in range(self.steps):
                gradient, logits = self._gradient(model, batch, moved, clean)
                right = logits.argmax(1) == y
                inspected += active
                kappa += right & active
                stepped = self.ball.project(moved + self.step_size * self.ball.steepest(gradient, moved), x)
                if self.stop is not None:
                    evidence = Evidence(
                        x=x,
                        y=y,
                        clean=clean,
                        adv=logits,
                        x_adv=moved,
                        kappa=kappa,
                        inspected=inspected,
                        budget=self.steps,
                        index=batch.index,
                        memory=batch.memory,
                        target=batch.target,
                        input_grad=gradient,
                    )
                    active = active & ~self.stop(evidence)
                    if not active.any():
                        break
                    stepped = torch.where(active.view(-1, 1, 1, 1), stepped, moved)
                moved = stepped
                moves += active
            if self.stop is not None or self.steps == 0:
                # Whatever never moved is still at its start, which may lie outside (Gaussian noise, a given one).
                moved = torch.where((moves > 0).view(-1, 1, 1, 1), moved, self.ball.project(moved, x))
        return Adversary(x=moved, kappa=kappa, inspected=inspected, moves=moves, budget=self.steps)

    def _gradient(self, model: nn.Module, batch: Batch, at: Tensor, clean: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradient of the objective with respect to the iterate, and the logits there, both detached."""
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            logits = full(model(at))
            evidence = Evidence(x=batch.x, y=batch.y, clean=clean, adv=logits, x_adv=at, target=batch.target)
            # Summed, so that an instance's gradient does not depend on the size of the batch it came in.
            (gradient,) = torch.autograd.grad(self.objective(evidence).sum(), at)
        return gradient, logits.detach()
