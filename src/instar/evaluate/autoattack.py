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

from instar.arrays import Arrays
from instar.errors import UserError, unknown
from instar.evaluate.judging import Verdict, judged
from instar.evaluate.shards import Keep, Outcome, Shard, keep_nothing
from instar.evaluate.subject import Subject
from instar.expression import value
from instar.randomness import key
from instar.signals.losses import lead
from instar.threat import Ball

VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"),
}
"""Stages of each version in the order of the reference; of ``"custom"`` all there are, since the caller orders them."""
FLAGS = {
    "randomized": "randomised",
    "probability distribution": "probabilities",
    "zero gradient": "zero_gradient",
    "dynamic defense": "dynamic",
}
"""Words in the reference's warnings, and the names under which records keep them."""
OUTSIDE = "outside_ball"
TARGETS, RESTARTS, SAMPLES = 9, 5, 20
PUBLISHED_STEPS, PUBLISHED_QUERIES = 100, 5000


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
        samples: Passes over which a gradient is averaged (EoT); 0 for the others, which take one.
        classes: For untargeted FAB the classes whose logits it differentiates at every step; 0 for the others.
    """

    name: str
    loss: str
    steps: int = 0
    restarts: int = 1
    targets: int = 0
    queries: int = 0
    samples: int = 0
    classes: int = 0

    @property
    def forwards(self) -> int:
        """About how many forward passes a point that survives costs; a backward to the input counts as one."""
        # FAB asks once more for the label of every iterate.
        step = {"fab": 2 + self.classes, "fab-t": 3, "square": 0}.get(self.name, 2 * max(self.samples, 1))
        return step * self.steps * self.restarts * max(self.targets, 1) + self.queries


@value
class AutoAttack:
    """Croce and Hein's ensemble of parameter-free attacks: APGD, FAB and Square.

    ========== ======================================================================================================
    version    stages
    ========== ======================================================================================================
    standard   APGD-CE, APGD-T (9 targets), FAB-T (9 targets), Square; in L1 APGD-CE five times and APGD-T with 5
               targets, both with the radius shrinking from 3 ε
    plus       APGD-CE and APGD-DLR five times each, untargeted FAB five times, Square, APGD-T, FAB-T
    rand       APGD-CE and APGD-DLR with gradients averaged over 20 passes, for models with random outputs
    custom     `stages`, in the order they are given in, with the defaults of the reference's constructors: APGD and
               untargeted FAB five times, 9 targets
    ========== ======================================================================================================

    Each stage starts from the clean image and sees the points that the ones before it left standing; a point counts as
    robust if none breaks it. The verdicts on a shard equal, bit for bit, those of ``pyautoattack`` run on that shard's
    points with the same batch size and seed, for any model with deterministic outputs. The model itself is attacked,
    not a folded copy, unless a search in lower precision is asked for.

    With K classes there are at most K − 1 targets (the reference crashes below ten classes). Where a loss does not
    exist, another one takes its place, and the plan, which every record holds, says so: the targeted DLR loss divides
    by z₍₁₎ − (z₍₃₎ + z₍₄₎) / 2, so that below four classes APGD-T maximises the targeted margin z_t − z_y; the DLR loss
    divides by z₍₁₎ − z₍₃₎, so that with two classes APGD-DLR maximises the margin max_{j≠y} z_j − z_y.

    Attributes:
        ball: The threat model.
        version: ``"standard"``, ``"plus"``, ``"rand"`` or ``"custom"``.
        steps: Steps of each gradient attack; 100 is the standard.
        queries: Queries of Square; 5000 is the standard.
        stages: Names of the stages that are run; None is all of the version. Versions other than ``"custom"`` keep
            their own order.
        restarts: Only of ``"custom"``: random restarts of APGD-CE, APGD-DLR and untargeted FAB; None is 5. As in the
            reference, FAB is run once where it comes after FAB-T.
        targets: Only of ``"custom"``: target classes of APGD-T and FAB-T; None is 9.
        samples: Only of ``"custom"``: passes over which gradients of APGD are averaged; None is 1.

    Raises:
        UserError: Another version, an unknown stage, a budget that is too small to run, or a number that the version
            fixes.

    Example:
        >>> from instar.threat import Linf
        >>> AutoAttack(Linf(8/255))
        AutoAttack(Linf(8/255))
        >>> [(stage.name, stage.loss, stage.targets) for stage in AutoAttack(Linf(8/255)).plan(3)][1]
        ('apgd-t', 'targeted margin', 2)
        >>> [(stage.name, stage.restarts) for stage in AutoAttack(Linf(8/255), version="plus").plan(10)][:3]
        [('apgd-ce', 5), ('apgd-dlr', 5), ('fab', 5)]

    Source: Croce & Hein 2020; ``pyautoattack`` 0.2, which gives the same examples as the authors' repository.
    Deviations:
        The number of targets below ten classes, the loss of APGD-T below four and of APGD-DLR below three; models with
        random outputs draw the same numbers at every repetition of a batch. None otherwise.
    """

    ball: Ball
    version: str = "standard"
    steps: int = PUBLISHED_STEPS
    queries: int = PUBLISHED_QUERIES
    stages: tuple[str, ...] | None = None
    restarts: int | None = None
    targets: int | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        """Check version and budget."""
        if self.version not in VERSIONS:
            raise unknown("version of AutoAttack", self.version, VERSIONS)
        known = VERSIONS[self.version]
        if self.version == "custom" and self.stages is None:
            raise UserError(f"version custom of AutoAttack needs its stages, some of {', '.join(known)}")
        given = self.names
        if not given or not set(given) <= set(known) or len(set(given)) < len(given):
            raise UserError(f"stages of AutoAttack must be some of {', '.join(known)}, each once; got {self.stages!r}")
        # The L1 schedule divides the steps into 30, 30 and 40 %; fewer than five leave its last part empty.
        if self.steps < 5 or self.queries < 1:
            raise UserError(
                f"AutoAttack needs at least 5 steps and 1 query; got steps={self.steps}, queries={self.queries}"
            )
        for name in ("restarts", "targets", "samples"):
            number = getattr(self, name)
            if number is not None and self.version != "custom":
                raise UserError(f"version {self.version} of AutoAttack fixes {name}; version custom lets you choose")
            if number is not None and number < 1:
                raise UserError(f"{name} of AutoAttack must be at least 1; got {number}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the stages in the order in which they are run."""
        known = VERSIONS[self.version]
        if self.stages is None:
            return known
        if self.version == "custom" or not set(self.stages) <= set(known):
            return self.stages
        # Repeated names are kept for the check to find.
        return tuple(sorted(self.stages, key=known.index))

    @property
    def is_reference(self) -> bool:
        """Whether its budget is the published one of its version, so that the number may be called AutoAttack's."""
        published = self.steps == PUBLISHED_STEPS and self.queries == PUBLISHED_QUERIES
        return published and self.version != "custom" and set(self.names) == set(VERSIONS[self.version])

    def plan(self, classes: int) -> tuple[Stage, ...]:
        """The stages for a number of classes.

        Args:
            classes: K, at least 2.

        Returns:
            The stages in order.
        """
        return tuple(self._stage(name, classes) for name in self.names)

    def _stage(self, name: str, classes: int) -> Stage:
        """One stage for a number of classes."""
        shrinks = self._shrinks
        restarts = self.restarts or {"standard": 5 if shrinks else 1, "rand": 1}.get(self.version, RESTARTS)
        samples = SAMPLES if self.version == "rand" else self.samples or 0
        targets = min(self.targets or TARGETS, classes - 1)
        if name == "apgd-ce":
            return Stage(name, "cross-entropy", steps=self.steps, restarts=restarts, samples=samples)
        if name == "apgd-dlr":
            loss = "DLR" if classes >= 3 else "margin"
            return Stage(name, loss, steps=self.steps, restarts=restarts, samples=samples)
        if name == "apgd-t":
            loss = "targeted DLR" if classes >= 4 else "targeted margin"
            few = min(5, targets) if shrinks else targets
            return Stage(name, loss, steps=self.steps, targets=few, samples=self.samples or 0)
        if name == "fab":
            # The reference sets the restarts to 1 before FAB-T and never back.
            after = "fab-t" in self.names[: self.names.index("fab")]
            loss = "distance to the nearest boundary"
            return Stage(name, loss, steps=self.steps, restarts=1 if after else restarts, classes=classes)
        if name == "fab-t":
            return Stage(name, "distance to the boundary of the target", steps=self.steps, targets=targets)
        return Stage(name, "margin", queries=self.queries)

    @property
    def _shrinks(self) -> bool:
        """Whether APGD begins with three times the radius, as the standard version does in L1."""
        return self.ball.norm == "L1" and self.version == "standard"

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
        search: nn.Module | None = None,
        stored: Arrays | None = None,
        save: Callable[[Arrays], None] = lambda arrays: None,
        keep: Keep = keep_nothing,
        tick: Callable[[float, int], None] = lambda fraction, robust: None,
    ) -> Outcome:
        """Attack a shard.

        Args:
            subject: The model.
            shard: The points.
            seed: Set again before every batch of every stage, as the reference does.
            batch_size: Points attacked at a time; Square's random numbers depend on it.
            search: A faster copy of lower precision to search with, or None. What is found is confirmed by the model;
                where it does not confirm, the stage is run again on the model itself. The verdicts are then no longer
                the reference's.
            stored: What `save` was last given, to go on from there; None begins.
            save: Called after every batch with all that is needed to go on.
            keep: Called after every batch, before `save`, with the examples that broke points.
            tick: Called after every batch with the share of the work done and the points standing.

        Returns:
            The outcome.

        Raises:
            UserError: Images too small for Square, or a model that returns NaN or another shape midway.
        """
        plan = self.plan(subject.classes)
        state = _State.begin(shard) if stored is None else _State.from_arrays(stored)
        reused = state.stage == len(plan)
        if self.ball.radius == 0:  # the ball is a point: nothing can move, and some stages would divide by zero
            state.stage = len(plan)
        if any(stage.name == "square" for stage in plan) and self.ball.norm != "Linf" and min(shard.x.shape[2:]) < 5:
            raise UserError(
                f"Square in {self.ball.norm} tiles images by fifths, so AutoAttack needs at least 5×5 pixels; got "
                f"{shard.x.shape[2]}×{shard.x.shape[3]}"
            )
        with _alone(subject.device), _warnings_into(state.flags), torch.no_grad():
            made = [
                self._reference(model, subject.classes, seed=seed, device=subject.device)
                for model in (subject.model, search)
                if model is not None
            ]
            attacked = _Attacked(subject, made[0], search, made[-1] if search is not None else None)
            if state.stage == 0 and state.position == 0:
                torch.manual_seed(key(seed, step=int(shard.index[0]), purpose="checks"))
                _check(subject.model, shard, batch_size, random=self.version == "rand")
            while state.stage < len(plan):
                # The reference seeds the attacks; a model that draws numbers itself would else never repeat them.
                torch.manual_seed(key(seed, epoch=state.stage, step=state.position, purpose=f"shard {shard.index[0]}"))
                self._next_batch(attacked, plan[state.stage], shard, state, batch_size, keep)
                save(state.to_arrays())
                tick(state.share(plan), int(state.robust.sum()))
        return Outcome(
            robust=state.robust,
            broken_by=state.broken_by,
            stages=tuple(stage.name for stage in plan),
            flags=tuple(sorted(state.flags)),
            seconds=state.seconds,
            reused=reused,
            margin=state.margin,
        )

    def _next_batch(
        self, attacked: _Attacked, stage: Stage, shard: Shard, state: _State, batch_size: int, keep: Keep
    ) -> None:
        """Run one stage on the next batch of the points that stood when the stage began."""
        begun = time.perf_counter()
        if state.position == 0:
            state.todo = state.robust.nonzero()[0]
        chosen = state.todo[state.position : state.position + batch_size]
        if len(chosen):
            rows = torch.from_numpy(chosen).to(shard.x.device)
            x, y = shard.x[rows].clone(), shard.y[rows].clone()
            found, verdict = attacked(stage, x, y)
            broken = ~verdict.right
            if _leaves(self.ball, found[broken], x[broken]):
                state.flags.add(OUTSIDE)
            lost = chosen[broken.cpu().numpy()]
            state.robust[lost] = False
            state.broken_by[lost] = state.stage
            state.margin[chosen] = np.fmin(state.margin[chosen], verdict.margin.cpu().numpy())
            if len(lost):
                keep(state.stage, state.position, lost, found[broken])
        state.position += batch_size
        if state.position >= len(state.todo):
            state.stage, state.position = state.stage + 1, 0
        state.seconds += time.perf_counter() - begun

    def _reference(self, model: nn.Module, classes: int, *, seed: int, device: torch.device) -> Any:
        """The reference's object for this ensemble."""
        chosen = {"attacks": list(self.names)} if self.version == "custom" else {}
        made = pyautoattack.AutoAttack(
            model, norm=self.ball.norm, eps=self.ball.radius, version=self.version, seed=seed, device=device, **chosen
        )
        if self.steps != PUBLISHED_STEPS:
            for attack in (made.apgd, made.apgd_targeted):
                # The reference derives these from the number of steps in its constructor, where it is always 100.
                attack.n_iter = attack.n_iter_orig = self.steps
                attack.n_iter_2 = max(int(0.22 * self.steps), 1)
                attack.n_iter_min = max(int(0.06 * self.steps), 1)
                attack.size_decr = max(int(0.03 * self.steps), 1)
            made.fab.n_iter = self.steps
        made.square.n_queries = self.queries
        for attack in (made.apgd, made.apgd_targeted, made.fab, made.square):
            attack.seed = seed
        for stage in self.plan(classes):
            _set_up(made, stage)
        if classes < 4:
            made.apgd_targeted.dlr_loss_targeted = _targeted_margin(made.apgd_targeted)
        if classes < 3:
            made.apgd.dlr_loss = _margin
        return made


@dataclass(frozen=True)
class _Attacked:
    """A model with the reference's attacks on it, and perhaps a faster copy of it with the same attacks.

    Attributes:
        subject: The model, whose verdicts count.
        attacks: The reference's attacks on it.
        search: The copy of lower precision, or None.
        search_attacks: The reference's attacks on the copy.
    """

    subject: Subject
    attacks: Any
    search: nn.Module | None
    search_attacks: Any

    def __call__(self, stage: Stage, x: Tensor, y: Tensor) -> tuple[Tensor, Verdict]:
        """The images that a stage finds, and what the model says of them."""
        if self.search is None:
            found = _perturb(self.attacks, stage, x, y)
            return found, judged(self.subject, found, y)
        found = _perturb(self.search_attacks, stage, x.clone(), y.clone())
        verdict = judged(self.subject, found, y)
        doubtful = verdict.right & (self.search(found).argmax(1) != y)
        if bool(doubtful.any()):
            again = _perturb(self.attacks, stage, x[doubtful].clone(), y[doubtful].clone())
            found[doubtful] = again
            verdict = verdict.replaced(doubtful, judged(self.subject, again, y[doubtful]))
        return found, verdict


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
        margin: Smallest z_y − max_{j≠y} z_j of the images that stages returned (n,); NaN where none did.
    """

    robust: np.ndarray
    broken_by: np.ndarray
    todo: np.ndarray
    stage: int
    position: int
    flags: set[str]
    seconds: float
    margin: np.ndarray

    @classmethod
    def begin(cls, shard: Shard) -> _State:
        robust = shard.correct.cpu().numpy().copy()
        none, unknown_margin = np.full(len(robust), -1, np.int8), np.full(len(robust), np.nan, np.float32)
        return cls(robust, none, np.zeros(0, np.int64), 0, 0, set(), 0.0, unknown_margin)

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
            margin=arrays["margin"],
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
            "margin": self.margin,
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
    _set_up(reference, stage)
    attack = {"apgd-t": reference.apgd_targeted, "fab": reference.fab, "fab-t": reference.fab}.get(stage.name)
    attack = reference.square if stage.name == "square" else attack or reference.apgd
    found: Tensor = attack.perturb(x, y)
    return found


def _set_up(reference: Any, stage: Stage) -> None:
    """What the reference sets before a stage, and what follows from the number of classes."""
    if stage.name in ("apgd-ce", "apgd-dlr"):
        reference.apgd.loss = stage.name.removeprefix("apgd-")
        reference.apgd.n_restarts, reference.apgd.eot_iter = stage.restarts, max(stage.samples, 1)
    elif stage.name == "apgd-t":
        reference.apgd_targeted.n_target_classes = stage.targets
        reference.apgd_targeted.eot_iter = max(stage.samples, 1)
    elif stage.name == "fab":
        reference.fab.targeted, reference.fab.n_restarts = False, stage.restarts
    elif stage.name == "fab-t":
        reference.fab.targeted, reference.fab.n_restarts = True, 1
        reference.fab.n_target_classes = stage.targets


def _targeted_margin(attack: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def margin(logits: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, attack.y_target] - logits[rows, y]

    return margin


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    return lead(logits, y)


def _leaves(ball: Ball, found: Tensor, x: Tensor) -> bool:
    """Whether an example lies outside of the ball or the box, by more than rounding explains."""
    if not len(found):
        return False
    beyond = ball.size(found - x) > ball.radius * (1 + 1e-3) + 1e-6
    inside = bool(((found >= 0) & (found <= 1)).all())  # False for NaN as well
    return bool(beyond.any()) or not inside


def _check(model: nn.Module, shard: Shard, batch_size: int, *, random: bool) -> None:
    """The reference's own checks on a shard's first batch; what they find is logged, and so becomes a flag."""
    x, y = shard.x[:batch_size], shard.y[:batch_size]
    logger = logging.getLogger("auto-attack")
    if not random:
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
