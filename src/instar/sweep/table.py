"""One table of a sweep: a row a run, and a row for the runs that differ in nothing but the seed."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.errors import UserError
from instar.storage import write_atomically
from instar.sweep.plan import Member
from instar.sweep.state import State, look, status
from instar.sweep.work import locked

HELD_OUT = {"selection_clean": "held-out clean", "selection_robust": "held-out robust"}
"""What training itself measures: the best checkpoint on images held out of the training set."""


@dataclass(frozen=True)
class Row:
    """One run under one checkpoint.

    Attributes:
        member: The run.
        checkpoint: The evaluated checkpoint, or ``""``.
        status: Done, or why not.
        values: Accuracies in [0, 1] by column.
        titles: Titles of the columns, in order.
        verdict: The word of the evaluation's verdict, or ``""``.
        hours: Of training and evaluating.
    """

    member: Member
    checkpoint: str
    status: str
    values: Mapping[str, float]
    titles: Mapping[str, str]
    verdict: str
    hours: float


def rows(members: Sequence[Member]) -> list[Row]:
    """The rows of a sweep as its folders are now."""
    return [row for member in members for row in _rows(member)]


def _rows(member: Member) -> list[Row]:
    wanted = member.evaluation
    checkpoints = ("",) if wanted is None else wanted.checkpoints
    try:
        state = look(member)
        said = status(member, state, running=locked(member.log))
    except UserError as error:
        return [Row(member, checkpoint, f"failed: {error}", {}, {}, "", 0.0) for checkpoint in checkpoints]
    found = []
    for checkpoint in checkpoints:
        values, titles = _held_out(state, checkpoint)
        record = state.records.get(checkpoint)
        if record is not None:
            shown = {name: score for name, score in record.scores.items() if name not in record.diagnoses}
            values |= {name: score.accuracy for name, score in shown.items()}
            titles |= {name: score.title for name, score in shown.items()}
        verdict = "" if record is None else record.verdict.word
        found.append(Row(member, checkpoint, said, values, titles, verdict, state.hours))
    return found


def _held_out(state: State, checkpoint: str) -> tuple[dict[str, float], dict[str, str]]:
    """What training measured at the end of the epoch that the checkpoint is of."""
    if not state.lines:
        return {}, {}
    # max() keeps the first of equals, as training does.
    line = state.lines[-1] if checkpoint == "last" else max(state.lines, key=lambda entry: entry["selection_robust"])
    return {name: float(line[name]) for name in HELD_OUT}, dict(HELD_OUT)


def columns(found: Sequence[Row]) -> dict[str, str]:
    """All columns with their titles: clean, the attacks in order, the worst case last; what is held out before them."""
    titles: dict[str, str] = {}
    for row in found:
        titles |= {name: title for name, title in row.titles.items() if name not in titles}
    order = [*HELD_OUT, *(name for name in titles if name not in HELD_OUT and name != "worst_case"), "worst_case"]
    return {name: titles[name] for name in order if name in titles}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: The runs in words.
        checkpoint: The evaluated checkpoint, or ``""``.
        seeds: Seeds of the complete runs, which alone count.
        of: How many runs there will be.
        values: Mean and standard deviation (None for one seed) by column.
        verdict: Words of the verdicts with their counts.
        hours: Of all its runs together.
    """

    label: str
    checkpoint: str
    seeds: tuple[int, ...]
    of: int
    values: Mapping[str, tuple[float, float | None]]
    verdict: str
    hours: float


def groups(found: Sequence[Row]) -> list[Group]:
    """The rows by everything but the seed, in order."""
    by: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        by.setdefault((row.member.label, row.checkpoint), []).append(row)
    made = []
    for (label, checkpoint), members in by.items():
        done = [row for row in members if row.status == "done"]
        names = [name for name in columns(done) if all(name in row.values for row in done)]
        words = [row.verdict for row in done if row.verdict]
        counts = {word: words.count(word) for word in dict.fromkeys(words)}
        made.append(
            Group(
                label=label,
                checkpoint=checkpoint,
                seeds=tuple(row.member.seed for row in done),
                of=len(members),
                values={name: mean_and_deviation([row.values[name] for row in done]) for name in names},
                verdict=", ".join(word if len(words) == 1 else f"{count} {word}" for word, count in counts.items()),
                hours=sum(row.hours for row in members),
            )
        )
    return made


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, None for a single value.

    Example:
        >>> mean_and_deviation([0.25, 0.5, 0.75]), mean_and_deviation([0.5])
        ((0.5, 0.25), (0.5, None))
    """
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def write(members: Sequence[Member], out: Path) -> list[Row]:
    """Write ``results.md``, ``results.csv`` and ``results.json``, each whole or not at all.

    Args:
        members: The runs of the sweep.
        out: Its folder, which is made if need be.

    Returns:
        The rows.

    Raises:
        UserError: The disk is full or read-only.
    """
    found = rows(members)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("md", markdown(found)), ("csv", as_csv(found)), ("json", as_json(found))):
        write_atomically(out / f"results.{name}", text.encode())
    return found


def markdown(found: Sequence[Row]) -> str:
    """Both tables in Markdown."""
    titles = columns(found)
    judged = any(name not in HELD_OUT for name in titles)
    titles = {name: title for name, title in titles.items() if not judged or name not in HELD_OUT}
    several = len({row.checkpoint for row in found}) > 1
    which = ["checkpoint"] if several else []
    lines = _table(
        ["accuracy, %", *which, "seeds", *titles.values(), "verdict", "hours"],
        [
            [
                group.label,
                *([group.checkpoint] if several else []),
                str(group.of) if len(group.seeds) == group.of else f"{len(group.seeds)} of {group.of}",
                *(_spread(group.values.get(name)) for name in titles),
                group.verdict or "–",
                f"{group.hours:.2f}",
            ]
            for group in groups(found)
        ],
        words=1 + len(which),
    )
    lines += ["", "Mean ± standard deviation over seeds, of runs that are complete.", ""]
    lines += _table(
        ["run", *which, "status", *titles.values(), "verdict", "hours"],
        [
            [
                row.member.name,
                *([row.checkpoint] if several else []),
                row.status,
                *(f"{100 * row.values[name]:.1f}" if name in row.values else "–" for name in titles),
                row.verdict or "–",
                f"{row.hours:.2f}",
            ]
            for row in found
        ],
        words=2 + len(which),
    )
    return "\n".join([*lines, "", *_notes(found, judged)]) + "\n"


def _notes(found: Sequence[Row], judged: bool) -> list[str]:
    wanted = found[0].member.evaluation
    if wanted is None or not judged:
        return [
            "- Measured by training itself: the best checkpoint under margin PGD-10, on images held out of the training"
            " set; no test image was looked at."
        ]
    words = " ".join(f"--{name} {given}" for name, given in wanted.settings.items())
    which = " and ".join(wanted.checkpoints)
    return [
        f"- Suite {wanted.suite}{' ' if words else ''}{words}, checkpoint {which}; the whole protocol stands in the "
        "record of each run.",
        "- `instar compare` tests differences image by image.",
    ]


def _table(heading: Sequence[str], cells: Sequence[Sequence[str]], *, words: int) -> list[str]:
    """A table whose first columns are words and whose others are numbers."""
    rule = [" --- " if place < words else " ---: " for place in range(len(heading))]
    return [
        f"| {' | '.join(heading)} |",
        f"|{'|'.join(rule)}|",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells),
    ]


def _spread(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "–"
    mean, deviation = found
    return f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def as_csv(found: Sequence[Row]) -> str:
    """A line a run, accuracies in [0, 1]."""
    titles = columns(found)
    varied = list(dict.fromkeys(name for row in found for name, _ in row.member.varied))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["run", "method", *varied, "seed", "checkpoint", "status", *titles, "verdict", "hours"])
    for row in found:
        given = dict(row.member.varied)
        values = [repr(row.values[name]) if name in row.values else "" for name in titles]
        first = [row.member.name, row.member.method, *(given.get(name, "") for name in varied), row.member.seed]
        writer.writerow([*first, row.checkpoint, row.status, *values, row.verdict, f"{row.hours:.4f}"])
    return stream.getvalue()


def as_json(found: Sequence[Row]) -> str:
    """Both tables, with the titles of their columns."""

    def value(entry: tuple[float, float | None]) -> dict[str, Any]:
        return {"mean": entry[0], "deviation_over_seeds": entry[1]}

    content = {
        "format": 1,
        "columns": columns(found),
        "runs": [
            {
                "run": row.member.name,
                "method": row.member.method,
                **dict(row.member.varied),
                "seed": row.member.seed,
                "checkpoint": row.checkpoint or None,
                "status": row.status,
                "accuracy": dict(row.values),
                "verdict": row.verdict or None,
                "hours": row.hours,
            }
            for row in found
        ],
        "groups": [
            {
                "runs": group.label,
                "checkpoint": group.checkpoint or None,
                "seeds": list(group.seeds),
                "of": group.of,
                "accuracy": {name: value(entry) for name, entry in group.values.items()},
                "verdict": group.verdict or None,
                "hours": group.hours,
            }
            for group in groups(found)
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
