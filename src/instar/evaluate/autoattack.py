"""AutoAttack, driven in shards through the reference implementation `pyautoattack`.

The attacks, their parameters and their random numbers are the reference's. What is ours is the loop around them: which
points are still standing, what is written down after each batch, and how many targets there are to aim at.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyautoattack
import torch
from pyautoattack import checks
from torch import Tensor, nn

from instar.errors import UserError, unknown
from instar.evaluate.shards import Arrays, Outcome, Shard
from instar.evaluate.subject import Subject
from instar.expression import value
from instar.threat import Ball

VERSIONS = ("standard",)
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
FLAGS = {
    "randomized": "randomised",
    "probability distribution": "probabilities",
    "zero gradient": "zero_gradient",
    "dynamic defense": "dynamic",
}
"""Words in the reference's warnings, and the names under which records keep them."""
OUTSIDE = "outside_ball"
TARGETS = 9


@dataclass(frozen=True)
class Stage:
    """One attack of the ensemble, which sees the points that all stages before it left standing.

    Attributes:
        name: The reference's name for it.
        loss: What it optimises.
        steps: Gradient steps a run; 0 for Square.
        restarts: Random restarts.
        targets: Target classes in turn; 0 for untargeted attacks.
        queries: Queries of Square; 0 for the others.
    """

    name: str
    loss: str
    steps: int = 0
    restarts: int = 1
    targets: int = 0
    queries: int = 0

    @property
    def forwards(self) -> int:
        """About how many forward passes a point that survives costs; a backward to the input counts as one."""
        passes = {"apgd-ce": 2, "apgd-t": 2, "fab-t": 3, "square": 0}[self.name]
        return passes * self.steps * self.restarts * max(self.targets, 1) + self.queries


@value
class AutoAttack:
    """Croce and Hein's ensemble of parameter-free attacks: APGD-CE, targeted APGD-DLR, targeted FAB, and Square.

    Each stage starts from the clean image and sees the points that the ones before it left standing; a point counts as
    robust if none breaks it. The verdicts on a shard equal, bit for bit, those of ``pyautoattack`` run on that shard's
    points with the same batch size and seed. The model itself is attacked, not a folded copy.

    With K classes there are min(9, K − 1) targets (the reference crashes below ten classes). Below four classes the
    targeted DLR loss does not exist, since it divides by z₍₁₎ − (z₍₃₎ + z₍₄₎) / 2; APGD-T then maximises the targeted
    margin z_t − z_y, and the plan, which every record holds, says so.

    Attributes:
        ball: The threat model.
        version: ``"standard"``.
        steps: Steps of each gradient attack; 100 is the standard.
        queries: Queries of Square; 5000 is the standard.
        stages: Names of the stages that are run, in the order of the standard; all of them is the standard.

    Raises:
        UserError: Another version, an unknown stage, or a budget that is too small to run.

    Example:
        >>> from instar.threat import Linf
        >>> AutoAttack(Linf(8/255))
        AutoAttack(Linf(8/255))
        >>> [(stage.name, stage.loss, stage.targets) for stage in AutoAttack(Linf(8/255)).plan(3)][1]
        ('apgd-t', 'targeted margin', 2)

    Source: Croce & Hein 2020; ``pyautoattack`` 0.2, which gives the same examples as the authors' repository.
    Deviations: the number of targets below ten classes, and the loss of APGD-T below four; none otherwise.
    """

    ball: Ball
    version: str = "standard"
    steps: int = 100
    queries: int = 5000
    stages: tuple[str, ...] = STAGES

    def __post_init__(self) -> None:
        """Check version and budget."""
        if self.version not in VERSIONS:
            raise unknown("version of AutoAttack", self.version, VERSIONS)
        if not self.stages or not set(self.stages) <= set(STAGES):
            raise UserError(f"stages of AutoAttack must be some of {', '.join(STAGES)}; got {self.stages!r}")
        # The L1 schedule divides the steps into 30, 30 and 40 %; fewer than five leave its last part empty.
        if self.steps < 5 or self.queries < 1:
            raise UserError(
                f"AutoAttack needs at least 5 steps and 1 query; got steps={self.steps}, queries={self.queries}"
            )

    @property
    def is_reference(self) -> bool:
        """Whether its budget is the published one, so that the number may be called AutoAttack's."""
        return self._published_budget and set(self.stages) == set(STAGES)

    @property
    def _published_budget(self) -> bool:
        return self.steps == 100 and self.queries == 5000

    def plan(self, classes: int) -> tuple[Stage, ...]:
        """The stages for a number of classes.

        Args:
            classes: K, at least 2.

        Returns:
            The stages in order.
        """
        return tuple(stage for stage in self._ensemble(classes) if stage.name in self.stages)

    def _ensemble(self, classes: int) -> tuple[Stage, Stage, Stage, Stage]:
        """All stages, whether they are run or not."""
        many = self.ball.norm == "L1"
        targets = min(TARGETS, classes - 1)
        return (
            Stage("apgd-ce", "cross-entropy", steps=self.steps, restarts=5 if many else 1),
            Stage(
                "apgd-t",
                "targeted DLR" if classes >= 4 else "targeted margin",
                steps=self.steps,
                targets=min(5, targets) if many else targets,
            ),
            Stage("fab-t", "distance to the boundary of the target", steps=self.steps, targets=targets),
            Stage("square", "margin", queries=self.queries),
        )

    def budget(self, classes: int) -> dict[str, Any]:
        """The plan as a record holds it."""
        stages = [{key: entry for key, entry in asdict(stage).items() if entry} for stage in self.plan(classes)]
        return {"stages": stages, "forwards": sum(stage.forwards for stage in self.plan(classes))}

    def examine(
        self,
        subject: Subject,
        shard: Shard,
        *,
        seed: int,
        batch_size: int,
        stored: Arrays | None = None,
        save: Callable[[Arrays], None] = lambda arrays: None,
        tick: Callable[[float, int], None] = lambda fraction, robust: None,
    ) -> Outcome:
        """Attack a shard.

        Args:
            subject: The model.
            shard: The points.
            seed: Set again before every batch of every stage, as the reference does.
            batch_size: Points attacked at a time; Square's random numbers depend on it.
            stored: What `save` was last given, to go on from there; None begins.
            save: Called after every batch with all that is needed to go on.
            tick: Called after every batch with the share of the work done and the points standing.

        Returns:
            The outcome.
        """
        plan = self.plan(subject.classes)
        state = _State.begin(shard) if stored is None else _State.from_arrays(stored)
        reused = state.stage == len(plan)
        if self.ball.radius == 0:  # the ball is a point: nothing can move, and some stages would divide by zero
            return Outcome(shard.correct.cpu().numpy(), state.broken_by, tuple(stage.name for stage in plan))
        if self.ball.norm != "Linf" and min(shard.x.shape[2:]) < 5:
            raise UserError(
                f"Square in {self.ball.norm} tiles images by fifths, so AutoAttack needs at least 5×5 pixels; got "
                f"{shard.x.shape[2]}×{shard.x.shape[3]}"
            )
        with _alone(subject.device), _warnings_into(state.flags), torch.no_grad():
            model = subject.model
            reference = self._reference(model, subject.classes, seed=seed, device=subject.device)
            if state.stage == 0 and state.position == 0:
                _check(model, shard, batch_size)
            while state.stage < len(plan):
                self._next_batch(model, reference, plan[state.stage], shard, state, batch_size)
                save(state.to_arrays())
                tick(state.share(plan), int(state.robust.sum()))
        return Outcome(
            robust=state.robust,
            broken_by=state.broken_by,
            stages=tuple(stage.name for stage in plan),
            flags=tuple(sorted(state.flags)),
            seconds=state.seconds,
            reused=reused,
        )

    def _next_batch(
        self, model: nn.Module, reference: Any, stage: Stage, shard: Shard, state: _State, batch_size: int
    ) -> None:
        """Run one stage on the next batch of the points that stood when the stage began."""
        begun = time.perf_counter()
        if state.position == 0:
            state.todo = state.robust.nonzero()[0]
        chosen = state.todo[state.position : state.position + batch_size]
        if len(chosen):
            rows = torch.from_numpy(chosen).to(shard.x.device)
            x, y = shard.x[rows].clone(), shard.y[rows].clone()
            found = _perturb(reference, stage, x, y)
            broken = ~y.eq(model(found).max(dim=1)[1])
            if _leaves(self.ball, found[broken], x[broken]):
                state.flags.add(OUTSIDE)
            lost = chosen[broken.cpu().numpy()]
            state.robust[lost] = False
            state.broken_by[lost] = state.stage
        state.position += batch_size
        if state.position >= len(state.todo):
            state.stage, state.position = state.stage + 1, 0
        state.seconds += time.perf_counter() - begun

    def _reference(self, model: nn.Module, classes: int, *, seed: int, device: torch.device) -> Any:
        """The reference's object for this ensemble."""
        made = pyautoattack.AutoAttack(
            model, norm=self.ball.norm, eps=self.ball.radius, version=self.version, seed=seed, device=device
        )
        _, targeted, fab, _ = self._ensemble(classes)
        if not self._published_budget:
            for attack in (made.apgd, made.apgd_targeted):
                # The reference derives these from the number of steps in its constructor, where it is always 100.
                attack.n_iter = attack.n_iter_orig = self.steps
                attack.n_iter_2 = max(int(0.22 * self.steps), 1)
                attack.n_iter_min = max(int(0.06 * self.steps), 1)
                attack.size_decr = max(int(0.03 * self.steps), 1)
            made.fab.n_iter = self.steps
            made.square.n_queries = self.queries
        made.apgd_targeted.n_target_classes = targeted.targets
        made.fab.n_target_classes = fab.targets
        made.fab.targeted = True
        made.apgd.loss = "ce"
        for attack in (made.apgd, made.apgd_targeted, made.fab, made.square):
            attack.seed = seed
        if targeted.loss == "targeted margin":
            made.apgd_targeted.dlr_loss_targeted = _targeted_margin(made.apgd_targeted)
        return made


@dataclass
class _State:
    """Where a shard stands.

    Attributes:
        robust: Points standing (n,), boolean.
        broken_by: Stage that broke each point, −1 for none (n,).
        todo: Points that stood when the running stage began.
        stage: Running stage; the number of stages when all are done.
        position: Points of `todo` that are done.
        flags: Warnings so far.
        seconds: Time so far.
    """

    robust: np.ndarray
    broken_by: np.ndarray
    todo: np.ndarray
    stage: int
    position: int
    flags: set[str]
    seconds: float

    @classmethod
    def begin(cls, shard: Shard) -> _State:
        robust = shard.correct.cpu().numpy().copy()
        return cls(robust, np.full(len(robust), -1, np.int8), np.zeros(0, np.int64), 0, 0, set(), 0.0)

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> _State:
        return cls(
            robust=arrays["robust"].astype(bool),
            broken_by=arrays["broken_by"],
            todo=arrays["todo"],
            stage=int(arrays["stage"]),
            position=int(arrays["position"]),
            flags=set(arrays["flags"].tolist()),
            seconds=float(arrays["seconds"]),
        )

    def to_arrays(self) -> Arrays:
        return {
            "robust": self.robust.astype(np.uint8),
            "broken_by": self.broken_by,
            "todo": self.todo,
            "stage": np.array(self.stage),
            "position": np.array(self.position),
            "flags": np.array(sorted(self.flags), dtype="U32"),
            "seconds": np.array(self.seconds),
        }

    def share(self, plan: tuple[Stage, ...]) -> float:
        """Share of the shard's work that is done, in [0, 1], counted in forward passes.

        What is left is counted as if every point that stands now stood to the end, so the share only rises.
        """
        spent = sum(int((self.broken_by == number).sum()) * _through(plan, number) for number in range(len(plan)))
        standing = int(self.robust.sum())
        total = spent + standing * _through(plan, len(plan) - 1)
        if self.stage == len(plan) or not total:
            return 1.0
        done = int(self.robust[self.todo[: self.position]].sum()) if self.position else 0
        spent += standing * _through(plan, self.stage - 1) + done * plan[self.stage].forwards
        return spent / total


def _through(plan: tuple[Stage, ...], number: int) -> int:
    """Forward passes for a point that goes through the stages up to `number`, inclusive."""
    return sum(stage.forwards for stage in plan[: number + 1])


def _perturb(reference: Any, stage: Stage, x: Tensor, y: Tensor) -> Tensor:
    attack = {
        "apgd-ce": reference.apgd,
        "apgd-t": reference.apgd_targeted,
        "fab-t": reference.fab,
        "square": reference.square,
    }[stage.name]
    found: Tensor = attack.perturb(x, y)
    return found


def _targeted_margin(attack: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def margin(logits: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, attack.y_target] - logits[rows, y]

    return margin


def _leaves(ball: Ball, found: Tensor, x: Tensor) -> bool:
    """Whether an example lies outside of the ball or the box, by more than rounding explains."""
    if not len(found):
        return False
    beyond = ball.size(found - x) > ball.radius * (1 + 1e-3) + 1e-6
    inside = bool(((found >= 0) & (found <= 1)).all())  # False for NaN as well
    return bool(beyond.any()) or not inside


def _check(model: nn.Module, shard: Shard, batch_size: int) -> None:
    """The reference's own checks on a shard's first batch; what they find is logged, and so becomes a flag."""
    x, y = shard.x[:batch_size], shard.y[:batch_size]
    logger = logging.getLogger("auto-attack")
    checks.check_randomized(model, x, y, bs=batch_size, logger=logger)
    checks.check_range_output(model, x, logger=logger)
    # It counts calls in a global and switches off whatever else is tracing, such as a debugger or coverage.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    tracing = sys.gettrace()
    try:
        checks.check_dynamic(model, x, False, logger=logger)
    finally:
        sys.settrace(tracing)


@contextlib.contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Restores the global random state, which the reference seeds before every batch."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class _Collector(logging.Handler):
    def __init__(self, flags: set[str]) -> None:
        super().__init__(logging.WARNING)
        self.flags = flags

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.flags.update(name for words, name in FLAGS.items() if words in message)


@contextlib.contextmanager
def _warnings_into(flags: set[str]) -> Iterator[None]:
    """Keeps the reference's warnings as flags and its log lines off the screen."""
    logger = logging.getLogger("auto-attack")
    before = logger.level, logger.propagate
    collector = _Collector(flags)
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(collector)
        logger.level, logger.propagate = before
