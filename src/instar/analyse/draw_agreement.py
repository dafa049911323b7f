"""Pictures of agreement: between measures of difficulty, between runs, and who wins which images."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from instar.analyse.analysis import Found, Table
from instar.analyse.sources import sources
from instar.evaluate.intervals import holm
from instar.report.distributions import TOP
from instar.report.style import EASY, GREY, HARD, INK, PALE, Sheet, lighter, percent_axis, styled
from instar.report.wording import minus, percent

_BOTH = LinearSegmentedColormap.from_list("correlation", [HARD, "#FFFFFF", EASY])
_WON = LinearSegmentedColormap.from_list("won", ["#FFFFFF", to_hex(lighter(EASY, 0.55)), EASY])
_MOST_ROWS = 12
_FEW_PAIRS = 3
"""Up to so many pairs of runs have a colour each; more are dots of one colour, and a matrix."""
_PAIRS = ("#0072B2", "#D55E00", "#009E73")


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
    lowest = minus(f"{rows['spearman'][least]:.2f}")
    sheet = Sheet(
        0.4 * len(names) + 0.6,
        title=f"{found.label}: measures of difficulty agree with a mean rank correlation of "
        f"{found.figures['mean_spearman']:.2f}; {rows['a'][least]} and {rows['b'][least]} least "
        f"({lowest})",
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
                j,
                i,
                minus(f"{value:.2f}"),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if abs(value) > 0.7 else INK,
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
    pairs = _pairs_of(rows)
    names = [
        name
        for name in dict.fromkeys(rows["measure"].tolist())
        if np.isfinite(rows["spearman"][rows["measure"] == name]).any()
    ]
    few = len(pairs) <= _FEW_PAIRS
    sheet = Sheet(
        max(2.0, 0.36 * len(names) + 0.5 + 0.2 * few * len(pairs)),
        title=f"Runs agree on which training images are hard: mean rank correlation "
        f"{found.figures['mean_stability']:.2f}, "
        f"hardest tenths share {percent(found.figures['mean_overlap'])}",
        subtitle=("Every dot is a pair of runs" + ("" if few else f" ({len(pairs)} pairs), the bar their median"))
        + ". Left: rank correlation of one measure of difficulty in both. Right: of the hardest tenth of the images in "
        "one run, the share that is among the hardest tenth of the other; the dashed line is what chance gives.",
        footer=[
            *sources(found),
            "Runs of one seed see the same augmented images, which raises the agreement of training loss and κ.",
        ],
        left=1.55,
    )
    grid = sheet.grid(1, 2, wspace=0.1)
    y = np.arange(len(names))[::-1]
    spread = np.linspace(0.22, -0.22, len(pairs)) if len(pairs) > 1 else np.zeros(1)
    for place, (column, title) in zip(
        grid, {"spearman": "Rank correlation", "overlap": "Hardest tenths in common"}.items(), strict=True
    ):
        axes = sheet.figure.add_subplot(place, label=column)
        for number, (a, b) in enumerate(pairs):
            mine = (rows["a"] == a) & (rows["b"] == b)
            known = dict(zip(rows["measure"][mine].tolist(), rows[column][mine].tolist(), strict=True))
            axes.plot(
                [known.get(name, np.nan) for name in names], y + spread[number], "o", markersize=5.5 if few else 4.2,
                color=_PAIRS[number] if few else EASY, alpha=1.0 if few else 0.5, markeredgewidth=0,
                label=f"{a} and {b}", gid=f"{column}: {a} and {b}",
            )  # fmt: skip
        for height, name in zip(y, names, strict=True):
            middle = np.nanmedian(rows[column][rows["measure"] == name])
            if not few:
                axes.plot([middle, middle], [height - 0.32, height + 0.32], color=INK, linewidth=2, zorder=4)
        axes.set_yticks(y, names if column == "spearman" else [""] * len(names))
        axes.tick_params(axis="y", labelcolor=INK)
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
    if few:
        sheet.figure.axes[0].legend(fontsize=8, loc="lower left", borderaxespad=0.2)
    return sheet.figure


@styled
def _wins(found: Found) -> Figure:
    rows = found.tables["wins"]
    named = list(dict.fromkeys([*rows["a"].tolist(), *rows["b"].tolist()]))
    order = np.argsort(-(rows["only_a"] + rows["only_b"]), kind="stable")
    matrix = _best_covered(rows) if len(named) > _FEW_PAIRS else None
    if matrix is not None:  # of one evaluation only, so that all cells are about the same images
        order = np.array([k for k in order if str(rows["evaluation"][k]) == matrix])
    else:
        order = order[:_MOST_ROWS]
    first = int(order[0])
    a, b = ("a", "b") if rows["only_a"][first] >= rows["only_b"][first] else ("b", "a")
    n = int(rows["n"][first])
    sheet = Sheet(
        0.62 * len(order) + 0.9 if matrix is None else 0.42 * len(named) + 0.2,
        title=f"{rows[a][first]} withstands {int(rows[f'only_{a}'][first]):,} of {n:,} images that {rows[b][first]} "
        f"does not, the reverse is true of {int(rows[f'only_{b}'][first]):,}",
        subtitle="The same test images under the same attacks: withstood by both runs, by one of them alone, or by "
        "neither. p: McNemar's exact test of whether the two win equally many."
        if matrix is None
        else f"How many of {n:,} test images the network of the row withstands and that of the column does not, all "
        "attacks of the suite together; on the diagonal, all that it withstands. A star: the two differ (McNemar's "
        f"exact test, p < 0.05, corrected after Holm for {len(order)} pairs).",
        footer=[
            *sources(found, measured=False),
            "Robust: no attack of the suite breaks the image."
            + ("" if matrix is None else f" Evaluation: {matrix}. The other evaluations are in the table."),
        ],
        left=0.2 if matrix is None else 0.75,
        right=0.2 if matrix is None else 1.0,
        bottom=0.5 if matrix is None else 0.35,
    )
    axes = sheet.figure.add_subplot(sheet.grid(1, 1)[0], label="wins")
    if matrix is None:
        _bars(axes, rows, order)
    else:
        _matrix(axes, rows, order, named)
    return sheet.figure


def _best_covered(rows: Table) -> str:
    """The evaluation that most pairs of runs share; of equals the first."""
    told = [str(name) for name in rows["evaluation"]]
    return max(dict.fromkeys(told), key=told.count)


def _matrix(axes: Axes, rows: Table, order: np.ndarray, named: list[str]) -> None:
    """Images that the row wins against the column."""
    named = [name for name in named if any(name in (str(rows["a"][k]), str(rows["b"][k])) for k in order)]
    counts = np.full((len(named), len(named)), np.nan)
    surely = np.array(holm(rows["p"][order].tolist())) < 0.05
    stars = np.zeros_like(counts, dtype=bool)
    for k, sure in zip(order, surely, strict=True):
        i, j = named.index(str(rows["a"][k])), named.index(str(rows["b"][k]))
        counts[i, j], counts[j, i] = rows["only_a"][k], rows["only_b"][k]
        stars[i, j] = stars[j, i] = sure
        counts[i, i], counts[j, j] = rows["both"][k] + rows["only_a"][k], rows["both"][k] + rows["only_b"][k]
    diagonal = np.eye(len(named), dtype=bool)
    highest = float(np.nanmax(counts[~diagonal], initial=1.0))
    axes.imshow(np.where(diagonal, np.nan, counts), cmap=_WON, vmin=0, vmax=highest, aspect="auto")
    for (i, j), value in np.ndenumerate(counts):
        if np.isfinite(value):
            dark = i != j and value > 0.6 * highest
            axes.text(
                j, i, f"{int(value):,}" + ("\N{NO-BREAK SPACE}*" if stars[i, j] else ""), ha="center", va="center",
                color="white" if dark else GREY if i == j else INK, fontsize=9.5,
                fontweight="bold" if stars[i, j] else "normal",
            )  # fmt: skip
    axes.set_xticks(range(len(named)), named)
    axes.set_yticks(range(len(named)), named)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9.5)
    axes.xaxis.tick_top()
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)


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
