"""How unevenly something lies on instances: Gini, Lorenz curve, effective number, entropy; and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from instar.errors import UserError


def _checked(values: np.ndarray | Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) == 0 or not np.isfinite(found).all():
        raise UserError(f"expected finite values (n,) with n of at least 1; got shape {found.shape}")
    return found


def gini(values: np.ndarray | Sequence[float]) -> float:
    """Gini coefficient: half the mean absolute difference of two values, over their mean.

    G = Σ_i Σ_j |v_i − v_j| / (2 n² mean v).   0 if all are equal, (n − 1) / n if one carries everything. Negative
    values carry nothing: they count as 0.

    Args:
        values: (n,), finite, n at least 1.

    Returns:
        In [0, 1); NaN if no value is positive.

    Raises:
        UserError: No values, or some that are not finite.

    Example:
        >>> gini([1.0, 1.0, 1.0]), gini([0.0, 0.0, 0.0, 1.0]), gini([1.0, 3.0])
        (0.0, 0.75, 0.25)
    """
    rising = np.sort(np.maximum(_checked(values), 0.0))
    total = rising.sum()
    if not total > 0:
        return float("nan")
    count = len(rising)
    ranks = np.arange(1, count + 1)
    return float(max(0.0, (2 * ranks - count - 1) @ rising / (count * total)))


def lorenz(values: np.ndarray | Sequence[float], *, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Lorenz curve: which share of the total the lowest share of the instances carries.

    Args:
        values: (n,), finite, n at least 1; negative ones count as 0.
        points: How many points of the curve.

    Returns:
        Shares of instances (points,) from 0 to 1, and of the total (points,); NaN if no value is positive.

    Raises:
        UserError: No values, or some that are not finite.

    Example:
        >>> x, y = lorenz([1.0, 3.0], points=3)
        >>> x.tolist(), y.tolist()
        ([0.0, 0.5, 1.0], [0.0, 0.25, 1.0])
    """
    rising = np.sort(np.maximum(_checked(values), 0.0))
    x = np.linspace(0, 1, points)
    total = rising.sum()
    if not total > 0:
        return x, np.full(points, np.nan)
    sums = np.concatenate([[0.0], np.cumsum(rising)]) / total
    return x, np.interp(x, np.linspace(0, 1, len(sums)), sums)


def effective_number(weights: np.ndarray | Sequence[float]) -> float:
    """Effective sample size (Kish): (Σ w)² / Σ w², the number of equal weights that would vary as little.

    Args:
        weights: (n,), finite, at least 0, n at least 1.

    Returns:
        In [1, n]; NaN if all are 0.

    Raises:
        UserError: No weights, negative ones, or some that are not finite.

    Example:
        >>> effective_number([1.0, 1.0, 0.0, 0.0]), round(effective_number([3.0, 1.0]), 6)
        (2.0, 1.6)
    """
    found = _checked(weights)
    if (found < 0).any():
        raise UserError(f"weights must be at least 0; got {found.min():g}")
    largest = found.max()
    if not largest > 0:
        return float("nan")
    scaled = found / largest  # squares of tiny weights would vanish
    return float(scaled.sum() ** 2 / (scaled**2).sum())


def entropy(shares: np.ndarray | Sequence[float]) -> float:
    """Entropy of a distribution in nats: −Σ p ln p with p the shares over their sum; ln n if they are equal.

    Args:
        shares: (n,), finite, at least 0; counts will do.

    Returns:
        In [0, ln n]; NaN if all are 0.

    Raises:
        UserError: No shares, negative ones, or some that are not finite.

    Example:
        >>> round(entropy([2, 2]), 6), entropy([0, 5, 0])
        (0.693147, 0.0)
    """
    found = _checked(shares)
    if (found < 0).any():
        raise UserError(f"shares must be at least 0; got {found.min():g}")
    total = found.sum()
    if not total > 0:
        return float("nan")
    p = found[found > 0] / total
    return float(abs(-(p * np.log(p)).sum()))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two measures of the same instances; NaN if one is constant or n is below 3.

    Example:
        >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 15.0])), 6)
        0.5
    """
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ-b, which allows for ties; NaN if one is constant or n is below 3.

    Example:
        >>> round(kendall(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 15.0])), 6)
        0.333333
    """
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.kendalltau(a, b).statistic)
