"""How many times as fast as the official style, each in a process of its own, as its users run it?

    python benchmarks/official_apart.py --width 16 --turns 5 --out docs/results/speed

``instar bench --baseline`` times both in one process, where the official style profits from the freed memory that
Instar keeps (`instar.devices.keep_freed_memory`). Here the process of the official style has the C library's own way
with memory. Turns alternate; each process makes one step to warm up, and the median of the next ones counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import instar
from instar.bench.clocks import wait
from instar.bench.subject import Case, cases_of, prepare
from instar.devices import choose_device
from instar.doctor.machine import hardware
from instar.storage import write_atomically

LEFT_ALONE = {"MALLOC_ARENA_TEST": "8"}
"""A variable of glibc at its usual value: with one of them set, Instar leaves the allocator as it is."""


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Time both in alternating processes and write ``official_apart_wWIDTH.json``; returns what it holds."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--recipes", default="pgd_at,gairat")
    asked.add_argument("--model", default="resnet18")
    asked.add_argument("--width", type=int, default=16)
    asked.add_argument("--batch-size", type=int, default=128)
    asked.add_argument("--data", default="cifar10")
    asked.add_argument("--turns", type=int, default=5)
    asked.add_argument("--steps", type=int, default=3)
    asked.add_argument("--out", type=Path)
    asked.add_argument("--child", help=argparse.SUPPRESS)
    given = asked.parse_args(words)
    if given.child is not None:
        print(_seconds(Case.from_json(json.loads(given.child)), given.steps))
        return {}
    common = {name: getattr(given, name) for name in ("model", "width", "batch_size", "data")}
    cases = cases_of(dict.fromkeys(given.recipes.split(",")), baseline=True, common=common)
    turns: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(given.turns):
        for case in cases:
            turns[case.name].append(_apart(case, given.steps))
            print(case.name, f"{turns[case.name][-1]:.3f} s a step", flush=True)
    found: dict[str, Any] = {"seconds": turns, "times_as_fast": {}, "threads": torch.get_num_threads()}
    for recipe in given.recipes.split(","):
        ratios = [b / a for a, b in zip(turns[recipe], turns[f"{recipe}, official style"], strict=True)]
        found["times_as_fast"][recipe] = {
            "median": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    print(json.dumps(found["times_as_fast"], indent=2))
    found["what"] = {**common, "steps": given.steps, "clock": "wall", "date": time.strftime("%Y-%m-%d")}
    found["versions"] = {"instar": instar.__version__, "torch": torch.__version__}
    found["machine"] = hardware(choose_device("cpu"))
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        file = given.out / f"official_apart_w{given.width}.json"
        write_atomically(file, (json.dumps(found, indent=2) + "\n").encode())
    return found


def _apart(case: Case, steps: int) -> float:
    """Seconds a step of a case, in a process of its own."""
    command = [sys.executable, __file__, f"--steps={steps}", f"--child={json.dumps(case.to_json())}"]
    alone = LEFT_ALONE if case.style == "official" else {}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | alone)
    return float(done.stdout.splitlines()[-1])


def _seconds(case: Case, steps: int) -> float:
    """The median time of a step after one that warms up."""
    subject = prepare(case)
    subject.rehearse()
    spent = []
    for number in range(steps + 1):
        begun = time.perf_counter()
        subject.step(number)
        wait(subject.device)
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent[1:])


if __name__ == "__main__":
    main()
