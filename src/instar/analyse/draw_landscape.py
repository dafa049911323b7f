"""Pictures of `instar.analyse.landscape`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import all_of, extremes, shown_as
from instar.analyse.sources import sources
from instar.report.style import EASY, GREY, HARD, INK, Sheet, styled
from instar.report.wording import minus

_HEIGHT = LinearSegmentedColormap.from_list("height", ["#F4F6F8", "#CFE0EC", "#8FBEDC", "#E9B98C", HARD, "#7A2E00"])
_LEVELS = 18
_MOST_PLANES = 8
_FILTERS = (
    "Filter-normalised directions after Li et al. 2018: biases and BatchNorm do not move, running statistics are those "
    "of the centre."
)
_PARTS = {"least": "Least vulnerable third", "middle": "Middle third", "most": "Most vulnerable third"}


def draw(found: Found) -> dict[str, Figure]:
    """The loss over the weights and over the pixels.

    Args:
        found: Result of `instar.analyse.landscape.measure`.

    Returns:
        ``"weights"`` (axes ``adversarial``, ``clean`` and ``line``) and ``"pixels"`` (axes ``least``, ``middle`` and
        ``most``).
    """
    return {"weights": _weights(found), "pixels": _pixels(found)}


@styled
def _weights(found: Found) -> Figure:
    plane, line, figures = found.tables["plane"], found.tables["line"], found.figures
    sheet = Sheet(
        2.6,
        title=f"{found.label}: half a filter's norm away from the weights, the adversarial loss is "
        f"{figures['adversarial_half']:.2f} nats instead of {figures['adversarial_loss']:.2f}",
        subtitle="Mean cross-entropy over two random directions of the weights, in which every filter has the norm of "
        "the network's own. Right: along the first one. Examples made once at the centre no longer fit other weights; "
        "attacked anew, as the loss is meant, it rises faster.",
        footer=[*sources(found), _FILTERS],
        right=0.1,
    )
    grid = sheet.grid(1, 3, wspace=0.22)
    names = (("adversarial", "Adversarial loss"), ("clean", "Clean loss"))
    levels = _levels(np.concatenate([plane[name] for name, _ in names]))
    for place, (name, title) in enumerate(names):
        axes = sheet.figure.add_subplot(grid[place], label=name)
        _contours(axes, plane["a"], plane["b"], plane[name], levels)
        axes.plot([0], [0], "o", color=INK, markersize=4.5)
        axes.set_xlabel("along d₁")
        axes.locator_params(nbins=5)
        if place == 0:
            axes.set_ylabel("along d₂")
        axes.set_title(title)
    axes = sheet.figure.add_subplot(grid[2], label="line")
    curves = (
        ("again", "attacked anew", HARD, "-"),
        ("fixed", "attacked once", HARD, ":"),
        ("clean", "clean", EASY, "-"),
    )
    for name, label, colour, style in curves:
        if np.isfinite(line[name]).any():
            axes.plot(line["a"], line[name], style, color=colour, label=label, gid=name)
    axes.set_xlim(line["a"][0], line["a"][-1])
    axes.set_ylim(0, None)
    axes.set_box_aspect(1)
    axes.set_xlabel("along d₁")
    axes.set_title("Loss on the line, nats")
    axes.legend(loc="upper center", fontsize=8.5)
    return sheet.figure


def _levels(values: np.ndarray) -> np.ndarray:
    """Heights of contours, denser near the ground: random directions can lead to losses of any size."""
    known = values[np.isfinite(values)]
    low, high = float(known.min()), float(np.quantile(known, 0.98))
    high = high if high > low else low + 1e-6
    return np.asarray(low + (high - low) * np.linspace(0, 1, _LEVELS) ** 1.6)


def _round_heights(highest: float) -> np.ndarray:
    """Round numbers up to a height, each about twice the one before it.

    Example:
        >>> _round_heights(2.7).tolist()
        [0.1, 0.2, 0.5, 1.0, 2.0]
    """
    decade = 10.0 ** np.floor(np.log10(max(highest, 1e-9) / 20))
    heights = decade * np.array([1, 2, 5, 10, 20, 50, 100, 200])
    return np.asarray(heights[: max(int((heights <= highest).sum()), 2)])


def _contours(
    axes: Axes, x: np.ndarray, y: np.ndarray, height: np.ndarray, levels: np.ndarray, *, lines: np.ndarray | None = None
) -> None:
    """Filled contours with some of the heights written on them; x runs along the first of the table's columns."""
    side = np.unique(x), np.unique(y)
    surface = height.reshape(len(side[0]), len(side[1])).T
    style: dict[str, Any] = {"levels": levels, "extend": "both"}
    places = np.linspace(0, 1, len(levels) + 1)  # every step of the height is the same step of the colours
    style["colors"] = _HEIGHT(places)
    axes.contourf(*side, surface, **style)
    shown = levels[1 :: max(1, len(levels) // 6)] if lines is None else lines
    drawn = axes.contour(*side, surface, levels=shown, colors="white", linewidths=0.7)
    written_as = "%g" if lines is not None else "%.2f" if levels[-1] - levels[0] < 5 else "%.1f"
    written = axes.clabel(
        drawn,
        shown[: len(shown) * 2 // 3 + 1] if lines is None else shown,
        fmt=lambda level: minus(written_as % level),
        fontsize=7,
        colors=INK if lines is None else ["white" if place > 0.75 else INK for place in np.linspace(0, 1, len(shown))],
    )
    for text in written:  # a number at the very edge would be cut in two
        if not all(
            0.04 < (at - along[0]) / (along[-1] - along[0]) < 0.96
            for at, along in zip(text.get_position(), side, strict=True)
        ):
            text.remove()
    axes.set_aspect("equal")
    axes.grid(visible=False)


@styled
def _pixels(found: Found) -> Figure:
    table, figures = found.tables["pixels"], found.figures
    sheet = Sheet(
        2.75,
        title=f"{found.label}: across the ball the loss rises by {figures['uphill']:.2f} nats uphill and by "
        f"{round(figures['aside'], 2) + 0.0:.2f} aside",
        subtitle="Rise of the mean cross-entropy above that of the images themselves, moved in the steepest direction "
        "and along random signs, each by up to eps; images in thirds by what the attack adds to their loss. Straight, "
        "parallel and evenly spaced contours mean a loss that is linear, which is what single-step attacks rely on.",
        footer=[
            *sources(found),
            "The steepest direction is that of the gradient at the image (its sign for ℓ∞), and stays the same over "
            "the plane. The box [0, 1] is not respected.",
        ],
        right=0.1,
    )
    grid = sheet.grid(1, 3, wspace=0.12)
    middle = (table["u"] == 0) & (table["w"] == 0)
    rises = {name: table[name] - table[name][middle][0] for name in _PARTS}
    low, high = min(float(rise.min()) for rise in rises.values()), max(float(rise.max()) for rise in rises.values())
    levels = np.linspace(low, max(high, low + 1e-6), _LEVELS)
    for place, (name, title) in enumerate(_PARTS.items()):
        axes = sheet.figure.add_subplot(grid[place], label=name)
        _contours(axes, table["u"], table["w"], rises[name], levels)
        axes.plot([0], [0], "o", color=INK, markersize=4.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([-1, 0, 1], ["−eps", "0", "eps"])
        axes.set_xlabel("in the steepest direction")
        if place:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("along random signs")
        axes.set_title(f"{title}, from {table[name][middle][0]:.2f}")
    return sheet.figure


def draw_compared(found: Found) -> dict[str, Figure]:
    """The loss around the weights of several checkpoints.

    Args:
        found: Result of `instar.analyse.landscape.compare`.

    Returns:
        ``"weights"``, with axes ``line`` and ``distance``, and ``"planes"``, with axes ``plane 0``, ``plane 1``, ...
    """
    return {"weights": _several(found), "planes": _planes(found)}


@styled
def _several(found: Found) -> Figure:
    members, line, plane = found.tables["members"], found.tables["line"], found.tables["plane"]
    labels, tones, shared = shown_as(found)
    rise = members["adversarial_half"] - members["adversarial_loss"]
    flat, steep = extremes(rise)
    again = bool(np.isfinite(line["again"]).all())
    sheet = Sheet(
        3.4,
        title=f"Half a filter's norm away the adversarial loss has risen by {rise[steep]:.2f} nats at {labels[steep]}, "
        f"by {rise[flat]:.2f} at {labels[flat]}",
        subtitle="Left: along one random direction of the weights, "
        + ("images attacked anew at every point. " if again else "examples made once at the centre. ")
        + "Right: mean over a plane of two directions, by distance from the weights, above the loss there (examples "
        "made once); the title compares the networks at the dashed line.",
        footer=[*sources(found), *all_of(shared), _FILTERS],
        right=1.3,
    )
    grid = sheet.grid(1, 2, wspace=0.16)
    left = sheet.figure.add_subplot(grid[0], label="line")
    right = sheet.figure.add_subplot(grid[1], label="distance")
    for k, (label, tone) in enumerate(zip(labels, tones, strict=True)):
        rows = line["member"] == k
        left.plot(
            line["a"][rows], line["again" if again else "fixed"][rows], color=tone, label=label, gid=f"line: {label}"
        )
        distance, height = radial({name: column[plane["member"] == k] for name, column in plane.items()})
        right.plot(distance, height - members["adversarial_loss"][k], color=tone, label=label, gid=f"distance: {label}")
    left.set_ylim(0, None)
    left.locator_params(axis="x", nbins=5)
    left.set_xlabel("along d₁, in norms of the filters")
    left.set_title("Adversarial loss, nats")
    right.axhline(0, color=GREY, linewidth=0.8)
    right.axvline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
    right.set_xlabel("distance from the weights, in norms of the filters")
    right.set_title("Rise of the adversarial loss, nats")
    # In the order of the lines' ends, from the top.
    handles, names = right.get_legend_handles_labels()
    ends = [float(np.asarray(handle.get_ydata())[-1]) for handle in handles]  # type: ignore[attr-defined]
    order = np.argsort(ends)[::-1]
    right.legend(
        [handles[k] for k in order], [names[k] for k in order], loc="upper left", bbox_to_anchor=(1.02, 1),
        borderaxespad=0,
    )  # fmt: skip
    return sheet.figure


@styled
def _planes(found: Found) -> Figure:
    members, plane = found.tables["members"], found.tables["plane"]
    labels, _, shared = shown_as(found, range(min(_MOST_PLANES, len(members["label"]))))
    across = len(labels) if len(labels) <= 4 else -(-len(labels) // 2)
    down = -(-len(labels) // across)
    rises = []
    for k in range(len(labels)):
        rows = plane["member"] == k
        surface = plane["adversarial"][rows] - members["adversarial_loss"][k]
        rises.append((plane["a"][rows], plane["b"][rows], surface))
    corners = [float(np.nanmax(surface)) for *_, surface in rises]
    flat, steep = extremes(np.array(corners))
    side = min(2.9, 9.0 / across)
    sheet = Sheet(
        down * side + 0.5 * (down - 1),
        title=f"Over a plane of weights the adversarial loss rises by up to {corners[steep]:.1f} nats at "
        f"{labels[steep]}, by {corners[flat]:.1f} at {labels[flat]}",
        subtitle="Rise of the mean adversarial cross-entropy, in nats, above that of the trained weights (dot), over "
        "two random directions in which every filter has its own norm. All panels share colours and heights; contours "
        "that lie far apart mean a flat loss.",
        footer=[*sources(found), *all_of(shared), "Adversarial examples are made once, at the centre.", _FILTERS],
        right=0.1,
    )
    grid = sheet.grid(down, across, wspace=0.08, hspace=0.2)
    highest = max(float(np.nanquantile(surface, 0.98)) for *_, surface in rises)
    lowest = min(0.0, min(float(np.nanmin(surface)) for *_, surface in rises))
    lines = _round_heights(highest)
    levels = np.unique([lowest - 1e-9, 0.0, *lines, *((lines[:-1] + lines[1:]) / 2)])
    for place, (label, (a, b, surface)) in enumerate(zip(labels, rises, strict=True)):
        axes = sheet.figure.add_subplot(grid[place // across, place % across], label=f"plane {place}")
        _contours(axes, a, b, surface, levels, lines=lines)
        axes.plot([0], [0], "o", color=INK, markersize=4.5)
        axes.set_title(label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks([-1, 0, 1] if np.abs(a).max() >= 1 else [0])
        if place % across:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("along d₂")
        if place // across == down - 1 or place + across >= len(labels):
            axes.set_xlabel("along d₁")
        else:
            axes.set_xticklabels([])
    return sheet.figure


def radial(plane: Table, *, bins: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """The mean adversarial loss over rings of a plane, out to where rings are whole.

    Args:
        plane: Columns ``a``, ``b`` and ``adversarial``.
        bins: Rings.

    Returns:
        Mean distances, and mean losses, of the rings that have points; the first is the centre.

    Example:
        >>> a, b = (grid.ravel() for grid in np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]))
        >>> radial({"a": a, "b": b, "adversarial": a**2 + b**2}, bins=2)
        (array([0., 1.]), array([0., 1.]))
    """
    distance = np.hypot(plane["a"], plane["b"])
    reach = float(np.abs(plane["a"]).max())
    inside = distance <= reach * (1 + 1e-9)
    ring = np.ceil(np.minimum(distance / reach, 1.0) * (bins - 1) - 1e-9).astype(np.int64)
    rings = [inside & (ring == k) for k in range(bins)]
    rings = [chosen for chosen in rings if chosen.any()]
    return (
        np.array([distance[chosen].mean() for chosen in rings]),
        np.array([plane["adversarial"][chosen].mean() for chosen in rings]),
    )
