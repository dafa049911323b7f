"""Whether the number of processes changes a network: every recipe trained by one, two and four, and what differs.

    python benchmarks/equal_weights.py --out docs/results/processes

Every case goes through all of `instar train` (loader, attack, step, instance table, average, selection, checkpoints) in
float64, for an epoch of two steps of 18 instances, which four processes share as 5, 5, 4 and 4. Compared are weights,
BatchNorm's statistics, averages, momentum and whatever a method remembers for all instances: the largest difference of
any number from that of one process. ``in pieces`` is one process with ``--accumulate 3``; ``in shards`` are two
processes with ``--shard full``. The cases are those of ``tests/parallel/worker.py``, which does the work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from instar.methods import RECIPES
from instar.models import create, save
from instar.storage import write_atomically

WORKER = Path(__file__).resolve().parents[1] / "tests" / "parallel" / "worker.py"
ONE = "GroupNorm, 1", "BatchNorm, 1"
COLUMNS: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "GroupNorm, 2": ("group", 2, {}, ONE[0]),
    "GroupNorm, 4": ("group", 4, {}, ONE[0]),
    "BatchNorm, 2": ("batch", 2, {}, ONE[1]),
    "BatchNorm, 4": ("batch", 4, {}, ONE[1]),
    "in pieces": ("group", 1, {"accumulate": 3}, ONE[0]),
    "in shards": ("group", 2, {"shard": "full"}, ONE[0]),
    ONE[0]: ("group", 1, {}, ""),
    ONE[1]: ("batch", 1, {}, ""),
}
"""What is compared: norm, processes, settings, and the column it is held to."""


def cases(recipes: Sequence[str], teacher: Path, seed: int) -> dict[str, dict[str, Any]]:
    """What the worker trains, by name."""
    found: dict[str, dict[str, Any]] = {}
    for recipe in recipes:
        arguments = {"robust": str(teacher), "begin": 0.0} if recipe == "kd_swa" else {}
        for column, (norm, count, settings, _) in COLUMNS.items():
            case = {"recipe": recipe, "norm": norm, "arguments": arguments, "processes": [count]}
            found[f"{recipe}, {column}"] = case | {"settings": settings | {"seed": seed}}
    return found


def difference(run: Path, other: Path) -> float:
    """The largest difference of any number in the states of two runs."""
    a, b = (load_file(folder / "checkpoints" / "state.safetensors") for folder in (run, other))
    if a.keys() != b.keys():
        raise SystemExit(f"{run} and {other} keep different tensors")
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


def table(rows: Mapping[str, Mapping[str, float | str]]) -> str:
    """The differences in Markdown; a text says why there is none."""
    columns = [column for column in COLUMNS if column not in ONE]
    lines = [f"| recipe | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for recipe, row in rows.items():
        told = (f"{item:.1e}" if isinstance(item := row[column], float) else item for column in columns)
        lines.append(f"| {recipe} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def measure(recipes: Sequence[str], folder: Path, seed: int) -> dict[str, dict[str, float | str]]:
    """Train everything into `folder` and compare it, by recipe and column."""
    teacher = folder / "teacher.safetensors"
    save(create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0), teacher, {})
    (folder / "cases.json").write_text(json.dumps(cases(recipes, teacher, seed)))
    counts = sorted({str(count) for _, count, _, _ in COLUMNS.values()})
    for count in counts:
        (folder / count).mkdir()
    done = subprocess.run([sys.executable, str(WORKER), str(folder / "cases.json"), str(folder), *counts], check=False)
    traces = [path.read_text() for path in sorted(folder.rglob("*.traceback"))]
    if done.returncode:
        raise SystemExit("\n".join(traces) or f"the worker failed with status {done.returncode}")
    rows: dict[str, dict[str, float | str]] = {}
    for recipe in recipes:
        rows[recipe] = {}
        for column, (_, count, _, base) in COLUMNS.items():
            name = f"{recipe}, {column}"
            if not base:
                continue
            if (folder / str(count) / f"{name}.0.error").exists():
                rows[recipe][column] = "refused"
                continue
            one = folder / str(COLUMNS[base][1]) / f"{recipe}, {base}"
            rows[recipe][column] = difference(one, folder / str(count) / name)
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder that gets differences.json and differences.md")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(given.recipes, Path(folder), given.seed)
    numbers = [item for row in rows.values() for item in row.values() if isinstance(item, float)]
    found = {
        "largest difference": max(numbers),
        "seed": given.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "differences": rows,
    }
    print(table(rows) + f"\nlargest: {max(numbers):.1e}")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out / "differences.json", (json.dumps(found, indent=2) + "\n").encode())
        write_atomically(given.out / "differences.md", table(rows).encode())


if __name__ == "__main__":
    main()
