"""κ of the training images through training, and what weights by κ make of it: GAIRAT's argument, from files alone.

The instance tables of a run hold κ of every image as training saw it: augmented, against the attack and the weights of
that step. Weights are worked out over all of an epoch's images at once, w_i = ω(κ_i) / mean ω; training itself divides
by the mean of each batch.

Source: Zhang et al. 2021 (GAIRAT), Figure 4: weights by κ, and median and mean κ by epoch. Effective number: Kish 1965.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from instar.analyse.analysis import Analysis, Found, Table, register
from instar.analyse.compared import images_of, protocol_of, stacked
from instar.analyse.draw_reweighting import draw, draw_compared
from instar.analyse.perform import renamed
from instar.analyse.target import Target
from instar.report.distributions import Survival, survival_counts
from instar.report.stored import StoredRun, UnavailableError
from instar.report.wording import percent
from instar.schedules import Progress
from instar.signals import GeometryWeight, Signal
from instar.signals.weights import mean_one

NAME, TITLE = "reweighting", "κ through training, and weights by κ"

SHAPES: dict[str, GeometryWeight] = {
    "tanh, λ = −1": GeometryWeight(-1.0),
    "tanh, λ = 0": GeometryWeight(0.0),
    "sigmoid, λ = −1": GeometryWeight(-1.0, "sigmoid"),
    "discrete": GeometryWeight(0.0, "discrete"),
}
"""The published weight functions, which are tried on every run."""


def measure(target: Target, *, shapes: Mapping[str, GeometryWeight] | None = None) -> Found:
    """Distributions of κ by epoch, and how unevenly weights by κ would lie, and did lie, on the images.

    Args:
        target: A run with instance tables.
        shapes: Weight functions to try, by name; None is `SHAPES`. The method's own is added where it has one.

    Returns:
        Tables ``kappa`` (``epoch``, ``kappa``, ``count``), ``epochs`` (``epoch``, ``n``, ``steps``, ``mean``,
        ``median``, ``attackable``, ``guarded``) and ``weights`` (``shape``, ``epoch``, ``effective`` (Kish's effective
        number over n), ``half`` (smallest share of images that carries half of the weight), ``attackable`` and
        ``guarded`` (shares of the weight), ``largest`` (weight of κ = 0)) and ``functions`` (``shape``, ``kappa``,
        ``weight`` in the last epoch).

    Raises:
        UnavailableError: There is no instance table, or no step to count.
        UserError: A table is damaged.
    """
    run = target.require_run()
    found = survival_counts(run)
    tried = dict(SHAPES if shapes is None else shapes)
    own = {int(epoch): weight_of(run, int(epoch)) for epoch in found.epochs}
    used = any(weight is not None for weight in own.values())
    rows: list[dict[str, Any]] = []
    functions: list[dict[str, Any]] = []
    for position, epoch in enumerate(found.epochs):
        counts, steps = found.counts[position], int(found.steps[position])
        mine = own[int(epoch)]
        # Before its burn-in ends a method has weights of 1, and so has one without weights.
        asked = tried | ({"this run": mine} if used and mine is not None else {})
        for name, weight in asked.items():
            weights = weights_by_kappa(weight, counts, steps)
            rows.append({"shape": name, "epoch": int(epoch), **_spread(weights, counts, steps)})
            if position == len(found.epochs) - 1:
                functions += [{"shape": name, "kappa": k, "weight": float(weights[k])} for k in range(steps + 1)]
    tables = {"kappa": _long(found), "epochs": _epochs(found)}
    tables |= {"weights": _table(rows), "functions": _table(functions)}
    figures = _figures(tables, next(iter(tried), None), used)
    last = int(found.epochs[-1]) + 1
    summary = (
        f"In epoch {last} of {run.title}, {percent(figures['guarded'])} of the training images withstand every step "
        f"of the training attack and {percent(figures['attackable'])} none (median κ {figures['median']:.0f} of "
        f"{int(found.steps[-1])})."
    )
    if "effective" in figures:
        name = "this run" if used else next(iter(tried))
        summary += (
            f" Weighed by κ ({name}), they count for as much as "
            f"{percent(figures['effective'])} of them weighed equally."
        )
    protocol = target.protocol(
        epochs_stored=[int(e) for e in found.epochs], steps_known=found.known, own=used,
        shapes={name: repr(weight) for name, weight in tried.items()}, n=int(found.n[-1]), seconds=0.0,
        data_title=run.data, trained=run.model, threat=run.threat or "no attack",
        source="instance tables: augmented images, one attack each with the weights of that step",
    )  # fmt: skip
    return Found(NAME, TITLE, summary, figures, tables, protocol)


def weight_of(run: StoredRun, epoch: int) -> GeometryWeight | None:
    """The weight by κ in a run's loss in an epoch (from 0); None if it has none, or its method is not known here."""
    if run.method is None:
        return None
    loss = run.method.at(Progress(epoch=epoch, epochs=run.epochs)).loss
    return next((part for part in _within(loss) if isinstance(part, GeometryWeight)), None)


def _within(signal: Signal) -> Iterator[Signal]:
    yield signal
    for part in signal.parts:
        yield from _within(part)


def weights_by_kappa(weight: GeometryWeight, counts: np.ndarray, steps: int) -> np.ndarray:
    """The weight of an instance of each κ when all instances are weighed together.

    Args:
        weight: The weight function, without schedules.
        counts: Instances with κ = 0, 1, ..., at least `steps` + 1 entries.
        steps: K, at least 2.

    Returns:
        (K + 1,), float64; their mean over the instances is 1.

    Raises:
        UserError: Fewer than 2 steps.

    Example:
        >>> weights_by_kappa(GeometryWeight(0.0, "discrete"), np.array([1, 0, 1]), 2).round(6).tolist()
        [1.5, 1.0, 0.5]
    """
    counts = np.asarray(counts)[: steps + 1]
    logarithms = weight.logarithm(torch.arange(steps + 1), steps)
    # One instance of each κ first, so that κ that nobody has get a weight too.
    relative = mean_one(logarithms).numpy()
    mean = float(relative @ counts / counts.sum())
    if not mean > 0:
        # All instances have a κ whose weight is nothing beside that of κ that nobody has: relative to themselves.
        there = logarithms[torch.from_numpy(counts > 0)].max()
        relative = (logarithms - there).clamp_max(700.0).exp().numpy()
        mean = float(relative @ counts / counts.sum())
    return np.asarray(relative / mean)


def effective_share(weights: np.ndarray, counts: np.ndarray) -> float:
    """Kish's effective number of instances over their number: (Σ w)² / (n Σ w²), w by κ with how many have it.

    Example:
        >>> effective_share(np.array([2.0, 0.0]), np.array([5, 5]))
        0.5
    """
    carried = np.asarray(counts, dtype=np.float64)
    total, squares = weights @ carried, weights**2 @ carried
    return float(total**2 / (carried.sum() * squares)) if squares > 0 else math.nan


def half_share(weights: np.ndarray, counts: np.ndarray) -> float:
    """The smallest share of the instances that carries half of the weight, the last of them counting in part.

    Example:
        >>> half_share(np.array([3.0, 1.0]), np.array([1, 3])), half_share(np.ones(2), np.array([1, 3]))
        (0.25, 0.5)
    """
    order = np.argsort(-weights, kind="stable")
    carried, people = (weights * counts)[order], np.asarray(counts, dtype=np.float64)[order]
    sums = np.concatenate([[0.0], np.cumsum(carried)])
    heads = np.concatenate([[0.0], np.cumsum(people)])
    return float(np.interp(0.5 * sums[-1], sums, heads) / heads[-1])


def _spread(weights: np.ndarray, counts: np.ndarray, steps: int) -> dict[str, float]:
    counts = counts[: steps + 1]
    carried = weights * counts / (weights @ counts)
    return {
        "effective": effective_share(weights, counts),
        "half": half_share(weights, counts),
        "attackable": float(carried[0]),
        "guarded": float(carried[steps]),
        "largest": float(weights[0]),
    }


def _long(found: Survival) -> Table:
    width = found.counts.shape[1]
    return {
        "epoch": np.repeat(found.epochs, width),
        "kappa": np.tile(np.arange(width), len(found.epochs)),
        "count": found.counts.ravel(),
    }


def _epochs(found: Survival) -> Table:
    sums = np.cumsum(found.counts, axis=1)
    # The lower median: the κ that the middle instance has.
    median = (sums >= (found.n / 2)[:, None]).argmax(1).astype(np.float64)
    return {
        "epoch": found.epochs,
        "n": found.n,
        "steps": found.steps,
        "mean": found.mean,
        "median": median,
        "attackable": found.attackable,
        "guarded": found.guarded,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}


def _figures(tables: dict[str, Table], first: str | None, used: bool) -> dict[str, float]:
    epochs, weights = tables["epochs"], tables["weights"]
    figures = {name: float(epochs[name][-1]) for name in ("mean", "median", "attackable", "guarded")}
    figures["guarded_first"] = float(epochs["guarded"][0])
    wanted = "this run" if used else first
    if wanted is not None:
        chosen = np.flatnonzero(weights["shape"] == wanted)[-1]
        figures |= {"effective": float(weights["effective"][chosen]), "half": float(weights["half"][chosen])}
    return figures


def compare(founds: Sequence[Found]) -> Found:
    """κ through the training of several runs side by side.

    Args:
        founds: Results of `measure`, at least two.

    Returns:
        Tables ``members`` (a row for each run), ``epochs`` and ``weights`` (as of `measure`, with a column ``member``).

    Raises:
        UnavailableError: Fewer than two results.
    """
    if len(founds) < 2:
        raise UnavailableError("there is nothing to compare: κ through training is known for one run only")
    named = renamed(founds)
    members: Table = {
        "label": np.array([one.label for one in named]),
        **{
            name: np.array([one.figures[name] for one in named]) for name in ("mean", "median", "attackable", "guarded")
        },
    }
    tables = {"members": members}
    for name in ("epochs", "weights"):
        tables[name] = stacked([one.tables[name] for one in named])
    high, low = int(np.argmax(members["guarded"])), int(np.argmin(members["guarded"]))
    summary = (
        f"At the end, {percent(members['guarded'][high])} of the training images are guarded in "
        f"{members['label'][high]}, {percent(members['guarded'][low])} in {members['label'][low]}."
    )
    protocol = protocol_of(named, n=images_of(named))
    figures = {"guarded_difference": float(members["guarded"][high] - members["guarded"][low])}
    return Found(NAME, TITLE, summary, figures, tables, protocol)


ANALYSIS = register(
    Analysis(
        name=NAME,
        title=TITLE,
        measure=measure,
        draw=draw,
        needs="records",
        cost="reads the instance tables: about a second for 100 epochs of 50,000 images",
        compare=compare,
        draw_compared=draw_compared,
    )
)
