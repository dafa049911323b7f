"""Rectangles set to black: random erasing and cutout, one rectangle an image, the whole batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from instar.errors import UserError

ATTEMPTS = 10  # torchvision: after so many rectangles that do not fit, the image stays as it is


@dataclass(frozen=True)
class RandomErasing:
    """With the given probability, a black rectangle of random area, shape and place: exactly torchvision's.

    The area is uniform on `area` times H·W and the logarithm of height / width uniform on that of `aspect`. Sides are
    rounded; a rectangle that is not smaller than the image on both sides is drawn anew, up to ten times, after which
    the image stays whole. Places where the rectangle fits are equally likely.

    Args:
        probability: That an image is erased at all, in [0, 1].
        area: Smallest and largest share of the image, in [0, 1].
        aspect: Smallest and largest height / width, positive.

    Raises:
        UserError: a probability, area or aspect outside its range, or a lower end above the upper one.

    Source:
        Zhong et al. (2020), "Random Erasing Data Augmentation", algorithm 1; defaults of torchvision. Deviations from
        the paper: black instead of noise, the ranges, and an aspect uniform in its logarithm, all as in torchvision.

    Example:
        >>> images = torch.ones(2, 1, 8, 8, dtype=torch.uint8)
        >>> erased = RandomErasing(1.0, area=(0.25, 0.25), aspect=(1.0, 1.0))(images, torch.Generator().manual_seed(0))
        >>> (erased == 0).sum((1, 2, 3)).tolist()
        [16, 16]
    """

    probability: float = 0.5
    area: tuple[float, float] = (0.02, 0.33)
    aspect: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        """Refuse what no rectangle can have."""
        object.__setattr__(self, "area", tuple(self.area))
        object.__setattr__(self, "aspect", tuple(self.aspect))
        if not 0 <= self.probability <= 1:
            raise UserError(f"probability of RandomErasing must be in [0, 1]; got {self.probability}")
        if len(self.area) != 2 or not 0 <= self.area[0] <= self.area[1] <= 1:
            raise UserError(f"area of RandomErasing must be two shares, 0 ≤ low ≤ high ≤ 1; got {self.area}")
        if len(self.aspect) != 2 or not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise UserError(f"aspect of RandomErasing must be two ratios, 0 < low ≤ high; got {self.aspect}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) of any type, some of them with a black rectangle."""
        count, (height, width) = len(images), images.shape[-2:]
        # Every number is drawn for every image, so that what one image gets does not depend on the others' rectangles.
        chosen, down, right = torch.rand(3, count, generator=generator, device=generator.device, dtype=torch.float64)
        by_area, by_aspect = torch.rand(
            2, ATTEMPTS, count, generator=generator, device=generator.device, dtype=torch.float64
        )
        area = torch.lerp(*_ends(self.area, by_area), by_area) * (height * width)
        aspect = torch.lerp(*_ends((math.log(self.aspect[0]), math.log(self.aspect[1])), by_aspect), by_aspect).exp()
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.to(torch.uint8).argmax(0, keepdim=True)  # of equal maxima, argmax gives the first
        chosen = (chosen < self.probability) & fits.any(0)
        tall = torch.where(chosen, tall.gather(0, first)[0], 0)
        wide = torch.where(chosen, wide.gather(0, first)[0], 0)
        top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
        return blacked(images, torch.stack((top, top + tall, left, left + wide)))


@dataclass(frozen=True)
class Cutout:
    """A black square around a pixel drawn uniformly, cut off at the borders.

    Args:
        length: Side of the square in pixels, ≥ 0; 16 for CIFAR-10 in the paper, 8 for CIFAR-100.

    Raises:
        UserError: the length is negative.

    Source:
        DeVries & Taylor (2017), "Improved Regularization of Convolutional Neural Networks with Cutout", section 3.2.
        Deviations: none for even lengths; an odd length gives a square of that side, in the authors' code of one less.

    Example:
        >>> images = torch.ones(1, 3, 8, 8)
        >>> cut = Cutout(4)(images, torch.Generator().manual_seed(0))
        >>> 4 <= int((cut[:, 0] == 0).sum()) <= 16
        True
    """

    length: int = 16

    def __post_init__(self) -> None:
        """Refuse a negative length."""
        if self.length < 0:
            raise UserError(f"length of Cutout must be 0 or more pixels; got {self.length}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) of any type, each with its own black square."""
        down, right = torch.rand(2, len(images), generator=generator, device=generator.device, dtype=torch.float64)
        height, width = images.shape[-2:]
        top = (down * height).floor() - self.length // 2
        left = (right * width).floor() - self.length // 2
        return blacked(images, torch.stack((top, top + self.length, left, left + self.length)))


def blacked(images: Tensor, edges: Tensor, *, outside: bool = False) -> Tensor:
    """Images with one rectangle each set to 0.

    Args:
        images: Images (B, C, H, W) of any type.
        edges: First row, row after the last, first column, column after the last (4, B), in pixels; they may lie
            outside the image.
        outside: Sets everything but the rectangle to 0 instead.

    Returns:
        New images (B, C, H, W) of the same type.

    Example:
        >>> image = torch.tensor([[1, 2], [3, 4]]).reshape(1, 1, 2, 2)
        >>> blacked(image, torch.tensor([[0], [1], [1], [5]])).flatten().tolist()
        [1, 0, 3, 4]
        >>> blacked(image, torch.tensor([[0], [1], [1], [5]]), outside=True).flatten().tolist()
        [0, 2, 0, 0]
    """
    height, width = images.shape[-2:]
    top, bottom, left, right = edges.to(images.device, non_blocking=True)[:, :, None]
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    inside: Tensor = (rows[:, :, None] & columns[:, None, :])[:, None]
    # a product with 0 and 1: on a CPU ten times as fast as masked_fill
    return images * (inside if outside else ~inside)


def _ends(interval: tuple[float, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends as tensors, as lerp wants them."""
    return like.new_tensor(interval[0]), like.new_tensor(interval[1])
