"""Weights of instances: coefficients without gradient."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from instar.errors import UserError
from instar.evidence import UNLABELLED, Evidence
from instar.expression import value
from instar.schedules import Schedule
from instar.signals.algebra import Signal
from instar.signals.losses import check_choice


def mean_one(log_weights: Tensor) -> Tensor:
    """Weights with mean 1 from their logarithms.

    w_i = exp(l_i − max l), then w_i / mean w. Equal logarithms give *exactly* 1 for every batch size, which
    B · softmax(l) does not; and no finite logarithm can underflow all weights at once.

    Args:
        log_weights: (B,); NaN marks an instance that has no weight of its own, because it has no label.

    Returns:
        (B,), non-negative, mean 1 over those that have one, and 1 for the others.

    Example:
        >>> mean_one(torch.tensor([-500.0, -500.0, -500.0]))
        tensor([1., 1., 1.])
        >>> mean_one(torch.tensor([0.0, float("nan"), -float("inf")]))
        tensor([2., 1., 0.])
    """
    known = ~log_weights.isnan()
    logarithms = torch.where(known, log_weights, float("-inf"))
    weights = (logarithms - logarithms.max()).exp()
    return torch.where(known, weights / (weights.sum() / known.sum()), 1.0).to(log_weights.dtype)


@value
class GeometryWeight(Signal):
    """GAIRAT's weight: large for instances that few attack steps suffice to fool, mean 1 over the batch.

    With u = shift + 5 (1 − 2 κ / K):

    ============  ===========================
    ``tanh``      ω = (1 + tanh u) / 2 = σ(2u)
    ``sigmoid``   ω = σ(u)
    ``discrete``  ω = (K + 1 − κ) / (K + 1), which ignores the shift unless it is +inf
    ``constant``  ω = 1
    ============  ===========================

    and ω̂_i = B ω_i / Σ_j ω_j. It is computed from logarithms relative to the batch, so no shift, however negative,
    lets all weights vanish.

    Attributes:
        shift: λ of the paper; smaller concentrates the weight on small κ. +inf gives weights of exactly 1 (the
            burn-in, plain adversarial training). May be a `Schedule`.
        weight: ``"tanh"``, ``"sigmoid"``, ``"discrete"`` or ``"constant"``.

    Raises:
        UserError: An unknown weight function, or a shift that is NaN.

    Example:
        >>> from instar.evidence import UNLABELLED, Evidence
        >>> e = Evidence(x=torch.zeros(3, 1, 1, 1), y=torch.zeros(3).long(), kappa=torch.tensor([0, 5, 10]), budget=10)
        >>> GeometryWeight(-1.0)(e)
        tensor([2.6804e+00, 3.1961e-01, 1.6474e-05])
        >>> GeometryWeight(float("inf"))(e)
        tensor([1., 1., 1.])

    Source: Zhang et al. 2021 (GAIRAT), Eq. 6 and Algorithm 2; sigmoid and discrete from the official code.
    Deviations: for odd K the paper's K/2 is used, where the code uses floor(K/2) (K = 7: u reaches −5, not −6.67).
    """

    shift: float | Schedule
    weight: str = "tanh"

    couples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        check_choice("GeometryWeight", "weight", self.weight, ("tanh", "sigmoid", "discrete", "constant"))
        if not isinstance(self.shift, Schedule) and math.isnan(self.shift):
            raise UserError("shift of GeometryWeight (λ) must be a number or inf; got nan")

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the attack's own record."""
        return frozenset({"kappa"})

    def logarithm(self, kappa: Tensor, budget: int) -> Tensor:
        """Log ω + const (B,), the constant being the same for the whole batch.

        Args:
            kappa: Geometry values (B,).
            budget: K, the attack's largest number of steps.

        Raises:
            UserError: The budget is below 2: κ then cannot rank instances.
        """
        if isinstance(self.shift, Schedule):
            raise UserError(f"shift is still the schedule {self.shift!r}: use method.at(progress) first")
        if budget < 2:
            raise UserError(f"GeometryWeight needs an attack of at least 2 steps to rank instances; got {budget}")
        kappa = kappa.to(torch.float64)
        if self.shift == math.inf or self.weight == "constant":
            return torch.zeros_like(kappa)
        if self.weight == "discrete":
            return torch.log((budget + 1 - kappa) / (budget + 1))
        slope = 2.0 if self.weight == "tanh" else 1.0
        relative = slope * 5 * (1 - 2 * kappa / budget)
        argument = slope * self.shift + relative
        # log σ(a) = −softplus(−a) = a − softplus(a). For a negative shift the second form is used without the
        # constant slope · shift, which would swallow the differences between instances.
        return relative - F.softplus(argument) if self.shift < 0 else -F.softplus(-argument)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Weights (B,), mean 1 over the labelled of the global batch and 1 for the others, without gradient."""
        if evidence.kappa is None:
            raise UserError("GeometryWeight needs an attack that counts κ; this Evidence has none")
        logarithm = self.logarithm(evidence.kappa, evidence.budget)
        logarithm = torch.where(evidence.y == UNLABELLED, float("nan"), logarithm)
        dtype = torch.get_default_dtype() if evidence.adv is None else evidence.adv.dtype
        # Detached by construction: κ counts arg-maxes. The weight is a coefficient, not a term.
        return evidence.batchwide(mean_one, logarithm).to(dtype)


@value
class RankWeight(Signal):
    """ISEAT's weight: rank of a difficulty within the batch, 1/B for the least and 1 for the most difficult.

    w_i = rank_i / B, rank ascending. The mean is (B + 1) / 2B, not 1, as in the official code. Ties are broken by
    position in the batch. Instances without a label are not ranked and get that mean.

    The other shapes are for ablations and have the same mean:

    ================  =====================================================================
    ``rank``          rank / B (published)
    ``reversed``      (B + 1 − rank) / B: the least difficult weighs most
    ``uniform``       the same for all
    ``proportional``  in proportion to the difficulty, negative ones counting 0
    ``top``           the most difficult tenth (rounded up) alone, as a hard selection
    ================  =====================================================================

    Attributes:
        difficulty: The signal to rank, usually `LossGap`.
        shape: A name of the table.

    Raises:
        UserError: An unknown shape.

    Example:
        >>> from instar.signals import Margin
        >>> from instar.evidence import UNLABELLED, Evidence
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 0.0]])
        >>> RankWeight(Margin())(Evidence(x=torch.zeros(3, 1, 1, 1), y=torch.zeros(3).long(), adv=z))
        tensor([0.6667, 1.0000, 0.3333])

    Source: Li & Spratling 2023 (ISEAT), official code.
    """

    difficulty: Signal
    shape: str = "rank"

    couples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the shape."""
        check_choice("RankWeight", "shape", self.shape, ("rank", "reversed", "uniform", "proportional", "top"))

    def __call__(self, evidence: Evidence) -> Tensor:
        """Weights (B,), non-negative, in (0, 1] for ranks, without gradient."""
        difficulty = torch.where(evidence.y == UNLABELLED, float("nan"), self.difficulty(evidence).detach())
        return evidence.batchwide(self._weights, difficulty)

    def _weights(self, values: Tensor) -> Tensor:
        """Weights from difficulties; NaN marks an instance that is not ranked."""
        known = ~values.isnan()
        count = known.sum()
        mean = (count + 1) / (2 * count)
        if self.shape == "proportional":
            shape = torch.where(known, values.clamp_min(0), 0.0)
            shape = torch.where(shape.sum() > 0, shape, known.to(values.dtype))
        elif self.shape == "uniform":
            shape = known.to(values.dtype)
        else:
            # NaNs are sorted behind all others.
            order = values.argsort(stable=True)
            ranks = torch.arange(1, len(values) + 1, device=values.device, dtype=values.dtype)
            rank = torch.empty_like(values).scatter_(0, order, ranks)
            if self.shape == "rank":
                return torch.where(known, rank / count, mean).to(values.dtype)
            if self.shape == "reversed":
                return torch.where(known, (count + 1 - rank) / count, mean).to(values.dtype)
            shape = (known & (rank > count - (count / 10).ceil())).to(values.dtype)
        return torch.where(known, shape * (mean * count / shape.sum()), mean).to(values.dtype)
