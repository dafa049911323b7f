"""What a run is, as its ``run.json`` tells it, and what of it must be equal for a resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import instar
from instar.config import INDIFFERENT, Settings, written
from instar.data import Images, SelectionSplit
from instar.devices import device_name
from instar.errors import UserError
from instar.method import Method
from instar.methods import Recipe
from instar.models import origin
from instar.parallel import Group
from instar.runs import onward, read_run
from instar.schedules import Progress
from instar.selection import SELECTION_STEPS
from instar.storage import remove_unfinished, write_atomically


def threat_of(method: Method, epochs: int) -> dict[str, Any] | None:
    """Norm and radius that a network is trained to withstand; of a radius that moves, the one at the end of the run.

    Example:
        >>> from instar.methods import RECIPES
        >>> from instar.schedules import Ramp
        >>> threat_of(RECIPES["pgd_at"](eps=Ramp(0.0, 0.5, 0, 0.1)), epochs=30)
        {'norm': 'Linf', 'eps': 0.5}
    """
    ball = getattr(method.at(Progress(epoch=epochs, epochs=epochs)).attack, "ball", None)
    return None if ball is None else {"norm": ball.norm, "eps": written(ball.eps)}


def describe(
    recipe: str | Recipe | Method,
    method: Method,
    settings: Settings,
    network: nn.Module,
    images: Images,
    selection: SelectionSplit,
    device: torch.device,
    precision: torch.dtype,
    group: Group,
) -> dict[str, Any]:
    """The contents of ``run.json``, its fingerprint left out.

    Args:
        recipe: As the user named it.
        method: What it has become.
        settings: Of the run.
        network: What is trained.
        images: The official training images.
        selection: Those of them that are held out.
        device: Where it is trained.
        precision: In what.
        group: The processes that share it.
    """
    built = origin(network)
    name = recipe if isinstance(recipe, str) else getattr(recipe, "__name__", "custom")
    kept = {entry.name: written(getattr(settings, entry.name)) for entry in dataclasses.fields(settings)}
    return {
        "recipe": name if isinstance(name, str) else "custom",
        "method": repr(method),
        "training": kept,
        "data": {
            "name": images.info.name,
            "path": settings.data,
            "size": images.shape[1],
            "train_images": len(images) - len(selection),
            "classes": list(images.classes),
        },
        "model": {
            "name": built.architecture if built else type(network).__name__,
            "arguments": dict(built.arguments) if built else None,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "threat": threat_of(method, settings.epochs),
        "selection": {"n": len(selection), "rule": f"margin PGD-{SELECTION_STEPS}", "seed": settings.seed},
        "hardware": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "processes": group.size,
        },
        "launch": group.launch,
        "precision": str(precision).removeprefix("torch."),
        "versions": {
            "instar": instar.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "git": _git_state(),
    }


def setting(described: Mapping[str, Any]) -> str:
    """What is about to be trained, on what, in a line."""
    data, model = described["data"], described["model"]
    return (
        f"{data['train_images']:,} training images, {described['selection']['n']:,} held out; {model['name']} with "
        f"{model['parameters']:,} parameters; {described['precision']} on {described['hardware']['device']}"
    )


def _git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout that the package lies in; None outside of one."""
    git = shutil.which("git")
    here = Path(__file__).resolve().parent
    if git is None:
        return None
    answers = []
    for question in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", ".")):
        asked = subprocess.run([git, *question], cwd=here, capture_output=True, text=True, check=False)
        if asked.returncode:
            return None
        answers.append(asked.stdout.strip())
    return {"commit": answers[0], "clean": not answers[1]}


_IRRELEVANT = INDIFFERENT | {"extra"}  # of an extra file the contents count
_LATER = {
    "batch_norm": "sync",
    "patience": 0,
    "clip_grad": None,
}  # settings that older runs do not name, and what they did


def fingerprint_of(described: Mapping[str, Any]) -> str:
    """What must be equal for a resume: everything that decides the numbers, and nothing about where they are made."""
    training = {
        name: item
        for name, item in described["training"].items()
        if name not in _IRRELEVANT and not (name in _LATER and item == _LATER[name])
    }
    data = {name: item for name, item in described["data"].items() if name != "path"}
    core = {
        "method": described["method"],
        "training": {name: item for name, item in training.items() if name != "data"},
        "data": data,
        "model": described["model"],
        "precision": described["precision"],
    }
    return hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()


def prepare_folder(folder: Path, described: Mapping[str, Any], fingerprint: str, *, resume: bool) -> None:
    """Make the folder of a run, ``run.json`` first; of one that goes on, make sure that it is the same run.

    Args:
        folder: Missing or empty; at a resume that of the run.
        described: What `describe` gave.
        fingerprint: What `fingerprint_of` it gave.
        resume: Whether the run goes on.

    Raises:
        UserError: The folder holds another run or something else, or cannot be written.
    """
    if resume:
        stored = read_run(folder)
        if stored.get("fingerprint") != fingerprint:
            raise UserError(
                f"{folder} holds another run: {_difference(stored, described)}. Start into a new folder, or resume "
                "with the settings of the run"
            )
        for part in ("checkpoints", "instances"):
            (folder / part).mkdir(exist_ok=True)
        return
    try:
        if folder.exists():
            remove_unfinished(folder, of="run.json")  # killed before its first file was whole, a run left nothing else
        if folder.exists() and any(folder.iterdir()) and not (folder / "run.json").exists():
            raise UserError(f"{folder} is not empty and holds no run: choose another --out")
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: {onward(folder)}, or choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**described, "fingerprint": fingerprint}, indent=2, ensure_ascii=False)
        # First, so that whatever else is there belongs to a run, also if this process is killed right now.
        write_atomically(folder / "run.json", content.encode())
        for part in ("checkpoints", "instances"):
            (folder / part).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from None


def _difference(stored: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    for group in ("method", "precision"):
        if stored.get(group) != described[group]:
            return f"its {group} is {stored.get(group)}, not {described[group]}"
    for group in ("training", "data", "model"):
        before, now = stored.get(group) or {}, described[group]
        for name in now:
            irrelevant = _IRRELEVANT if group == "training" else {"path"}
            if before.get(name, _LATER.get(name)) != now[name] and name not in irrelevant:
                return f"its {group} setting {name} is {before.get(name)!r}, not {now[name]!r}"
    return "its configuration differs"
