"""Reading one batch ahead in a thread that is watched: what goes wrong there is one line, and never an endless wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from instar.errors import UserError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

PATIENCE = 600
"""Seconds that one batch may take, counted one by one while this program runs: a machine that was asleep, or a clock
that was set, takes none of them away."""


def one_ahead(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The result of each item, worked out in a thread while the consumer still has the one before.

    Args:
        work: Called in the thread with each item.
        items: In order.

    Yields:
        The results, in order.

    Raises:
        UserError: As `work`; or it failed otherwise, its thread has died, or it has been at one item for ten minutes.

    Example:
        >>> list(one_ahead(lambda number: number**2, range(3)))
        [0, 1, 4]
    """
    reader: _Reader[_Item, _Result] = _Reader(work)
    try:
        waiting = False
        for item in items:
            if waiting:
                result = reader.answer()
                reader.ask(item)
                yield result
            else:
                reader.ask(item)
            waiting = True
        if waiting:
            yield reader.answer()
    finally:  # also reached when the consumer stops early or is interrupted
        reader.end()


class _Reader(Generic[_Item, _Result]):
    """A thread that works on what it is asked; a daemon, so that one that hangs does not keep the program alive."""

    def __init__(self, work: Callable[[_Item], _Result]) -> None:
        self._asked: queue.SimpleQueue[tuple[_Item] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Result | None, Exception | None]] = queue.SimpleQueue()
        self._work = work
        self._thread = threading.Thread(target=self._run, name="instar-prefetch", daemon=True)
        self._thread.start()

    def ask(self, item: _Item) -> None:
        self._asked.put((item,))

    def end(self) -> None:
        self._asked.put(None)

    def answer(self) -> _Result:
        for _ in range(PATIENCE):
            try:
                result, error = self._done.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._done.empty():
                    raise UserError("the thread that reads images has died; instar train --resume goes on") from None
                continue
            if error is None:
                return result  # type: ignore[return-value]
            if isinstance(error, UserError):
                raise error
            reason = " ".join(str(error).split())[:200] or "no reason given"
            raise UserError(f"images could not be read: {type(error).__name__}: {reason}") from error
        raise UserError(
            f"no images came for {PATIENCE // 60} minutes: the disk, network or dataset that they are read from hangs. "
            "instar train --resume goes on from the last save"
        )

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                self._done.put((self._work(asked[0]), None))
            except Exception as error:
                self._done.put((None, error))
            del asked
