"""Images with their identity: every image is addressed by its position in the official data set, and keeps it.

Three sources share one protocol: a tensor in memory (`ResidentImages`), files that are decoded when they are asked for
(`FolderImages`), and any map-style torch Dataset (`from_dataset`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from instar.data.catalogue import IMAGENET_MEAN, IMAGENET_STD, DatasetInfo
from instar.data.formats import check_labels, read_picture
from instar.errors import UserError


@runtime_checkable
class Images(Protocol):
    """Labelled images that can be fetched by position.

    Attributes:
        labels: Labels (N,), int64, in 0..K−1.
        info: What is known about the data set.
    """

    @property
    def labels(self) -> Tensor:
        """Labels (N,), int64."""

    @property
    def info(self) -> DatasetInfo:
        """What is known about the data set."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Readable class names; the label is the position."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image as (C, H, W)."""

    def __len__(self) -> int:
        """Number of images N."""

    def fetch(self, positions: Tensor) -> Tensor:
        """The images (B, C, H, W) at these positions (B,), in this order: uint8 in 0..255, or float in [0, 1]."""


def as_float(images: Tensor) -> Tensor:
    """Images as a model sees them: float32 in [0, 1], not normalised.

    Args:
        images: uint8 in 0..255, or floating point in [0, 1], any shape.

    Returns:
        float32 of the same shape; uint8 values are divided by 255.

    Example:
        >>> as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist()
        [0.0, 0.20000000298023224, 1.0]
    """
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.to(torch.float32)


def check_values(images: Tensor, *, what: str) -> None:
    """Refuse images that a model with inputs in [0, 1] cannot mean.

    Args:
        images: uint8 (always fine) or floating point (must lie in [0, 1], no NaN).
        what: What to name in the error.

    Raises:
        UserError: another type, or a value outside [0, 1].

    Example:
        >>> check_values(torch.zeros(1, 1, 2, 2), what="mine")
        >>> check_values(torch.full((1, 1, 2, 2), 255.0), what="mine")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        instar.errors.UserError: mine: images must lie in [0, 1]; got values from 255 to 255. Divide by 255...
    """
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise UserError(
            f"{what}: images must be uint8 in 0..255 or floating point in [0, 1]; got {images.dtype}. Convert them: "
            "images.to(torch.uint8)"
        )
    if images.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(images))
    if low >= 0 and high <= 1:  # false for NaN as well
        return
    if low != low or high != high:
        hint = "there are NaN among them"
    elif low < 0:
        hint = "Are they normalised? Leave that to the model, whose first layer it is"
    else:
        hint = "Divide by 255, or hand them over as uint8"
    raise UserError(f"{what}: images must lie in [0, 1]; got values from {low:g} to {high:g}. {hint}")


@dataclass(frozen=True, eq=False)
class ResidentImages:
    """Images held in memory (or in a memory-mapped file), so that a batch is one gather.

    Args:
        images: uint8 in 0..255 or float32 in [0, 1], (N, C, H, W).
        labels: Labels (N,), integers in 0..K−1.
        info: What is known about the data set; its shape and number of classes must fit.
        split: ``"train"`` or ``"test"`` where that is known; test images are refused where selection is meant.

    Raises:
        UserError: shapes, types, values or labels do not fit.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        >>> held = ResidentImages(images, torch.tensor([0, 1, 2, 9]), CATALOGUE["digits"])
        >>> len(held), held.shape, held.fetch(torch.tensor([3, 0])).shape
        (4, (1, 8, 8), torch.Size([2, 1, 8, 8]))
    """

    images: Tensor
    labels: Tensor
    info: DatasetInfo
    split: str | None = None
    _on_device: dict[torch.device, ResidentImages] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check shapes, values and labels once, where data enter."""
        name = self.info.name
        if self.images.ndim != 4 or tuple(self.images.shape[1:]) != tuple(self.info.shape):
            raise UserError(
                f"{name}: images must be (N, C, H, W) = (N, {', '.join(map(str, self.info.shape))}); "
                f"got {tuple(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.is_floating_point():
            raise UserError(
                f"{name}: labels must be {len(self.images)} integers, one for each image; got "
                f"{tuple(self.labels.shape)} of {self.labels.dtype}"
            )
        check_values(self.images, what=name)
        if self.labels.device.type == "cpu":  # a copy for a device was checked before it was copied
            checked = check_labels(self.labels.numpy(), classes=len(self.info.classes), path=name)
            object.__setattr__(self, "labels", torch.from_numpy(checked))

    @property
    def classes(self) -> tuple[str, ...]:
        """Readable class names."""
        return self.info.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image as (C, H, W)."""
        return self.info.shape

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.images)

    def fetch(self, positions: Tensor) -> Tensor:
        """The images (B, C, H, W) at these positions, of the type they are held in, on the device they lie on."""
        return self.images.index_select(0, positions.to(self.images.device, non_blocking=True))

    def on(self, device: torch.device | str) -> ResidentImages:
        """These images on a device: copied once and kept, or left where they are if they would fill half of it.

        Args:
            device: Where batches are wanted.

        Returns:
            Images whose `fetch` is as fast as it can be for `device`.

        Example:
            >>> from instar.data.catalogue import CATALOGUE
            >>> held = ResidentImages(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), CATALOGUE["digits"])
            >>> held.on("cpu") is held
            True
        """
        target = torch.empty(0, device=device).device  # "cuda" → "cuda:0", so that both names mean one copy
        if target == self.images.device:
            return self
        if target not in self._on_device:
            if target.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(target)[0] // 2:
                return self
            self._on_device[target] = ResidentImages(
                self.images.to(target), self.labels.to(target), self.info, self.split
            )
        return self._on_device[target]

    @classmethod
    def of(cls, images: Images, *, chunk: int = 512) -> ResidentImages:
        """Any images, decoded once and held in memory from then on.

        Args:
            images: For example `FolderImages`; they must fit into memory.
            chunk: Images decoded at a time.

        Returns:
            The same images and labels, at the same positions.

        Example:
            >>> from instar.data.catalogue import CATALOGUE
            >>> held = ResidentImages(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), CATALOGUE["digits"])
            >>> len(ResidentImages.of(held))
            2
        """
        if isinstance(images, ResidentImages):
            return images
        if len(images) == 0:
            raise UserError(f"{images.info.name}: there are no images to hold")
        parts = (images.fetch(positions) for positions in torch.split(torch.arange(len(images)), chunk))
        first = next(parts)
        held = torch.empty((len(images), *first.shape[1:]), dtype=first.dtype)
        held[: len(first)] = first
        filled = len(first)
        for part in parts:
            held[filled : filled + len(part)] = part
            filled += len(part)
        return cls(held, images.labels, images.info, getattr(images, "split", None))


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Picture files, decoded by a pool of threads when they are fetched: RGB, scaled to cover, cropped at the centre.

    Args:
        files: One path an image.
        labels: Labels (N,), integers in 0..K−1.
        info: What is known about the data set; its `shape` is the size that pictures are brought to.
        split: ``"train"`` or ``"test"`` where that is known; test images are refused where selection is meant.
        workers: Threads that decode; None means one for each CPU core, 16 at most.

    Raises:
        UserError: the numbers of files and labels differ, or a label is out of range. `fetch` raises it for a file
            that is missing, cut off or no picture.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "cat.png")
        >>> Image.new("RGB", (60, 40), color=(255, 0, 0)).save(path)
        >>> from instar.data.catalogue import CATALOGUE
        >>> info = replace(CATALOGUE["imagenette"], shape=(3, 32, 32))
        >>> FolderImages((path,), torch.tensor([0]), info).fetch(torch.tensor([0]))[0, :, 0, 0].tolist()
        [255, 0, 0]
        >>> folder.cleanup()
    """

    files: tuple[Path, ...]
    labels: Tensor
    info: DatasetInfo
    split: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        """Check that files and labels fit together."""
        if len(self.files) != len(self.labels):
            raise UserError(f"{self.info.name}: {len(self.files)} files need as many labels; got {len(self.labels)}")
        if self.info.shape[0] != 3:
            raise UserError(f"{self.info.name}: picture files are read as RGB; got a shape of {self.info.shape}")
        checked = check_labels(self.labels.numpy(), classes=len(self.info.classes), path=self.info.name)
        object.__setattr__(self, "labels", torch.from_numpy(checked))

    @property
    def classes(self) -> tuple[str, ...]:
        """Readable class names."""
        return self.info.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image as (C, H, W)."""
        return self.info.shape

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.files)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # threads and not processes: Pillow decodes and scales outside the interpreter lock
        return ThreadPoolExecutor(self.workers or min(16, os.cpu_count() or 1), thread_name_prefix="instar-decode")

    def fetch(self, positions: Tensor) -> Tensor:
        """The images (B, 3, H, W) at these positions, decoded now, uint8 on the CPU."""
        _, height, width = self.shape
        chosen = positions.tolist()
        result = torch.empty((len(chosen), 3, height, width), dtype=torch.uint8)
        target = result.numpy()

        def decode(row: int) -> None:
            target[row] = read_picture(self.files[chosen[row]], height=height, width=width)

        for _ in self._pool.map(decode, range(len(chosen))):
            pass
        return result


def as_image(value: Any, *, what: str) -> Tensor:
    """One image of a torch Dataset as a tensor (C, H, W).

    Args:
        value: A tensor (C, H, W) or (H, W), an array (H, W, C) or (H, W), or a PIL picture.
        what: What to name in the error.

    Returns:
        uint8 in 0..255, or floating point in [0, 1].

    Raises:
        UserError: anything else.

    Example:
        >>> as_image(np.zeros((32, 24, 3), np.uint8), what="mine").shape
        torch.Size([3, 32, 24])
    """
    if isinstance(value, Tensor):
        image = value
    else:
        if isinstance(value, Image.Image) and value.mode not in ("L", "RGB", "I", "F") and ";" not in value.mode:
            value = value.convert("RGB")  # a palette's numbers are no intensities
        array = np.array(value)
        if array.ndim not in (2, 3) or array.dtype.kind not in "uf":
            raise UserError(f"{what}: expected a PIL picture, an array or a tensor; got {type(value).__name__}")
        image = torch.from_numpy(array if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3:
        raise UserError(f"{what}: expected one image (C, H, W); got a shape of {tuple(image.shape)}")
    return image


@dataclass(frozen=True, eq=False)
class DatasetImages:
    """A torch Dataset of (image, label) seen as `Images`; made by `from_dataset`.

    Args:
        dataset: Map-style: ``dataset[i]`` and ``len(dataset)``.
        labels: Labels (N,), integers in 0..K−1.
        info: What is known about it.
        split: ``"train"`` or ``"test"`` where that is known; test images are refused where selection is meant.
    """

    dataset: Any
    labels: Tensor
    info: DatasetInfo
    split: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Readable class names."""
        return self.info.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image as (C, H, W)."""
        return self.info.shape

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)

    def fetch(self, positions: Tensor) -> Tensor:
        """The images (B, C, H, W) at these positions, asked of the dataset one by one and checked."""
        images = []
        for position in positions.tolist():
            what = f"{self.info.name}, item {position}"
            value, label = self.dataset[position]
            image = as_image(value, what=what)
            if tuple(image.shape) != tuple(self.shape):
                raise UserError(
                    f"{what}: every image must have the shape of the first, {self.shape}; got {tuple(image.shape)}. "
                    "Add a Resize to the dataset's transform"
                )
            check_values(image, what=what)
            if int(label) != int(self.labels[position]):
                # a dataset that shuffles itself would give one instance's history to another
                raise UserError(
                    f"{what}: its label changed from {int(self.labels[position])} to {int(label)}; a dataset must "
                    "return the same item at the same position, so leave the shuffling to the loader"
                )
            images.append(image)
        if not images:
            return torch.empty((0, *self.shape), dtype=torch.uint8)
        return torch.stack(images)


def labels_of(dataset: Any) -> Tensor:
    """All labels of a torch Dataset, from its own list where it has a trustworthy one, else by asking for every item.

    Args:
        dataset: Map-style Dataset of (image, label). ``targets``, ``labels`` and ``tensors`` are understood, as are
            ``Subset`` and ``TensorDataset``.

    Returns:
        Labels (N,), int64.

    Raises:
        UserError: items are not pairs of image and integer label.

    Example:
        >>> labels_of(torch.utils.data.TensorDataset(torch.zeros(2, 1, 4, 4), torch.tensor([1, 0]))).tolist()
        [1, 0]
    """
    if isinstance(dataset, torch.utils.data.Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    found: Any = None
    if isinstance(dataset, torch.utils.data.TensorDataset) and len(dataset.tensors) == 2:
        found = dataset.tensors[1]
    elif getattr(dataset, "target_transform", None) is None:
        # with a target_transform the stored labels are not the ones that items carry
        found = next((getattr(dataset, name) for name in ("targets", "labels") if hasattr(dataset, name)), None)
    if found is None or len(found) != len(dataset):
        found = []
        for position in range(len(dataset)):
            item = dataset[position]
            if not isinstance(item, Sequence) or len(item) != 2:
                raise UserError(
                    f"item {position} of {type(dataset).__name__} must be a pair (image, label); got "
                    f"{type(item).__name__}" + (f" of {len(item)}" if isinstance(item, Sequence) else "")
                )
            found.append(item[1])
    labels = torch.as_tensor(found)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"labels of {type(dataset).__name__} must be integers (N,); got {labels.dtype} {tuple(labels.shape)}"
        )
    return labels.to(torch.int64)


def from_dataset(
    dataset: Any, *, classes: Sequence[str] | None = None, name: str = "custom", split: str | None = None
) -> DatasetImages:
    """Any map-style torch Dataset of (image, label) as `Images`.

    Nothing is normalised and nothing is shuffled: images must arrive as PIL pictures, uint8, or floats in [0, 1], all
    of one shape. A random transform inside the dataset draws from the global random state, which no resume can repeat;
    prefer `instar.data.augment`.

    Args:
        dataset: For example a ``torchvision.datasets`` object or a ``TensorDataset``.
        classes: Readable class names; None takes ``dataset.classes``, or else ``"class 0"``, ``"class 1"``, ...
        name: What reports call it.
        split: ``"train"`` or ``"test"``, so that test images are refused where selection is meant; None: not known.

    Returns:
        Images at the positions of the dataset. The threat model of its `info` is Linf 8/255, step 2/255, 10 steps.

    Raises:
        UserError: it is empty, an item is no (image, label), values are outside [0, 1], or labels outside the classes.

    Example:
        >>> pairs = torch.utils.data.TensorDataset(torch.rand(6, 3, 16, 16), torch.arange(6) % 2)
        >>> images = from_dataset(pairs, classes=["cat", "dog"], name="pets")
        >>> len(images), images.shape, images.classes
        (6, (3, 16, 16), ('cat', 'dog'))
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(
            f"a dataset must have len(dataset) and dataset[i]; got {type(dataset).__name__}. Iterable-style datasets "
            "have no positions, and without them no instance has an identity"
        )
    if len(dataset) == 0:
        raise UserError(f"{name}: the dataset is empty")
    labels = labels_of(dataset)
    first = as_image(dataset[0][0], what=f"{name}, item 0")
    check_values(first, what=f"{name}, item 0")
    if classes is None:
        own = getattr(dataset, "classes", None)
        count = max(2, int(labels.max()) + 1)
        classes = own if own is not None and len(own) >= count else [f"class {label}" for label in range(count)]
    shape = (int(first.shape[0]), int(first.shape[1]), int(first.shape[2]))
    info = generic_info(name, classes=tuple(map(str, classes)), shape=shape, train_size=len(labels))
    check_labels(labels.numpy(), classes=len(info.classes), path=name)
    return DatasetImages(dataset, labels, info, split)


def generic_info(
    name: str,
    *,
    classes: tuple[str, ...],
    shape: tuple[int, int, int],
    train_size: int,
    test_size: int = 0,
    source: str = "given by the user",
) -> DatasetInfo:
    """What is assumed about data that nobody registered: Linf 8/255 with 10 steps of 2/255, and usual statistics.

    Args:
        name: What reports call it.
        classes: Readable class names.
        shape: One image as (C, H, W).
        train_size: Images in the training set.
        test_size: Images in the test set.
        source: Where it came from.

    Returns:
        The info. RGB images get ImageNet's mean and standard deviation, and are flipped and padded by an eighth of
        their side; images of another number of channels get mean 0.5, standard deviation 0.25 and no augmentation.

    Example:
        >>> generic_info("mine", classes=("a", "b"), shape=(3, 64, 64), train_size=10).padding
        8
    """
    colour = shape[0] == 3
    return DatasetInfo(
        name=name,
        title=name,
        classes=classes,
        shape=shape,
        train_size=train_size,
        test_size=test_size,
        eps=8 / 255,
        step_size=2 / 255,
        steps=10,
        mean=IMAGENET_MEAN if colour else (0.5,) * shape[0],
        std=IMAGENET_STD if colour else (0.25,) * shape[0],
        flip=colour,
        padding=min(shape[1:]) // 8 if colour else 0,
        source=source,
    )


def resized(info: DatasetInfo, size: int) -> DatasetInfo:
    """The same data set at another size, which its title then states.

    Args:
        info: A data set of pictures that are scaled when they are read.
        size: Height and width, ≥ 1.

    Returns:
        The info with the new shape, padding scaled along, and a title such as ``"Imagenette at 64"``.

    Raises:
        UserError: the size is not positive.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> small = resized(CATALOGUE["imagenette"], 64)
        >>> small.title, small.shape, small.padding
        ('Imagenette at 64', (3, 64, 64), 8)
    """
    if size < 1:
        raise UserError(f"size must be a positive number of pixels; got {size}")
    return replace(
        info,
        title=f"{info.title.rsplit(' at ', 1)[0]} at {size}",
        shape=(info.shape[0], size, size),
        padding=round(info.padding * size / min(info.shape[1:])),
    )
