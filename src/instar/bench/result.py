"""What a benchmark found, as values, JSON and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from instar.bench.clocks import Ratio, Turn, ratio_of
from instar.bench.subject import Case
from instar.passes import Passes
from instar.storage import write_atomically


@dataclass(frozen=True)
class Row:
    """One case, measured.

    Attributes:
        case: What was run.
        turns: Seconds of a step, turn by turn.
        passes: Passes through the network in a step; None for the official style.
        operations: Floating-point operations of a step's convolutions and products, counted while it ran.
        peak_memory: Bytes at most, of a process that does nothing else (of the device, on a GPU); None if not measured.
        step_memory: What the steps added to it, in bytes.
        precision: Of its convolutions.
    """

    case: Case
    turns: tuple[Turn, ...]
    passes: Passes | None
    operations: int
    peak_memory: int | None
    step_memory: int | None
    precision: str

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.case.name

    def seconds(self, clock: str = "wall") -> float:
        """The median over turns of a step's time."""
        return statistics.median(self.times(clock))

    def times(self, clock: str = "wall") -> list[float]:
        """A step's time in each turn."""
        return [getattr(turn, clock) for turn in self.turns]


@dataclass(frozen=True)
class Benchmark:
    """A table of cases that were timed in turns, and what the machine was like.

    Attributes:
        rows: The cases.
        clock: ``"wall"`` or ``"cpu"``: which time the ratios and rates are of.
        steps: Steps of a case in a turn.
        matmul: Operations a second of products of matrices on this machine in the same run, by precision.
        loader: Images a second that the loader gives, augmented, on its own.
        machine: Hardware, versions, threads and load.
        notes: What a reader should know.
    """

    rows: tuple[Row, ...]
    clock: str
    steps: int
    matmul: Mapping[str, float]
    loader: float
    machine: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def images_a_second(self, row: Row) -> float:
        """Images that a case trains on in a second."""
        return row.case.batch_size / row.seconds(self.clock)

    def rate(self, row: Row) -> float:
        """Operations a second that a case achieves."""
        return row.operations / row.seconds(self.clock)

    def share(self, row: Row) -> float:
        """The same as a share of the rate of matrix products in the case's precision."""
        return self.rate(row) / self.matmul[row.precision]

    def ratio(self, above: Row, below: Row) -> Ratio:
        """How many times as long `above` takes as `below`, paired by turn."""
        return ratio_of(above.times(self.clock), below.times(self.clock))

    def baseline(self, row: Row) -> Row | None:
        """The official style of a row's recipe."""
        found = (other for other in self.rows if other.case.recipe == row.case.recipe)
        return next((other for other in found if other.case.style == "official"), None)

    def speedup(self, row: Row) -> Ratio | None:
        """How many times as fast a row is as the official style of its recipe; None without one, and for itself."""
        below = self.baseline(row)
        return None if below is None or below is row else self.ratio(below, row)

    def against_first(self, row: Row) -> Ratio | None:
        """How many times as long a row takes as the first one; None for the first."""
        return None if row is self.rows[0] else self.ratio(row, self.rows[0])

    def what(self) -> str:
        """What was run, in a line."""
        case = self.rows[0].case
        width = "" if case.width is None else f" of width {case.width}"
        data = "random images" if case.data == "random" else case.data
        faster = "" if case.accelerate == "none" else f", accelerate={case.accelerate}"
        return f"{case.model}{width}, batch {case.batch_size}, {data}, schedules at {case.at:.0%} of the run{faster}"

    def how(self) -> str:
        """How it was timed and on what, in a line."""
        known, turns = self.machine, len(self.rows[0].turns)
        clock = "the wall clock" if self.clock == "wall" else "processor time"
        load = (
            ""
            if known.get("load") is None
            else f", load {known['load'][0]:.1f} before and {known['load'][1]:.1f} after"
        )
        return (
            f"medians of {turns} turns of {self.steps} steps by {clock}, cases one after the other in each turn; "
            f"{known['device']}, {known['threads']} of {known['cores']} cores{load}; torch {known['torch']}, "
            f"Instar {known['instar']}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, every turn included."""
        rows = []
        for row in self.rows:
            speedup, first = self.speedup(row), self.against_first(row)
            derived = {
                "name": row.name,
                "steps_per_second": 1 / row.seconds(self.clock),
                "images_per_second": self.images_a_second(row),
                "operations_per_second": self.rate(row),
                "share_of_matmul_rate": self.share(row),
                "speedup_over_official": None if speedup is None else asdict(speedup),
                "time_over_first": None if first is None else asdict(first),
                "units": None if row.passes is None else row.passes.units,
            }
            rows.append(derived | asdict(row))
        return {
            "what": self.what(),
            "how": self.how(),
            "clock": self.clock,
            "steps": self.steps,
            "matmul_rate": dict(self.matmul),
            "loader_images_per_second": self.loader,
            "machine": dict(self.machine),
            "notes": list(self.notes),
            "rows": rows,
        }

    def markdown(self) -> str:
        """The table, with a line on what and how."""
        first = self.rows[0].name
        head = [
            "| step | s | images/s | passes | memory | GFLOP | GFLOP/s | of matmul | times as fast as official style "
            f"| time over {first} |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines = [self._line(row) for row in self.rows]
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.matmul.items())
        consumed = max(self.images_a_second(row) for row in self.rows)
        foot = [
            f"Matrix products on this machine in the same run: {rates}. The loader alone gives {self.loader:,.0f} "
            f"images/s, {self.loader / consumed:,.0f} times what the fastest step takes. Passes: forward + backward to "
            "the input + backward to the weights. In brackets the 95 % interval of the paired ratio.",
            *self.notes,
        ]
        return "\n".join([f"{self.what()}; {self.how()}", "", *head, *lines, "", "\n\n".join(foot), ""])

    def _line(self, row: Row) -> str:
        counted = row.passes
        passed = "" if counted is None else f"{counted.forward} + {counted.backward_input} + {counted.backward_full}"
        if counted is not None and counted.double_backward:
            passed += f" + {counted.double_backward} double"
        memory = "" if row.peak_memory is None else f"{row.peak_memory / 2**20:,.0f} MiB"
        cells = [
            row.name,
            f"{row.seconds(self.clock):.3g}",
            f"{self.images_a_second(row):,.0f}",
            passed,
            memory,
            f"{row.operations / 1e9:,.4g}",
            f"{self.rate(row) / 1e9:,.0f}",
            f"{self.share(row):.0%}",
            str(self.speedup(row) or ""),
            str(self.against_first(row) or ""),
        ]
        return f"| {' | '.join(cells)} |"

    def write(self, folder: Path) -> list[Path]:
        """Write ``bench.json``, ``bench.md`` and ``bench.png`` into a folder.

        Raises:
            UserError: It cannot be written.
        """
        from instar.bench.draw import bars
        from instar.report.style import write_png

        picture = write_png(bars(self), folder / "bench.png")
        write_atomically(folder / "bench.json", (json.dumps(self.to_json(), indent=2) + "\n").encode())
        write_atomically(folder / "bench.md", self.markdown().encode())
        return [folder / "bench.md", folder / "bench.json", picture]
