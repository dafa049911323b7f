"""Augmentation as frozen values: drawn for each image, applied to the whole batch at once, on whatever device it lies.

Random numbers are drawn from the generator that is handed in, on the generator's own device, and are then sent to the
images; so the CPU and a GPU see the same crops for the same generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from instar.data.catalogue import DatasetInfo
from instar.errors import UserError

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class PadCrop:
    """A random crop of the padded image, of the image's own size: the image shifted by up to `padding` pixels.

    The offsets (dy, dx) are independent and uniform on {0, ..., 2·padding} for every image, exactly the distribution of
    torchvision's ``RandomCrop(size, padding=padding)``.

    Args:
        padding: Pixels added on each side, ≥ 0; 4 is usual for 32×32.
        mode: ``"zero"`` (black, usual) or ``"reflect"`` (mirrored without repeating the edge).

    Raises:
        UserError: padding is negative, or `mode` is unknown; when called, reflect padding not smaller than the image.

    Source:
        He et al. (2016), section 4.2; Deviations: none.

    Example:
        >>> images = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
        >>> moved = PadCrop(1)(images, torch.Generator().manual_seed(0))
        >>> moved.shape, moved.dtype
        (torch.Size([1, 1, 4, 4]), torch.uint8)
        >>> bool((PadCrop(0)(images, torch.Generator()) == images).all())
        True
    """

    padding: int = 4
    mode: Literal["zero", "reflect"] = "zero"

    def __post_init__(self) -> None:
        """Refuse what no crop can mean."""
        if self.padding < 0:
            raise UserError(f"padding of PadCrop must be 0 or more pixels; got {self.padding}")
        if self.mode not in ("zero", "reflect"):
            raise UserError(f"mode of PadCrop must be 'zero' or 'reflect'; got {self.mode!r}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) of any type, each cropped at its own offset."""
        draws = torch.randint(2 * self.padding + 1, (2, len(images)), generator=generator, device=generator.device)
        if self.padding == 0:
            return images
        down, right = draws.to(images.device, non_blocking=True)
        return shift(images, down, right, padding=self.padding, mode=self.mode)


def shift(images: Tensor, down: Tensor, right: Tensor, *, padding: int, mode: str = "zero") -> Tensor:
    """The crop of each padded image whose upper left corner is at (down, right).

    Args:
        images: Images (B, C, H, W) of any type.
        down: Row of the corner in the padded image (B,), in 0..2·padding; `padding` itself leaves the image in place.
        right: Column of the corner (B,), likewise.
        padding: Pixels added on each side.
        mode: ``"zero"`` or ``"reflect"``.

    Returns:
        Images (B, C, H, W) of the same type.

    Raises:
        UserError: reflect padding is not smaller than the image.

    Example:
        >>> image = torch.tensor([[1, 2], [3, 4]]).reshape(1, 1, 2, 2)
        >>> shift(image, torch.tensor([1]), torch.tensor([0]), padding=1).flatten().tolist()
        [0, 1, 0, 3]
    """
    count, channels, height, width = images.shape
    if mode == "reflect":
        if padding >= min(height, width):
            raise UserError(f"reflect padding must be smaller than the image {height}×{width}; got {padding}")
        rows = _reflected(down, height, padding)
        columns = _reflected(right, width, padding)
        flat = rows[:, :, None] * width + columns[:, None, :]
        index = flat.reshape(count, 1, height * width).expand(-1, channels, -1)
        return images.reshape(count, channels, height * width).gather(2, index).reshape(images.shape)
    padded = F.pad(images, (padding,) * 4)
    # Every possible crop of every image as one strided view (B, 2p+1, 2p+1, C, H, W): nothing is copied but the crops
    # that are chosen.
    by_image, by_channel, by_row, by_column = padded.stride()
    windows = padded.as_strided(
        (count, 2 * padding + 1, 2 * padding + 1, channels, height, width),
        (by_image, by_row, by_column, by_channel, by_row, by_column),
    )
    return windows[torch.arange(count, device=images.device), down, right]


def _reflected(corner: Tensor, length: int, padding: int) -> Tensor:
    """Source coordinates (B, length) of a crop under mirror padding."""
    position = (corner[:, None] - padding + torch.arange(length, device=corner.device)).abs()
    return (length - 1) - ((length - 1) - position).abs()


@dataclass(frozen=True)
class Flip:
    """A mirror image, left to right, with the given probability for each image.

    Args:
        probability: In [0, 1]; 0.5 is usual.

    Raises:
        UserError: the probability is not in [0, 1].

    Example:
        >>> images = torch.tensor([[1, 2]]).reshape(1, 1, 1, 2)
        >>> Flip(1.0)(images, torch.Generator()).flatten().tolist()
        [2, 1]
        >>> Flip(0.0)(images, torch.Generator()).flatten().tolist()
        [1, 2]
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not 0 <= self.probability <= 1:
            raise UserError(f"probability of Flip must be in [0, 1]; got {self.probability}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) of any type, some of them mirrored."""
        draw = torch.rand(len(images), generator=generator, device=generator.device) < self.probability
        # the chosen images alone are copied: where() over the whole batch takes five times as long on a CPU
        rows = draw.nonzero().flatten().to(images.device, non_blocking=True)
        return images.index_copy(0, rows, images.index_select(0, rows).flip(-1))


@dataclass(frozen=True)
class Augmentation:
    """Transforms one after the other, all drawing from one generator.

    Args:
        transforms: Callables (images, generator) → images.

    Example:
        >>> usual = Augmentation((PadCrop(4), Flip()))
        >>> usual(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])
    """

    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be called, such as a transform named by text."""
        object.__setattr__(self, "transforms", tuple(self.transforms))
        for transform in self.transforms:
            if not callable(transform):
                raise UserError(f"transforms must be callables such as PadCrop(4) and Flip(); got {transform!r}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W), augmented."""
        for transform in self.transforms:
            images = transform(images, generator)
        return images


@dataclass(frozen=True)
class NoAugmentation:
    """The images as they are; nothing is drawn.

    Example:
        >>> images = torch.rand(1, 1, 2, 2)
        >>> NoAugmentation()(images, torch.Generator()) is images
        True
    """

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The same images."""
        return images


def standard(info: DatasetInfo) -> Augmentation | NoAugmentation:
    """The usual augmentation of a data set: the random crop and the mirror image that its catalogue entry states.

    Args:
        info: The data set; its `padding` and `flip` decide.

    Returns:
        ``Augmentation((PadCrop(4), Flip()))`` for CIFAR, `NoAugmentation` for MNIST, SVHN and digits.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> standard(CATALOGUE["cifar10"])
        Augmentation(transforms=(PadCrop(padding=4, mode='zero'), Flip(probability=0.5)))
        >>> standard(CATALOGUE["mnist"])
        NoAugmentation()
    """
    transforms: tuple[Transform, ...] = (PadCrop(info.padding),) if info.padding else ()
    transforms += (Flip(),) if info.flip else ()
    return Augmentation(transforms) if transforms else NoAugmentation()
