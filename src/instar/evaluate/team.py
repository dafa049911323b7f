"""Several processes that share one evaluation: who does which shard, and how the results meet.

Processes share nothing but a small key-value store of ``torch.distributed``. Each claims the next piece of work that
nobody has, and puts its result down; the first process picks the results up. There is no collective operation, so that
slow processes hold nobody up and the number of processes may change from one attempt to the next.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from instar.errors import UserError

PATIENCE = 0.2
"""Seconds between two looks at what the others have done."""
GOODBYE = 60.0
"""Seconds for which the first process, at its end, waits for the others to leave."""


class LostError(UserError):
    """The other processes have stopped, or cannot be reached; whoever stopped first says why."""


class Team:
    """The processes of one evaluation; by itself a single one.

    Args:
        rank: This process, from 0; the first one writes records and reports progress.
        size: Number of processes.
        local: This process among those of its machine, which chooses its GPU.
        store: A ``torch.distributed`` store that all processes reach; None for a single process.

    Example:
        >>> team = Team()
        >>> team.claim("shards"), team.claim("shards"), team.leads
        (0, 1, True)
    """

    def __init__(self, *, rank: int = 0, size: int = 1, local: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local = rank, size, local
        self._store = store
        self._mine: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}
        self._evaluations = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Team:
        """The team that ``torchrun`` or ``instar evaluate --processes`` describes to its processes.

        Args:
            environment: Variables ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``; None
                is the process's own. Without them there is one process.

        Raises:
            UserError: The variables do not fit together, or nobody answers there.
        """
        found = os.environ if environment is None else environment
        if "RANK" not in found or found.get("WORLD_SIZE", "1") == "1":
            return cls()
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://"))
            return cls(rank=rank, size=size, local=int(found.get("LOCAL_RANK", rank)), store=store)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"cannot join the processes that the environment describes: {reason}") from None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self._store is None

    def next_evaluation(self) -> str:
        """A name for what comes next, equal in all processes, which do the same evaluations in the same order."""
        self._evaluations += 1
        return f"{self._evaluations}"

    def claim(self, name: str) -> int:
        """The next number of a count that all processes share, from 0: each number is given out once.

        Raises:
            LostError: Another process has stopped.
        """
        if self._store is None:
            self._counts[name] = self._counts.get(name, -1) + 1
            return self._counts[name]
        self.check()
        return int(self._ask("add", f"count/{name}", 1)) - 1

    def put(self, name: str, content: bytes) -> None:
        """Put something down for the other processes, under a name; what lay there is replaced."""
        if self._store is None:
            self._mine[name] = content
        else:
            self._ask("set", f"content/{name}", content)

    def get(self, name: str) -> bytes | None:
        """What a process put down under a name, or None."""
        if self._store is None:
            return self._mine.get(name)
        key = f"content/{name}"
        return bytes(self._ask("get", key)) if self._ask("check", [key]) else None

    def wait(self, name: str) -> bytes:
        """What a process puts down under a name, once it is there.

        Raises:
            LostError: Another process has stopped.
        """
        while (found := self.get(name)) is None:
            self.check()
            time.sleep(PATIENCE)
        return found

    def agree(self, name: str, content: str, *, what: str) -> None:
        """Make sure that all processes hold the same.

        Raises:
            UserError: This process holds something else than the first one.
        """
        if self.leads:
            self.put(name, content.encode())
        elif self.wait(name) != content.encode():
            raise UserError(
                f"process {self.rank} has other {what} than process 0: start all of them with equal settings"
            )

    def fewest(self, name: str, number: int) -> int:
        """The smallest of the numbers that the processes give, once all have given theirs."""
        self.put(f"{name}/{self.rank}", str(number).encode())
        return min(int(self.wait(f"{name}/{rank}")) for rank in range(self.size))

    def check(self) -> None:
        """Look whether the others are still there.

        Raises:
            LostError: One of them has stopped.
        """
        if self._store is not None and self._ask("check", ["failed"]):
            raise LostError("another process has stopped")

    def fail(self, error: BaseException) -> bool:
        """Tell the others that this process stops.

        Args:
            error: Why.

        Returns:
            Whether this is the first process to stop, and so the one that says why.
        """
        if self._store is None:
            return True
        if isinstance(error, LostError):
            return False
        try:
            first = bool(self._store.add("failures", 1) == 1)
            self._store.set("failed", b"1")
        except RuntimeError:  # whoever holds the store has gone, and has said why
            return False
        return first

    def leave(self) -> None:
        """Say that this process is done; the first one waits for the others, since it may hold the store."""
        if self._store is None:
            return
        try:
            self._store.add("left", 1)
            deadline = time.monotonic() + GOODBYE
            while self.leads and self._store.add("left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(PATIENCE)
        except RuntimeError:  # the first process has waited long enough
            return

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, method)(*arguments)
        except RuntimeError:
            raise LostError("the other processes cannot be reached any more") from None
