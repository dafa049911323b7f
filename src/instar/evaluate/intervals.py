"""How sure a counted accuracy is, and whether two models that saw the same images differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from instar.errors import UserError


def wilson(successes: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion k / n.

    centre = (k + z²/2) / (n + z²);   half-width = z / (n + z²) · √(k (n − k) / n + z² / 4)

    Unlike k/n ± z·s it stays inside [0, 1] and is sensible at 0 and at n.

    Args:
        successes: k, in [0, n].
        count: n, at least 1.
        confidence: Coverage in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        UserError: Counts that cannot be.

    Example:
        >>> [round(end, 4) for end in wilson(50, 100)]
        [0.4038, 0.5962]

    Source: Wilson 1927.
    """
    if not 0 <= successes <= count or count < 1:
        raise UserError(f"successes must be in [0, count] and count at least 1; got {successes} of {count}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (successes + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(successes * (count - successes) / count + z * z / 4)
    # At 0 and n the ends are exactly 0 and 1; the subtraction would leave a rounding error of either sign.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == count else centre + half)


@dataclass(frozen=True)
class Paired:
    """Two sets of verdicts on the same instances.

    Attributes:
        count: Instances n.
        only_first: How many only the first gets right.
        only_second: How many only the second gets right.
    """

    count: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, in [−1, 1]."""
        return (self.only_first - self.only_second) / self.count

    @property
    def error(self) -> float:
        """Standard error of the difference; pairs on which both agree do not add to it."""
        discordant = self.only_first + self.only_second
        return math.sqrt(max(discordant - (self.only_first - self.only_second) ** 2 / self.count, 0.0)) / self.count

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided p-value: how likely so uneven a split of the discordant pairs is by chance."""
        discordant = self.only_first + self.only_second
        return min(1.0, 2 * _tail(min(self.only_first, self.only_second), discordant))

    @property
    def mid_p(self) -> float:
        """The same with half of the probability of the split that was seen.

        The exact test of a discrete count rejects less often than it says; this one rejects about as often.

        Source: Fagerland, Lydersen & Laake 2013.
        """
        discordant, smaller = self.only_first + self.only_second, min(self.only_first, self.only_second)
        if self.only_first == self.only_second:
            return 1.0
        # Twice the tail, less one of the two halves of what was seen: its probability is the last step of the tail.
        return _tail(smaller, discordant) + _tail(smaller - 1, discordant)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Tango's interval of the difference, see `tango`."""
        return tango(self.only_first, self.only_second, self.count, confidence=confidence)


def _tail(heads: int, coins: int) -> float:
    """The probability of at most so many heads among fair coins."""
    return float(special.bdtr(heads, coins, 0.5)) if heads >= 0 else 0.0


def mcnemar(first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare two sets of verdicts on the same instances, in the same order.

    Args:
        first: Whether each instance is right (n,), boolean or 0/1.
        second: The same for the other model or attack.

    Returns:
        The counts, with difference, standard error and p-value.

    Raises:
        UserError: Different lengths, or nothing to compare.

    Example:
        >>> pair = mcnemar([1, 1, 1, 0], [1, 0, 0, 0])
        >>> pair.difference, pair.p_value
        (0.5, 0.5)

    Source: McNemar 1947, in the exact binomial form.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"both must be verdicts (n,) on the same instances; got {a.shape} and {b.shape}")
    return Paired(len(a), int((a & ~b).sum()), int((b & ~a).sum()))


def tango(only_first: int, only_second: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval of the difference of two accuracies on the same n instances.

    It holds every difference d with |b − c − n d| ≤ z · √(n (2 q(d) + d (1 − d))): b and c instances only the first and
    only the second gets right, and q(d) the most likely share of the latter if the difference were d. Unlike the
    difference ± z standard errors it is not empty where the two agree on every instance, and never leaves [−1, 1].

    Args:
        only_first: b, how many only the first gets right.
        only_second: c, how many only the second gets right.
        count: n, at least 1.
        confidence: Coverage in (0, 1).

    Returns:
        Lower and upper end, in [−1, 1].

    Raises:
        UserError: Counts that cannot be.

    Example:
        >>> [round(end, 3) for end in tango(1, 7, 21)]
        [-0.517, -0.026]

    Source: Tango 1998; the example is that of Fagerland, Lydersen & Laake 2014.
    """
    if min(only_first, only_second) < 0 or only_first + only_second > count or count < 1:
        raise UserError(
            f"discordant pairs must be at least 0 and at most count together; got {only_first} and {only_second} of "
            f"{count}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    observed = (only_first - only_second) / count

    def outside(difference: float) -> bool:
        linear = (2 * count - only_first + only_second) * difference - only_first - only_second
        constant = only_second * difference * (1 - difference)
        share = (math.sqrt(max(linear**2 + 8 * count * constant, 0.0)) - linear) / (4 * count)
        variance = count * (2 * share + difference * (1 - difference))
        return (only_first - only_second - count * difference) ** 2 > z * z * max(variance, 0.0)

    def end(inside: float, beyond: float) -> float:
        if not outside(beyond):
            return beyond
        for _ in range(60):
            middle = (inside + beyond) / 2
            inside, beyond = (inside, middle) if outside(middle) else (middle, beyond)
        return (inside + beyond) / 2

    return end(observed, -1.0), end(observed, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several p-values: the smallest times m, the next times m − 1, …, never falling.

    Rejecting what is below 0.05 afterwards makes even one false rejection among all m no likelier than 5 %, whatever
    the tests have to do with each other.

    Args:
        p_values: The p-values of one family of tests.

    Returns:
        The corrected ones, in the same order, at most 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]

    Source: Holm 1979.
    """
    found = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = highest
    return found


@dataclass(frozen=True)
class Mean:
    """An estimated mean, or a difference of two, with the uncertainty that instances and seeds leave.

    Attributes:
        value: The estimate.
        error: Its standard error.
        freedom: Degrees of freedom of that error.
    """

    value: float
    error: float
    freedom: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval."""
        half = float(special.stdtrit(self.freedom, 0.5 + confidence / 2)) * self.error if self.error else 0.0
        return self.value - half, self.value + half

    @property
    def p_value(self) -> float:
        """Two-sided, for a mean of 0."""
        if not self.error:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * special.stdtr(self.freedom, -abs(self.value) / self.error))


def mean_of(values: ArrayLike) -> Mean:
    """The mean over instances.

    Args:
        values: One number for each instance (n,), for example the share of corruptions that leave it right.

    Returns:
        Mean, standard error and degrees of freedom.

    Raises:
        UserError: Nothing to average.

    Example:
        >>> found = mean_of([0.0, 0.5, 1.0])
        >>> found.value, round(found.error, 4), found.freedom
        (0.5, 0.2887, 2)
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise UserError(f"values must be numbers (n,), one for each instance; got {found.shape}")
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else 0.0
    return Mean(float(found.mean()), error, max(len(found) - 1, 1))


def seeds_difference(first: ArrayLike, second: ArrayLike) -> Mean:
    """The difference of two recipes, each trained with several seeds and judged on the same instances.

    It varies with the instances and with the seeds: its variance is that of the paired differences of the recipes'
    means over seeds, divided by n, plus s²/k of either recipe's accuracies over its k seeds; the degrees of freedom are
    Satterthwaite's. Either part contains the interaction of instances and seeds, so the interval is rather too wide
    than too narrow. A recipe with one seed adds nothing of its own spread, which then is not known.

    Args:
        first: Verdicts (k₁, n), or shares in [0, 1].
        second: Verdicts (k₂, n).

    Returns:
        The first's accuracy minus the second's, with its error.

    Raises:
        UserError: Other shapes.

    Example:
        >>> one, other = [[1, 1, 0, 1], [1, 1, 1, 1]], [[1, 0, 0, 1], [1, 0, 0, 0]]
        >>> seeds_difference(one, other).value
        0.5
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise UserError(f"both must be verdicts (seeds, n) on the same instances; got {a.shape} and {b.shape}")
    paired = mean_of(a.mean(0) - b.mean(0))
    parts = [(paired.error**2, paired.freedom)]
    parts += [(rows.mean(1).var(ddof=1) / len(rows), len(rows) - 1) for rows in (a, b) if len(rows) > 1]
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    return Mean(paired.value, math.sqrt(total), total**2 / spread if spread else paired.freedom)
