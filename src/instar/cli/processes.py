"""Starting a command several times on this machine, the processes sharing its work."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from instar.errors import UserError

GRACE = 10.0
"""Seconds between asking a process to stop and stopping it."""


def start(words: Sequence[str], *, processes: int) -> int:
    """Run ``instar WORDS`` in several processes, as ``torchrun --nproc-per-node`` does on one machine.

    Args:
        words: The command with its arguments.
        processes: How many.

    Returns:
        The exit status: that of the first process, or of the first one that failed, after which the others are stopped.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented there

    # Held here, so that no process has to outlive the others; the port is chosen by the system.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(days=1))
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    running: list[subprocess.Popen[bytes]] = []
    try:
        with _stopped_by(signal.SIGTERM):
            for rank in range(processes):
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(subprocess.Popen([sys.executable, "-m", "instar", *words], env=ranked))
            return _first_failure(running)
    finally:
        _stop(running)


def check(processes: int) -> None:
    """Refuse a number of processes that means nothing.

    Raises:
        UserError: It is below 1.
    """
    if processes < 1:
        raise UserError(f"processes must be at least 1; got {processes}")


def _first_failure(running: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all processes have ended well, or one badly; its status, 128 + signal if it was killed."""
    while True:
        statuses = [process.poll() for process in running]
        bad = [status for status in statuses if status]
        if bad:
            if min(bad) < 0:
                print(
                    f"instar: a process was ended by signal {-min(bad)}; nothing that was saved is lost",
                    file=sys.stderr,
                )
            return bad[0] if bad[0] > 0 else 128 - bad[0]
        if None not in statuses:
            return 0
        time.sleep(0.1)


def _stop(running: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs, first kindly."""
    for process in running:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _stopped_by(number: signal.Signals) -> Iterator[None]:
    """A signal that would end this process and leave the others behind ends them first."""

    def interrupt(received: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)
