"""GAIRAT's view of a run: how many attack iterates each training image survives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from instar.report.distributions import Survival, survival_counts
from instar.report.stored import StoredRun, read
from instar.report.style import EASY, HARD, INK, Sheet, epoch_axis, percent_axis, styled
from instar.report.wording import change_line, count_range, percent, source_line

_MOST_BANDS = 16
_MOST_SEPARATE = 40
_BETWEEN = LinearSegmentedColormap.from_list("between", ["#EFB58A", "#EEECE8", "#9CC6E0"])


@dataclass(frozen=True, eq=False)
class Band:
    """Instances that are drawn in one colour.

    Attributes:
        name: Their κ.
        share: Their share in each epoch (E,).
        colour: As ``#RRGGBB``.
    """

    name: str
    share: np.ndarray
    colour: str


@styled
def survival(run: str | Path | StoredRun) -> Figure:
    """How many iterates of the training attack each training image survives, by epoch.

    κ = number of the K inspected iterates x⁰ … x^{K−1} that are still classified correctly. Instances with κ = K are
    *guarded*, instances with κ = 0 *attackable*. Only instances trained on in the epoch count.

    Args:
        run: Run folder.

    Returns:
        The figure. Axes ``survival`` holds a stack of bars for each epoch, from κ = 0 at the bottom; axes ``last`` the
        distribution in the last epoch, with marks for the first. Where K is above 16 or changes, the values between 0
        and K are drawn in tenths of K.

    Raises:
        UserError: No instance table is stored, one is damaged, or the attack takes no step.

    Source: κ, guarded and attackable after Zhang et al. 2021 (GAIRAT), Section 3.
    """
    stored = read(run)
    found = survival_counts(stored)
    made = bands(found)
    epoch = int(found.epochs[-1]) + 1
    sheet = Sheet(
        4.2,
        title=f"{stored.title} on {stored.data}, epoch {epoch}: {percent(found.guarded[-1])} of training images "
        f"guarded, {percent(found.attackable[-1])} attackable",
        subtitle="κ counts the iterates of the training attack that are still classified correctly. Guarded: all "
        f"K = {count_range(found.steps)} of them. Attackable: none (κ = 0)." + change_line(stored, epoch),
        footer=[
            source_line([stored]),
            f"n = {count_range(found.n)} images trained on in each epoch, augmented, one attack each with the weights "
            "of that step." + ("" if found.known else " K is the largest κ seen: the stored method cannot be read."),
        ],
        right=0.1,
    )
    grid = sheet.grid(1, 2, width_ratios=(2.1, 1), wspace=0.37)
    _stack(sheet.figure.add_subplot(grid[0], label="survival"), found, made, stored)
    _last(sheet.figure.add_subplot(grid[1], label="last"), found, made)
    return sheet.figure


def bands(found: Survival) -> list[Band]:
    """The instances from attackable to guarded: a band for each κ, or for each tenth of K where K is large or changes.

    Args:
        found: Counts by κ and epoch.

    Returns:
        Bands whose shares add up to 1 in every epoch.
    """
    steps = found.steps
    constant = bool((steps == steps[0]).all())
    if constant and steps[0] <= _MOST_BANDS:
        between = [(f"{kappa}", found.shares[:, kappa]) for kappa in range(1, int(steps[0]))]
    else:
        kappa = np.arange(found.counts.shape[1])[None, :]
        inside = (kappa > 0) & (kappa < steps[:, None])
        tenth = -(-10 * kappa // steps[:, None])  # (0, 0.1], (0.1, 0.2], ... in whole numbers, which round nothing
        between = [
            (f"≤ {k / 10:.1f} K" if k < 10 else "< K", np.where(inside & (tenth == k), found.shares, 0.0).sum(1))
            for k in range(1, 11)
        ]
    shades = [to_hex(_BETWEEN(place)) for place in np.linspace(0, 1, len(between))]
    return [
        Band("0", found.attackable, HARD),
        *(Band(name, share, shade) for (name, share), shade in zip(between, shades, strict=True)),
        Band(f"{steps[0]}" if constant else "K", found.guarded, EASY),
    ]


def _stack(axes: Axes, found: Survival, made: Sequence[Band], run: StoredRun) -> None:
    x = found.epochs + 1
    height = np.zeros(len(x))
    # White hairlines separate bands and epochs while there is room; bars of many epochs join to an area.
    separate = len(x) <= _MOST_SEPARATE
    for band in made:
        axes.bar(
            x, band.share, width=0.86 if separate else 1.0, bottom=height, color=band.colour, label=f"κ = {band.name}",
            linewidth=0.5 if separate else 0, edgecolor="white" if separate else "none",
        )  # fmt: skip
        height = height + band.share
    epoch_axis(axes, int(x.max()))
    percent_axis(axes)
    axes.grid(visible=False)
    axes.set_title("Training images by κ, epoch by epoch")
    for epoch, _ in run.changes:
        if epoch < x.max():
            axes.axvline(epoch + 0.5, color=INK, linewidth=1, linestyle=(0, (1, 2)), gid=f"change: {epoch}")


def _last(axes: Axes, found: Survival, made: Sequence[Band]) -> None:
    """The last epoch as horizontal bars in the order of the stack, which makes it the stack's legend too."""
    y = np.arange(len(made))
    first = np.array([band.share[0] for band in made])
    last = np.array([band.share[-1] for band in made])
    axes.barh(y, last, height=0.82, color=[band.colour for band in made], gid="last epoch")
    several = len(found.epochs) > 1
    if several:
        mark: dict[str, Any] = {"linestyle": "", "marker": "|", "markeredgewidth": 1.6, "color": INK}
        axes.plot(first, y, markersize=11, gid="first epoch", zorder=4, **mark)
        axes.legend(
            handles=[Line2D([], [], markersize=9, label="first epoch", **mark)], loc="center right", handlelength=0.8
        )
    limit = min(1.0, 1.45 * float(max(last.max(), first.max())))
    ends = ((0, "attackable  0"), (len(made) - 1, f"guarded  {made[-1].name}"))
    for place, _ in ends:
        # The mark of the first epoch must not strike the number through, be it in the bar or beside it.
        ahead = float(first[place] - last[place]) / limit if several else 1.0
        inside = last[place] > 0.3 * limit and not -0.3 < ahead < 0
        struck = not inside and 0 < ahead < 0.3
        axes.annotate(
            percent(last[place]), (first[place] if struck else last[place], place), xytext=(-6 if inside else 6, 0),
            textcoords="offset points", ha="right" if inside else "left", va="center", fontsize=8.5, fontweight="bold",
            color="white" if inside else made[place].colour, zorder=5,
        )  # fmt: skip
    axes.set_yticks(y, [dict(ends).get(place, band.name) for place, band in enumerate(made)])
    for place, _ in ends:
        axes.get_yticklabels()[place].set(color=made[place].colour, fontweight="bold")
    axes.set_ylabel("κ", rotation=0, labelpad=-30)
    axes.set_ylim(-0.6, len(made) - 0.4)
    percent_axis(axes, which="x", highest=limit)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.set_title(f"Epoch {int(found.epochs[-1]) + 1}")
