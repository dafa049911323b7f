"""Following a run while it trains: its events, written to TensorBoard, Weights & Biases or Trackio.

A sink is a listener of `instar.train.train`'s events, so that the trainer knows none of these services:

    train("trades", out="runs/trades", on_event=follow("tensorboard", out="runs/trades"))
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from instar.errors import UserError, unknown
from instar.train import EpochDone, Event, StepDone

SINKS = ("tensorboard", "wandb", "trackio")
_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
SECONDS = 10.0
"""Numbers of steps are read from the device and written this often, as means since the last time."""


class Writer(Protocol):
    """Where numbers go."""

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers by name at a step of the optimiser, counted over the whole run from 1."""

    def close(self) -> None:
        """Write what is still held back."""


class Follower:
    """Turns events of a run into numbers by name for a writer.

    ``step/loss`` and ``step/robust`` are means over the steps since the last writing; ``epoch/...`` are the fields of
    the line that ``log.jsonl`` gets. All are placed at the step of the optimiser. A writer that fails (a network that
    is down, a disk that is full) is left alone from then on, with one line: training does not depend on it.

    Args:
        open_writer: Called at the first event with its step; after a resume that is not 1, and what an interrupted
            run had written from there on is to be replaced.
        note: Called with a line that the user should see.
        seconds: How often numbers of steps are read and written.

    Example:
        >>> class Printed:
        ...     def write(self, numbers, step): print(step, numbers)
        ...     def close(self): print("closed")
        >>> import torch
        >>> follower = Follower(lambda first: Printed(), seconds=0)
        >>> follower(StepDone(0, 0, 4, 2, loss=torch.tensor([1.0, 3.0]), correct=torch.tensor([1, 0])))
        1 {'step/loss': 2.0, 'step/robust': 0.5}
        >>> follower.close()
        closed
    """

    def __init__(
        self,
        open_writer: Callable[[int], Writer],
        *,
        note: Callable[[str], None] = lambda line: None,
        seconds: float = SECONDS,
    ) -> None:
        self._open, self._note, self._seconds = open_writer, note, seconds
        self._writer: Writer | None = None
        self._failed = False
        self._held: list[StepDone] = []
        self._wrote = time.monotonic()
        self._steps = 0

    def __call__(self, event: Event) -> None:
        """Take one event of training."""
        if self._failed:
            return
        if isinstance(event, EpochDone):
            self._flush()
            # A run of which only the end of an epoch was left has seen no step that would tell how many there are.
            step = (int(event.record["epoch"]) + 1) * max(self._steps, 1)
            self._write({f"epoch/{name}": item for name, item in event.record.items() if _is_number(item)}, step)
            return
        self._steps = event.steps
        self._held.append(event)
        if self._writer is None:
            self._guarded(lambda: setattr(self, "_writer", self._open(_place(event))))
        if time.monotonic() - self._wrote >= self._seconds:
            self._flush()

    def close(self) -> None:
        """Write what is held back; the writer is done with."""
        self._flush()
        if self._writer is not None:
            self._guarded(self._writer.close)
            self._writer = None

    def _flush(self) -> None:
        self._wrote = time.monotonic()
        held, self._held = self._held, []
        if not held or self._failed:
            return
        count = sum(event.loss.numel() for event in held)
        totals = {
            "step/loss": sum(float(event.loss.float().sum()) for event in held),
            "step/robust": sum(float(event.correct.float().sum()) for event in held),
        }
        self._write({name: total / count for name, total in totals.items()}, _place(held[-1]))

    def _write(self, numbers: Mapping[str, float], step: int) -> None:
        finite = {name: float(number) for name, number in numbers.items() if math.isfinite(number)}

        def write() -> None:
            self._writer = self._writer or self._open(step)
            self._writer.write(finite, step)

        self._guarded(write)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a service or its network does must not end a training run
            self._failed = True
            self._held.clear()
            reason = " ".join(str(error).split()) or "no reason given"
            self._note(f"following stopped, training goes on: {type(error).__name__}: {reason[:200]}")


def _place(event: StepDone) -> int:
    return event.epoch * event.steps + event.step + 1


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def follow(
    sink: str, *, out: str | Path, note: Callable[[str], None] = lambda line: None, seconds: float = SECONDS
) -> Follower:
    """A listener of events that writes them to a service.

    Args:
        sink: ``"tensorboard"`` (files in ``<out>/tensorboard``), ``"wandb"`` or ``"trackio"`` (a run in the project
            ``instar``, named after the run folder; a resumed run goes on under the same name).
        out: The run folder. Its ``run.json`` becomes the run's configuration.
        note: Called with a line that the user should see.
        seconds: How often numbers of steps are read from the device and written.

    Returns:
        The listener, for ``on_event``; call its ``close`` at the end.

    Raises:
        UserError: No such sink, or its package is not installed.
    """
    if sink not in SINKS:
        raise unknown("sink", sink, SINKS)
    try:
        package = importlib.import_module(_PACKAGES[sink])
    except ImportError:
        raise UserError(f"--log {sink} needs the package {sink}: pip install {sink}") from None
    folder = Path(out)
    opened: Callable[[int], Writer] = (
        (lambda first: _TensorBoard(package, folder / "tensorboard", first))
        if sink == "tensorboard"
        else (lambda first: _Service(package, folder))
    )
    return Follower(opened, note=note, seconds=seconds)


@contextlib.contextmanager
def following(
    sinks: Sequence[str], *, out: str | Path, note: Callable[[str], None] = lambda line: None
) -> Iterator[Callable[[Event], None]]:
    """One listener for several sinks, closed at the end, also after an error or an interruption.

    Args:
        sinks: Names, see `follow`; none is allowed.
        out: The run folder.
        note: Called with a line that the user should see.

    Yields:
        The listener.

    Raises:
        UserError: No such sink, or its package is not installed.
    """
    followers = [follow(sink, out=out, note=note) for sink in dict.fromkeys(sinks)]

    def listen(event: Event) -> None:
        for follower in followers:
            follower(event)

    try:
        yield listen
    finally:
        for follower in followers:
            follower.close()


class _TensorBoard:
    """Scalars in event files. Those of an interrupted run beyond the point of resume are purged."""

    def __init__(self, package: types.ModuleType, folder: Path, first: int) -> None:
        self._writer = package.SummaryWriter(str(folder), purge_step=first if first > 1 else None)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Service:
    """Weights & Biases, and Trackio, which has the same calls."""

    def __init__(self, package: types.ModuleType, folder: Path) -> None:
        self._package = package
        arguments: dict[str, Any] = {
            "project": "instar",
            "name": folder.resolve().name,
            "config": _configuration(folder),
        }
        if package.__name__ == "wandb":
            # The fingerprint names a configuration, the folder a run of it: together they are found again on resume.
            fingerprint = str(arguments["config"].get("fingerprint", ""))[:16]
            arguments |= {"dir": str(folder), "id": f"{folder.resolve().name}-{fingerprint}".strip("-")}
        package.init(**arguments, resume="allow")

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._package.log(dict(numbers), step=step)

    def close(self) -> None:
        self._package.finish()


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
