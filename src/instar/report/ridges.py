"""How unevenly the training loss lies on the training images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from instar.report.distributions import TOP, losses, unevenness_by_epoch
from instar.report.stored import StoredRun, read
from instar.report.style import EASY, GREY, HARD, INK, Sheet, epoch_axis, lighter, percent_axis, styled
from instar.report.wording import change_line, count_range, percent, power_of_ten, source_line

_MOST_RIDGES = 10
_MOST_MARKERS = 40
_BINS = 90
_FLOOR = 1e-6
_TALL = 0.9
_OTHERS = lighter(EASY, 0.55)


@styled
def unevenness(run: str | Path | StoredRun) -> Figure:
    """How unevenly the training loss lies on the training images, by epoch.

    Each ridge is the distribution of the per-image loss in one epoch (ten of them at most), on a logarithmic axis; the
    tenth with the highest loss is coloured. Beside it, the share of the total loss that this tenth carries: 10 % if all
    images were equal.

    Args:
        run: Run folder.

    Returns:
        The figure, with axes ``loss`` (ridges) and ``share`` (a line by epoch).

    Raises:
        UserError: No instance table is stored, or one is damaged.

    Source: after the uneven vulnerability of Li and Spratling 2023 (ISEAT).
    Deviations: the training loss stands for their vulnerability, since it is what every run stores.
    """
    stored = read(run)
    found = unevenness_by_epoch(stored)
    count = len(found.epochs)
    epoch = int(found.epochs[-1]) + 1
    before = f", {percent(found.top_share[0])} in epoch {int(found.epochs[0]) + 1}" if count > 1 else ""
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST_RIDGES)).round().astype(int))
    drawn = [losses(stored, int(found.epochs[k])) for k in chosen]
    below = sum(int((values < _FLOOR).sum()) for values in drawn)
    sheet = Sheet(
        max(2.6, 1.2 + 0.42 * len(chosen)),
        title=f"{stored.title} on {stored.data}: the hardest tenth of the training images carries "
        f"{percent(found.top_share[-1])} of the loss in epoch {epoch}{before}",
        subtitle="Distribution of the loss over training images, each epoch scaled to its own height (tick: median, "
        "diamond: mean). The loss is what the method minimises, instance weights included."
        + change_line(stored, epoch),
        footer=[
            source_line([stored]),
            f"n = {count_range(found.n)} images trained on in each epoch, augmented, with the weights of that step"
            + (f"; {below:,} values below {_FLOOR:g} are drawn there." if below else "."),
        ],
        left=0.5,
    )
    grid = sheet.grid(1, 2, width_ratios=(1.7, 1), wspace=0.2)
    _ridges(sheet.figure.add_subplot(grid[0], label="loss"), drawn, found.epochs[chosen] + 1)
    axes = sheet.figure.add_subplot(grid[1], label="share")
    x, share = found.epochs + 1, found.top_share
    axes.axhline(TOP, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate(
        "all equal", (1, TOP), xycoords=("axes fraction", "data"), xytext=(0, -3), textcoords="offset points",
        ha="right", va="top", fontsize=8, color=GREY,
    )  # fmt: skip
    axes.plot(x, share, color=HARD, marker="o" if count <= _MOST_MARKERS else None, markersize=4, gid="share")
    axes.annotate(
        percent(share[-1]), (x[-1], share[-1]), xytext=(0, 7), textcoords="offset points",
        ha="right" if count > 1 else "center", fontsize=9, fontweight="bold", color=HARD,
    )  # fmt: skip
    epoch_axis(axes, int(x.max()))
    percent_axis(axes, highest=min(1.0, 1.2 * float(np.nanmax(share, initial=0.21))))
    axes.set_title("Loss carried by the hardest tenth")
    for start, _ in stored.changes:
        if start < x.max():
            axes.axvline(start + 0.5, color=INK, linewidth=1, linestyle=(0, (1, 2)), gid=f"change: {start}")
    return sheet.figure


def _ridges(axes: Axes, drawn: Sequence[np.ndarray], epochs: np.ndarray) -> None:
    """Densities of log₁₀ loss, the first epoch on top; the area of the hardest tenth has another colour."""
    logarithms = [np.log10(np.clip(values, _FLOOR, None)) for values in drawn]
    start = min(float(values.min()) for values in logarithms)
    stop = max(max(float(values.max()) for values in logarithms), start + 0.1)
    edges = np.linspace(start, stop, _BINS + 1)
    rows = len(drawn)
    for row, (values, epoch) in enumerate(zip(logarithms, epochs, strict=True)):
        foot = rows - 1 - row
        height, split, first_hard = density(values, edges)
        height = foot + _TALL * np.minimum(height, 1.0)
        for begin, end, colour in ((0, first_hard, _OTHERS), (first_hard, len(height), HARD)):
            if begin < end:
                axes.stairs(
                    height[begin:end], 10 ** split[begin : end + 1], baseline=foot, fill=True, color=colour,
                    linewidth=0, gid=f"{'hardest' if begin else 'others'}: {epoch}",
                )  # fmt: skip
        middle, mean = max(float(np.median(drawn[row])), _FLOOR), max(float(drawn[row].mean()), _FLOOR)
        axes.plot([middle, middle], [foot, foot + 0.3], color=INK, linewidth=1.6, zorder=4, gid=f"median: {epoch}")
        axes.plot(
            [mean], [foot + 0.13], "D", markersize=4.2, color="white", markeredgecolor=INK, markeredgewidth=1, zorder=5,
            gid=f"mean: {epoch}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if stop - start < 1.5 else (1.0,), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(power_of_ten))
    room = 0.02 * (stop - start)
    axes.set_xlim(10 ** (start - room), 10 ** (stop + room))
    axes.set_ylim(-0.12, rows - 1 + _TALL + 0.1)
    axes.set_yticks(range(rows), [str(epoch) for epoch in reversed(epochs)])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.set_ylabel("epoch")
    axes.set_xlabel("training loss of an image, nats")
    axes.set_title("Distribution of the loss over images")
    axes.legend(
        handles=[Patch(color=HARD, label="hardest tenth"), Patch(color=_OTHERS, label="the others")],
        loc="upper left", borderaxespad=0, handlelength=1, fontsize=8,
    )  # fmt: skip


def density(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """A histogram as density, cut at the 90th percentile, so that exactly the highest tenth can be coloured.

    Args:
        values: (n,).
        edges: Ascending edges of the bins, which hold all values.

    Returns:
        Densities, of which the highest over the bins as given is 1; the edges, with the percentile among them; and the
        number of the first bin of the highest tenth.

    Example:
        >>> height, split, first = density(np.arange(10) / 10 + 0.05, np.linspace(0, 1, 6))
        >>> height.round(2).tolist(), first, float(split[first].round(3))
        ([1.0, 1.0, 1.0, 1.0, 1.67, 0.71], 5, 0.86)
    """
    limit = float(np.quantile(values, 1 - TOP))
    split = np.unique(np.append(edges, limit))
    counts, _ = np.histogram(values, bins=split)
    highest = (np.histogram(values, bins=edges)[0] / np.diff(edges)).max()
    return counts / np.diff(split) / highest, split, int(np.searchsorted(split, limit))
