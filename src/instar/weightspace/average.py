"""Averages of the weights over training."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from instar.errors import UserError
from instar.expression import value
from instar.schedules import Progress, epoch_of
from instar.sharding import local, reshard
from instar.signals.losses import check_choice

BATCH_NORM = ("average", "copy", "reestimate")
"""What the averaged network takes for BatchNorm's running statistics: their average, the trained network's, or those
estimated anew at the end of each epoch by a pass over the clean training images."""


class Average(abc.ABC):
    """How a second set of weights follows the trained ones."""

    @property
    @abc.abstractmethod
    def batch_norm(self) -> str:
        """One of `BATCH_NORM`."""

    @abc.abstractmethod
    def update(self, average: nn.Module, model: nn.Module, progress: Progress) -> None:
        """Move `average` towards `model`, in place.

        Args:
            average: The averaged copy.
            model: The trained model, after its optimiser step.
            progress: The step that was just done.
        """


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy that shares no storage with `model`, without gradients, in eval mode."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@value
class EMA(Average):
    """Exponential moving average: w̄ ← d w̄ + (1 − d) w with d = min(decay, (1 + t) / (10 + t)) in update t.

    Counters are copied, and nothing is shared between the two networks.

    Attributes:
        decay: Largest decay, in [0, 1); 0 copies.
        batch_norm: ``"average"`` treats BatchNorm's running statistics as weights; ``"copy"`` takes the trained
            network's (Gowal et al., Rebuffi et al.); ``"reestimate"`` estimates them anew once an epoch (IDBH).

    Raises:
        UserError: A decay outside of [0, 1), or an unknown treatment of BatchNorm.

    Source: Gowal et al. 2020 (warm-up of the decay).
    """

    decay: float = 0.995
    batch_norm: str = "average"

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 0 <= self.decay < 1:
            raise UserError(f"decay of EMA must be in [0, 1); got {self.decay}")
        check_choice("EMA", "batch_norm", self.batch_norm, BATCH_NORM)

    def at_step(self, step: int) -> float:
        """The decay used in update `step`, from 0.

        Example:
            >>> EMA(0.995).at_step(0), EMA(0.995).at_step(5000)
            (0.1, 0.995)
        """
        return min(self.decay, (1 + step) / (10 + step))

    def update(self, average: nn.Module, model: nn.Module, progress: Progress) -> None:
        """Move every floating-point tensor, copy the others; see `Average`."""
        _move(average, model, 1 - self.at_step(progress.update), buffers=self.batch_norm == "average")


@value
class SWA(Average):
    """Stochastic weight averaging: the plain mean of the weights at the ends of epochs, from `begin` on.

    w̄ ← w̄ + (w − w̄) / (n + 1) at the end of the n-th epoch behind `begin`, n = 0, 1, ... Before that the average is
    a copy. BatchNorm's running statistics are estimated anew at the end of each epoch.

    Attributes:
        begin: Time of the first epoch that counts: a share of the run up to 1, an epoch above. 55 of 200 epochs in
            KD+SWA.
        batch_norm: ``"reestimate"`` (published), ``"average"`` or ``"copy"``.

    Raises:
        UserError: A negative time, or an unknown treatment of BatchNorm.

    Example:
        >>> SWA(0.5).weight(Progress(epoch=6, epochs=10)), SWA(0.5).weight(Progress(epoch=2, epochs=10))
        (0.5, 1.0)

    Source: Izmailov et al. 2018; Chen et al. 2021 (KD+SWA) for its use and begin in adversarial training.
    """

    begin: float = 0.275
    batch_norm: str = "reestimate"

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.begin >= 0:
            raise UserError(f"begin of SWA must be a share of the run or an epoch, at least 0; got {self.begin}")
        check_choice("SWA", "batch_norm", self.batch_norm, BATCH_NORM)

    def weight(self, progress: Progress) -> float:
        """How far the average moves to the weights at the end of this epoch, 1 for a copy."""
        return 1 / (max(progress.epoch - math.ceil(epoch_of(self.begin, progress)), 0) + 1)

    def update(self, average: nn.Module, model: nn.Module, progress: Progress) -> None:
        """Take the weights in at the end of an epoch; see `Average`."""
        if progress.step == progress.steps_per_epoch - 1:
            _move(average, model, self.weight(progress), buffers=self.batch_norm == "average")


@torch.no_grad()
def _move(average: nn.Module, model: nn.Module, share: float, *, buffers: bool) -> None:
    """Move the average by a share of the way; buffers that are not averaged are copied."""
    reshard(average)
    reshard(model)
    ours: list[Tensor] = [local(p) for p in average.parameters()]
    theirs: list[Tensor] = [local(p) for p in model.parameters()]
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        if buffers and a.is_floating_point():
            ours.append(a)
            theirs.append(b)
        else:
            a.copy_(b)
    torch._foreach_lerp_(ours, theirs, share)


def reestimate_batch_norm(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Estimate BatchNorm's running statistics anew: the mean over all given batches, each with the same weight.

    Args:
        network: Its modes are left as found; a network without BatchNorm is left alone.
        images: Batches (B, C, H, W) in [0, 1].

    Example:
        >>> net = nn.BatchNorm2d(1).eval()
        >>> reestimate_batch_norm(net, [torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 5.0)])
        >>> net.running_mean
        tensor([4.])
    """
    update_bn(images, network)
