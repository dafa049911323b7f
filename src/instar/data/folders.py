"""Pictures sorted into folders, one folder a class: what torchvision calls an ImageFolder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from instar.data.catalogue import IMAGENETTE_NAMES, DatasetInfo
from instar.data.indexed import FolderImages, generic_info, resized
from instar.data.splits import stratified
from instar.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_TEST_FOLDERS = ("test", "val", "validation", "valid")
_TEST_SHARE = 5  # of a folder without a test part, one image in five becomes the test set
_DEFAULT_SIZE = 128
_LARGEST_NATIVE_SIZE = 256


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the sub-folders in sorted order, hidden ones left out; the label is the position.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     for each in ("dog", "cat", ".cache"):
        ...         Path(name, each).mkdir()
        ...     class_folders(Path(name))
        ('cat', 'dog')
    """
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."))


def pictures(folder: Path) -> list[Path]:
    """Picture files below a folder, at any depth, in the order that torchvision's ImageFolder gives them.

    Args:
        folder: Folder of one class.

    Returns:
        Paths with one of `EXTENSIONS`, in any case; hidden files left out.
    """
    found: list[Path] = []
    for place, _, files in sorted(os.walk(folder, followlinks=True)):
        found += [
            Path(place, name)
            for name in sorted(files)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return found


def scan(folder: Path, *, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    """Picture files and labels of a folder with one sub-folder a class.

    Args:
        folder: For example ``imagenette2/train``.
        classes: Names of the sub-folders; the label is the position.

    Returns:
        Paths and labels (N,), class by class.

    Raises:
        UserError: a sub-folder is missing or holds no picture.
    """
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name}: no such folder; every class of the training set needs one in each part")
        found = pictures(folder / name)
        if not found:
            raise UserError(f"{folder / name}: expected pictures ({', '.join(EXTENSIONS)}); got none")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels, dtype=torch.int64)


def fixed_test_mask(labels: Tensor, keys: Sequence[str], *, count: int) -> Tensor:
    """A stratified choice of test instances that depends on nothing but their names.

    Within each class the instances with the smallest SHA-256 of their key are chosen: the same on every machine and
    with every version of every library, which a seeded generator does not promise.

    Args:
        labels: Labels (N,).
        keys: One distinct text an instance.
        count: How many to choose.

    Returns:
        Mask (N,), bool, with `count` true values.

    Example:
        >>> int(fixed_test_mask(torch.tensor([0, 0, 0, 0, 1, 1]), list("abcdef"), count=3).sum())
        3
    """
    rank = [hashlib.sha256(key.encode()).digest() for key in keys]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for members, share in stratified(labels, count):
        for position in sorted(members.tolist(), key=lambda each: rank[each])[:share]:
            chosen[position] = True
    return chosen


def parts(folder: Path) -> tuple[Path, Path | None, tuple[str, ...]]:
    """Where an ImageFolder keeps its training and test pictures.

    Args:
        folder: With ``train/`` and one of ``test/``, ``val/``, ``validation/``, ``valid/``; or with classes directly.

    Returns:
        Folder of the training pictures, folder of the test pictures (None: both come out of the first), and the names
        of the class folders.

    Raises:
        UserError: the folder is missing, or there are fewer than two classes, or ``train/`` has no counterpart with
            the same classes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an image folder (train/ and val/ or test/, or classes)")
    train = folder / "train"
    if not train.is_dir():
        classes = class_folders(folder)
        if len(classes) < 2:
            raise UserError(
                f"{folder}: expected train/ and val/ or test/, or one sub-folder for each of two or more classes; got "
                f"{', '.join(classes) or 'no sub-folder'}"
            )
        return folder, None, classes
    classes = class_folders(train)
    if len(classes) < 2:
        raise UserError(
            f"{train}: expected one sub-folder for each of two or more classes; got {', '.join(classes) or 'none'}"
        )
    for name in _TEST_FOLDERS:
        if set(classes) == set(class_folders(folder / name)):
            return train, folder / name, classes
    present = [name for name in _TEST_FOLDERS if (folder / name).is_dir()]
    raise UserError(
        f"{folder}: expected test/ or val/ with the {len(classes)} classes of train/; got "
        + (
            f"{present[0]}/ with {', '.join(class_folders(folder / present[0])[:5]) or 'no sub-folder'}"
            if present
            else "neither"
        )
    )


def common_shape(files: Sequence[Path]) -> tuple[int, int]:
    """Height and width that pictures are brought to if nobody asks for a size.

    Args:
        files: Pictures; up to 64 of them, evenly spread, are looked at (headers only).

    Returns:
        Their own height and width if they all have one and no side is over 256, else 128 × 128.
    """
    step = max(1, len(files) // 64)
    sizes = set()
    for path in files[::step]:
        try:
            with Image.open(path) as picture:
                sizes.add(picture.size)
        except (OSError, SyntaxError, ValueError):
            continue  # decoding will name the file
    width, height = next(iter(sizes)) if len(sizes) == 1 else (_DEFAULT_SIZE, _DEFAULT_SIZE)
    return (height, width) if max(height, width) <= _LARGEST_NATIVE_SIZE else (_DEFAULT_SIZE, _DEFAULT_SIZE)


def readable(classes: Sequence[str]) -> tuple[str, ...]:
    """Class names for people: WordNet ids of Imagenette by name, all others as they are.

    Example:
        >>> readable(["n01440764", "my cats"])
        ('tench', 'my cats')
    """
    return tuple(IMAGENETTE_NAMES.get(name, name) for name in classes)


def load_folder(
    folder: Path, *, split: str, size: int | None = None, info: DatasetInfo | None = None, workers: int | None = None
) -> FolderImages:
    """One split of an ImageFolder, decoded when it is fetched.

    A folder with classes directly, without a test part, is split once and for all: of every class one picture in five,
    chosen by the hash of its path, is test.

    Args:
        folder: With ``train/`` and ``val/`` or ``test/`` (``test/`` wins if both have the classes), or with classes.
        split: ``"train"`` or ``"test"``.
        size: Height and width that pictures are brought to; None takes their own if all have one of at most 256, else
            128.
        info: What is known about the data set; None makes it up from the folder.
        workers: Threads that decode; None means one for each CPU core, 16 at most.

    Returns:
        The images, in the order of torchvision's ImageFolder.

    Raises:
        UserError: the folder is missing, a class has no picture, or the parts have different classes.
    """
    if size is not None and size < 1:
        raise UserError(f"size must be a positive number of pixels; got {size}")
    train, test, classes = parts(folder)
    files, labels = scan(train, classes=classes)
    if test is None:
        keys = [path.relative_to(train).as_posix() for path in files]
        mask = fixed_test_mask(labels, keys, count=len(files) // _TEST_SHARE)
        train_files, train_labels = [files[position] for position in (~mask).nonzero().flatten()], labels[~mask]
        test_files, test_labels = [files[position] for position in mask.nonzero().flatten()], labels[mask]
    else:
        train_files, train_labels = files, labels
        test_files, test_labels = scan(test, classes=classes)
    if info is None:
        height, width = common_shape(train_files) if size is None else (size, size)
        info = generic_info(
            folder.resolve().name,
            classes=readable(classes),
            shape=(3, height, width),
            train_size=len(train_files),
            test_size=len(test_files),
            source=f"image folder {folder.resolve().name}",
        )
    elif size is not None and info.shape != (info.shape[0], size, size):
        info = resized(info, size)
    sizes = (len(train_files), len(test_files))
    if sizes != (info.train_size, info.test_size):
        info = replace(info, train_size=sizes[0], test_size=sizes[1])
    if split == "train":
        return FolderImages(tuple(train_files), train_labels, info, split, workers)
    return FolderImages(tuple(test_files), test_labels, info, split, workers)
