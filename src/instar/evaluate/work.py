"""The attacks of a suite on all shards: taken over from the store, computed, or left to another process."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from instar.arrays import Arrays, pack
from instar.errors import UserError, one_line
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.clean import Clean
from instar.evaluate.conditions import Conditions
from instar.evaluate.examine import examine
from instar.evaluate.examples import Examples, gathered, keeper, kept
from instar.evaluate.progress import Progress
from instar.evaluate.recording import version
from instar.evaluate.shards import Keep, Outcome, Shard, Store, keep_nothing
from instar.evaluate.subject import Subject
from instar.evaluate.suites import Entry
from instar.evaluate.targets import Case
from instar.evaluate.team import PATIENCE, Team

TELLING = 1.0
"""Seconds between two reports of a process to the others."""


class TooLargeError(UserError):
    """A batch did not fit into the memory of the device."""


@dataclass
class Work:
    """What a suite does to a case.

    Attributes:
        name: Of this evaluation among all that the processes do.
        case: Model and images.
        entries: The attacks.
        subject: The model as attacks see it.
        clean: What it says of clean images.
        conditions: What every attack is run under.
        store: What was found before.
        identity: What all verdicts depend on besides images and attack.
        team: The processes that share the work.
        report: Hears how far it is.
        search: A copy of lower precision to search with, or None.
        examples: Whether adversarial examples are kept.
    """

    name: str
    case: Case
    entries: tuple[Entry, ...]
    subject: Subject
    clean: Clean
    conditions: Conditions
    store: Store
    identity: dict[str, Any]
    team: Team
    report: Progress
    search: nn.Module | None = None
    examples: bool = False
    _done: dict[tuple[str, int], Outcome] = field(default_factory=dict)
    _progress: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    _told: float = 0.0
    _shard: Shard | None = None

    def do(self) -> None:
        """Claim pieces of work until none is left; a piece is one attack on one shard.

        Raises:
            UserError: An attack failed, in one line; what was finished is kept.
        """
        pieces = [(entry, number) for entry in self.entries for number in range(self.clean.count)]
        while (claimed := self.team.claim(f"{self.name}/pieces")) < len(pieces):
            entry, number = pieces[claimed]
            if number == 0 or not self.team.alone:
                self._tell(entry, number, 0.0, 0)
            outcome = self._attack(entry, self._images(number))
            self._done[entry.name, number] = outcome
            if not self.team.alone:
                self.team.put(self._piece(entry, number), pack(outcome.to_arrays()))
            self._tell(entry, number, 1.0, int(outcome.robust.sum()))

    def wait(self) -> None:
        """Wait until the other processes have done their pieces as well.

        Raises:
            LostError: Another process has stopped.
        """
        while missing := [entry for entry in self.entries if self.outcome(entry) is None]:
            self.team.check()
            time.sleep(PATIENCE)
            self._show(missing[0])

    def outcome(self, entry: Entry) -> Outcome | None:
        """What an attack did to all points, or None if that is not known yet."""
        for number in range(self.clean.count):
            if (entry.name, number) not in self._done:
                content = None if self.team.alone else self.team.get(self._piece(entry, number))
                if content is None:
                    return None
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    found = {name: arrays[name] for name in arrays.files}
                self._done[entry.name, number] = Outcome.from_arrays(found)
        return Outcome.joined([self._done[entry.name, number] for number in range(self.clean.count)])

    def finished(self) -> dict[str, Outcome]:
        """What is known of the attacks that have seen all points, in order."""
        known = {entry.name: self.outcome(entry) for entry in self.entries}
        return {name: outcome for name, outcome in known.items() if outcome is not None}

    def gather(self, broken_by: np.ndarray) -> Examples:
        """The adversarial examples that were kept, one for every broken point.

        Args:
            broken_by: Name of the attack that broke each point first (n,).
        """
        by_name = {entry.name: entry for entry in self.entries}

        def parts(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for number in range(self.clean.count):
                start, _ = self.clean.span(number)
                for rows, images in kept(self.store, self._key(by_name[name], number)):
                    yield rows + start, images

        return gathered(broken_by, self.clean.index, self.clean.label, list(by_name), parts)

    def _piece(self, entry: Entry, number: int) -> str:
        return f"{self.name}/{entry.name}/{number}"

    def _images(self, number: int) -> Shard:
        """A shard with its images; one is held, for suites of many attacks on few shards."""
        if self._shard is None or self._shard.number != number:
            self._shard = self.clean.shard(self.case, number, self.subject.device)
        return self._shard

    def _key(self, entry: Entry, number: int) -> str:
        """The name that a result is stored under: everything that it depends on."""
        reference = {"pyautoattack": version("pyautoattack")} if isinstance(entry.attack, AutoAttack) else {}
        scope = {"everyone": True} if entry.everyone else {}
        depends = {**self.identity, **reference, **scope, "attack": repr(entry.attack)}
        depends["images"] = self.clean.digests[number]
        return self.store.key(type(entry.attack).__name__.lower(), number, depends)

    def _attack(self, entry: Entry, shard: Shard) -> Outcome:
        """Run one attack on one shard, from where it was left."""
        key = self._key(entry, shard.number)
        keeps = self.examples and entry.counts
        note: Keep = keeper(self.store, key) if keeps else keep_nothing
        stored = _known(self.store.get(key), shard)
        if keeps and stored is not None and not bool(stored.get("examples", False)):
            stored = None  # what was broken without keeping the examples must be broken again

        def save(arrays: Arrays) -> None:
            self.store.put(key, {**arrays, "probe": shard.probe, "examples": np.array(keeps)})

        def tick(fraction: float, robust: int) -> None:
            self._tell(entry, shard.number, fraction, robust)

        try:
            return examine(
                entry.attack,
                self.subject,
                shard,
                seed=self.conditions.seed,
                batch_size=self.conditions.batch_size,
                search=self.search,
                everyone=entry.everyone,
                stored=stored,
                save=save,
                keep=note,
                tick=tick,
            )
        except UserError as error:
            raise UserError(f"{error}{self._kept()}") from None
        except torch.OutOfMemoryError:
            raise TooLargeError(
                f"{entry.title} needs more memory than there is for {self.conditions.batch_size} images at a time; "
                "give a smaller batch size (--batch-size)"
            ) from None
        except Exception as error:  # foreign models fail in any way, also midway; what was computed is kept
            raise UserError(
                f"{entry.title} stopped at images {shard.start} to {shard.start + len(shard) - 1}: "
                f"{type(error).__name__}: {one_line(error)}{self._kept()}"
            ) from error

    def _kept(self) -> str:
        return "" if self.store.folder is None else f"; what was finished is kept in {self.store.folder}"

    def _tell(self, entry: Entry, number: int, fraction: float, robust: int) -> None:
        """Note how far an attack is on a shard, and let the others and the user know."""
        start, stop = self.clean.span(number)
        self._progress.setdefault(entry.name, {})[number] = (int(fraction * (stop - start)), robust)
        if self.team.alone:
            self._show(entry)
            return
        now = time.monotonic()
        if now - self._told < TELLING and fraction < 1.0:
            return
        self._told = now
        self.team.put(f"{self.name}/progress/{self.team.rank}", json.dumps(self._own()).encode())
        self._show(entry)

    def _own(self) -> dict[str, list[int]]:
        """Points done and standing, by attack, of this process."""
        return {
            name: [sum(part[place] for part in parts.values()) for place in (0, 1)]
            for name, parts in self._progress.items()
        }

    def _show(self, entry: Entry) -> None:
        """Report how far all processes together are with an attack."""
        if not self.team.leads:
            return
        told = [self._own()]
        for rank in range(1, self.team.size):
            content = self.team.get(f"{self.name}/progress/{rank}")
            told += [json.loads(content)] if content is not None else []
        done, robust = (sum(each.get(entry.name, [0, 0])[place] for each in told) for place in (0, 1))
        self.report(entry.name, done, len(self.clean.label), robust)


def _known(stored: Arrays | None, shard: Shard) -> Arrays | None:
    """What is stored, if it belongs to this model: equal weights do not make equal models (a changed logit scale)."""
    if stored is None or stored.get("probe") is None or stored["probe"].shape != shard.probe.shape:
        return None
    if "margin" not in stored:  # written before margins were kept
        return None
    size = float(np.abs(shard.probe).max())
    with contextlib.suppress(TypeError, ValueError):
        return stored if np.allclose(stored["probe"], shard.probe, rtol=1e-3, atol=1e-4 * size) else None
    return None
