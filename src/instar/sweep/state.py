"""How far a run is, read from its folder and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.errors import UserError
from instar.evaluate import Record, read
from instar.expression import parse
from instar.storage import read_json, read_text
from instar.sweep.plan import Evaluation, Member


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        begun: Whether there is a run.
        lines: The lines of its log, one an epoch.
        epochs: Epochs that it will have.
        records: Its evaluations, by checkpoint; those that were asked for and of these weights.
        wanted: How many evaluations were asked for.
    """

    begun: bool
    lines: tuple[Mapping[str, Any], ...]
    epochs: int
    records: Mapping[str, Record]
    wanted: int

    @property
    def trained(self) -> bool:
        """Whether training is complete: an epoch's line is written after its weights and instance table."""
        return self.begun and len(self.lines) >= self.epochs

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.trained and len(self.records) == self.wanted

    @property
    def hours(self) -> float:
        """Hours of training and evaluating so far."""
        judging = sum(sum(record.run.get("seconds", {}).values()) for record in self.records.values())
        return (float(self.lines[-1]["seconds"] if self.lines else 0.0) + judging) / 3600


def look(member: Member) -> State:
    """How far a run of a sweep is.

    Raises:
        UserError: A file of the run is damaged.
    """
    epochs, wanted = int(member.configuration.training["epochs"]), member.evaluation
    count = 0 if wanted is None else len(wanted.checkpoints)
    if not (member.folder / "run.json").is_file():
        return State(False, (), epochs, {}, count)
    lines = _log(member.folder / "log.jsonl")
    records = {}
    if wanted is not None and len(lines) >= epochs:
        for checkpoint in wanted.checkpoints:
            record = _record(member.folder, checkpoint, wanted)
            if record is not None:
                records[checkpoint] = record
    return State(True, lines, epochs, records, count)


def _log(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        return tuple(json.loads(line) for line in read_text(path, what="log").splitlines())
    except ValueError as error:
        raise UserError(f"cannot read the log {path}: {error}") from None


def _record(folder: Path, checkpoint: str, wanted: Evaluation) -> Record | None:
    """The evaluation of a checkpoint if it is there, of these weights, and what was asked for."""
    path = folder / "evaluations" / f"{wanted.suite}-{checkpoint}.json"
    if not path.is_file():
        return None
    try:
        record = read(path)
        card = read_json(folder / "checkpoints" / f"{checkpoint}.json", what="card")
    except UserError:
        return None  # damaged: the evaluation is asked for again, and says what is wrong if it cannot be made
    fits = record.protocol.get("weights_sha256") == card.get("sha256") and answers(record.protocol, wanted)
    return record if fits else None


def answers(protocol: Mapping[str, Any], wanted: Evaluation) -> bool:
    """Whether an evaluation with this protocol is the one that was asked for."""
    settings = wanted.settings
    every = str(protocol.get("images", "")).startswith("all ")
    if "n" in settings:
        total = re.search(r"all (\d+)", str(protocol.get("images")))
        if protocol.get("n") != int(settings["n"]) and not (total and int(total[1]) <= int(settings["n"])):
            return False
    elif wanted.whole and not every:
        return False
    if "norm" in settings and str(protocol.get("norm")).lower() != str(settings["norm"]).lower():
        return False
    if "eps" in settings and protocol.get("eps_value") != parse(str(settings["eps"])):
        return False
    precise = str(protocol.get("precision", "")).split(" ")[0]
    return precise == settings.get("precision", "float32") and all(
        protocol.get(name) == int(settings[name]) for name in ("seed", "batch_size", "shard_size") if name in settings
    )


def error_of(log: Path) -> str:
    """The one line by which the last attempt at a run says why it failed; empty if it does not.

    Raises:
        UserError: The file is damaged.
    """
    if not log.is_file():
        return ""
    lines = read_text(log, what="output of a run").splitlines()
    said = [line for line in lines if line.startswith("instar: ") and not line.startswith("instar: note: ")]
    return said[-1].removeprefix("instar: ") if said else ""


def status(member: Member, state: State, *, running: bool = False) -> str:
    """One or a few words: ``done``, ``epoch 3 of 30``, ``trained, not evaluated``, ``failed: ...``, ``not begun``."""
    if state.complete:
        return "done"
    if running:
        return "running"
    error = error_of(member.log)
    if error:
        return f"failed: {error}"
    if state.trained:
        return "trained, not evaluated"
    return f"epoch {len(state.lines)} of {state.epochs}" if state.begun else "not begun"
