"""Square: a random search that needs no gradients, through the reference implementation."""

from __future__ import annotations

from typing import Any

import torch
from pyautoattack.square import SquareAttack
from torch import nn

from instar.attacks.attack import Attack, counts
from instar.errors import UserError
from instar.evidence import Adversary, Batch
from instar.expression import value
from instar.modes import forward_mode
from instar.threat import Ball, Linf

SMALLEST = 5  # pixels: in L2 and L1 the reference tiles images by fifths


@value
class Square(Attack):
    """Changes of random squares that are kept when they lower the margin: a score-based black-box attack.

    It sees logits and no gradients, so whatever it breaks that gradient attacks leave standing says that gradients are
    masked. The search, its schedule and its parameters are the reference's; random numbers are drawn for the whole
    batch, so results depend on which instances share one.

    Attributes:
        ball: The threat model.
        queries: Queries a restart, at least 1; 5000 in AutoAttack.
        restarts: How often, each on the instances still standing.

    Raises:
        UserError: `queries` or `restarts` below 1; at the call, images too small for L2 and L1.

    Example:
        >>> Square(Linf(8/255), queries=20000, restarts=3)
        Square(queries=20000, restarts=3)

    Source: Andriushchenko et al. 2020; ``pyautoattack`` 0.2, with AutoAttack's p = 0.8 and unscaled schedule.
    Deviations: none.
    """

    ball: Ball = Linf(8 / 255)
    queries: int = 5000
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.queries < 1 or self.restarts < 1:
            raise UserError(
                f"Square needs at least 1 query and 1 restart; got queries={self.queries}, restarts={self.restarts}"
            )

    def budget(self, classes: int) -> dict[str, Any]:
        """Queries, restarts, and forward passes for an instance that survives."""
        forwards = self.restarts * (self.queries + 2) + 1
        return {"queries": self.queries, "restarts": self.restarts, "forwards": forwards}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Run the search; see `Attack`."""
        x, y = batch.x, batch.y
        none = counts(y)
        if self.ball.radius == 0 or not len(x):
            return Adversary(x=x.clone(), kappa=none, inspected=none.clone(), moves=none.clone(), budget=self.queries)
        if self.ball.norm != "Linf" and min(x.shape[2:]) < SMALLEST:
            raise UserError(
                f"Square in {self.ball.norm} tiles images by fifths and needs at least 5×5 pixels; got "
                f"{x.shape[2]}×{x.shape[3]}"
            )
        place = None if generator is None else generator.device
        seed = int(torch.randint(2**31 - 1, (1,), generator=generator, device=place))
        # The reference seeds the global generators; they are left as found.
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), forward_mode(model, "eval"), torch.no_grad():
            search = SquareAttack(
                model,
                norm=self.ball.norm,
                eps=self.ball.radius,
                n_queries=self.queries,
                n_restarts=self.restarts,
                seed=seed,
                device=x.device,
                resc_schedule=False,
            )
            found = self.ball.project(search.perturb(x.contiguous(), y), x)
        return Adversary(x=found, kappa=none, inspected=none.clone(), moves=none.clone(), budget=self.queries)
