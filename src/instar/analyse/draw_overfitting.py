"""Pictures of overfitting: robust curves with their gap, and what became of the training instances."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from instar.analyse.analysis import Found, Table
from instar.analyse.compared import shown_as
from instar.analyse.sources import sources
from instar.evaluate.intervals import wilson
from instar.report.style import EASY, GREY, HARD, INK, RUNS, Sheet, epoch_axis, lighter, percent_axis, styled
from instar.report.wording import percent

_MOST_MARKERS = 15
_MOST_TIMES = 8


def draw(found: Found) -> dict[str, Figure]:
    """Pictures of one run.

    Args:
        found: A result of `instar.analyse.overfitting.measure`.

    Returns:
        ``curves``.
    """
    return {"curves": _curves(found)}


def draw_compared(found: Found) -> dict[str, Figure]:
    """Pictures of several runs.

    Args:
        found: A result of `instar.analyse.overfitting.compare`.

    Returns:
        ``side_by_side``.
    """
    return {"side_by_side": _side_by_side(found)}


def _title(found: Found) -> str:
    figures = found.figures
    best, last = int(figures["best_epoch"]) + 1, int(figures["last_epoch"]) + 1
    if np.isfinite(figures["catastrophic_epoch"]):
        return (
            f"{found.label}: catastrophic overfitting in epoch {int(figures['catastrophic_epoch']) + 1}; held-out "
            "robust "
            f"accuracy falls from {percent(figures['best_robust'])} to {percent(figures['last_robust'])}"
        )
    if figures["drop"] > figures["noise"]:
        return (
            f"{found.label}: held-out robust accuracy is best in epoch {best} and {100 * figures['drop']:.1f} points "
            "lower "
            f"in epoch {last}"
        )
    return f"{found.label}: no robust overfitting shows within {last} epoch{'s' if last > 1 else ''}"


@styled
def _curves(found: Found) -> Figure:
    rows, figures = found.tables["epochs"], found.figures
    instances = found.tables.get("instances")
    panels = ["robust", *(["events", "times"] if instances is not None else [])]
    sheet = Sheet(
        3.1,
        title=_title(found),
        subtitle="Robust accuracy on held-out images, which choose the checkpoint (dot), and on the training batches; "
        "the two attacks differ, so that the growth of the gap tells, not its size."
        + (
            " An image is forgotten when it was classified correctly under the training attack the last time that it "
            "was "
            "trained on, and is not now."
            if instances is not None
            else ""
        ),
        footer=[
            *sources(found),
            f"Held out: {found.protocol.get('rule')}, n = {int(figures['held_out']):,}, band: 95 % Wilson interval. "
            "Training: last iterate of the training attack on augmented images, weights in motion.",
        ],
        left=0.5,
    )
    grid = sheet.grid(1, len(panels), width_ratios=(1.5, 1.1, 1)[: len(panels)], wspace=0.26)
    axes = {name: sheet.figure.add_subplot(place, label=name) for name, place in zip(panels, grid, strict=True)}
    _robust(axes["robust"], rows, figures)
    if instances is not None:
        _events(axes["events"], rows)
        _times(axes["times"], instances, figures)
    return sheet.figure


def _robust(axes: Axes, rows: Table, figures: Any) -> None:
    x = rows["epoch"] + 1
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(x) <= _MOST_MARKERS else {}
    held, train = rows["selection_robust"], rows["train_robust"]
    count = int(figures["held_out"])
    ends = np.array([wilson(round(float(share) * count), count) for share in held]) if count else None
    if ends is not None:
        axes.fill_between(x, ends[:, 0], ends[:, 1], color=lighter(EASY, 0.8), linewidth=0)
    axes.plot(x, held, color=EASY, gid="held out", **marker)
    axes.plot(x, train, color=HARD, linestyle=(0, (4, 2)), linewidth=1.3, gid="training")
    best = int(figures["best_epoch"])
    axes.plot(x[best], held[best], "o", color=EASY, markersize=8, markeredgecolor="white", zorder=4)
    highest = max(float(train.max()), float(held.max()))
    percent_axis(axes, highest=min(1.0, 1.18 * highest))
    over = train[-1] >= held[-1]
    for values, colour, name, up in ((train, HARD, "training batches", over), (held, EASY, "held out", not over)):
        axes.annotate(
            f"{name} {percent(values[-1])}", (x[-1], values[-1]), xytext=(0, 9 if up else -17), ha="right",
            textcoords="offset points", fontsize=8.5, fontweight="bold", color=colour,
        )  # fmt: skip
    if np.isfinite(figures["catastrophic_epoch"]):
        axes.axvline(figures["catastrophic_epoch"] + 1, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            "collapse", (figures["catastrophic_epoch"] + 1, 1), xycoords=("data", "axes fraction"), xytext=(-4, -3),
            textcoords="offset points", ha="right", va="top", fontsize=8,
        )  # fmt: skip
    epoch_axis(axes, int(x[-1]))
    axes.set_title("Robust accuracy")


def _events(axes: Axes, rows: Table) -> None:
    x = rows["epoch"] + 1
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(x) <= _MOST_MARKERS else {}
    highest = 0.02
    for name, colour, said in (("learned_share", EASY, "learned"), ("forgotten_share", HARD, "forgotten")):
        axes.plot(x, rows[name], color=colour, label=said, gid=said, **marker)
        if np.isfinite(rows[name]).any():
            highest = max(highest, float(np.nanmax(rows[name])))
    percent_axis(axes, highest=1.3 * highest)
    epoch_axis(axes, int(x[-1]))
    axes.set_title("Learned and forgotten")
    axes.legend(fontsize=8, loc="upper right", ncol=2, borderaxespad=0.1)


def _times(axes: Axes, instances: Table, figures: Any) -> None:
    learned = instances["learned"] >= 0
    times = np.minimum(instances["forgotten"][learned], _MOST_TIMES)
    shares = np.bincount(times, minlength=2) / len(learned)
    most = len(shares) - 1
    axes.bar([-1.4], [1 - learned.mean()], color=HARD, width=0.7)
    axes.bar(np.arange(len(shares)), shares, color=lighter(EASY, 0.35), width=0.7)
    for place, share in [(-1.4, 1 - learned.mean()), *enumerate(shares)]:
        axes.annotate(
            f"{100 * share:.0f}", (place, share), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8,
            color=GREY,
        )  # fmt: skip
    said = [str(k) for k in range(most)] + [f"{most}+" if most == _MOST_TIMES else str(most)]
    axes.set_xticks([-1.4, *range(len(shares))], ["never\nlearned", *said], fontsize=8)
    axes.set_xlabel("times forgotten")
    percent_axis(axes, highest=1.15 * max(float(shares.max()), 1 - float(learned.mean())))
    axes.set_title("Training images")


@styled
def _side_by_side(found: Found) -> Figure:
    members, rows = found.tables["members"], found.tables["epochs"]
    labels, tones, _ = shown_as(found, range(min(len(RUNS), len(members["label"]))))
    drop, noise = members["drop"], members["noise"]
    most = int(np.argmax(drop[: len(labels)]))
    title = (
        f"{labels[most]} loses {100 * drop[most]:.1f} points of held-out robust accuracy from its best epoch to its "
        "last"
        if drop[most] > noise[most]
        else "No run loses more from its best epoch to its last than chance would explain"
    )
    events = "forgotten_share" in rows and np.isfinite(rows["forgotten_share"]).any()
    panels = ["robust", "gap", *(["forgotten"] if events else [])]
    titles = {
        "robust": "Robust accuracy, held out",
        "gap": "Training minus held out, points",
        "forgotten": "Forgotten since last time",
    }
    columns = {"robust": "selection_robust", "gap": "gap", "forgotten": "forgotten_share"}
    sheet = Sheet(
        3.1,
        title=title,
        subtitle="A dot marks the best epoch of each run. The gap compares the attack of training with the one that "
        "chooses "
        "checkpoints: it is its growth that tells of overfitting, and between methods it does not compare.",
        footer=sources(found),
        left=0.5,
    )
    grid = sheet.grid(1, len(panels), wspace=0.24)
    longest = int(rows["epoch"].max()) + 1
    for place, name in zip(grid, panels, strict=True):
        axes = sheet.figure.add_subplot(place, label=name)
        highest, lowest = 0.02, 0.0
        for number, label in enumerate(labels):
            mine = rows["member"] == number
            x, y = rows["epoch"][mine] + 1, rows[columns[name]][mine]
            marker: dict[str, Any] = {"marker": "o", "markersize": 3} if longest <= _MOST_MARKERS else {}
            axes.plot(x, y, color=tones[number], label=label, gid=f"{name}: {label}", **marker)
            if name == "robust":
                best = int(np.argmax(y))
                axes.plot(x[best], y[best], "o", color=tones[number], markersize=8, markeredgecolor="white", zorder=4)
            if np.isfinite(y).any():
                highest, lowest = max(highest, float(np.nanmax(y))), min(lowest, float(np.nanmin(y)))
        percent_axis(axes, highest=1.12 * highest)
        axes.set_ylim(1.2 * lowest - 0.02 * highest * (lowest < 0), 1.12 * highest)
        if name == "gap":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:+.0f}".replace("-", "−")))
            axes.axhline(0, color=GREY, linewidth=0.8)
        epoch_axis(axes, longest)
        axes.set_title(titles[name])
        if name == "robust":
            axes.legend(fontsize=8, loc="lower right", borderaxespad=0.2)
    return sheet.figure
