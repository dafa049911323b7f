"""What an analysis is, what it finds, and how that is stored and drawn again.

An analysis is a module of this package. It has a function ``measure(target, **settings) -> Found`` that looks at one
model or at one run, a function ``draw(found) -> dict[str, Figure]`` that needs nothing but what was found, and
registers both once, at its end::

    ANALYSIS = register(Analysis("pairs", "Hard class pairs", measure, draw, needs="model", cost="..."))

A third function, ``compare(founds) -> Found``, may put several checkpoints or runs side by side, from their stored
results alone.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from instar.arrays import pack, read_arrays
from instar.errors import UserError, unknown
from instar.evaluate.shards import make_folder
from instar.storage import read_json, write_atomically

FORMAT = 1
FOLDER = "analyses"
"""Name of the folder of results within a run folder."""
COMPARED = "compared"
"""What stands in the place of a checkpoint for results that compare several."""

Table = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Found:
    """What an analysis found: numbers with their protocol, from which its pictures can be drawn again.

    Attributes:
        name: Name of the analysis.
        title: What it is about, in a few words.
        summary: What was found, in one or two sentences of plain words with the numbers.
        figures: Single numbers by name; NaN where one is not defined.
        tables: By name, tables as columns: name → array (n,), equally long within a table. No objects.
        protocol: What the numbers depend on, in values that JSON can hold. ``label`` (model and checkpoint in words)
            and ``checkpoint`` (``"best"``, ``"last"``, ``"run"``, ``"compared"`` or the stem of a weights file) are
            always there.
        path: Where the JSON lies, or None if it was not written.

    Raises:
        UserError: Columns of a table differ in length, or hold objects.

    Example:
        >>> found = Found("demo", "A demonstration", "Half of 2.", {"half": 1.0}, {"rows": {"x": np.arange(2)}},
        ...               {"label": "none", "checkpoint": "best"})
        >>> import tempfile
        >>> again = read(found.write(tempfile.mkdtemp()).path)
        >>> again.path.name, again.figures, again.tables["rows"]["x"].tolist()
        ('best-demo.json', {'half': 1.0}, [0, 1])
    """

    name: str
    title: str
    summary: str
    figures: Mapping[str, float]
    tables: Mapping[str, Table]
    protocol: Mapping[str, Any]
    path: Path | None = None

    def __post_init__(self) -> None:
        """Check the tables."""
        for name, table in self.tables.items():
            if len({column.shape for column in table.values()}) > 1 or any(c.ndim != 1 for c in table.values()):
                shapes = ", ".join(f"{column} {array.shape}" for column, array in table.items())
                raise UserError(f"columns of the table {name} of {self.name} must be equally long; got {shapes}")
            if any(column.dtype.hasobject for column in table.values()):
                raise UserError(f"the table {name} of {self.name} must hold numbers or text, not objects")

    @property
    def label(self) -> str:
        """Model and checkpoint in words, for example ``"GAIRAT, best"``."""
        return str(self.protocol.get("label", self.checkpoint))

    @property
    def checkpoint(self) -> str:
        """``"best"``, ``"last"``, ``"run"``, ``"compared"``, or the stem of a weights file."""
        return str(self.protocol.get("checkpoint", "run"))

    @property
    def compares(self) -> bool:
        """Whether it puts several results side by side."""
        return self.checkpoint == COMPARED

    @property
    def stem(self) -> str:
        """Name of its files without ending: ``<checkpoint>-<name>``, and the split where it is not the usual one."""
        split = self.protocol.get("split")
        usual = ANALYSES[self.name].splits[:1] if self.name in ANALYSES else ()
        other = f"-{split}" if split is not None and usual and split != usual[0] else ""
        return f"{self.checkpoint}-{self.name}{other}"

    def write(self, folder: str | os.PathLike[str]) -> Found:
        """Write ``<stem>.json`` and the ``.npz`` of its tables beside it, each whole or not at all.

        A result of another protocol under that name (more images, another attack) is kept in the folder ``earlier``.

        Args:
            folder: Where; it is made if need be.

        Returns:
            This result with its path.

        Raises:
            UserError: The disk is full or read-only.
        """
        target = Path(folder) / f"{self.stem}.json"
        make_folder(target.parent)
        _keep_other(target, self.protocol)
        columns = {f"{name}/{column}": array for name, table in self.tables.items() for column, array in table.items()}
        write_atomically(target.with_suffix(".npz"), pack(columns))
        content = {
            "format": FORMAT,
            "name": self.name,
            "title": self.title,
            "summary": self.summary,
            "figures": {
                name: float(number) if math.isfinite(number) else None for name, number in self.figures.items()
            },
            "protocol": dict(self.protocol),
        }
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(target, f"{text}\n".encode())
        return replace(self, path=target)

    def draw(self) -> dict[str, Figure]:
        """Its pictures by name, drawn from what is stored.

        Raises:
            UserError: No analysis of that name is known here.
        """
        analysis = ANALYSES.get(self.name)
        if analysis is None:
            raise unknown("analysis", self.name, ANALYSES)
        if not self.compares:
            return analysis.draw(self)
        return {} if analysis.draw_compared is None else analysis.draw_compared(self)


@dataclass(frozen=True)
class Analysis:
    """An analysis as it is registered.

    Attributes:
        name: As in `--only`, and the name of its module.
        title: What it is about, in a few words.
        measure: ``measure(target, **settings) -> Found``; raises `instar.report.UnavailableError` if what it needs is
            not there.
        draw: From a result to its pictures by name.
        needs: ``"model"`` (a checkpoint and images) or ``"records"`` (the files of a run alone).
        cost: How long it takes and what that depends on, in words.
        splits: Which images it looks at unless told otherwise: of ``"train"`` and ``"test"``, the usual one first.
        compare: From results for several checkpoints, splits or runs to one that puts them side by side, without a
            model; None if there is nothing to compare.
        draw_compared: From such a result to its pictures.
    """

    name: str
    title: str
    measure: Callable[..., Found]
    draw: Callable[[Found], dict[str, Figure]]
    needs: str
    cost: str
    splits: tuple[str, ...] = ("test",)
    compare: Callable[[Sequence[Found]], Found] | None = None
    draw_compared: Callable[[Found], dict[str, Figure]] | None = None


ANALYSES: dict[str, Analysis] = {}
"""All analyses by name, in the order in which they are run: later ones may read what earlier ones have stored."""


def register(analysis: Analysis) -> Analysis:
    """Make an analysis known under its name, and return it."""
    ANALYSES[analysis.name] = analysis
    return analysis


def read(path: str | os.PathLike[str]) -> Found:
    """Read a result back.

    Args:
        path: The JSON file.

    Returns:
        The result as it was written.

    Raises:
        UserError: A file is missing or damaged, or of another format.
    """
    path = Path(path)
    content = read_json(path, what="analysis")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} is no analysis of format {FORMAT}")
    try:
        tables: dict[str, Table] = {}
        for key, column in read_arrays(path.with_suffix(".npz"), what="analysis").items():
            name, _, within = key.partition("/")
            tables.setdefault(name, {})[within] = column
        return Found(
            name=str(content["name"]),
            title=str(content["title"]),
            summary=str(content["summary"]),
            figures={name: math.nan if value is None else float(value) for name, value in content["figures"].items()},
            tables=tables,
            protocol=dict(content["protocol"]),
            path=path,
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"cannot read the analysis {path}: {type(error).__name__}: {error}") from None


def stored(folder: str | os.PathLike[str]) -> list[Found]:
    """All results in a run's folder (or in a folder of results), in the order of `ANALYSES`, then of their file names.

    Args:
        folder: The run folder, or the folder that the results lie in.

    Returns:
        The results; none if nothing was analysed yet.

    Raises:
        UserError: A file is damaged.
    """
    place = Path(folder)
    place = place / FOLDER if (place / FOLDER).is_dir() else place
    found = [read(path) for path in sorted(place.glob("*-*.json"))]
    order = {name: number for number, name in enumerate(ANALYSES)}
    return sorted(found, key=lambda one: order.get(one.name, len(order)))


def _keep_other(path: Path, protocol: Mapping[str, Any]) -> None:
    """Move a result of another protocol out of the way: it may have taken hours."""
    try:
        older = json.loads(path.read_text(encoding="utf-8"))["protocol"]
        if older.get("key") == protocol.get("key"):
            return
        make_folder(path.parent / "earlier")
        name = f"{path.stem}-n{older.get('n', 0)}-{str(older.get('key'))[:8]}"
        for suffix in (".json", ".npz"):
            if path.with_suffix(suffix).exists():
                os.replace(path.with_suffix(suffix), path.parent / "earlier" / (name + suffix))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # absent, or not a result of ours: there is nothing to keep
