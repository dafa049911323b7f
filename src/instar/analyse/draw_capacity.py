"""Pictures of `instar.analyse.capacity`."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import extremes
from instar.report.style import EASY, HARD, RUNS, Sheet, epoch_axis, percent_axis, styled
from instar.report.wording import percent

_MOST_MARKERS = 40
_TRAINING = "#B9770E"


def draw(found: Found) -> dict[str, Figure]:
    """Errors of one run by epoch.

    Args:
        found: Result of `instar.analyse.capacity.measure`.

    Returns:
        ``"errors"``, with axes ``errors``.
    """
    return {"errors": _one(found)}


@styled
def _one(found: Found) -> Figure:
    table, figures = found.tables["epochs"], found.figures
    sheet = Sheet(
        3.4,
        title=f"{found.label}: its training attack still turns {percent(figures['train_adversarial'])} of the training "
        f"images after epoch {int(table['epoch'][-1]) + 1}",
        subtitle="An error that stays high on the very images that are trained on is a lack of capacity (or of "
        "training), not of data. Held-out images are attacked by margin PGD instead of the method's own attack: the "
        "distance between both lines is how much stronger that is, and what does not generalise.",
        footer=_sources(found),
        right=1.75,
    )
    axes = sheet.figure.add_subplot(sheet.grid(1, 1)[0], label="errors")
    lines = (
        ("held_out_adversarial", "held out, attacked", HARD, "-"),
        ("train_adversarial", "training, attacked", _TRAINING, "-"),
        ("held_out_natural", "held out, natural", EASY, "-"),
    )
    _lines(axes, [(table["epoch"], table[name], label, colour, style) for name, label, colour, style in lines])
    axes.set_title("Share of wrong predictions")
    return sheet.figure


def draw_compared(found: Found) -> dict[str, Figure]:
    """Errors of several runs by epoch.

    Args:
        found: Result of `instar.analyse.capacity.compare`.

    Returns:
        ``"errors"``, with axes ``training`` and ``held out``.
    """
    return {"errors": _several(found)}


@styled
def _several(found: Found) -> Figure:
    members, table = found.tables["members"], found.tables["epochs"]
    low, high = extremes(members["train_adversarial"])
    same = len(set(members["model"])) == 1
    what = "radius" if same else "size of the network" if len(set(members["threat"])) == 1 else "size and radius"
    sheet = Sheet(
        3.7,
        title=f"Error on attacked training images by {what}: from {percent(members['train_adversarial'][low])} "
        f"({_name(members, low)}) to {percent(members['train_adversarial'][high])} ({_name(members, high)})",
        subtitle="An error that stays high on the very images that are trained on is a lack of capacity: the ball "
        "around every image is too much to make flat. Each run meets its own training attack; held-out images meet the "
        "same margin PGD in all runs.",
        footer=_sources(found),
        right=0.1,
        bottom=0.5 + 0.22 * -(-len(members["label"]) // 2),
    )
    grid = sheet.grid(1, 2, wspace=0.2)
    names = [_name(members, k) for k in range(len(members["label"]))]
    for place, (column, title) in enumerate(
        (("train_adversarial", "Attacked training images"), ("held_out_adversarial", "Attacked held-out images"))
    ):
        axes = sheet.figure.add_subplot(grid[place], label=("training", "held out")[place])
        most = int(table["epoch"].max()) + 1
        for k, name in enumerate(names):
            rows = table["member"] == k
            mark = "o" if most <= _MOST_MARKERS else None
            axes.plot(
                table["epoch"][rows] + 1, table[column][rows], color=RUNS[k % len(RUNS)], marker=mark, markersize=3.5,
                linestyle="-" if k < len(RUNS) else "--", label=name,
            )  # fmt: skip
        epoch_axis(axes, most)
        percent_axis(axes)
        axes.set_title(f"{title}, wrong")
    handles, labels = axes.get_legend_handles_labels()
    sheet.figure.legend(
        handles, labels, loc="upper left", ncols=2, columnspacing=1.5,
        bbox_to_anchor=(sheet.left - 0.01, sheet.bottom - 0.42 / sheet.figure.get_figheight()),
    )  # fmt: skip
    return sheet.figure


def _name(members: Table, k: int) -> str:
    """A run with what matters here."""
    extra = [members["model"][k], members["threat"][k]]
    return ", ".join([str(members["label"][k]), *(str(part) for part in extra if str(part) not in members["label"][k])])


def _lines(axes: Axes, lines: list[tuple[np.ndarray, np.ndarray, str, str, str]]) -> None:
    most = 1
    ends = _apart(np.array([values[-1] for _, values, *_ in lines]), 0.065)
    for (epochs, values, label, colour, style), end in zip(lines, ends, strict=True):
        most = max(most, int(epochs[-1]) + 1)
        mark = "o" if len(epochs) <= _MOST_MARKERS else None
        axes.plot(epochs + 1, values, style, color=colour, marker=mark, markersize=4, label=label)
        axes.annotate(
            f"{label}  {percent(values[-1])}", (1.0, end), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=colour, fontweight="bold",
        )  # fmt: skip
    epoch_axis(axes, most)
    percent_axis(axes)


def _apart(places: np.ndarray, gap: float) -> np.ndarray:
    """The same places in the same order, moved as little as needed to leave a gap between neighbours."""
    order = np.argsort(places)
    moved = places[order].astype(np.float64)
    for k in range(1, len(moved)):
        moved[k] = max(moved[k], moved[k - 1] + gap)
    moved -= max(0.0, moved[-1] - 1.0)
    found = np.empty_like(moved)
    found[order] = moved
    return found


def _sources(found: Found) -> list[str]:
    given = found.protocol.get("members") or [found.protocol]
    columns = (
        [str((one.get("data") or {}).get("title")) for one in given],
        [str((one.get("model") or {}).get("name")) for one in given],
        [str(one.get("threat")) for one in given],
        [f"training seed {one.get('training_seed')}" for one in given],
        [f"{one.get('held_out'):,} held-out images" for one in given],
    )
    return [
        " · ".join(" / ".join(dict.fromkeys(column)) for column in columns),
        "Training errors are those of the training attack on augmented images, with the weights of each step; after "
        "Zhang et al. 2021 (GAIRAT), Figure 2.",
    ]
