"""Output-diversified starts: random places in the space of logits instead of pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from instar.attacks.attack import Attack
from instar.attacks.pgd import PGD
from instar.attacks.start import Given, Uniform
from instar.attacks.turns import logits, passes
from instar.errors import UserError
from instar.evidence import Adversary, Batch, Evidence
from instar.expression import value
from instar.signals import Signal
from instar.threat import Ball


@dataclass(frozen=True, eq=False)
class _Along(Signal):
    """w · z for a direction w (B, K) of each instance."""

    direction: Tensor

    @property
    def needs(self) -> frozenset[str]:
        """Logits of the iterate."""
        return frozenset({"adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """The product (B,)."""
        found = evidence.logits("adv")
        return (self.direction.to(found) * found).sum(1)


@value
class OutputDiversified(Attack):
    """A descent from a start that random weights of the logits lead to (ODI).

    w ~ U(−1, 1)^K;   from a uniform point, a few steps of the size of the ball up w · z;   then the attack from there

    Uniform noise in pixels hardly moves the logits of a network that was trained with it, so restarts from it are
    nearly one and the same; these starts differ where it counts.

    Attributes:
        attack: The descent; its start is replaced.
        lead: Steps up w · z, at least 1; 2 is the paper's.

    Raises:
        UserError: `lead` is below 1.

    Example:
        >>> OutputDiversified(PGD(steps=20))
        OutputDiversified(PGD(steps=20))

    Source: Tashiro et al. 2020, Algorithm 1: two steps of length eps.
    Deviations: none.
    """

    attack: PGD
    lead: int = 2

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.lead < 1:
            raise UserError(f"lead of OutputDiversified must be at least 1; got {self.lead}")

    @property
    def ball(self) -> Ball:
        """The descent's."""
        return self.attack.ball

    @property
    def needs(self) -> frozenset[str]:
        """What the descent reads."""
        return self.attack.needs | {"adv"}

    def budget(self, classes: int) -> dict[str, Any]:
        """Steps, the ones up w · z included, and forward passes for an instance that survives."""
        one = passes(self.attack, classes)
        steps = self.attack.steps
        told: dict[str, Any] = {"steps": steps + self.lead} if isinstance(steps, int) else {}
        return told | {"restarts": 1} | ({} if one is None else {"forwards": one + 2 * self.lead})

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Find the start, then run the attack; see `Attack`."""
        x, descent = batch.x, self.attack
        classes = logits(model, x[:1]).shape[1]
        noise = torch.rand((len(x), classes), generator=generator, device=x.device, dtype=x.dtype)
        upwards = PGD(
            descent.ball,
            _Along(2 * noise - 1),
            steps=self.lead,
            step_size=descent.ball.radius,
            start=Uniform(),
            mode=descent.mode,
        )
        begun = upwards(model, batch, generator=generator).x
        return replace(descent, start=Given(begun - x))(model, batch, generator=generator)
