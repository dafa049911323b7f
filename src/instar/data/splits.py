"""Train, selection and test as types, so that the test set cannot choose a checkpoint by accident.

Rice et al. (2020) showed that robust overfitting makes the best checkpoint differ from the last by several points;
chosen on the test set, that difference is an optimistic bias. Here the choice needs a `SelectionSplit`, and those are
held out of the training set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from instar.data.indexed import Images
from instar.errors import UserError
from instar.randomness import generator


@dataclass(frozen=True, eq=False)
class Split:
    """Some of the images of a data set, by their official positions. Use one of its three kinds.

    Args:
        images: Where the images come from.
        indices: Official positions (n,), distinct, int64; None means all of them in order.

    Raises:
        UserError: positions are not distinct integers within the images, or the images are of another split.
    """

    images: Images
    indices: Tensor = None  # type: ignore[assignment]  # None only until __post_init__ has filled it in

    def __post_init__(self) -> None:
        """Fill in all positions, or check those that were given."""
        if type(self) is Split:
            raise TypeError("a Split is a TrainSplit, a SelectionSplit or a TestSplit")
        count = len(self.images)
        if self.indices is None:
            object.__setattr__(self, "indices", torch.arange(count))
        indices = torch.as_tensor(self.indices).cpu()
        if indices.ndim != 1 or (indices.numel() and (indices.is_floating_point() or indices.dtype == torch.bool)):
            raise UserError(
                f"indices must be integer positions (n,); got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        indices = indices.to(torch.int64)
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= count):
            raise UserError(
                f"indices must be positions in 0..{count - 1}; got {int(indices.min())}..{int(indices.max())}"
            )
        if int(torch.zeros(count, dtype=torch.bool).index_fill_(0, indices, True).sum()) != len(indices):
            raise UserError("indices must be distinct: each instance has one row in the instance table")
        object.__setattr__(self, "indices", indices)
        of = getattr(self.images, "split", None)
        if of is not None and (of == "test") != isinstance(self, TestSplit):
            raise UserError(
                f"{type(self).__name__} got {of} images of {self.images.info.name}. Checkpoints are selected on images "
                "held out of the training set: hold_out(load(name), ...)"
            )

    def __len__(self) -> int:
        """Number of instances n."""
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """Labels (n,), int64, in the order of `indices`."""
        return self.images.labels[self.indices]

    @property
    def classes(self) -> tuple[str, ...]:
        """Readable class names."""
        return self.images.classes

    def first(self, count: int) -> Self:
        """The first `count` instances in official order, or all of them if there are fewer.

        Raises:
            UserError: `count` is not positive.

        Example:
            >>> from instar.data.sources import load
            >>> len(TestSplit(load("digits", split="test")).first(100))
            100
        """
        if count < 1:
            raise UserError(f"the number of images must be at least 1; got {count}")
        return type(self)(self.images, self.indices[:count])

    def spread(self, count: int) -> Self:
        """`count` instances at even distances in official order, or all of them if there are fewer.

        For data sets that are sorted by class, whose first instances are of one class.

        Raises:
            UserError: `count` is not positive.

        Example:
            >>> from instar.data.sources import load
            >>> TestSplit(load("digits", split="test")).spread(4).indices.tolist()
            [0, 90, 180, 270]
        """
        count = len(self.first(count))
        return type(self)(self.images, self.indices[torch.arange(count) * len(self) // max(count, 1)])


class TrainSplit(Split):
    """What weights are fitted to.

    Example:
        >>> from instar.data.sources import load
        >>> len(TrainSplit(load("digits")))
        1437
    """


class SelectionSplit(Split):
    """Training images that no weight sees: what checkpoints and settings are chosen by. Made by `hold_out`."""


class TestSplit(Split):
    """What is reported, once, and never chosen by.

    Example:
        >>> from instar.data.sources import load
        >>> len(TestSplit(load("digits", split="test")))
        360
    """

    __test__ = False  # pytest: not a test class, in spite of its name


def hold_out(images: Images, *, selection: int | float, seed: int) -> tuple[TrainSplit, SelectionSplit]:
    """Split the training images into those that weights see and those that choose the checkpoint.

    Every class gives its share of the selection, rounded so that the total is exact (largest remainders first, the
    lower label at a tie); within a class the choice is random.

    Args:
        images: The official training images.
        selection: How many to hold out: a number of images (int), or a fraction of them in [0, 1) (float). 0 holds
            out none.
        seed: Of the random choice; equal seeds hold out equal images on every machine.

    Returns:
        The two splits, disjoint, together all of `images`, each in official order.

    Raises:
        UserError: `selection` is negative, or leaves nothing to train on, or the images are test images.

    Example:
        >>> from instar.data.sources import load
        >>> train, selection = hold_out(load("digits"), selection=200, seed=0)
        >>> len(train), len(selection)
        (1237, 200)
        >>> bool(torch.isin(selection.indices, train.indices).any())
        False
    """
    count = len(images)
    if isinstance(selection, float) and not 0 <= selection < 1:
        hint = f" Did you mean {int(selection)}?" if selection > 1 and selection.is_integer() else ""
        raise UserError(f"selection must be a fraction in [0, 1) or a whole number of images; got {selection}.{hint}")
    wanted = round(selection * count) if isinstance(selection, float) else selection
    if isinstance(selection, bool) or not 0 <= wanted < count:
        raise UserError(f"selection must hold out 0..{count - 1} of the {count} training images; got {selection}")
    chosen = torch.zeros(count, dtype=torch.bool)
    draws = generator(seed, purpose="hold_out")
    for members, share in stratified(images.labels, wanted):
        order = torch.randperm(len(members), generator=draws)
        chosen[members[order[:share]]] = True
    train = TrainSplit(images, (~chosen).nonzero().flatten())
    return train, SelectionSplit(images, chosen.nonzero().flatten())


def stratified(labels: Tensor, count: int) -> list[tuple[Tensor, int]]:
    """How many instances of each class make a stratified choice of `count`.

    Args:
        labels: Labels (N,).
        count: How many to choose in all, 0..N.

    Returns:
        For each label that occurs, in order: the positions that carry it, and how many of them to take.

    Example:
        >>> [share for _, share in stratified(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]), 4)]
        [2, 1, 1]
    """
    groups = [(labels == label).nonzero().flatten() for label in torch.unique(labels)]
    # integers throughout: a rounding of fractions could give two machines different splits
    shares = [len(members) * count // len(labels) for members in groups]
    remainders = [len(members) * count % len(labels) for members in groups]
    by_remainder = sorted(range(len(groups)), key=lambda group: (-remainders[group], group))
    for group in by_remainder[: count - sum(shares)]:
        shares[group] += 1
    return list(zip(groups, shares, strict=True))


def require_selection(split: object) -> SelectionSplit:
    """The split itself if checkpoints may be chosen by it.

    Args:
        split: What somebody wants to select by.

    Returns:
        The same split.

    Raises:
        UserError: it is a test or training split, something else, or empty.

    Example:
        >>> from instar.data.sources import load
        >>> _, selection = hold_out(load("digits"), selection=0.1, seed=0)
        >>> require_selection(selection) is selection
        True
        >>> require_selection(TestSplit(load("digits", split="test")))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        instar.errors.UserError: checkpoints are selected on a SelectionSplit ...; got TestSplit...
    """
    if not isinstance(split, SelectionSplit):
        raise UserError(
            "checkpoints are selected on a SelectionSplit (held out of the training set by hold_out); got "
            f"{type(split).__name__}. Selecting on the test set makes its accuracy optimistic"
        )
    if len(split) == 0:
        raise UserError("checkpoints are selected on held-out images, and this SelectionSplit is empty; hold out more")
    return split
