"""Runs as curves by epoch, side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from instar.errors import UserError
from instar.evaluate.intervals import wilson
from instar.report.distributions import TOP, survival_counts, unevenness_by_epoch
from instar.report.stored import LOGGED, StoredRun, UnavailableError, names, read_all
from instar.report.style import GREY, RUNS, Sheet, above, colours, epoch_axis, percent_axis, styled
from instar.report.wording import percent, ranking, short_loss, source_line

_MOST_MARKERS = 15
_DASHED: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.2}
_DOTTED = (0, (1, 2))


@styled
def learning_curves(
    runs: Sequence[str | Path | StoredRun] | str | Path | StoredRun, *, tones: Sequence[str] | None = None
) -> Figure:
    """Accuracy, loss and learning rate of one or several runs, epoch by epoch.

    Robust accuracy is shown on held-out images (margin PGD-10, with Wilson's 95 % interval) and on the training batches
    (the training attack, augmented images, weights in motion). A dot marks the best checkpoint: the first epoch with
    the highest held-out robust accuracy.

    Args:
        runs: Run folders; one is enough.
        tones: Their colours, ``#RRGGBB``; None is `instar.report.style.colours` of their names.

    Returns:
        The figure. Its axes are labelled ``robust``, ``clean``, ``loss`` and ``rate``; every line carries
        ``<what>: <run>`` as its gid.

    Raises:
        UserError: A file is missing or damaged, no run has finished an epoch, or there are more than 7 runs.
    """
    stored = few(read_all(runs))
    for run in stored:
        if not run.log:
            raise UnavailableError(f"{run.folder} has no finished epoch yet: there is nothing to draw")
    named = names(stored)
    tones = colours(named) if tones is None else tones
    sheet = Sheet(
        5.3,
        title=_title(stored, named),
        subtitle="Robust accuracy on images held out of the training set decides which checkpoint is kept (dot). "
        "A widening gap to the training curve is a sign of overfitting; the gap itself is not, because the two attacks "
        "differ.",
        footer=[
            source_line(stored),
            f"Held out: {_rule(stored)}; bands are 95 % Wilson intervals, each for its run alone. Training: last "
            "iterate of the training attack on augmented images, averaged over the epoch while the weights move.",
        ],
    )
    grid = sheet.grid(2, 2, height_ratios=(2.6, 1.4), width_ratios=(1.2, 1), hspace=0.34, wspace=0.17)
    titles = {
        "robust": "Robust accuracy",
        "clean": "Clean accuracy, held out",
        "loss": "Training loss",
        "rate": "Learning rate at the end of the epoch",
    }
    panels = {label: sheet.figure.add_subplot(place, label=label) for label, place in zip(titles, grid, strict=True)}
    longest = max(int(run.log[-1]["epoch"]) for run in stored) + 1
    for number, (run, name) in enumerate(zip(stored, named, strict=True)):
        x, line = _columns(run)
        colour = tones[number]
        marker: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(x) <= _MOST_MARKERS else {}
        for label in ("robust", "clean"):
            _held_out(panels[label], label, run, name, colour, marker)
        panels["robust"].plot(x, line["train_robust"], color=colour, gid=f"training robust: {name}", **_DASHED)
        panels["loss"].plot(x, line["train_loss"], color=colour, gid=f"loss: {name}", **marker)
        # Runs mostly share the schedule: of equal curves the later are thinner, so that all can be seen.
        equal = sum(np.array_equal(_columns(other)[1]["lr"], line["lr"]) for other in stored[number + 1 :])
        single: dict[str, Any] = {"marker": "o", "markersize": 5} if len(x) == 1 else {}
        panels["rate"].plot(x, line["lr"], color=colour, linewidth=1.8 + 1.7 * equal, gid=f"rate: {name}", **single)
        earlier = sum(len(other.changes) for other in stored[:number])
        _mark_changes(panels["loss"], run, colour, longest, whose=name if len(stored) > 1 else "", row=earlier)
    for label, axes in panels.items():
        axes.set_title(titles[label])
        epoch_axis(axes, longest, label=label in ("loss", "rate"))
    rows = _legend(panels["robust"], named, tones)
    low, high = zip(*(_ends(run, "robust") for run in stored), strict=True)
    training = max(entry["train_robust"] for run in stored for entry in run.log)
    percent_axis(panels["robust"], highest=above(max(*(float(end.max()) for end in high), training, 0.05), rows))
    low, high = zip(*(_ends(run, "clean") for run in stored), strict=True)
    percent_axis(panels["clean"])
    panels["clean"].set_ylim(
        math.floor(10 * min(float(end.min()) for end in low)) / 10,
        min(1.0, math.ceil(20 * max(float(end.max()) for end in high)) / 20),
    )
    for label, key in (("loss", "train_loss"), ("rate", "lr")):
        values = [entry[key] for run in stored for entry in run.log]
        panels[label].set_ylim(min(0.0, 1.15 * min(values)), 1.15 * max(*values, 1e-9))
        panels[label].locator_params(axis="y", nbins=4)
    panels["loss"].set_ylabel("nats" if len({run.title for run in stored}) == 1 else "nats, each method's own")
    return sheet.figure


@styled
def instance_curves(
    runs: Sequence[str | Path | StoredRun] | str | Path | StoredRun, *, tones: Sequence[str] | None = None
) -> Figure:
    """What runs do to their training images, side by side: how many are guarded, attackable, and who carries the loss.

    Args:
        runs: Run folders; each must attack its training images.
        tones: Their colours, ``#RRGGBB``; None is `instar.report.style.colours` of their names.

    Returns:
        The figure, with axes ``guarded``, ``attackable`` and ``share``; every line carries the run's name as its gid.

    Raises:
        UserError: A run has no instance table, one is damaged, an attack takes no step, or there are more than 7 runs.
    """
    stored = few(read_all(runs))
    named = names(stored)
    tones = colours(named) if tones is None else tones
    counted = [survival_counts(run) for run in stored]
    uneven = [unevenness_by_epoch(run) for run in stored]
    sheet = Sheet(
        3.3,
        title="Training images guarded in the last epoch: " + ranking(named, [found.guarded[-1] for found in counted]),
        subtitle="Training images of which every inspected iterate of the training attack is classified correctly "
        "(guarded, κ = K), of which none is (attackable, κ = 0), and the share of the loss that the hardest tenth of "
        "them carries.",
        footer=[
            source_line(stored),
            "Each run is measured by its own training attack and its own loss, instance weights included, on augmented "
            "images: the first two panels do not compare methods whose attacks have different objectives.",
        ],
    )
    grid = sheet.grid(1, 3, wspace=0.28)
    panels = {
        "guarded": ("Guarded", [found.guarded for found in counted]),
        "attackable": ("Attackable", [found.attackable for found in counted]),
        "share": ("Loss carried by the hardest tenth", [found.top_share for found in uneven]),
    }
    longest = max(int(found.epochs[-1]) for found in counted) + 1
    for place, (label, (title, shares)) in zip(grid, panels.items(), strict=True):
        axes = sheet.figure.add_subplot(place, label=label)
        for number, (name, found, share) in enumerate(zip(named, counted, shares, strict=True)):
            marker = "o" if len(share) <= _MOST_MARKERS else None
            axes.plot(found.epochs + 1, share, color=tones[number], marker=marker, markersize=3.5, label=name, gid=name)
        highest = max(float(np.nanmax(share, initial=0.05)) for share in shares)
        epoch_axis(axes, longest)
        percent_axis(axes, highest=above(highest, len(stored) if label == "guarded" else 0))
        axes.set_title(title)
        if label == "share":
            axes.axhline(TOP, color=GREY, linewidth=1, linestyle=(0, (3, 3)))
        if label == "guarded":
            axes.legend(loc="upper left", borderaxespad=0.1)
    return sheet.figure


def few(runs: list[StoredRun]) -> list[StoredRun]:
    """The runs, if their colours can be told apart.

    Raises:
        UserError: There are too many.
    """
    if len(runs) > len(RUNS):
        raise UserError(f"a picture can tell {len(RUNS)} runs apart at most; got {len(runs)}")
    return runs


def _columns(run: StoredRun) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Epochs from 1 (E,), and every logged field (E,)."""
    line = {key: np.array([entry[key] for entry in run.log], dtype=float) for key in LOGGED}
    return line["epoch"] + 1, line


def _ends(run: StoredRun, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of the held-out accuracy in each epoch: lower and upper ends (E,)."""
    n = run.held_out
    low, high = np.array([wilson(round(entry[f"selection_{label}"] * n), n) for entry in run.log]).T
    return low, high


def _held_out(axes: Axes, label: str, run: StoredRun, name: str, colour: str, marker: dict[str, Any]) -> None:
    x, line = _columns(run)
    low, high = _ends(run, label)
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0, gid=f"interval {label}: {name}")
    axes.plot(x, line[f"selection_{label}"], color=colour, gid=f"held-out {label}: {name}", **marker)
    best = run.best or run.log[0]
    axes.plot(
        [best["epoch"] + 1], [best[f"selection_{label}"]], "o", markersize=8.5, color=colour, markeredgecolor="white",
        markeredgewidth=1.6, zorder=5, gid=f"best {label}: {name}",
    )  # fmt: skip


def _title(stored: Sequence[StoredRun], named: Sequence[str]) -> str:
    best = [run.best or run.log[0] for run in stored]
    if len(stored) > 1:
        told = ranking(named, [line["selection_robust"] for line in best])
        return f"Best robust accuracy on held-out images: {told}"
    (line,) = best
    return (
        f"{named[0]} on {stored[0].data}: {percent(line['selection_robust'])} robust and "
        f"{percent(line['selection_clean'])} clean accuracy at best (epoch {line['epoch'] + 1})"
    )


def _rule(stored: Sequence[StoredRun]) -> str:
    rules = dict.fromkeys(f"{run.config['selection'].get('rule', 'attack')}, n = {run.held_out:,}" for run in stored)
    return " / ".join(rules)


def _mark_changes(axes: Axes, run: StoredRun, colour: str, longest: int, *, whose: str, row: int) -> None:
    """A vertical line where another loss begins to be minimised, such as the end of GAIRAT's burn-in.

    Args:
        axes: Where.
        run: Whose.
        colour: Its colour.
        longest: Epochs that are shown.
        whose: Name of the run where there are several, whose losses have no room beside one another; else empty.
        row: How many texts stand there already.
    """
    for epoch, loss in run.changes:
        if epoch >= longest:
            continue
        axes.axvline(epoch + 0.5, color=colour, linewidth=1, linestyle=_DOTTED, zorder=1, gid=f"change: {epoch}")
        early = epoch < 0.55 * longest
        told = textwrap.fill(f"from here on {short_loss(loss)}", 40, break_long_words=False)
        told = f"{whose}: another loss from here on" if whose else told
        axes.annotate(
            told, (epoch + 0.5, 0), xycoords=("data", "axes fraction"), xytext=(4 if early else -4, 3 + 9 * row),
            textcoords="offset points", ha="left" if early else "right", va="bottom", fontsize=7, color=colour,
        )  # fmt: skip


def _legend(axes: Axes, named: Sequence[str], tones: Sequence[str]) -> int:
    """Draw the legend; returns how many rows it has."""
    shade = tones[0] if len(named) == 1 else GREY
    several = zip(named, tones, strict=True) if len(named) > 1 else ()
    handles = [Line2D([], [], color=tone, label=name) for name, tone in several]
    handles += [
        Line2D([], [], color=shade, label="held out"),
        Line2D([], [], color=shade, label="training", linestyle=(0, (4, 2)), linewidth=1.2),
        Line2D([], [], color=shade, label="best checkpoint", marker="o", linestyle="", markersize=7),
    ]
    columns = 2 if len(handles) > 3 else 3
    axes.legend(handles=handles, loc="upper left", ncols=columns, columnspacing=1.4, borderaxespad=0.1)
    return math.ceil(len(handles) / columns)
