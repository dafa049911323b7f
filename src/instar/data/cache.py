"""Decoded images kept as plain ``.npy`` files beside their source, so that a slow format is decoded only once.

A cache is used only if it was made from the very files that lie there now (names, sizes, modification times) and is
complete; otherwise it is made again. It is written under another name and then renamed, so that nobody ever reads half
of one, and a folder that cannot be written to simply has no cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from instar.data.formats import Images, Labels
from instar.errors import UserError
from instar.storage import write_atomically

FOLDER = "instar-cache"
_VERSION = 1


def cached(
    folder: Path, key: str, *, sources: Sequence[Path], decode: Callable[[], tuple[Images, Labels]]
) -> tuple[Images, Labels]:
    """What `decode` returns, from the cache if that is valid.

    Args:
        folder: Folder of the source files; the cache goes into its sub-folder ``instar-cache``.
        key: Name of the cache, for example ``"cifar10-train"``.
        sources: Files (or folders) that the result depends on.
        decode: Reads the source files: images uint8 (N, C, H, W) and labels int64 (N,).

    Returns:
        Images and labels; images from the cache are memory-mapped, copy on write.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> source = Path(folder.name, "source")
        >>> _ = source.write_bytes(b"slow to decode")
        >>> decode = lambda: (np.ones((2, 1, 4, 4), np.uint8), np.array([0, 1]))
        >>> images, _ = cached(Path(folder.name), "mine", sources=[source], decode=decode)
        >>> images, labels = cached(Path(folder.name), "mine", sources=[source], decode=lambda: 1 / 0)
        >>> images.shape, labels.tolist()
        ((2, 1, 4, 4), [0, 1])
        >>> del images; folder.cleanup()
    """
    store = folder / FOLDER
    fingerprint = _fingerprint(folder, sources)
    found = _read(store, key, fingerprint)
    if found is not None:
        return found
    images, labels = decode()
    with suppress(OSError, UserError):  # a read-only or full disk: it only costs the time to decode again
        _write(store, key, fingerprint, images, labels)
    return images, labels


def _fingerprint(folder: Path, sources: Sequence[Path]) -> list[list[Any]]:
    result: list[list[Any]] = []
    for source in sources:
        try:
            status = source.stat()
        except OSError:  # `decode` will name the missing file
            continue
        size = 0 if source.is_dir() else status.st_size
        result.append([str(source.relative_to(folder)), size, status.st_mtime_ns])
    return result


def _read(store: Path, key: str, fingerprint: list[list[Any]]) -> tuple[Images, Labels] | None:
    try:
        manifest = json.loads((store / f"{key}.json").read_text())
        if manifest["version"] != _VERSION or manifest["sources"] != fingerprint:
            return None
        images = np.load(store / f"{key}-images.npy", mmap_mode="c", allow_pickle=False)
        labels = np.load(store / f"{key}-labels.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None
    fits = images.dtype == np.uint8 and labels.dtype == np.int64 and list(images.shape) == manifest.get("shape")
    return (images, labels) if fits and labels.shape == images.shape[:1] else None


def _write(store: Path, key: str, fingerprint: list[list[Any]], images: Images, labels: Labels) -> None:
    store.mkdir(exist_ok=True)
    manifest = {"version": _VERSION, "sources": fingerprint, "shape": list(images.shape)}
    (store / f"{key}.json").unlink(missing_ok=True)
    for name, array in (("images", images), ("labels", labels)):
        write_atomically(store / f"{key}-{name}.npy", partial(np.save, arr=array, allow_pickle=False))
    # the manifest comes last: without it the arrays count for nothing
    write_atomically(store / f"{key}.json", json.dumps(manifest).encode())
