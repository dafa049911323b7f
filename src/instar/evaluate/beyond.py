"""Beside the threat model a model was trained for: common corruptions, other norms, other radii, and their summaries.

The columns of these suites do not count in a record's worst case (unless their ball lies within the trained one); what
they say together is computed here from a record's rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.table import Table

from instar.errors import UserError
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.corruptions import SEVERITIES, Corruption, PublishedCorruption
from instar.evaluate.distortions import DISTORTIONS
from instar.evaluate.entries import Entry, Suite
from instar.evaluate.intervals import mean_of
from instar.evaluate.record import Record, Score
from instar.expression import number
from instar.threat import Ball
from instar.threat import ball as ball_of

MULTIPLES = (0.5, 1.0, 1.5, 2.0)
"""Radii of the sweep in units of the trained one: 4/255, 8/255, 12/255 and 16/255 for 8/255."""
NORMS = ("Linf", "L2", "L1")
CIFAR = (3, 32, 32)
USUAL = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
"""Radii for images of 3 × 32 × 32 values, by norm."""
TITLES = {name: name.replace("_", " ").replace("jpeg", "JPEG") for name in DISTORTIONS}


def corruptions(ball: Ball) -> Suite:
    """CIFAR-10-C's fifteen corruptions in five severities, computed for images of any size: 75 columns.

    They are plain accuracies on all images, right or wrong when clean, and do not count in the worst case. Frost is a
    stand-in with a synthetic texture; `cifar10_c` reads the published files instead.

    Cost: one forward pass an image and column.

    Args:
        ball: Not looked at.

    Source: Hendrycks & Dietterich 2019.
    """
    return Suite("corruptions", tuple(_cell(Corruption(name, severity)) for name, severity in cells()))


def cifar10_c(ball: Ball) -> Suite:
    """The same 75 columns from the published files, ``CIFAR-10-C/*.npy`` in the folder that data sets lie in.

    Args:
        ball: Not looked at.

    Source: Hendrycks & Dietterich 2019.
    """
    return Suite("cifar10_c", tuple(_cell(PublishedCorruption(name, severity)) for name, severity in cells()))


def cifar100_c(ball: Ball) -> Suite:
    """As `cifar10_c`, from ``CIFAR-100-C``.

    Args:
        ball: Not looked at.
    """
    found = (PublishedCorruption(name, severity, data="CIFAR-100-C") for name, severity in cells())
    return Suite("cifar100_c", tuple(_cell(attack) for attack in found))


def cells() -> Iterator[tuple[str, int]]:
    """Names and severities of all 75, corruption by corruption."""
    return ((name, severity) for name in DISTORTIONS for severity in SEVERITIES)


def _cell(attack: Corruption | PublishedCorruption) -> Entry:
    title = f"{TITLES[attack.name]} {attack.severity}"
    return Entry(f"{attack.name}_{attack.severity}", title, attack, counts=False, everyone=True)


def multinorm(ball: Ball, *, shape: tuple[int, int, int] = CIFAR) -> Suite:
    """APGD-CE and APGD-T in the trained ball and in the other two norms; `union` says who withstands all three.

    The other radii are those that are usual for CIFAR-10 (Linf 8/255, L2 0.5, L1 12). For images of another number of
    values d they are scaled so that the change of a value stays the same on the quadratic mean (L2: √(d / 3072)) or on
    the mean (L1: d / 3072), and cut to four digits.

    Only the trained ball counts in the worst case.

    Cost: about 2,000 forward passes an image and norm (L1: about 2,000 more).

    Args:
        ball: The threat model.
        shape: Of an image, (C, H, W).

    Example:
        >>> from instar.threat import Linf
        >>> [entry.title for entry in multinorm(Linf(4/255)).entries]
        ['APGD at Linf 4/255', 'APGD at L2 0.5', 'APGD at L1 12']

    Source: Tramèr & Boneh 2019 (union); Croce & Hein 2021 (APGD in L1, and the radius 12).
    """
    values = math.prod(shape) / math.prod(CIFAR)
    grown = {"Linf": 1.0, "L2": math.sqrt(values), "L1": values}
    usual = {
        norm: ball_of(norm, _short(USUAL[norm] * grown[norm]) if grown[norm] != 1 else USUAL[norm]) for norm in NORMS
    }
    balls = [ball, *(usual[norm] for norm in NORMS if norm != ball.norm)]
    return Suite("multinorm", tuple(_apgd(each, f"apgd_{each.norm.lower()}", trained=ball) for each in balls))


def _short(radius: float) -> float:
    """A number with four digits."""
    return float(f"{radius:.4g}")


def eps_sweep(ball: Ball) -> Suite:
    """APGD-CE and APGD-T at half of the trained radius, at it, at one and a half and at twice of it.

    What is broken within a smaller ball is broken within the trained one too, so these columns count in the worst case;
    the larger ones do not.

    Cost: about 2,000 forward passes an image and radius.

    Args:
        ball: The threat model.

    Example:
        >>> from instar.threat import Linf
        >>> [(entry.title, entry.counts) for entry in eps_sweep(Linf(8/255)).entries][::3]
        [('APGD at Linf 4/255', True), ('APGD at Linf 16/255', False)]
    """
    radii = [ball.radius if many == 1 else _clean(many * ball.radius) for many in MULTIPLES]
    fitting = dict.fromkeys(radius for radius in radii if ball.norm != "Linf" or radius <= 1)
    return Suite(
        "eps_sweep",
        tuple(_apgd(replace(ball, eps=radius), f"apgd_eps_{_word(radius)}", trained=ball) for radius in fitting),
    )


def _clean(radius: float) -> float:
    """A product without its rounding error: 12/255 and 0.45 for one and a half times 8/255 and 0.3."""
    levels = round(510 * radius) / 2 / 255
    return levels if math.isclose(levels, radius, rel_tol=1e-12) else float(f"{radius:.15g}")


def _word(radius: float) -> str:
    return number(radius).replace("/", "_").replace(".", "_").replace("-", "_")


def _apgd(ball: Ball, name: str, *, trained: Ball) -> Entry:
    counts = ball.norm == trained.norm and ball.radius <= trained.radius
    attack = AutoAttack(ball, stages=("apgd-ce", "apgd-t"))
    return Entry(
        name,
        f"APGD at {ball.norm} {_plain(ball.radius)}",
        attack,
        counts=counts,
        role="" if ball == trained else "other",
    )


def _plain(radius: float) -> str:
    """8/255, 0.5, 12: without the zero that Python gives whole floats."""
    return f"{radius:g}" if radius.is_integer() else number(radius)


def union(record: Record) -> Score | None:
    """Who withstands the attacks in every norm: an image counts if no norm's attack breaks it.

    Args:
        record: Of the suite `multinorm`, or any that holds its columns.

    Returns:
        The score, or None if the record has columns of fewer than two norms.

    Source: Tramèr & Boneh 2019. It is never above the lowest of the columns, and usually below it.
    """
    columns = [record.instances[name] for name in _norms(record)]
    if len(columns) < 2:
        return None
    standing = np.logical_and.reduce([column.astype(bool) for column in columns])
    return Score(f"union of {len(columns)} norms", int(standing.sum()), len(standing))


def _norms(record: Record) -> list[str]:
    return [name for name in (f"apgd_{norm.lower()}" for norm in NORMS) if name in record.instances]


@dataclass(frozen=True)
class Corrupted:
    """Accuracies on corrupted images.

    Attributes:
        cells: Accuracy by corruption and severity, in [0, 1], in the order of `DISTORTIONS`.
        mean: Over all cells: the number of RobustBench's leaderboard for corruptions.
        low: Lower end of its 95 % interval over images, in which the cells of an image are not independent.
        high: Upper end.
        clean: Accuracy on the same images, clean.
        count: Images.
    """

    cells: dict[tuple[str, int], float]
    mean: float
    low: float
    high: float
    clean: float
    count: int

    @property
    def by_corruption(self) -> dict[str, float]:
        """Means over severities."""
        return {name: _mean(value for (which, _), value in self.cells.items() if which == name) for name in self.names}

    @property
    def by_severity(self) -> dict[int, float]:
        """Means over corruptions."""
        severities = sorted({severity for _, severity in self.cells})
        return {
            level: _mean(value for (_, which), value in self.cells.items() if which == level) for level in severities
        }

    @property
    def names(self) -> list[str]:
        """The corruptions, in order."""
        return list(dict.fromkeys(name for name, _ in self.cells))


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


def is_cell(name: str) -> bool:
    """Whether a column is one corruption at one severity.

    Example:
        >>> is_cell("fog_3"), is_cell("pgd_20")
        (True, False)
    """
    kind, _, severity = name.rpartition("_")
    return kind in DISTORTIONS and severity in map(str, SEVERITIES)


def shares(record: Record) -> np.ndarray | None:
    """Which share of all corruptions and severities leaves each image right.

    Args:
        record: Of the suite `corruptions`, or any that holds some of its columns.

    Returns:
        In [0, 1] (n,), or None if there is no such column.
    """
    columns = [record.instances[name] for name in record.scores if is_cell(name)]
    return np.mean([column.astype(np.float64) for column in columns], axis=0) if columns else None


def corrupted(record: Record) -> Corrupted | None:
    """The summary of the columns that are corruptions.

    Args:
        record: Of the suite `corruptions`, or any that holds some of its columns.

    Returns:
        The summary, or None if there is no such column.
    """
    found = shares(record)
    if found is None:
        return None
    order = {f"{name}_{severity}": (name, severity) for name, severity in cells()}
    mean = mean_of(found)
    low, high = mean.interval()
    return Corrupted(
        cells={order[name]: record.scores[name].accuracy for name in order if name in record.scores},
        mean=mean.value,
        low=max(low, 0.0),
        high=min(high, 1.0),
        clean=record.scores["clean"].accuracy,
        count=record.n,
    )


def rows(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Further rows of a table of records: the union of norms and the mean over corruptions, where there are any.

    Args:
        records: What is shown side by side.

    Returns:
        Title and one cell for each record, in percent with a 95 % interval, or ``"–"``.
    """
    found = []
    unions = [union(record) for record in records]
    if any(score is not None for score in unions):
        found.append(
            ("union of norms", [_cell_text((score.accuracy, *score.interval) if score else None) for score in unions])
        )
    means = [corrupted(record) for record in records]
    if any(summary is not None for summary in means):
        texts = [_cell_text((s.mean, s.low, s.high) if s else None) for s in means]
        found.append(("mean of corruptions", texts))
    return found


def _cell_text(numbers: tuple[float, float, float] | None) -> str:
    if numbers is None:
        return "–"
    accuracy, low, high = numbers
    return f"{100 * accuracy:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def grid(record: Record) -> list[list[str]]:
    """Corruptions by severities as cells of a table, in percent, with the means as last column and last row.

    Args:
        record: Of the suite `corruptions`.

    Returns:
        The heading and sixteen rows.

    Raises:
        UserError: The record has no corruptions.
    """
    summary = corrupted(record)
    if summary is None:
        raise UserError(
            f"the record of suite {record.suite} has no corruptions: instar evaluate ... --suite corruptions"
        )
    levels = list(summary.by_severity)
    found = [["accuracy, %", *(f"severity {level}" for level in levels), "mean"]]
    for name in summary.names:
        values = [summary.cells.get((name, level)) for level in levels]
        texts = ["–" if value is None else f"{100 * value:.1f}" for value in values]
        found.append([TITLES[name], *texts, f"{100 * summary.by_corruption[name]:.1f}"])
    means = [f"{100 * value:.1f}" for value in summary.by_severity.values()]
    return [*found, ["mean", *means, f"{100 * summary.mean:.1f}"]]


def notes(record: Record) -> list[str]:
    """What must be known beside the corruptions: interval, clean accuracy, where the images come from.

    Args:
        record: Of the suite `corruptions`.

    Returns:
        Lines of text; none without corruptions.
    """
    summary = corrupted(record)
    if summary is None:
        return []
    lines = [
        f"Mean of {len(summary.cells)} corruptions and severities {100 * summary.mean:.1f} % "
        f"({100 * summary.low:.1f}–{100 * summary.high:.1f}), clean {100 * summary.clean:.1f} %, on {summary.count} "
        "images; accuracies of all images, right or wrong when clean."
    ]
    attacks = record.protocol.get("attacks", {})
    if str(attacks.get("frost_1", {}).get("expression", "")).startswith("Corruption("):
        lines.append("Computed by Instar, not read from CIFAR-10-C; frost is a stand-in with a synthetic texture.")
    return lines


def render(record: Record) -> Table:
    """The 15 × 5 table of a record for the terminal.

    Args:
        record: Of the suite `corruptions`.

    Returns:
        A table of rich.

    Raises:
        UserError: The record has no corruptions.
    """
    heading, *body = grid(record)
    table = Table(title=f"{record.target}: {record.checkpoint}", title_justify="left")
    table.add_column(heading[0])
    for name in heading[1:]:
        table.add_column(name, justify="right")
    for place, (name, *texts) in enumerate(body):
        table.add_row(name, *texts, end_section=place == len(body) - 2)
    return table


def markdown(record: Record) -> str:
    """The 15 × 5 table of a record in Markdown.

    Args:
        record: Of the suite `corruptions`.

    Returns:
        The table and, below it, its notes.

    Raises:
        UserError: The record has no corruptions.
    """
    heading, *body = grid(record)
    lines = [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * (len(heading) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in body]
    return "\n".join([*lines, "", *(f"- {line}" for line in notes(record))]) + "\n"
