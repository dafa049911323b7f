"""What gradients do, in the form of attacks, so that it is measured, stored and resumed like them.

A diagnosis moves nothing. An instance counts as broken where the symptom is found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from instar.attacks import PGD, Attack, Given, Uniform
from instar.attacks.attack import counts
from instar.evidence import Adversary, Batch, Evidence
from instar.expression import value
from instar.modes import forward_mode
from instar.signals import CrossEntropy, Signal
from instar.threat import Ball


@value
class VanishingGradient(Attack):
    """Where the gradient is exactly zero, at the clean image and at a random point of the ball.

    No gradient attack can begin at such an instance, so that it counts as robust for want of a direction. The causes
    are saturated logits (float32 cross-entropy has no gradient where a margin exceeds about 19 to 100), quantised
    inputs, and dead units.

    Attributes:
        ball: Where the random point is drawn.
        objective: The attack's objective.

    Example:
        >>> from instar.threat import Linf
        >>> x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> VanishingGradient(Linf(0.1))(net, Batch(x, y)).kappa.tolist()
        [1, 1, 1]

    Source: the zero-gradient check of AutoAttack; Carlini et al. 2019.
    """

    ball: Ball
    objective: Signal = CrossEntropy()

    @property
    def limit(self) -> Ball:
        """The ball."""
        return self.ball

    def budget(self, classes: int) -> dict[str, Any]:
        """Two gradients."""
        return {"forwards": 4}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """The clean images, with κ of 0 of 1 where both gradients are zero and of 1 of 1 elsewhere."""
        points = (batch.x, Uniform()(batch.x, self.ball, generator))
        zero = torch.ones_like(batch.y, dtype=torch.bool)
        with forward_mode(model, "eval"):
            for point in points:
                zero &= self._gradient(model, batch, point).flatten(1).abs().amax(1) == 0
        return _flagged(batch, zero)

    def _gradient(self, model: nn.Module, batch: Batch, point: Tensor) -> Tensor:
        at = point.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(at)
            if not logits.requires_grad:  # a model that cuts the graph has no gradient anywhere
                return torch.zeros_like(point)
            loss = self.objective(_evidence(batch, at, logits)).sum()
            (gradient,) = torch.autograd.grad(loss, at, allow_unused=True)
        return torch.zeros_like(point) if gradient is None else gradient


@value
class FallingLoss(Attack):
    """Where an attack ends no higher than it began: its objective at the last iterate against the first.

    Gradients that point anywhere make a random walk, which ends lower as often as higher.

    Attributes:
        attack: The attack, which should not stop early.

    Example:
        >>> x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> FallingLoss(PGD(steps=5))(net, Batch(x, y)).kappa.tolist()
        [1, 1, 1]

    Source: Carlini et al. 2019, 4.2 (the loss must rise along an attack).
    """

    attack: PGD

    @property
    def limit(self) -> Ball:
        """The attack's."""
        return self.attack.limit

    def budget(self, classes: int) -> dict[str, Any]:
        """Those of the attack, and of the two ends."""
        steps = self.attack.steps
        return {"forwards": 2 * steps + 3} if isinstance(steps, int) else {}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """The clean images, with κ of 0 of 1 where the loss did not rise and of 1 of 1 elsewhere."""
        begun = self.attack.start(batch.x, self.attack.ball, generator)
        ended = replace(self.attack, start=Given(begun - batch.x))(model, batch, generator=generator).x
        with forward_mode(model, "eval"), torch.no_grad():
            ends = (self.attack.objective(_evidence(batch, point, model(point))) for point in (begun, ended))
            before, after = ends
        return _flagged(batch, after <= before)


def _evidence(batch: Batch, point: Tensor, logits: Tensor) -> Evidence:
    return Evidence(x=batch.x, y=batch.y, adv=logits, x_adv=point)


def _flagged(batch: Batch, found: Tensor) -> Adversary:
    one = torch.ones_like(counts(batch.y))
    return Adversary(x=batch.x, kappa=one - found.to(one.dtype), inspected=one, moves=counts(batch.y), budget=0)
