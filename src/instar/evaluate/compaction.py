"""Broken instances leave the batch: the same descent with less work.

PGD has no memory beyond its iterate, so that K steps are the same as k steps followed by K − k steps from where the
first ones ended. Between two such legs the instances that have stopped are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from instar.attacks import PGD, Attack
from instar.attacks.attack import counts
from instar.attacks.start import Start
from instar.evidence import Adversary, Batch
from instar.signals import CrossEntropy, Exceeds, Margin
from instar.threat import Ball

LEG = 4
"""Steps between two looks at who is left."""


def compacts(attack: Attack) -> bool:
    """Whether an attack may leave out instances that have stopped.

    It may where an instance's fate depends on nothing but itself and its iterate: descents on cross-entropy or margin
    in eval mode that stop once an iterate is misclassified.

    Example:
        >>> from instar.evaluate.suites import pgd
        >>> from instar.threat import Linf
        >>> compacts(pgd(Linf(8/255), steps=20).attack), compacts(PGD())
        (True, False)
    """
    return (
        isinstance(attack, PGD)
        and isinstance(attack.steps, int)
        and attack.mode == "eval"
        and attack.stop == Exceeds(Margin(), 0.0)
        and attack.overshoot
        and attack.objective in (CrossEntropy(), Margin())
    )


def run(attack: Attack, model: nn.Module, batch: Batch, draws: torch.Generator | None) -> Adversary:
    """Run an attack, without the instances that have stopped where that changes nothing.

    Args:
        attack: The attack.
        model: The model, in eval mode.
        batch: The instances.
        draws: Source of the random start.

    Returns:
        What ``attack(model, batch, generator=draws)`` returns, up to the rounding of smaller batches.
    """
    if not compacts(attack) or not isinstance(attack, PGD) or not isinstance(attack.steps, int):
        return attack(model, batch, generator=draws)
    x = batch.x.clone()
    kappa, inspected, moves = counts(batch.y), counts(batch.y), counts(batch.y)
    rows = torch.arange(len(batch), device=batch.y.device)
    start: Start = attack.start
    for leg in _legs(attack.steps):
        part = Batch(batch.x[rows], batch.y[rows], target=None if batch.target is None else batch.target[rows])
        found = replace(attack, steps=leg, start=start)(model, part, generator=draws)
        x[rows] = found.x
        for total, more in ((kappa, found.kappa), (inspected, found.inspected), (moves, found.moves)):
            total[rows] += more
        going = found.moves == leg
        rows, at = rows[going], found.x[going]
        if not len(rows):
            break
        start = _At(at)
    return Adversary(x=x, kappa=kappa, inspected=inspected, moves=moves, budget=attack.steps)


def _legs(steps: int) -> Iterator[int]:
    """Steps in portions; no steps are one portion of none."""
    done = 0
    while done < steps or done == 0 == steps:
        leg = min(LEG, steps - done)
        yield leg
        if not leg:
            return
        done += leg


@dataclass(frozen=True, eq=False)
class _At(Start):
    """Exactly these images: adding an offset to the clean ones would round."""

    at: Tensor

    def __call__(self, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
        """A copy of the images."""
        return self.at.clone()
