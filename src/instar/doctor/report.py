"""What a doctor says: one line a check, and figures a machine can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from instar.evaluate.progress import spoken
from instar.room import gibibytes

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Check:
    """What one look found.

    Attributes:
        name: What was looked at.
        level: ``"ok"``, ``"warning"`` (a number would need explaining) or ``"error"`` (it would be wrong).
        text: The figure and what it means.
        advice: What to do; empty where nothing need be done.
        value: The figure, or None where there is none.
    """

    name: str
    level: str
    text: str
    advice: str = ""
    value: float | None = None

    def __str__(self) -> str:
        line = f"{self.level:<7}  {self.name}: {self.text}"
        return f"{line}. {self.advice}" if self.advice else line


@dataclass(frozen=True)
class Cost:
    """What a suite of attacks would take on this machine.

    Attributes:
        suite: Its name.
        images: Images it would be run on.
        forwards: Forward passes an image costs that withstands everything; a backward to the input counts as one.
        least: Seconds if no image withstood more than its first attack.
        most: Seconds if every image that is classified correctly withstood everything.
        expected: Seconds if as many withstand as withstood PGD-10 on the probe.
        memory: Bytes at the largest batch, weights and images included.
    """

    suite: str
    images: int
    forwards: int
    least: float
    most: float
    expected: float
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.suite} on {self.images} images: about {spoken(self.expected)} ({spoken(self.least)} to "
            f"{spoken(self.most)}), {gibibytes(self.memory)}"
        )


@dataclass(frozen=True)
class Training:
    """What a training run would take on this machine.

    Attributes:
        recipe: Its name.
        steps: Optimiser steps.
        seconds_a_step: Seconds of one step, in the mean over the run.
        seconds_an_epoch_end: Seconds of what follows each epoch: selection, checkpoints, records.
        seconds: The whole run.
        most: The whole run if no attack stopped early; equal to `seconds` where none does.
        probed: What was measured, in words.
        memory: Largest memory of the process (of the device, on a GPU) while probing, in bytes.
    """

    recipe: str
    steps: int
    seconds_a_step: float
    seconds_an_epoch_end: float
    seconds: float
    most: float
    probed: str
    memory: int

    def __str__(self) -> str:
        most = "" if self.most <= 1.02 * self.seconds else f", at most {spoken(self.most)} if no attack stopped early"
        return (
            f"{self.recipe}: about {spoken(self.seconds)}{most}: {self.steps:,} steps of "
            f"{self.seconds_a_step:.3g} s, and {self.seconds_an_epoch_end:.3g} s after each epoch ({self.probed})"
        )


@dataclass(frozen=True)
class Report:
    """All that was found.

    Attributes:
        target: What was examined.
        checks: One for each look.
        costs: Of each suite of attacks.
        training: Of a recipe, or None.
        machine: Versions and hardware.
    """

    target: str
    checks: tuple[Check, ...]
    costs: tuple[Cost, ...] = ()
    training: Training | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no check is an error."""
        return not any(check.level == ERROR for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of a name."""
        return next(check for check in self.checks if check.name == name)

    def to_json(self) -> dict[str, Any]:
        """Everything in values that JSON can hold."""
        return {**asdict(self), "machine": dict(self.machine), "ok": self.ok}

    def lines(self) -> list[str]:
        """What people read, one line a check and a cost."""
        found = [str(check) for check in self.checks]
        found += [f"cost     {cost}" for cost in self.costs]
        return found + ([f"cost     {self.training}"] if self.training is not None else [])
