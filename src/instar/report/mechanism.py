"""Where the robustness of a model went: accuracy by difficulty, and margins before and after an attack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from instar.errors import UserError
from instar.evaluate.mechanism import CRITERIA, Criterion, Fifth, criterion_of, histograms, quintiles
from instar.evaluate.record import Record
from instar.expression import parse
from instar.report.style import EASY, GREY, HARD, INK, Sheet, lighter, percent_axis, styled
from instar.report.wording import grouped

_SHOWN = ("logit_margin", "probability_margin")
_FORMULAS = {
    "logit_margin": "logit of the class − highest other",
    "probability_margin": "probability of the class − highest other",
}
_AXES = {
    "initial_margin": "clean probability margin",
    "attacked_margin": "attacked probability margin",
    "kappa": "κ, steps withstood",
    "vulnerability": "vulnerability, nats",
}
_SAID = {"clean": "clean", "adversarial": "attacked"}
MOST = 6
_ROW = 2.3


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
        title=f"{labels[0]} withstands the attacks on {first.robust:,} of the {first.count:,} easiest images and on "
        f"{last.robust:,} of the {last.count:,} hardest",
        subtitle="Left: accuracy of each fifth of the images by the difficulty that the training itself goes by; a "
        "method that weighs instances gives the hardest fifth most weight. Right: how far the true class leads, before "
        "and after an attack that does not stop; left of the dashed line an image is misclassified. Margins that crowd "
        "in a narrow peak beside that line mislead attacks on cross-entropy.",
        footer=[
            f"{protocol['norm']} {protocol['eps']} · {grouped(protocol['images'])}, n = {records[0].n:,} · suite "
            f"{records[0].suite} · bars: 95 % Wilson intervals",
            f"Margins and difficulty: {_attack(protocol['attacks']['mechanism']['expression'])}. Robust: under every "
            "attack of the suite.",
            f"Difficulty of {why}.",
        ],
        left=0.5,
        bottom=0.66,
    )
    grid = sheet.grid(len(records), 3, wspace=0.24, hspace=0.55, width_ratios=(1.15, 1, 1))
    for row, (record, label) in enumerate(zip(records, labels, strict=True)):
        axes = sheet.figure.add_subplot(grid[row, 0], label=f"fifths {row}")
        _fifths(axes, fifths[row], label, CRITERIA[told[row][0]], legend=row == 0)
        axes.set_title(label)
        found = histograms(record.instances)
        for column, name in enumerate(_SHOWN, start=1):
            panel = sheet.figure.add_subplot(grid[row, column], label=f"{name} {row}")
            _margins(panel, _wider(found[name], record.n), label, legend=row == 0 and column == 1)
            panel.set_title(name.replace("_", " ").capitalize())
            panel.set_xlabel(_FORMULAS[name])
    return sheet.figure


def _attack(expression: str) -> str:
    """The attack that margins were measured with, its defaults included."""
    from instar.analyse.sources import in_words  # not above: analyses draw with this package

    try:
        return in_words(parse(expression).attack)
    except (UserError, AttributeError):  # of another version
        return expression


def _range(fifth: Fifth, criterion: Criterion) -> str:
    """From the easiest to the hardest image of a fifth.

    Example:
        >>> _range(Fifth(10.0, 7.0, 5, 5, 4), CRITERIA["kappa"])
        '10–7'
        >>> _range(Fifth(0.1, -0.29, 5, 5, 4), CRITERIA["initial_margin"])
        '0.10 to −0.29'
    """
    digits = 0 if criterion.name == "kappa" else 2
    ends = [f"{end:.{digits}f}".replace("-", "−") for end in (fifth.low, fifth.high)]
    return ends[0] if ends[0] == ends[1] else "–".join(ends) if "−" not in "".join(ends) else " to ".join(ends)


def _wider(found: dict[str, list[float] | list[int]], n: int) -> dict[str, list[float] | list[int]]:
    """The histogram with bins that suit the number of images: neighbours are added up.

    Example:
        >>> counts = {"edges": [0, 1, 2, 3, 4], "clean": [1, 2, 3, 4], "adversarial": [4, 3, 2, 1]}
        >>> _wider(counts, 1)["clean"], _wider(counts, 1)["edges"], _wider(counts, 100)["clean"]
        ([3, 7], [0, 2, 4], [1, 2, 3, 4])
    """
    bins = len(found["clean"])
    together = max(k for k in range(1, bins + 1) if bins % k == 0 and k <= max(1.0, bins / (2 * n**0.5)))
    summed = {word: np.asarray(found[word]).reshape(-1, together).sum(1).tolist() for word in ("clean", "adversarial")}
    return {"edges": found["edges"][::together], **summed}


def _fifths(axes: Axes, fifths: Sequence[Fifth], label: str, criterion: Criterion, *, legend: bool) -> None:
    for place, fifth in enumerate(fifths):
        told = fifth.to_json()
        axes.bar(
            place, told["clean"], width=0.84, color=lighter(EASY, 0.78), linewidth=0, gid=f"clean {place + 1}: {label}"
        )
        axes.bar(place, told["robust"], width=0.84, color=EASY, linewidth=0, gid=f"robust {place + 1}: {label}")
        axes.plot([place, place], [told["robust_low"], told["robust_high"]], color=INK, linewidth=1)
        axes.annotate(
            f"{100 * told['robust']:.0f}", (place, told["robust_high"]), xytext=(0, 2), textcoords="offset points",
            ha="center", fontsize=8.5, fontweight="bold", color=INK,
        )  # fmt: skip
    ends = {0: "easiest\n", len(fifths) - 1: "hardest\n"}
    axes.set_xticks(
        range(len(fifths)), [ends.get(k, "\n") + _range(fifth, criterion) for k, fifth in enumerate(fifths)]
    )
    axes.tick_params(axis="x", length=0, labelcolor=INK, labelsize=8)
    axes.set_xlabel(_AXES[criterion.name])
    percent_axis(axes, highest=1.32 if legend else 1.08)
    if legend:
        handles = [Patch(color=lighter(EASY, 0.78), label="clean"), Patch(color=EASY, label="under attack")]
        axes.legend(handles=handles, loc="upper right", ncols=2, handlelength=1, borderaxespad=0, columnspacing=1.2)


def _margins(axes: Axes, found: dict[str, list[float] | list[int]], label: str, *, legend: bool) -> None:
    edges = np.asarray(found["edges"])
    highest = 0.0
    for word, colour in (("clean", EASY), ("adversarial", HARD)):
        counts = np.asarray(found[word], dtype=np.float64)
        share = counts / max(counts.sum(), 1.0)
        highest = max(highest, float(share.max()))
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.22, linewidth=0)
        axes.stairs(share, edges, color=colour, linewidth=1.5, label=_SAID[word], gid=f"{word}: {label}")
    axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
    percent_axis(axes, highest=min(1.0, (1.32 if legend else 1.1) * highest) or 1.0)
    axes.locator_params(axis="x", nbins=5)
    if legend:
        axes.legend(loc="upper left", handlelength=1.1, borderaxespad=0, ncols=2, columnspacing=1.2)
