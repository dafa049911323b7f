"""Being asked to stop: signals are collected, so that a step can be finished and saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):  # noqa: N818
    """Training was asked to stop, saved its state and stopped.

    Attributes:
        signal_number: The signal that asked, for the exit status.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def signal_name(number: int) -> str:
    """What a signal is called.

    Example:
        >>> signal_name(15)
        'SIGTERM'
    """
    return signal.Signals(number).name


@contextlib.contextmanager
def stop_requests(*, patient: bool) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that a step can be finished and saved.

    Args:
        patient: Whether further signals are ignored, as under ``torchrun``, which passes on what the terminal has sent
            already, and kills after a grace period of its own. Otherwise the second one stops at once.
    """
    requested: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if requested and not patient:
            raise KeyboardInterrupt
        requested.append(number)

    found = {}
    with contextlib.suppress(ValueError):  # handlers can only be set in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            found[number] = signal.signal(number, note)
    try:
        yield requested
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)
