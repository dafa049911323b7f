"""Runs as folders: what any command, notebook or report finds there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from instar.errors import UserError, unknown
from instar.models import load as load_weights
from instar.storage import read_json

CHECKPOINTS = ("best", "last")
KEPT = re.compile(r"epoch_(\d{3,})")
"""Names of the weights that are kept of single epochs (``keep_every``), as those of the instance tables."""


def check_checkpoint(name: str, *others: str) -> None:
    """Refuse what cannot be the name of a checkpoint.

    Args:
        name: The name.
        *others: What else may stand in its place.

    Raises:
        UserError: It is neither best, last nor of a form like ``epoch_009``.
    """
    if name not in (*CHECKPOINTS, *others) and not KEPT.fullmatch(name):
        raise unknown("checkpoint", name, (*others, *CHECKPOINTS, "epoch_NNN of a run that keeps some"))


def own_code(run: Mapping[str, Any]) -> list[str]:
    """Code of the user's own that a run names, as ``file.py:function``: its recipe, its model.

    Args:
        run: The contents of ``run.json``.

    Example:
        >>> own_code({"recipe": "mine.py:best", "training": {"model": "timm/resnet18:a1"}})
        ['mine.py:best']
    """
    named = (run.get("recipe"), (run.get("training") or {}).get("model"))
    return [name for name in named if isinstance(name, str) and ":" in name and not name.startswith("timm/")]


def onward(folder: str | Path, *more: str) -> str:
    """The command that goes on with a run; it says so where only Python can, or where ``--trust`` is needed.

    Args:
        folder: The run's folder.
        *more: Further words of the command.

    Example:
        >>> onward("runs/a", "--accumulate 2")
        'go on with: instar train --resume --out runs/a --accumulate 2'
    """
    try:
        run = read_run(folder)
    except UserError:
        run = {}
    if (run.get("data") or {}).get("path") == "custom":
        return f"go on with instar.train.train(..., out={str(folder)!r}, resume=True), from Python as it began"
    trust = ["--trust"] if own_code(run) else []
    return " ".join(["go on with: instar train --resume", *trust, "--out", shlex.quote(str(folder)), *more])


def read_run(folder: str | Path) -> dict[str, Any]:
    """The contents of a run's ``run.json``.

    Args:
        folder: The run's folder.

    Returns:
        The run's whole configuration.

    Raises:
        UserError: The folder holds no run, or the file is damaged.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (there is no {path.name} in it)")
    return read_json(path, what="description of the run")


def read_resumable(folder: str | Path) -> dict[str, Any]:
    """As `read_run`, with all that a resume reads.

    Raises:
        UserError: The folder holds no run, or the file is damaged.
    """
    run = read_run(folder)
    kinds = {"recipe": str, "method": str, "training": dict, "data": dict, "model": dict}
    for name, kind in kinds.items():
        if not isinstance(run.get(name), kind):
            raise UserError(f"{Path(folder) / 'run.json'} is not the description of a run: it says nothing of {name!r}")
    for name in ("data", "model", "epochs"):
        if name not in run["training"]:
            raise UserError(f"{Path(folder) / 'run.json'} is damaged: its training says nothing of {name!r}")
    return run


def load(path: str | Path, *, checkpoint: str = "best", model: nn.Module | None = None) -> nn.Module:
    """The trained model of a run, or of a weights file with a card: a plain module that takes images in [0, 1].

    Args:
        path: A run's folder, or a ``.safetensors`` file beside its ``.json`` card.
        checkpoint: ``"best"``, ``"last"`` or a kept epoch (``"epoch_009"``) of a run.
        model: A module to put the weights into; needed when it was built by code of your own.

    Returns:
        The model in eval mode, its normalisation inside.

    Raises:
        UserError: No run or weights there, or weights of another architecture.
    """
    path = Path(path)
    if not path.is_dir() or not (path / "run.json").exists():  # a file, or a folder as the hub has them
        return load_weights(path, model=model)
    check_checkpoint(checkpoint)
    read_run(path)
    return load_weights(path / "checkpoints" / f"{checkpoint}.safetensors", model=model)
