"""A number with its protocol: one JSON record for each suite and checkpoint, and one row for each image beside it.

``standard-best.json`` holds the protocol, the accuracies with their intervals, and what the sanity checks found.
``standard-best.npz`` holds, for every image, plain arrays (n,): ``index`` (official position), ``label``,
``prediction`` (clean), ``clean_margin`` (z_y − max_{j≠y} z_j, in logits), ``clean`` (1: right), one uint8 column for
each attack (1: withstood it), ``adv_margin`` (the smallest margin of the images that attacks returned, the clean one
included: below 0 where a point is broken, and else how near they came), ``worst_case`` (1: withstood all), and
``broken_by`` (the first column that broke it, ``"clean"`` for a wrong clean prediction, or ``""``); AutoAttack adds
``autoattack_by``, the stage that broke it; `sanity` and `adaptive` add float32 columns ``mechanism_*`` (see
`instar.evaluate.mechanism`), from which the field ``mechanism`` of the JSON follows.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from instar.arrays import Arrays, pack, read_arrays
from instar.errors import UserError
from instar.evaluate import mechanism
from instar.evaluate.intervals import wilson
from instar.evaluate.sanity import Finding
from instar.evaluate.shards import make_folder
from instar.evaluate.verdict import SOUND, Verdict, conclude
from instar.storage import write_atomically

FORMAT = 1
PARTIAL = "partial"
"""Folder, below that of the records, of those of evaluations that could not go on."""


@dataclass(frozen=True)
class Score:
    """An accuracy as it was counted.

    Attributes:
        title: Name of the row in tables.
        correct: Points that count as right.
        count: Points in all.

    Example:
        >>> score = Score("PGD-20", 431, 1000)
        >>> score.accuracy, [round(end, 3) for end in score.interval]
        (0.431, [0.401, 0.462])
    """

    title: str
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of right points, in [0, 1]."""
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in [0, 1]."""
        return wilson(self.correct, self.count)

    def to_json(self) -> dict[str, Any]:
        """The score with what follows from it, for readers without this package."""
        low, high = self.interval
        return {**asdict(self), "accuracy": self.accuracy, "low": low, "high": high}


@dataclass(frozen=True)
class Record:
    """An evaluation of one checkpoint by one suite.

    Attributes:
        target: What was evaluated, as the caller named it.
        suite: Name of the suite.
        checkpoint: ``"best"``, ``"last"``, or the name of the weights.
        protocol: Everything the numbers depend on.
        scores: By column name: ``clean``, the attacks in order, ``worst_case`` (no attack of the suite breaks it).
        findings: What the sanity checks found.
        instances: One array (n,) for each column of the ``.npz``.
        run: What may differ between two runs of one evaluation: when, how long, and what was reused.
        path: Where the JSON lies, or None if it was not written.
    """

    target: str
    suite: str
    checkpoint: str
    protocol: Mapping[str, Any]
    scores: Mapping[str, Score]
    findings: tuple[Finding, ...] = ()
    instances: Arrays = field(default_factory=dict, repr=False)
    run: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def n(self) -> int:
        """Number of images."""
        return self.scores["clean"].count

    @property
    def suspect(self) -> bool:
        """Whether any check says that the number is suspect, or that it is overestimated."""
        return self.verdict.word != SOUND

    @property
    def diagnoses(self) -> frozenset[str]:
        """The columns that say something about gradients and are no accuracies."""
        attacks = self.protocol.get("attacks", {})
        return frozenset(name for name, attack in attacks.items() if attack.get("diagnosis") is True)

    @property
    def has_mechanism(self) -> bool:
        """Whether margins and difficulties of every image were measured, as the suites sanity and adaptive do."""
        return mechanism.measured(self.instances)

    @property
    def verdict(self) -> Verdict:
        """What the findings come to: sound, suspect or overestimated."""
        return conclude(self.findings)

    def to_json(self) -> dict[str, Any]:
        """The record as it is written, without the rows for images.

        The first fields have the names and forms of RobustBench's result files.
        """
        reported = {"dataset": self.protocol["data"]["name"], "architecture": self.protocol["model"]["architecture"]}
        reported |= {"eps": self.protocol["eps"], "clean_acc": _percent(self.scores["clean"])}
        if self.protocol["reference_autoattack"]:
            reported["autoattack_acc"] = _percent(self.scores["autoattack"])
        return {
            **reported,
            "format": FORMAT,
            "target": self.target,
            "suite": self.suite,
            "checkpoint": self.checkpoint,
            "protocol": dict(self.protocol),
            "results": {name: score.to_json() for name, score in self.scores.items()},
            "verdict": self.verdict.to_json(),
            "findings": [asdict(finding) for finding in self.findings],
            **({"mechanism": mechanism.summary(self.instances, self.protocol)} if self.has_mechanism else {}),
            "run": dict(self.run),
        }

    def write(self, folder: str | os.PathLike[str]) -> Record:
        """Write ``<suite>-<checkpoint>.json`` and the ``.npz`` of images beside it, each whole or not at all.

        A record of another protocol under that name (fewer images, another eps) is kept under a longer name.

        Args:
            folder: Where; it is made if need be.

        Returns:
            This record with its path.

        Raises:
            UserError: The disk is full or read-only.
        """
        written = self._put(Path(folder))
        for suffix in (".json", ".npz"):
            partial = Path(folder) / PARTIAL / f"{self.suite}-{self.checkpoint}{suffix}"
            partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # absent, or there are other records in it
            (Path(folder) / PARTIAL).rmdir()
        return written

    def write_partial(self, folder: str | os.PathLike[str], *, stopped: str) -> Record:
        """Write what is known of an evaluation that could not go on, to the folder ``partial`` below.

        Args:
            folder: Where the whole record would be written; doing so removes the partial one.
            stopped: Why it could not go on.

        Returns:
            This record with its path.

        Raises:
            UserError: The disk is full or read-only.
        """
        return replace(self, run={**self.run, "stopped": stopped})._put(Path(folder) / PARTIAL)

    def _put(self, folder: Path) -> Record:
        target = folder / f"{self.suite}-{self.checkpoint}.json"
        make_folder(target.parent)
        _keep_other(target, self.protocol)
        write_atomically(target.with_suffix(".npz"), pack(self.instances))
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(target, f"{text}\n".encode())
        return replace(self, path=target)


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.2f}"


def _keep_other(path: Path, protocol: Mapping[str, Any]) -> None:
    """Move a record of another protocol out of the way: it may have taken hours."""
    try:
        older = json.loads(path.read_text(encoding="utf-8"))["protocol"]
        if older["key"] == protocol["key"]:
            return
        name = f"{path.stem}-{older['norm']}-{older['eps'].replace('/', '_')}-n{older['n']}-{older['key'][:8]}"
        for suffix in (".json", ".npz"):
            if path.with_suffix(suffix).exists():
                os.replace(path.with_suffix(suffix), path.with_name(name + suffix))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # absent, or not a record of ours: there is nothing to keep


def read(path: str | os.PathLike[str]) -> Record:
    """Read a record and its rows back.

    Args:
        path: The JSON file.

    Returns:
        The record, equal to the one that was written.

    Raises:
        UserError: A file is missing or damaged, or of another format.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is no evaluation record of format {FORMAT}")
        scores = {
            name: Score(entry["title"], entry["correct"], entry["count"]) for name, entry in content["results"].items()
        }
        instances = read_arrays(path.with_suffix(".npz"), what="evaluation record")
        return Record(
            target=content["target"],
            suite=content["suite"],
            checkpoint=content["checkpoint"],
            protocol=content["protocol"],
            scores=scores,
            findings=tuple(Finding(**entry) for entry in content["findings"]),
            instances=instances,
            run=content["run"],
            path=path,
        )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"cannot read the evaluation record {path}: {error}") from None
