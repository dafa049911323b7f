"""The loader: images lie as uint8 where the model is, and a batch is a gather, an augmentation and a division by 255.

Order and augmentation are functions of (seed, epoch, step) alone. So nothing about the loader needs saving: asked for
the same epoch from a later step, it gives exactly the batches that an uninterrupted run would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from instar.data.ahead import one_ahead
from instar.data.indexed import Images, ResidentImages, as_float, check_values
from instar.data.splits import Split
from instar.errors import UserError
from instar.evidence import Batch
from instar.parallel import ALONE, Group, Part
from instar.randomness import generator


def steps_per_epoch(split: Split, batch_size: int, drop_last: bool) -> int:
    """Batches in one epoch.

    Args:
        split: What is iterated over.
        batch_size: Instances a batch, ≥ 1.
        drop_last: Whether a last, smaller batch is left out.

    Returns:
        The number of batches.

    Raises:
        UserError: `batch_size` is not positive.

    Example:
        >>> from instar.data.sources import load
        >>> from instar.data.splits import TrainSplit
        >>> split = TrainSplit(load("digits"))
        >>> steps_per_epoch(split, 128, drop_last=True), steps_per_epoch(split, 128, drop_last=False)
        (11, 12)
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1; got {batch_size}")
    return len(split) // batch_size if drop_last else -(-len(split) // batch_size)


def epoch_order(split: Split, *, epoch: int, seed: int, shuffle: bool) -> Tensor:
    """Official positions (n,) in the order in which an epoch visits them.

    Args:
        split: What is iterated over.
        epoch: Epoch, from 0.
        seed: The run's seed.
        shuffle: False keeps the order of `split.indices`.

    Returns:
        A permutation of ``split.indices``, equal for equal seed and epoch on every machine.

    Example:
        >>> from instar.data.sources import load
        >>> from instar.data.splits import TrainSplit
        >>> split = TrainSplit(load("digits"))
        >>> first, second = (epoch_order(split, epoch=epoch, seed=0, shuffle=True) for epoch in (0, 1))
        >>> bool((first == second).all()), bool((first.sort().values == split.indices).all())
        (False, True)
    """
    if not shuffle:
        return split.indices
    return split.indices[torch.randperm(len(split), generator=generator(seed, epoch=epoch, purpose="order"))]


def batches(
    split: Split,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    device: torch.device | str = "cpu",
    first_step: int = 0,
    limit: int | None = None,
    group: Group = ALONE,
) -> Iterator[Batch]:
    """The batches of one epoch, each instance with its official position.

    Args:
        split: What is iterated over.
        batch_size: Instances a batch, ≥ 1.
        epoch: Epoch, from 0; with `seed` it decides the order and the augmentation.
        seed: The run's seed.
        shuffle: True for training; False visits ``split.indices`` in order.
        drop_last: Whether a last, smaller batch is left out. BatchNorm is better off without a tiny one.
        augment: For example ``standard(info)``; it gets a generator keyed by (seed, epoch, step). None leaves the
            images as they are.
        device: Where the batch is wanted. Images in memory are copied there once, as uint8, if they fit.
        first_step: Step to begin at, from 0: the remaining batches of an interrupted epoch, bit for bit.
        limit: Step to stop before, counted from the beginning of the epoch whatever `first_step` is; None means the
            whole epoch.
        group: Processes that share each batch: this one fetches its rows alone, and draws the random numbers of the
            whole batch, so that the shares together are the batch of one process. A process that has no row in a last,
            small batch goes without it.

    Yields:
        `Batch` with x float32 (B, C, H, W) in [0, 1], y (B,) and index (B,), the official positions, all on `device`.

    Raises:
        UserError: a batch size below 1, a step outside the epoch, or images that cannot be read or leave [0, 1].

    Example:
        >>> from instar.data.sources import load
        >>> from instar.data.splits import TrainSplit
        >>> split = TrainSplit(load("digits"))
        >>> batch = next(batches(split, batch_size=4, epoch=0, seed=0, shuffle=True, drop_last=True))
        >>> batch.x.shape, bool((batch.y == split.images.labels[batch.index]).all())
        (torch.Size([4, 1, 8, 8]), True)
    """
    steps = steps_between(split, batch_size, drop_last, first_step, limit)
    # An ordinary function around the generator: arguments are checked when it is called, not at the first batch.
    return _batches(split, batch_size, epoch, seed, shuffle, augment, torch.device(device), steps, group)


def steps_between(split: Split, batch_size: int, drop_last: bool, first_step: int, limit: int | None) -> range:
    """The steps of an epoch from `first_step` on, up to its end or `limit`.

    Raises:
        UserError: a batch size below 1, or a step outside the epoch.
    """
    total = steps_per_epoch(split, batch_size, drop_last)
    if not 0 <= first_step <= total:
        raise UserError(f"first_step must be in 0..{total} for an epoch of {total} steps; got {first_step}")
    if limit is not None and limit < 0:
        raise UserError(f"limit must be 0 or more steps; got {limit}")
    return range(first_step, total if limit is None else min(limit, total))


def _batches(
    split: Split,
    batch_size: int,
    epoch: int,
    seed: int,
    shuffle: bool,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
    device: torch.device,
    steps: range,
    group: Group,
) -> Iterator[Batch]:
    labels = split.images.labels
    order = epoch_order(split, epoch=epoch, seed=seed, shuffle=shuffle)
    shares = _shares(order, batch_size, steps, group)
    for share, images in _fetched(split.images, shares, device):
        moved = images.to(device, non_blocking=True)
        if augment is not None:
            draws = generator(seed, epoch=epoch, step=share.step, purpose="augment")
            moved = share.part.drawn(_drawing(augment, draws), moved)
        at = share.positions
        yield Batch(as_float(moved), labels[at].to(device), at.to(device), part=share.part)


class _Share(NamedTuple):
    """What a process treats of the batch of a step."""

    step: int
    part: Part
    positions: Tensor


def _shares(order: Tensor, batch_size: int, steps: range, group: Group) -> Iterator[_Share]:
    """The shares of an epoch, cut when they are wanted: an epoch of millions has tens of thousands."""
    for step in steps:
        whole = order[step * batch_size : (step + 1) * batch_size]
        part = group.part(len(whole))
        positions = part.of(whole)
        if len(positions):
            yield _Share(step, part, positions)


def _drawing(
    augment: Callable[[Tensor, torch.Generator], Tensor], draws: torch.Generator
) -> Callable[[Tensor], Tensor]:
    return lambda images: augment(images, draws)


def _fetched(images: Images, shares: Iterator[_Share], device: torch.device) -> Iterator[tuple[_Share, Tensor]]:
    """The images of each share; those that must be decoded are decoded one batch ahead."""
    if isinstance(images, ResidentImages):
        resident = images.on(device)
        for share in shares:
            yield share, resident.fetch(share.positions)
        return
    yield from one_ahead(lambda share: (share, decoded_images(images, share.positions)), shares)


def decoded_images(images: Images, positions: Tensor) -> Tensor:
    """The images at these positions, decoded, with values that were checked."""
    fetched = images.fetch(positions)
    check_values(fetched, what=images.info.name)
    return fetched
