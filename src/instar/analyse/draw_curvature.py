"""Pictures of `instar.analyse.curvature`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import extremes
from instar.analyse.lanczos import Density
from instar.analyse.sources import sources
from instar.report.style import EASY, GREY, HARD, INK, RUNS, Sheet, lighter, styled
from instar.report.wording import power_of_ten

_LEAST = 0.1
"""Expected eigenvalues per unit below which nothing is drawn."""
_BETWEEN = "#B9770E"


def draw(found: Found) -> dict[str, Figure]:
    """The spectrum in the weights, and curvature instance by instance.

    Args:
        found: Result of `instar.analyse.curvature.measure`.

    Returns:
        ``"spectrum"`` (axes ``density`` and ``largest``), and ``"instances"`` (axes ``weights``, ``pixels`` and
        ``nonlinearity``) if instances were looked at.
    """
    pictures = {"spectrum": _spectrum(found)}
    if "instances" in found.tables:
        pictures["instances"] = _instances(found)
    return pictures


@styled
def _spectrum(found: Found) -> Figure:
    radii, figures = found.tables["radii"], found.figures
    ends = [0, len(radii["radius"]) - 1] if len(radii["radius"]) > 1 else [0]
    size = int(found.protocol["model"]["parameters"])
    several = len(ends) > 1
    told = f", {radii['largest'][0]:.3g} without an attack" if several and radii["radius"][0] == 0 else ""
    sheet = Sheet(
        3.7,
        title=f"{found.label}: the sharpest direction in the weights has a curvature of {figures['largest']:.3g}{told}",
        subtitle=f"Eigenvalues of the Hessian of the mean cross-entropy in all {size:,} weights. Nearly all are close "
        "to 0; the few that stand out are directions in which one step of training changes the loss most.",
        footer=[
            *sources(found),
            f"Density by stochastic Lanczos quadrature ({found.protocol['lanczos_steps']} steps, "
            f"{found.protocol['probes']} random vectors), smoothed; largest eigenvalues to a residual of "
            f"{figures['residual']:.1g}. Where a single bump stands is exact, its height is left to chance. "
            "Adversarial examples are held fixed.",
        ],
        right=0.1,
    )
    grid = sheet.grid(1, 2, width_ratios=(2.0, 1), wspace=0.2)
    axes = sheet.figure.add_subplot(grid[0], label="density")
    low, high = float(radii["smallest"].min()), float(radii["largest"].max())
    at, width = _grid(low, high)
    lines = []
    for k in ends:
        colour, name = _look(radii["radius"][k])
        density = _density(found.tables["spectrum"], radius=float(radii["radius"][k]))
        lines.append((size * density.smoothed(at, width), colour, name))
    for values, colour, name in reversed(lines):
        axes.fill_between(at, _LEAST, np.maximum(values, _LEAST), color=lighter(colour, 0.75), linewidth=0)
        axes.plot(at, np.maximum(values, _LEAST), color=colour, label=name)
    axes.set_xlim(at[0], at[-1])
    _count_axis(axes)
    axes.set_xlabel("eigenvalue")
    axes.set_title("Eigenvalues per unit of the axis")
    axes.legend(loc="upper right")
    axes = sheet.figure.add_subplot(grid[1], label="largest")
    _largest(axes, found.tables["top"], [float(radii["radius"][k]) for k in ends])
    return sheet.figure


def _grid(low: float, high: float) -> tuple[np.ndarray, float]:
    span = max(high - low, 1e-12)
    return np.linspace(low - 0.03 * span, high + 0.05 * span, 1200), 0.006 * span


def _look(radius: float) -> tuple[str, str]:
    """Colour and name of the loss at a radius."""
    if radius == 0:
        return EASY, "clean loss"
    return HARD, "adversarial loss" if radius == 1 else f"adversarial loss, {radius:g} eps"


def _density(spectrum: Table, *, radius: float | None = None, member: int | None = None) -> Density:
    chosen = np.ones(len(spectrum["radius"]), dtype=bool)
    if member is not None:
        chosen &= spectrum["member"] == member
        radius = float(spectrum["radius"][chosen].max()) if radius is None else radius
    chosen &= spectrum["radius"] == radius
    probes = len(np.unique(spectrum["probe"][chosen]))
    return Density(spectrum["eigenvalue"][chosen].reshape(probes, -1), spectrum["weight"][chosen].reshape(probes, -1))


def _count_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_ylim(_LEAST, None)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(power_of_ten))


def _largest(axes: Axes, top: Table, radii: list[float]) -> None:
    """The largest eigenvalues of each radius as dots, rank by rank."""
    for radius in radii:
        rows = top["radius"] == radius
        colour, name = _look(radius)
        axes.plot(top["value"][rows], top["rank"][rows], "o", color=colour, markersize=7, label=name, zorder=3)
    ranks = np.unique(top["rank"])
    for rank in ranks:
        values = top["value"][(top["rank"] == rank) & np.isin(top["radius"], radii)]
        axes.plot([values.min(), values.max()], [rank, rank], color=lighter(GREY, 0.6), linewidth=2, zorder=1)
    # The largest of all is the number of the title.
    best = top["value"].argmax()
    axes.annotate(
        f"{top['value'][best]:.3g}", (top["value"][best], top["rank"][best]), xytext=(0, 8),
        textcoords="offset points", ha="center", fontsize=9, fontweight="bold",
        color=_look(float(top["radius"][best]))[0],
    )  # fmt: skip
    axes.set_ylim(ranks.max() + 0.5, 0.4)
    axes.set_yticks(ranks, [f"{rank}." for rank in ranks])
    axes.set_xlim(0, 1.12 * float(top["value"].max()))
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("eigenvalue")
    axes.set_title(f"The {len(ranks)} largest")


@styled
def _instances(found: Found) -> Figure:
    rows, figures = found.tables["instances"], found.figures
    most = int(found.protocol["attack_steps"])
    kappa = rows["kappa"].astype(np.int64)
    groups = [
        (f"attackable\nκ = 0, n = {int((kappa == 0).sum())}", kappa == 0, HARD),
        (f"between\nn = {int(((kappa > 0) & (kappa < most)).sum())}", (kappa > 0) & (kappa < most), _BETWEEN),
        (f"guarded\nκ = {most}, n = {int((kappa == most).sum())}", kappa == most, EASY),
    ]
    medians = [float(np.median(rows["nonlinearity"][part])) if part.any() else np.nan for _, part, _ in groups]
    known = [k for k in range(3) if np.isfinite(medians[k])]
    far = max(known, key=lambda k: medians[k])
    sheet = Sheet(
        3.4,
        title=f"{found.label}: a typical image's loss is off its tangent by up to {figures['nonlinearity']:.2g} nats "
        f"within the ball, most for {('attackable images', 'those in between', 'guarded images')[far]}",
        subtitle="Every dot is an image; bars are medians. Left: the sharpest direction of the image's own adversarial "
        "loss in the weights (Gauss-Newton). Middle: the same in its pixels, unattacked. Right: the largest error of "
        "the tangent that ten steps could find.",
        footer=[
            *sources(found),
            f"κ counts the iterates of PGD-{most} that are still classified correctly, images as they are.",
        ],
        bottom=0.62,
        right=0.1,
    )
    grid = sheet.grid(1, 3, wspace=0.28)
    panels = (
        ("weights", rows["curvature"], "Curvature in the weights"),
        ("pixels", rows["largest"], "Curvature in the pixels"),
        ("nonlinearity", rows["nonlinearity"], "Off the tangent, nats"),
    )
    spread = np.random.default_rng(0).uniform(-0.28, 0.28, len(kappa))  # only places dots beside one another
    for place, (name, values, title) in enumerate(panels):
        axes = sheet.figure.add_subplot(grid[place], label=name)
        floor = _floor(values)
        for k, (_, part, colour) in enumerate(groups):
            shown = np.maximum(values[part], floor)
            axes.plot(k + spread[part], shown, "o", markersize=3.6, alpha=0.5, color=colour, markeredgewidth=0)
            if part.any():
                axes.plot(
                    [k - 0.36, k + 0.36], [np.median(shown)] * 2, color=INK, linewidth=2.2, zorder=4,
                    gid=f"median: {name} {k}",
                )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        decades = np.log10(values.max() / floor) if values.max() > floor else 0.0
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
        axes.set_xticks(range(3), [name for name, *_ in groups])
        axes.set_xlim(-0.6, 2.6)
        axes.set_title(title)
    return sheet.figure


def _floor(values: np.ndarray) -> float:
    """Where what is smaller still is drawn on a logarithmic axis: four decades below the median, above 0."""
    positive = values[values > 0]
    return float(max(np.median(positive) * 1e-4, positive.min())) if len(positive) else 1e-12


def draw_compared(found: Found) -> dict[str, Figure]:
    """Spectra and curvatures of several checkpoints.

    Args:
        found: Result of `instar.analyse.curvature.compare`.

    Returns:
        ``"spectra"``, with axes ``density``, ``largest`` and ``nonlinearity`` (if instances were looked at).
    """
    return {"spectra": _spectra(found)}


@styled
def _spectra(found: Found) -> Figure:
    members, radii = found.tables["members"], found.tables["radii"]
    labels = [str(label) for label in members["label"]]
    flat, sharp = extremes(members["largest"])
    sizes = [int(one["model"]["parameters"]) for one in found.protocol["members"]]
    sheet = Sheet(
        0.9 + 0.62 * len(labels) if len(labels) > 4 else 3.4,
        title=f"The adversarial loss bends {members['largest'][sharp] / members['largest'][flat]:.1f} times as sharply "
        f"at {labels[sharp]} as at {labels[flat]}",
        subtitle="Left: eigenvalues of the Hessian of the mean adversarial cross-entropy in the weights. Middle: the "
        "largest one, full dots for the adversarial loss and open ones for the clean loss. Right: how far the loss of "
        "the median image leaves its tangent within the ball.",
        footer=[*sources(found), "Adversarial examples are held fixed."],
        right=0.1,
    )
    instances = np.isfinite(members.get("nonlinearity", np.full(len(labels), np.nan))).any()
    grid = sheet.grid(1, 3 if instances else 2, width_ratios=(1.7, 1.1, 0.9) if instances else (1.7, 1.1), wspace=0.25)
    axes = sheet.figure.add_subplot(grid[0], label="density")
    at, width = _grid(float(radii["smallest"].min()), float(radii["largest"].max()))
    for k, label in enumerate(labels):
        values = sizes[k] * _density(found.tables["spectrum"], member=k).smoothed(at, width)
        axes.plot(at, np.maximum(values, _LEAST), color=RUNS[k % len(RUNS)], label=label)
    axes.set_xlim(at[0], at[-1])
    _count_axis(axes)
    axes.set_xlabel("eigenvalue")
    axes.set_title("Eigenvalues per unit of the axis")
    axes = sheet.figure.add_subplot(grid[1], label="largest")
    _rows(axes, labels, members["largest"], members.get("largest_clean"))
    axes.set_title("Largest eigenvalue")
    if instances:
        axes = sheet.figure.add_subplot(grid[2], label="nonlinearity")
        _rows(axes, labels, members["nonlinearity"], None, named=False)
        axes.set_title("Off the tangent, nats")
    return sheet.figure


def _rows(axes: Axes, labels: list[str], values: np.ndarray, others: np.ndarray | None, *, named: bool = True) -> None:
    """One dot a member, with its value, and an open one for another value."""
    style: dict[str, Any] = {"markersize": 7, "linestyle": "", "zorder": 3}
    for k, value in enumerate(values):
        colour = RUNS[k % len(RUNS)]
        if others is not None and np.isfinite(others[k]):
            axes.plot([others[k], value], [k, k], color=lighter(colour, 0.55), linewidth=2)
            # Larger, so that it is seen around a dot in the same place.
            ring: dict[str, Any] = {"markersize": 10, "markeredgewidth": 1.6, "markerfacecolor": "white"}
            axes.plot([others[k]], [k], "o", linestyle="", markeredgecolor=colour, zorder=2, **ring)
        axes.plot([value], [k], "o", color=colour, **style)
        if named:
            axes.annotate(
                labels[k], (0, k), xycoords=("axes fraction", "data"), xytext=(2, 11), textcoords="offset points",
                fontsize=8.5, fontweight="bold", color=colour,
            )  # fmt: skip
        axes.annotate(
            f"{value:.2g}", (value, k), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_ylim(len(labels) - 0.45, -0.6)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    top = np.nanmax(values if others is None else np.concatenate([values, others]))
    axes.set_xlim(0, 1.15 * float(top))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
