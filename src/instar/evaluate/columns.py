"""The verdicts of a suite, as its sanity checks look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from instar.attacks import PGD
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.entries import Entry
from instar.evaluate.intervals import Paired, mcnemar
from instar.evaluate.shards import Outcome

GRADIENT = frozenset({"single step", "cross-entropy", "many steps", "margin", "scaled", "gradient"})
"""Kinds of attacks inside the threat model that follow the model's own gradients; AutoAttack is apart."""


@dataclass(frozen=True)
class Columns:
    """The columns of a suite by what they are.

    Attributes:
        entries: The suite's entries.
        outcomes: By name of the entry, over all points.
        correct: Which clean predictions are right (n,), or None if that is not known.
    """

    entries: tuple[Entry, ...]
    outcomes: Mapping[str, Outcome]
    correct: np.ndarray | None = None

    def of(self, *kinds: str) -> list[Entry]:
        """The entries of some kinds, in order."""
        return [entry for entry in self.entries if entry.kind in kinds]

    def most(self, kind: str) -> Entry | None:
        """Of a kind the entry with the most steps, the later of two with as many; None if there is none."""
        ranked = sorted(self.of(kind), key=_steps)
        return ranked[-1] if ranked else None

    def robust(self, entry: Entry) -> np.ndarray:
        """Which points withstood an attack (n,)."""
        return self.outcomes[entry.name].robust

    def accuracy(self, entry: Entry) -> float:
        """Share of points that withstood an attack."""
        return float(self.robust(entry).mean())

    def all_of(self, entries: Iterable[Entry]) -> np.ndarray:
        """Which points withstood every one of some attacks (n,); at least one must be given."""
        return np.logical_and.reduce([self.robust(entry) for entry in entries])

    def pair(self, first: Entry, second: Entry) -> Paired:
        """Two columns compared point by point."""
        return mcnemar(self.robust(first), self.robust(second))

    @property
    def autoattack(self) -> Entry | None:
        """AutoAttack: of several the one named so, else the one with the most stages."""
        found = [entry for entry in self.of("autoattack") if entry.counts and isinstance(entry.attack, AutoAttack)]
        named = [entry for entry in found if entry.name == "autoattack"]
        return named[0] if named else max(found, key=_stages, default=None)

    @property
    def headline(self) -> Entry | None:
        """The column whose number would be quoted: AutoAttack's, else that of PGD on cross-entropy."""
        return self.autoattack or self.most("cross-entropy")

    @property
    def white(self) -> np.ndarray | None:
        """Which points withstood everything that follows gradients (n,), AutoAttack's gradient stages included."""
        found = [self.robust(entry) for entry in self.of(*GRADIENT) if entry.counts]
        found += [self.robust(entry) for entry in self.of("sweep") if entry.counts]
        for entry in (entry for entry in self.of("autoattack") if entry.counts):
            outcome = self.outcomes[entry.name]
            searched = [number for number, stage in enumerate(outcome.stages) if stage == "square"]
            found.append(outcome.robust | np.isin(outcome.broken_by, searched))
        return np.logical_and.reduce(found) if found else None


def _steps(entry: Entry) -> int:
    attack = getattr(entry.attack, "attack", entry.attack)
    steps = getattr(attack, "steps", 0)
    return steps if isinstance(steps, int) else 0


def _stages(entry: Entry) -> int:
    return len(entry.attack.names) if isinstance(entry.attack, AutoAttack) else 0


def radius(entry: Entry) -> float:
    """The radius of a descent's ball, in the unit of its norm."""
    attack = entry.attack
    return attack.ball.radius if isinstance(attack, PGD) else float("nan")


def norm(entry: Entry) -> str:
    """The norm of a descent's ball, or ``""``."""
    attack = entry.attack
    return attack.ball.norm if isinstance(attack, PGD) else ""
