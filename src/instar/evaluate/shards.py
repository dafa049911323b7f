"""Points in portions, and what is known about each portion, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instar.arrays import Arrays, pack, read_arrays
from instar.data.indexed import as_float, check_values
from instar.data.splits import Split
from instar.errors import UserError
from instar.storage import write_atomically

Keep = Callable[[int, int, np.ndarray, Tensor], None]
"""Takes examples that broke points: stage, position within the stage, rows of the shard (m,), images (m, C, H, W)."""


MEASURED = "measured."
"""What the names of further columns begin with, in files and between processes."""


def keep_nothing(stage: int, position: int, rows: np.ndarray, images: Tensor) -> None:
    """For evaluations that keep no examples."""


@dataclass(frozen=True)
class Shard:
    """Consecutive points of a split, which are attacked together.

    Attributes:
        number: Which shard of the split, from 0.
        start: Position of its first point within the split.
        x: Images (n, C, H, W), float32 in [0, 1], contiguous.
        y: Labels (n,).
        index: Official positions (n,), on the CPU.
        correct: Whether the clean prediction is right (n,), boolean.
        digest: SHA-256 of images, labels and positions.
        probe: Clean logits (m, K) of its first points, by which a stored result is recognised, on the CPU.
    """

    number: int
    start: int
    x: Tensor
    y: Tensor
    index: Tensor
    correct: Tensor
    digest: str
    probe: np.ndarray

    def __len__(self) -> int:
        """Number of points."""
        return len(self.y)


@dataclass(frozen=True)
class Outcome:
    """What an attack did to a shard.

    Attributes:
        robust: Which points withstood it (n,), boolean, on the CPU; False for points whose clean prediction is wrong.
        broken_by: For attacks of several stages the stage that broke each point, as its number, −1 for none (n,).
        stages: Names of the stages, or empty.
        flags: Warnings of the reference code, as short names.
        seconds: Time spent, over all the attempts it took.
        reused: Whether nothing had to be computed.
        margin: Smallest z_y − max_{j≠y} z_j of the images that the attack returned (n,), in logits: below 0 where it
            broke the point (0 if it left the misclassified image again), NaN where it was not attacked. None if nobody
            measured it.
        measured: Further columns (n,) of a `Mechanism`, by name.
    """

    robust: np.ndarray
    broken_by: np.ndarray
    stages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    seconds: float = 0.0
    reused: bool = False
    margin: np.ndarray | None = None
    measured: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_arrays(self) -> Arrays:
        """The outcome as plain arrays, for another process."""
        return {
            "robust": self.robust,
            "broken_by": self.broken_by,
            "stages": np.array(self.stages, dtype="U32"),
            "flags": np.array(self.flags, dtype="U32"),
            "seconds": np.array(self.seconds),
            "reused": np.array(self.reused),
            **({} if self.margin is None else {"margin": self.margin}),
            **{f"{MEASURED}{name}": column for name, column in self.measured.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Outcome:
        """The outcome that `to_arrays` wrote."""
        return cls(
            robust=arrays["robust"],
            broken_by=arrays["broken_by"],
            stages=tuple(arrays["stages"].tolist()),
            flags=tuple(arrays["flags"].tolist()),
            seconds=float(arrays["seconds"]),
            reused=bool(arrays["reused"]),
            margin=arrays.get("margin"),
            measured=measured_in(arrays),
        )

    @classmethod
    def joined(cls, parts: Sequence[Outcome]) -> Outcome:
        """The outcome of all shards of an attack, in order."""
        margins = [part.margin for part in parts if part.margin is not None]
        return cls(
            robust=np.concatenate([part.robust for part in parts]),
            broken_by=np.concatenate([part.broken_by for part in parts]),
            stages=parts[0].stages,
            flags=tuple(sorted({flag for part in parts for flag in part.flags})),
            seconds=sum(part.seconds for part in parts),
            reused=all(part.reused for part in parts),
            margin=np.concatenate(margins) if len(margins) == len(parts) else None,
            measured={name: np.concatenate([part.measured[name] for part in parts]) for name in parts[0].measured},
        )


def measured_in(arrays: Arrays) -> Arrays:
    """The columns that a `Mechanism` measured, among the arrays of a result.

    Example:
        >>> measured_in({"robust": np.ones(1), "measured.kappa": np.array([3])})
        {'kappa': array([3])}
    """
    return {name.removeprefix(MEASURED): array for name, array in arrays.items() if name.startswith(MEASURED)}


def fetch(split: Split, *, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, str]:
    """Points of a split as attacks see them.

    Args:
        split: Where they come from.
        start: First position within the split.
        stop: One past the last.
        device: Where they are wanted.

    Returns:
        Images (n, C, H, W) float32 in [0, 1], labels (n,), official positions (n,) on the CPU, and their SHA-256.

    Raises:
        UserError: Images outside of [0, 1].
    """
    index = split.indices[start:stop]
    raw = split.images.fetch(index)
    check_values(raw, what=split.images.info.name)
    x = as_float(raw).cpu().contiguous()
    y = split.images.labels[index].cpu()
    digest = hashlib.sha256(repr(tuple(x.shape)).encode())
    for part in (x, y, index):
        digest.update(part.contiguous().numpy().tobytes())
    return x.to(device), y.to(device), index, digest.hexdigest()


class Store:
    """Files of results, each under the name of everything it depends on; without a folder it remembers nothing.

    A file that is damaged, or that belongs to another model in spite of its name, counts as absent.

    Args:
        folder: Where the files lie, made when the first is written; None keeps nothing.

    Example:
        >>> import tempfile
        >>> store = Store(Path(tempfile.mkdtemp()))
        >>> key = store.key("pgd", 0, {"eps": "8/255"})
        >>> store.put(key, {"robust": np.array([1, 0])})
        >>> store.get(key)["robust"].tolist(), Store(None).get(key)
        ([1, 0], None)
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @staticmethod
    def key(name: str, shard: int, depends_on: Mapping[str, Any]) -> str:
        """File name for what depends on these values, which JSON must be able to hold."""
        text = json.dumps(depends_on, sort_keys=True)
        return f"{name}-{shard:04d}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"

    def get(self, key: str) -> Arrays | None:
        """The arrays stored under `key`, or None."""
        if self.folder is None:
            return None
        try:
            return read_arrays(self.folder / key, what="finished part")
        except Exception:  # absent or damaged in whatever way: either means to compute it again
            return None

    def put(self, key: str, arrays: Arrays) -> None:
        """Write arrays, whole or not at all.

        Raises:
            UserError: The disk is full or read-only.
        """
        if self.folder is None:
            return
        make_folder(self.folder)
        write_atomically(self.folder / key, pack(arrays))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from None
