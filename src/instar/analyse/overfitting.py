"""Overfitting and dynamics of a training, from the files of its run alone: curves, best against last, forgetting.

Robust overfitting: after the learning rate falls, robust accuracy on training images goes on rising while that on
held-out images falls (Rice et al. 2020). Catastrophic overfitting: the model withstands the weak attack it is trained
with and suddenly no other (Wong et al. 2020). An instance is forgotten when it was classified correctly the last time
that it was trained on, and is not now (Toneva et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instar.analyse.analysis import Analysis, Found, Table, register
from instar.analyse.compared import members_of, protocol_of, stacked
from instar.analyse.draw_overfitting import draw, draw_compared
from instar.analyse.perform import renamed
from instar.analyse.target import Target
from instar.errors import UserError
from instar.evaluate.record import Record
from instar.guards.collapse import catastrophic
from instar.report.stored import StoredRun, UnavailableError
from instar.report.wording import percent

NAME, TITLE = "overfitting", "Overfitting and dynamics"
_CURVES = ("lr", "train_loss", "train_robust", "selection_clean", "selection_robust")


def measure(target: Target) -> Found:
    """Curves, the cost of the last epochs, the alarm, and what became of every training instance.

    Args:
        target: A run; `instar.analyse.open_files` opens it.

    Returns:
        Tables ``epochs`` (a row for each finished epoch: the curves of the log, ``gap`` = robust accuracy on training
        batches minus held out, and from instance tables ``accuracy``, ``learned_share`` and ``forgotten_share``),
        ``instances`` (a row for each training instance: ``index``, ``presentations``, ``correct_share``, ``forgotten``
        times, ``learned`` in which epoch, −1 for never; only with instance tables) and ``evaluations`` (accuracies
        of the checkpoints that were evaluated).

    Raises:
        UnavailableError: The run has no finished epoch.
        UserError: A file is damaged.
    """
    run = target.require_run()
    if not run.log:
        raise UnavailableError(f"{run.folder} has no finished epoch yet")
    epochs: Table = {"epoch": np.array([int(line["epoch"]) for line in run.log])}
    epochs |= {name: np.array([float(line[name]) for line in run.log]) for name in _CURVES}
    epochs["gap"] = epochs["train_robust"] - epochs["selection_robust"]
    tables: dict[str, Table] = {"epochs": epochs}
    figures = curve_figures(epochs["train_robust"], epochs["selection_robust"])
    figures["held_out"] = float(run.held_out)
    figures["noise"] = noise(figures["best_robust"], figures["last_robust"], run.held_out)
    alarm = catastrophic(epochs["train_robust"], epochs["selection_robust"])
    figures["catastrophic_epoch"] = float(epochs["epoch"][alarm]) if alarm is not None else float("nan")
    if run.tables:
        by_epoch, instances = forgetting(run)
        for name in ("accuracy", "learned_share", "forgotten_share"):
            known = dict(zip(by_epoch["epoch"].tolist(), by_epoch[name].tolist(), strict=True))
            epochs[name] = np.array([known.get(epoch, np.nan) for epoch in epochs["epoch"].tolist()])
        tables["instances"] = instances
        figures |= dynamics_figures(instances)
    evaluations = _evaluations(run.records())
    if len(evaluations["checkpoint"]):
        tables["evaluations"] = evaluations
        figures["best_minus_last_attacked"] = _best_minus_last(evaluations)
    protocol = target.protocol(
        n=int(run.config["data"].get("train_images") or 0),
        images=f"{int(run.config['data'].get('train_images') or 0):,} training images",
        held_out=run.held_out,
        rule=str((run.config.get("selection") or {}).get("rule")),
        expression=str(run.config.get("method")),
        finished=len(run.log),
        records=[f"{record.suite}-{record.checkpoint} {record.protocol.get('key')}" for record in run.records()],
        seconds=0.0,
    )
    return Found(NAME, TITLE, _told(run, figures), figures, tables, protocol)


def curve_figures(train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Best against last, and the gap to the training batches.

    Args:
        train: Robust accuracy on the training batches by epoch (E,).
        held_out: Robust accuracy on held-out images by epoch (E,).

    Returns:
        ``best_epoch`` (from 0; the first of equals), ``best_robust``, ``last_robust``, ``drop`` (best − last, at least
        0), ``gap_at_best``, ``gap_at_last`` and ``train_rise`` (robust training accuracy gained since the best epoch).

    Example:
        >>> found = curve_figures(np.array([0.3, 0.5, 0.8]), np.array([0.25, 0.4, 0.3]))
        >>> found["best_epoch"], round(found["drop"], 6), round(found["train_rise"], 6)
        (1.0, 0.1, 0.3)
    """
    best = int(np.argmax(held_out))
    return {
        "best_epoch": float(best),
        "last_epoch": float(len(train) - 1),
        "best_robust": float(held_out[best]),
        "last_robust": float(held_out[-1]),
        "drop": float(held_out[best] - held_out[-1]),
        "gap_at_best": float(train[best] - held_out[best]),
        "gap_at_last": float(train[-1] - held_out[-1]),
        "train_rise": float(train[-1] - train[best]),
    }


def noise(best: float, last: float, count: int) -> float:
    """How far two accuracies on the same held-out images may lie apart by chance: 1.96 standard errors.

    The error is that of independent samples, which is too wide for the same images, and so errs to the quiet side.

    Args:
        best: One accuracy.
        last: The other.
        count: Number of images; 0 gives infinity.

    Returns:
        A difference of accuracies.

    Example:
        >>> round(noise(0.5, 0.5, 1000), 4)
        0.0438
    """
    return 1.96 * float(np.sqrt((best * (1 - best) + last * (1 - last)) / count)) if count else float("inf")


def forgetting(run: StoredRun) -> tuple[Table, Table]:
    """When every training instance was learned and how often it was forgotten, under the training attack.

    Args:
        run: A run with instance tables.

    Returns:
        A row for each stored epoch: ``epoch``, ``accuracy`` on the instances trained on, and the shares of them that
        were ``learned_share`` (wrong before, right now) and ``forgotten_share`` (right before, wrong now), NaN in the
        first. And a row for each instance: ``index``, ``presentations``, ``correct_share``, ``forgotten``, ``learned``.

    Raises:
        UserError: A table is missing or damaged, or says nothing of which instances were right.
    """
    size = 0
    before = np.zeros(0, np.int8)  # −1 unseen, 0 wrong, 1 right, the last time that the instance was trained on
    counts = {name: np.zeros(0, np.int32) for name in ("presentations", "right", "forgotten")}
    learned = np.zeros(0, np.int32)
    rows: list[dict[str, float]] = []
    for epoch in run.tables:
        table = run.instances(epoch)
        if "correct" not in table:
            raise UserError(f"the instance table of epoch {epoch} of {run.folder} has no column correct")
        place, right = table["position"], table["correct"].astype(np.int8)
        if int(place.max()) >= size:
            more = int(place.max()) + 1 - size
            before = np.concatenate([before, np.full(more, -1, np.int8)])
            learned = np.concatenate([learned, np.full(more, -1, np.int32)])
            counts = {name: np.concatenate([column, np.zeros(more, np.int32)]) for name, column in counts.items()}
            size += more
        known = before[place] >= 0
        lost, won = known & (before[place] == 1) & (right == 0), known & (before[place] == 0) & (right == 1)
        counts["presentations"][place] += 1
        counts["right"][place] += right
        counts["forgotten"][place] += lost
        first = (learned[place] < 0) & (right == 1)
        learned[place[first]] = epoch
        before[place] = right
        total = int(known.sum())
        rows.append(
            {
                "epoch": epoch,
                "accuracy": float(right.mean()),
                "learned_share": float(won.sum() / total) if total else np.nan,
                "forgotten_share": float(lost.sum() / total) if total else np.nan,
            }
        )
    seen = np.flatnonzero(counts["presentations"])
    instances: Table = {
        "index": seen,
        "presentations": counts["presentations"][seen],
        "correct_share": counts["right"][seen] / counts["presentations"][seen],
        "forgotten": counts["forgotten"][seen],
        "learned": learned[seen],
    }
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}, instances


def dynamics_figures(instances: Table) -> dict[str, float]:
    """Shares of the training instances by what became of them.

    Args:
        instances: As `forgetting` gives them.

    Returns:
        ``mean_forgotten`` (times an instance was forgotten, on average), ``never_learned``, ``never_forgotten`` (of
        those that were learned) and ``forgotten_often`` (twice or more).

    Example:
        >>> rows = {"forgotten": np.array([0, 0, 2, 1]), "learned": np.array([0, -1, 1, 0])}
        >>> dynamics_figures(rows)["never_learned"]
        0.25
    """
    forgotten, learned = instances["forgotten"], instances["learned"] >= 0
    return {
        "mean_forgotten": float(forgotten.mean()),
        "never_learned": float((~learned).mean()),
        "never_forgotten": float((forgotten[learned] == 0).mean()) if learned.any() else float("nan"),
        "forgotten_often": float((forgotten >= 2).mean()),
    }


def _evaluations(records: Sequence[Record]) -> Table:
    """A row for each accuracy of each record."""
    rows = [
        (record.suite, record.checkpoint, name, score.title, score.correct, score.count)
        for record in records
        for name, score in record.scores.items()
    ]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 6
    names = ("suite", "checkpoint", "attack", "title", "correct", "count")
    return {name: np.array(column) for name, column in zip(names, columns, strict=True)}


def _best_minus_last(evaluations: Table) -> float:
    """Robust accuracy of the best checkpoint minus that of the last, on the strongest attack both were judged by."""
    for attack in ("autoattack", "worst_case"):
        chosen = evaluations["attack"] == attack
        for suite in dict.fromkeys(evaluations["suite"][chosen].tolist()):
            known = {}
            for checkpoint in ("best", "last"):
                rows = chosen & (evaluations["suite"] == suite) & (evaluations["checkpoint"] == checkpoint)
                if rows.sum() == 1:
                    known[checkpoint] = (int(evaluations["correct"][rows][0]), int(evaluations["count"][rows][0]))
            if len(known) == 2 and known["best"][1] == known["last"][1]:
                return (known["best"][0] - known["last"][0]) / known["best"][1]
    return float("nan")


def _told(run: StoredRun, figures: dict[str, float]) -> str:
    best, last = int(figures["best_epoch"]) + 1, int(figures["last_epoch"]) + 1
    if figures["drop"] > 0:
        within = " (within the noise)" if figures["drop"] <= figures["noise"] else ""
        told = (
            f"Held-out robust accuracy is best in epoch {best} of {last} ({percent(figures['best_robust'])}, "
            f"n = {run.held_out:,}) and {100 * figures['drop']:.1f} points lower in the last{within}, while on the "
            "training "
            f"batches it {'rises' if figures['train_rise'] > 0 else 'changes'} by {100 * figures['train_rise']:.1f} "
            "points."
        )
    else:
        told = (
            f"Held-out robust accuracy is best in the last epoch, {last} ({percent(figures['best_robust'])}, "
            f"n = {run.held_out:,}): no overfitting shows."
        )
    if np.isfinite(figures["catastrophic_epoch"]):
        told += f" Catastrophic overfitting: it collapses in epoch {int(figures['catastrophic_epoch']) + 1}."
    if "never_learned" in figures:
        told += (
            f" {percent(figures['never_learned'])} of the training images were never classified correctly under "
            "attack, "
            f"and one was forgotten {figures['mean_forgotten']:.2f} times on average."
        )
    return told


def compare(founds: Sequence[Found]) -> Found:
    """Several runs side by side.

    Args:
        founds: Results of `measure`, at least two.

    Returns:
        Tables ``members`` (the figures of each run) and ``epochs`` (``member`` and the curves).

    Raises:
        UnavailableError: Fewer than two results.
    """
    if len(founds) < 2:
        raise UnavailableError("there is nothing to compare: one run only")
    named = renamed(founds)
    members = members_of(named)
    curves = [one.tables["epochs"] for one in named]
    columns = list(dict.fromkeys(name for curve in curves for name in curve))
    epochs = stacked([{name: c.get(name, np.full(len(c["epoch"]), np.nan)) for name in columns} for c in curves])
    most = int(np.argmax(members["drop"]))
    summary = (
        f"Robust overfitting is largest for {named[most].label}: {100 * members['drop'][most]:.1f} points from its "
        "best "
        f"epoch to its last."
        if members["drop"][most] > 0
        else "No run overfits: every one is best in its last epoch."
    )
    alarmed = [one.label for one in named if np.isfinite(one.figures["catastrophic_epoch"])]
    if alarmed:
        summary += f" Catastrophic overfitting: {', '.join(alarmed)}."
    figures = {"largest_drop": float(members["drop"][most]), "runs": float(len(named))}
    return Found(NAME, TITLE, summary, figures, {"members": members, "epochs": epochs}, protocol_of(named))


ANALYSIS = register(
    Analysis(
        name=NAME,
        title=TITLE,
        measure=measure,
        draw=draw,
        needs="records",
        cost="seconds: it reads the log and the instance tables",
        splits=(),
        compare=compare,
        draw_compared=draw_compared,
    )
)
