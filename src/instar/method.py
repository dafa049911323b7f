"""A training method as a value."""

from __future__ import annotations

from instar.attacks import Attack
from instar.errors import UserError
from instar.expression import value
from instar.schedules import Progress, resolve
from instar.signals import Signal
from instar.signals.algebra import as_signal
from instar.weightspace import Average, Perturbation

FORWARDS = ("anchor", "clean", "adv")


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
        updates_bn: Which training forwards update BatchNorm's running statistics, of ``"anchor"``, ``"clean"``,
            ``"adv"``. Forwards of the attack follow `PGD.mode` instead.
        requires: What the model must have, ``"cosine head"`` for SPAT; None for nothing.

    Raises:
        UserError: A part of the wrong kind, or an unknown forward.

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
    requires: str | None = None

    def __post_init__(self) -> None:
        """Check the kinds of the parts."""
        for name, kind in (("attack", Attack), ("perturbation", Perturbation), ("average", Average)):
            part = getattr(self, name)
            if not isinstance(part, kind) and not (part is None and name != "attack"):
                raise UserError(f"{name} of a Method must be an {kind.__name__}; got {type(part).__name__}: {part!r}")
        try:
            object.__setattr__(self, "loss", as_signal(self.loss))
        except TypeError as error:
            raise UserError(f"loss of a Method: {error}") from None
        for pair in self.remember:
            if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Signal):
                raise UserError(f"remember of a Method must hold pairs (name, signal); got {pair!r}")
        if unknown := set(self.updates_bn) - set(FORWARDS):
            raise UserError(f"updates_bn of a Method may name {', '.join(FORWARDS)}; got {', '.join(sorted(unknown))}")

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
