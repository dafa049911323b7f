"""Adversarial examples on disk: one for every point that was broken, in float32, to be looked at and scored again.

While an evaluation runs they lie beside its shards, batch by batch; at its end they are gathered in one safetensors
file, ``<suite>-<checkpoint>-examples.safetensors``: ``x`` (m, C, H, W) float32, ``index`` (official positions) and
``label`` (m,), and ``attack`` (m,), which counts into the names that the file's metadata hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from instar.errors import UserError
from instar.evaluate.shards import Keep, Store, make_folder
from instar.storage import write_atomically

FORMAT = "instar adversarial examples 1"


@dataclass(frozen=True)
class Examples:
    """Adversarial examples of one evaluation.

    Attributes:
        x: Images (m, C, H, W), float32 in [0, 1]. Rounded to 8 bits many would no longer be adversarial.
        index: Official positions of the images they were made from (m,).
        label: Labels (m,).
        attack: Column that broke each first, for example ``"autoattack"`` (m names).
    """

    x: Tensor
    index: Tensor
    label: Tensor
    attack: tuple[str, ...]

    def __len__(self) -> int:
        """Number of examples m."""
        return len(self.label)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            UserError: The disk is full or read-only.
        """
        names = tuple(dict.fromkeys(self.attack))
        numbers = torch.tensor([names.index(name) for name in self.attack], dtype=torch.int64)
        # One entry of metadata: the order of several differs from call to call, and equal examples give equal files.
        tensors = {"x": self.x.contiguous(), "index": self.index, "label": self.label, "attack": numbers}
        make_folder(Path(path).parent)
        write_atomically(path, save(tensors, {"about": json.dumps({"format": FORMAT, "attacks": names})}))

    @torch.no_grad()
    def broken(self, model: nn.Module, *, batch_size: int = 250) -> Tensor:
        """Which examples a model gets wrong (m,), boolean: for the model they were made for, all of them.

        Args:
            model: Images in [0, 1] → logits, in eval mode.
            batch_size: Images in one forward pass.
        """
        parts = zip(self.x.split(batch_size), self.label.split(batch_size), strict=True)
        wrong = [model(x).argmax(1) != y for x, y in parts] if len(self) else []
        return torch.cat([*wrong, torch.zeros(0, dtype=torch.bool)])


def read_examples(path: str | os.PathLike[str]) -> Examples:
    """Read the examples that an evaluation wrote.

    Args:
        path: The safetensors file.

    Returns:
        The examples.

    Raises:
        UserError: The file is missing, damaged, or holds something else.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("about", "{}"))
            if told.get("format") != FORMAT:
                raise UserError(f"{path} holds no adversarial examples of this format")
            found = {name: file.get_tensor(name) for name in ("x", "index", "label", "attack")}
        names = told["attacks"]
        attacks = tuple(names[number] for number in found["attack"].tolist())
        return Examples(found["x"], found["index"], found["label"], attacks)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"cannot read the adversarial examples {path}: {error}") from None


def keeper(store: Store, key: str) -> Keep:
    """Writes the examples of a shard beside it, batch by batch.

    Args:
        store: Where shards lie.
        key: The shard's name there.

    Returns:
        What `instar.evaluate.examine.examine` calls.
    """

    def keep(stage: int, position: int, rows: np.ndarray, images: Tensor) -> None:
        store.put(_part(key, stage, position), {"rows": rows, "x": images.float().cpu().contiguous().numpy()})

    return keep


def kept(store: Store, key: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The examples of a shard: rows (m,) and images (m, C, H, W), batch by batch."""
    if store.folder is None:
        return
    for path in sorted(store.folder.glob(_part(key, "*", "*"))):
        found = store.get(path.name)
        if found is not None:
            yield found["rows"], found["x"]


def _part(key: str, stage: int | str, position: int | str) -> str:
    return f"{key.removesuffix('.npz')}-examples-{stage}-{position}.npz"


def gathered(
    broken_by: np.ndarray,
    index: np.ndarray,
    label: np.ndarray,
    names: Sequence[str],
    parts: Callable[[str], Iterator[tuple[np.ndarray, np.ndarray]]],
) -> Examples:
    """One example for every broken point: that of the attack that broke it first.

    Args:
        broken_by: Name of that attack (n,).
        index: Official positions (n,).
        label: Labels (n,).
        names: The attacks.
        parts: For the name of an attack its examples: positions within the n points, and images.

    Returns:
        The examples, in order of the points.
    """
    found: dict[int, np.ndarray] = {}
    for name in names:
        for rows, images in parts(name):
            found.update({int(row): x for row, x in zip(rows, images, strict=True) if broken_by[row] == name})
    rows = np.array(sorted(found), dtype=np.int64)
    x = np.stack([found[row] for row in rows]) if len(rows) else np.zeros((0, 1, 1, 1), np.float32)
    return Examples(
        x=torch.from_numpy(x),
        index=torch.from_numpy(index[rows].astype(np.int64)),
        label=torch.from_numpy(label[rows].astype(np.int64)),
        attack=tuple(str(broken_by[row]) for row in rows),
    )
