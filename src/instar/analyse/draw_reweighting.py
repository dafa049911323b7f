"""Pictures of `instar.analyse.reweighting`."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import extremes, shown_as
from instar.report.distributions import Survival
from instar.report.geometry import bands
from instar.report.style import GREY, INK, Sheet, epoch_axis, lighter, percent_axis, styled
from instar.report.wording import count_range, percent

_MOST_MARKERS = 40
_SHAPES = ("#D55E00", "#CC79A7", "#009E73", "#0072B2", "#E69F00", "#56B4E9")


def draw(found: Found) -> dict[str, Figure]:
    """κ by epoch, and what weights by κ make of it.

    Args:
        found: Result of `instar.analyse.reweighting.measure`.

    Returns:
        ``"kappa"`` (axes ``shares`` and ``centre``) and ``"weights"`` (axes ``effective`` and ``functions``).
    """
    return {"kappa": _kappa(found), "weights": _weights(found)}


@styled
def _kappa(found: Found) -> Figure:
    epochs = found.tables["epochs"]
    survival = _survival(found)
    first, last = float(epochs["guarded"][0]), float(epochs["guarded"][-1])
    begun, ended = (int(epochs["epoch"][k]) + 1 for k in (0, -1))
    said = f"{percent(last)} of its training images in epoch {ended}"
    said += f", {percent(first)} in epoch {begun}" if ended > begun else ""
    sheet = Sheet(
        3.5,
        title=f"{found.label} guards {said}",
        subtitle="κ counts the iterates of the training attack that are still classified correctly. Guarded images "
        "withstand all of them, attackable ones none.",
        footer=_sources(found),
        right=0.1,
    )
    grid = sheet.grid(1, 2, width_ratios=(1.3, 1), wspace=0.42)
    axes = sheet.figure.add_subplot(grid[0], label="shares")
    x, height = survival.epochs + 1, np.zeros(len(survival.epochs))
    made = bands(survival)
    for band in made:
        axes.bar(
            x, band.share, width=0.86 if len(x) <= _MOST_MARKERS else 1.0, bottom=height, color=band.colour,
            linewidth=0.5 if len(x) <= _MOST_MARKERS else 0, edgecolor="white", label=f"κ = {band.name}",
        )  # fmt: skip
        height = height + band.share
    for place, band, name in ((0.0, made[0], "attackable"), (1.0, made[-1], "guarded")):
        share = band.share[-1]
        axes.annotate(
            f"{name}\n{percent(share)}", (1.0, abs(place - share / 2)), xycoords="axes fraction", xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8.5, fontweight="bold", color=band.colour,
        )  # fmt: skip
    epoch_axis(axes, int(x.max()))
    percent_axis(axes)
    axes.grid(visible=False)
    axes.set_title("Training images by κ, from 0 at the bottom to K")
    axes = sheet.figure.add_subplot(grid[1], label="centre")
    mark = "o" if len(x) <= _MOST_MARKERS else None
    for name, colour in (("median", INK), ("mean", GREY)):
        axes.plot(x, epochs[name], color=colour, marker=mark, markersize=4, label=f"{name} κ", gid=name)
    axes.set_ylim(0, float(survival.steps.max()) * 1.04)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    epoch_axis(axes, int(x.max()))
    axes.legend(loc="best")
    axes.set_title(f"Median and mean κ, of K = {count_range(survival.steps)}")
    return sheet.figure


def _survival(found: Found) -> Survival:
    table, epochs = found.tables["kappa"], found.tables["epochs"]
    counts = table["count"].reshape(len(epochs["epoch"]), -1)
    return Survival(epochs["epoch"], epochs["steps"], counts, bool(found.protocol.get("steps_known", True)))


@styled
def _weights(found: Found) -> Figure:
    weights, functions = found.tables["weights"], found.tables["functions"]
    names = list(dict.fromkeys(str(name) for name in weights["shape"]))
    used = bool(found.protocol.get("own"))
    told = "this run" if used else names[0]
    last = np.flatnonzero(weights["shape"] == told)[-1]
    epoch = int(weights["epoch"][last]) + 1
    guarded = float(found.tables["epochs"]["guarded"][-1])
    sheet = Sheet(
        3.5,
        title=f"{found.label}: weighed by κ ({told}), half of the weight lies on "
        f"{percent(float(weights['half'][last]))} of the training images in epoch {epoch}",
        subtitle=f"Left: Kish's effective number of images over their number, 100 % if all weigh the same. Right: the "
        f"weight of an image with a given κ in epoch {epoch}, mean 1; the {percent(guarded)} that are guarded carry "
        f"{_little(float(weights['guarded'][last]))} of it."
        + ("" if used else " This run itself does not weigh by κ: what published functions would do."),
        footer=[
            *_sources(found),
            "Weights over all images of an epoch at once; training divides by the mean of each batch.",
        ],
        right=0.1,
    )
    grid = sheet.grid(1, 2, wspace=0.2)
    axes = sheet.figure.add_subplot(grid[0], label="effective")
    most = int(weights["epoch"].max()) + 1
    colours = dict(zip(names, _colours(names), strict=True))
    for name in names:
        rows = weights["shape"] == name
        axes.plot(
            weights["epoch"][rows] + 1, weights["effective"][rows], color=colours[name], label=name, gid=name,
            marker="o" if most <= _MOST_MARKERS else None, markersize=4, linewidth=2.6 if name == "this run" else 1.6,
        )  # fmt: skip
    epoch_axis(axes, most)
    percent_axis(axes)
    axes.set_title("Images that the weights amount to")
    axes = sheet.figure.add_subplot(grid[1], label="functions")
    _functions(axes, functions, found, colours)
    return sheet.figure


def _little(share: float) -> str:
    return percent(share) if share >= 0.001 else f"less than {percent(0.001)}"


def _colours(names: list[str]) -> list[str]:
    others = iter(_SHAPES * (1 + len(names) // len(_SHAPES)))
    return [INK if name == "this run" else next(others) for name in names]


def _functions(axes: Axes, functions: Table, found: Found, colours: dict[str, str]) -> None:
    """Weights by κ as lines, over how many images have each κ."""
    survival = _survival(found)
    most = int(survival.steps[-1])
    share = survival.shares[-1][: most + 1]
    behind = axes.twinx()
    behind.bar(np.arange(most + 1), share, width=0.8, color=lighter(GREY, 0.75), gid="images")
    behind.set_ylim(0, 2.2 * float(share.max()))
    behind.set_axis_off()
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    for end in (0, most):
        behind.annotate(
            percent(share[end]), (end, share[end]), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom",
            fontsize=7.5, color=GREY,
        )  # fmt: skip
    for name, colour in colours.items():
        rows = functions["shape"] == name
        axes.plot(
            functions["kappa"][rows], functions["weight"][rows], color=colour, label=name, marker="o", markersize=3,
            linewidth=2.6 if name == "this run" else 1.6,
        )  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.set_ylim(0, 1.1 * float(functions["weight"].max()))
    axes.set_xlim(-0.6, most + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11))
    axes.set_xlabel("κ")
    axes.legend(loc="upper right", fontsize=8.5)
    axes.set_title("Weight of an image by κ (bars: share of images)")


def draw_compared(found: Found) -> dict[str, Figure]:
    """κ through the training of several runs.

    Args:
        found: Result of `instar.analyse.reweighting.compare`.

    Returns:
        ``"kappa"``, with axes ``guarded``, ``attackable`` and ``mean``.
    """
    return {"kappa": _several(found)}


@styled
def _several(found: Found) -> Figure:
    members, epochs = found.tables["members"], found.tables["epochs"]
    labels, tones, _ = shown_as(found)
    low, high = extremes(members["guarded"])
    sheet = Sheet(
        3.3,
        title=f"At the end {labels[high]} guards {percent(members['guarded'][high])} of its training images, "
        f"{labels[low]} {percent(members['guarded'][low])}",
        subtitle="κ counts the iterates of each run's own training attack that are still classified correctly: a "
        "weaker attack guards more. Guarded images withstand all of them, attackable ones none.",
        footer=_sources(found),
        right=0.1,
        bottom=0.5 + 0.22 * -(-len(labels) // 7),
    )
    grid = sheet.grid(1, 3, wspace=0.28)
    most = int(epochs["epoch"].max()) + 1
    panels = (
        ("guarded", "Guarded", epochs["guarded"]),
        ("attackable", "Attackable", epochs["attackable"]),
        ("mean", "Mean κ over K", epochs["mean"] / epochs["steps"]),
    )
    for place, (name, title, values) in enumerate(panels):
        axes = sheet.figure.add_subplot(grid[place], label=name)
        for k, label in enumerate(labels):
            rows = epochs["member"] == k
            axes.plot(
                epochs["epoch"][rows] + 1, values[rows], color=tones[k], label=label,
                marker="o" if most <= _MOST_MARKERS else None, markersize=3.5,
            )  # fmt: skip
        epoch_axis(axes, most)
        percent_axis(axes)
        axes.set_title(title)
    handles, names = axes.get_legend_handles_labels()
    sheet.figure.legend(
        handles, names, loc="upper left", ncols=7, columnspacing=1.5,
        bbox_to_anchor=(sheet.left - 0.01, sheet.bottom - 0.42 / sheet.figure.get_figheight()),
    )  # fmt: skip
    return sheet.figure


def _sources(found: Found) -> list[str]:
    given = found.protocol.get("members") or [found.protocol]
    columns = (
        [str(one.get("data_title")) for one in given],
        [str(one.get("trained")) for one in given],
        [str(one.get("threat")) for one in given],
        [f"n = {one.get('n'):,} images trained on in an epoch" for one in given],
        [f"training seed {one.get('training_seed')}" for one in given],
    )
    return [
        " · ".join(" / ".join(dict.fromkeys(column)) for column in columns),
        "From the instance tables: augmented images, one attack each with the weights of that step.",
    ]
