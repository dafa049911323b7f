"""Numbers that change with training, as values. Any number in a `Method` may be one of them."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

from instar.errors import UserError
from instar.expression import value


@value
class Progress:
    """Where a run stands.

    Attributes:
        epoch: Current epoch, from 0.
        epochs: Length of the run in epochs.
        step: Step within the epoch, from 0.
        steps_per_epoch: Steps in an epoch.

    Example:
        >>> Progress(epoch=3, epochs=10).fraction
        0.3
    """

    epoch: int
    epochs: int
    step: int = 0
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        """Refuse positions outside of a run."""
        if self.epochs < 1 or not 0 <= self.epoch <= self.epochs:
            raise UserError(f"epoch must be in [0, epochs] and epochs at least 1; got {self.epoch} of {self.epochs}")

    @property
    def fraction(self) -> float:
        """Completed epochs as a share of the run, in [0, 1]; constant within an epoch."""
        return self.epoch / self.epochs

    @property
    def update(self) -> int:
        """Number of the step in the run, from 0."""
        return self.epoch * self.steps_per_epoch + self.step


def lowest(number: float | Schedule) -> float:
    """The smallest value that a number or schedule takes in a run, looked at in a run of 1,000 epochs.

    Raises:
        UserError: It is neither.

    Example:
        >>> lowest(Ramp(-2, 0.4)), lowest(3)
        (-1.9976, 3)
    """
    if isinstance(number, Schedule):
        return min(number(Progress(epoch, 1000)) for epoch in range(1001))
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        raise UserError(f"expected a number or a schedule such as Ramp(0, 0.4); got {number!r}")
    return number


class Schedule(abc.ABC):
    """A number as a function of `Progress`, stepped once per epoch.

    Times are fractions of the run, so that a short run is the long one in small. A value above 1 is read as an
    absolute epoch, which only the presets of published settings use.
    """

    @abc.abstractmethod
    def __call__(self, progress: Progress) -> float:
        """The value during the epoch that `progress` stands in."""


def share_of(when: float, epochs: int) -> float:
    """The share of a run that a time names; see `epoch_of`."""
    return when if when <= 1 else when / epochs


def epoch_of(when: float, progress: Progress) -> float:
    """The epoch that a time names: fractions up to 1 are of the run, numbers above 1 are epochs."""
    return round(when * progress.epochs, 9) if when <= 1 else when


def _check_times(name: str, *times: float) -> None:
    if any(math.isnan(t) or t < 0 for t in times) or list(times) != sorted(times):
        raise UserError(
            f"times of {name} must be non-negative and in ascending order; got {', '.join(map(str, times))}"
        )


@value
class Steps(Schedule):
    """A staircase: `initial`, then each value from its time on.

    Attributes:
        initial: Value at the beginning.
        changes: Pairs (time, value) in ascending order of time.

    Raises:
        UserError: Times are negative or not ascending.

    Example:
        GAIRAT's burn-in, uniform weights (λ = ∞) for the first half of the run:

        >>> shift = Steps(math.inf, ((0.5, -1.0),))
        >>> [shift(Progress(e, 4)) for e in range(4)]
        [inf, inf, -1.0, -1.0]
    """

    initial: float
    changes: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        """Check the order of the times."""
        if any(not isinstance(change, tuple) or len(change) != 2 for change in self.changes):
            raise UserError(f"changes of Steps must be pairs (time, value); got {self.changes!r}")
        _check_times("Steps", *(t for t, _ in self.changes))

    def __call__(self, progress: Progress) -> float:
        """The last value whose time has come."""
        # Fractions and epochs can only be put in order once the length of the run is known.
        _check_times("Steps", *(epoch_of(when, progress) for when, _ in self.changes))
        value = self.initial
        for when, then in self.changes:
            if progress.epoch >= epoch_of(when, progress):
                value = then
        return value


@value
class Ramp(Schedule):
    """A straight line from `initial` to `final` over the epochs of [begin, end).

    value(e) = initial + (final − initial) · clip((e − e₀ + 1) / (e₁ − e₀), 0, 1), e₀ = begin · E, e₁ = end · E

    The first increment belongs to the epoch e₀ itself, as in SAT's code: with ``Ramp(0, 0.4, 0.3, 0.7)`` over 100
    epochs the value is 0 up to epoch 29, 0.01 in epoch 30 and 0.4 from epoch 69.

    Attributes:
        initial: Value before `begin`.
        final: Value from the last epoch before `end`.
        begin: Time of the first increment.
        end: Time after the last increment.

    Raises:
        UserError: The ramp ends before it begins.

    Example:
        >>> bound = Ramp(0, 0.4, 0.3, 0.7)
        >>> [round(bound(Progress(e, 100)), 3) for e in (29, 30, 31, 69, 99)]
        [0.0, 0.01, 0.02, 0.4, 0.4]

    Source: Sitawarin et al. 2021, training code (linear mode).
    """

    initial: float
    final: float
    begin: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        """Check the order of the times."""
        _check_times("Ramp", self.begin, self.end)
        if self.begin == self.end:
            raise UserError(f"a Ramp must end after it begins; got {self.begin} to {self.end}. Use Steps for a jump")

    def __call__(self, progress: Progress) -> float:
        """The value during the epoch."""
        begin, end = epoch_of(self.begin, progress), epoch_of(self.end, progress)
        _check_times("Ramp", begin, end)
        share = min(max((progress.epoch - begin + 1) / max(end - begin, 1e-9), 0.0), 1.0) if end > begin else 1.0
        return self.initial + (self.final - self.initial) * share


@value
class Scaled(Schedule):
    """Another schedule times a number, for a step size that follows a radius.

    Attributes:
        schedule: The other schedule.
        factor: The number.

    Example:
        >>> Scaled(Steps(0, ((0.5, 8 / 255),)), 1.25)(Progress(1, 2)) == 10 / 255
        True
    """

    schedule: Schedule
    factor: float

    def __call__(self, progress: Progress) -> float:
        """The product during the epoch."""
        return self.factor * self.schedule(progress)


def resolve(item: Any, progress: Progress) -> Any:
    """`item` with every `Schedule` inside of it replaced by its number.

    Frozen dataclasses are rebuilt, so their validation runs again on the resolved numbers.

    Args:
        item: Anything: a schedule, a dataclass, a tuple, or a plain value.
        progress: Where the run stands.

    Returns:
        A value of the same type, without schedules; the same object when it had none.

    Example:
        >>> resolve((Ramp(0, 1), 2), Progress(epoch=0, epochs=2))
        (0.5, 2)
    """
    if isinstance(item, Schedule):
        return item(progress)
    if isinstance(item, tuple):
        resolved = tuple(resolve(part, progress) for part in item)
        return resolved if any(a is not b for a, b in zip(resolved, item, strict=True)) else item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        changed = {}
        for entry in dataclasses.fields(item):
            old = getattr(item, entry.name)
            new = resolve(old, progress)
            if new is not old:
                changed[entry.name] = new
        return dataclasses.replace(item, **changed) if changed else item
    return item
