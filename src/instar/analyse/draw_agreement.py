"""Pictures of agreement: between measures of difficulty, between runs, and who wins which images."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from instar.analyse.analysis import Found, Table
from instar.analyse.sources import sources
from instar.report.distributions import TOP
from instar.report.style import EASY, GREY, HARD, INK, PALE, RUNS, Sheet, lighter, percent_axis, styled
from instar.report.wording import percent

_BOTH = LinearSegmentedColormap.from_list("correlation", [HARD, "#FFFFFF", EASY])
_MOST_ROWS = 12


def draw(found: Found) -> dict[str, Figure]:
    """Pictures of one run.

    Args:
        found: A result of `instar.analyse.agreement.measure`.

    Returns:
        ``measures`` if there are at least two measures of difficulty, else nothing.
    """
    rows = found.tables.get("correlations", {})
    return {"measures": _measures(found)} if len(rows.get("a", ())) else {}


def draw_compared(found: Found) -> dict[str, Figure]:
    """Pictures of several runs.

    Args:
        found: A result of `instar.analyse.agreement.compare`.

    Returns:
        ``stability`` and ``wins``, as far as the runs share training instances and evaluated images.
    """
    pictures = {}
    if "stability" in found.tables:
        pictures["stability"] = _stability(found)
    if "wins" in found.tables:
        pictures["wins"] = _wins(found)
    return pictures


@styled
def _measures(found: Found) -> Figure:
    rows = found.tables["correlations"]
    names = list(dict.fromkeys([*rows["a"].tolist(), *rows["b"].tolist()]))
    matrix = np.eye(len(names))
    for a, b, value in zip(rows["a"], rows["b"], rows["spearman"], strict=True):
        i, j = names.index(str(a)), names.index(str(b))
        matrix[i, j] = matrix[j, i] = value
    known = np.isfinite(rows["spearman"])
    least = np.flatnonzero(known)[np.argmin(rows["spearman"][known])] if known.any() else 0
    sheet = Sheet(
        0.4 * len(names) + 0.6,
        title=f"{found.label}: measures of difficulty agree with a mean rank correlation of "
        f"{found.figures['mean_spearman']:.2f}; {rows['a'][least]} and {rows['b'][least]} least "
        f"({rows['spearman'][least]:.2f})",
        subtitle="Spearman's rank correlation between measures of how hard a training image is, each turned so that "
        "higher "
        "is harder.",
        footer=[
            *sources(found),
            f"n = {int(rows['n'].min()):,} to {int(rows['n'].max()):,} images that have both measures of a pair. "
            "Training "
            "loss and κ are of the last epoch, with augmentation; the others are of the whole training or of stored "
            "analyses.",
        ],
        left=1.3,
        right=1.2,
        bottom=1.05,
    )
    axes = sheet.figure.add_subplot(sheet.grid(1, 1)[0], label="matrix")
    shown = np.where(np.tri(len(names), k=-1, dtype=bool), matrix, np.nan)[1:, :-1]
    axes.imshow(shown, cmap=_BOTH, vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(shown):
        if np.isfinite(value):
            axes.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color="white" if abs(value) > 0.7 else INK
            )
    axes.set_xticks(range(len(names) - 1), names[:-1], rotation=30, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(names) - 1), names[1:], fontsize=8.5)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return sheet.figure


def _pairs_of(rows: Table) -> list[tuple[str, str]]:
    return list(dict.fromkeys(zip(rows["a"].tolist(), rows["b"].tolist(), strict=True)))


@styled
def _stability(found: Found) -> Figure:
    rows = found.tables["stability"]
    pairs = _pairs_of(rows)[: len(RUNS)]
    names = list(dict.fromkeys(rows["measure"].tolist()))
    sheet = Sheet(
        max(2.4, 0.34 * len(names) + 1.0),
        title=f"Runs agree on which training images are hard: mean rank correlation "
        f"{found.figures['mean_stability']:.2f}, "
        f"hardest tenths share {percent(found.figures['mean_overlap'])}",
        subtitle="The same measure of difficulty in two runs. Right: of the hardest tenth of the images in one run, "
        "the "
        "share that is among the hardest tenth of the other; the dashed line is what chance gives.",
        footer=[
            *sources(found),
            "Runs of one seed see the same augmented images, which raises the agreement of training loss and κ.",
        ],
        left=1.25,
    )
    grid = sheet.grid(1, 2, wspace=0.1)
    y = np.arange(len(names))[::-1]
    for place, (column, title) in zip(
        grid, {"spearman": "Rank correlation", "overlap": "Hardest tenths in common"}.items(), strict=True
    ):
        axes = sheet.figure.add_subplot(place, label=column)
        for number, (a, b) in enumerate(pairs):
            mine = (rows["a"] == a) & (rows["b"] == b)
            known = dict(zip(rows["measure"][mine].tolist(), rows[column][mine].tolist(), strict=True))
            axes.plot(
                [known.get(name, np.nan) for name in names], y + 0.1 * (number - (len(pairs) - 1) / 2), "o",
                color=RUNS[number], markersize=6.5, label=f"{a} and {b}",
            )  # fmt: skip
        axes.set_yticks(y, names if column == "spearman" else [""] * len(names))
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_title(title)
        if column == "overlap":
            percent_axis(axes, which="x")
            axes.axvline(TOP, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
        else:
            lowest = float(np.nanmin(rows["spearman"]))
            axes.set_xlim(min(0.0, lowest - 0.05), 1)
    sheet.figure.axes[-1].legend(fontsize=8, loc="lower right", borderaxespad=0.2)
    return sheet.figure


@styled
def _wins(found: Found) -> Figure:
    rows = found.tables["wins"]
    order = np.argsort(-(rows["only_a"] + rows["only_b"]), kind="stable")[:_MOST_ROWS]
    first = int(order[0])
    sheet = Sheet(
        0.62 * len(order) + 0.9,
        title=f"{rows['a'][first]} alone withstands {int(rows['only_a'][first]):,} of {int(rows['n'][first]):,} "
        "images, "
        f"{rows['b'][first]} alone {int(rows['only_b'][first]):,}",
        subtitle="The same test images under the same attacks: withstood by both runs, by one of them alone, or by "
        "neither. "
        "p: McNemar's exact test of whether the two win equally many.",
        footer=[*sources(found, measured=False), "Robust: no attack of the suite breaks the image."],
        left=0.2,
    )
    axes = sheet.figure.add_subplot(sheet.grid(1, 1)[0], label="wins")
    _bars(axes, rows, order)
    return sheet.figure


def _bars(axes: Axes, rows: Table, order: np.ndarray) -> None:
    y = 1.5 * np.arange(len(order))[::-1]
    parts = (
        ("both", lighter(GREY, 0.35), "both"), ("only_a", EASY, "only the first"), ("only_b", HARD, "only the second"),
        ("neither", PALE, "neither"),
    )  # fmt: skip
    for place, k in zip(y, order, strict=True):
        left, total = 0.0, float(rows["n"][k])
        for name, colour, _ in parts:
            share = rows[name][k] / total
            axes.barh(place, share, left=left, height=0.7, color=colour, gid=f"{name}: {k}")
            if share > 0.025:
                axes.text(
                    left + share / 2, place, f"{int(rows[name][k]):,}", ha="center", va="center", fontsize=8,
                    color="white" if name.startswith("only") else INK,
                )  # fmt: skip
            left += share
        p = float(rows["p"][k])
        chance = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
        axes.text(
            0, place + 0.5, f"{rows['a'][k]} and {rows['b'][k]} ({rows['evaluation'][k]}): "
            f"{int(rows['only_a'][k]):,} against {int(rows['only_b'][k]):,}, {chance}", va="bottom", fontsize=8.5,
        )  # fmt: skip
    axes.set_ylim(-0.6, y[0] + 1.1)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    percent_axis(axes, which="x")
    axes.legend(
        handles=[Patch(color=colour, label=label) for _, colour, label in parts], fontsize=8, ncol=4,
        loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, handlelength=1,
    )  # fmt: skip
