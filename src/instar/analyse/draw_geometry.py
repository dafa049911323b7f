"""Pictures of `instar.analyse.geometry`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import all_of, extremes, shown_as
from instar.analyse.sources import sources
from instar.report.style import EASY, GREY, HARD, INK, Sheet, lighter, percent_axis, styled
from instar.report.wording import percent

_BY_KAPPA = LinearSegmentedColormap.from_list("kappa", [HARD, "#E9B98C", "#C9CCD1", "#8FBEDC", EASY])
_MOST_DOTS = 3000
_ACROSS = 7
"""Names in one row of a legend."""
_WORDS = {"friendly": "Around friendly points", "adversarial": "Around the most adversarial points"}
_WAYS = {"uphill": ("along the gradient", HARD), "random": ("along random signs", EASY)}


def draw(found: Found) -> dict[str, Figure]:
    """κ with projections of what the network makes of the images, and flatness.

    Args:
        found: Result of `instar.analyse.geometry.measure`.

    Returns:
        ``"kappa"`` (axes ``kappa``, ``features`` and ``pair``) and ``"flatness"`` (axes ``friendly`` and
        ``adversarial``).
    """
    return {"kappa": _kappa(found), "flatness": _flatness(found)}


@styled
def _kappa(found: Found) -> Figure:
    rows, figures = found.tables["instances"], found.figures
    most = int(figures["steps"])
    first, second = found.protocol["pair_names"]
    shares = found.tables["loading"]
    sheet = Sheet(
        3.6,
        title=f"{found.label}: {percent(figures['guarded'])} of the {_kind(found)} images withstand all {most} steps, "
        f"{percent(figures['attackable'])} none",
        subtitle="κ counts the iterates of PGD that are still classified correctly. Middle: what goes into the last "
        f"layer, in the two directions of largest variance ({percent(float(shares['features'].sum()))} of it). Right: "
        f"the outputs for {first} and {second}"
        + (", the pair that is told apart worst under attack" if found.protocol["pair_is_worst"] else "")
        + (f" ({percent(float(shares['pair'].sum()))})." if np.isfinite(shares["pair"]).all() else "."),
        footer=sources(found),
        right=0.1,
    )
    grid = sheet.grid(1, 3, width_ratios=(1, 1.15, 1.15), wspace=0.2)
    axes = sheet.figure.add_subplot(grid[0], label="kappa")
    _histogram(axes, found.tables["kappa"])
    every = np.unique(np.linspace(0, len(rows["x"]) - 1, min(len(rows["x"]), _MOST_DOTS)).round().astype(int))
    axes = sheet.figure.add_subplot(grid[1], label="features")
    _cloud(axes, rows["x"][every], rows["y"][every], rows["kappa"][every], most)
    axes.set_title("Features of all images")
    axes = sheet.figure.add_subplot(grid[2], label="pair")
    chosen = np.flatnonzero(np.isfinite(rows["pair_x"]))
    for label, name, marker in zip(found.protocol["pair"], (first, second), ("o", "^"), strict=True):
        part = chosen[rows["label"][chosen] == label]
        _cloud(axes, rows["pair_x"][part], rows["pair_y"][part], rows["kappa"][part], most, marker=marker, size=26)
        axes.plot([], [], marker, color=GREY, markersize=5, label=f"{name}, n = {len(part)}")
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.02), ncols=2, handlelength=0.8, columnspacing=1.0, borderaxespad=0
    )
    axes.set_title(f"Outputs for {first} and {second}")
    return sheet.figure


def _histogram(axes: Axes, table: Table) -> None:
    kappa, share = table["kappa"], table["count"] / table["count"].sum()
    most = int(kappa.max())
    axes.barh(kappa, share, height=0.82, color=[_BY_KAPPA(k / most) for k in kappa], gid="kappa")
    for end, name in ((0, "attackable"), (most, "guarded")):
        colour = _BY_KAPPA(end / most)
        axes.annotate(
            f"{name}  {percent(share[end])}", (share[end], end), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=8.5, fontweight="bold", color=colour,
        )  # fmt: skip
    percent_axis(axes, which="x", highest=2.1 * float(share.max()))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
    axes.set_yticks(kappa if most <= 20 else np.unique(np.linspace(0, most, 11).round().astype(int)))
    axes.set_ylim(-0.7, most + 0.7)
    axes.set_ylabel("κ", rotation=0, labelpad=8)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.set_title("Images by κ")


def _cloud(
    axes: Axes, x: np.ndarray, y: np.ndarray, kappa: np.ndarray, most: int, *, marker: str = "o", size: float = 12
) -> None:
    # In a fixed random order: no κ lies on top of the others.
    order = np.random.default_rng(0).permutation(len(x))
    style: dict[str, Any] = {"marker": marker, "linewidths": 0, "alpha": 0.75}
    axes.scatter(x[order], y[order], s=size, c=_BY_KAPPA(kappa[order] / most), **style)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(lighter(GREY, 0.6))


@styled
def _flatness(found: Found) -> Figure:
    table, figures = found.tables["flatness"], found.figures
    sheet = Sheet(
        3.3,
        title=f"{found.label}: half of eps along the gradient changes the loss of a typical image by "
        f"{figures['rise_friendly']:.2f} nats at its friendly point, {figures['rise_adversarial']:.2f} at its most "
        "adversarial one",
        subtitle="Change of the cross-entropy on lines through two points of the attack on every image: the first "
        "iterate that is misclassified (friendly), and the last one. Lines: means over images; bands: the middle half.",
        footer=sources(found),
        right=1.2,
    )
    grid = sheet.grid(1, 2, wspace=0.12)
    low, high = float(min(table["low"].min(), 0.0)), float(max(table["high"].max(), table["mean"].max()))
    for place, centre in enumerate(_WORDS):
        axes = sheet.figure.add_subplot(grid[place], label=centre)
        for way, (name, colour) in _WAYS.items():
            rows = (table["centre"] == centre) & (table["direction"] == way)
            at = table["distance"][rows]
            axes.fill_between(at, table["low"][rows], table["high"][rows], color=lighter(colour, 0.78), linewidth=0)
            axes.plot(at, table["mean"][rows], color=colour, label=name, gid=f"{centre}: {way}")
            if place == 1:
                axes.annotate(
                    name.replace(" the", "\nthe").replace(" random", "\nrandom"), (at[-1], table["mean"][rows][-1]),
                    xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5, fontweight="bold",
                    color=colour,
                )  # fmt: skip
        axes.plot([0], [0], "o", color=INK, markersize=5, zorder=4)
        room = 0.06 * (high - low)
        axes.set_ylim(low - room, high + room)
        axes.set_xlim(-1, 1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−eps", "−½", "0", "½", "eps"])
        if place == 1:
            axes.set_yticklabels([])
        axes.set_xlabel("distance from the point")
        slope = figures[f"slope_{centre}"]
        axes.set_title(f"{_WORDS[centre]}, mean slope {slope:.2f}")
        if place == 0:
            axes.set_ylabel("change of the loss, nats")
    return sheet.figure


def draw_compared(found: Found) -> dict[str, Figure]:
    """κ and flatness of several checkpoints.

    Args:
        found: Result of `instar.analyse.geometry.compare`.

    Returns:
        ``"geometry"``, with axes ``kappa``, ``friendly`` and ``adversarial``.
    """
    return {"geometry": _geometry(found)}


@styled
def _geometry(found: Found) -> Figure:
    members, kappa, flat = found.tables["members"], found.tables["kappa"], found.tables["flatness"]
    labels, tones, shared = shown_as(found)
    low, high = extremes(members["guarded"])
    sheet = Sheet(
        3.4,
        title=f"{labels[high]} guards {percent(members['guarded'][high])} of the images, {labels[low]} "
        f"{percent(members['guarded'][low])}",
        subtitle="Left: share of the images that are still classified correctly after so many steps of PGD (their κ "
        "is at least that; guarded: all K). Middle and right: mean change of the loss along the gradient around the "
        "first iterate that is misclassified (friendly) and around the last one; a steeper line is a sharper loss.",
        footer=[*sources(found), *all_of(shared)],
        right=0.1,
        bottom=0.5 + 0.22 * -(-len(labels) // _ACROSS),
    )
    grid = sheet.grid(1, 3, width_ratios=(1.1, 1, 1), wspace=0.32)
    axes = sheet.figure.add_subplot(grid[0], label="kappa")
    for k, label in enumerate(labels):
        rows = kappa["member"] == k
        survived, share = kappa["survived"][rows], kappa["share"][rows]
        standing = 1 - np.cumsum(share)[:-1]  # of κ at least 1, 2, ..., K
        axes.plot(survived[1:], standing, color=tones[k], label=label, marker="o", markersize=3.5)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([0, 0.5, 1], ["0", "K / 2", "K"])
    axes.set_xlabel("steps withstood")
    percent_axis(axes)
    axes.set_title("Still classified correctly")
    handles, names = axes.get_legend_handles_labels()
    top = max(float(flat["mean"][flat["direction"] == "uphill"].max()), 0.0)
    bottom = min(float(flat["mean"][flat["direction"] == "uphill"].min()), 0.0)
    for place, centre in enumerate(_WORDS, start=1):
        axes = sheet.figure.add_subplot(grid[place], label=centre)
        for k in range(len(labels)):
            rows = (flat["member"] == k) & (flat["centre"] == centre) & (flat["direction"] == "uphill")
            axes.plot(flat["distance"][rows], flat["mean"][rows], color=tones[k])
        axes.set_xlim(-1, 1)
        axes.set_ylim(bottom - 0.06 * (top - bottom), top + 0.06 * (top - bottom))
        axes.set_xticks([-1, 0, 1], ["−eps", "0", "eps"])
        axes.set_xlabel("distance along the gradient")
        axes.set_title(_WORDS[centre].replace("the most", "most"))
        if place == 1:
            axes.set_ylabel("change of the loss, nats")
    sheet.figure.legend(
        handles, names, loc="upper left", ncols=_ACROSS, columnspacing=1.5,
        bbox_to_anchor=(sheet.left - 0.01, sheet.bottom - 0.42 / sheet.figure.get_figheight()),
    )  # fmt: skip
    return sheet.figure


def _kind(found: Found) -> str:
    return "training" if found.protocol.get("split") == "train" else "test"
