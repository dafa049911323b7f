"""Records as tables for people: percent, with Wilson intervals, checkpoints side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from instar.errors import UserError
from instar.evaluate import beyond
from instar.evaluate.progress import spoken
from instar.evaluate.record import Record, Score
from instar.evaluate.symptoms import NOTHING_LEFT


def rows(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """The cells of a table: one row for each column of verdicts that any record has, in order, the worst case last.

    Args:
        records: What to show side by side.

    Returns:
        Title and one cell for each record, ``"43.1 (40.1–46.2)"`` in percent, or ``"–"``.

    Raises:
        UserError: There is no record.
    """
    if not records:
        raise UserError("there is no record to show")
    names: list[str] = []
    for record in records:
        hidden = {"worst_case", *record.diagnoses}
        names += [name for name in record.scores if name not in {*names, *hidden} and not beyond.is_cell(name)]
    titles = {name: score.title for record in records for name, score in record.scores.items()}
    found = [(titles[name], [_cell(record.scores.get(name)) for record in records]) for name in [*names, "worst_case"]]
    attacked = any(_counted(record) for record in records)  # else the worst case is the clean accuracy, and misleads
    return [*found[:-1], *beyond.rows(records), *(found[-1:] if attacked else [])]


def _counted(record: Record) -> bool:
    """Whether any attack of a record counts in its worst case."""
    attacks = record.protocol.get("attacks")
    return attacks is None or any(attack.get("counts", True) for name, attack in attacks.items() if name != "clean")


def _marked(record: Record, mark: str, value: bool) -> list[str]:
    """The columns of a record that its protocol marks so."""
    return [name for name, attack in record.protocol.get("attacks", {}).items() if attack.get(mark) is value]


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def headings(records: Sequence[Record]) -> list[str]:
    """The shortest names that tell the records apart: checkpoint, then with suite, then with target."""
    for form in ("{0.checkpoint}", "{0.suite}, {0.checkpoint}", "{0.target}: {0.suite}, {0.checkpoint}"):
        names = [form.format(record) for record in records]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]


def caption(records: Sequence[Record]) -> list[str]:
    """What must be known beside the numbers: threat model, images, precision, checkpoint rules, findings, verdict.

    Args:
        records: The records of the table.

    Returns:
        Lines of text.
    """
    lines = []
    for line in dict.fromkeys(_protocol_line(record) for record in records):
        lines.append(line)
    seen: dict[str, str] = {}
    for name, record in zip(headings(records), records, strict=True):
        checkpoint = record.protocol["checkpoint"]
        epoch = "" if checkpoint.get("epoch") is None else f", epoch {checkpoint['epoch'] + 1}"
        twin = seen.setdefault(record.protocol["key"], name)
        if twin != name:
            lines.append(f"{name}: {checkpoint['rule']}{epoch}; the same weights as {twin}.")
            continue
        lines.append(f"{name}: {checkpoint['rule']}{epoch}.")
        lines += [
            f"{name}, {f.verdict}: {f.text}."
            for f in record.findings
            if f.verdict != "normal" and f.check != NOTHING_LEFT
        ]
        outside = (column for column in _marked(record, "counts", False) if not beyond.is_cell(column))
        beside = [record.scores[column].title for column in outside if column not in record.diagnoses]
        if beside:
            lines.append(f"{name}: not in the worst case, because outside of the threat model: {', '.join(beside)}.")
        if record.run.get("reused"):
            lines.append(f"{name}: reused from an earlier run: {', '.join(record.run['reused'])}.")
    spent = {record.protocol["key"]: sum(record.run.get("seconds", {}).values()) for record in records}
    lines.append(f"Percent with 95 % Wilson intervals; {spoken(sum(spent.values()))} of computing.")
    for name, record in zip(headings(records), records, strict=True):
        if seen[record.protocol["key"]] == name:
            more = record.verdict.missing and record.suite not in ("sanity", "adaptive", "black_box")
            lines.append(f"Verdict on {name}: {record.verdict.short}{' (more: --suite sanity)' if more else ''}.")
    return lines


def _protocol_line(record: Record) -> str:
    protocol = record.protocol
    return (
        f"{protocol['norm']} {protocol['eps']}, {protocol['images']}, suite {record.suite}, seed {protocol['seed']}, "
        f"{protocol['precision']}, BatchNorm {protocol['bn_mode']}; robust if no iterate is misclassified."
    )


def _title(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(record.target for record in records))


def render(records: Sequence[Record]) -> Group:
    """A table for the terminal, to be printed by a rich console.

    Args:
        records: For example the best and the last checkpoint of a run.

    Returns:
        The table and, below it, the protocol.

    Raises:
        UserError: There is no record.
    """
    cells = rows(records)
    table = Table(title=_title(records), title_justify="left")
    table.add_column("accuracy, %")
    for name in headings(records):
        table.add_column(name, justify="right")
    ends = {0, next((n - 1 for n, (title, _) in enumerate(cells) if title == "worst case"), 0)}
    for number, (title, values) in enumerate(cells):
        table.add_row(title, *values, end_section=number in ends)
    # Not the table's own caption, which is wrapped to the table's width.
    grids = (beyond.render(record) for record in records if beyond.corrupted(record) is not None)
    notes = dict.fromkeys(note for record in records for note in beyond.notes(record))
    return Group(table, *grids, *(Text(line) for line in (*caption(records), *notes)))


def plain(records: Sequence[Record], *, width: int = 120) -> str:
    """The same table as text without colours, for logs and files.

    Args:
        records: What to show.
        width: Characters in a line.

    Returns:
        Lines of text, ending in a line break.
    """
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(render(records))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def markdown(records: Sequence[Record]) -> str:
    """The same table in Markdown.

    Args:
        records: What to show.

    Returns:
        A table and, below it, the protocol as a list.
    """
    names = headings(records)
    lines = [f"| accuracy, % | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    lines += [f"| {title} | {' | '.join(values)} |" for title, values in rows(records)]
    for record in records:
        if beyond.corrupted(record) is not None:
            lines += ["", beyond.markdown(record).rstrip()]
    notes = dict.fromkeys(note for record in records for note in beyond.notes(record))
    return "\n".join([*lines, "", *(f"- {line}" for line in (*caption(records), *notes))]) + "\n"
