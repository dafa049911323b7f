"""Attacks in turn, each on what the ones before left standing: restarts, and one target class after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from instar.attacks.attack import Attack, counts
from instar.attacks.pgd import PGD
from instar.errors import UserError
from instar.evidence import Adversary, Batch
from instar.expression import value
from instar.modes import forward_mode
from instar.signals import TargetedMargin
from instar.threat import Ball


def passes(attack: Attack, classes: int) -> int | None:
    """About how many forward passes an instance that survives costs; a backward to the input counts as one.

    Args:
        attack: The attack.
        classes: Number of classes K.

    Returns:
        The number, or None for an attack that cannot tell.

    Example:
        >>> passes(PGD(steps=20), 10), passes(Restarts(PGD(steps=20), 5), 10)
        (41, 210)
    """
    if isinstance(attack, PGD):
        return None if not isinstance(attack.steps, int) else 2 * attack.steps + 1
    told = getattr(attack, "budget", None)
    return told(classes).get("forwards") if callable(told) else None


def in_turn(
    attacks: Iterable[Attack], model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None
) -> Adversary:
    """Run attacks one after the other, each on the instances that none before it broke.

    An instance is broken when an inspected iterate, or the image that the attack returns, is misclassified.

    Args:
        attacks: What to run.
        model: Images (B, C, H, W) → logits (B, K).
        batch: The instances.
        generator: Source of random starts; the attacks draw from it one after the other.

    Returns:
        For each instance the image of the attack that broke it, or of the last one; κ, inspected and moves summed
        over the attacks it went through, so that κ is less than inspected exactly if an inspected iterate broke it.
    """
    x = batch.x.clone()
    kappa, inspected, moves = counts(batch.y), counts(batch.y), counts(batch.y)
    standing = torch.arange(len(batch), device=batch.y.device)
    budget = 0
    for attack in attacks:
        if not len(standing):
            break
        part = chosen(batch, standing)
        found = attack(model, part, generator=generator)
        x[standing] = found.x.to(x.dtype)
        kappa[standing] += found.kappa
        inspected[standing] += found.inspected
        moves[standing] += found.moves
        budget += found.budget
        stands = (found.kappa == found.inspected) & (logits(model, found.x).argmax(1) == part.y)
        standing = standing[stands]
    return Adversary(x=x, kappa=kappa, inspected=inspected, moves=moves, budget=budget)


def chosen(batch: Batch, rows: Tensor) -> Batch:
    """Some instances of a batch, with all that belongs to them.

    Args:
        batch: The instances.
        rows: Which (m,), as positions within the batch.

    Returns:
        A batch of m instances.
    """
    parts = {name: getattr(batch, name) for name in ("index", "target", "labelled", "source")}
    taken = {name: part[rows.to(part.device)] for name, part in parts.items() if part is not None}
    memory = {name: column[rows.to(column.device)] for name, column in batch.memory.items()}
    return replace(batch, x=batch.x[rows], y=batch.y[rows], memory=memory, **taken)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, K) of a model in eval mode, left as it was found."""
    with forward_mode(model, "eval"):
        found: Tensor = model(x)
    return found


@value
class Restarts(Attack):
    """An attack several times from fresh random starts: an instance counts as broken if one of them breaks it.

    Each further run sees only the instances that are still standing.

    Attributes:
        attack: What is repeated.
        times: How often, at least 1; 1 is the attack itself.

    Raises:
        UserError: `times` is below 1.

    Example:
        >>> Restarts(PGD(steps=20), 5)
        Restarts(PGD(steps=20))

    Source: the worst case over restarts of Carlini et al. 2019.
    """

    attack: Attack
    times: int = 5

    def __post_init__(self) -> None:
        """Check the number."""
        if self.times < 1:
            raise UserError(f"times of Restarts must be at least 1; got {self.times}")

    @property
    def needs(self) -> frozenset[str]:
        """What the attack reads."""
        return self.attack.needs

    @property
    def limit(self) -> Ball | None:
        """The attack's."""
        return self.attack.limit

    @property
    def ball(self) -> Ball | None:
        """The attack's."""
        return getattr(self.attack, "ball", None)

    def budget(self, classes: int) -> dict[str, Any]:
        """Restarts, and forward passes for an instance that survives all of them."""
        one = passes(self.attack, classes)
        steps = getattr(self.attack, "steps", None)
        told: dict[str, Any] = {"steps": steps} if isinstance(steps, int) else {}
        told["restarts"] = self.times
        return told if one is None else told | {"forwards": self.times * (one + 1)}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Run it again and again on what is standing; see `in_turn`."""
        return in_turn([self.attack] * self.times, model, batch, generator=generator)


@value
class MultiTargeted(Attack):
    """A descent on z_t − z_y for each of the most likely wrong classes t in turn.

    Where several wrong classes are about equally near, the margin of the best one jumps between them and gets to none;
    aiming at each in turn does not.

    Attributes:
        attack: The descent; its objective is replaced by `TargetedMargin`.
        targets: How many classes are aimed at, in the order of their clean logits; K − 1 if there are fewer.

    Raises:
        UserError: `targets` is below 1.

    Example:
        >>> MultiTargeted(PGD(steps=20))
        MultiTargeted(PGD(steps=20))

    Source: Gowal et al. 2019; nine targets are MM+ of Gao et al. 2022, with plain steps instead of its schedule.
    Deviations: targets by clean logits; Gowal et al. take all classes.
    """

    attack: PGD
    targets: int = 9

    def __post_init__(self) -> None:
        """Check the number."""
        if self.targets < 1:
            raise UserError(f"targets of MultiTargeted must be at least 1; got {self.targets}")

    @property
    def ball(self) -> Ball:
        """The descent's."""
        return self.attack.ball

    @property
    def needs(self) -> frozenset[str]:
        """Clean logits choose the targets."""
        return self.attack.needs | {"clean", "adv"}

    def budget(self, classes: int) -> dict[str, Any]:
        """Steps, targets, and forward passes for an instance that survives all of them."""
        targets = min(self.targets, classes - 1)
        one = passes(self.attack, classes)
        told = {"steps": self.attack.steps, "restarts": 1, "targets": targets}
        return told if one is None else told | {"forwards": targets * (one + 2)}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """One target after the other on what is standing; see `in_turn`."""
        classes = logits(model, batch.x[:1]).shape[1]
        ranks = range(1, min(self.targets, classes - 1) + 1)
        aimed = (replace(self.attack, objective=TargetedMargin(rank)) for rank in ranks)
        return in_turn(aimed, model, batch, generator=generator)
