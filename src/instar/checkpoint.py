"""The state of a run in one file: everything that a resume needs and nothing that could run code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from instar.errors import UserError
from instar.instances import InstanceTable
from instar.storage import parse_json, write_atomically

FORMAT = 1


@dataclass
class State:
    """What training changes. Random numbers are keyed (see `instar.randomness`), so there is no generator to keep.

    Attributes:
        model: The trained network.
        optimizer: Its optimiser.
        table: The instance table.
        average: The averaged network, or None.
        epoch: Epoch that is running, from 0; the number of epochs when the run is complete.
        step: Steps done in that epoch.
        updates: Optimiser steps done in the run.
        best: The best checkpoint so far: ``{"epoch": ..., "robust": ..., "clean": ...}``, or empty.
        seconds: Training time so far, without evaluation, in seconds.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    table: InstanceTable
    average: nn.Module | None = None
    epoch: int = 0
    step: int = 0
    updates: int = 0
    best: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def _tensors(state: State) -> dict[str, Tensor]:
    """Every tensor of the state by a name that says where it belongs."""
    found = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    if state.average is not None:
        found |= {f"average.{name}": t for name, t in state.average.state_dict().items()}
    found |= {f"table.{name}": t for name, t in state.table.columns.items()}
    found |= {f"shared.{name}": t for name, t in state.table.shared.items()}
    names = {id(p): name for name, p in state.model.named_parameters()}
    for parameter, entries in state.optimizer.state.items():
        for key, entry in entries.items():
            if isinstance(entry, Tensor):
                found[f"optimizer.{key}.{names[id(parameter)]}"] = entry
    return found


def save_state(state: State, path: Path, *, fingerprint: str) -> None:
    """Write the state, whole or not at all: the previous file stays until the new one is complete.

    Args:
        state: What to write.
        path: File, ending in ``.safetensors``.
        fingerprint: Text that identifies the run's configuration; a resume must bring the same.

    Raises:
        UserError: The disk is full or read-only.
    """
    numbers = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "epoch": state.epoch,
        "step": state.step,
        "updates": state.updates,
        "best": state.best,
        "seconds": state.seconds,
    }
    # Contiguous copies: safetensors knows no memory order, and load_state copies into tensors that have theirs.
    plain = {name: t.detach().cpu().contiguous() for name, t in _tensors(state).items()}
    write_atomically(path, safetensors.torch.save(plain, metadata={"state": json.dumps(numbers)}))


def _numbers(text: str) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: It is damaged, or something is missing in it.
    """
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("it does not say what it is")
    if found.get("format") != FORMAT:
        return found
    kinds: dict[str, type | tuple[type, ...]] = {
        "fingerprint": str,
        "epoch": int,
        "step": int,
        "updates": int,
        "best": dict,
        "seconds": (int, float),
    }
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"its {name} is missing or damaged")
    return found


@dataclass(frozen=True)
class Reached:
    """How far a run had come when its state was written.

    Attributes:
        epoch: Epoch that was running, from 0; the number of epochs when the run was complete.
        step: Steps done in that epoch.
    """

    epoch: int
    step: int


def progress_of(path: Path) -> Reached:
    """How far a run had come, from its state alone.

    Args:
        path: What `save_state` wrote.

    Returns:
        Epoch and step.

    Raises:
        UserError: The file is missing or damaged, or of another format.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            numbers = _numbers((file.metadata() or {}).get("state", "{}"))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if numbers.get("format") != FORMAT:
        raise UserError(f"the checkpoint {path} has format {numbers.get('format')}; this version reads {FORMAT}")
    return Reached(numbers["epoch"], numbers["step"])


def load_state(state: State, path: Path, *, fingerprint: str) -> None:
    """Put a saved state back, bit for bit, into freshly made objects.

    Args:
        state: Objects of the same run, as they were before its first step.
        path: What `save_state` wrote.
        fingerprint: As given to `save_state`.

    Raises:
        UserError: The file is missing, damaged, of another format, or of another run.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            numbers = _numbers((file.metadata() or {}).get("state", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path} to resume from") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"the checkpoint {path} is damaged and cannot be resumed from: {error}") from None
    if numbers.get("format") != FORMAT:
        raise UserError(f"the checkpoint {path} has format {numbers.get('format')}; this version reads {FORMAT}")
    if numbers["fingerprint"] != fingerprint:
        raise UserError(f"the checkpoint {path} belongs to a run with another configuration; start into a new folder")
    optimizer = {name: t for name, t in tensors.items() if name.startswith("optimizer.")}
    shared = {name: t for name, t in tensors.items() if name.startswith("shared.")}
    rest = {name: t for name, t in tensors.items() if name not in optimizer and name not in shared}
    current = {name: t for name, t in _tensors(state).items() if not name.startswith(("optimizer.", "shared."))}
    parameters = dict(state.model.named_parameters())
    unknown = [name for name in optimizer if name.count(".") < 2 or name.split(".", 2)[2] not in parameters]
    misfits = set(rest) != set(current) or any(rest[name].shape != current[name].shape for name in current)
    if misfits or unknown:
        raise UserError(f"the checkpoint {path} holds another architecture or training set than this run")
    with torch.no_grad():
        for name, t in rest.items():
            current[name].copy_(t)
    device = state.table.columns["seen"].device
    state.table.shared.clear()  # and filled in place: the table's dictionary is what the run hands out
    state.table.shared.update({name.removeprefix("shared."): t.to(device) for name, t in shared.items()})
    for name, t in optimizer.items():
        _, key, owner = name.split(".", 2)
        parameter = parameters[owner]
        entry = t.to(parameter.device) if t.ndim else t  # Adam counts its steps on the CPU
        # In the parameter's memory order, so that sums run in the same order as in the uninterrupted run.
        entries = state.optimizer.state[parameter]
        entries[key] = torch.empty_like(parameter).copy_(entry) if entry.shape == parameter.shape else entry
    state.epoch, state.step, state.updates = numbers["epoch"], numbers["step"], numbers["updates"]
    state.best, state.seconds = numbers["best"], numbers["seconds"]
