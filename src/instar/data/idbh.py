"""IDBH: crop-and-shift, one operation on colour or shape, and erasing; the augmentation tuned for adversarial training.

Every number is drawn for every image, whichever operation it then undergoes; images that share an operation undergo it
together, each with its own strength.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as torchvision

from instar.data.augment import Augmentation, Flip, Transform, shift
from instar.data.erasing import RandomErasing, blacked
from instar.errors import UserError, unknown


@dataclass(frozen=True)
class CropShift:
    """A random window of the image, moved to a random place on a black canvas of the image's own size.

    The strength s is uniform on {low, ..., high}; s_x is uniform on {0, ..., s}, and s_y = s − s_x. A window of
    (H − s_y)×(W − s_x) pixels is cut out at a uniform position and pasted at another, independent, uniform position. So
    exactly s_y rows and s_x columns become black, and the content may also move.

    Args:
        low: Smallest strength in pixels, ≥ 0.
        high: Largest strength in pixels, included; 10 for CIFAR and 8 for SVHN in the paper, for images of 32×32.

    Raises:
        UserError: not 0 ≤ low ≤ high; when called, images not larger than `high` on both sides.

    Source:
        Li & Spratling (ICLR 2023), "Data Augmentation Alone Can Improve Adversarial Training". Deviations: none;
        the authors' code writes the range as [low, high + 1).

    Example:
        >>> images = torch.ones(2, 3, 32, 32, dtype=torch.uint8)
        >>> moved = CropShift(10, 10)(images, torch.Generator().manual_seed(0))[:, 0]
        >>> black_rows, black_columns = (moved.sum(2) == 0).sum(1), (moved.sum(1) == 0).sum(1)
        >>> (black_rows + black_columns).tolist()
        [10, 10]
    """

    low: int = 0
    high: int = 10

    def __post_init__(self) -> None:
        """Refuse a range that is empty or negative."""
        if not 0 <= self.low <= self.high:
            raise UserError(f"CropShift needs pixels 0 ≤ low ≤ high; got {self.low} and {self.high}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) of any type, each cropped and moved in its own way."""
        height, width = images.shape[-2:]
        if self.high >= min(height, width):
            raise UserError(
                f"high of CropShift must be smaller than the image {height}×{width}; got {self.high}. "
                f"10 for 32×32 images corresponds to {round(10 * min(height, width) / 32)}"
            )
        draws = torch.rand(6, len(images), generator=generator, device=generator.device, dtype=torch.float64)
        strength = self.low + _below(draws[0], self.high - self.low + 1)
        across = _below(draws[1], strength + 1)
        lost = torch.stack((strength - across, across))
        crop, paste = _below(draws[2:4], lost + 1), _below(draws[4:6], lost + 1)
        down, right = (self.high + crop - paste).to(images.device, non_blocking=True)
        moved = shift(images, down, right, padding=self.high)
        edges = torch.stack((paste[0], paste[0] + height - lost[0], paste[1], paste[1] + width - lost[1]))
        return blacked(moved, edges, outside=True)


OPERATIONS = ("saturation", "brightness", "contrast", "sharpness", "autocontrast", "equalize", "shear", "rotation")


@dataclass(frozen=True)
class Space:
    """How often `ColorShape` applies each of its eight operations, and how strongly.

    Attributes:
        probabilities: One for each of `OPERATIONS`.
        shear: Smallest and largest angle in radians, before the random sign.
        rotation: Largest angle in degrees, before the random sign; the smallest is 1, and all are integers.
        factors: Smallest and largest factor of saturation, brightness, contrast and sharpness; 1 changes nothing.
    """

    probabilities: tuple[float, ...]
    shear: tuple[float, float]
    rotation: int
    factors: tuple[tuple[float, float], ...] = ((0.1, 1.9), (0.5, 1.9), (0.5, 1.9), (0.1, 1.9))


# The authors' released numbers.
SPACES = MappingProxyType(
    {
        "color": Space((0.125,) * 8, shear=(0.05, 0.15), rotation=10),
        "shape": Space((0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3), shear=(0.05, 0.35), rotation=30),
    }
)


@dataclass(frozen=True)
class ColorShape:
    """Exactly one operation an image, drawn from eight, with a strength of its own.

    ============  ========================  ========================  ==================
    operation     strength                  probability, ``"color"``  ``"shape"``
    ============  ========================  ========================  ==================
    saturation    factor in (0.1, 1.9)      1/8                       0.08
    brightness    factor in (0.5, 1.9)      1/8                       0.08
    contrast      factor in (0.5, 1.9)      1/8                       0.04
    sharpness     factor in (0.1, 1.9)      1/8                       0.08
    autocontrast  none                      1/8                       0.04
    equalize      none                      1/8                       0.08
    shear         ±(0.05 to 0.15) rad,      1/8                       0.3, 0.05-0.35 rad
                  along rows or columns
    rotation      ±{1, ..., 10}°            1/8                       0.3, 1-30°
    ============  ========================  ========================  ==================

    Shear and rotation are about the centre, take the nearest pixel, and fill with black. Strengths are uniform.

    Args:
        kind: ``"color"`` for objects, ``"shape"`` for digits.

    Raises:
        UserError: an unknown kind; when called, images that have neither 1 nor 3 channels, or that are neither uint8
            nor floating point.

    Source:
        Li & Spratling (ICLR 2023), with the numbers of the authors' code. Deviations: uint8 follows torchvision's
        tensor operations, the authors' code Pillow's; saturation, contrast and autocontrast differ by at most one level
        in 255, and rotation in 3 of 10,000 pixels, which lie halfway between two. The authors' released class draws
        from ``"color"`` whatever kind it is asked for.

    Example:
        >>> images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
        >>> changed = ColorShape("color")(images, torch.Generator().manual_seed(0))
        >>> changed.shape, changed.dtype
        (torch.Size([4, 3, 32, 32]), torch.uint8)
    """

    kind: Literal["color", "shape"] = "color"

    def __post_init__(self) -> None:
        """Refuse an unknown kind."""
        if self.kind not in SPACES:
            raise unknown("kind of ColorShape", self.kind, SPACES)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What happens to each of `count` images.

        Args:
            count: Number of images B.
            generator: Where the numbers come from, and the device they lie on.

        Returns:
            Position in `OPERATIONS` (B,), strength (B,) as float64 in the operation's unit and with its sign (1 where
            the operation has none), and whether a shear moves columns up and down instead of rows to the side (B,).

        Example:
            >>> operation, strength, vertical = ColorShape("color").draw(3, torch.Generator().manual_seed(0))
            >>> operation.shape, strength.dtype, vertical.dtype
            (torch.Size([3]), torch.float64, torch.bool)
        """
        space = SPACES[self.kind]
        choice, amount, sign, axis = torch.rand(
            4, count, generator=generator, device=generator.device, dtype=torch.float64
        )
        upper = torch.tensor(space.probabilities, dtype=torch.float64, device=generator.device).cumsum(0)
        operation = torch.bucketize(choice, upper[:-1], right=True)  # without the last, whose sum may round below 1
        plain = (*space.factors, (1.0, 1.0), (1.0, 1.0), space.shear, (1.0, 1.0))
        low, high = torch.tensor(plain, dtype=torch.float64, device=generator.device)[operation].unbind(1)
        strength = torch.where(
            operation == OPERATIONS.index("rotation"), 1 + _below(amount, space.rotation), low + (high - low) * amount
        )
        negative = (sign < 0.5) & (operation >= OPERATIONS.index("shear"))
        return operation, torch.where(negative, -strength, strength), axis < 0.5

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W), uint8 in 0..255 or floating point in [0, 1], each after its operation."""
        _check_images(images)
        operation, strength, vertical = self.draw(len(images), generator)
        changed = images.clone()
        for number, name in enumerate(OPERATIONS):
            # chosen on the generator's device: for a CPU generator nothing waits for the GPU
            rows = (operation == number).nonzero().flatten()
            if not len(rows):
                continue
            amount, upright = strength[rows], vertical[rows]
            rows, amount, upright = (part.to(images.device, non_blocking=True) for part in (rows, amount, upright))
            chosen = images.index_select(0, rows)
            result = sheared(chosen, amount, upright) if name == "shear" else _APPLIED[name](chosen, amount)
            changed.index_copy_(0, rows, result)
        return changed


def saturated(images: Tensor, factor: Tensor) -> Tensor:
    """Images (B, C, H, W) between grey (factor 0) and beyond their own colour (above 1); grey images stay as they are.

    Args:
        images: uint8 in 0..255 or floating point in [0, 1], 1 or 3 channels.
        factor: One factor (B,) an image, ≥ 0.

    Returns:
        Images of the same type, as torchvision's ``adjust_saturation`` gives them one by one.

    Example:
        >>> red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1)
        >>> saturated(red, torch.tensor([0.0])).flatten().tolist()
        [76, 76, 76]
    """
    return images if images.shape[1] == 1 else _blended(images, _grey(images), factor)


def brightened(images: Tensor, factor: Tensor) -> Tensor:
    """Images (B, C, H, W) times a factor (B,) ≥ 0, cut off at white, as torchvision's ``adjust_brightness``.

    Example:
        >>> brightened(torch.tensor([100, 200], dtype=torch.uint8).reshape(1, 1, 1, 2), torch.tensor([1.5])).flatten()
        tensor([150, 255], dtype=torch.uint8)
    """
    work = _working(images)
    return _finished(work * _each(factor, work), images)


def contrasted(images: Tensor, factor: Tensor) -> Tensor:
    """Images (B, C, H, W) between their mean grey (factor 0) and beyond themselves, as ``adjust_contrast``.

    Example:
        >>> contrasted(torch.tensor([100, 200], dtype=torch.uint8).reshape(1, 1, 1, 2), torch.tensor([0.5])).flatten()
        tensor([125, 175], dtype=torch.uint8)
    """
    return _blended(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def sharpened(images: Tensor, factor: Tensor) -> Tensor:
    """Images (B, C, H, W) between smoothed (factor 0) and beyond themselves, as torchvision's ``adjust_sharpness``.

    The smoothing weighs a pixel 5/13 and its eight neighbours 1/13 each. The outermost pixels stay as they are, and so
    does an image of at most two pixels on a side.

    Example:
        >>> image = torch.zeros(1, 1, 3, 3)
        >>> image[..., 1, 1] = 0.13
        >>> round(float(sharpened(image, torch.tensor([0.0]))[..., 1, 1]), 6)
        0.05
    """
    if min(images.shape[-2:]) <= 2:
        return images
    work = _working(images)
    centre = work[..., 1:-1, 1:-1]
    # rows, then columns: on a CPU faster than a convolution by channel (3 times) and than pooling (6 times)
    three = work[..., :-2, :] + work[..., 1:-1, :] + work[..., 2:, :]
    smooth = (three[..., :-2] + three[..., 1:-1] + three[..., 2:] + centre * 4) / 13
    if images.dtype == torch.uint8:
        smooth = smooth.round()
    result = work.clone()
    result[..., 1:-1, 1:-1] = centre + (smooth - centre) * (1 - _each(factor, work))
    return _finished(result, images)


def sheared(images: Tensor, angle: Tensor, vertical: Tensor) -> Tensor:
    """Images (B, C, H, W) sheared about the centre; nearest pixel, black outside, as torchvision's ``affine``.

    Args:
        images: uint8 or floating point.
        angle: Radians (B,).
        vertical: True (B,) moves columns up and down, False rows to the side.

    Returns:
        Images of the same type.

    Example:
        >>> image = torch.ones(1, 1, 4, 4)
        >>> sheared(image, torch.tensor([0.6]), torch.tensor([False])).sum().item() < 16
        True
    """
    slope, one = angle.tan(), torch.ones_like(angle)
    zero = torch.zeros_like(angle)
    inverse = torch.stack((one, torch.where(vertical, zero, slope), torch.where(vertical, slope, zero), one), 1)
    return _mapped(images, inverse.reshape(-1, 2, 2))


def rotated(images: Tensor, degrees: Tensor) -> Tensor:
    """Images (B, C, H, W) turned counter-clockwise about the centre; nearest pixel, black outside, as ``rotate``.

    Args:
        images: uint8 or floating point.
        degrees: Angle (B,) in degrees.

    Returns:
        Images of the same type.

    Example:
        >>> image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
        >>> rotated(image, torch.tensor([90.0])).flatten().tolist()
        [2.0, 4.0, 1.0, 3.0]
    """
    angle = degrees.deg2rad()
    inverse = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1)
    return _mapped(images, inverse.reshape(-1, 2, 2))


_APPLIED: MappingProxyType[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "saturation": saturated,
        "brightness": brightened,
        "contrast": contrasted,
        "sharpness": sharpened,
        "autocontrast": lambda images, _: torchvision.autocontrast(images),
        "equalize": lambda images, _: torchvision.equalize(images),
        "rotation": rotated,
    }
)


def idbh(variant: Literal["weak", "strong", "svhn"], *, side: int = 32, flip: bool = True) -> Augmentation:
    """The published pipelines of IDBH: mirror image, `CropShift`, `ColorShape`, `RandomErasing`, in this order.

    ========  =============  ==========  ========================================
    variant   CropShift      ColorShape  RandomErasing
    ========  =============  ==========  ========================================
    weak      {0, ..., 10}   color       probability 0.5, area 2-33 % of the image
    strong    {0, ..., 10}   color       probability 1, area 2-33 %
    svhn      {0, ..., 8}    shape       probability 1, area 2-50 %
    ========  =============  ==========  ========================================

    Args:
        variant: ``"weak"`` for large networks, ``"strong"`` for small ones, ``"svhn"`` for digits in photographs.
        side: Shorter side of the images in pixels; the strengths of CropShift are the paper's at 32 and grow with it.
        flip: Whether mirror images belong to it, as they do in the paper.

    Returns:
        The pipeline. It takes the place of the random crop and flip, and is not added to them.

    Raises:
        UserError: an unknown variant, or a side below 1.

    Source:
        Li & Spratling (ICLR 2023), with the numbers of the authors' code. Deviations: see `ColorShape`; the scaling
        with `side` is ours. The authors mirror SVHN's digits too, which `flip` can end.

    Example:
        >>> for transform in idbh("weak").transforms:
        ...     print(transform)
        Flip(probability=0.5)
        CropShift(low=0, high=10)
        ColorShape(kind='color')
        RandomErasing(probability=0.5, area=(0.02, 0.33), aspect=(0.3, 3.3))
    """
    pipelines: dict[str, tuple[int, Literal["color", "shape"], RandomErasing]] = {
        "weak": (10, "color", RandomErasing(0.5)),
        "strong": (10, "color", RandomErasing(1.0)),
        "svhn": (8, "shape", RandomErasing(1.0, area=(0.02, 0.5))),
    }
    if variant not in pipelines:
        raise unknown("variant of IDBH", variant, pipelines)
    if side < 1:
        raise UserError(f"side must be at least 1 pixel; got {side}")
    strength, kind, erasing = pipelines[variant]
    mirrored: tuple[Transform, ...] = (Flip(),) if flip else ()
    return Augmentation((*mirrored, CropShift(0, round(strength * side / 32)), ColorShape(kind), erasing))


def _below(uniform: Tensor, bound: Tensor | int) -> Tensor:
    """Integers uniform on {0, ..., bound − 1} from float64 numbers uniform on [0, 1)."""
    return (uniform * bound).floor().long()


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"ColorShape needs images (B, C, H, W) of 1 or 3 channels; got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"ColorShape needs uint8 in 0..255 or floating point in [0, 1]; got {images.dtype}")


def _working(images: Tensor) -> Tensor:
    """The same values in a type precise enough to compute with."""
    return images if images.dtype == torch.float64 else images.to(torch.float32)


def _finished(work: Tensor, images: Tensor) -> Tensor:
    """Results in the range and type of the images; uint8 is cut off, not rounded, as in torchvision and Pillow."""
    return work.clamp(0, 255 if images.dtype == torch.uint8 else 1).to(images.dtype)


def _each(factor: Tensor, work: Tensor) -> Tensor:
    """One factor an image, ready to multiply images."""
    return factor.to(work.dtype).reshape(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) by ITU-R 601-2, in whole levels for uint8."""
    work = _working(images)
    if images.shape[1] == 1:
        return work
    red, green, blue = work.unbind(1)
    # torchvision's constants and order: another order rounds to another level
    grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]
    return grey.floor() if images.dtype == torch.uint8 else grey


def _blended(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor·images + (1 − factor)·other; beyond the images where the factor exceeds 1."""
    work = _working(images)
    # as a difference, so that where both are equal no rounding takes a level away when the result is cut off
    return _finished(other + (work - other) * _each(factor, work), images)


def _mapped(images: Tensor, inverse: Tensor) -> Tensor:
    """The images where each pixel comes from `inverse` (B, 2, 2) times its own (x, y), counted from the centre."""
    height, width = images.shape[-2:]
    work = _working(images)
    half = torch.tensor([0.5 * width, 0.5 * height], dtype=work.dtype, device=work.device)
    x = torch.arange(width, dtype=work.dtype, device=work.device) - (width - 1) / 2
    y = torch.arange(height, dtype=work.dtype, device=work.device) - (height - 1) / 2
    places = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), 2).reshape(1, -1, 2)
    grid = places.expand(len(images), -1, -1).bmm(inverse.to(work.dtype).transpose(1, 2) / half)
    grid = grid.reshape(len(images), height, width, 2)
    moved = F.grid_sample(work, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(images.dtype)
