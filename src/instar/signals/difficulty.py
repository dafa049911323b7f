"""How hard an instance is at the moment, and when an attack on it has done enough."""

from __future__ import annotations

import abc
import math
from collections.abc import MutableMapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from instar.errors import UserError
from instar.evidence import Evidence
from instar.expression import value
from instar.schedules import Schedule
from instar.signals.algebra import Signal
from instar.signals.losses import CrossEntropy, check_choice, lead


@value
class ProbabilityGap(Signal):
    """P-SAT's difficulty: ψ = max_{j≠y} p_j − p_y of the attacked image, in [−1, 1]. Positive means misclassified.

    Example:
        >>> from instar.evidence import Evidence
        >>> e = Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([0]), adv=torch.tensor([[0.0, 0.0]]))
        >>> ProbabilityGap()(e)
        tensor([0.])

    Source: Sitawarin et al. 2021 (SAT), P-SAT.
    """

    largest: ClassVar[float] = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits."""
        return frozenset({"adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Gap (B,)."""
        return lead(F.softmax(evidence.logits("adv"), 1), evidence.y)


@value
class LossGap(Signal):
    """ISEAT's vulnerability: how much the attack raises the loss, CE(x′) − CE(x), in nats, without gradient.

    Attributes:
        reference: Where the clean loss is taken: ``"anchor"`` (unperturbed weights, ISEAT) or ``"clean"``.
        of: Where the adversarial loss is taken: ``"adv"`` (perturbed weights, ISEAT) or ``"anchor_adv"`` (unperturbed).

    Raises:
        UserError: An unknown name.

    Source: Li & Spratling 2023 (ISEAT).
    """

    reference: str = "anchor"
    of: str = "adv"

    def __post_init__(self) -> None:
        """Check the fields."""
        check_choice("LossGap", "reference", self.reference, ("anchor", "clean"))
        check_choice("LossGap", "of", self.of, ("adv", "anchor_adv"))

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits and the reference."""
        return frozenset({self.of, self.reference})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Gap (B,)."""
        return (CrossEntropy(self.of)(evidence) - CrossEntropy(self.reference)(evidence)).detach()


@value
class SurvivedSteps(Signal):
    """GAIRAT's geometry value κ as a share of the attack's budget, in [0, 1]."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing but the attack's own record."""
        return frozenset({"kappa"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """κ / K (B,)."""
        if evidence.kappa is None:
            raise UserError("SurvivedSteps needs an attack that counts κ; this Evidence has none")
        return evidence.kappa.to(evidence.x.dtype) / max(evidence.budget, 1)


@value
class Correct(Signal):
    """1 where the logits pick the label, else 0.

    Attributes:
        of: Which logits: ``"adv"`` (default), ``"clean"`` or ``"anchor"``.

    Raises:
        UserError: Another name of logits.
    """

    of: str = "adv"

    def __post_init__(self) -> None:
        """Check the field."""
        check_choice("Correct", "of", self.of, ("adv", "clean", "anchor"))

    @property
    def needs(self) -> frozenset[str]:
        """The logits it reads."""
        return frozenset({self.of})

    def __call__(self, evidence: Evidence) -> Tensor:
        """0 or 1 (B,)."""
        logits = evidence.logits(self.of)
        return (logits.argmax(1) == evidence.y).to(logits.dtype)


class Referenced(Signal):
    """A difficulty measured against what it is under the attack at full strength, which changes as training goes on.

    An attack asks `due` before it begins. If so it first runs without its stop rule, measures at every iterate, and
    hands what was measured to `refer`, which keeps the reference in `Batch.shared`.
    """

    @abc.abstractmethod
    def due(self, shared: MutableMapping[str, Tensor]) -> bool:
        """Whether the reference must be taken (anew), asked once a step; may count the steps in `shared`."""

    @abc.abstractmethod
    def measure(self, evidence: Evidence) -> Tensor:
        """The difficulty before it is made relative, (B,) or one number."""

    @abc.abstractmethod
    def refer(self, measured: Sequence[Tensor], shared: MutableMapping[str, Tensor]) -> None:
        """Take the reference from the measurements along the attack at full strength, its last iterate included."""


@value
class Exceeds(Signal):
    """Stop rule: the attack on an instance ends once its difficulty is above the bound.

    Tested before each step, on the current iterate; the step that crosses the bound is kept (the official rule: the
    example may overshoot by one step).

    Attributes:
        difficulty: The signal to watch, such as `ProbabilityGap`.
        bound: Largest difficulty that is still attacked; may be a `Schedule`. For `ProbabilityGap` 1 or more never
            stops (plain adversarial training).

    Source: Sitawarin et al. 2021 (SAT), training code.
    """

    difficulty: Signal
    bound: float | Schedule

    def __post_init__(self) -> None:
        """Check the bound."""
        check_bound("Exceeds", self.bound)

    @property
    def idle(self) -> bool:
        """Whether the bound is at least the largest difficulty there is."""
        return not isinstance(self.bound, Schedule) and self.bound >= self.difficulty.largest

    @property
    def needs(self) -> frozenset[str]:
        """What the difficulty needs; nothing if the bound is out of reach."""
        return frozenset() if self.idle else self.difficulty.needs

    def __call__(self, evidence: Evidence) -> Tensor:
        """Boolean (B,): True where the attack stops."""
        if isinstance(self.bound, Schedule):
            raise UserError(f"bound is still the schedule {self.bound!r}: use method.at(progress) first")
        if self.idle:
            return torch.zeros_like(evidence.y, dtype=torch.bool)
        return self.difficulty(evidence) > self.bound


@value
class Below(Signal):
    """Stop rule: the attack on an instance ends once a measure of what is left to gain is below the bound.

    Attributes:
        measure: The signal to watch, such as `StationarityGap`.
        bound: Smallest value that is still attacked; may be a `Schedule`.

    Source: Wang et al. 2019 (Dynamic-AT).
    """

    measure: Signal
    bound: float | Schedule

    def __post_init__(self) -> None:
        """Check the bound."""
        check_bound("Below", self.bound)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Boolean (B,): True where the attack stops."""
        if isinstance(self.bound, Schedule):
            raise UserError(f"bound is still the schedule {self.bound!r}: use method.at(progress) first")
        return self.measure(evidence) < self.bound


def check_bound(owner: str, bound: float | Schedule) -> None:
    """Refuse a bound that is no number.

    Raises:
        UserError: It is NaN.
    """
    if not isinstance(bound, Schedule) and math.isnan(bound):
        raise UserError(f"bound of {owner} must be a number; got nan")


@value
class Patience(Signal):
    """Stop rule of friendly adversarial training: `steps` more steps after the first misclassified iterate.

    An instance stops on the iterate that is misclassified for the (steps + 1)-th time, before it is moved.

    Attributes:
        steps: τ, at least 0; may be a `Schedule`. A τ of at least K never stops.

    Raises:
        UserError: A negative τ.

    Source: Zhang et al. 2020 (FAT), Algorithm 1 and official code.
    """

    steps: float | Schedule = 0

    def __post_init__(self) -> None:
        """Check τ."""
        if not isinstance(self.steps, Schedule) and not self.steps >= 0:
            raise UserError(f"steps of Patience (τ) must be at least 0; got {self.steps}")

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits, and the counts that the attack keeps."""
        return frozenset({"adv", "kappa"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Boolean (B,): True where the attack stops."""
        if isinstance(self.steps, Schedule):
            raise UserError(f"steps is still the schedule {self.steps!r}: use method.at(progress) first")
        if evidence.kappa is None or evidence.inspected is None:
            raise UserError("Patience stops attacks that count κ; this Evidence has no count")
        wrong = evidence.logits("adv").argmax(1) != evidence.y
        return wrong & (torch.as_tensor(evidence.inspected - evidence.kappa) > self.steps)
