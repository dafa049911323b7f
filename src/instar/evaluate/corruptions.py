"""Common corruptions: the fifteen of CIFAR-10-C in five severities, computed for images of any size or read from files.

They are attacks that look at no model: an evaluation runs them on every image, right or wrong, and a column of its
record is the plain accuracy on corrupted images, which does not count in the worst case.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instar.attacks import Attack
from instar.attacks.attack import counts
from instar.data.sources import default_root
from instar.errors import UserError, unknown
from instar.evaluate.distortions import DISTORTIONS
from instar.evidence import Adversary, Batch
from instar.expression import value
from instar.randomness import key

SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 64
"""Images corrupted at a time, so that intermediate arrays stay small; no result depends on it."""


def _check(name: str, severity: int) -> None:
    if name not in DISTORTIONS:
        raise unknown("corruption", name, DISTORTIONS)
    if severity not in SEVERITIES:
        raise UserError(f"severity must be a whole number from 1 to 5; got {severity!r}")


@value
class Corruption(Attack):
    """One of the fifteen common corruptions, in whole pixel levels as in the published files.

    Random numbers are keyed by seed, corruption, severity and the official position of the image (the image itself
    where the batch has no positions): neither its neighbours in the batch nor shards nor devices change the result, and
    two models see the same images.

    Attributes:
        name: For example ``"gaussian_noise"`` or ``"fog"``; `DISTORTIONS` holds all.
        severity: From 1 to 5.
        seed: Of the random numbers.

    Raises:
        UserError: An unknown name or severity.

    Example:
        >>> Corruption("gaussian_noise", 3)
        Corruption('gaussian_noise', 3)
        >>> batch = Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), index=torch.tensor([7, 8]))
        >>> found = Corruption("fog", 5)(nn.Identity(), batch).x
        >>> found.shape, bool((found * 255).round().div(255).eq(found).all())
        (torch.Size([2, 3, 32, 32]), True)

    Source: Hendrycks & Dietterich 2019.
    Deviations: those of `instar.evaluate.distortions`; frost is a stand-in.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check name and severity."""
        _check(self.name, self.severity)

    def budget(self, classes: int) -> dict[str, Any]:
        """The forward pass of its verdict."""
        return {"forwards": 1}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """The corrupted images; `model` and `generator` are not looked at."""
        x = batch.x.detach().to("cpu", torch.float32).contiguous()
        positions = _identities(x) if batch.index is None else batch.index.tolist()
        parts = [
            self._corrupt(x[start : start + CHUNK], positions[start : start + CHUNK])
            for start in range(0, len(x), CHUNK)
        ]
        return _untouched(torch.cat(parts).to(batch.x) if parts else batch.x, batch)

    def _corrupt(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        draws = [np.random.Generator(np.random.Philox(key=self._key(position))) for position in positions]
        found = DISTORTIONS[self.name](x.numpy(), self.severity, draws)
        # Cut to the level below, as the published files are; a rounding error below a level is not one level less.
        levels = np.floor(255 * np.clip(found, 0, 1) + 1e-3)
        return torch.from_numpy(levels.astype(np.float32) / np.float32(255))

    def _key(self, position: int) -> int:
        return key(self.seed, step=position, purpose=f"corruption {self.name} {self.severity}")


def _identities(x: Tensor) -> list[int]:
    """A number for each image that depends on its values only."""
    return [int.from_bytes(hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest(), "big") >> 1 for image in x]


def _untouched(x: Tensor, batch: Batch) -> Adversary:
    """Images that no gradient step made."""
    none = counts(batch.y)
    return Adversary(x=x, kappa=none, inspected=none.clone(), moves=none.clone(), budget=0)


@value
class PublishedCorruption(Attack):
    """The same corruption of the same test images, as published: a row of ``CIFAR-10-C/gaussian_noise.npy``.

    A file holds uint8 images (5 · N, H, W, C): all N test images in official order at severity 1, then at 2, and so on;
    ``labels.npy`` their labels. Images are looked up by official position, so an evaluation of some test images reads
    the rows that belong to them.

    Attributes:
        name: For example ``"gaussian_noise"``: the file's name.
        severity: From 1 to 5.
        data: Folder of the files within the folder that data sets lie in.
        root: Folder that data sets lie in; None is the default one (``INSTAR_DATA``).

    Raises:
        UserError: An unknown name or severity; when it is run, files that are missing, damaged, or of other images.

    Example:
        >>> PublishedCorruption("fog", 5)
        PublishedCorruption('fog', 5)

    Source: Hendrycks & Dietterich 2019, CIFAR-10-C and CIFAR-100-C.
    """

    name: str
    severity: int
    data: str = "CIFAR-10-C"
    root: str | None = None

    def __post_init__(self) -> None:
        """Check name and severity."""
        _check(self.name, self.severity)

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return (default_root() if self.root is None else Path(self.root).expanduser()) / self.data

    def budget(self, classes: int) -> dict[str, Any]:
        """The forward pass of its verdict."""
        return {"forwards": 1}

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """The stored images; `model` and `generator` are not looked at."""
        if batch.index is None:
            raise UserError(f"{self.data} is looked up by official positions; the batch has none")
        images, labels = _opened(self.folder / f"{self.name}.npy"), _opened(self.folder / "labels.npy")
        many = len(images) // len(SEVERITIES)
        shape = (len(images), *batch.x.shape[2:], batch.x.shape[1])
        if images.dtype != np.uint8 or images.shape != shape or len(images) % len(SEVERITIES):
            raise UserError(
                f"{self.folder / self.name}.npy must hold uint8 images {('5·N', *shape[1:])}; got {images.dtype} "
                f"{images.shape}"
            )
        positions = batch.index.cpu().numpy()
        if len(labels) != len(images) or positions.max(initial=0) >= many:
            raise UserError(
                f"{self.folder} has {many} images of each severity and {len(labels)} labels; image "
                f"{positions.max(initial=0)} is asked for. Is it of another data set?"
            )
        rows = (self.severity - 1) * many + positions
        if not np.array_equal(labels[rows].astype(np.int64), batch.y.cpu().numpy()):
            raise UserError(f"labels in {self.folder} are not those of these images. Is it of another data set?")
        found = torch.from_numpy(np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2)))
        return _untouched(found.to(batch.x).div_(255), batch)


@functools.lru_cache(maxsize=2 * len(DISTORTIONS))
def _mapped(path: Path, changed: int) -> np.ndarray:
    """A file of an array, mapped and not read; `changed` is when it was, so that a new file is opened anew."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _opened(path: Path) -> np.ndarray:
    try:
        return _mapped(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}; unpack the published archive there, or run the suite corruptions, which computes them"
        ) from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}. Is the download complete?") from None
