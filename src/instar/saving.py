"""When a run writes, what it keeps, and what happens when the disk does not take it.

Nothing that was written is lost: a file appears whole or not at all, and the state before the newest one stays. Within
an epoch a save that fails is tried again later while training goes on; the end of an epoch waits for the disk, because
what belongs to it (weights, table, log) would be gone for good.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from instar.checkpoint import NEWEST, State, find_state, save_state
from instar.config import Settings
from instar.errors import UserError
from instar.models import read_card, save
from instar.runs import KEPT
from instar.storage import WriteError, remove_unfinished, write_atomically

USUAL_EVERY, WORK_PER_SAVE = 300.0, 100.0
"""Unless `save_every` is given, training goes on between two saves for so many seconds, and at least for so many times
what the last save took."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0
"""Seconds until a failed save is tried again: doubled each time, up to the second."""
PATIENCE = 300.0
"""Seconds that the end of an epoch waits for a disk before the run stops. Other processes wait with the first one, and
torch.distributed does not wait for ever."""


def kept_name(epoch: int) -> str:
    """The name of what is kept of an epoch, without ending.

    Example:
        >>> kept_name(9)
        'epoch_009'
    """
    return f"epoch_{epoch:03d}"


class Saves:
    """The saves of a run: when one is due, and how one that failed is tried again.

    Args:
        out: Folder of the run.
        fingerprint: Of its configuration, see `save_state`.
        settings: `save_every` and `save_steps` are read.
        note: Called with a line that the user should see.
        clock: Seconds that never run backwards.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        out: Path,
        *,
        fingerprint: str,
        settings: Settings,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = out / "checkpoints" / NEWEST
        self.fingerprint, self.settings, self.note = fingerprint, settings, note
        self.clock, self.sleep = clock, sleep
        self._last, self._took = clock(), 0.0
        self._wait, self._again = 0.0, 0.0  # after a save that failed: how long, and until when

    def due(self, state: State) -> bool:
        """Whether the state shall be saved after the step that was just done."""
        now = self.clock()
        if self._wait:
            return now >= self._again
        steps, every = self.settings.save_steps, self.settings.save_every
        if every is None:
            every = max(USUAL_EVERY, WORK_PER_SAVE * self._took)
        return now - self._last > every or (steps > 0 and state.updates % steps == 0)

    def write(self, state: State) -> None:
        """Save the state.

        Raises:
            WriteError: The disk did not take it.
        """
        begun = self.clock()
        save_state(state, self.path, fingerprint=self.fingerprint)
        self._last = self.clock()
        self._took = self._last - begun
        self._good()

    def attempt(self, state: State) -> bool:
        """Save the state; a failure is told once, and the save tried again later, see `due`.

        Returns:
            Whether it was saved.
        """
        try:
            self.write(state)
        except WriteError as error:
            self._bad(f"{error} Training goes on; the state that was saved last stays, and is tried again")
            return False
        return True

    def insist(self, write: Callable[[], None], *, stopped: Callable[[], bool]) -> bool:
        """Write what cannot be done without, again and again until the disk takes it.

        Args:
            write: Writes; it may be called several times.
            stopped: Whether the run was asked to stop, which ends the waiting.

        Returns:
            Whether it was written; False if the run was asked to stop before that.

        Raises:
            WriteError: The disk did not take it for `PATIENCE` seconds.
        """
        given_up = self.clock() + PATIENCE
        while True:
            try:
                write()
            except WriteError as error:
                now = self.clock()
                if now >= given_up:
                    raise WriteError(f"{error} The run waited {PATIENCE:.0f} s; what was saved is whole") from None
                self._bad(f"{error} The run waits up to {PATIENCE:.0f} s for it")
                while self.clock() < min(self._again, given_up):
                    if stopped():
                        return False
                    self.sleep(0.2)
            else:
                self._good()
                return True

    def _bad(self, line: str) -> None:
        if not self._wait:
            self.note(line)
        self._wait = min(max(2 * self._wait, FIRST_WAIT), LONGEST_WAIT)
        self._again = self.clock() + self._wait

    def _good(self) -> None:
        if self._wait:
            self.note(f"saved again into {self.path.parent}")
        self._wait = 0.0


def keep_weights(network: nn.Module, folder: Path, card: dict[str, Any], settings: Settings) -> None:
    """Keep the evaluation weights of an epoch, if its turn has come, and let older ones go beyond `keep_newest`.

    Args:
        network: The weights.
        folder: Where the run keeps its checkpoints.
        card: What the card shall say; ``epoch`` is read.
        settings: `keep_every` and `keep_newest` are read.

    Raises:
        WriteError: The disk is full or read-only.
    """
    epoch = int(card["epoch"])
    if not settings.keep_every or (epoch + 1) % settings.keep_every:
        return
    save(network, folder / f"{kept_name(epoch)}.safetensors", card | {"checkpoint": kept_name(epoch)})
    if settings.keep_newest:
        for _, path in kept(folder)[: -settings.keep_newest]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def kept(folder: Path) -> list[tuple[int, Path]]:
    """The weights that were kept of single epochs, in their order.

    Args:
        folder: Where the run keeps its checkpoints.

    Returns:
        Epoch and file of each.
    """
    named = ((KEPT.fullmatch(path.stem), path) for path in folder.glob("epoch_*.safetensors"))
    return sorted((int(match[1]), path) for match, path in named if match)


def state_to_resume(out: Path, *, note: Callable[[str], None]) -> str:
    """The file in a run's ``checkpoints`` that it goes on from.

    Args:
        out: Folder of the run.
        note: See `find_state`.

    Returns:
        Its name; empty if the run was stopped before its first save.

    Raises:
        UserError: No state is whole, or all of them have gone.
    """
    checkpoints = out / "checkpoints"
    found = find_state(checkpoints, note=note)
    if found is not None:
        return found.name
    done = len(read_log(out / "log.jsonl", before=2**62))
    if done > 1:  # the first one's line is written before its state
        raise UserError(
            f"the log of {out} has {done} epochs, but there is no {checkpoints / NEWEST} to go on from. Start again "
            f"into another --out; with --init {checkpoints / 'last.safetensors'} training begins from the last weights"
        )
    return ""


def rewind(out: Path, state: State, *, epochs: int, note: Callable[[str], None]) -> dict[str, float]:
    """Make a run's folder fit the state that it goes on from, which may be older than what lies there.

    What was written of epochs that are computed again is removed, so that nobody reads it beside a log that knows
    nothing of it; so is what writers that were killed left behind.

    Args:
        out: Folder of the run.
        state: What it goes on from.
        epochs: Epochs of the run.
        note: Called with a line if the best checkpoint has gone.

    Returns:
        The best checkpoint so far, as of `State`. Empty if its file is of an epoch that is computed again, incomplete
        or gone: the best is then chosen from the epochs to come, which is the same one in the first case.
    """
    checkpoints, tables = out / "checkpoints", out / "instances"
    for folder in (out, checkpoints, tables):
        remove_unfinished(folder)
    if state.epoch >= epochs:
        return state.best
    for file in (*checkpoints.glob("epoch_*"), *tables.glob("epoch_*.npz")):
        match = KEPT.fullmatch(file.stem)
        if match and int(match[1]) >= state.epoch:
            file.unlink(missing_ok=True)
    best = checkpoints / "best.safetensors"
    if not state.best or _is_best(best, int(state.best["epoch"])):
        return state.best
    if not best.exists():
        note(f"{best} is gone: the best checkpoint is chosen from the epochs to come")
    return {}


def _is_best(weights: Path, epoch: int) -> bool:
    """Whether a file holds the weights of an epoch, whole."""
    try:
        card = read_card(weights)
        with weights.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == card["sha256"]
    except (UserError, OSError):
        return False
    return whole and card.get("epoch") == epoch


def read_log(path: Path, *, before: int) -> list[dict[str, Any]]:
    """The lines of a run's log that belong to epochs before one: what comes after is computed again.

    Args:
        path: ``log.jsonl``; it may be missing, or end in the middle of a line.
        before: The epoch.
    """
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["epoch"] < before:
            lines.append(record)
    return lines


def write_log(path: Path, log: list[dict[str, Any]]) -> None:
    """Write all lines of a run's log.

    Raises:
        WriteError: The disk is full or read-only.
    """
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in log).encode())
