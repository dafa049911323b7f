"""How the cost of training grows with the batch, the width, the attack's steps and the data set, and over many steps.

    python benchmarks/growth.py --out docs/results/growth
    python benchmarks/growth.py --only rows,loader,long --out runs/growth

Every point is measured in a process of its own, so that its peak memory is its own. Times are medians over steps: of
the processor on a CPU, which other programs disturb less than the clock on the wall, and of the clock on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

import instar
from instar.bench.child import resident
from instar.bench.clocks import wait
from instar.bench.subject import Case, Subject, images_of, prepare
from instar.data import ResidentImages, TrainSplit, augmentation, batches
from instar.data.indexed import generic_info
from instar.instances import InstanceTable
from instar.methods import RECIPES
from instar.report.style import GREY, RUNS, Sheet, styled, write_png
from instar.storage import write_atomically

GROWING: dict[str, tuple[int, ...]] = {
    "batch": (32, 64, 128, 256, 512, 1024),
    "width": (16, 32, 64, 128),
    "steps": (1, 2, 5, 10, 20, 40),
    "rows": (10_000, 100_000, 1_000_000, 5_000_000),
    "long": (1000,),
    "loader": (128,),
}
"""What grows, and the points that are measured."""
LABELS = {
    "batch": ("batch size", "ms an image", "MiB an image"),
    "width": ("width", "ms an image", "MiB an image"),
    "steps": ("attack steps", "ms an image", "MiB an image"),
    "rows": ("rows of the data set", "ms a batch", "bytes a row"),
    "long": ("training steps", "ms a step", "MiB"),
}
"""What each panel is about, and what its two figures are in."""
TINY = {"batch": (4, 8), "width": (2, 4), "steps": (1, 2), "rows": (1000, 2000), "long": (40,), "loader": (8,)}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all points, write ``growth.json`` and ``growth.png``; returns what was measured."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", default=",".join(GROWING), help=f"some of {', '.join(GROWING)}")
    asked.add_argument("--width", type=int, default=16)
    asked.add_argument("--batch-size", type=int, default=64)
    asked.add_argument("--model", default="resnet18")
    asked.add_argument("--precision", default="auto")
    asked.add_argument("--device", default="auto")
    asked.add_argument("--repeats", type=int, default=3)
    asked.add_argument("--tiny", action="store_true", help="the smallest points alone, to try the program")
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--point", default=None, help=argparse.SUPPRESS)
    given = asked.parse_args(words)
    if given.point is not None:
        what, value = given.point.split("=")
        print(json.dumps(MEASURED[what](given, int(value))))
        return {}
    chosen = given.only.split(",")
    for what in chosen:
        if what not in GROWING:
            asked.error(f"--only takes some of {', '.join(GROWING)}; got {what!r}")
    found: dict[str, Any] = {"points": {}, "load": list(_load())}
    for what in chosen:
        points = (TINY if given.tiny else GROWING)[what]
        found["points"][what] = {value: _elsewhere(given, what, value) for value in points}
        print(what, {value: _short(point) for value, point in found["points"][what].items()}, flush=True)
    found["what"] = f"PGD-AT, {given.model} of width {given.width}, batch {given.batch_size}, {_device_of(given)}"
    found["versions"] = {"instar": instar.__version__, "torch": torch.__version__}
    found["threads"], found["load_after"] = torch.get_num_threads(), list(_load())
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out / "growth.json", (json.dumps(found, indent=2) + "\n").encode())
    write_png(draw(found), given.out / "growth.png")
    return found


def _elsewhere(given: argparse.Namespace, what: str, value: int) -> dict[str, Any]:
    """A point, measured by another process of this program."""
    words = [f"--{name}={getattr(given, name.replace('-', '_'))}" for name in _PASSED]
    command = [sys.executable, __file__, *words, f"--point={what}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # too little memory, for example: the other points still tell something
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    point: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return point


_PASSED = ("width", "batch-size", "model", "precision", "device", "repeats", "out")


def _case(given: argparse.Namespace, **changes: Any) -> Case:
    steps = changes.pop("steps", 10)
    usual = {name: getattr(given, name) for name in ("width", "batch_size", "model", "precision", "device")}
    return Case("pgd_at", repr(RECIPES["pgd_at"](steps=steps)), **{**usual, **changes})


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        wait(device)
        return time.process_time() if device.type == "cpu" else time.perf_counter()

    return now


def _spent(subject: Subject, count: int, first: int = 0) -> list[float]:
    now, spent = _clock(subject.device), []
    for number in range(first, first + count):
        begun = now()
        subject.step(number)
        spent.append(now() - begun)
    return spent


def _taken(device: torch.device) -> tuple[int, int]:
    """Bytes now, and at most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return resident()


def step_cost(given: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Seconds and bytes an image of a training step."""
    case = _case(given, **changes)
    subject = prepare(case)
    before = _taken(subject.device)[0]
    _spent(subject, 1)
    seconds = statistics.median(_spent(subject, given.repeats, first=1))
    added = max(_taken(subject.device)[1] - before, 0)
    return {
        "seconds": seconds,
        "seconds_an_image": seconds / case.batch_size,
        "bytes": added,
        "bytes_an_image": added / case.batch_size,
    }


def rows_cost(given: argparse.Namespace, rows: int) -> dict[str, Any]:
    """What a data set of so many rows costs beside its pixels: instance table, order, first batch, further batches."""
    info = generic_info("grown", classes=("a", "b"), shape=(1, 4, 4), train_size=rows)
    images = ResidentImages(torch.zeros(rows, 1, 4, 4, dtype=torch.uint8), torch.arange(rows) % 2, info)
    split, size, now = TrainSplit(images), given.batch_size, time.process_time
    before = resident()[0]
    table = InstanceTable(rows)
    begun = now()
    stream = batches(split, batch_size=size, epoch=0, seed=0, shuffle=True, drop_last=True)
    next(stream)
    first = now() - begun
    spent: dict[str, list[float]] = {"load": [], "read": [], "write": []}
    for _ in range(max(100, given.repeats)):
        begun = now()
        batch = next(stream)
        spent["load"].append(now() - begun)
        assert batch.index is not None
        begun = now()
        known = table.rows(batch.index)
        spent["read"].append(now() - begun)
        begun = now()
        table.write(batch.index, known)
        spent["write"].append(now() - begun)
    held = sum(column.nbytes for column in table.columns.values())
    return {
        "first_batch": first,
        **{name: statistics.median(times) for name, times in spent.items()},
        "table_bytes_a_row": held / rows,
        "bytes_a_row": max(resident()[1] - before, 0) / rows,
    }


def long_cost(given: argparse.Namespace, count: int) -> dict[str, Any]:
    """Time and memory along many steps: neither may grow. The steps are small, so that there can be many."""
    subject = prepare(_case(given, width=4, batch_size=16, steps=2))
    _spent(subject, 5)
    tenth = max(count // 10, 1)
    times, memory = [], []
    for part in range(10):
        times.append(statistics.median(_spent(subject, tenth, first=5 + part * tenth)))
        memory.append(_taken(subject.device)[0])
    return {"steps": 10 * tenth, "seconds": times, "bytes": memory, "grown": memory[-1] - memory[1]}


def loader_cost(given: argparse.Namespace, size: int) -> dict[str, Any]:
    """Images a second that the loader alone gives, beside those that training takes in."""
    case = _case(given, batch_size=size)
    subject = prepare(case)
    _spent(subject, 1)
    consumed = size / statistics.median(_spent(subject, given.repeats, first=1))
    images, now, spent = images_of(case), _clock(subject.device), []
    usual: dict[str, Any] = {"seed": 0, "shuffle": True, "drop_last": True, "device": subject.device}
    for epoch in range(5):
        stream = batches(
            TrainSplit(images), batch_size=size, epoch=epoch, augment=augmentation("standard", images.info), **usual
        )
        next(stream)
        begun = now()
        for _ in stream:
            spent.append(now() - begun)
            begun = now()
    given_a_second = size / statistics.median(spent)
    return {"given": given_a_second, "consumed": consumed, "times": given_a_second / consumed}


MEASURED: dict[str, Callable[[argparse.Namespace, int], dict[str, Any]]] = {
    "batch": lambda given, value: step_cost(given, batch_size=value),
    "width": lambda given, value: step_cost(given, width=value),
    "steps": lambda given, value: step_cost(given, steps=value),
    "rows": rows_cost,
    "long": long_cost,
    "loader": loader_cost,
}


@styled
def draw(found: dict[str, Any]) -> Figure:
    """Time (above) and memory (below) against what grows, each in a panel of its own."""
    shown = [what for what in LABELS if what in found["points"]]
    loader = found["points"].get("loader", {})
    given = [point["times"] for point in loader.values() if "failed" not in point]
    rate = "".join(f" The loader alone gives {times:,.0f} times what training takes." for times in given)
    sheet = Sheet(
        4.6,
        title="What training costs as the work grows",
        subtitle="Above: time. Below: memory. Dashed: in proportion to the work, from the first point on." + rate,
        footer=[
            found["what"],
            f"load {found['load'][0]:.1f} to {found['load_after'][0]:.1f} · torch {torch.__version__}",
        ],
    )
    grid = sheet.grid(2, max(len(shown), 1), wspace=0.38, hspace=0.62)
    for place, what in enumerate(shown):
        points = {int(value): point for value, point in found["points"][what].items() if "failed" not in point}
        above = sheet.figure.add_subplot(grid[0, place], label=f"{what} time")
        below = sheet.figure.add_subplot(grid[1, place], label=f"{what} memory")
        if what == "long":
            at = [(k + 1) * point["steps"] / 10 for point in points.values() for k in range(10)]
            above.plot(at, [1e3 * t for point in points.values() for t in point["seconds"]], **_LINE)
            below.plot(at, [m / 2**20 for point in points.values() for m in point["bytes"]], **_LINE)
        elif what == "rows":
            for name, colour in zip(("read", "write", "load"), RUNS, strict=False):
                above.plot(
                    list(points), [1e3 * p[name] for p in points.values()], **_LINE | {"color": colour}, label=name
                )
            below.plot(list(points), [p["bytes_a_row"] for p in points.values()], **_LINE)
            above.legend(fontsize=7, loc="lower left")
        else:
            each = [1e3 * p["seconds_an_image"] for p in points.values()]
            above.plot(list(points), each, **_LINE)
            below.plot(list(points), [p["bytes_an_image"] / 2**20 for p in points.values()], **_LINE)
            above.plot(list(points), _expected(what, list(points), each), "--", color=RUNS[4], linewidth=1)
        for axes, unit in zip((above, below), LABELS[what][1:], strict=True):
            _axes(axes, what, list(points), unit)
    return sheet.figure


_LINE: dict[str, Any] = {"marker": "o", "markersize": 4, "color": RUNS[0]}


def _expected(what: str, points: Sequence[int], measured: Sequence[float]) -> list[float]:
    """Times in proportion to the work, from the first point on."""
    if not measured:
        return []
    first = points[0]
    if what == "steps":  # K steps make K forward and backward passes, and one that trains, which counts 1.5
        return [measured[0] * (2 * k + 3) / (2 * first + 3) for k in points]
    return [measured[0] * (k / first) ** {"batch": 0, "width": 2}[what] for k in points]


def _axes(axes: Axes, what: str, points: Sequence[int], unit: str) -> None:
    """What grows along the bottom, in words and whole numbers; the unit above the panel."""
    axes.set_title(unit, loc="left", fontsize=8, color=GREY, fontweight="normal")
    axes.set_xlabel(LABELS[what][0])
    axes.tick_params(labelsize=7.5)
    if what == "long":
        axes.set_xlim(left=0)
    else:
        axes.set_xscale("log")
        every = 2 if len(points) > 4 else 1
        named = [point if k % every == 0 else None for k, point in enumerate(points)]
        axes.set_xticks(list(points), ["" if point is None else _counted(point) for point in named])
        axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if what == "width":
        axes.set_yscale("log")
        ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000) if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.15 * high)


def _counted(number: int) -> str:
    """A count in few characters: 10k, 5M."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if number >= 10 * size or (number >= size and number % size == 0):
            return f"{number // size}{letter}"
    return str(number)


def _short(point: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{item:.3g}") if isinstance(item, float) else item for name, item in point.items()}


def _device_of(given: argparse.Namespace) -> str:
    return str(instar.devices.choose_device(given.device))


def _load() -> tuple[float, float, float]:
    return os.getloadavg()


if __name__ == "__main__":
    main()
