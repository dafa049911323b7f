"""A finished or running run as its files tell it: what every picture and page is made from."""

from __future__ import annotations

import inspect
import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from instar.arrays import read_arrays
from instar.data.catalogue import CATALOGUE
from instar.errors import UserError
from instar.evaluate.record import Record
from instar.evaluate.record import read as read_record
from instar.expression import parse
from instar.method import Method
from instar.methods import RECIPES
from instar.schedules import Progress

LOGGED = ("epoch", "lr", "train_loss", "train_robust", "selection_clean", "selection_robust")
"""Fields that every line of ``log.jsonl`` must have to be drawn."""

_DAMAGED = (zipfile.BadZipFile, zlib.error)

_MOST_CHANGES = 3
"""A method that changes more often than this follows a ramp: marking every epoch would say nothing."""


class UnavailableError(UserError):
    """What a picture needs does not exist (yet), which is no damage: pictures that need less can still be made."""


@dataclass(frozen=True)
class StoredRun:
    """What the files of a run folder say.

    Epochs are counted from 0 here, as in the files; pictures count them from 1, as the progress display does.

    Attributes:
        folder: The run folder.
        config: Contents of ``run.json``.
        log: Lines of ``log.jsonl``, one for each finished epoch; empty while the first one runs.
    """

    folder: Path
    config: Mapping[str, Any]
    log: tuple[Mapping[str, Any], ...]

    @property
    def title(self) -> str:
        """The method's name as its paper writes it, for example ``"GAIRAT"``."""
        recipe = str(self.config.get("recipe", "custom"))
        if recipe in RECIPES:
            first, colon, _ = (inspect.getdoc(RECIPES[recipe]) or "").partition(":")
            # Names of papers are one word; a docstring that begins with a sentence names nothing.
            return first if colon and " " not in first else recipe.upper().replace("_", "-")
        return recipe.rpartition(":")[2]

    @property
    def data(self) -> str:
        """Readable name of the data set."""
        name, size = str(self.config["data"]["name"]), self.config["data"].get("size")
        title = CATALOGUE[name].title if name in CATALOGUE else Path(name).name
        # "Imagenette at 128" is so by default; the run says at which size it was.
        return re.sub(r" at \d+$", f" at {size}", title) if size and name in CATALOGUE else title

    @property
    def model(self) -> str:
        """Network and width, for example ``"resnet18, width 16"``."""
        built = self.config["model"]
        width = (built.get("arguments") or {}).get("width")
        return f"{built['name']}" + (f", width {width}" if width is not None else "")

    @property
    def threat(self) -> str | None:
        """The ball that was trained against, for example ``"Linf 8/255"``; None without one."""
        found = self.config.get("threat")
        return f"{found['norm']} {found['eps']}" if found else None

    @property
    def epochs(self) -> int:
        """Epochs that the whole run has, finished or not."""
        return int(self.config["training"]["epochs"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["training"]["seed"])

    @property
    def held_out(self) -> int:
        """Number of held-out images by which checkpoints are chosen."""
        return int(self.config["selection"]["n"])

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The line of the best checkpoint: the first with the highest held-out robust accuracy; None before any."""
        return max(self.log, key=lambda line: line["selection_robust"], default=None)

    @cached_property
    def method(self) -> Method | None:
        """The method, or None if it holds values that are not known here, such as a user's own signal."""
        try:
            found = parse(str(self.config.get("method", "")))
        except UserError:
            return None
        return found if isinstance(found, Method) else None

    def attack_steps(self, epoch: int) -> int | None:
        """K, the steps of the training attack in an epoch (from 0), as far as the stored method says."""
        if self.method is None or not 0 <= epoch <= self.epochs:
            return None
        steps = getattr(self.method.at(Progress(epoch=epoch, epochs=self.epochs)).attack, "steps", None)
        return int(steps) if isinstance(steps, (int, float)) else None

    @cached_property
    def changes(self) -> tuple[tuple[int, str], ...]:
        """Epochs (from 0) from which on another loss is minimised, with that loss; none for gradual changes."""
        if self.method is None:
            return ()
        losses = [repr(self.method.at(Progress(epoch=e, epochs=self.epochs)).loss) for e in range(self.epochs)]
        found = [(e, losses[e]) for e in range(1, self.epochs) if losses[e] != losses[e - 1]]
        return tuple(found) if len(found) <= _MOST_CHANGES else ()

    @cached_property
    def tables(self) -> tuple[int, ...]:
        """Epochs (from 0) whose instance table was stored, in order."""
        found = (re.fullmatch(r"epoch_(\d+)\.npz", path.name) for path in (self.folder / "instances").glob("*.npz"))
        return tuple(sorted(int(match.group(1)) for match in found if match))

    def require_tables(self) -> None:
        """Refuse a run without instance tables.

        Raises:
            UnavailableError: There is none.
        """
        if not self.tables:
            raise UnavailableError(f"{self.folder} has no instance table yet: has the run finished its first epoch?")

    def instances(self, epoch: int) -> dict[str, np.ndarray]:
        """The rows of the instances that were trained on in an epoch.

        Args:
            epoch: The epoch, from 0.

        Returns:
            The columns (n,) of the instance table, and ``position`` (n,) in the official training set.

        Raises:
            UserError: The file is missing or damaged, or holds no row of that epoch.
        """
        path = self.folder / "instances" / f"epoch_{epoch:03d}.npz"
        table = read_arrays(path, what="instance table")
        if missing := {"seen", "kappa", "loss"} - set(table):
            raise UserError(f"the instance table {path} has no column {', '.join(sorted(missing))}")
        if len({column.shape for column in table.values()}) != 1 or table["seen"].ndim != 1:
            raise UserError(f"the columns of the instance table {path} differ in shape: is it damaged?")
        # Rows of other epochs are of earlier weights, or of images that no epoch sees (held out, or a last part batch).
        chosen = table["seen"] == epoch
        if not chosen.any():
            raise UserError(f"the instance table {path} has no row of its own epoch: is it a copy of another one?")
        return {"position": np.flatnonzero(chosen)} | {name: column[chosen] for name, column in table.items()}

    def records(self) -> list[Record]:
        """Evaluations of the run's checkpoints, in the order of their file names.

        Raises:
            UserError: A record is damaged.
        """
        return [read_evaluation(path) for path in sorted((self.folder / "evaluations").glob("*.json"))]


def read(run: str | Path | StoredRun) -> StoredRun:
    """Read what a run folder says; a `StoredRun` is passed on.

    Args:
        run: The folder.

    Returns:
        The run.

    Raises:
        UserError: The folder holds no run, or a file is damaged.
    """
    if isinstance(run, StoredRun):
        return run
    folder = Path(run).expanduser()
    path = folder / "run.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no run: there is no run.json in it. Give the folder that --out named"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        stored = StoredRun(folder, config, _read_log(folder / "log.jsonl"))
        _ = (stored.title, stored.data, stored.model, stored.threat, stored.epochs, stored.seed, stored.held_out)
    except KeyError as error:
        raise UserError(f"{path} is not the description of a run: it says nothing of {error}") from None
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is not the description of a run, or damaged") from None
    return stored


def read_evaluation(path: Path) -> Record:
    """Read an evaluation record.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        return read_record(path)
    except _DAMAGED as error:
        raise UserError(f"cannot read the evaluation record {path}: {error}") from None


def _read_log(path: Path) -> tuple[Mapping[str, Any], ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} of {path} is damaged: {error}") from None
        wrong = [
            name
            for name in LOGGED
            if not isinstance(record, dict)
            or isinstance(record.get(name), bool)
            or not isinstance(record.get(name), (int, float))
            or not math.isfinite(record[name])
        ]
        if wrong:
            raise UserError(f"line {number} of {path} must have numbers for {', '.join(wrong)}: is it damaged?")
        lines.append(record)
    return tuple(lines)


def read_all(runs: Sequence[str | Path | StoredRun] | str | Path | StoredRun) -> list[StoredRun]:
    """Read several runs, or one.

    Raises:
        UserError: There is none, or one cannot be read.
    """
    given = [runs] if isinstance(runs, (str, Path, StoredRun)) else list(runs)
    if not given:
        raise UserError("which run? Give at least one run folder")
    return [read(run) for run in given]


def names(runs: Sequence[StoredRun]) -> list[str]:
    """The shortest names that tell runs apart: the method, then with what differs, then with the folder.

    Args:
        runs: The runs of one picture.

    Returns:
        A name for each, all distinct if the folders are.
    """
    found = [run.title for run in runs]
    traits = (
        lambda run: run.data,
        lambda run: run.model,
        lambda run: run.threat or "no attack",
        lambda run: f"{run.epochs} epochs",
        lambda run: f"seed {run.seed}",
    )
    for trait in traits:
        if len(set(found)) == len(found):
            return found
        if len({trait(run) for run in runs}) > 1:
            found = [f"{name}, {trait(run)}" for name, run in zip(found, runs, strict=True)]
    if len(set(found)) < len(found):
        found = [f"{name}, {run.folder.name}" for name, run in zip(found, runs, strict=True)]
    return found
