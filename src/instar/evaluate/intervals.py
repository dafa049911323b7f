"""How sure a counted accuracy is, and whether two models that saw the same images differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

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
        smaller = min(self.only_first, self.only_second)
        # Whole numbers until the last division: 2**discordant overflows a float beyond 1,023 pairs.
        tail = sum(math.comb(discordant, k) for k in range(smaller + 1))
        return min(1.0, float(2 * tail / 2**discordant)) if discordant else 1.0


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
