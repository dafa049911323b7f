"""A training method as a value."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from instar.attacks import Attack, Zero
from instar.errors import UserError
from instar.evidence import Batch
from instar.expression import value
from instar.models.heads import CosineHead
from instar.schedules import Progress, resolve
from instar.signals import Signal
from instar.signals.algebra import as_signal
from instar.weightspace import Average, Perturbation

if TYPE_CHECKING:
    from instar.step import Loss

FORWARDS = ("anchor", "anchor_adv", "clean", "adv")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOU" else f"a {noun}"


class Step(abc.ABC):
    """How an optimiser step is made, in place of `instar.training_step`'s own way."""

    divides: ClassVar[bool] = False
    """Whether it can treat a part of the global batch (`Batch.part`): with several processes, or with `accumulate`."""

    @abc.abstractmethod
    def check(self, method: Method) -> None:
        """Refuse a method with parts that this way of stepping does not use.

        Raises:
            UserError: With the part.
        """

    @abc.abstractmethod
    def __call__(
        self,
        model: nn.Module,
        method: Method,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        **options: Any,
    ) -> tuple[Loss, dict[str, Tensor]]:
        """Make the step; arguments and result as of `instar.training_step`. `method` has no schedules left."""


@value
class Method:
    """What one training step does: attack, loss, weight perturbation, weight average, and what is remembered.

    Any number inside may be a `Schedule`; `at` resolves them, once a step. Two papers at once are a field replaced:
    ``dataclasses.replace(gairat(), perturbation=AWP(1e-2))``.

    Attributes:
        attack: Makes the adversarial images.
        loss: The per-instance loss; the step takes its mean.
        perturbation: Where in weight space the gradient is taken, or None for the weights themselves.
        average: How averaged weights follow, or None.
        remember: Pairs (name, signal): written to the instance table after each step, and there to be read as
            ``evidence.memory[name]`` when the instance comes again.
        updates_bn: Which training forwards update BatchNorm's running statistics, of ``"anchor"``, ``"anchor_adv"``,
            ``"clean"``, ``"adv"``. Forwards of the attack follow `PGD.mode` instead.
        requires: What the model must have, a `CosineHead` for SPAT; None for nothing. A model that is named and not
            given is built that way.
        step: How an optimiser step is made, for the few methods that share gradients between input and weights
            (Free-AT); None is the usual step.

    Raises:
        UserError: A part of the wrong kind, an unknown forward, or parts that have no meaning together.

    Example:
        >>> from instar.attacks import PGD
        >>> from instar.signals import CrossEntropy
        >>> Method(PGD(steps=7), CrossEntropy())
        Method(PGD(steps=7), CrossEntropy())
    """

    attack: Attack
    loss: Signal
    perturbation: Perturbation | None = None
    average: Average | None = None
    remember: tuple[tuple[str, Signal], ...] = ()
    updates_bn: tuple[str, ...] = ("clean", "adv")
    requires: CosineHead | None = None
    step: Step | None = None

    def __post_init__(self) -> None:
        """Check the kinds of the parts."""
        for name, kind in (
            ("attack", Attack),
            ("perturbation", Perturbation),
            ("average", Average),
            ("requires", CosineHead),
            ("step", Step),
        ):
            part = getattr(self, name)
            if not isinstance(part, kind) and not (part is None and name != "attack"):
                raise UserError(f"{name} of a Method must be {_a(kind.__name__)}; got {type(part).__name__}: {part!r}")
        try:
            object.__setattr__(self, "loss", as_signal(self.loss))
        except TypeError as error:
            raise UserError(f"loss of a Method: {error}") from None
        for pair in self.remember:
            if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Signal):
                raise UserError(f"remember of a Method must hold pairs (name, signal); got {pair!r}")
        if unknown := set(self.updates_bn) - set(FORWARDS):
            raise UserError(f"updates_bn of a Method may name {', '.join(FORWARDS)}; got {', '.join(sorted(unknown))}")
        self._check_meaning()
        if self.step is not None:
            self.step.check(self)

    def _check_meaning(self) -> None:
        """Refuse parts that fit each other by kind and yet mean nothing together."""
        objective = getattr(self.attack, "objective", None)
        if objective is not None and objective.vanishes_at_clean and isinstance(self.attack.start, Zero):  # type: ignore[attr-defined]
            raise UserError(
                f"an attack on {objective!r} from Zero() never moves: its gradient is zero at the clean image. Start "
                "at Gaussian() or Uniform()"
            )
        if "others" in self.needs and self.attack.adversaries < 2:
            raise UserError("the loss reads a further adversary: the attack must be Several(first, (other,))")

    def at(self, progress: Progress) -> Method:
        """This method with every schedule replaced by its number at `progress`; itself when there is none.

        Example:
            >>> from instar.methods import gairat
            >>> gairat().at(Progress(epoch=0, epochs=10)).loss
            GeometryWeight(inf) * CrossEntropy()
        """
        resolved: Method = resolve(self, progress)
        return resolved

    @property
    def needs(self) -> frozenset[str]:
        """What the loss and the remembered signals read."""
        return self.loss.needs.union(*(signal.needs for _, signal in self.remember))
