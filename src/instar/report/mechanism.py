"""Where the robustness of a model went: accuracy by difficulty, and margins before and after an attack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instar.errors import UserError
from instar.evaluate.mechanism import CRITERIA, QUANTITIES, Fifth, criterion_of, histograms, quintiles
from instar.evaluate.record import Record
from instar.report.style import EASY, GREY, HARD, INK, Sheet, lighter, percent_axis, styled
from instar.report.wording import percent

_SHOWN = ("logit_margin", "probability_margin")
MOST = 6
_ROW = 2.1


@styled
def mechanism_figure(records: Sequence[Record], *, labels: Sequence[str]) -> Figure:
    """Robust accuracy of each fifth of the images by difficulty, and distributions of margins, a row for each record.

    The difficulty is the one that the training itself went by (κ for GAIRAT, vulnerability for ISEAT, ...), measured on
    these images; the hardest fifth is the one that a reweighting method weighs most.

    Args:
        records: Evaluations by suites that measure it (``sanity``, ``adaptive``), at most 6.
        labels: A name for each.

    Returns:
        The figure, with axes ``fifths <row>``, ``logit_margin <row>`` and ``probability_margin <row>``. Bars carry
        ``robust <fifth>: <label>`` and ``clean <fifth>: <label>`` as their gid.

    Raises:
        UserError: No record or too many, one without these columns, or another number of labels.
    """
    if not records or len(records) > MOST or len(labels) != len(records):
        raise UserError(f"the figure takes 1 to {MOST} evaluations, each with a label; got {len(records)}")
    for record in records:
        if not record.has_mechanism:
            raise UserError(f"{record.target}, suite {record.suite}, has no margins and difficulties: run sanity")
    told = [criterion_of((record.protocol.get("training") or {}).get("method")) for record in records]
    fifths = [quintiles(record.instances, name) for record, (name, _) in zip(records, told, strict=True)]
    first, last = fifths[0][0], fifths[0][-1]
    protocol = records[0].protocol
    why = "; ".join(
        dict.fromkeys(f"{label}: {CRITERIA[n].text} ({w})" for label, (n, w) in zip(labels, told, strict=True))
    )
    sheet = Sheet(
        _ROW * len(records) + 0.75 * (len(records) - 1),
        title=f"{labels[0]} keeps {percent(first.robust / first.count)} of the easiest fifth of the images and "
        f"{percent(last.robust / last.count)} of the hardest",
        subtitle="Left: accuracy of fifths of the images, sorted by the criterion of the training; pale: clean, full: "
        "under every attack of the suite, with 95 % Wilson intervals. Right: margins before and after an attack that "
        "does not stop; below 0 is misclassified.",
        footer=[
            f"{protocol['norm']} {protocol['eps']} · {protocol['images']}, n = {records[0].n:,} · suite "
            f"{records[0].suite} · {protocol['attacks']['mechanism']['expression']}",
            f"Difficulty of {why}.",
        ],
        left=0.5,
    )
    grid = sheet.grid(len(records), 3, wspace=0.28, hspace=0.62, width_ratios=(1, 1, 1))
    for row, (record, label) in enumerate(zip(records, labels, strict=True)):
        axes = sheet.figure.add_subplot(grid[row, 0], label=f"fifths {row}")
        _fifths(axes, fifths[row], label)
        axes.set_title(label)
        found = histograms(record.instances)
        for column, name in enumerate(_SHOWN, start=1):
            panel = sheet.figure.add_subplot(grid[row, column], label=f"{name} {row}")
            _margins(panel, found[name], label, legend=row == 0 and column == 1)
            panel.set_title(f"{name.replace('_', ' ').capitalize()}, {QUANTITIES[name]}")
    return sheet.figure


def _fifths(axes: Axes, fifths: Sequence[Fifth], label: str) -> None:
    for place, fifth in enumerate(fifths):
        told = fifth.to_json()
        colour = HARD if place == len(fifths) - 1 else EASY
        for word, share, face in (("clean", told["clean"], lighter(colour, 0.75)), ("robust", told["robust"], colour)):
            axes.bar(place, share, width=0.8, color=face, linewidth=0, gid=f"{word} {place + 1}: {label}")
        axes.plot([place, place], [told["robust_low"], told["robust_high"]], color=INK, linewidth=1)
        axes.annotate(
            f"{100 * told['robust']:.0f}", (place, told["robust_high"]), xytext=(0, 2), textcoords="offset points",
            ha="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_xticks(range(len(fifths)), ["easiest", *([""] * (len(fifths) - 2)), "hardest"][-len(fifths) :])
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    percent_axis(axes, highest=1.08)


def _margins(axes: Axes, found: dict[str, list[float] | list[int]], label: str, *, legend: bool) -> None:
    edges = np.asarray(found["edges"])
    highest = 0.0
    for word, colour in (("clean", EASY), ("adversarial", HARD)):
        counts = np.asarray(found[word], dtype=np.float64)
        share = counts / max(counts.sum(), 1.0)
        highest = max(highest, float(share.max()))
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
        axes.stairs(share, edges, color=colour, linewidth=1.4, label=word, gid=f"{word}: {label}")
    axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
    percent_axis(axes, highest=min(1.0, 1.15 * highest) or 1.0)
    if legend:
        axes.legend(loc="upper left", handlelength=1.1, borderaxespad=0)
