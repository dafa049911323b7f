"""A million mutated expressions and configurations, a hundred thousand mutated files: ``make fuzz``.

Each reader runs in a process of its own under a bound on memory. Writes a table and the crashes, if there are any, into
``--out``; the exit status is 1 if there are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import instar
from tests.safety import targets
from tests.safety.fuzzing import fuzz


def work(name: str, inputs: int, seed: int, memory: int) -> dict[str, Any]:
    """Fuzz one reader in this process.

    Args:
        name: The target's name.
        inputs: How many inputs.
        seed: Of the mutations.
        memory: Bytes of address space that this process may add to what it has.

    Returns:
        A row of the table.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            target = next(found for found in targets.everything(Path(folder)) if found.name == name)
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, resource.RLIM_INFINITY))
        begun = time.perf_counter()
        outcome = fuzz(target, inputs=inputs, seed=seed)
    return {
        "reader": name,
        "inputs": outcome.inputs,
        "accepted": outcome.accepted,
        "refused": outcome.refused,
        "slowest_ms": round(1000 * outcome.slowest, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_mib": round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
        ),
        "crashes": [[content.hex(), what] for content, what in outcome.crashes],
    }


def main() -> int:
    """Fuzz all readers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--expressions", type=int, default=980_000)
    parser.add_argument("--configurations", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=100_000, help="in all, over all readers of files")
    parser.add_argument("--only", default="", help="names of readers with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=2.0, help="GiB that a process may add")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        names = [target.name for target in targets.everything(Path(folder))]
    counts = {"expression": given.expressions, "configuration": given.configurations}
    share = -(-given.files // (len(names) - len(counts)))
    rows = []
    for name in given.only.split(",") if given.only else names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(work, (name, counts.get(name, share), given.seed, int(given.memory * 2**30))))
        print({key: entry for key, entry in rows[-1].items() if key != "crashes"}, len(rows[-1]["crashes"]), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    versions = {"instar": instar.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {"seed": given.seed, "memory_gib": given.memory, "versions": versions, "rows": rows}
    (given.out / "fuzz.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "table.md").write_text(table(rows))
    return 1 if any(row["crashes"] for row in rows) else 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ["reader", "inputs", "read", "refused in one line", "anything else", "slowest", "peak memory"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = [
            row["reader"],
            f"{row['inputs']:,}",
            f"{row['accepted']:,}",
            f"{row['refused']:,}",
            len(row["crashes"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['slowest_ms']} ms | {row['peak_mib']} MiB |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
