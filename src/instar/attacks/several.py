"""Several attacks on one batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from instar.attacks.attack import Attack
from instar.errors import UserError
from instar.evidence import Adversary, Batch
from instar.expression import value
from instar.schedules import Schedule
from instar.threat import Ball


@value
class Several(Attack):
    """One attack, and further ones on the same images: a second objective (GAIR-RST), a second norm.

    The first attack's record (κ, moves) is that of the whole. The results of the others are `Adversary.others`, and
    their logits `Evidence.others`, in order. The attacks draw from the generator one after the other.

    Attributes:
        first: The attack whose ball is the threat model.
        others: Further attacks, one or more.
        open: Whether the others are run, 0 or 1; a `Schedule` opens them.

    Raises:
        UserError: No further attack.

    Example:
        >>> from instar.attacks import PGD
        >>> from instar.signals import Margin
        >>> Several(PGD(), (PGD(objective=Margin()),))
        Several(PGD(), (PGD(objective=Margin()),))
    """

    first: Attack
    others: tuple[Attack, ...]
    open: float | Schedule = 1

    def __post_init__(self) -> None:
        """Check the parts."""
        if not self.others or not all(isinstance(other, Attack) for other in self.others):
            raise UserError(f"others of Several must be a tuple of one or more attacks; got {self.others!r}")

    @property
    def ball(self) -> Ball | None:
        """The first attack's ball."""
        return getattr(self.first, "ball", None)

    @property
    def limit(self) -> Ball | None:
        """The first attack's."""
        return self.first.limit

    @property
    def mode(self) -> str | None:
        """How BatchNorm behaves, if all attacks agree."""
        modes = {getattr(attack, "mode", None) for attack in (self.first, *self.others)}
        return modes.pop() if len(modes) == 1 else None

    @property
    def needs(self) -> frozenset[str]:
        """What any of them reads."""
        return self.first.needs.union(*(other.needs for other in self.others))

    @property
    def adversaries(self) -> int:
        """One more than there are others."""
        return 1 + len(self.others)

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Run them all; see `Attack`.

        Raises:
            UserError: `open` is still a schedule.
        """
        if isinstance(self.open, Schedule):
            raise UserError(f"open is still the schedule {self.open!r}: use method.at(progress) first")
        found = self.first(model, batch, generator=generator)
        if not self.open:
            return found
        return replace(found, others=tuple(other(model, batch, generator=generator) for other in self.others))
