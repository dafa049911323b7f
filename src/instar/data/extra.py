"""Extra training images, generated or pseudo-labelled, mixed into every batch in a fixed share.

Files of millions of images are never read: they are mapped, and a batch touches the rows that it draws. Which rows
those are is a function of (seed, epoch, step) alone, so that nothing needs saving here either.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from instar.arrays import Head, read_head
from instar.data.ahead import one_ahead
from instar.data.cache import FOLDER
from instar.data.catalogue import DatasetInfo
from instar.data.formats import missing, read_pickle
from instar.data.indexed import ResidentImages, as_float
from instar.data.resident import decoded_images, epoch_order, steps_between
from instar.data.sources import default_root
from instar.data.splits import Split, TrainSplit
from instar.errors import UserError
from instar.evidence import UNLABELLED, Batch
from instar.randomness import generator
from instar.storage import parse_json, write_atomically

IMAGE_NAMES = ("image", "data")
"""Names under which a file may hold its images; the first that is there counts."""

LABEL_NAMES = ("label", "extrapolated_targets", "labels")
"""Names under which a file may hold its labels; the first that is there counts."""

_LABELS_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class ExtraImages:
    """Images beside the official training set, with labels that a model gave them; usually a mapped file.

    Args:
        images: uint8 in 0..255, (N, H, W, C) or (N, C, H, W); where both readings fit, the first is taken.
        labels: Integers (N,) in −1..K−1; −1 marks an image without a label.
        info: The data set that these images extend; shape and number of classes must be its own.
        name: What errors call it.

    Raises:
        UserError: shapes, types, numbers or labels do not fit.

    Example:
        >>> from instar.data.catalogue import CATALOGUE
        >>> images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1)
        >>> extra = ExtraImages(images, np.array([7, -1, 2]), CATALOGUE["digits"])
        >>> rows = torch.tensor([2, 0, 2])
        >>> len(extra), extra.fetch(rows).shape, extra.labels_of(rows).tolist()
        (3, torch.Size([3, 1, 8, 8]), [2, 7, 2])
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]
    info: DatasetInfo
    name: str = "extra images"

    def __post_init__(self) -> None:
        """Check shapes, types and labels; images are not read."""
        _check_form(
            self.name,
            self.info,
            images=(self.images.shape, self.images.dtype),
            labels=(self.labels.shape, self.labels.dtype),
        )
        classes = len(self.info.classes)
        for start in range(0, len(self.labels), _LABELS_AT_ONCE):
            part = self.labels[start : start + _LABELS_AT_ONCE]
            wrong = np.flatnonzero((part < UNLABELLED) | (part >= classes))
            if len(wrong):
                raise UserError(
                    f"{self.name}: labels must be in 0..{classes - 1} for the {classes} classes of {self.info.name}, "
                    f"or −1 for none; got {int(part[wrong[0]])} at row {start + int(wrong[0])}"
                )

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        info: DatasetInfo,
        cache: Path | str | None = None,
        note: Callable[[str], None] | None = None,
    ) -> ExtraImages:
        """Map a file of extra images without reading it.

        An array that lies uncompressed in its ``.npz`` (as `numpy.savez` writes it) is mapped where it lies. A
        compressed one, and a pickle, is unpacked once into a cache, which is used as long as size and modification
        time of the file stay the same. The file must not be overwritten while it is in use.

        Args:
            path: An ``.npz`` with images under `IMAGE_NAMES` and labels under `LABEL_NAMES`, or the pickled dict of
                RST (``ti_500K_pseudo_labeled.pickle``), which is read without running anything that it names. That
                one time a pickle needs memory for about three times its size.
            info: The data set that these images extend.
            cache: Folder for unpacked arrays. None means the folder ``instar-cache`` beside the file if that can be
                written to and has room, or else the one below `default_root`.
            note: Called with one line before something is unpacked, which takes a while.

        Returns:
            Images whose rows are read when they are fetched.

        Raises:
            UserError: the file is missing, damaged, encrypted or of another format; an array is missing, holds Python
                objects, or does not fit `info`; or there is no room to unpack it.

        Source:
            Files of Gowal et al. 2021, Rebuffi et al. 2021 and Wang et al. 2023 (``image``, ``label``), and of Carmon
            et al. 2019 (``data``, ``extrapolated_targets``).

        Example:
            >>> from instar.data.catalogue import CATALOGUE
            >>> folder = tempfile.TemporaryDirectory()
            >>> path = Path(folder.name, "generated.npz")
            >>> np.savez(path, image=np.zeros((5, 32, 32, 3), np.uint8), label=np.arange(5))
            >>> extra = ExtraImages.open(path, info=CATALOGUE["cifar10"])
            >>> len(extra), isinstance(extra.images, np.memmap), extra.labels_of(torch.tensor([4])).tolist()
            (5, True, [4])
            >>> del extra; folder.cleanup()
        """
        path = Path(path).expanduser()
        folders = (path.parent / FOLDER, default_root() / FOLDER) if cache is None else (Path(cache).expanduser(),)
        store = _Store(path, folders, note)
        begin = _beginning(path)
        if begin[:2] == b"PK":
            images, labels = _from_npz(path, info, store)
        elif begin[:1] == b"\x80" or begin[:2] == b"\x1f\x8b":
            images, labels = _from_pickle(path, info, store)
        else:
            raise UserError(
                f"{path}: expected an .npz with the arrays image and label, or a pickled dict; got a file that begins "
                f"{begin.hex(' ') or 'with nothing'}"
            )
        return cls(images, labels, info, str(path))

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.labels)

    def digest(self) -> str:
        """A hash of about 65,536 labels, evenly spread: tells another file, without reading all of this one."""
        labels = np.asarray(self.labels)[:: max(len(self) // 65_536, 1)]
        return hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()

    def fetch(self, rows: Tensor) -> Tensor:
        """The images (B, C, H, W), uint8, at these rows (B,), in this order; a row may come more than once."""
        wanted = rows.numpy()
        order = np.argsort(wanted)  # from the front to the back of the file
        found = np.asarray(self.images).take(wanted[order], axis=0)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        result = torch.from_numpy(found[back])
        if self.images.shape[1:] == _channels_last(self.info):
            result = result.permute(0, 3, 1, 2).contiguous()
        return result

    def labels_of(self, rows: Tensor) -> Tensor:
        """The labels (B,), int64, at these rows (B,)."""
        # not take(): numbers in a zip file are rarely aligned, and take() would copy all of them first
        return torch.from_numpy(np.asarray(self.labels)[rows.numpy()].astype(np.int64))


def extra_count(batch_size: int, fraction: float) -> int:
    """How many of the instances of a batch are extra ones.

    Args:
        batch_size: Instances a batch B, ≥ 2.
        fraction: Share f of extra instances, 0 < f < 1.

    Returns:
        B · f rounded to the nearest whole number, halves to the even one; at least 1 and at most B − 1.

    Raises:
        UserError: the fraction is outside (0, 1), or the batch has no room for both kinds.

    Example:
        >>> extra_count(128, 0.7), extra_count(256, 0.5), extra_count(10, 0.25), extra_count(10, 0.01)
        (90, 128, 2, 1)
    """
    if not 0 < fraction < 1:
        hint = f" Did you mean {fraction / 100:g}?" if 1 < fraction < 100 else ""
        raise UserError(f"fraction of extra images must be between 0 and 1, both excluded; got {fraction}.{hint}")
    if batch_size < 2:
        raise UserError(f"batch_size must be at least 2, a real and an extra image; got {batch_size}")
    return _share(batch_size, fraction)


def _share(size: int, fraction: float) -> int:
    return min(max(1, round(size * fraction)), size - 1)


def mixed_batches(
    split: Split,
    extra: ExtraImages,
    *,
    fraction: float,
    batch_size: int,
    epoch: int,
    seed: int,
    smoothing: float = 0.0,
    shuffle: bool = True,
    drop_last: bool = True,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    device: torch.device | str = "cpu",
    first_step: int = 0,
    limit: int | None = None,
) -> Iterator[Batch]:
    """The batches of one epoch of real and extra images: real ones first, then a fixed number of extra ones.

    An epoch counts instances of both kinds: it has as many steps as one of ``batches`` with the same batch size, and
    so visits each real image at most once, and only a share 1 − `fraction` of them. Real images come in a new order
    every epoch, without replacement; extra ones are drawn with replacement, anew at every step.

    Args:
        split: The real images.
        extra: The extra images, of the same shape and classes.
        fraction: Share of extra images, 0 < f < 1; `extra_count` says how many that are.
        batch_size: Instances a batch B of both kinds, ≥ 2.
        epoch: Epoch, from 0; with `seed` it decides order, draws and augmentation.
        seed: The run's seed.
        smoothing: Label smoothing s in [0, 1) of extra images alone: their target is (1 − s) · onehot + s / K. 0
            leaves the labels as they are, without soft targets.
        shuffle: False takes the first real images of ``split.indices``, in order, in every epoch.
        drop_last: Whether a last, smaller batch is left out; it is divided by the same rule, and is a real image if it
            is a single one.
        augment: For example ``standard(info)``; it gets the whole batch and a generator keyed by (seed, epoch, step).
        device: Where the batch is wanted.
        first_step: Step to begin at, from 0: the remaining batches of an interrupted epoch, bit for bit.
        limit: Step to stop before, counted from the beginning of the epoch; None means the whole epoch.

    Yields:
        `Batch`, all on `device`, with x float32 (B, C, H, W) in [0, 1]; y (B,), −1 where there is no label; index (B,),
        the official position of a real image, and ``len(split.images)`` + row of an extra one; source (B,), 0 for real
        and 1 for extra; target (B, K) float32, or None without smoothing. An image without a label has a target of
        zeros, which adds 0 to a cross-entropy. labelled (B,) is False for those, and None if there are none.

    Raises:
        UserError: a fraction outside (0, 1), a smoothing outside [0, 1), a batch size below 2, a step outside the
            epoch, a split that is not for training, or shapes or classes that differ.

    Source:
        Carmon et al. 2019 (RST): batches with a fixed share of extra images, drawn with replacement. Gowal et al. 2021:
        70 % generated images, smoothing 0.1 on them alone.

    Deviations:
        Gowal et al. repeat each real image of a batch four times, once a worker: 77 different ones in a batch of 1,024.
        Here all 307 differ.

    Example:
        >>> from instar.data.sources import load
        >>> split = TrainSplit(load("digits"))
        >>> extra = ExtraImages(np.zeros((9, 8, 8, 1), np.uint8), np.arange(9), split.images.info)
        >>> batch = next(mixed_batches(split, extra, fraction=0.7, smoothing=0.1, batch_size=10, epoch=0, seed=0))
        >>> batch.x.shape, batch.source.tolist(), bool((batch.index[3:] >= 1437).all())
        (torch.Size([10, 1, 8, 8]), [0, 0, 0, 1, 1, 1, 1, 1, 1, 1], True)
        >>> batch.target[[0, 9]].max(1).values
        tensor([1.0000, 0.9100])
    """
    extra_count(batch_size, fraction)  # refuses what is no share
    if not 0 <= smoothing < 1:
        raise UserError(f"smoothing of extra images must be in [0, 1); got {smoothing}")
    if not isinstance(split, TrainSplit):
        raise UserError(f"extra images are mixed into a TrainSplit; got {type(split).__name__}")
    expected, found = (tuple(split.images.shape), len(split.classes)), (extra.info.shape, len(extra.info.classes))
    if found != expected:
        raise UserError(
            f"extra images must have the shape {expected[0]} and the {expected[1]} classes of "
            f"{split.images.info.name}; got {found[0]} and {found[1]}"
        )
    steps = steps_between(split, batch_size, drop_last, first_step, limit)
    order = epoch_order(split, epoch=epoch, seed=seed, shuffle=shuffle)
    reader = _Reader(split, extra, order, fraction, batch_size, epoch, seed)
    # An ordinary function around the generator: arguments are checked when it is called, not at the first batch.
    return _mixed(reader, steps, smoothing, augment, torch.device(device))


class _Parts(NamedTuple):
    """What a batch is made of: positions and, if they had to be decoded, images of the real part; all of the rest."""

    step: int
    positions: Tensor
    decoded: Tensor | None
    rows: Tensor
    generated: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Reader:
    """Decides what a step consists of and reads it, except for images that are in memory already."""

    split: Split
    extra: ExtraImages
    order: Tensor
    fraction: float
    batch_size: int
    epoch: int
    seed: int

    def __call__(self, step: int) -> _Parts:
        images = self.split.images
        size = min(self.batch_size, len(self.order) - step * self.batch_size)
        count = _share(size, self.fraction)
        start = step * (self.batch_size - _share(self.batch_size, self.fraction))
        positions = self.order[start : start + size - count]
        draws = generator(self.seed, epoch=self.epoch, step=step, purpose="extra")
        rows = torch.randint(len(self.extra), (count,), generator=draws)
        decoded = None
        if not isinstance(images, ResidentImages):
            decoded = decoded_images(images, positions)
        return _Parts(step, positions, decoded, rows, self.extra.fetch(rows), self.extra.labels_of(rows))


def _mixed(
    reader: _Reader,
    steps: range,
    smoothing: float,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
    device: torch.device,
) -> Iterator[Batch]:
    images = reader.split.images
    held = images.on(device) if isinstance(images, ResidentImages) else None
    classes, offset = len(images.classes), len(images)
    for parts in one_ahead(reader, steps):
        real = parts.decoded if parts.decoded is not None or held is None else held.fetch(parts.positions)
        assert real is not None
        pixels = [real.to(device, non_blocking=True), parts.generated.to(device, non_blocking=True)]
        if real.dtype != torch.uint8:
            pixels = [as_float(part) for part in pixels]
        mixed = torch.cat(pixels)
        if augment is not None:
            draws = generator(reader.seed, epoch=reader.epoch, step=parts.step, purpose="augment")
            mixed = augment(mixed, draws)
        y = torch.cat([images.labels[parts.positions], parts.labels])
        labelled = y != UNLABELLED
        whole = bool(labelled.all())
        index = torch.cat([parts.positions, offset + parts.rows])
        source = (index >= offset).long()
        yield Batch(
            as_float(mixed),
            y.to(device),
            index.to(device),
            target=_targets(y, source, classes=classes, smoothing=smoothing).to(device) if smoothing else None,
            labelled=None if whole else labelled.to(device),
            source=source.to(device),
        )


def _targets(y: Tensor, source: Tensor, *, classes: int, smoothing: float) -> Tensor:
    """Soft labels (B, K), smoothed where `source` is 1, and zeros where there is no label."""
    share = smoothing * source[:, None].float()
    hard = F.one_hot(y.clamp_min(0), classes).float()
    return ((1 - share) * hard + share / classes) * (y != UNLABELLED)[:, None]


def _channels_last(info: DatasetInfo) -> tuple[int, int, int]:
    channels, height, width = info.shape
    return height, width, channels


_Form = tuple[tuple[int, ...], np.dtype[Any]]


def _check_form(name: str, info: DatasetInfo, *, images: _Form, labels: _Form) -> None:
    """Refuse shapes and types that cannot extend a data set, before anything is read or unpacked."""
    for what, (_, kind) in (("images", images), ("labels", labels)):
        if kind.hasobject:
            raise UserError(f"{name}: {what} must be plain numbers; got Python objects, which can run code when read")
    (shape, kind), (label_shape, label_kind) = images, labels
    if kind != np.uint8 or tuple(shape[1:]) not in (_channels_last(info), tuple(info.shape)):
        accepted = " or ".join(f"(N, {', '.join(map(str, each))})" for each in (_channels_last(info), info.shape))
        raise UserError(
            f"{name}: images must be uint8 in 0..255 of shape {accepted}, like those of {info.name}; got {kind} {shape}"
        )
    if shape[0] < 1:
        raise UserError(f"{name}: there are no images in it")
    if tuple(label_shape) != (shape[0],) or label_kind.kind not in "iu":
        raise UserError(
            f"{name}: labels must be {shape[0]:,} integers (N,), one for each image; got {label_kind} {label_shape}"
        )


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _first_of(names: Iterable[str], wanted: tuple[str, ...], path: Path, what: str) -> str:
    there = list(names)
    for name in wanted:
        if name in there:
            return name
    listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    raise UserError(f"{path}: expected {what} under the name {' or '.join(wanted)}; got {listed or 'no arrays'}")


def _map(path: Path, start: int) -> npt.NDArray[Any]:
    """The array that begins at byte `start` of a file, mapped and not read."""
    with path.open("rb") as file:
        file.seek(start)
        head = read_head(file)
    return np.memmap(path, head.kind, "r", offset=start + head.length, shape=head.shape)


def _from_npz(path: Path, info: DatasetInfo, store: _Store) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            names = (
                _first_of(members, IMAGE_NAMES, path, "images"),
                _first_of(members, LABEL_NAMES, path, "labels"),
            )
            heads = [_member_head(path, archive, members[name]) for name in names]
            forms: list[_Form] = [(head.shape, head.kind) for head in heads]
            _check_form(str(path), info, images=forms[0], labels=forms[1])
            images, labels = (_member(path, archive, members[name], store) for name in names)
    except UserError:
        raise
    except Exception as error:  # a damaged archive fails in every way there is; all of them mean the same to the user
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected a complete .npz file; got {detail}. Is the download complete?") from None
    return images, labels


def _member_head(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Head:
    with archive.open(member) as file:
        head = read_head(file)
    if head.kind.hasobject:  # its size says nothing, and what it is gets its own message
        return head
    if head.fortran and len(head.shape) > 1:
        raise UserError(
            f"{path}: {member.filename} must be in C order, one image after the other; got Fortran order. Save "
            "numpy.ascontiguousarray of it"
        )
    if head.size != member.file_size:
        raise UserError(
            f"{path}: {member.filename} should have {head.size:,} bytes for {head.kind} {head.shape}; got "
            f"{member.file_size:,}"
        )
    return head


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, store: _Store) -> npt.NDArray[Any]:
    """An array of an .npz: mapped in place if it is stored, otherwise unpacked once and mapped there."""
    if member.compress_type == zipfile.ZIP_STORED:
        start = _data_offset(path, member)
        if member.compress_size != member.file_size or start + member.file_size > path.stat().st_size:
            raise UserError(
                f"{path}: {member.filename} should have {member.file_size:,} bytes from byte {start:,} on; the file "
                "is cut off"
            )
        return _map(path, start)

    def unpack(file: IO[bytes]) -> None:
        with archive.open(member) as packed:
            shutil.copyfileobj(packed, file, 1 << 20)  # reads to the end, and so checks the sum as well

    part = member.filename.removesuffix(".npy")
    return _map(store.find(part) or store.make(part, size=member.file_size, write=unpack), 0)


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: after its own header, whose length the directory does not know."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    name, further = struct.unpack("<HH", header[26:30])
    return member.header_offset + len(header) + int(name) + int(further)


def _from_pickle(path: Path, info: DatasetInfo, store: _Store) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    files = [store.find(part) for part in ("image", "label")]
    if None in files:
        found = read_pickle(path)
        images, labels = _pickled(path, found)
        forms: list[_Form] = [(array.shape, array.dtype) for array in (images, labels)]
        _check_form(str(path), info, images=forms[0], labels=forms[1])
        files = []
        for part, array in (("image", images), ("label", labels)):

            def write(file: IO[bytes], array: npt.NDArray[Any] = array) -> None:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)

            files.append(store.make(part, size=array.nbytes, write=write))
    mapped = [_map(file, 0) for file in files if file is not None]
    return mapped[0], mapped[1]


def _pickled(path: Path, found: Mapping[str, Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    names = [str(name) for name in found]
    images = found[_first_of(names, IMAGE_NAMES, path, "images")]
    labels = found[_first_of(names, LABEL_NAMES, path, "labels")]
    if not isinstance(images, np.ndarray):
        raise UserError(f"{path}: images must be an array; got {type(images).__name__}")
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        with suppress(OverflowError):  # what is left of a list is refused below
            labels = np.array(labels, dtype=np.int64)
    if not isinstance(labels, np.ndarray):
        raise UserError(f"{path}: labels must be an array or a list of integers; got {type(labels).__name__}")
    return images, labels


@dataclass(frozen=True)
class _Store:
    """Arrays unpacked from one source file: ``NAME-PART.npy``, with a manifest that says what it was made from.

    An array is written under another name and then renamed, and its manifest comes last: without it, it counts for
    nothing. `instar.data.cache` does the same for what fits into memory.
    """

    source: Path
    folders: tuple[Path, ...]
    note: Callable[[str], None] | None

    def _place(self, folder: Path, part: str) -> Path:
        return folder / f"{self.source.name}-{Path(part).name}.npy"

    def _stamp(self) -> dict[str, int]:
        status = self.source.stat()
        return {"version": 1, "source_size": status.st_size, "source_time": status.st_mtime_ns}

    def find(self, part: str) -> Path | None:
        """The unpacked array, if it is complete and was made from the file as it is now."""
        for folder in self.folders:
            place = self._place(folder, part)
            with suppress(OSError, ValueError):
                expected = self._stamp() | {"size": place.stat().st_size}
                if parse_json(place.with_suffix(".json").read_text()) == expected:
                    return place
        return None

    def make(self, part: str, *, size: int, write: Callable[[IO[bytes]], None]) -> Path:
        """Have `write` write about `size` bytes into the first folder that takes them."""
        refusals = []
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(folder).free
            except OSError as error:
                refusals.append(f"{folder}: {error.strerror or error}")
                continue
            if not os.access(folder, os.W_OK):
                refusals.append(f"{folder}: read-only")
            elif free < size:
                refusals.append(f"{folder}: {_gigabytes(free)} free")
            else:
                place = self._place(folder, part)
                if self.note is not None:
                    self.note(f"{self.source}: unpacking {part} once into {place} ({_gigabytes(size)})")
                self._fill(place, write)
                return place
        raise UserError(
            f"{self.source}: {part} must be unpacked, and no folder takes its {_gigabytes(size)} "
            f"({'; '.join(refusals)}). Name another folder as cache, or save the arrays with numpy.savez"
        )

    def _fill(self, place: Path, write: Callable[[IO[bytes]], None]) -> None:
        manifest, stamp = place.with_suffix(".json"), self._stamp()
        descriptor, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.chmod(name, 0o644)
            manifest.unlink(missing_ok=True)
            os.replace(name, place)
        except (OSError, zlib.error, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{self.source}: cannot be unpacked into {place}: {error}. Is the file damaged or the disk full?"
            ) from None
        finally:
            with suppress(OSError):  # gone already if it was renamed
                os.unlink(name)
        write_atomically(manifest, json.dumps(stamp | {"size": size}).encode())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
