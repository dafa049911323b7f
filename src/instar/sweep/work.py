"""The work on one run: train, then evaluate, each as a process of its own, whatever is still to be done."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from instar.errors import UserError
from instar.sweep.grid import words_of
from instar.sweep.plan import Member
from instar.sweep.state import error_of, look

GRACE = 120.0
"""Seconds that a process has to save after it was asked to stop; it needs one step and one checkpoint."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def train_words(member: Member) -> list[str]:
    """What follows ``instar`` to train a run, or to go on with it."""
    going_on = ["--resume"] if (member.folder / "run.json").is_file() else []
    return ["train", *member.train, "--out", str(member.folder), *going_on]


def evaluate_words(member: Member) -> list[str]:
    """What follows ``instar`` to evaluate a run; empty if that was not asked for."""
    wanted = member.evaluation
    if wanted is None:
        return []
    named = ["--suite", wanted.suite, "--checkpoint", wanted.checkpoint]
    return ["evaluate", str(member.folder), *named, *words_of(wanted.settings)]


class Task:
    """One run being worked on.

    The run's log is locked by this process and by those it starts, so that a sweep that is started again while
    processes of a killed one are still at work leaves these alone.

    Args:
        member: The run.
        environment: What its processes see besides this one's environment.
        shielded: Whether its processes ignore the signals by which SLURM announces an end; see `instar.sweep.slurm`.
    """

    def __init__(self, member: Member, *, environment: Mapping[str, str] | None = None, shielded: bool = False) -> None:
        self.member = member
        self._environment = {**os.environ, **(environment or {})}
        self._shielded = shielded
        self._log: BinaryIO | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stage = ""
        self._stopped = False

    def begin(self) -> bool:
        """Take hold of the run and start what it lacks; False if another process is at work on it."""
        self.member.log.parent.mkdir(parents=True, exist_ok=True)
        log = self.member.log.open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.close()
            return False
        log.truncate(0)
        self._log = log
        self._next()
        if self._process is None:
            self._release()
        return True

    @property
    def running(self) -> bool:
        """Whether a process is at work; when one has ended well, the next one is started."""
        if self._process is None:
            return False
        number = self._process.poll()
        if number is None:
            return True
        self._process = None
        if number == 0 and not self._stopped:
            self._next()
        elif number != 0:
            self._ended(number)
        if self._process is None:
            self._release()
        return self._process is not None

    def _release(self) -> None:
        if self._log is not None:
            self._log.close()  # and with it the lock
            self._log = None

    def stop(self) -> None:
        """Ask the process to save and end; the second time, end it."""
        if self._process is not None and self._process.poll() is None:
            if self._stopped:
                self._process.kill()
            else:
                self._process.terminate()
        self._stopped = True

    def wait(self, *, seconds: float) -> None:
        """Wait for the end of a process that was asked to stop, and end it after that time."""
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        _ = self.running

    def _next(self) -> None:
        """Start what is still to be done, each stage once."""
        assert self._log is not None
        try:
            state = look(self.member)
        except UserError as error:
            self._log.write(f"instar: {error}\n".encode())
            return
        if not state.trained and self._stage == "":
            self._start(train_words(self.member))
        elif state.trained and not state.complete and self._stage in ("", "train"):
            self._start(evaluate_words(self.member))

    def _start(self, words: Sequence[str]) -> None:
        assert self._log is not None
        self._stage = words[0]
        self._log.write(f"$ {shlex.join(['instar', *words])}\n".encode())
        self._log.flush()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "instar", *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            pass_fds=(self._log.fileno(),),  # it holds the lock too, and longer than a sweep that is killed
            process_group=0,  # Ctrl-C is for the sweep, which passes it on once
            preexec_fn=_ignore_announcements if self._shielded else None,
        )

    def _ended(self, number: int) -> None:
        """Leave one line that says why, unless the process has done so or was asked to stop."""
        assert self._log is not None
        if self._stopped or number in (128 + signal.SIGINT, 128 + signal.SIGTERM) or error_of(self.member.log):
            return
        if number < 0:
            name = signal.Signals(-number).name
            hint = "; was there too little memory?" if name == "SIGKILL" else ""
            said = f"{self._stage} was ended by {name}{hint}"
        else:
            lines = self.member.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            said = f"{self._stage} ended with status {number}: {last}"
        self._log.write(f"instar: {said}\n".encode())
        self._log.flush()


def _ignore_announcements() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def environment_of(*, threads: int | None, gpu: str | None = None) -> dict[str, str]:
    """What limits a process to its share of the machine."""
    found = {} if threads is None else dict.fromkeys(THREADS, str(threads))
    return found if gpu is None else {**found, "CUDA_VISIBLE_DEVICES": gpu}


def locked(log: Path) -> bool:
    """Whether some process is at work on the run with this log."""
    if not log.is_file():
        return False
    with log.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def finish(task: Task) -> None:
    """Work on a run until nothing is left or something fails.

    Raises:
        UserError: Another process is at work on it.
    """
    if not task.begin():
        raise UserError(f"{task.member.name}: another process is at work on it")
    while task.running:
        time.sleep(0.2)
