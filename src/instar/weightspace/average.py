"""Averages of the weights over training."""

from __future__ import annotations

import abc
import copy

import torch
from torch import nn

from instar.errors import UserError
from instar.expression import value


class Average(abc.ABC):
    """How a second set of weights follows the trained ones."""

    @abc.abstractmethod
    def update(self, average: nn.Module, model: nn.Module, step: int) -> None:
        """Move `average` towards `model`, in place.

        Args:
            average: The averaged copy.
            model: The trained model, after its optimiser step.
            step: Updates so far in the run, from 0.
        """


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no storage with `model`, without gradients, in eval mode."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@value
class EMA(Average):
    """Exponential moving average: w̄ ← d w̄ + (1 − d) w with d = min(decay, (1 + t) / (10 + t)) in update t.

    BatchNorm's running statistics are averaged the same way (the published codes copy or even share them); counters
    are copied.

    Attributes:
        decay: Largest decay, in [0, 1); 0 copies.

    Raises:
        UserError: A decay outside of [0, 1).

    Source: Gowal et al. 2020 (warm-up of the decay).
    """

    decay: float = 0.995

    def __post_init__(self) -> None:
        """Check the decay."""
        if not 0 <= self.decay < 1:
            raise UserError(f"decay of EMA must be in [0, 1); got {self.decay}")

    def at_step(self, step: int) -> float:
        """The decay used in update `step`, from 0.

        Example:
            >>> EMA(0.995).at_step(0), EMA(0.995).at_step(5000)
            (0.1, 0.995)
        """
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, average: nn.Module, model: nn.Module, step: int) -> None:
        """Move every floating-point tensor, copy the others; see `Average`."""
        ours = [*average.parameters(), *average.buffers()]
        theirs = [*model.parameters(), *model.buffers()]
        moving = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in moving], [b.detach() for _, b in moving], 1 - self.at_step(step))
        for a, b in zip(ours, theirs, strict=True):
            if not a.is_floating_point():
                a.copy_(b)
