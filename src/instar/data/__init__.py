"""Data with identity: named data sets, splits as types, and a loader that any step can be resumed from.

Example:
    >>> from instar.data import TestSplit, batches, hold_out, load, standard
    >>> train, selection = hold_out(load("digits"), selection=137, seed=0)
    >>> test = TestSplit(load("digits", split="test"))
    >>> batch = next(batches(train, batch_size=64, epoch=0, seed=0, shuffle=True, drop_last=True))
    >>> batch.x.shape, batch.x.dtype, len(selection), len(test)
    (torch.Size([64, 1, 8, 8]), torch.float32, 137, 360)
"""

from instar.data.augment import Augmentation, Flip, NoAugmentation, PadCrop, standard
from instar.data.augmentations import AUGMENTATIONS, augmentation
from instar.data.catalogue import DatasetInfo
from instar.data.extra import ExtraImages, extra_count, mixed_batches
from instar.data.indexed import FolderImages, Images, ResidentImages, from_dataset
from instar.data.mix import CutMix, MixUp
from instar.data.resident import batches, steps_per_epoch
from instar.data.sources import default_root, info, load, names
from instar.data.splits import SelectionSplit, TestSplit, TrainSplit, hold_out, require_selection

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "CutMix",
    "DatasetInfo",
    "ExtraImages",
    "Flip",
    "FolderImages",
    "Images",
    "MixUp",
    "NoAugmentation",
    "PadCrop",
    "ResidentImages",
    "SelectionSplit",
    "TestSplit",
    "TrainSplit",
    "augmentation",
    "batches",
    "default_root",
    "extra_count",
    "from_dataset",
    "hold_out",
    "info",
    "load",
    "mixed_batches",
    "names",
    "require_selection",
    "standard",
    "steps_per_epoch",
]
