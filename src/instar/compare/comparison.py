"""The comparison itself: accuracies, paired differences with intervals, classes, and who was won and lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, takewhile
from typing import Any

import numpy as np

from instar.compare.common import WORST, Shared, share
from instar.compare.gather import Judged, Target, gather
from instar.data.catalogue import CATALOGUE
from instar.errors import UserError, unknown
from instar.evaluate.intervals import holm, mcnemar, mean_of, seeds_difference, wilson

SIGNIFICANT = 0.05
AGAINST = ("first", "all")


@dataclass(frozen=True)
class Estimate:
    """An accuracy.

    Attributes:
        value: In [0, 1]; over several seeds the mean.
        low: Lower end of its 95 % interval: Wilson's for one seed, else Student's over images and seeds.
        high: Upper end.
        count: Images it is taken over.
        deviation: Standard deviation over seeds, or None for one seed.
    """

    value: float
    low: float
    high: float
    count: int
    deviation: float | None = None


@dataclass(frozen=True)
class Column:
    """What is compared, in the words of records and of tables.

    Attributes:
        name: For example ``"autoattack"``.
        title: For example ``"AutoAttack"``.
    """

    name: str
    title: str


@dataclass(frozen=True)
class Arm:
    """A row of the comparison: one evaluated checkpoint, or several that differ by the seed of training.

    Attributes:
        name: What tables call it.
        sources: Where each seed's record lies, or what was evaluated.
        seeds: Seeds of training, None where unknown; one entry for each run.
        checkpoint: Which checkpoint.
        scores: By name of the column.
        classes: Accuracy of each class in the compared column, None for a class without images.
        worst_class: The class with the lowest accuracy.
        worst: Its accuracy; the interval holds the lowest of the classes' true accuracies (Bonferroni over classes).
        suspicions: What the sanity checks of its records found.
    """

    name: str
    sources: tuple[str, ...]
    seeds: tuple[int | None, ...]
    checkpoint: str
    scores: Mapping[str, Estimate]
    classes: tuple[Estimate | None, ...]
    worst_class: int
    worst: Estimate
    suspicions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """One arm against another in one column, image by image.

    Attributes:
        arm: Name of the one.
        reference: Name of the other.
        column: Name of the column.
        value: Accuracy of the arm minus that of the reference, in [−1, 1].
        low: Lower end of the paired 95 % interval.
        high: Upper end.
        p: Two-sided p-value: McNemar's mid-p, or Student's where there are several seeds or shares.
        p_exact: McNemar's exact one, or None.
        p_holm: `p` after Holm's correction for all comparisons of the column.
        won: Official positions of the images that only the arm gets right (for several seeds: more than half of them).
        lost: Those that only the reference gets right.
        both: How many both get right.
        neither: How many neither gets right.
    """

    arm: str
    reference: str
    column: str
    value: float
    low: float
    high: float
    p: float
    p_exact: float | None
    p_holm: float
    won: tuple[int, ...]
    lost: tuple[int, ...]
    both: int
    neither: int


@dataclass(frozen=True)
class Comparison:
    """Several evaluations on the same images.

    Attributes:
        arms: The rows, in the order in which they were given; the first is what others are compared with.
        columns: What all have.
        column: Name of the one that differences, classes, and images won and lost are about in tables.
        differences: For every column, of every arm against the first, or of all pairs.
        count: Images in common, n.
        protocol: Threat model, images and data in words.
        classes: Names of the classes.
        leaders: For each column, which arms are best, or not significantly worse than the best (paired, p ≥ 0.05,
            uncorrected).
        notes: What a reader must know.
    """

    arms: tuple[Arm, ...]
    columns: tuple[Column, ...]
    column: str
    differences: tuple[Difference, ...]
    count: int
    protocol: Mapping[str, str]
    classes: tuple[str, ...]
    leaders: Mapping[str, tuple[bool, ...]]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Title of the compared column."""
        return next(column.title for column in self.columns if column.name == self.column)

    @property
    def headline(self) -> tuple[Difference, ...]:
        """The differences of the compared column."""
        return tuple(difference for difference in self.differences if difference.column == self.column)

    def to_text(self, *, width: int = 1000) -> str:
        """Tables as plain text.

        Args:
            width: Characters in a line.
        """
        from instar.compare import render

        return render.plain(self, width=width)

    def to_markdown(self) -> str:
        """Tables in Markdown."""
        from instar.compare import render

        return render.markdown(self)

    def to_latex(self) -> str:
        """Tables in LaTeX, for the package ``booktabs``."""
        from instar.compare import render

        return render.latex(self)

    def to_json(self) -> str:
        """Everything, with the positions of all images won and lost."""
        from instar.compare import render

        return render.as_json(self)


@dataclass(frozen=True)
class _Group:
    """An arm before it is measured: its runs, and their columns stacked (seeds, n)."""

    name: str
    members: tuple[Judged, ...]
    values: Mapping[str, np.ndarray]


def compare(
    targets: Sequence[Target],
    *,
    column: str | None = None,
    names: Sequence[str] | None = None,
    common: bool = False,
    against: str = "first",
    suite: str | None = None,
    checkpoint: str | None = None,
) -> Comparison:
    """Compare evaluations image by image.

    Runs whose ``run.json`` differ in nothing but the seed become one row, mean ± standard deviation over seeds.

    Of single runs: differences with Tango's paired interval and McNemar's mid-p value. Of several seeds: Student's
    interval and test, with the variance over images and over seeds (`instar.evaluate.intervals.seeds_difference`).
    Holm's correction is over all comparisons within a column.

    Args:
        targets: Run folders, folders of records, records' JSON files (each may be ``NAME=PATH``), or records.
        column: Name of the column that differences and classes are about, for example ``"autoattack"``; None takes the
            worst case over the attacks that all share, or else the last common column.
        names: Names for tables, one for each target.
        common: Whether to compare the common part of evaluations under different threat models or on different images.
        against: ``"first"``: all are compared with the first; ``"all"``: every pair.
        suite: Only records of this suite.
        checkpoint: Only records of this checkpoint.

    Returns:
        The comparison.

    Raises:
        UserError: Protocols that differ, in one line; nothing to compare; an unknown column.

    Source: Tango 1998; Fagerland, Lydersen & Laake 2013; Holm 1979.
    """
    if against not in AGAINST:
        raise unknown("choice of against", against, AGAINST)
    judged = gather(targets, names=names, suite=suite, checkpoint=checkpoint)
    shared = share(judged, common=common)
    groups = _groups(judged, shared)
    if len(groups) < 2:
        raise UserError(
            f"all of these runs differ in the seed only ({', '.join(one.name for one in judged)}): there is nothing to "
            "compare them with"
        )
    columns = tuple(Column(name, title) for name, title in shared.titles.items())
    chosen = _column(column, shared.titles)
    arms = tuple(_arm(group, shared, chosen) for group in groups)
    pairs = [(0, other) for other in range(1, len(groups))] if against == "first" else _pairs(len(groups))
    differences: list[Difference] = []
    for one in columns:
        found = [_difference(groups[other], groups[first], one.name, shared.index) for first, other in pairs]
        corrected = holm([difference.p for difference in found])
        differences += [replace(item, p_holm=p) for item, p in zip(found, corrected, strict=True)]
    first = judged[0].main.protocol
    return Comparison(
        arms=arms,
        columns=columns,
        column=chosen,
        differences=tuple(differences),
        count=len(shared.index),
        protocol=_protocol(judged, shared),
        classes=_class_names(judged[0], int(first["data"]["classes"])),
        leaders={one.name: _leaders(groups, one.name, shared.index) for one in columns},
        notes=shared.notes,
    )


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def _column(wish: str | None, titles: Mapping[str, str]) -> str:
    if wish is None:
        return WORST if WORST in titles else list(titles)[-1]
    if wish not in titles:
        raise unknown("column in common", wish, titles)
    return wish


def _protocol(judged: Sequence[Judged], shared: Shared) -> dict[str, str]:
    threats = dict.fromkeys(f"{one.main.protocol['norm']} {one.main.protocol['eps']}" for one in judged)
    images = dict.fromkeys(str(one.main.protocol["images"]) for one in judged)
    data = judged[0].main.protocol["data"]
    described = next(iter(images)) if len(images) == 1 else f"{len(shared.index)} images of {data['title']}"
    return {"threat": ", ".join(threats), "images": described, "data": str(data["title"])}


def _class_names(one: Judged, count: int) -> tuple[str, ...]:
    name = one.main.protocol["data"]["name"]
    known: Sequence[str] = CATALOGUE[name].classes if name in CATALOGUE else ()
    known = known if len(known) == count else (one.run.get("data") or {}).get("classes") or ()
    return tuple(map(str, known)) if len(known) == count else tuple(map(str, range(count)))


def _groups(judged: Sequence[Judged], shared: Shared) -> list[_Group]:
    """Runs of one recipe whose seeds are known and distinct together; everything else by itself."""
    places: list[list[int]] = []
    recipes: dict[str, list[int]] = {}
    for place, one in enumerate(judged):
        known = None if one.recipe is None or one.seed is None else recipes.get(one.recipe)
        # The same seed once more is another evaluation of the same run, not another run.
        if known is not None and one.seed not in {judged[other].seed for other in known}:
            known.append(place)
            continue
        places.append([place])
        if one.recipe is not None:
            recipes.setdefault(one.recipe, places[-1])
    found = []
    for group in places:
        members = tuple(judged[place] for place in group)
        values = {name: np.stack([shared.values[place][name] for place in group]) for name in shared.titles}
        found.append(_Group(_group_name(members), members, values))
    names = [group.name for group in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two rows would have the name {twice}: give names, as NAME=PATH")
    return found


def _group_name(members: Sequence[Judged]) -> str:
    """What the names of its runs begin with, or else the recipe."""
    names = [member.name for member in members]
    if len(set(names)) == 1:
        return names[0]
    shared = "".join(letters[0] for letters in takewhile(lambda found: len(set(found)) == 1, zip(*names, strict=False)))
    return shared.rstrip("-_, ").removesuffix("seed").rstrip("-_, ") or str(members[0].run.get("recipe"))


def _arm(group: _Group, shared: Shared, column: str) -> Arm:
    values = group.values[column]
    labels = range(int(shared.label.max()) + 1)
    count = len(np.unique(shared.label))
    classes: list[Estimate | None] = []
    simultaneous: list[Estimate] = []
    for label in labels:
        of_class = values[:, shared.label == label]
        classes.append(_estimate(of_class) if of_class.size else None)
        if of_class.size:
            simultaneous.append(_estimate(of_class, confidence=1 - 0.05 / count))
    worst = min((entry.value, label) for label, entry in enumerate(classes) if entry is not None)[1]
    lowest = classes[worst]
    assert lowest is not None
    least = (min(entry.low for entry in simultaneous), min(entry.high for entry in simultaneous))
    return Arm(
        name=group.name,
        sources=tuple(str(member.main.path or member.main.target) for member in group.members),
        seeds=tuple(member.seed for member in group.members),
        checkpoint=group.members[0].main.checkpoint,
        scores={name: _estimate(group.values[name]) for name in shared.titles},
        classes=tuple(classes),
        worst_class=worst,
        worst=replace(lowest, low=least[0], high=least[1]),
        suspicions=_suspicions(group.members),
    )


def _suspicions(members: Sequence[Judged]) -> tuple[str, ...]:
    """What the checks of the records say, once each; a normal or merely high figure is no suspicion."""
    texts = [
        f"{finding.verdict}: {finding.text}"
        for member in members
        for record in member.records
        for finding in record.findings
        if finding.verdict in ("suspect", "overestimated")
    ]
    return tuple(dict.fromkeys(texts))


def _estimate(values: np.ndarray, *, confidence: float = 0.95) -> Estimate:
    """Accuracy (seeds, n) → its estimate."""
    seeds, count = values.shape
    accuracies = values.mean(1, dtype=np.float64)
    if seeds == 1 and values.dtype == bool:
        low, high = wilson(int(values.sum()), count, confidence=confidence)
        return Estimate(float(accuracies[0]), low, high, count)
    mean = mean_of(values[0]) if seeds == 1 else seeds_difference(values, np.zeros((1, count)))
    low, high = mean.interval(confidence)
    deviation = float(accuracies.std(ddof=1)) if seeds > 1 else None
    return Estimate(mean.value, max(low, 0.0), min(high, 1.0), count, deviation)


def _difference(arm: _Group, reference: _Group, column: str, index: np.ndarray) -> Difference:
    """One paired comparison, not yet corrected for others."""
    a, b = arm.values[column], reference.values[column]
    right, other = (values.mean(0) > 0.5 for values in (a, b))
    exact: float | None = None
    if len(a) == len(b) == 1 and a.dtype == b.dtype == bool:
        pair = mcnemar(a[0], b[0])
        value, (low, high), p, exact = pair.difference, pair.interval(), pair.mid_p, pair.p_value
    else:
        mean = seeds_difference(a, b)
        low, high = mean.interval()
        value, low, high, p = mean.value, max(low, -1.0), min(high, 1.0), mean.p_value
    return Difference(
        arm=arm.name,
        reference=reference.name,
        column=column,
        value=value,
        low=low,
        high=high,
        p=p,
        p_exact=exact,
        p_holm=p,
        won=tuple(index[right & ~other].tolist()),
        lost=tuple(index[other & ~right].tolist()),
        both=int((right & other).sum()),
        neither=int((~right & ~other).sum()),
    )


def _leaders(groups: Sequence[_Group], column: str, index: np.ndarray) -> tuple[bool, ...]:
    """The best, and what it is not significantly better than."""
    accuracies = [float(group.values[column].mean()) for group in groups]
    best = int(np.argmax(accuracies))

    def level(place: int) -> bool:
        return place == best or _difference(groups[best], groups[place], column, index).p >= SIGNIFICANT

    return tuple(level(place) for place in range(len(groups)))


def as_dictionary(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON holds it.

    Args:
        comparison: What to write.

    Returns:
        Dictionaries, lists, numbers and text.
    """

    def estimate(entry: Estimate | None) -> dict[str, Any] | None:
        if entry is None:
            return None
        found = {"accuracy": entry.value, "low": entry.low, "high": entry.high, "count": entry.count}
        return found if entry.deviation is None else {**found, "deviation_over_seeds": entry.deviation}

    names = comparison.classes
    return {
        "format": 1,
        "n": comparison.count,
        **comparison.protocol,
        "column": comparison.column,
        "columns": {column.name: column.title for column in comparison.columns},
        "notes": list(comparison.notes),
        "arms": [
            {
                "name": arm.name,
                "sources": list(arm.sources),
                "seeds": list(arm.seeds),
                "checkpoint": arm.checkpoint,
                "scores": {name: estimate(entry) for name, entry in arm.scores.items()},
                "classes": {
                    name: estimate(entry) for name, entry in zip(names, arm.classes, strict=False) if entry is not None
                },
                "worst_class": {"name": names[arm.worst_class], **(estimate(arm.worst) or {})},
                "suspicions": list(arm.suspicions),
            }
            for arm in comparison.arms
        ],
        "differences": [
            {
                "arm": item.arm,
                "reference": item.reference,
                "column": item.column,
                "difference": item.value,
                "low": item.low,
                "high": item.high,
                "p": item.p,
                "p_exact": item.p_exact,
                "p_holm": item.p_holm,
                "won": len(item.won),
                "lost": len(item.lost),
                "both_right": item.both,
                "both_wrong": item.neither,
                "won_images": list(item.won),
                "lost_images": list(item.lost),
            }
            for item in comparison.differences
        ],
    }
