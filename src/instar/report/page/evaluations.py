"""Evaluations as tables with intervals, findings and paired differences."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from instar.compare.render import signed
from instar.errors import UserError
from instar.evaluate.mechanism import CRITERIA, quintiles
from instar.evaluate.record import Record
from instar.report.bars import evaluation_bars
from instar.report.page.numbers import Numbers
from instar.report.page.summary import interval, preferred, shared_protocols
from instar.report.page.views import Cell, EvaluationView, Picture, picture
from instar.report.pictures import mechanism_plan
from instar.report.wording import grouped, minuses

Members = Sequence[tuple[str, Record]]


def evaluation_view(key: str, members: Members, colours: Mapping[str, str]) -> EvaluationView:
    """Evaluations of one suite and threat model on the same images, side by side.

    Args:
        key: Name of the group, for example ``"evaluation-standard"``.
        members: Names of runs and their records.
        colours: Of each run, ``#RRGGBB``.

    Returns:
        The view.
    """
    records = [record for _, record in members]
    first = records[0].protocol
    names: list[str] = []
    for record in records:
        hidden = {"worst_case", *record.diagnoses}
        names += [name for name in record.scores if name not in {*names, *hidden}]
    titles = {name: score.title for record in records for name, score in record.scores.items()}
    rows = [(titles[name], [_cell(record, name) for record in records]) for name in [*names, "worst_case"]]
    several = len({name for name, _ in members}) > 1
    differences, note = _differences(members) if several else ((), "")
    numbers = _numbers(key, members)
    shown: Picture | None = None
    mechanism: Picture | None = None
    try:
        figure = evaluation_bars(records, labels=[name for name, _ in members], tones=colours)
        shown = picture(figure, key=key, numbers=[numbers])
    except UserError as reason:
        warnings.warn(f"no bars of {key}: {reason}", stacklevel=2)
    for draw in mechanism_plan(members):
        mechanism = picture(draw(), key=f"mechanism-{key}", numbers=[_fifths(f"mechanism-{key}", members)])
    return EvaluationView(
        key=key,
        title=f"Suite {records[0].suite}, {first['norm']} {first['eps']}, {grouped(first['images'])}",
        heads=[(name, record.checkpoint, colours[name]) for name, record in members],
        rows=rows,
        caption=_caption(members),
        findings=[
            (
                f"{name}, {record.checkpoint}",
                [(f.verdict, minuses(f.text)) for f in record.findings],
            )
            for name, record in members
            if record.findings
        ],
        differences=differences,
        differences_note=note,
        differences_grid=differences_by_run(differences),
        picture=shown,
        mechanism=mechanism,
        numbers=numbers,
    )


def _fifths(key: str, members: Members) -> Numbers:
    """Fifths of the images by every criterion."""
    rows = [
        (name, record.checkpoint, criterion, place, fifth.low, fifth.high, fifth.count, fifth.clean, fifth.robust)
        for name, record in members
        if record.has_mechanism
        for criterion in CRITERIA
        for place, fifth in enumerate(quintiles(record.instances, criterion), start=1)
    ]
    heads = ("run", "checkpoint", "criterion", "fifth", "from", "to", "images", "clean", "robust")
    return Numbers(key, dict(zip(heads, map(list, zip(*rows, strict=True)), strict=True)))


def _caption(members: Members) -> list[str]:
    """The protocol of each record, said once where several share it."""
    lines = shared_protocols(members)
    rule = str(members[0][1].protocol.get("robust_if", "no inspected iterate of the attack is misclassified"))
    return [*lines, f"Robust if {rule}. Percent with 95 % Wilson intervals."]


def _cell(record: Record, name: str) -> Cell:
    score = record.scores.get(name)
    if score is None:
        return Cell("–")
    quoted = "autoattack" if "autoattack" in record.scores else "worst_case"
    word = record.verdict.word
    mark = word if name == quoted and word != "sound" else ""
    return Cell(f"{100 * score.accuracy:.1f}", interval(score), score.accuracy, mark)


def _differences(members: Members) -> tuple[Sequence[tuple[str, ...]], str]:
    """Every run against the first, image by image; empty with a reason where that cannot be."""
    compare = partial(_compare, members)
    try:
        made = compare()
    except UserError as reason:
        return (), str(reason)
    except (KeyError, TypeError, ValueError) as error:  # a record of another version, or of somebody else
        return (), f"No differences: the records lack {error}."
    titles = {column.name: column.title for column in made.columns}
    rows = [
        (
            item.arm,
            item.reference,
            titles[item.column],
            signed(item.value),
            f"{signed(item.low)} to {signed(item.high)}",
            "< 0.001" if item.p_holm < 0.001 else f"{item.p_holm:.3f}",
            f"{len(item.won)} / {len(item.lost)}",
        )
        for item in made.differences
    ]
    note = (
        f"Points of accuracy on the same {made.count:,} images, with paired 95 % intervals; p is two-sided, corrected "
        "after Holm within an attack. Won and lost: images that only the one, or only the other, gets right. "
        + " ".join(made.notes)
    )
    return rows, note.strip()


def differences_by_run(rows: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, Sequence[tuple[str, ...]]]]:
    """Differences by run, the attacks beside one another: for each run its cells, in the order of the attacks.

    Example:
        >>> rows = [("A", "B", attack, "+1.0", "", "1", "") for attack in ("clean", "FGSM")]
        >>> [(arm, len(cells)) for arm, cells in differences_by_run(rows)]
        [('A', 2)]
    """
    arms = list(dict.fromkeys(row[0] for row in rows))
    found = [(arm, [row for row in rows if row[0] == arm]) for arm in arms]
    whole = len({tuple(row[1:3] for row in cells) for _, cells in found}) == 1
    return found if whole else []


def _compare(members: Members) -> Any:
    from instar.compare import compare  # not above: it reads runs by way of this package

    chosen: dict[str, Record] = {}
    for name in dict.fromkeys(name for name, _ in members):
        found = preferred([record for other, record in members if other == name])
        assert found is not None
        chosen[name] = found
    # One checkpoint for all, where all have one.
    for checkpoint in ("last", "best"):
        same = {name: record for name, record in members if record.checkpoint == checkpoint}
        chosen = same if len(same) == len(chosen) else chosen
    return compare(list(chosen.values()), names=[f"{name} ({record.checkpoint})" for name, record in chosen.items()])


def _numbers(key: str, members: Members) -> Numbers:
    rows = [
        (name, record.checkpoint, score.title, score.accuracy, *score.interval, score.correct, score.count)
        for name, record in members
        for score in record.scores.values()
    ]
    heads = ("run", "checkpoint", "attack", "accuracy", "low", "high", "correct", "images")
    return Numbers(key, dict(zip(heads, map(list, zip(*rows, strict=True)), strict=True)))
