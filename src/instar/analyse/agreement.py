"""Which instances are hard: whether measures of difficulty, seeds and methods agree, and who wins which instance.

Every measure is turned so that higher means harder, and compared by Spearman's rank correlation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from instar.analyse.analysis import Analysis, Found, Table, register
from instar.analyse.compared import protocol_of
from instar.analyse.draw_agreement import draw, draw_compared
from instar.analyse.overfitting import forgetting
from instar.analyse.perform import renamed
from instar.analyse.spread import spearman
from instar.analyse.target import Target
from instar.evaluate.intervals import mcnemar
from instar.evaluate.record import Record
from instar.report.distributions import TOP
from instar.report.stored import StoredRun, UnavailableError
from instar.report.wording import minus, percent

NAME, TITLE = "agreement", "Agreement on what is hard"

_HELD = "verdicts "
_KNOWN = (
    ("vulnerability", "instances", "vulnerability", "vulnerability", 1.0),
    ("vulnerability", "instances", "adversarial_loss", "adversarial loss", 1.0),
    ("vulnerability", "instances", "clean_margin", "clean margin", -1.0),
    ("vulnerability", "instances", "adversarial_margin", "adversarial margin", -1.0),
    ("curvature", "instances", "curvature", "curvature in the weights", 1.0),
    ("curvature", "instances", "largest", "curvature in the input", 1.0),
)
"""Columns of stored results that say how hard a training instance is: analysis, table, column, name, sign."""


def measure(target: Target) -> Found:
    """Measures of difficulty for the training instances of a run, and how well their ranks agree.

    From the instance tables: training loss and κ in the last stored epoch, how often an instance was wrong, and how
    often it was forgotten. From stored analyses of the same run, if there are any: vulnerability, margins and curvature
    (of the last checkpoint, else the best).

    Args:
        target: A run; `instar.analyse.open_files` opens it.

    Returns:
        Tables ``difficulty`` (``index`` and a column for each measure, NaN where unknown; higher is harder),
        ``correlations`` (a row for each pair: ``a``, ``b``, ``spearman``, ``n``) and for each evaluation record
        ``verdicts <suite>-<checkpoint> <norm> <eps>`` (``index``, ``label``, ``robust``).

    Raises:
        UnavailableError: There are neither instance tables nor evaluations.
        UserError: A file is damaged.
    """
    run = target.require_run()
    measures = _from_tables(run) if run.tables else {}
    measures |= _from_analyses(target.found(name) for name in dict.fromkeys(row[0] for row in _KNOWN))
    verdicts = {
        _evaluation(record): {
            "index": record.instances["index"],
            "label": record.instances["label"],
            "robust": record.instances["worst_case"],
        }
        for record in run.records()
    }
    if not measures and not verdicts:
        raise UnavailableError(f"{run.folder} has neither instance tables nor evaluations")
    tables: dict[str, Table] = dict(verdicts)
    figures = {"measures": float(len(measures)), "evaluations": float(len(verdicts))}
    if measures:
        difficulty = _joined(measures)
        correlations = correlate(difficulty)
        tables |= {"difficulty": difficulty, "correlations": correlations}
        known = correlations["spearman"][np.isfinite(correlations["spearman"])]
        figures |= {
            "n": float(len(difficulty["index"])),
            "mean_spearman": float(known.mean()) if len(known) else float("nan"),
            "lowest_spearman": float(known.min()) if len(known) else float("nan"),
        }
    protocol = target.protocol(
        n=len(tables["difficulty"]["index"]) if measures else 0,
        images=f"{len(tables['difficulty']['index']):,} training images" if measures else None,
        epoch=run.tables[-1] if run.tables else None,
        measures=sorted(measures),
        verdicts=sorted(verdicts),
        seconds=0.0,
    )
    return Found(NAME, TITLE, _told(tables, figures), figures, tables, protocol)


def _evaluation(record: Record) -> str:
    """Name of an evaluation, equal only for evaluations in one threat model."""
    eps = str(record.protocol["eps"]).replace("/", "_")
    return f"{_HELD}{record.suite}-{record.checkpoint} {record.protocol['norm']} {eps}"


def _from_tables(run: StoredRun) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By measure: official positions and how hard those instances are."""
    last = run.instances(run.tables[-1])
    _, dynamics = forgetting(run)
    place = last["position"]
    found = {
        "training loss": (place, last["loss"].astype(np.float64)),
        "κ, few steps": (place, -last["kappa"].astype(np.float64)),
        "often wrong": (dynamics["index"], 1 - dynamics["correct_share"]),
    }
    if dynamics["forgotten"].any():
        found["forgotten"] = (dynamics["index"], dynamics["forgotten"].astype(np.float64))
    return found


def _from_analyses(groups: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    founds = {one.name: one for group in groups for one in _preferred(group)}
    measures = {}
    for name, table, column, called, sign in _KNOWN:
        rows = founds[name].tables.get(table, {}) if name in founds else {}
        if column in rows and "index" in rows:
            measures[called] = (rows["index"], sign * rows[column].astype(np.float64))
    return measures


def _preferred(founds: Sequence[Found]) -> list[Found]:
    """Of results on training images that of the last checkpoint, else the one that is there."""
    train = [one for one in founds if one.protocol.get("split") == "train"]
    return sorted(train, key=lambda one: one.checkpoint != "last")[:1]


def _joined(measures: dict[str, tuple[np.ndarray, np.ndarray]]) -> Table:
    index = np.unique(np.concatenate([place for place, _ in measures.values()]))
    table: Table = {"index": index}
    for name, (place, values) in measures.items():
        column = np.full(len(index), np.nan)
        column[np.searchsorted(index, place)] = values
        table[name] = column
    return table


def correlate(difficulty: Table) -> Table:
    """Spearman's rank correlation for every pair of measures, over the instances that have both.

    Args:
        difficulty: ``index`` and a column (n,) for each measure, NaN where unknown.

    Returns:
        Columns ``a``, ``b``, ``spearman`` and ``n``.

    Example:
        >>> rows = {"index": np.arange(3), "x": np.array([1.0, 2.0, 3.0]), "y": np.array([2.0, 4.0, 9.0])}
        >>> found = correlate(rows)
        >>> found["a"].tolist(), found["b"].tolist(), found["spearman"].round(6).tolist()
        (['x'], ['y'], [1.0])
    """
    names = [name for name in difficulty if name != "index"]
    rows: list[tuple[str, str, float, int]] = []
    for a, b in combinations(names, 2):
        both = np.isfinite(difficulty[a]) & np.isfinite(difficulty[b])
        rows.append((a, b, spearman(difficulty[a][both], difficulty[b][both]), int(both.sum())))
    return {
        "a": np.array([row[0] for row in rows], dtype="U40"),
        "b": np.array([row[1] for row in rows], dtype="U40"),
        "spearman": np.array([row[2] for row in rows], dtype=np.float64),
        "n": np.array([row[3] for row in rows], dtype=np.int64),
    }


def _told(tables: dict[str, Table], figures: dict[str, float]) -> str:
    if "correlations" not in tables or not np.isfinite(figures["mean_spearman"]):
        return f"{int(figures['evaluations'])} evaluations are ready to be compared with those of other runs."
    rows = tables["correlations"]
    known = np.flatnonzero(np.isfinite(rows["spearman"]))
    most, least = (known[pick(rows["spearman"][known])] for pick in (np.argmax, np.argmin))
    high, low = (minus(f"{rows['spearman'][place]:.2f}") for place in (most, least))
    return (
        f"{int(figures['measures'])} measures of difficulty agree with a mean rank correlation of "
        f"{figures['mean_spearman']:.2f}: most {rows['a'][most]} with {rows['b'][most]} "
        f"({high}), "
        f"least {rows['a'][least]} with {rows['b'][least]} ({low})."
    )


def compare(founds: Sequence[Found]) -> Found:
    """Whether runs find the same instances hard, and which instances each run wins and loses.

    Between runs that differ in their seed only, the first is the stability of difficulty across seeds.

    Args:
        founds: Results of `measure`, at least two.

    Returns:
        Tables ``stability`` (a row for each pair of runs and measure: ``a``, ``b``, ``measure``, ``spearman``, ``n``,
        ``overlap``: of the hardest tenth of one, the share that is among the hardest tenth of the other; 10 % by
        chance), ``wins`` (a row for each pair of runs and evaluation: ``both``, ``only_a``, ``only_b``, ``neither``,
        McNemar's ``p``) and ``verdicts <evaluation>`` (``index``, ``label``, ``robust_k`` of each run k, and ``wins``:
        how many runs withstand).

    Raises:
        UnavailableError: Fewer than two results, or nothing that they share.
    """
    if len(founds) < 2:
        raise UnavailableError("there is nothing to compare: one run only")
    named = renamed(founds)
    stability = _stability(named)
    wins, verdicts = _wins(named)
    if not len(stability["a"]) and not len(wins["a"]):
        raise UnavailableError("the runs share neither training instances nor evaluated images")
    tables: dict[str, Table] = {"members": {"label": np.array([one.label for one in named])}, **verdicts}
    tables |= {name: rows for name, rows in (("stability", stability), ("wins", wins)) if len(rows["a"])}
    known = stability["spearman"][np.isfinite(stability["spearman"])]
    figures = {
        "runs": float(len(named)),
        "mean_stability": float(known.mean()) if len(known) else float("nan"),
        "mean_overlap": float(np.nanmean(stability["overlap"])) if len(known) else float("nan"),
    }
    told = ""
    if len(known):
        told = (
            f"The runs agree on which training images are hard with a mean rank correlation of "
            f"{figures['mean_stability']:.2f}; their hardest tenths share {percent(figures['mean_overlap'])} (10 % by "
            "chance)."
        )
    if len(wins["a"]):
        widest = int(np.argmax(wins["only_a"] + wins["only_b"]))
        told += (
            f" {wins['a'][widest]} withstands {int(wins['only_a'][widest]):,} of {int(wins['n'][widest]):,} test "
            f"images that {wins['b'][widest]} does not, the reverse is true of {int(wins['only_b'][widest]):,}."
        )
    return Found(NAME, TITLE, told.strip(), figures, tables, protocol_of(named))


def _stability(named: Sequence[Found]) -> Table:
    rows: list[tuple[str, str, str, float, int, float]] = []
    for one, other in combinations(named, 2):
        first, second = one.tables.get("difficulty"), other.tables.get("difficulty")
        if first is None or second is None or not _same_images(one, other):
            continue
        shared, here, there = np.intersect1d(first["index"], second["index"], return_indices=True)
        for name in first:
            if name == "index" or name not in second or len(shared) < 3:
                continue
            a, b = first[name][here], second[name][there]
            both = np.isfinite(a) & np.isfinite(b)
            found = spearman(a[both], b[both])
            rows.append((one.label, other.label, name, found, int(both.sum()), overlap(a[both], b[both])))
    columns = list(zip(*rows, strict=True)) if rows else [()] * 6
    names = ("a", "b", "measure", "spearman", "n", "overlap")
    return {name: np.array(column) for name, column in zip(names, columns, strict=True)}


def _same_images(one: Found, other: Found) -> bool:
    known = [found.protocol.get("data") for found in (one, other)]
    return known[0] == known[1]


def overlap(a: np.ndarray, b: np.ndarray, *, top: float = TOP) -> float:
    """Of the hardest share of the instances by one measure, how many are among the hardest by the other.

    Instances tied at the limit count in part, so that a constant measure gives exactly what chance would.

    Args:
        a: One measure (n,).
        b: The other (n,).
        top: Which share is meant.

    Returns:
        In [0, 1]: `top` by chance, 1 if they agree; NaN without instances.

    Example:
        >>> overlap(np.arange(20.0), np.arange(20.0)), overlap(np.arange(20.0), np.zeros(20))
        (1.0, 0.1)
    """
    if not len(a):
        return float("nan")
    chosen = [_membership(values, top * len(values)) for values in (a, b)]
    return float((chosen[0] * chosen[1]).sum() / (top * len(a)))


def _membership(values: np.ndarray, wanted: float) -> np.ndarray:
    """How far each value belongs to the `wanted` highest: 1, 0, or a part for those tied at the limit."""
    limit = np.sort(values)[::-1][min(int(np.ceil(wanted)), len(values)) - 1]
    above, tied = values > limit, values == limit
    return above + tied * (wanted - above.sum()) / tied.sum()


def _wins(named: Sequence[Found]) -> tuple[Table, dict[str, Table]]:
    rows: list[tuple[Any, ...]] = []
    verdicts: dict[str, Table] = {}
    evaluations = dict.fromkeys(name for one in named for name in one.tables if name.startswith(_HELD))
    for evaluation in evaluations:
        having = [(k, one) for k, one in enumerate(named) if evaluation in one.tables]
        first = having[0][1].tables[evaluation]
        alike = [
            (k, one)
            for k, one in having
            if all(np.array_equal(one.tables[evaluation][name], first[name]) for name in ("index", "label"))
        ]
        if len(alike) < 2:
            continue
        robust = {k: one.tables[evaluation]["robust"].astype(bool) for k, one in alike}
        verdicts[evaluation] = {
            "index": first["index"],
            "label": first["label"],
            "wins": np.sum(list(robust.values()), axis=0),
            **{f"robust_{k}": verdict.astype(np.uint8) for k, verdict in robust.items()},
        }
        for (k, one), (m, other) in combinations(alike, 2):
            pair = mcnemar(robust[k], robust[m])
            both = int((robust[k] & robust[m]).sum())
            neither = pair.count - both - pair.only_first - pair.only_second
            called = evaluation.removeprefix(_HELD).replace(" ", ", ", 1).replace("_", "/")
            rows.append(
                (
                    called,
                    one.label,
                    other.label,
                    pair.count,
                    both,
                    pair.only_first,
                    pair.only_second,
                    neither,
                    pair.p_value,
                )
            )
    columns = list(zip(*rows, strict=True)) if rows else [()] * 9
    names = ("evaluation", "a", "b", "n", "both", "only_a", "only_b", "neither", "p")
    return {name: np.array(column) for name, column in zip(names, columns, strict=True)}, verdicts


ANALYSIS = register(
    Analysis(
        name=NAME,
        title=TITLE,
        measure=measure,
        draw=draw,
        needs="records",
        cost="seconds: it reads instance tables, evaluations and what other analyses have stored",
        splits=(),
        compare=compare,
        draw_compared=draw_compared,
    )
)
