"""Which normalisation a network expects: as the user says, or as a few labelled images tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from instar.data.catalogue import IMAGENET_MEAN, IMAGENET_STD, DatasetInfo
from instar.data.indexed import as_float
from instar.data.splits import Split
from instar.errors import UserError
from instar.evaluate.intervals import mcnemar
from instar.expression import parse
from instar.models.normalize import statistics
from instar.modes import forward_mode

Normalization = str | tuple[Sequence[float], Sequence[float]]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

CHOICES = "identity, dataset, auto, or mean/std such as 0.5/0.5 or 0.49,0.48,0.45/0.25,0.24,0.26"
IMAGES = 128
"""Images that a normalisation is recognised by."""


@dataclass(frozen=True)
class Tried:
    """How a network does with one normalisation in front of it.

    Attributes:
        name: ``"identity"``, ``"dataset"`` and so on.
        mean: One a channel.
        std: One a channel.
        correct: Verdicts on the images (n,), boolean.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    correct: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of right predictions, in [0, 1]."""
        return float(self.correct.mean())

    def __str__(self) -> str:
        return f"{self.name} {self.accuracy:.1%}"


@dataclass(frozen=True)
class Detected:
    """What a few images say about a network's normalisation.

    Attributes:
        tried: All candidates, best first.
        clear: Whether the first is better than the second by more than two standard errors of the paired difference,
            and better than chance.
    """

    tried: tuple[Tried, ...]
    clear: bool

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.tried[:3]))} on {len(self.tried[0].correct)} images"


def candidates(info: DatasetInfo) -> dict[str, Statistics]:
    """What training codes do to images in [0, 1] before the network sees them, the most usual first.

    Args:
        info: The data set.

    Returns:
        Names and (mean, std), without repetitions: ``identity``, ``dataset``, ``half`` ((x − 0.5) / 0.5),
        ``imagenet``, ``dataset twice`` (once in the data pipeline, once in the network), and ``0..255``.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> list(candidates(CATALOGUE["cifar10"]))
        ['identity', 'dataset', 'half', 'imagenet', 'dataset twice', '0..255']
    """
    channels = info.shape[0]
    mean, std = statistics(info.mean, info.std, channels)
    known: dict[str, Statistics] = {
        "identity": ((0.0,) * channels, (1.0,) * channels),
        "dataset": (mean, std),
        "half": ((0.5,) * channels, (0.5,) * channels),
    }
    if channels == 3:
        known["imagenet"] = (tuple(IMAGENET_MEAN), tuple(IMAGENET_STD))
    # ((x − m) / s − m) / s = (x − m (1 + s)) / s²
    known["dataset twice"] = (
        tuple(m * (1 + s) for m, s in zip(mean, std, strict=True)),
        tuple(s * s for s in std),
    )
    known["0..255"] = ((0.0,) * channels, (1 / 255,) * channels)
    return {name: pair for number, (name, pair) in enumerate(known.items()) if pair not in [*known.values()][:number]}


def applied(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(x − mean) / std`` for images (B, C, H, W), channel by channel."""
    shape = (1, len(mean), 1, 1)
    return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)


@torch.no_grad()
def compare(model: nn.Module, x: Tensor, y: Tensor, known: dict[str, Statistics]) -> Detected:
    """Try normalisations in front of a network.

    Args:
        model: Its modes are left as found; it is run in eval mode.
        x: Images (n, C, H, W) in [0, 1], on the model's device.
        y: Labels (n,).
        known: Names and (mean, std).

    Returns:
        All of them, best first.
    """
    with forward_mode(model, "eval"):
        found = [
            Tried(
                name,
                mean,
                std,
                torch.cat([model(applied(part, mean, std)).argmax(1) for part in x.split(64)]).eq(y).cpu().numpy(),
            )
            for name, (mean, std) in known.items()
        ]
    found.sort(key=lambda tried: -tried.accuracy)  # stable: the more usual one of equals comes first
    chance = float(torch.bincount(y).max()) / len(y)
    clear = found[0].accuracy > chance + 2 * (chance * (1 - chance) / len(y)) ** 0.5
    if len(found) > 1:
        pair = mcnemar(found[0].correct, found[1].correct)
        clear = clear and pair.difference > 2 * pair.error
    return Detected(tuple(found), clear)


def labelled(split: Split, count: int = IMAGES) -> tuple[Tensor, Tensor]:
    """A few images of a split at even distances, float32 in [0, 1], and their labels."""
    chosen = split.spread(count)
    return as_float(chosen.images.fetch(chosen.indices)).cpu().contiguous(), chosen.labels.cpu()


def detect(model: nn.Module, split: Split) -> tuple[Tried, Detected]:
    """The normalisation that a network clearly expects.

    Args:
        model: A network that normalises nothing itself.
        split: Where labelled images come from.

    Returns:
        The best candidate, and all of them.

    Raises:
        UserError: The model cannot process the images, or no candidate is clearly the best.
    """
    x, y = labelled(split)
    try:
        found = compare(model, x, y, candidates(split.images.info))
    except UserError:
        raise
    except Exception as error:  # foreign models fail in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model failed on images of shape {tuple(x.shape)}: {reason}") from error
    if not found.clear:
        raise UserError(
            f"the normalisation cannot be told from the images ({found}): give --normalize as you trained, one of "
            f"{CHOICES}"
        )
    return found.tried[0], found


def wanted(wish: Normalization, info: DatasetInfo) -> Statistics | None:
    """Mean and std that a wish stands for.

    Args:
        wish: ``"identity"``, ``"dataset"``, ``"auto"``, text ``"mean/std"`` with one number or one a channel, or lists.
        info: The data set.

    Returns:
        Mean and std, one a channel; None for ``"auto"``.

    Raises:
        UserError: Anything else.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> wanted("0.5/0.25", CATALOGUE["cifar10"])
        ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    """
    channels = info.shape[0]
    if isinstance(wish, str):
        if wish == "auto":
            return None
        if wish in ("identity", "dataset"):
            return candidates(info)[wish]
        mean, slash, std = wish.partition("/")
        try:
            numbers = [[float(parse(part)) for part in side.strip("()[] ").split(",")] for side in (mean, std)]
        except (UserError, TypeError, ValueError):
            slash = ""
        if not slash:
            raise UserError(f"normalize must be {CHOICES}; got {wish!r}")
        return statistics(numbers[0], numbers[1], channels)
    if len(wish) != 2:
        raise UserError(f"normalize must be a pair (mean, std) or {CHOICES}; got {wish!r}")
    return statistics(wish[0], wish[1], channels)
