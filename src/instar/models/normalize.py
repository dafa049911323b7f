"""Normalisation as the first layer of a model, so that everything outside the model sees images in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from instar.errors import UserError


class Normalize(nn.Module):
    """Per-channel normalisation of images in [0, 1], with its statistics as buffers.

    ``(x - mean) / std``. The statistics move and are saved with the model, and an eps given in [0, 1] keeps its
    meaning.

    Args:
        mean: One mean a channel, in [0, 1]; the default, None, is 0 in every channel.
        std: One standard deviation a channel, in (0, 1]; the default, None, is 1 in every channel.
        channels: Number of channels C.

    Raises:
        UserError: If the lengths differ from ``channels`` or the values look like those of images in [0, 255].

    Source:
        The buffers ``normalize.mean`` and ``normalize.std`` of shape (1, C, 1, 1) are RobustBench's
        ``ImageNormalizer``.
    Deviations: none.

    Example:
        >>> Normalize(mean=[0.5], std=[0.25], channels=1)(torch.ones(1, 1, 1, 1)).item()
        2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, channels: int = 3
    ) -> None:
        super().__init__()
        means, stds = statistics(mean, std, channels)
        self.register_buffer("mean", torch.tensor(means, dtype=torch.float32).view(1, channels, 1, 1))
        self.register_buffer("std", torch.tensor(stds, dtype=torch.float32).view(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised images, same shape as ``x`` (B, C, H, W)."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """The statistics as they print."""
        mean, std = (_shown(buffer.flatten().tolist()) for buffer in (self.mean, self.std))
        return f"mean={mean}, std={std}"


def statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The two statistics as tuples of ``channels`` numbers, checked; one number stands for every channel.

    Args:
        mean: Means in [0, 1]; None is 0.
        std: Standard deviations in (0, 1]; None is 1.
        channels: Number of channels.

    Returns:
        Means and standard deviations, ``channels`` numbers each.

    Raises:
        UserError: If a length or a value is impossible.

    Example:
        >>> statistics([0.5], None, 3)
        ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    """
    means = _numbers("mean", mean, 0.0, channels)
    stds = _numbers("std", std, 1.0, channels)
    if not all(0 <= value <= 1 for value in means):
        raise UserError(
            f"mean must be in [0, 1] because inputs lie in [0, 1]; got {_shown(means)}. "
            "Divide statistics of 0..255 images by 255."
        )
    if not all(0 < value <= 1 for value in stds):
        raise UserError(
            f"std must be in (0, 1] because inputs lie in [0, 1]; got {_shown(stds)}. "
            "Divide statistics of 0..255 images by 255."
        )
    return means, stds


def _numbers(name: str, values: Sequence[float] | None, default: float, channels: int) -> tuple[float, ...]:
    if values is None:
        return (default,) * channels
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a list of {channels} numbers, one a channel; got {values!r}") from None
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels or not all(map(math.isfinite, numbers)):
        raise UserError(f"{name} must be {channels} finite numbers, one a channel; got {_shown(numbers)}")
    return numbers


def _shown(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
