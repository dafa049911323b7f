"""Hearing how far an evaluation is."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Protocol


class Progress(Protocol):
    """Called from time to time while an attack runs, and once when it is complete.

    If it has a method ``begin(checkpoint, titles, plain)``, as `Pace` does, that is called before the columns of each
    checkpoint.
    """

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        """Take note.

        Args:
            attack: Name of the column that is being computed, for example ``"pgd_20"``.
            done: Points finished. Within a shard of AutoAttack this is an estimate in proportion to its work.
            total: Points in all.
            robust: Of the points looked at so far, how many still stand.
        """


def announce(report: Progress, checkpoint: str, titles: Mapping[str, str], plain: Collection[str]) -> None:
    """Say which checkpoint comes next to a progress that wants to know.

    Args:
        report: The progress.
        checkpoint: Its name.
        titles: Of the columns that will be computed, by name.
        plain: Those of them that are plain accuracies, whose points are right and not robust.
    """
    begin = getattr(report, "begin", None)
    if callable(begin):
        begin(checkpoint, titles, plain)


def silent(attack: str, done: int, total: int, robust: int) -> None:
    """Progress that nobody hears."""


class Pace:
    """Turns progress into a line with the time left, from the speed since the attack began.

    Args:
        clock: Seconds now; for tests.

    Example:
        >>> times = iter([0.0, 30.0])
        >>> pace = Pace(clock=lambda: next(times))
        >>> pace("autoattack", 0, 400, 0)
        'autoattack 0/400'
        >>> pace("autoattack", 100, 400, 52)
        'autoattack 100/400, 52 robust, 1 min 30 s left'

    Told what comes, it calls checkpoints and columns as tables do:

        >>> pace = Pace(clock=lambda: 0.0)
        >>> pace.begin("best", {"pgd_20": "PGD-20", "fog_1": "fog 1"}, {"fog_1"})
        >>> pace("pgd_20", 4, 4, 3), pace("fog_1", 4, 4, 2)
        ('best, PGD-20: 4/4, 3 robust', 'best, fog 1: 4/4, 2 right')
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._attack = ""
        self._begun, self._first = 0.0, 0
        self._checkpoint, self._titles, self._plain = "", dict[str, str](), frozenset[str]()

    def begin(self, checkpoint: str, titles: Mapping[str, str], plain: Collection[str] = ()) -> None:
        """Take note of what comes next; see `announce`."""
        self._checkpoint, self._titles, self._plain = checkpoint, dict(titles), frozenset({*plain, "clean"})
        self._attack = ""

    def __call__(self, attack: str, done: int, total: int, robust: int) -> str:
        """The line for one report; see `Progress`."""
        now = self._clock()
        if attack != self._attack:
            self._attack, self._begun, self._first = attack, now, done
        named = f"{self._checkpoint}, {self._titles.get(attack, attack)}:" if self._checkpoint else attack
        line = f"{named} {done}/{total}"
        if done == 0:
            return line
        line += f", {robust} {'right' if attack in self._plain else 'robust'}"
        moved = done - self._first
        if moved <= 0 or done >= total:
            return line
        return f"{line}, {spoken((now - self._begun) * (total - done) / moved)} left"


def spoken(seconds: float) -> str:
    """A duration as people say it.

    Args:
        seconds: At least 0.

    Returns:
        At most two units.

    Example:
        >>> spoken(4.2), spoken(90), spoken(8000)
        ('4 s', '1 min 30 s', '2 h 13 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
