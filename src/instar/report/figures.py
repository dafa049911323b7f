"""Pictures of runs, made from their files alone: ``run.json``, ``log.jsonl``, ``instances/`` and ``evaluations/``.

Every function returns a matplotlib figure that belongs to no window and no global list: save it with
`instar.report.style.write_png`, or with its own ``savefig`` as SVG or PDF. Epochs are counted from 1 in pictures, as in
the progress display; the files count from 0.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from instar.errors import UserError
from instar.evaluate.intervals import wilson
from instar.evaluate.record import Record
from instar.report.distributions import TOP, Survival, losses, survival_counts, top_share, unevenness_by_epoch
from instar.report.stored import StoredRun, Unavailable, names, read, read_all
from instar.report.style import (
    EASY,
    GREY,
    HARD,
    INK,
    PALE,
    RUNS,
    WIDTH,
    Sheet,
    epoch_axis,
    lighter,
    percent,
    percent_axis,
    styled,
)

Run = str | Path | StoredRun

_MOST_RIDGES = 10
_MOST_BANDS = 16
_FLOOR = 1e-6
_DENSITY_BINS = 90


@styled
def learning_curves(runs: Sequence[Run] | Run) -> Figure:
    """Accuracy, loss and learning rate of one or several runs, epoch by epoch.

    Robust accuracy is shown on held-out images (margin PGD-10, with Wilson's 95 % interval) and on the training batches
    (the training attack, augmented images, weights in motion). Both curves drift apart when a run overfits. A dot marks
    the best checkpoint: the first epoch with the highest held-out robust accuracy.

    Args:
        runs: Run folders; one is enough.

    Returns:
        The figure. Its axes are labelled ``robust``, ``clean``, ``loss`` and ``rate``; every line carries
        ``<what>: <run>`` as its gid.

    Raises:
        UserError: A file is missing or damaged, or no run has finished an epoch.
    """
    stored = read_all(runs)
    for run in stored:
        if not run.log:
            raise Unavailable(f"{run.folder} has no finished epoch yet: there is nothing to draw")
    named = names(stored)
    sheet = Sheet(
        5.3,
        title=_best_title(stored, named),
        subtitle="Robust accuracy on images held out of the training set decides which checkpoint is kept (dot). A widening "
        "gap to the training curve is a sign of overfitting; the gap itself is not, because the two attacks differ.",
        footer=[
            source_line(stored),
            f"Held out: {_rule(stored)}; bands are 95 % Wilson intervals, each for its run alone. Training: last iterate of "
            "the training attack on augmented images, averaged over the epoch while the weights move.",
        ],
    )
    grid = sheet.grid(2, 2, height_ratios=(2.6, 1.4), width_ratios=(1.2, 1), hspace=0.34, wspace=0.17)
    panels = {
        label: sheet.figure.add_subplot(place, label=label)
        for label, place in zip(("robust", "clean", "loss", "rate"), grid, strict=True)
    }
    longest = max(len(run.log) for run in stored)
    highest, clean_ends = 0.0, [1.0, 0.0]
    for number, (run, name) in enumerate(zip(stored, named, strict=True)):
        colour = RUNS[number % len(RUNS)]
        line = {key: np.array([entry[key] for entry in run.log], dtype=float) for key in run.log[0] if key in _DRAWN}
        x = line["epoch"] + 1
        marker = {"marker": "o", "markersize": 3.2} if len(x) <= 15 else {}
        dashed = {"linestyle": (0, (4, 2)), "linewidth": 1.2, "alpha": 0.9}
        best = run.best
        assert best is not None  # noqa: S101: the log is not empty
        for label, key in (("robust", "selection_robust"), ("clean", "selection_clean")):
            ends = [wilson(round(share * run.held_out), run.held_out) for share in line[key]]
            low, high = np.array(ends).T
            if label == "clean":
                clean_ends = [min(clean_ends[0], float(low.min())), max(clean_ends[1], float(high.max()))]
            axes = panels[label]
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0, gid=f"interval {label}: {name}")
            axes.plot(x, line[key], color=colour, gid=f"held-out {label}: {name}", **marker)
            axes.plot(
                best["epoch"] + 1,
                best[key],
                "o",
                markersize=8.5,
                color=colour,
                markeredgecolor="white",
                markeredgewidth=1.6,
                zorder=5,
                gid=f"best {label}: {name}",
            )
        panels["robust"].plot(x, line["train_robust"], color=colour, gid=f"training robust: {name}", **dashed)
        panels["loss"].plot(x, line["train_loss"], color=colour, gid=f"loss: {name}", **marker)
        # Runs mostly share the schedule: later lines are thinner, so that equal curves can be seen to be equal.
        wide = 1.8 + 2.0 * (len(stored) - 1 - number)
        panels["rate"].plot(x, line["lr"], color=colour, linewidth=wide, gid=f"rate: {name}")
        highest = max(highest, float(line["train_robust"].max()), float(line["selection_robust"].max()))
        _mark_changes(panels["loss"], run, colour, longest)
    for axes, title in zip(
        panels.values(),
        ("Robust accuracy", "Clean accuracy, held out", "Training loss", "Learning rate at the end of the epoch"),
        strict=True,
    ):
        axes.set_title(title)
        epoch_axis(axes, longest, label=axes.get_label() in ("loss", "rate"))
    # Room above for the interval, which is widest where few images are held out.
    percent_axis(panels["robust"], highest=1.18 * highest + 0.05)
    percent_axis(panels["clean"])
    panels["clean"].set_ylim(np.floor(10 * clean_ends[0]) / 10, min(1.0, np.ceil(20 * clean_ends[1]) / 20))
    for label, key in (("loss", "train_loss"), ("rate", "lr")):
        values = [entry[key] for run in stored for entry in run.log]
        panels[label].set_ylim(min(0.0, 1.15 * min(values)), 1.15 * max(*values, 1e-9))
        panels[label].locator_params(axis="y", nbins=4)
    panels["loss"].set_ylabel("nats" if len({run.title for run in stored}) == 1 else "nats, each method's own")
    _curve_legend(panels["robust"], stored, named)
    return sheet.figure


_DRAWN = ("epoch", "lr", "train_loss", "train_robust", "selection_clean", "selection_robust")


def _best_title(stored: Sequence[StoredRun], named: Sequence[str]) -> str:
    """Who is best by held-out robust accuracy, without a claim that the interval does not carry."""
    scores = [(run.best or {})["selection_robust"] for run in stored]
    if len(stored) == 1:
        best = stored[0].best or {}
        return (
            f"{named[0]} on {stored[0].data}: {percent(best['selection_robust'])} robust and "
            f"{percent(best['selection_clean'])} clean accuracy at best (epoch {best['epoch'] + 1})"
        )
    order = sorted(range(len(stored)), key=lambda k: -scores[k])
    parts = [f"{named[k]} {percent(scores[k])}" for k in order[:4]]
    return f"Best robust accuracy on held-out images: {', '.join(parts)}{' …' if len(order) > 4 else ''}"


def _rule(stored: Sequence[StoredRun]) -> str:
    rules = dict.fromkeys(f"{run.config['selection'].get('rule', 'attack')}, n = {run.held_out:,}" for run in stored)
    return " / ".join(rules)


def source_line(stored: Sequence[StoredRun]) -> str:
    """One line of sources: data, model, threat, n, seed, precision and version; what differs between runs is listed once each."""
    columns = (
        [run.data for run in stored],
        [run.model for run in stored],
        [run.threat or "no attack" for run in stored],
        [f"{run.config['data']['train_images']:,} training images" for run in stored],
        [f"seed {run.seed}" for run in stored],
        [str(run.config.get("precision", "")) for run in stored],
        [f"Instar {run.config.get('versions', {}).get('instar', '?')}" for run in stored],
    )
    return " · ".join(" / ".join(dict.fromkeys(column)) for column in columns if any(column))


def _mark_changes(axes: Axes, run: StoredRun, colour: str, longest: int) -> None:
    """A vertical line where another loss begins to be minimised, such as the end of GAIRAT's burn-in."""
    for epoch, loss in run.changes:
        if epoch >= longest:
            continue
        axes.axvline(epoch + 0.5, color=colour, linewidth=1, linestyle=(0, (1, 2)), zorder=1, gid=f"change: {epoch}")
        axes.annotate(
            textwrap.fill(textwrap.shorten(f"from here on {loss}", 90, placeholder=" …"), 34),
            (epoch + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2) if epoch < 0.55 * longest else (-4, -2),
            textcoords="offset points",
            ha="left" if epoch < 0.55 * longest else "right",
            va="top",
            fontsize=7,
            color=colour,
        )


def _change_line(run: StoredRun, epochs: int) -> str:
    """What the dotted lines in pictures of one run mean; empty if there is none among the first `epochs`."""
    seen = [(epoch, loss) for epoch, loss in run.changes if epoch < epochs]
    told = "; ".join(f"from epoch {epoch + 1} on it is {textwrap.shorten(loss, 90, placeholder=' …')}" for epoch, loss in seen)
    return f" Dotted line: the loss changes; {told}." if told else ""


def _curve_legend(axes: Axes, stored: Sequence[StoredRun], named: Sequence[str]) -> None:
    handles: list[Any] = []
    if len(stored) > 1:
        handles += [Line2D([], [], color=RUNS[k % len(RUNS)], label=name) for k, name in enumerate(named)]
    shade = RUNS[0] if len(stored) == 1 else GREY
    handles += [
        Line2D([], [], color=shade, label="held out"),
        Line2D([], [], color=shade, linestyle=(0, (4, 2)), linewidth=1.2, label="training"),
        Line2D([], [], color=shade, marker="o", linestyle="", markersize=7, label="best checkpoint"),
    ]
    axes.legend(handles=handles, loc="upper left", ncols=2 if len(handles) > 3 else 3, columnspacing=1.4, borderaxespad=0.1)


@styled
def survival(run: Run) -> Figure:
    """GAIRAT's view of a run: how many iterates of the training attack each training image survives, by epoch.

    κ = number of the K inspected iterates x⁰ … x^{K−1} that are still classified correctly. Instances with κ = K are
    *guarded*, instances with κ = 0 *attackable*. Only instances trained on in the epoch count.

    Args:
        run: Run folder.

    Returns:
        The figure. Axes ``survival`` holds a stack of bars for each epoch, from κ = 0 at the bottom; axes ``last`` the
        distribution of the last epoch beside that of the first.

    Raises:
        UserError: No instance table is stored, one is damaged, or the attack takes no step.

    Source: Zhang et al. 2021 (GAIRAT), Section 3 and Figure 3, which shows κ by epoch.
    """
    stored = read(run)
    found = survival_counts(stored)
    bands = _bands(found)
    last, epoch = -1, int(found.epochs[-1]) + 1
    steps = int(found.steps[last])
    sheet = Sheet(
        4.2,
        title=f"{stored.title} on {stored.data}, epoch {epoch}: {percent(found.guarded[last])} of training images guarded, "
        f"{percent(found.attackable[last])} attackable",
        subtitle=f"κ counts the iterates of the training attack that are still classified correctly. Guarded: all {steps} "
        "of them (κ = K). Attackable: none (κ = 0)." + _change_line(stored, epoch),
        footer=[
            source_line([stored]),
            f"n = {_range(found.n)} images trained on in each epoch, augmented, one attack each with the weights of that "
            "step." + ("" if found.known else f" K = {steps} is the largest κ seen: the stored method cannot be read."),
        ],
        right=0.1,
    )
    grid = sheet.grid(1, 2, width_ratios=(2.1, 1), wspace=0.3)
    _survival_stack(sheet.figure.add_subplot(grid[0], label="survival"), found, bands, stored)
    _survival_last(sheet.figure.add_subplot(grid[1], label="last"), found, bands)
    return sheet.figure


def _bands(found: Survival) -> list[tuple[str, np.ndarray, str]]:
    """Name, share by epoch (E,) and colour of each band, from attackable to guarded.

    One band for each κ where K stays the same and is small, else one for each tenth of κ / K.
    """
    steps = found.steps
    pale = LinearSegmentedColormap.from_list("pale", ["#EFB58A", "#EEECE8", "#9CC6E0"])
    if (steps == steps[0]).all() and steps[0] <= _MOST_BANDS:
        between = [(f"{kappa}", found.shares[:, kappa]) for kappa in range(1, int(steps[0]))]
    else:
        relative = np.arange(found.counts.shape[1])[None, :] / steps[:, None]
        inside = (relative > 0) & (relative < 1)
        # Tenths (0, 0.1], (0.1, 0.2], ...; rounded, because 0.3 · 10 is not 3 for a computer.
        tenth = np.ceil(np.round(relative * 10, 9)).astype(int)
        between = [
            (f"≤ {k / 10:.1f} K" if k < 10 else "< K", np.where(inside & (tenth == k), found.shares, 0.0).sum(1))
            for k in range(1, 11)
        ]
    shades = [to_hex(pale(place)) for place in np.linspace(0, 1, max(len(between), 1))]
    top = f"{steps[0]}" if (steps == steps[0]).all() else "K"
    return [
        ("0", found.attackable, HARD),
        *((name, share, shade) for (name, share), shade in zip(between, shades, strict=False)),
        (top, found.guarded, EASY),
    ]


def _survival_stack(axes: Axes, found: Survival, bands: Sequence[tuple[str, np.ndarray, str]], run: StoredRun) -> None:
    x = found.epochs + 1
    height = np.zeros(len(x))
    few = len(x) <= 40
    for name, share, colour in bands:
        axes.bar(
            x,
            share,
            width=0.86 if few else 1.0,
            bottom=height,
            color=colour,
            # A hairline separates bands while there is room; without it, bars of many epochs join to an area.
            linewidth=0.5 if few else 0,
            edgecolor="white" if few else "none",
            label=f"κ = {name}",
        )
        height = height + share
    epoch_axis(axes, int(x.max()))
    percent_axis(axes)
    axes.grid(visible=False)
    axes.set_title("Training images by κ, epoch by epoch")
    for epoch, _ in run.changes:
        if epoch < x.max():
            axes.axvline(epoch + 0.5, color=INK, linewidth=1, linestyle=(0, (1, 2)))


def _survival_last(axes: Axes, found: Survival, bands: Sequence[tuple[str, np.ndarray, str]]) -> None:
    """The last epoch as horizontal bars in the order of the stack, which makes it the stack's legend too."""
    y = np.arange(len(bands))
    shares = np.array([share[-1] for _, share, _ in bands])
    axes.barh(y, shares, height=0.82, color=[colour for *_, colour in bands], gid="last")
    most = float(shares.max())
    if len(found.epochs) > 1:
        before = np.array([share[0] for _, share, _ in bands])
        most = max(most, float(before.max()))
        axes.plot(
            before, y, linestyle="", marker="|", markersize=11, markeredgewidth=1.6, color=INK, gid="first", zorder=4
        )
        axes.legend(
            handles=[
                Line2D([], [], linestyle="", marker="|", markersize=9, markeredgewidth=1.6, color=INK, label="first epoch")
            ],
            loc="center right",
            handlelength=0.8,
        )
    limit = min(1.0, 1.3 * most)
    for place in (0, len(bands) - 1):
        word = "attackable" if place == 0 else "guarded"
        inside = shares[place] > 0.55 * limit
        axes.annotate(
            f"{word} {percent(shares[place])}",
            (shares[place], place),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color="white" if inside else bands[place][2],
            zorder=5,
        )
    axes.set_yticks(y, [name for name, *_ in bands])
    axes.set_ylabel("κ", rotation=0, labelpad=10)
    axes.set_ylim(-0.6, len(bands) - 0.4)
    percent_axis(axes, which="x", highest=limit)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.set_title(f"Epoch {int(found.epochs[-1]) + 1}")


def _range(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


@styled
def unevenness(run: Run) -> Figure:
    """How unevenly the training loss lies on the training images, by epoch.

    Each ridge is the distribution of the per-image loss in one epoch, on a logarithmic axis; the tenth with the highest
    loss is coloured. Beside it, the share of the total loss that this tenth carries: 10 % if all images were equal.

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
    epoch = int(found.epochs[-1]) + 1
    title = f"{stored.title} on {stored.data}: the hardest tenth of the training images carries "
    title += f"{percent(found.top_share[-1])} of the loss in epoch {epoch}"
    if len(found.epochs) > 1:
        title += f", {percent(found.top_share[0])} in epoch {int(found.epochs[0]) + 1}"
    chosen = np.unique(np.linspace(0, len(found.epochs) - 1, min(len(found.epochs), _MOST_RIDGES)).round().astype(int))
    drawn = [losses(stored, int(found.epochs[k])) for k in chosen]
    low = min(float(np.clip(values, _FLOOR, None).min()) for values in drawn)
    below = sum(int((values < _FLOOR).sum()) for values in drawn)
    sheet = Sheet(
        max(2.6, 1.2 + 0.42 * len(chosen)),
        title=title,
        subtitle="Each row is the distribution of the loss over training images in one epoch, scaled to its own height (tick: "
        "median, diamond: mean). The loss is what the method minimises, its instance weights included."
        + _change_line(stored, epoch),
        footer=[
            source_line([stored]),
            f"n = {_range(found.n)} images trained on in each epoch, augmented, with the weights of that step"
            + (f"; {below:,} values below {_FLOOR:g} are drawn there." if below else "."),
        ],
        left=0.5,
    )
    grid = sheet.grid(1, 2, width_ratios=(1.7, 1), wspace=0.2)
    _ridges(sheet.figure.add_subplot(grid[0], label="loss"), drawn, found.epochs[chosen] + 1, low)
    axes = sheet.figure.add_subplot(grid[1], label="share")
    x = found.epochs + 1
    axes.axhline(TOP, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
    axes.annotate(
        "all equal", (1, TOP), xycoords=("axes fraction", "data"), xytext=(0, -3), textcoords="offset points", ha="right",
        va="top", fontsize=8, color=GREY,
    )  # fmt: skip
    axes.plot(x, found.top_share, color=HARD, marker="o" if len(x) <= 40 else None, markersize=4, gid="share")
    axes.annotate(
        percent(found.top_share[-1]), (x[-1], found.top_share[-1]), xytext=(0, 7), textcoords="offset points",
        ha="right" if len(x) > 1 else "center", fontsize=9, fontweight="bold", color=HARD,
    )  # fmt: skip
    epoch_axis(axes, int(x.max()))
    percent_axis(axes, highest=max(0.25, 1.2 * float(np.nanmax(found.top_share))) if not _empty(found.top_share) else 1.0)
    axes.set_title("Loss carried by the hardest tenth")
    for start, _ in stored.changes:
        if start < x.max():
            axes.axvline(start + 0.5, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    return sheet.figure


def _empty(values: np.ndarray) -> bool:
    return bool(np.isnan(values).all())


def _ridges(axes: Axes, drawn: Sequence[np.ndarray], epochs: np.ndarray, low: float) -> None:
    """Densities of log₁₀ loss, the first epoch on top; the area of the hardest tenth has another colour."""
    high = max(float(values.max()) for values in drawn)
    start = np.log10(low)
    stop = max(float(np.log10(max(high, low))), start + 0.1)
    edges = np.linspace(start, stop, _DENSITY_BINS + 1)
    rows = len(drawn)
    tall = 0.9
    for row, (values, epoch) in enumerate(zip(drawn, epochs, strict=True)):
        logarithms = np.log10(np.clip(values, _FLOOR, None))
        limit = float(np.quantile(logarithms, 1 - TOP))
        # The limit is an edge of its own, so that exactly the hardest tenth is coloured.
        split = np.unique(np.append(edges, limit)) if start < limit < stop else edges
        counts, _ = np.histogram(logarithms, bins=split)
        density = counts / np.diff(split) / len(values)
        density = tall * density / np.histogram(logarithms, bins=edges, density=True)[0].max()
        baseline = rows - 1 - row
        hard = int(np.searchsorted(split, limit))
        order = 2 + row
        for part, colour in ((slice(0, hard), lighter(EASY, 0.55)), (slice(hard, None), HARD)):
            heights = density[part]
            if not len(heights):
                continue
            borders = split[part.start : (part.stop if part.stop is not None else len(split)) + 1]
            axes.stairs(
                baseline + np.minimum(heights, tall), 10**borders, baseline=baseline, fill=True, color=colour,
                linewidth=0, zorder=order, gid=f"ridge {epoch}",
            )  # fmt: skip
        axes.stairs(
            baseline + np.minimum(density, tall), 10**split, baseline=baseline, color="white", linewidth=0.8, zorder=order
        )
        median, mean = max(float(np.median(values)), _FLOOR), max(float(values.mean()), _FLOOR)
        axes.plot(
            [median, median], [baseline, baseline + 0.3], color=INK, linewidth=1.6, zorder=order + 0.5, gid=f"median {epoch}"
        )
        axes.plot(
            mean, baseline + 0.13, "D", markersize=4.2, color="white", markeredgecolor=INK, markeredgewidth=1, zorder=order + 0.6,
            gid=f"mean {epoch}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
    axes.set_xlim(10 ** (start - 0.02 * (stop - start)), 10 ** (stop + 0.02 * (stop - start)))
    axes.set_ylim(-0.12, rows - 1 + tall + 0.1)
    axes.set_yticks(range(rows), [str(epoch) for epoch in reversed(epochs)])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.set_ylabel("epoch")
    axes.set_xlabel("training loss of an image, nats")
    axes.set_title("Distribution of the loss over images")
    axes.legend(
        handles=[Patch(color=HARD, label="hardest tenth"), Patch(color=lighter(EASY, 0.55), label="the others")],
        loc="upper left", bbox_to_anchor=(0, 1.0), borderaxespad=0, handlelength=1, fontsize=8,
    )  # fmt: skip


def _plain_number(value: float, position: int | None = None) -> str:
    """Tick labels of a logarithmic axis: 0.01, 1, 10, and powers where that would be long.

    Example:
        >>> _plain_number(0.01), _plain_number(10.0), _plain_number(1e-5)
        ('0.01', '10', '10⁻⁵')
    """
    if 1e-3 <= value <= 1e4:
        return f"{value:g}"
    return "10" + f"{round(np.log10(value)):d}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@styled
def instance_curves(runs: Sequence[Run] | Run) -> Figure:
    """What runs do to their training images, epoch by epoch and side by side: guarded, attackable, and who carries the loss.

    Args:
        runs: Run folders; each must attack its training images.

    Returns:
        The figure, with axes ``guarded``, ``attackable`` and ``share``; every line carries the run's name as its gid.

    Raises:
        UserError: A run has no instance table, one is damaged, or an attack takes no step.
    """
    stored = read_all(runs)
    named = names(stored)
    counted = [survival_counts(run) for run in stored]
    uneven = [unevenness_by_epoch(run) for run in stored]
    sheet = Sheet(
        3.3,
        title="Guarded in the last epoch: "
        + ", ".join(f"{name} {percent(found.guarded[-1])}" for name, found in zip(named, counted, strict=True)),
        subtitle="Training images of which every inspected iterate of the training attack is classified correctly (guarded, "
        "κ = K), of which none is (attackable, κ = 0), and the share of the loss that the hardest tenth of them carries.",
        footer=[
            source_line(stored),
            "Each run is measured by its own training attack and its own loss, instance weights included, on augmented images: "
            "methods that attack another objective are not comparable in the first two panels.",
        ],
    )
    grid = sheet.grid(1, 3, wspace=0.28)
    titles = ("Guarded", "Attackable", "Loss carried by the hardest tenth")
    longest = max(int(found.epochs[-1]) for found in counted) + 1
    for column, (label, title) in enumerate(zip(("guarded", "attackable", "share"), titles, strict=True)):
        axes = sheet.figure.add_subplot(grid[column], label=label)
        for number, (name, counts, spread) in enumerate(zip(named, counted, uneven, strict=True)):
            y = {"guarded": counts.guarded, "attackable": counts.attackable, "share": spread.top_share}[label]
            marker = "o" if len(y) <= 15 else None
            colour = RUNS[number % len(RUNS)]
            axes.plot(counts.epochs + 1, y, color=colour, marker=marker, markersize=3.5, label=name, gid=name)
        epoch_axis(axes, longest)
        highest = max(float(np.nanmax(line.get_ydata(), initial=0.05)) for line in axes.lines)
        percent_axis(axes, highest=1.3 * highest)
        axes.set_title(title)
        if label == "share":
            axes.axhline(TOP, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
        if column == 0:
            axes.legend(loc="upper left", borderaxespad=0.1)
    return sheet.figure


@styled
def evaluation_bars(records: Sequence[Record], *, labels: Sequence[str] | None = None) -> Figure:
    """Accuracy under each attack with Wilson's 95 % intervals, checkpoints and runs side by side.

    A second panel shows by how much PGD on cross-entropy overstates robustness: its accuracy minus AutoAttack's (margin
    PGD's where AutoAttack was not run), on the same images, with the 95 % interval of the paired difference.

    Args:
        records: Evaluations in one threat model on the same images. Checkpoints of one model share a colour: the last one is
            hollow.
        labels: Name of the model of each record; None takes what the record says.

    Returns:
        The figure, with axes ``accuracy`` and, if any record has the gap, ``gap``.

    Raises:
        UserError: No record, or records of different threat models or images.
    """
    shown = list(records)
    if not shown:
        raise UserError("there is no evaluation to draw: instar evaluate makes one")
    setting = [(item.protocol["norm"], item.protocol["eps"], item.protocol["images_sha256"]) for item in shown]
    if len(set(setting)) > 1:
        raise UserError(
            "evaluations in one picture must share norm, eps and images; got "
            + " and ".join(dict.fromkeys(f"{r.protocol['norm']} {r.protocol['eps']} on {r.protocol['images']}" for r in shown))
        )
    models = [_model_name(item) for item in shown] if labels is None else list(labels)
    if len(models) != len(shown):
        raise UserError(f"labels must name each of the {len(shown)} evaluations; got {len(models)}")
    full = [_full_name(name, item) for name, item in zip(models, shown, strict=True)]
    columns = _columns(shown)
    gaps = [_gap(item) for item in shown]
    anywhere = any(gap is not None for gap in gaps)
    protocol = shown[0].protocol
    usual = _usual(shown, gaps)
    sheet = Sheet(
        max(3.4, 0.32 * len(shown) + 1.2),
        title=_evaluation_title(shown, full, gaps),
        subtitle="Accuracy on the same test images under each attack, weak to strong; whiskers are 95 % Wilson intervals."
        + (" Right: by how much PGD on cross-entropy overstates robustness." if anywhere else ""),
        footer=[
            f"{protocol['norm']} {protocol['eps']} · {protocol['images']}, n = {shown[0].n:,} · seed {protocol['seed']} · "
            f"{protocol['precision']} · BatchNorm {protocol['bn_mode']} · suite "
            f"{' / '.join(dict.fromkeys(item.suite for item in shown))} · Instar {protocol['versions']['instar']}",
            "; ".join(dict.fromkeys(f"{item.checkpoint}: {item.protocol['checkpoint']['rule']}" for item in shown))
            + ". Robust: right on the clean image and on every inspected iterate."
            + (" Gap: paired on the same images, 95 % interval." if anywhere else "")
            + ("" if usual is None else f" Grey: up to {100 * usual:.1f} points is usual ({_source(gaps)})."),
        ],
        right=0.3,
    )
    widths = (max(2.0, 0.55 * len(columns)), 1) if anywhere else (1,)
    grid = sheet.grid(1, len(widths), width_ratios=widths, wspace=0.42)
    axes = sheet.figure.add_subplot(grid[0], label="accuracy")
    looks = _looks(models, shown)
    _accuracy_bars(axes, shown, full, columns, looks)
    if anywhere:
        _gap_dots(sheet.figure.add_subplot(grid[1], label="gap"), full, gaps, looks, usual=usual)
    return sheet.figure


def _model_name(record: Record) -> str:
    """The method of the run that was evaluated, or the name of the weights."""
    target = Path(record.target)
    try:
        return read(target).title if target.is_dir() else target.stem or record.target
    except UserError:
        return target.name


def _full_name(name: str, record: Record) -> str:
    return f"{name} ({record.checkpoint})" if record.checkpoint in ("best", "last") else name


def _columns(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Name and title of each group of bars: clean, the attacks in order, and the worst case where AutoAttack is missing."""
    found = {name: score.title for record in records for name, score in record.scores.items() if name != "worst_case"}
    if "autoattack" not in found:
        found["worst_case"] = records[0].scores["worst_case"].title
    return list(found.items())


def _gap(record: Record) -> Any:
    """The finding about PGD against a stronger attack, or None."""
    by_check = {finding.check: finding for finding in record.findings}
    return by_check.get("pgd_minus_autoattack") or by_check.get("pgd_minus_margin")


def _usual(records: Sequence[Record], gaps: Sequence[Any]) -> float | None:
    """The gap that sound models show; None where it is not known: the thresholds were taken from CIFAR-10, Linf 8/255."""
    normal = {gap.normal for gap in gaps if gap is not None}
    setting = {(r.protocol["data"]["name"], r.protocol["norm"], r.protocol["eps"]) for r in records}
    return normal.pop() if len(normal) == 1 and setting == {("cifar10", "Linf", "8/255")} else None


def _source(gaps: Sequence[Any]) -> str:
    return next(str(gap.source) for gap in gaps if gap is not None)


def _evaluation_title(records: Sequence[Record], full: Sequence[str], gaps: Sequence[Any]) -> str:
    def strongest(record: Record) -> tuple[str, float]:
        name = "autoattack" if "autoattack" in record.scores else "worst_case"
        return ("AutoAttack" if name == "autoattack" else "the strongest attack"), record.scores[name].accuracy

    first = max(range(len(records)), key=lambda k: strongest(records[k])[1])
    attack, accuracy = strongest(records[first])
    title = f"{full[first]} keeps {percent(accuracy)} under {attack}"
    told = [k for k in range(len(records)) if gaps[k] is not None]
    widest = max(told, key=lambda k: gaps[k].value, default=None)
    if widest is None or gaps[widest].value <= 0:
        return title
    whose = "its robustness" if len(records) == 1 else full[widest]
    points = f"{100 * gaps[widest].value:.1f}\N{NO-BREAK SPACE}points"
    return f"{title}; PGD on cross-entropy overstates {whose} by {points}"


def _looks(models: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Face and edge of each record's bars: a colour for the model, hollow for its last checkpoint."""
    order = list(dict.fromkeys(models))
    looks = []
    for model, record in zip(models, records, strict=True):
        colour = RUNS[order.index(model) % len(RUNS)]
        hollow = record.checkpoint == "last" and any(
            other.checkpoint != "last" for name, other in zip(models, records, strict=True) if name == model
        )
        looks.append({"edgecolor": colour, "facecolor": lighter(colour, 0.72) if hollow else colour})
    return looks


def _accuracy_bars(
    axes: Axes,
    records: Sequence[Record],
    full: Sequence[str],
    columns: Sequence[tuple[str, str]],
    looks: Sequence[dict[str, Any]],
) -> None:
    width = 0.84 / len(records)
    figure = axes.get_figure()
    assert figure is not None  # noqa: S101: the axes were just made in one
    # Points that a bar is wide; a number of two digits takes 1.3 times the size of its font, one with a decimal 2.3 times.
    room = 0.88 * width * 72 * WIDTH * axes.get_position().width / (len(columns) + 0.1)
    digits = 1 if room > 2.4 * 6.5 else 0
    size = min(8.0, room / (2.4 if digits else 1.35))
    for k, (record, name, look) in enumerate(zip(records, full, looks, strict=True)):
        for group, (column, _) in enumerate(columns):
            score = record.scores.get(column)
            if score is None:
                continue
            x = group + (k - (len(records) - 1) / 2) * width
            low, high = score.interval
            axes.bar(x, score.accuracy, width=0.88 * width, linewidth=1.1, gid=f"{column}: {name}", **look)
            axes.plot([x, x], [low, high], color=INK, linewidth=1, solid_capstyle="butt", gid=f"interval {column}: {name}")
            if size >= 5:
                # At the foot, where no whisker crosses it; a bar that is too low for it has it above.
                inside = low > 0.05
                hollow = look["facecolor"] != look["edgecolor"]
                axes.annotate(
                    f"{100 * score.accuracy:.{digits}f}", (x, 0 if inside else high), xytext=(0, 4 if inside else 2),
                    textcoords="offset points", ha="center", fontsize=size,
                    color=INK if hollow or not inside else "white", gid=f"value {column}: {name}",
                )  # fmt: skip
    axes.set_xticks(range(len(columns)), [textwrap.fill(title, 12) for _, title in columns])
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    percent_axis(axes)
    axes.set_title("Accuracy under attack")
    if len(records) > 1:
        axes.legend(
            handles=[Patch(label=name, linewidth=1.1, **look) for name, look in zip(full, looks, strict=True)],
            loc="upper right", ncols=2 if len(records) > 3 else 1, handlelength=1.1, columnspacing=1.2, borderaxespad=0,
        )  # fmt: skip


def _gap_dots(
    axes: Axes, full: Sequence[str], gaps: Sequence[Any], looks: Sequence[dict[str, Any]], *, usual: float | None
) -> None:
    rows = [(name, gap, look) for name, gap, look in zip(full, gaps, looks, strict=True) if gap is not None]
    z = 1.959964
    right = 1.0
    for row, (name, gap, look) in enumerate(rows):
        y = len(rows) - 1 - row
        value, reach = 100 * gap.value, 100 * z * (gap.error or 0.0)
        axes.plot(
            [value - reach, value + reach], [y, y], color=look["edgecolor"], linewidth=1.8, solid_capstyle="butt",
            gid=f"interval gap: {name}",
        )  # fmt: skip
        axes.plot(
            value, y, "o", markersize=9, color=look["facecolor"], markeredgecolor=look["edgecolor"], gid=f"gap: {name}"
        )
        axes.annotate(
            f"{value:+.1f}", (value, y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=8.5, color=INK
        )
        right = max(right, value + reach)
    axes.axvline(0, color=GREY, linewidth=1)
    if usual is not None:
        axes.axvspan(0, 100 * usual, color=PALE, alpha=0.6, linewidth=0, zorder=0, gid="usual")
        axes.annotate(
            "usual", (100 * usual, -0.7), xytext=(-3, 3), textcoords="offset points", ha="right", fontsize=7.5, color=GREY
        )
        right = max(right, 100 * usual)
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 16) for name, *_ in reversed(rows)])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(-0.7, len(rows) - 0.2)
    axes.set_xlim(right=1.12 * right)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("points")
    whose = {"pgd_minus_autoattack": "PGD − AutoAttack", "pgd_minus_margin": "PGD − margin PGD"}
    axes.set_title(" / ".join(dict.fromkeys(whose[gap.check] for _, gap, _ in rows)))
