"""Pictures of hard class pairs: what each class is taken for, whether similarity says so, and before and after."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import all_of, extremes, shown_as
from instar.analyse.sources import sources
from instar.report.style import EASY, HARD, INK, PALE, RUNS, Sheet, lighter, percent_axis, styled
from instar.report.wording import minus, percent

_HEAT = LinearSegmentedColormap.from_list("errors", ["#FFFFFF", "#F7DCC4", HARD])
_MOST_NAMED = 20
"""With more classes a matrix has no room for names and numbers."""
_MOST_PAIRS = 12
_MOST_MEMBERS = len(RUNS)
_LABELLED = 5


def draw(found: Found) -> dict[str, Figure]:
    """Pictures of one checkpoint.

    Args:
        found: A result of `instar.analyse.pairs.measure`.

    Returns:
        ``confusion``, and ``similarity`` where the network has a final linear layer.
    """
    pictures = {"confusion": _confusion(found)}
    if any(np.isfinite(found.tables["pairs"][name]).any() for name in ("weights", "features")):
        pictures["similarity"] = _similarity(found)
    return pictures


def draw_compared(found: Found) -> dict[str, Figure]:
    """Pictures of several checkpoints.

    Args:
        found: A result of `instar.analyse.pairs.compare`.

    Returns:
        ``hardest_pairs``.
    """
    return {"hardest_pairs": _hardest_pairs(found)}


def _names(found: Found) -> list[str]:
    return [str(name) for name in found.protocol["class_names"]]


@styled
def _confusion(found: Found) -> Figure:
    named, figures = _names(found), found.figures
    count = len(named)
    pairs = found.tables["pairs"]
    attacked = pairs["attacked"].reshape(count, count)
    true, predicted = int(figures["hardest_true"]), int(figures["hardest_predicted"])
    sheet = Sheet(
        3.9,
        title=f"{found.label}: under attack, {percent(figures['hardest_share'])} of the images of {named[true]} are "
        f"taken for {named[predicted]}",
        subtitle="An untargeted attack may end in any class. Left: what the images of each class are taken for under "
        "attack, in percent; the diagonal is what withstands. Right: the commonest error of each class under attack "
        "(with its 95 % Wilson interval) and the share of the same error without attack.",
        footer=[
            *sources(found),
            f"Of the wrong predictions, {percent(figures['runner_up_share'])} are the class that came second (or "
            "first, "
            "wrongly) on the clean image. Mean entropy of the errors of a class: "
            f"{figures['mean_error_entropy']:.2f} nats of at most {figures['largest_error_entropy']:.2f}.",
        ],
        left=0.85,
        bottom=1.0,
    )
    grid = sheet.grid(1, 2, width_ratios=(1.25, 1), wspace=0.5)
    _matrix(sheet.figure.add_subplot(grid[0], label="matrix"), attacked, named)
    _commonest(sheet.figure.add_subplot(grid[1], label="commonest"), found.tables["classes"], pairs, named)
    return sheet.figure


def _matrix(axes: Axes, shares: np.ndarray, named: list[str]) -> None:
    count = len(named)
    wrong = shares.copy()
    np.fill_diagonal(wrong, np.nan)
    highest = max(float(np.nanmax(wrong, initial=0.0)), 1e-6)
    axes.imshow(wrong, cmap=_HEAT, vmin=0, vmax=highest, aspect="auto")
    for k in range(count):
        axes.add_patch(_square(k))
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("Taken for, under attack, %")
    axes.set_ylabel("true class")
    axes.tick_params(length=0)
    if count > _MOST_NAMED:
        return
    axes.set_xticks(range(count), named, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(count), named, fontsize=8)
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share) and share >= 0.005:
            weight = "bold" if row == column or share == np.nanmax(wrong[row]) else "normal"
            axes.text(
                column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, fontweight=weight,
                color="white" if row != column and share > 0.75 * highest else INK,
            )  # fmt: skip


def _square(k: int) -> Rectangle:
    return Rectangle((k - 0.5, k - 0.5), 1, 1, facecolor=PALE, edgecolor="none")


def _commonest(axes: Axes, classes: Table, pairs: Table, named: list[str]) -> None:
    count = len(named)
    clean = pairs["clean"].reshape(count, count)
    known = np.flatnonzero(classes["n"] > 0)
    order = known[np.argsort(-classes["top_wrong_share"][known], kind="stable")][:_MOST_PAIRS]
    y = np.arange(len(order))[::-1]
    for place, k in zip(y, order, strict=True):
        top, share = int(classes["top_wrong"][k]), float(classes["top_wrong_share"][k])
        axes.plot([clean[k, top], share], [place, place], color=PALE, linewidth=3, zorder=1)
        axes.plot(
            [classes["top_wrong_low"][k], classes["top_wrong_high"][k]], [place, place], color=HARD, linewidth=1.2
        )
        axes.plot(clean[k, top], place, "o", color=EASY, markersize=5)
        axes.plot(share, place, "o", color=HARD, markersize=6.5, gid=f"attacked: {named[k]}")
    axes.set_yticks(y, [f"{named[k]} → {named[int(classes['top_wrong'][k])]}" for k in order], fontsize=8)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    percent_axis(axes, which="x", highest=1.08 * float(np.nanmax(classes["top_wrong_high"][order])))
    axes.set_title("Commonest error of each class")
    axes.set_xlabel("share of the images of the class")
    axes.legend(
        handles=[
            Line2D([], [], color=colour, marker="o", linestyle="none", label=label)
            for colour, label in ((HARD, "under attack"), (EASY, "without attack"))
        ],
        fontsize=8, loc="lower right", borderaxespad=0.2,
    )  # fmt: skip


@styled
def _similarity(found: Found) -> Figure:
    named, figures, pairs = _names(found), found.figures, found.tables["pairs"]
    told = figures["spearman_features"] if np.isfinite(figures["spearman_features"]) else figures["spearman_weights"]
    how = "is where the attack sends images" if told > 0.5 else "says little about where the attack sends images"
    sheet = Sheet(
        3.3,
        title=f"{found.label}: what is similar to a class {how} (mean rank correlation {told:.2f})",
        subtitle="Each dot is an ordered pair of classes, true → predicted. Across: how similar the network holds "
        "them, "
        "without any attack. Up: the share of the images of the true class that are taken for the other under attack.",
        footer=[
            *sources(found),
            "Rank correlation: Spearman's within the row of each class, averaged over classes; Kendall's τ-b beside "
            "it.",
        ],
        left=0.55,
    )
    grid = sheet.grid(1, 2, wspace=0.16)
    apart = pairs["true"] != pairs["predicted"]
    shares = pairs["attacked"][apart]
    titles = {
        "features": "Mean cosine of clean features with the other class",
        "weights": "Cosine of the rows of the last layer",
    }
    hardest = np.flatnonzero(apart)[np.argsort(-np.nan_to_num(shares))[:_LABELLED]]
    for place, (name, title) in zip(grid, titles.items(), strict=True):
        axes = sheet.figure.add_subplot(place, label=name)
        axes.scatter(
            pairs[name][apart], shares, s=18 if len(shares) < 500 else 4, color=lighter(EASY, 0.2), linewidths=0
        )
        for k in hardest:
            axes.plot(pairs[name][k], pairs["attacked"][k], "o", color=HARD, markersize=5)
        _named_dots(axes, pairs, hardest, name, named)
        percent_axis(axes, highest=1.12 * float(np.nanmax(shares)))
        axes.set_xlabel("cosine similarity")
        axes.set_title(title, fontsize=9.5)
        axes.text(
            0.03, 0.96, minus(f"ρ = {figures[f'spearman_{name}']:.2f}\nτ = {figures[f'kendall_{name}']:.2f}"), va="top",
            transform=axes.transAxes, fontsize=9, linespacing=1.4,
        )  # fmt: skip
    sheet.figure.axes[0].set_ylabel("taken for it under attack")
    return sheet.figure


def _named_dots(axes: Axes, pairs: Table, chosen: np.ndarray, name: str, named: list[str]) -> None:
    """Names beside dots, on the side where there is room."""
    middle = np.nanmean([np.nanmin(pairs[name]), np.nanmax(pairs[name][pairs["true"] != pairs["predicted"]])])
    step = 0.05 * float(np.nanmax(pairs["attacked"][chosen], initial=1e-6))
    height = np.inf
    for k in chosen:  # the highest first: each name lies below the one before it
        right = pairs[name][k] < middle
        height = min(float(pairs["attacked"][k]), height - step)
        axes.annotate(
            f"{named[int(pairs['true'][k])]} → {named[int(pairs['predicted'][k])]}",
            (pairs[name][k], height), xytext=(6 if right else -6, 0), textcoords="offset points",
            ha="left" if right else "right", va="center", fontsize=7.5, color=INK,
        )  # fmt: skip


@styled
def _hardest_pairs(found: Found) -> Figure:
    named, members, pairs = _names(found), found.tables["members"], found.tables["pairs"]
    labels, tones, shared = shown_as(found, range(min(_MOST_MEMBERS, len(members["label"]))))
    shares = np.stack([pairs[f"attacked_{k}"] for k in range(len(labels))])
    known = (pairs["true"] != pairs["predicted"]) & np.isfinite(shares).any(0)
    highest = np.where(known, np.nan_to_num(shares).max(0), -1.0)
    order = np.argsort(-highest, kind="stable")[: min(_MOST_PAIRS, int(known.sum()))]
    first = int(order[0])
    pair = f"{named[int(pairs['true'][first])]} → {named[int(pairs['predicted'][first])]}"
    low, high = extremes(shares[:, first])
    each = max(int(one.get("n", 0)) for one in found.protocol.get("members") or [{}]) / max(len(named), 1)
    chance = 100 * 1.96 * float(np.sqrt(max(highest[first] * (1 - highest[first]), 0.0) / max(each, 1.0)))
    sheet = Sheet(
        max(3.4, 0.36 * len(order) + 0.4),
        title=f"{pair} under attack: {percent(shares[high, first])} for {labels[high]}, {percent(shares[low, first])} "
        f"for {labels[low]}",
        subtitle="Left: how many images of a class (before the arrow) are taken for another (behind it) under attack; "
        "the pairs that are mistaken most"
        + (
            f". Each class has about {each:.0f} images, so that chance alone moves a dot by ±{chance:.0f} points"
            * (each >= 1)
        )
        + ". Right: robust accuracy under this attack, and the share of a class's errors that goes to one class alone, "
        "averaged over classes.",
        footer=[*sources(found), *all_of(shared)],
        left=1.2,
    )
    grid = sheet.grid(1, 2, width_ratios=(2.3, 1), wspace=0.34)
    axes = sheet.figure.add_subplot(grid[0], label="pairs")
    y = np.arange(len(order))[::-1]
    # Each member has its own height within a row: equal shares would hide one another.
    beside = np.linspace(0.27, -0.27, len(labels)) if len(labels) > 1 else np.zeros(1)
    for place, k in zip(y, order, strict=True):
        ends = np.nanmin(shares[:, k]), np.nanmax(shares[:, k])
        axes.barh(place, ends[1] - ends[0], left=ends[0], height=0.76, color=lighter(PALE, 0.45), linewidth=0, zorder=1)
    for number, (label, tone) in enumerate(zip(labels, tones, strict=True)):
        axes.plot(
            shares[number, order], y + beside[number], "o", color=tone, markersize=6, label=label,
            gid=f"pairs: {label}", markeredgewidth=0,
        )  # fmt: skip
    axes.set_yticks(y, [f"{named[int(pairs['true'][k])]} → {named[int(pairs['predicted'][k])]}" for k in order])
    axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    percent_axis(axes, which="x", highest=min(1.0, 1.06 * float(np.nanmax(shares[:, order])) + 0.005))
    axes.set_xlabel("share of the images of the true class")
    axes.set_title("Hardest pairs, true → predicted")
    axes = sheet.figure.add_subplot(grid[1], label="members")
    rows = np.arange(len(labels))[::-1]
    for row, (number, tone) in zip(rows, enumerate(tones), strict=True):
        for column, (said, offset, colour) in {
            "robust_accuracy": ("robust", 0.17, tone),
            "mean_top_wrong_of_errors": ("of the errors", -0.17, lighter(tone, 0.6)),
        }.items():
            value = float(members[column][number])
            axes.barh(row + offset, value, height=0.3, color=colour)
            axes.annotate(
                f"{percent(value)} {said}", (value, row + offset), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=8, color=INK,
            )  # fmt: skip
    axes.set_yticks(rows, labels)
    axes.tick_params(axis="y", labelsize=9, labelcolor=INK)
    axes.set_ylim(min(-0.7, len(labels) - 5.3), len(labels) - 0.3)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    percent_axis(axes, which="x", highest=1.0)
    axes.set_xlim(
        0, 1.9 * float(max(np.nanmax(members["robust_accuracy"]), np.nanmax(members["mean_top_wrong_of_errors"])))
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
    axes.set_title("Robust; commonest error")
    return sheet.figure
