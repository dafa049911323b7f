"""The state of a run in one file: everything that a resume needs and nothing that could run code.

A save keeps the state before it under a second name. Each file knows the SHA-256 of its own content, so that a resume
tells a whole state from one that a full disk, a lost cable or a tired drive has altered, and falls back on the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from instar.errors import UserError
from instar.instances import InstanceTable
from instar.storage import WriteError, parse_json, write_atomically

FORMAT, WITHOUT_CHECKSUM = 2, 1
"""The format that is written, and the older one that is read too."""

NEWEST, PREVIOUS, DAMAGED = "state.safetensors", "state-previous.safetensors", "state-damaged.safetensors"
"""Names of the last state, of the one before it, and of one that a resume has set aside."""

_BLANK = "0" * 64
"""What stands in the place of the checksum while it is computed."""
_PORTION = 1 << 24
"""Bytes that are read at a time."""


class DamagedError(UserError):
    """A file is not what was written: cut short, altered, or empty."""


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
    """Write the state, whole or not at all; the one that was there before is kept beside it, see `previous_of`.

    Args:
        state: What to write.
        path: File, ending in ``.safetensors``.
        fingerprint: Text that identifies the run's configuration; a resume must bring the same.

    Raises:
        WriteError: The disk is full or read-only; both files are as they were.
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
    content = safetensors.torch.save(plain, metadata={"state": json.dumps(numbers), "checksum": _BLANK})
    length = _head_length(content[:8])
    head = content[:length].replace(_mark(_BLANK), _mark(hashlib.sha256(content).hexdigest()), 1)

    def write(file: BinaryIO) -> None:
        file.write(head)
        file.write(memoryview(content)[length:])

    write_atomically(path, write, previous=previous_of(path))


def previous_of(path: Path) -> Path:
    """Where the state before the one at `path` is kept.

    Example:
        >>> print(previous_of(Path("state.safetensors")))
        state-previous.safetensors
    """
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def _head_length(first: bytes) -> int:
    """Bytes of a safetensors file before its first tensor, as its first eight bytes tell."""
    return 8 + int.from_bytes(first, "little")


def _mark(checksum: str) -> bytes:
    # Within another text of the header its quotation marks would be escaped.
    return f'"checksum":"{checksum}"'.encode()


def _compare(path: Path, told: str) -> None:
    """Compare a file that safetensors can read with the checksum that it tells.

    Raises:
        ValueError: They do not fit.
    """
    with path.open("rb") as file:
        first = file.read(8)
        head = first + file.read(_head_length(first) - 8)
        digest = hashlib.sha256(head.replace(_mark(told), _mark(_BLANK), 1))
        while part := file.read(_PORTION):
            digest.update(part)
    if digest.hexdigest() != told:
        raise ValueError("its content does not fit its checksum")


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a state file tells of itself, and its tensors if wanted, after its checksum was verified.

    Raises:
        DamagedError: It is not what was written.
        UserError: It is missing, may not be read, or is of another format.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            told = file.metadata() or {}
            if "checksum" in told:
                _compare(path, told["checksum"])
            numbers = _numbers(told.get("state", "{}"))
            if numbers.get("format") == FORMAT and "checksum" not in told:
                raise ValueError("it tells no checksum")
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path} to resume from") from None
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"the checkpoint {path} is damaged and cannot be resumed from: {error}") from None
    if numbers.get("format") not in (FORMAT, WITHOUT_CHECKSUM):
        raise UserError(f"the checkpoint {path} has format {numbers.get('format')}; this version reads {FORMAT}")
    return numbers, found


def find_state(folder: Path, *, note: Callable[[str], None]) -> Path | None:
    """The state to go on from: the newest one, or the one before it if the newest is missing or damaged.

    A damaged newest state is set aside under another name, in which nobody looks for it.

    Args:
        folder: Where a run keeps its checkpoints.
        note: Called with one line if it is not the newest state.

    Returns:
        The file; None if nothing was saved yet.

    Raises:
        UserError: There are states, and none of them is whole; or one belongs to another version.

    Example:
        >>> import tempfile
        >>> find_state(Path(tempfile.mkdtemp()), note=print) is None
        True
    """
    newest, previous = folder / NEWEST, folder / PREVIOUS
    there = [path for path in (newest, previous) if path.exists()]
    wrong: dict[Path, str] = {path: "it is missing" for path in (newest, previous) if path not in there}
    for path in there:
        try:
            numbers, _ = _read(path, tensors=False)
        except DamagedError as error:
            wrong[path] = str(error).partition("resumed from: ")[2]
            continue
        if path == previous:
            what = f"{newest} is missing" if newest not in there else f"{newest} is damaged ({wrong[newest]})"
            aside = f"; it is kept as {_set_aside(newest).name}" if newest in there else ""
            where = f"epoch {numbers['epoch']}, step {numbers['step']}"
            note(f"{what}{aside}. Going on from the state before it, {where}")
        return path
    if not there:
        return None
    reasons = "; ".join(f"{path.name}: {wrong[path]}" for path in (newest, previous))
    raise UserError(
        f"no state in {folder} is whole ({reasons}). Start again into another --out; with --init "
        f"{folder / 'last.safetensors'} training begins from the last epoch's weights"
    )


def _set_aside(path: Path) -> Path:
    """Give a damaged state a name that no other one has.

    Raises:
        WriteError: The disk is read-only.
    """
    aside, number = path.with_name(DAMAGED), 1
    while aside.exists():
        number += 1
        aside = path.with_name(DAMAGED).with_stem(f"{Path(DAMAGED).stem}-{number}")
    try:
        path.rename(aside)
    except OSError as error:
        raise WriteError(f"cannot rename the damaged {path}: {error.strerror or error}") from None
    return aside


def _numbers(text: str) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: It is damaged, or something is missing in it.
    """
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("it does not say what it is")
    if found.get("format") not in (FORMAT, WITHOUT_CHECKSUM):
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
        DamagedError: The file is not what was written.
        UserError: It is missing, of another format, or of another run.
    """
    numbers, tensors = _read(path)
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
