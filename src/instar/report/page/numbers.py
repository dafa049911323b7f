"""The numbers behind a figure: a table of columns, as CSV beside it and as files."""

from __future__ import annotations

import csv
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from instar.errors import UserError
from instar.storage import write_atomically

MOST_ROWS = 2_000
"""Tables of more rows are not repeated inside of a page: they are among the files that `--figures` writes."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """A table.

    Attributes:
        name: Names its files; letters, digits, ``-`` and ``_``.
        columns: Values of equal length by heading.

    Raises:
        UserError: The columns differ in length.
    """

    name: str
    columns: Mapping[str, Sequence[Any] | np.ndarray]

    def __post_init__(self) -> None:
        """Check the lengths."""
        lengths = {len(values) for values in self.columns.values()}
        if len(lengths) > 1:
            raise UserError(f"the columns of the table {self.name} differ in length: is it damaged?")

    def __len__(self) -> int:
        """Number of rows."""
        return next((len(values) for values in self.columns.values()), 0)

    @property
    def csv(self) -> str:
        """The table as CSV (RFC 4180) with a line of headings; what is not defined is an empty cell.

        Example:
            >>> Numbers("ab", {"a": [1, 2], "b": ["x, y", "z"]}).csv.splitlines()
            ['a,b', '1,"x, y"', '2,z']
            >>> Numbers("c", {"class": ["ant", "bee"], "accuracy": np.array([0.5, np.nan])}).csv.splitlines()
            ['class,accuracy', 'ant,0.5', 'bee,']
        """
        stream = io.StringIO()
        written = csv.writer(stream)
        written.writerow(self.columns)
        written.writerows(zip(*(_plain(values) for values in self.columns.values()), strict=True))
        return stream.getvalue()

    @property
    def link(self) -> str:
        """The CSV as an address within a page; empty for tables of many rows, which would fill it."""
        return "data:text/csv;charset=utf-8," + quote(self.csv, safe="/,;:()+=@*") if len(self) <= MOST_ROWS else ""

    def write(self, folder: Path, *, parquet: bool) -> list[Path]:
        """Write ``<name>.csv``, and ``<name>.parquet`` if asked.

        Raises:
            UserError: The disk is full or read-only.
        """
        path = folder / f"{self.name}.csv"
        write_atomically(path, self.csv.encode())
        if not parquet:
            return [path]
        arrow, writer = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        stream = io.BytesIO()
        writer.write_table(arrow.table({key: _plain(values) for key, values in self.columns.items()}), stream)
        write_atomically(path.with_suffix(".parquet"), stream.getvalue())
        return [path, path.with_suffix(".parquet")]


def has_parquet() -> bool:
    """Whether Parquet can be written here: pyarrow is optional."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError:
        return False
    return True


def _plain(values: Sequence[Any] | np.ndarray) -> list[Any]:
    """The values as Python's own; None, an empty cell, where a number is not defined."""
    listed = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return [None if isinstance(value, float) and math.isnan(value) else value for value in listed]
