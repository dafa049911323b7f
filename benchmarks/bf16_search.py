"""Time APGD-CE + APGD-T that search in bfloat16 against the same in float32, in turns, and compare the robust flags.

    python benchmarks/bf16_search.py WEIGHTS... --n 500 --out runs/bf16-search

The first test images are taken in turns: each portion is attacked in float32 and in bf16, one after the other, the
first of them changing. Times are the CPU seconds of this process, for one thread. Writes ``<out>/bf16_search.json``
after every turn, and goes on from it. Prints a line a target: the median ratio, its range, and the flags that differ.

A weights file without a card is taken as ``--model`` on ``--data``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from weights import add_arguments, named

from instar.data.indexed import as_float
from instar.evaluate import AutoAttack, Entry, Suite, evaluate
from instar.evaluate.targets import Case, Wishes, resolve
from instar.storage import write_atomically
from instar.threat import Ball

BATCH = 250


def apgd(ball: Ball) -> Suite:
    """The two attacks of AutoAttack that use most gradients."""
    return Suite("apgd", (Entry("apgd", "APGD-CE + APGD-T", AutoAttack(ball, stages=("apgd-ce", "apgd-t"))),))


def timed(case: Case, first: int, last: int, precision: str) -> tuple[float, list[bool]]:
    """CPU seconds and robust flags of a portion."""
    rows = case.split.indices[first:last]
    data = (as_float(case.split.images.fetch(rows)), case.split.images.labels[rows])
    begun = time.process_time()
    (record,) = evaluate(
        case.model,
        data=data,
        suite=apgd,
        norm=case.ball.norm,
        eps=case.ball.radius,
        batch_size=BATCH,
        precision=precision,
    )
    return time.process_time() - begun, record.instances["apgd"].tolist()


def main() -> int:
    """Take the turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_arguments(parser)
    parser.add_argument("--turns", type=int, default=5, help="portions that they are attacked in")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    kept = chosen.out / "bf16_search.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.exists() else {}
    size = chosen.n // chosen.turns
    for target in map(Path, chosen.targets):
        name, wishes = named(target, chosen)
        (case,) = resolve(target, Wishes(**wishes))
        turns = found.setdefault(name, [])
        while len(turns) < chosen.turns:
            first = len(turns) * size
            order = ("float32", "bf16") if len(turns) % 2 == 0 else ("bf16", "float32")
            results = {precision: timed(case, first, first + size, precision) for precision in order}
            flags = list(zip(results["float32"][1], results["bf16"][1], strict=True))
            turns.append(
                {
                    "images": size,
                    "seconds": {precision: round(seconds, 2) for precision, (seconds, _) in results.items()},
                    "robust": {precision: sum(robust) for precision, (_, robust) in results.items()},
                    "differ": sum(a != b for a, b in flags),
                }
            )
            write_atomically(kept, (json.dumps(found, indent=2) + "\n").encode())
        ratios = sorted(turn["seconds"]["float32"] / turn["seconds"]["bf16"] for turn in turns)
        robust = {name: sum(turn["robust"][name] for turn in turns) for name in ("float32", "bf16")}
        print(
            f"{target}: {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f}); robust "
            f"{robust['float32']} in float32, {robust['bf16']} in bf16, {sum(turn['differ'] for turn in turns)} of "
            f"{size * len(turns)} flags differ",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
