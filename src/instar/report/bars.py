"""Evaluations as bars: what is left under each attack, and how far the usual attack overstates it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from instar.errors import UserError
from instar.evaluate.record import Record
from instar.evaluate.sanity import Finding
from instar.report.stored import read
from instar.report.style import GREY, INK, PALE, RUNS, WIDTH, Sheet, colours, lighter, percent_axis, styled
from instar.report.wording import grouped, percent

_GAPS = {"pgd_minus_autoattack": "PGD − AutoAttack", "pgd_minus_margin": "PGD − margin PGD"}
"""The checks that compare PGD on cross-entropy with a stronger attack, the one that says more first."""
_Z = NormalDist().inv_cdf(0.975)


@styled
def evaluation_bars(
    records: Sequence[Record], *, labels: Sequence[str] | None = None, tones: Mapping[str, str] | None = None
) -> Figure:
    """Accuracy under each attack with Wilson's 95 % intervals, checkpoints and runs side by side.

    A second panel shows by how much PGD on cross-entropy overstates robustness: its accuracy minus AutoAttack's (margin
    PGD's where AutoAttack was not run) on the same images, with the 95 % interval of the paired difference.

    Args:
        records: Evaluations in one threat model on the same images. Checkpoints of one model share a colour; the last
            one is pale.
        labels: Name of the model of each record; None takes what the record says.
        tones: Colour of each label, ``#RRGGBB``; None is `instar.report.style.colours` of them.

    Returns:
        The figure, with axes ``accuracy`` and, if any record has the gap, ``gap``. Bars carry ``<column>: <name>`` as
        their gid, whiskers and gaps ``interval <column>: <name>`` and ``gap: <name>``.

    Raises:
        UserError: No record, records of different threat models or images, or more than 7 models.
    """
    shown = list(records)
    models = _check(shown, labels)
    full = [
        f"{model} ({item.checkpoint})" if item.checkpoint in ("best", "last", "online") else model
        for model, item in zip(models, shown, strict=True)
    ]
    columns = _columns(shown)
    gaps = [_gap(item) for item in shown]
    known = [gap for gap in gaps if gap is not None]
    usual = _usual(shown, known)
    protocol = shown[0].protocol
    sheet = Sheet(
        max(3.4, 0.32 * len(shown) + 1.2),
        title=_title(shown, full, gaps),
        subtitle="Accuracy under each attack with 95 % Wilson intervals."
        + (" Right: by how much PGD on cross-entropy overstates robustness." if known else ""),
        footer=[
            f"{protocol['norm']} {protocol['eps']} · {grouped(protocol['images'])}, n = {shown[0].n:,} · seed "
            f"{protocol['seed']} · {protocol['precision']} · BatchNorm {protocol['bn_mode']} · suite "
            f"{_listed(item.suite for item in shown)} · Instar {protocol['versions']['instar']}",
            "; ".join(dict.fromkeys(f"{item.checkpoint}: {item.protocol['checkpoint']['rule']}" for item in shown))
            + ". Robust: right on the clean image and on every inspected iterate."
            + (" Gap: paired on the same images, 95 % interval." if known else "")
            + ("" if usual is None else f" Grey: up to {100 * usual:.1f} points is usual ({known[0].source})."),
        ],
        right=0.3,
    )
    widths = (max(2.0, 0.55 * len(columns)), 1) if known else (1,)
    grid = sheet.grid(1, len(widths), width_ratios=widths, wspace=0.42)
    looks = _looks(models, shown, tones)
    _bars(sheet.figure.add_subplot(grid[0], label="accuracy"), shown, full, columns, looks)
    if known:
        rows = [(name, gap, look) for name, gap, look in zip(full, gaps, looks, strict=True) if gap is not None]
        _dots(sheet.figure.add_subplot(grid[1], label="gap"), rows, usual=usual)
    return sheet.figure


def _check(records: Sequence[Record], labels: Sequence[str] | None) -> list[str]:
    """The models' names, if the records can stand in one picture."""
    if not records:
        raise UserError("there is no evaluation to draw: instar evaluate makes one")
    if len({(r.protocol["norm"], r.protocol["eps"], r.protocol["images_sha256"]) for r in records}) > 1:
        found = dict.fromkeys(f"{r.protocol['norm']} {r.protocol['eps']}, {r.protocol['images']}" for r in records)
        raise UserError(f"evaluations in one picture must share norm, eps and images; got {' and '.join(found)}")
    models = [_model(record) for record in records] if labels is None else list(labels)
    if len(models) != len(records):
        raise UserError(f"labels must name each of the {len(records)} evaluations; got {len(models)}")
    if len(set(models)) > len(RUNS):
        raise UserError(f"a picture can tell {len(RUNS)} models apart at most; got {len(set(models))}")
    return models


def _model(record: Record) -> str:
    """The method of the run that was evaluated, or the name of the weights."""
    target = Path(record.target)
    try:
        return read(target).title if target.is_dir() else target.stem or record.target
    except UserError:
        return target.name


def _listed(words: Any) -> str:
    return " / ".join(dict.fromkeys(words))


def _columns(records: Sequence[Record]) -> dict[str, str]:
    """Name and title of each group of bars: clean, the attacks in order, the worst case where AutoAttack is missing.

    Diagnoses are no accuracies, and the radii of a sweep are points of a curve.
    """
    found: dict[str, str] = {}
    for record in records:
        left_out = {"worst_case", *record.diagnoses}
        left_out |= {name for name in record.scores if name.startswith("eps_") and record.suite != "eps_sweep"}
        found |= {name: score.title for name, score in record.scores.items() if name not in left_out}
    if "autoattack" not in found:
        found["worst_case"] = records[0].scores["worst_case"].title
    return found


def _gap(record: Record) -> Finding | None:
    """The finding about PGD against the strongest other attack that was run."""
    by_check = {finding.check: finding for finding in record.findings}
    return next((by_check[check] for check in _GAPS if check in by_check), None)


def _usual(records: Sequence[Record], gaps: Sequence[Finding]) -> float | None:
    """The gap that sound models show, where it is known: the thresholds were taken from CIFAR-10, Linf 8/255."""
    normal = {gap.normal for gap in gaps}
    setting = {(r.protocol["data"]["name"], r.protocol["norm"], r.protocol["eps"]) for r in records}
    return normal.pop() if len(normal) == 1 and setting == {("cifar10", "Linf", "8/255")} else None


def _title(records: Sequence[Record], full: Sequence[str], gaps: Sequence[Finding | None]) -> str:
    """The most robust, and the widest gap if it is no chance."""
    standing = [record.scores.get("autoattack", record.scores["worst_case"]) for record in records]
    first = max(range(len(records)), key=lambda k: standing[k].accuracy)
    attack = "AutoAttack" if "autoattack" in records[first].scores else "the strongest attack"
    title = f"{full[first]} keeps {percent(standing[first].accuracy)} under {attack}"
    sure = {k: gap for k, gap in enumerate(gaps) if gap is not None and gap.value > _Z * (gap.error or 0.0)}
    if not sure:
        return title
    widest = max(sure, key=lambda k: sure[k].value)
    whose = "this" if len(records) == 1 else full[widest]
    points = f"{100 * sure[widest].value:.1f}\N{NO-BREAK SPACE}points"
    return f"{title}; PGD on cross-entropy overstates {whose} by {points}"


def _looks(models: Sequence[str], records: Sequence[Record], tones: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Face and edge of each record's bars: a colour for the model, pale for the last of several checkpoints."""
    order = list(dict.fromkeys(models))
    tones = dict(zip(order, colours(order), strict=True)) if tones is None else tones
    looks = []
    for model, record in zip(models, records, strict=True):
        colour = tones[model]
        pale = record.checkpoint in ("last", "online") and models.count(model) > 1
        looks.append({"edgecolor": colour, "facecolor": lighter(colour, 0.72) if pale else colour})
    return looks


def _bars(
    axes: Axes, records: Sequence[Record], full: Sequence[str], columns: dict[str, str], looks: list[dict[str, Any]]
) -> None:
    width = 0.84 / len(records)
    # Points that a bar is wide. A number of two digits takes 1.35 times the size of its font, with a decimal 2.4 times.
    room = 0.88 * width * 72 * WIDTH * axes.get_position().width / (len(columns) + 0.1)
    digits = 1 if room > 2.4 * 6.5 else 0
    size = min(8.0, room / (2.4 if digits else 1.35))
    for k, (record, name, look) in enumerate(zip(records, full, looks, strict=True)):
        for group, column in enumerate(columns):
            score = record.scores.get(column)
            if score is None:
                continue
            x = group + (k - (len(records) - 1) / 2) * width
            low, high = score.interval
            axes.bar(x, score.accuracy, width=0.88 * width, linewidth=1.1, gid=f"{column}: {name}", **look)
            axes.plot(
                [x, x], [low, high], color=INK, linewidth=1, solid_capstyle="butt", gid=f"interval {column}: {name}"
            )
            if size < 5:
                continue
            # At the foot, where no whisker crosses it; a bar that is too low for that has it above.
            inside = low > 0.06
            axes.annotate(
                f"{100 * score.accuracy:.{digits}f}", (x, 0 if inside else high), xytext=(0, 4 if inside else 2),
                textcoords="offset points", ha="center", fontsize=size, gid=f"value {column}: {name}",
                color="white" if inside and look["facecolor"] == look["edgecolor"] else INK,
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [textwrap.fill(title, 12) for title in columns.values()])
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    percent_axis(axes)
    axes.set_title("Accuracy under attack")
    if len(records) > 1:
        axes.legend(
            handles=[Patch(label=name, linewidth=1.1, **look) for name, look in zip(full, looks, strict=True)],
            loc="upper right", ncols=2 if len(records) > 3 else 1, handlelength=1.1, columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip


def _dots(axes: Axes, rows: Sequence[tuple[str, Finding, dict[str, Any]]], *, usual: float | None) -> None:
    right = 1.0
    for y, (name, gap, look) in zip(reversed(range(len(rows))), rows, strict=True):
        value, reach = 100 * gap.value, 100 * _Z * (gap.error or 0.0)
        axes.plot(
            [value - reach, value + reach], [y, y], color=look["edgecolor"], linewidth=1.8, solid_capstyle="butt",
            gid=f"interval gap: {name}",
        )  # fmt: skip
        axes.plot(
            [value], [y], "o", markersize=9, color=look["facecolor"], markeredgecolor=look["edgecolor"],
            gid=f"gap: {name}",
        )  # fmt: skip
        axes.annotate(
            f"{value:+.1f}".replace("-", "−"),
            (value, y),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=INK,
        )
        right = max(right, value + reach)
    axes.axvline(0, color=GREY, linewidth=1)
    if usual is not None:
        right = max(right, 100 * usual)
        axes.axvspan(0, 100 * usual, color=PALE, alpha=0.6, linewidth=0, zorder=0, gid="usual")
        axes.annotate(
            "usual", (100 * usual, -0.7), xytext=(3, 3), textcoords="offset points", ha="left", fontsize=7.5,
            color=GREY,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 16) for name, *_ in reversed(rows)])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(-0.7, len(rows) - 0.2)
    axes.set_xlim(right=1.12 * right)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("points")
    axes.set_title(_listed(_GAPS[gap.check] for _, gap, _ in rows))
