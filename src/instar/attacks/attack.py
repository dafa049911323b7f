"""What every attack is."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from instar.evidence import Adversary, Batch
from instar.expression import value
from instar.threat import Ball


class Attack(abc.ABC):
    """From a model and a batch to an `Adversary`.

    Order and module modes are left as found, parameters and their ``.grad`` untouched, and BatchNorm's buffers as
    found in mode ``"eval"`` and ``"batch"``, updated once a forward in mode ``"train"``.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What its signals read, named as in `Signal.needs`."""
        return frozenset()

    @property
    def adversaries(self) -> int:
        """How many adversarial images it makes of each instance."""
        return 1

    @property
    def limit(self) -> Ball | None:
        """The ball that the result lies in, which may be larger than that of the threat model; None for no bound."""
        return getattr(self, "ball", None)

    @abc.abstractmethod
    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """Attack every instance of `batch`.

        Args:
            model: Images (B, C, H, W) in [0, 1] → logits (B, K).
            batch: The instances.
            generator: Source of the random start; None draws from PyTorch's global one.

        Returns:
            The adversary, in the order of the batch.
        """


@value
class NoAttack(Attack):
    """No attack: the clean images, for natural training."""

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """The batch as it is, with κ, inspected and moves of 0."""
        none = counts(batch.y)
        return Adversary(x=batch.x, kappa=none, inspected=none.clone(), moves=none.clone(), budget=0)


def counts(y: Tensor) -> Tensor:
    """Zeros (B,) to count with."""
    return torch.zeros(len(y), dtype=torch.int32, device=y.device)
