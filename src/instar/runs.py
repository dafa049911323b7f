"""Runs as folders: what any command, notebook or report finds there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from instar.errors import UserError
from instar.models import load as load_weights
from instar.storage import read_json

CHECKPOINTS = ("best", "last")


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


def load(path: str | Path, *, checkpoint: str = "best", model: nn.Module | None = None) -> nn.Module:
    """The trained model of a run, or of a weights file with a card: a plain module that takes images in [0, 1].

    Args:
        path: A run's folder, or a ``.safetensors`` file beside its ``.json`` card.
        checkpoint: ``"best"`` or ``"last"`` of a run.
        model: A module to put the weights into; needed when it was built by code of your own.

    Returns:
        The model in eval mode, its normalisation inside.

    Raises:
        UserError: No run or weights there, or weights of another architecture.
    """
    path = Path(path)
    if not path.is_dir() or not (path / "run.json").exists():  # a file, or a folder as the hub has them
        return load_weights(path, model=model)
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint must be one of {', '.join(CHECKPOINTS)}; got {checkpoint!r}")
    read_run(path)
    return load_weights(path / "checkpoints" / f"{checkpoint}.safetensors", model=model)
