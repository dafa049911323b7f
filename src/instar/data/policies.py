"""Torchvision's learned and random policies of colour and shape, made functions of the generator that is handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from instar.errors import UserError, unknown

_SEARCHED = MappingProxyType(
    {
        "cifar10": v2.AutoAugmentPolicy.CIFAR10,
        "imagenet": v2.AutoAugmentPolicy.IMAGENET,
        "svhn": v2.AutoAugmentPolicy.SVHN,
    }
)
_MADE: MappingProxyType[str, Callable[[str], Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "autoaugment": lambda searched_on: v2.AutoAugment(_SEARCHED[searched_on]),
        "randaugment": lambda _: v2.RandAugment(),
        "trivialaugment": lambda _: v2.TrivialAugmentWide(),
        "augmix": lambda _: v2.AugMix(),
    }
)


@dataclass(frozen=True)
class Policy:
    """One of torchvision's automatic augmentations with torchvision's defaults, drawn for each image.

    ``"autoaugment"`` draws one of 25 learned pairs of operations, ``"randaugment"`` applies 2 random operations of
    magnitude 9 out of 31, ``"trivialaugment"`` one of random magnitude, and ``"augmix"`` mixes 3 random chains with
    the image itself. Black fills what moves in.

    The operations are torchvision's, applied to one image after the other: a batch of 128 takes tens of milliseconds.
    They draw from PyTorch's global generator; it is set for each image by a number from the generator handed in, and
    left as it was found. They run on the CPU wherever the images lie, so the result does not depend on the device.

    Args:
        name: ``"autoaugment"``, ``"randaugment"``, ``"trivialaugment"`` or ``"augmix"``.
        searched_on: Data set on which AutoAugment's pairs were learned: ``"cifar10"``, ``"svhn"`` or ``"imagenet"``.
            The others have nothing learned and ignore it.

    Raises:
        UserError: an unknown name; when called, images that have neither 1 nor 3 channels, or that are neither uint8
            nor floating point.

    Source:
        Cubuk et al. (2019), AutoAugment; Cubuk et al. (2020), RandAugment; Müller & Hutter (2021), TrivialAugment;
        Hendrycks et al. (2020), AugMix. Deviations: torchvision's, see its documentation; AugMix is the augmentation
        alone, without the paper's consistency loss. Floating-point images are rounded to 256 levels first.

    Example:
        >>> images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> changed = Policy("trivialaugment")(images, torch.Generator().manual_seed(0))
        >>> changed.shape, changed.dtype
        (torch.Size([2, 3, 32, 32]), torch.uint8)
    """

    name: Literal["autoaugment", "randaugment", "trivialaugment", "augmix"]
    searched_on: Literal["cifar10", "svhn", "imagenet"] = "cifar10"

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        if self.name not in _MADE:
            raise unknown("policy", self.name, _MADE)
        if self.searched_on not in _SEARCHED:
            raise unknown("data set of an AutoAugment policy", self.searched_on, _SEARCHED)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W), uint8 in 0..255 or floating point in [0, 1], each after its own draw."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"a Policy needs images (B, C, H, W) of 1 or 3 channels; got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UserError(f"a Policy needs uint8 in 0..255 or floating point in [0, 1]; got {images.dtype}")
        seeds = torch.randint(2**63 - 1, (len(images),), generator=generator, device=generator.device).tolist()
        if not seeds:
            return images
        policy = _MADE[self.name](self.searched_on)
        levels = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
        changed = []
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(levels.cpu(), seeds, strict=True):
                # not torch.manual_seed: that would also set the GPU's generator, which nobody puts back
                torch.default_generator.manual_seed(seed)
                changed.append(policy(image))
        result = torch.stack(changed).to(images.device)
        return result if images.dtype == torch.uint8 else result.to(images.dtype) / 255
