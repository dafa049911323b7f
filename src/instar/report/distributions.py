"""Numbers about all training instances by epoch: how many attack steps they survive, and who carries the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instar.errors import UserError
from instar.report.stored import StoredRun, UnavailableError, read

TOP = 0.1
"""Share of the instances whose part of the loss is reported."""


@dataclass(frozen=True, eq=False)
class Survival:
    """How many iterates of the training attack the instances survive, by epoch.

    Attributes:
        epochs: Epochs (E,), from 0.
        steps: K in each epoch (E,).
        counts: Instances with κ = 0, 1, ... in each epoch (E, max K + 1).
        known: Whether K comes from the stored method; otherwise it is the largest κ that was seen.
    """

    epochs: np.ndarray
    steps: np.ndarray
    counts: np.ndarray
    known: bool

    @property
    def n(self) -> np.ndarray:
        """Instances trained on in each epoch (E,)."""
        return self.counts.sum(1)

    @property
    def shares(self) -> np.ndarray:
        """`counts` as shares of each epoch's instances (E, max K + 1)."""
        return self.counts / self.n[:, None]

    @property
    def attackable(self) -> np.ndarray:
        """Share with κ = 0 (E,): misclassified already at the attack's start, and after every inspected step."""
        return self.shares[:, 0]

    @property
    def guarded(self) -> np.ndarray:
        """Share with κ = K (E,): no inspected iterate is misclassified."""
        return self.shares[np.arange(len(self.steps)), self.steps]

    @property
    def mean(self) -> np.ndarray:
        """Mean κ (E,)."""
        return self.shares @ np.arange(self.counts.shape[1])


def survival_counts(run: str | Path | StoredRun) -> Survival:
    """Count κ over the instances that were trained on, for every stored epoch.

    Args:
        run: Run folder.

    Returns:
        The counts. Rows last written in an earlier epoch are left out.

    Raises:
        UserError: No instance table is stored, one is damaged, or the attack has no step.
    """
    stored = read(run)
    stored.require_tables()
    found = [_count(stored, epoch) for epoch in stored.tables]
    told = [stored.attack_steps(epoch) for epoch in stored.tables]
    largest = max(len(counts) for counts in found) - 1
    known = None not in told
    steps = np.array(told if known else [largest] * len(found), dtype=np.int64)
    if (steps < 1).any():
        raise UnavailableError(f"κ says nothing about {stored.folder}: its attack takes no step in some epoch")
    for epoch, counts, most in zip(stored.tables, found, steps, strict=True):
        if len(counts) - 1 > most:
            raise UserError(
                f"κ must be at most {most}, the steps of the attack; epoch {epoch} of {stored.folder} has "
                f"{len(counts) - 1}. Do its tables belong to its run.json?"
            )
    width = int(steps.max()) + 1
    padded = np.stack([np.pad(counts, (0, width - len(counts))) for counts in found])
    return Survival(np.array(stored.tables), steps, padded, known)


def _count(stored: StoredRun, epoch: int) -> np.ndarray:
    kappa = stored.instances(epoch)["kappa"]
    if not np.issubdtype(kappa.dtype, np.integer) or kappa.min() < 0:
        raise UserError(f"κ must be whole numbers of at least 0; epoch {epoch} of {stored.folder} has others")
    return np.bincount(kappa)


@dataclass(frozen=True, eq=False)
class Unevenness:
    """How unevenly the training loss lies on the instances, by epoch.

    The loss is the one that the method minimises, per instance and with its weights.

    Attributes:
        epochs: Epochs (E,), from 0.
        n: Instances trained on in each epoch (E,).
        median: Median loss (E,).
        mean: Mean loss (E,).
        top_share: Share of the total that the tenth with the highest loss carries (E,); see `top_share`.
    """

    epochs: np.ndarray
    n: np.ndarray
    median: np.ndarray
    mean: np.ndarray
    top_share: np.ndarray


def unevenness_by_epoch(run: str | Path | StoredRun) -> Unevenness:
    """Summaries of the loss over the instances that were trained on, for every stored epoch.

    Args:
        run: Run folder.

    Returns:
        The summaries.

    Raises:
        UserError: No instance table is stored, or one is damaged.
    """
    stored = read(run)
    stored.require_tables()
    rows = []
    for epoch in stored.tables:  # one table at a time: all epochs of a large data set would not fit into memory
        found = losses(stored, epoch)
        rows.append((len(found), np.median(found), found.mean(), top_share(found)))
    n, median, mean, top = (np.array(column) for column in zip(*rows, strict=True))
    return Unevenness(np.array(stored.tables), n, median, mean, top)


def losses(run: str | Path | StoredRun, epoch: int) -> np.ndarray:
    """The losses (n,), float64, of the instances that were trained on in an epoch (from 0).

    Raises:
        UserError: The table is missing or damaged, or a loss is not a number.
    """
    stored = read(run)
    found = stored.instances(epoch)["loss"].astype(np.float64)
    if not np.isfinite(found).all():
        raise UserError(f"epoch {epoch} of {stored.folder} has losses that are not finite: did training diverge?")
    return found


def top_share(losses: np.ndarray, *, top: float = TOP) -> float:
    """Share of the total that the largest `top` of the values carry, the last value of them counting in part.

    share = (Σ of the ⌊m⌋ largest + (m − ⌊m⌋) · next) / Σ of all,   m = top · n; equal values give exactly `top`.

    Args:
        losses: Values (n,), n at least 1.
        top: Share of the instances, in (0, 1).

    Returns:
        The share in [0, 1] for values of one sign; NaN if the total is not positive.

    Example:
        >>> round(top_share(np.full(7, 2.0)), 12), top_share(np.array([0.0] * 9 + [3.0]))
        (0.1, 1.0)
    """
    falling = np.sort(np.asarray(losses, dtype=np.float64))[::-1]
    total = falling.sum()
    if not total > 0:
        return float("nan")
    wanted = top * len(falling)
    whole = int(wanted)
    return float((falling[:whole].sum() + (wanted - whole) * falling[whole]) / total)
