"""Hearing how far an evaluation is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called from time to time while an attack runs, and once when it is complete."""

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        """Take note.

        Args:
            attack: Name of the column that is being computed, for example ``"pgd_20"``.
            done: Points finished. Within a shard of AutoAttack this is an estimate in proportion to its work.
            total: Points in all.
            robust: Of the points looked at so far, how many still stand.
        """


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
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._attack = ""
        self._begun, self._first = 0.0, 0

    def __call__(self, attack: str, done: int, total: int, robust: int) -> str:
        """The line for one report; see `Progress`."""
        now = self._clock()
        if attack != self._attack:
            self._attack, self._begun, self._first = attack, now, done
        line = f"{attack} {done}/{total}"
        if done == 0:
            return line
        line += f", {robust} robust"
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
