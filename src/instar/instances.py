"""What is known about every training instance: one row each, kept on the device, written to disk once an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from instar.arrays import pack, read_arrays
from instar.errors import UserError
from instar.parallel import Part
from instar.storage import write_atomically

NEVER = -1
"""Value of ``seen`` for an instance that was not trained on yet."""

COLUMNS: dict[str, torch.dtype] = {
    "seen": torch.int32,
    "kappa": torch.int16,
    "loss": torch.float32,
    "correct": torch.uint8,
}
"""Columns of every table: the epoch an instance was last trained in, its κ, its loss, and whether the adversarial image
was classified correctly in the training forward."""


class InstanceTable:
    """Rows of all training instances, by their position in the official training set.

    Positions from N on, which extra data have, share one further row that nobody reads: nothing is known of an extra
    instance, and its rows always read as never seen.

    Args:
        size: Number of rows N.
        remembered: Names of further float32 columns, which a method remembers.
        device: Where the rows are kept.

    Attributes:
        columns: The arrays (N,) by name.
        shared: Tensors that belong to no instance, by name (see `Batch.shared`).

    Raises:
        UserError: A remembered name is taken by a column of every table.

    Example:
        >>> table = InstanceTable(4)
        >>> table.write(torch.tensor([2]), {"kappa": torch.tensor([7])})
        >>> table.rows(torch.tensor([2, 3]))["kappa"]
        tensor([7, 0], dtype=torch.int16)
    """

    def __init__(self, size: int, *, remembered: tuple[str, ...] = (), device: str | torch.device = "cpu") -> None:
        if taken := set(remembered) & set(COLUMNS):
            raise UserError(f"a method cannot remember {', '.join(sorted(taken))}: every instance table has it already")
        kinds = COLUMNS | dict.fromkeys(remembered, torch.float32)
        self._rows: dict[str, Tensor] = {
            name: torch.zeros(size + 1, dtype=kind, device=device) for name, kind in kinds.items()
        }
        self._rows["seen"].fill_(NEVER)
        self.columns: dict[str, Tensor] = {name: rows[:size] for name, rows in self._rows.items()}
        self.shared: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Number of rows N."""
        return len(self.columns["seen"])

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """The rows (B,) of every column at positions `index` (B,)."""
        known, place = index < len(self), index.clamp_max(len(self))
        first = {"seen": NEVER}
        return {
            name: torch.where(known, column[place], first.get(name, 0)).to(column.dtype)
            for name, column in self._rows.items()
        }

    def write(self, index: Tensor, values: Mapping[str, Tensor]) -> None:
        """Write `values` (name → (B,)) into the rows `index` (B,), without waiting for the device.

        Raises:
            UserError: No such column.
        """
        for name, new in values.items():
            if name not in self.columns:
                raise UserError(f"the instance table has no column {name!r}; it has {', '.join(self.columns)}")
            self._rows[name][index.clamp_max(len(self))] = new.detach().to(self.columns[name].dtype)

    def mean(self, name: str, *, epoch: int) -> float:
        """Mean of a column over the instances trained on in `epoch`; NaN if there are none."""
        chosen = self.columns["seen"] == epoch
        return float(self.columns[name][chosen].double().mean()) if bool(chosen.any()) else float("nan")

    def save(self, path: Path) -> None:
        """Write all columns as a compressed ``.npz`` of plain arrays (N,), whole or not at all.

        Raises:
            UserError: The disk is full or read-only.
        """
        write_atomically(path, pack({name: column.cpu().numpy() for name, column in self.columns.items()}))


def everybody(part: Part, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of the whole batch by name, (B,), from every process's (b,), in one message.

    They travel as float64, which holds every position and every value of a column.

    Args:
        part: This process's share of the batch.
        rows: Values (b,) by name, ``"index"`` among them; the same names in every process.
    """
    if part.whole:
        return dict(rows)
    packed = torch.stack([row.detach().double() for row in rows.values()], 1)
    found = dict(zip(rows, part.gather(packed).unbind(1), strict=True))
    return found | {"index": found["index"].long()}


def read_instances(path: Path) -> dict[str, np.ndarray]:
    """The arrays (N,) that `InstanceTable.save` wrote, without the right to run code.

    Raises:
        UserError: The file is missing or damaged.
    """
    return read_arrays(path, what="instance table")
