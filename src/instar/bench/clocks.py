"""Times that can be compared: cases in turns, on the wall clock and by the processor's own time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from instar.errors import UserError
from instar.evaluate.intervals import mean_of

CLOCKS = ("wall", "cpu")
"""``"wall"`` is what a user waits. ``"cpu"`` is the time that the process computed, all its threads together: less
disturbed by other programs on a busy machine, and blind to work on a GPU."""


@dataclass(frozen=True)
class Turn:
    """Seconds of a step in one turn.

    Attributes:
        wall: On the clock on the wall.
        cpu: Of the processor, all threads together.
    """

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """How many times as long one case takes as another, over turns in which both were timed.

    Attributes:
        median: The median of the turns' ratios.
        low: Lower end of the 95 % interval of their geometric mean (Student's, of the logarithms).
        high: Its upper end.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio_of(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The ratio of two cases' times, paired by turn.

    Args:
        above: Seconds of the one, a turn each.
        below: Seconds of the other, in the same turns.

    Raises:
        UserError: Other numbers of turns, or none.

    Example:
        >>> print(ratio_of([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]))
        2.00 (2.00 to 2.00)
    """
    if len(above) != len(below) or not above:
        raise UserError(f"a ratio needs the same turns of both; got {len(above)} and {len(below)}")
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, high = mean_of([math.log(ratio) for ratio in ratios]).interval()
    return Ratio(statistics.median(ratios), math.exp(low), math.exp(high))


def in_turns(
    steps: Mapping[str, Callable[[int], None]],
    *,
    turns: int,
    count: int,
    device: torch.device,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Turn]]:
    """Time cases one after the other, again and again, so that a machine whose speed drifts favours none.

    Args:
        steps: What to time by name; each is called with the number of the step, from 0.
        turns: Turns that count; one before them warms up.
        count: Steps of each case in a turn.
        device: Where they compute: a GPU is waited for before the clock is read.
        note: Told after each turn.

    Returns:
        The turns of each case.

    Raises:
        UserError: Fewer than one turn or step.

    Example:
        >>> found = in_turns({"nothing": lambda number: None}, turns=2, count=3, device=torch.device("cpu"))
        >>> len(found["nothing"])
        2
    """
    if turns < 1 or count < 1:
        raise UserError(f"turns and steps must be at least 1; got {turns} and {count}")
    found: dict[str, list[Turn]] = {name: [] for name in steps}
    done = dict.fromkeys(steps, 0)
    for turn in range(turns + 1):
        for name, step in steps.items():
            wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            portion = count if turn else min(count, 2)
            for _ in range(portion):
                step(done[name])
                done[name] += 1
            wait(device)
            if turn:
                spent = (time.perf_counter() - wall) / portion, (time.process_time() - cpu) / portion
                found[name].append(Turn(*spent))
        note(f"turn {turn} of {turns}" if turn else "warmed up")
    return found


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given; a CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
