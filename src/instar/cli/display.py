"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from instar.train import EpochDone, Event, StepDone

_PLAIN_EVERY = 60.0


class Display:
    """Shows events of a run.

    Numbers on the device are read twice a second, so that showing them does not hold up training.

    Args:
        console: Where to write.
        epochs: Epochs in the run.
        bar: The live bar, or None to write plain lines.
        heading: First line, written with the first thing that there is to show: settings that are refused get none.
    """

    def __init__(self, console: Console, *, epochs: int, bar: Progress | None, heading: str = "") -> None:
        self._console, self._epochs, self._bar, self._heading = console, epochs, bar, heading
        self._task = bar.add_task("", total=None, status="") if bar is not None else None
        self._pending: list[StepDone] = []
        self._loss = self._robust = float("nan")
        self._clean: float | None = None
        self._images = 0
        self._began = self._shown = self._wrote = time.monotonic()

    def line(self, text: str) -> None:
        """Write one line above the bar."""
        for part in filter(None, (self._heading, text)):
            self._console.print(part, highlight=False, markup=False, soft_wrap=True)
        self._heading = ""

    def __call__(self, event: Event) -> None:
        """Take one event of training."""
        if isinstance(event, EpochDone):
            self._epoch(event)
            return
        self._pending.append(event)
        self._images += event.images
        now = time.monotonic()
        if now - self._shown < 0.5 and event.step + 1 < event.steps:
            return
        self._read()
        self._shown = now
        if self._bar is not None and self._task is not None:
            done = event.epoch * event.steps + event.step + 1
            self._bar.update(self._task, total=self._epochs * event.steps, completed=done, status=self._status(event))
        elif now - self._wrote > _PLAIN_EVERY and event.step + 1 < event.steps:
            self._wrote = now
            self.line(f"  step {event.step + 1}/{event.steps}: {self._status(event)}")

    def _read(self) -> None:
        """Running means over roughly the last hundred steps."""
        for event in self._pending:
            loss, robust = float(event.loss.float().mean()), float(event.correct.float().mean())
            fresh = self._loss != self._loss  # NaN: nothing was shown yet
            self._loss = loss if fresh else 0.97 * self._loss + 0.03 * loss
            self._robust = robust if fresh else 0.97 * self._robust + 0.03 * robust
        self._pending.clear()

    def _status(self, event: StepDone) -> str:
        speed = self._images / max(time.monotonic() - self._began, 1e-9)
        left = (self._epochs - event.epoch) * event.steps - event.step - 1
        clean = "" if self._clean is None else f"clean {self._clean:.1%}  "
        return (
            f"epoch {event.epoch + 1}/{self._epochs}  loss {self._loss:.3f}  {clean}robust {self._robust:.1%}  "
            f"{speed:,.0f} images/s  {_duration(left * event.images / max(speed, 1e-9))} left"
        )

    def _epoch(self, event: EpochDone) -> None:
        record = event.record
        self._clean = record["selection_clean"]
        self._wrote = time.monotonic()
        self.line(
            f"epoch {record['epoch'] + 1:>3}/{event.epochs}  loss {record['train_loss']:.3f}  "
            f"train robust {record['train_robust']:.1%}  held-out clean {record['selection_clean']:.1%}  "
            f"robust {record['selection_robust']:.1%}  κ {record['train_kappa']:.1f}  {_duration(record['seconds'])}"
        )


def _duration(seconds: float) -> str:
    """Seconds as people say them.

    Example:
        >>> _duration(75), _duration(3700)
        ('1:15', '1:01:40')
    """
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def display(*, epochs: int, stream: TextIO, heading: str = "") -> Iterator[Display]:
    """A display for one run on `stream`, live if that is a terminal."""
    console = Console(file=stream)
    if not console.is_terminal:
        yield Display(console, epochs=epochs, bar=None, heading=heading)
        return
    bar = Progress(BarColumn(bar_width=None), TextColumn("{task.fields[status]}"), console=console, transient=True)
    with bar:
        yield Display(console, epochs=epochs, bar=bar, heading=heading)
