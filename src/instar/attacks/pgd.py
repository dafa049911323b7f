"""Projected gradient descent: the one inner loop of training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from instar.attacks.attack import Attack, counts
from instar.attacks.captured import Captured
from instar.attacks.start import Start, Uniform
from instar.errors import UserError
from instar.evidence import Adversary, Batch, Evidence
from instar.expression import value
from instar.models.heads import logit_scale
from instar.modes import MODES, captured_features, forward_mode, full
from instar.schedules import Schedule
from instar.sharding import is_sharded
from instar.signals import CrossEntropy, Referenced, Signal
from instar.signals.losses import check_choice
from instar.threat import Ball, Linf

MOST_STEPS = 1_000_000
_FOR_OBJECTIVE = frozenset({"clean", "adv"})
_FOR_STOP = _FOR_OBJECTIVE | {"kappa", "input_grad", "features", "params"}
_OF_AN_INSTANCE = _FOR_OBJECTIVE | {"kappa"}
WORTHWHILE = 0.8
"""Instances that have stopped leave the batch once at most this share of it goes on."""


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
        overshoot: Whether an instance keeps the step that made it stop (the official rule of SAT). False takes it back:
            the result is the last iterate that the rule allowed, the last of all included; where it does not even
            allow the start, the clean image if that is allowed, else the start.
        project: Whether each iterate is brought back into the ball; False leaves only the box, as in N-FGSM.
        compact: Whether instances that have stopped leave the batch, which saves their passes, where that changes
            nothing but the rounding of smaller batches: in mode ``"eval"``, with a rule that looks at each instance by
            itself. False keeps the shape of the batch.

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
    overshoot: bool = True
    project: bool = True
    compact: bool = True

    def __post_init__(self) -> None:
        """Check the fields that are numbers already."""
        check_choice("PGD", "mode", self.mode, MODES)
        if not isinstance(self.steps, Schedule):
            if isinstance(self.steps, bool) or self.steps != int(self.steps) or not 0 <= self.steps <= MOST_STEPS:
                most = f" and at most {MOST_STEPS:,}" if self.steps > MOST_STEPS else ""
                raise UserError(f"steps of PGD must be a whole number of at least 0{most}; got {self.steps}")
            object.__setattr__(self, "steps", int(self.steps))
        if not isinstance(self.step_size, Schedule) and not 0 <= self.step_size < math.inf:
            raise UserError(f"step_size of PGD must be a positive number such as 2/255; got {self.step_size}")
        if not isinstance(self.step_size, Schedule) and self.ball.norm == "Linf" and self.step_size > 1:
            raise UserError(
                f"step_size of PGD in Linf must be at most 1 because inputs lie in [0, 1]; got {self.step_size:g}. "
                f"Did you mean {self.step_size:g}/255?"
            )
        if not self.overshoot and self.stop is not None and "kappa" in self.stop.needs:
            raise UserError(f"{self.stop!r} counts iterates, so that no step can be taken back: overshoot must be True")
        for name, signal, known in (("objective", self.objective, _FOR_OBJECTIVE), ("stop", self.stop, _FOR_STOP)):
            if signal is not None and (lacking := signal.needs - known):
                raise UserError(
                    f"{name} of PGD must be a signal of clean and adversarial logits; {signal!r} needs "
                    f"{', '.join(sorted(lacking))}"
                )

    @property
    def needs(self) -> frozenset[str]:
        """What the objective and the stop rule read."""
        return self.objective.needs | (self.stop.needs if self.stop is not None else frozenset())

    @property
    def limit(self) -> Ball:
        """The ball, or without projection the one around it that start and steps can reach."""
        if self.project:
            return self.ball
        scale = self.start.scale if isinstance(self.start, Uniform) else 1.0
        steps, step_size = self.numbers()
        most = 1.0 if self.ball.norm == "Linf" else math.inf
        return replace(self.ball, eps=min(scale * self.ball.radius + steps * step_size, most))

    @property
    def rule(self) -> Signal | None:
        """The rule that may stop instances; None where there is none, or where it can stop nothing at this point."""
        return None if self.stop is None or self.stop.idle else self.stop

    def numbers(self) -> tuple[int, float]:
        """`steps` and `step_size`, resolved.

        Raises:
            UserError: One of them is still a schedule.
        """
        if isinstance(self.steps, Schedule) or isinstance(self.step_size, Schedule):
            raise UserError("steps or step_size is still a schedule: resolve it first with method.at(progress)")
        return self.steps, self.step_size

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Run the attack; see `Attack`.

        Raises:
            UserError: `steps` or `step_size` is still a schedule.
        """
        if isinstance(model, Captured):
            return model.attack(self, batch, generator=generator)
        steps, step_size = self.numbers()
        stop = self.rule
        if stop is not None:
            self._take_references(stop, model, batch, generator)
        x, y = batch.x, batch.y
        kappa, inspected, moves = counts(y), counts(y), counts(y)
        active = torch.ones_like(y, dtype=torch.bool)
        # Processes must make the same forward passes where these exchange something: statistics, whole-batch values, or
        # weights.
        together = stop is not None and (self.mode != "eval" or stop.coupling > 0 or is_sharded(model))
        still: Callable[[Tensor], bool] = batch.part.any if together else lambda mask: bool(mask.any())
        needs = self.objective.needs | (stop.needs if stop is not None else frozenset())
        # Every process makes the same passes through a sharded network, if need be with none but stopped instances.
        compact = stop is not None and not is_sharded(model) and self.may_leave(stop)
        behind = _Behind()
        with forward_mode(model, self.mode), torch.no_grad():
            clean = full(model(x)) if "clean" in needs else None
            look = _Looking(self, model, batch, clean, needs, logit_scale(model))
            moved = before = batch.part.drawn(lambda images: self.start(images, self.ball, generator), x)
            for step in range(steps):
                if compact and step and int(active.sum()) <= WORTHWHILE * len(active):
                    look, x, y = look.only(active), x[active], y[active]
                    moved, kappa, inspected, moves = behind.leave(active, moved, kappa, inspected, moves)
                    active = torch.ones_like(y, dtype=torch.bool)
                seen, gradient = look(moved, kappa, inspected)
                logits = seen.logits("adv")
                right = logits.argmax(1) == y
                inspected += active
                kappa += right & active
                if stop is not None:
                    halted = stop(replace(seen, kappa=kappa, inspected=inspected)) & active
                    if not self.overshoot and still(halted):
                        if step == 0:
                            before = self._allowed_start(stop, look, x, moved)
                        moved = torch.where(_rows(halted), before, moved)
                        moves -= (halted & (moves > 0)).to(moves.dtype)
                    active = active & ~halted
                    if not still(active):
                        break
                stepped = moved + step_size * self.ball.steepest(gradient, moved)
                stepped = self.ball.project(stepped, x) if self.project else stepped.clamp(0.0, 1.0)
                before = moved
                moved = stepped if stop is None else torch.where(_rows(active), stepped, moved)
                moves += active
            moved, kappa, inspected, moves = behind.join(moved, kappa, inspected, moves)
            if stop is not None and not self.overshoot and steps and still(active):
                seen, _ = look(moved, kappa, inspected)
                halted = stop(seen) & active
                moved = torch.where(_rows(halted), before, moved)
                moves -= halted.to(moves.dtype)
            if (stop is not None or steps == 0) and self.project:
                # Whatever never moved is still at its start, which may lie outside (Gaussian noise, a given one).
                moved = torch.where(_rows(moves > 0), moved, self.ball.project(moved, batch.x))
        return Adversary(x=moved, kappa=kappa, inspected=inspected, moves=moves, budget=steps)

    def may_leave(self, stop: Signal) -> bool:
        """Whether an instance's fate depends on nothing but itself, so that it may leave once `stop` holds."""
        signals = [*_within(stop), *_within(self.objective)]
        return (
            self.compact
            and self.overshoot  # a step that is taken back needs the iterates of everybody
            and self.mode == "eval"
            and all(signal.needs <= _OF_AN_INSTANCE and not signal.coupling for signal in signals)
            and not any(isinstance(signal, Referenced) for signal in signals)
        )

    def _allowed_start(self, stop: Signal, look: _Looking, x: Tensor, start: Tensor) -> Tensor:
        """Where an instance goes back to whose start the rule forbids: the clean image if that is allowed."""
        seen, _ = look(x, counts(look.batch.y), counts(look.batch.y))
        return torch.where(_rows(stop(seen)), start, x)

    def _take_references(self, stop: Signal, model: nn.Module, batch: Batch, generator: torch.Generator | None) -> None:
        """Let difficulties that are measured against the attack at full strength take their measure.

        The attack then begins at the same random start as if nothing had happened.
        """
        due = [signal for signal in _within(stop) if isinstance(signal, Referenced) and signal.due(batch.shared)]
        if not due:
            return
        state = torch.get_rng_state() if generator is None else generator.get_state()
        watch = _Watching(tuple(due))
        found = replace(self, stop=watch, overshoot=True)(model, batch, generator=generator)
        if generator is None:
            torch.set_rng_state(state)
        else:
            generator.set_state(state)
        with forward_mode(model, self.mode), torch.no_grad():
            clean = full(model(batch.x)) if "clean" in self.needs else None
            look = _Looking(self, model, batch, clean, self.needs, logit_scale(model))
            seen, _ = look(found.x, found.kappa, found.inspected)
            watch(seen)
        for signal in due:
            signal.refer(watch.measured[signal], batch.shared)


class _Behind:
    """What instances had reached when they left the batch."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, ...] | None = None
        self._rows: Tensor | None = None

    def leave(self, stay: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Keep the states of those in the batch, and give those of the instances (mask) that stay in it."""
        if self._rows is None:
            self._kept, self._rows = states, stay.nonzero().flatten()
        else:
            self.join(*states)
            self._rows = self._rows[stay]
        return tuple(state[stay] for state in states)

    def join(self, *states: Tensor) -> tuple[Tensor, ...]:
        """The states of everybody, in the order of the batch."""
        if self._kept is None or self._rows is None:
            return states
        for kept, state in zip(self._kept, states, strict=True):
            kept[self._rows] = state
        return self._kept


def _rows(mask: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return mask.view(-1, 1, 1, 1)


def _within(signal: Signal) -> Iterator[Signal]:
    """A signal and all that it is made of."""
    yield signal
    for part in signal.parts:
        yield from _within(part)


@dataclass(frozen=True, eq=False)
class _Watching(Signal):
    """A stop rule that never stops, and keeps what difficulties measure at every iterate."""

    rules: tuple[Referenced, ...]
    measured: dict[Referenced, list[Tensor]] = field(default_factory=dict)

    @property
    def needs(self) -> frozenset[str]:
        """What the difficulties read."""
        return frozenset[str]().union(*(rule.needs for rule in self.rules))

    def __call__(self, evidence: Evidence) -> Tensor:
        """False everywhere (B,)."""
        for rule in self.rules:
            measured = rule.measure(evidence)
            everywhere = evidence.part.gather(measured) if measured.ndim else measured
            self.measured.setdefault(rule, []).append(everywhere)
        return torch.zeros_like(evidence.y, dtype=torch.bool)


@dataclass(frozen=True)
class _Looking:
    """What an attack sees at an iterate, and the gradient of its objective there."""

    attack: PGD
    model: nn.Module
    batch: Batch
    clean: Tensor | None
    needs: frozenset[str]
    scale: Tensor | float

    def only(self, stay: Tensor) -> _Looking:
        """The same for some of the instances (mask)."""

        def cut(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[stay]

        batch = self.batch
        fewer = replace(
            batch,
            x=batch.x[stay],
            y=batch.y[stay],
            index=cut(batch.index),
            memory={name: rows[stay] for name, rows in batch.memory.items()},
            target=cut(batch.target),
            labelled=cut(batch.labelled),
            source=cut(batch.source),
        )
        return replace(self, batch=fewer, clean=cut(self.clean))

    def __call__(self, at: Tensor, kappa: Tensor, inspected: Tensor) -> tuple[Evidence, Tensor]:
        """The evidence, detached, and the gradient (B, C, H, W)."""
        at = at.detach().requires_grad_()
        with torch.enable_grad(), captured_features(self.model, wanted="features" in self.needs) as features:
            logits = full(self.model(at))
            evidence = Evidence(
                x=self.batch.x,
                y=self.batch.y,
                clean=self.clean,
                adv=logits,
                x_adv=at,
                target=self.batch.target,
                ball=self.attack.ball,
                scale=self.scale,
                batchwide=self.batch.part.batchwide,
                part=self.batch.part,
            )
            # Summed, so that an instance's gradient does not depend on the size of the batch it came in.
            (gradient,) = torch.autograd.grad(self.attack.objective(evidence).sum(), at)
        parameters = None
        if "params" in self.needs:
            parameters = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        seen = replace(
            evidence,
            adv=logits.detach(),
            x_adv=at.detach(),
            kappa=kappa,
            inspected=inspected,
            budget=self.attack.numbers()[0],
            index=self.batch.index,
            memory=self.batch.memory,
            shared=self.batch.shared,
            labelled=self.batch.labelled,
            source=self.batch.source,
            input_grad=gradient,
            features=features[-1].detach() if features else None,
            params=parameters,
            forward=self._forward,
        )
        return seen, gradient

    def _forward(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The model in the attack's mode, with other parameters if asked; no buffer is updated."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return full(functional_call(self.model, {**(parameters or {}), **buffers}, (x,)))
