"""From what a user names to records that can be compared: which checkpoint, which suites, which runs differ by seed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instar.config import INDIFFERENT
from instar.errors import UserError, unknown
from instar.evaluate import Record, read
from instar.runs import read_run

Target = str | os.PathLike[str] | Record

SUITES = ("standard", "robustbench", "adaptive", "development", "quick")
"""Whose record comes first where a run has several; columns of the others stand behind."""
WITHOUT = frozenset({"seed", "out", "resume"}) | INDIFFERENT - {"accumulate"}
"""Training settings in which runs of one recipe may differ: the seed, and what changes no result."""


@dataclass(frozen=True)
class Judged:
    """One checkpoint with all that was measured of it under one threat model on one set of images.

    Attributes:
        name: What tables call it.
        records: Of one or more suites, the most important first.
        run: The contents of the run's ``run.json``, or empty.
    """

    name: str
    records: tuple[Record, ...]
    run: Mapping[str, Any]

    @property
    def main(self) -> Record:
        """The record of the most important suite."""
        return self.records[0]

    @property
    def seed(self) -> int | None:
        """Seed of the training run, if it is known."""
        seed = (self.run.get("training") or {}).get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def index(self) -> np.ndarray:
        """Official positions (n,)."""
        return self.main.instances["index"]

    @property
    def label(self) -> np.ndarray:
        """Labels (n,)."""
        return self.main.instances["label"]

    @property
    def recipe(self) -> str | None:
        """Everything about training but the seed, as text; None without a ``run.json``."""
        if not self.run:
            return None
        data = {key: item for key, item in (self.run.get("data") or {}).items() if key != "path"}
        training = {key: item for key, item in (self.run.get("training") or {}).items() if key not in WITHOUT}
        rest = {key: self.run.get(key) for key in ("recipe", "method", "model", "threat", "precision")}
        return json.dumps([data, training, rest, self.main.checkpoint], sort_keys=True, default=str)

    def attacks(self) -> dict[str, Mapping[str, Any]]:
        """What the record says of each column (title, expression, ...), over all suites; the first suite's comes first.

        Diagnoses are left out: they are no accuracies.
        """
        found: dict[str, Mapping[str, Any]] = {}
        for record in self.records:
            for name, said in record.protocol.get("attacks", {}).items():
                if name in record.instances and not said.get("diagnosis"):
                    found.setdefault(name, said)
        return found

    def column(self, name: str) -> np.ndarray:
        """Verdicts (n,) of a column, boolean."""
        for record in self.records:
            if name in record.instances:
                return record.instances[name].astype(bool)
        raise unknown("column", name, ["clean", *self.attacks()])


def gather(
    targets: Sequence[Target],
    *,
    names: Sequence[str] | None = None,
    suite: str | None = None,
    checkpoint: str | None = None,
) -> list[Judged]:
    """Read what is to be compared.

    Of a folder the records of one checkpoint are taken, under one threat model on one set of images, and as far as
    possible those that all targets have: the best checkpoint if all have one, else the last; most images first.

    Args:
        targets: Run folders, folders of records, records' JSON files, or records. ``NAME=PATH`` gives a name.
        names: Names for tables, one for each target; None takes recipe, folder or target, whichever tells them apart.
        suite: Only records of this suite.
        checkpoint: Only records of this checkpoint, for example ``"best"``.

    Returns:
        One for each target, in order.

    Raises:
        UserError: There are no records, or too many to choose from.
    """
    if len(targets) < 2:
        raise UserError("compare needs at least two runs, folders of evaluations, or records")
    if names is not None and len(names) != len(targets):
        raise UserError(f"{len(targets)} targets need as many names; got {len(names)}")
    split = [_named(target) for target in targets]
    found = [_records(place, suite=suite, checkpoint=checkpoint) for _, place in split]
    chosen = _choose(found, [str(place.target if isinstance(place, Record) else place) for _, place in split])
    runs = [_run_of(records[0]) for records in chosen]
    said = [name for name, _ in split]
    called = list(names) if names is not None else _names(chosen, runs, said)
    return [Judged(name, tuple(records), run) for name, records, run in zip(called, chosen, runs, strict=True)]


def _named(target: Target) -> tuple[str | None, Record | Path]:
    """A target's given name, if any, and what it is."""
    if isinstance(target, Record):
        return None, target
    text = os.fspath(target)
    name, equals, rest = text.partition("=")
    if equals and name and rest and not Path(text).expanduser().exists():
        return name, Path(rest).expanduser()
    return None, Path(text).expanduser()


def _records(place: Record | Path, *, suite: str | None, checkpoint: str | None) -> list[Record]:
    """All records of a target that are of the wanted suite and checkpoint."""
    if isinstance(place, Record):
        return [place]
    if place.suffix == ".json" and not place.is_dir():
        return [read(place)]
    if not place.is_dir():
        raise UserError(f"there is no run folder, folder of evaluations or record {place}")
    folder = place / "evaluations" if (place / "evaluations").is_dir() else place
    found = [read(file) for file in sorted(folder.glob("*.json")) if _is_record(file)]
    if not found:
        raise UserError(f"{place} has no evaluations: instar evaluate {place}")
    for what, wish in (("suite", suite), ("checkpoint", checkpoint)):
        if wish is not None:
            there = [getattr(record, what) for record in found]
            found = [record for record in found if getattr(record, what) == wish]
            if not found:
                raise unknown(f"{what} of {place}", wish, there)
    return found


def _is_record(file: Path) -> bool:
    """Whether a JSON file means to be a record; a damaged one does, and is then complained about."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return isinstance(content, dict) and "protocol" in content and "results" in content


def conditions(record: Record) -> tuple[Any, ...]:
    """What two records must share to be about the same question: data, threat model, images."""
    protocol = record.protocol
    images = record.instances["index"].tobytes()
    return protocol["data"]["name"], tuple(protocol["data"]["shape"]), protocol["norm"], protocol["eps_value"], images


def _choose(found: Sequence[Sequence[Record]], places: Sequence[str]) -> list[list[Record]]:
    """Of each target's records those of one checkpoint and one question, the same for all where that can be."""
    shared = _shared([{record.checkpoint for record in records} for records in found])
    checkpoint = next((name for name in ("best", "last", *sorted(shared)) if name in shared), None)
    kept = []
    for records, place in zip(found, places, strict=True):
        named = list(dict.fromkeys(record.checkpoint for record in records))
        if checkpoint is None and len(named) > 1:
            raise UserError(
                f"{place} has the checkpoints {' and '.join(named)}, none of which all have in common: name "
                "a record's .json instead of the folder"
            )
        wanted = named[0] if checkpoint is None else checkpoint
        kept.append([record for record in records if record.checkpoint == wanted])
    questions = _shared([{conditions(record) for record in records} for records in kept])
    return [_of_one_question(records, questions) for records in kept]


def _shared(sets: Sequence[Iterable[Any]]) -> set[Any]:
    return set.intersection(*map(set, sets)) if sets else set()


def _of_one_question(records: Sequence[Record], questions: set[Any]) -> list[Record]:
    """The records of a shared question if there is one, else of one of their own; most images, main suite first."""
    fitting = [record for record in records if conditions(record) in questions] or list(records)
    order = sorted(fitting, key=lambda record: (-record.n, _rank(record.suite), record.suite))
    first = order[0]
    weights = first.protocol["weights_sha256"]
    same = [r for r in order if conditions(r) == conditions(first) and r.protocol["weights_sha256"] == weights]
    return sorted(same, key=lambda record: (_rank(record.suite), record.suite))


def _rank(suite: str) -> int:
    return SUITES.index(suite) if suite in SUITES else len(SUITES)


def _run_of(record: Record) -> dict[str, Any]:
    """The ``run.json`` beside a record, or nothing."""
    if record.path is not None:
        folder = record.path.resolve().parent
        for place in (folder, folder.parent):
            if (place / "run.json").is_file():
                return read_run(place)
    return {}


def _names(
    chosen: Sequence[Sequence[Record]], runs: Sequence[Mapping[str, Any]], said: Sequence[str | None]
) -> list[str]:
    """The shortest names that tell targets apart: the recipe, the folder, target and checkpoint; numbers at last."""
    firsts = [records[0] for records in chosen]
    recipes = [
        str(run.get("recipe") or (first.protocol.get("training") or {}).get("recipe") or _called(first.target))
        for run, first in zip(runs, firsts, strict=True)
    ]
    folders = [_folder(first) for first in firsts]
    last = [f"{folder}, {first.checkpoint}" for folder, first in zip(folders, firsts, strict=True)]
    for form in (
        recipes,
        [f"{recipe}, {first.checkpoint}" for recipe, first in zip(recipes, firsts, strict=True)],
        folders,
        last,
        [f"{name} ({place})" for place, name in enumerate(last, start=1)],
    ):
        # Names that were given may agree: those of one recipe's seeds.
        names = [given or name for given, name in zip(said, form, strict=True)]
        if all(given is not None or names.count(name) == 1 for given, name in zip(said, names, strict=True)):
            break
    return names


def _folder(record: Record) -> str:
    """The run's folder, or what the record calls its target."""
    if record.path is not None:
        folder = record.path.resolve().parent
        return folder.parent.name if folder.name == "evaluations" else folder.name
    return _called(record.target)


def _called(target: str) -> str:
    """A target as people call it: a file of weights by its folder, since many are called ``best`` or ``last``."""
    path = Path(target)
    if not path.suffix:
        return path.name
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return folder.name or path.stem
