"""Mutated inputs for everything that reads what a stranger may have written.

A reader may return, or raise `UserError` with a message of one line. Anything else is a crash: another exception, code
that runs, memory beyond the bound of the process, or seconds spent on a few kilobytes.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from instar.errors import UserError

SLOW = 5.0
"""Seconds that one input may take; on a busy machine the usual one takes a thousandth."""
INTERESTING = (
    b"\x00",
    b"\xff",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x7f\xff\xff\xff",
    b"9" * 20,
    b"-1",
    b"nan",
    b"{}",
    b"[",
)
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
"""Audit events that no reader has a reason for."""
SUSPICIOUS = {"sprung", "__import__", "system", "popen", "eval", "exec"}
"""Names in code objects that mutated inputs are full of."""


@dataclass(frozen=True)
class Target:
    """One reader with inputs to start from.

    Attributes:
        name: What is read.
        seeds: Sound inputs.
        read: Reads one input; raises `UserError` if it does not like it.
        words: Tokens that mutations insert.
    """

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], Any]
    words: tuple[bytes, ...] = INTERESTING


@dataclass
class Outcome:
    """What a number of inputs did.

    Attributes:
        inputs: How many were read.
        accepted: How many of them were read without complaint.
        refused: How many got their one line.
        crashes: Inputs that did anything else, with what it was; the first ten.
        slowest: Seconds of the slowest one.
    """

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: list[tuple[bytes, str]] = field(default_factory=list)
    slowest: float = 0.0


def mutations(seeds: Sequence[bytes], words: Sequence[bytes], draws: random.Random) -> Iterator[bytes]:
    """Endlessly: a seed with one to eight changes, or the halves of two seeds."""
    while True:
        content = bytearray(draws.choice(seeds))
        if draws.random() < 0.1:
            other = draws.choice(seeds)
            content = content[: draws.randint(0, len(content))] + other[draws.randint(0, len(other)) :]
        for _ in range(draws.choice((1, 1, 1, 2, 3, 5, 8))):
            place = draws.randint(0, len(content))
            kind = draws.randrange(7)
            if kind == 0 and content:
                content[place % len(content)] ^= 1 << draws.randrange(8)
            elif kind == 1 and content:
                content[place % len(content)] = draws.randrange(256)
            elif kind == 2:
                content[place:place] = draws.choice(words)
            elif kind == 3:
                word = draws.choice(words)
                content[place : place + len(word)] = word
            elif kind == 4:
                del content[place : place + draws.choice((1, 1, 2, 4, 8, 64))]
            elif kind == 5:
                part = content[place : place + draws.choice((1, 4, 16, 64))]
                content[place:place] = part * draws.choice((1, 2, 50))
            elif draws.random() < 0.2:
                del content[place:]
        yield bytes(content)


def sprung(text: str = "") -> str:
    """The trap: what hostile inputs try to call. Whoever calls it is noted."""
    WATCH.seen.append(f"the trap was called: {text}")
    return text


class Watch:
    """Audit hook that notes what code a reader runs; a process can install hooks and never take them away."""

    def __init__(self) -> None:
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}"[:200])
        # Libraries write methods of data classes as text, and typing evaluates annotations: what names the trap, or
        # what leads to it, is neither.
        elif event == "exec" and SUSPICIOUS & set(getattr(arguments[0], "co_names", ())):
            self.seen.append(f"exec of {arguments[0]!r}"[:200])


WATCH = Watch()


def read_one(target: Target, content: bytes, outcome: Outcome) -> None:
    """Read one input, and count what it did."""
    outcome.inputs += 1
    WATCH.seen.clear()
    begun = time.perf_counter()
    WATCH.active = True
    try:
        target.read(content)
        outcome.accepted += 1
    except UserError as error:
        outcome.refused += 1
        if "\n" in str(error) or not str(error):
            outcome.crashes.append((content, f"a message that is not one line: {str(error)!r}"))
    except BaseException as error:  # also SystemExit, MemoryError and RecursionError: a reader raises none of them
        WATCH.active = False
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.crashes.append((content, f"{type(error).__name__}: {error}"))
    finally:
        WATCH.active = False
    spent = time.perf_counter() - begun
    outcome.slowest = max(outcome.slowest, spent)
    if spent > SLOW:
        outcome.crashes.append((content, f"it took {spent:.1f} s"))
    if WATCH.seen:
        outcome.crashes.append((content, WATCH.seen[0]))


def fuzz(target: Target, *, inputs: int, seed: int, progress: Callable[[int], None] = lambda done: None) -> Outcome:
    """Read mutated inputs.

    Args:
        target: The reader.
        inputs: How many.
        seed: The same seed gives the same inputs.
        progress: Called every thousand inputs with how many are done.

    Returns:
        What they did.
    """
    outcome = Outcome()
    stream = mutations(target.seeds, target.words, random.Random(f"{target.name} {seed}"))
    for content in stream:
        if outcome.inputs >= inputs or len(outcome.crashes) >= 10:
            return outcome
        read_one(target, content, outcome)
        if outcome.inputs % 1000 == 0:
            progress(outcome.inputs)
    raise AssertionError("the stream of mutations has no end")
