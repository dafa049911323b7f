"""Checksums of the official files, and of the arrays that they decode to.

The MD5 sums are those that torchvision publishes for the official archives' files (and, for plain MNIST files, those of
its decompressed ``.gz`` files). The SHA-256 sums of arrays are our own: whichever official form a data set was read
from, images (N, C, H, W) and labels as bytes must be these.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import MappingProxyType

import numpy as np

from instar.data.formats import Images, Labels

FILES_MD5 = MappingProxyType(
    {
        "cifar10": MappingProxyType(
            {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            }
        ),
        "cifar100": MappingProxyType(
            {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
        ),
        "mnist": MappingProxyType(
            {
                "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
                "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
                "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
                "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
                "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
                "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
                "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
            }
        ),
        "svhn": MappingProxyType(
            {
                "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
                "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
            }
        ),
    }
)

# (data set, split) → SHA-256 of the images and of the labels, see `array_sums`.
ARRAYS_SHA256 = MappingProxyType(
    {
        ("digits", "train"): (
            "9447aa2636e4857674b64703db736d9da6351f138b935ba5c06c4b2b78b02e79",
            "0a359f6704714b6f530f36e634952c943b71ee0d4f8c2de9bb4321697ecae140",
        ),
        ("digits", "test"): (
            "4d04e3a8364d6511c2e09e886d63516b858155dbe0923687cf7fcd346005a20e",
            "cd2f088f8b188048d689e95991adb5fdd1dfeb3adfc3e811963591da391b980e",
        ),
        ("mnist", "train"): (
            "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
            "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        ),
        ("mnist", "test"): (
            "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
            "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
        ),
        ("cifar10", "train"): (
            "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        ),
        ("cifar10", "test"): (
            "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        ),
    }
)


def array_sums(images: Images, labels: Labels) -> tuple[str, str]:
    """SHA-256 of images and of labels.

    Args:
        images: uint8 (N, C, H, W).
        labels: Labels (N,) in 0..255.

    Returns:
        The sums of the images' bytes in C order, and of the labels as one byte each.

    Example:
        >>> images, labels = np.zeros((1, 1, 2, 2), np.uint8), np.array([3])
        >>> [len(each) for each in array_sums(images, labels)]
        [64, 64]
    """
    narrow = np.ascontiguousarray(labels, dtype=np.uint8)
    return hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(), hashlib.sha256(narrow.data).hexdigest()


def file_sum(path: Path, algorithm: str = "md5") -> str:
    """Checksum of a file, read in pieces.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "empty")
        >>> _ = path.write_bytes(b"")
        >>> file_sum(path)
        'd41d8cd98f00b204e9800998ecf8427e'
        >>> folder.cleanup()
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
