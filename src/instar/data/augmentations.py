"""Augmentations by name: what a configuration calls ``augment``, and the transform that it gets for its data set."""

from __future__ import annotations

from collections.abc import Callable

from instar.data.augment import Augmentation, NoAugmentation, Transform, standard
from instar.data.catalogue import DatasetInfo
from instar.data.erasing import Cutout
from instar.data.idbh import idbh
from instar.data.policies import Policy
from instar.errors import unknown


def _after_standard(info: DatasetInfo, transform: Transform) -> Augmentation:
    usual = standard(info)
    before = usual.transforms if isinstance(usual, Augmentation) else ()
    return Augmentation((*before, transform))


def _side(info: DatasetInfo) -> int:
    return min(info.shape[1:])


def _autoaugment(info: DatasetInfo) -> Augmentation:
    """The pairs that were learned on the data set itself, else on the one of the nearest size."""
    if info.name == "svhn":
        return _after_standard(info, Policy("autoaugment", "svhn"))
    return _after_standard(info, Policy("autoaugment", "imagenet" if _side(info) > 32 else "cifar10"))


AUGMENTATIONS: dict[str, Callable[[DatasetInfo], Transform]] = {
    "standard": standard,
    "none": lambda info: NoAugmentation(),
    # Published for CIFAR-10, whose mirror images show their class; where they do not, there is no mirror. The one for
    # SVHN is as published, mirrored digits included.
    "idbh-weak": lambda info: idbh("weak", side=_side(info), flip=info.flip),
    "idbh-strong": lambda info: idbh("strong", side=_side(info), flip=info.flip),
    "idbh-svhn": lambda info: idbh("svhn", side=_side(info)),
    "cutout": lambda info: _after_standard(info, Cutout(_side(info) // 2)),
    "autoaugment": _autoaugment,
    "randaugment": lambda info: _after_standard(info, Policy("randaugment")),
    "trivialaugment": lambda info: _after_standard(info, Policy("trivialaugment")),
    "augmix": lambda info: _after_standard(info, Policy("augmix")),
}


def augmentation(name: str, info: DatasetInfo) -> Transform:
    """The augmentation of this name, fitted to a data set.

    ================================================  ==========================================================
    name                                              transform
    ================================================  ==========================================================
    standard                                          random crop and mirror image where the data set has them
    none                                              the images as they are
    idbh-weak, idbh-strong, idbh-svhn                 see `idbh`; CropShift scaled to the size, mirror images for
                                                      weak and strong only where the data set has them
    cutout                                            standard, then `Cutout` of half the image's side
    autoaugment, randaugment, trivialaugment, augmix  standard, then that `Policy`; AutoAugment's pairs were learned
                                                      on SVHN for SVHN, on ImageNet above 32 pixels, else on CIFAR-10
    ================================================  ==========================================================

    Args:
        name: A name of the table.
        info: The data set; its size, mirror images and padding decide.

    Returns:
        A transform: (images (B, C, H, W), generator) → images of the same type.

    Raises:
        UserError: an unknown name.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> augmentation("cutout", CATALOGUE["mnist"])
        Augmentation(transforms=(Cutout(length=14),))
        >>> augmentation("none", CATALOGUE["cifar10"])
        NoAugmentation()
    """
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name](info)
