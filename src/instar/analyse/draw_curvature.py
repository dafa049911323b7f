"""Pictures of `instar.analyse.curvature`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import all_of, extremes, shown_as
from instar.analyse.lanczos import Density
from instar.analyse.sources import sources
from instar.report.style import EASY, GREY, HARD, INK, Sheet, lighter, styled
from instar.report.wording import power_of_ten

_LEAST = 0.1
"""Expected eigenvalues per unit below which nothing is drawn."""
_MANY = 1e6
"""Eigenvalues per unit at which a row of the comparison ends."""
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
    labels, tones, shared = shown_as(found)
    flat, sharp = extremes(members["largest"])
    sizes = [int(one["model"]["parameters"]) for one in found.protocol["members"]]
    sheet = Sheet(
        max(2.2, 0.62 * len(labels)),
        title=f"The adversarial loss bends {members['largest'][sharp] / members['largest'][flat]:.1f} times as sharply "
        f"at {labels[sharp]} as at {labels[flat]}",
        subtitle="Left: where the eigenvalues of the Hessian of the mean adversarial cross-entropy in the weights lie; "
        f"nearly all are close to 0, a lone bump is one direction (height: their number per unit, logarithmic, from "
        f"{_LEAST:g} to 10⁶). Middle: the largest one, full for the adversarial loss, open for the clean loss. Right: "
        "how far the loss of the median image leaves its tangent within the ball.",
        footer=[*sources(found), *all_of(shared), "Adversarial examples are held fixed."],
        left=0.75,
        right=0.15,
    )
    instances = np.isfinite(members.get("nonlinearity", np.full(len(labels), np.nan))).any()
    ratios = (1.9, 1.05, 0.85) if instances else (1.9, 1.05)
    grid = sheet.grid(1, len(ratios), width_ratios=ratios, wspace=0.12)
    axes = sheet.figure.add_subplot(grid[0], label="density")
    at, width = _grid(float(radii["smallest"].min()), float(radii["largest"].max()))
    for k, (label, tone) in enumerate(zip(labels, tones, strict=True)):
        values = sizes[k] * _density(found.tables["spectrum"], member=k).smoothed(at, width)
        height = 0.92 * np.log10(np.maximum(values, _LEAST) / _LEAST) / np.log10(_MANY / _LEAST)
        shown = len(labels) - 1 - k + np.minimum(height, 1.0)
        axes.fill_between(at, len(labels) - 1 - k, shown, color=lighter(tone, 0.7), linewidth=0)
        axes.plot(at, shown, color=tone, label=label, linewidth=1.3, gid=f"density: {label}")
    axes.set_xlim(at[0], at[-1])
    axes.set_ylim(-0.06, len(labels))
    axes.set_yticks(np.arange(len(labels))[::-1] + 0.3, labels)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9.5)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("eigenvalue")
    axes.set_title("All eigenvalues")
    axes = sheet.figure.add_subplot(grid[1], label="largest")
    _rows(axes, members["largest"], members.get("largest_clean"), tones, digits=1)
    axes.set_xlabel("eigenvalue")
    axes.set_title("The largest one")
    if instances:
        axes = sheet.figure.add_subplot(grid[2], label="nonlinearity")
        _rows(axes, members["nonlinearity"], None, tones, digits=3)
        axes.set_xlabel("nats")
        axes.set_title("Off the tangent")
    return sheet.figure


def _rows(axes: Axes, values: np.ndarray, others: np.ndarray | None, tones: Sequence[str], *, digits: int) -> None:
    """One dot a member, with its value, and an open one for another value; the first member is at the top."""
    y = np.arange(len(values))[::-1] + 0.3
    for place, value, other, tone in zip(
        y, values, np.full(len(values), np.nan) if others is None else others, tones, strict=True
    ):
        ends = [value]
        if np.isfinite(other):
            axes.plot([other, value], [place, place], color=lighter(tone, 0.55), linewidth=2)
            # Larger, so that it is seen around a dot in the same place.
            ring: dict[str, Any] = {"markersize": 10, "markeredgewidth": 1.6, "markerfacecolor": "white"}
            axes.plot([other], [place], "o", linestyle="", markeredgecolor=tone, zorder=2, **ring)
            ends.append(other)
        axes.plot([value], [place], "o", color=tone, markersize=7, linestyle="", zorder=3)
        axes.annotate(
            f"{value:.{digits}f}", (max(ends), place), xytext=(9, 0), textcoords="offset points", va="center",
            fontsize=8.5,
        )  # fmt: skip
    axes.set_ylim(-0.06, len(values))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    top = np.nanmax(values if others is None else np.concatenate([values, others]))
    axes.set_xlim(0, 1.32 * float(top))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
