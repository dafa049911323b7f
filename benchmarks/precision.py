"""Whether bfloat16 and the folded attack cost robustness: short runs with and without them, from the same seeds.

    python benchmarks/precision.py --out runs/precision

Each seed trains twice: as `instar train` does by itself (bfloat16 where the processor computes in it, attacks on the
folded copy), and in float32 with attacks on the model itself. Both are judged in float32 by the same attacks on the
same images. The command goes on where it stopped; ``precision.json`` and a table are written at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import instar
from instar.evaluate import Record, evaluate
from instar.storage import write_atomically
from instar.train import train

ARMS: dict[str, dict[str, Any]] = {
    "bfloat16, folded": {"precision": "bf16", "fold": True},
    "float32, not folded": {"precision": "float32", "fold": False},
}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and judge every run; returns what ``precision.json`` holds."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--recipe", default="pgd_at")
    asked.add_argument("--data", default="cifar10")
    asked.add_argument("--model", default="resnet18")
    asked.add_argument("--width", type=int, default=8)
    asked.add_argument("--epochs", type=int, default=1)
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--suite", default="development")
    asked.add_argument("--n", type=int, default=500)
    given = asked.parse_args(words)
    usual = {name: getattr(given, name) for name in ("data", "model", "width", "epochs")}
    rows: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        for arm, settings in ARMS.items():
            out = given.out / f"seed{seed}-{settings['precision']}"
            started = (out / "run.json").exists()
            train(given.recipe, out=out, resume=started, seed=seed, **usual, **settings)
            (record,) = evaluate(out, suite=given.suite, n=given.n, checkpoint="last", precision="float32")
            rows.append({"seed": seed, "arm": arm, **_scores(record)})
            print(rows[-1], flush=True)
    measures = [name for name in rows[0] if name not in ("seed", "arm")]
    found = {
        "what": {**usual, "recipe": given.recipe, "suite": given.suite, "n": given.n, "checkpoint": "last"},
        "rows": rows,
        "difference": {name: _difference(rows, name) for name in measures},
        "versions": {"instar": instar.__version__, "torch": torch.__version__},
    }
    write_atomically(given.out / "precision.json", (json.dumps(found, indent=2) + "\n").encode())
    for name, one in found["difference"].items():
        print(f"{name}: {one['points']:+.1f} points with bfloat16 and folding, ± {one['error']:.1f} (standard error)")
    return found


def _scores(record: Record) -> dict[str, float]:
    return {name: 100 * score.accuracy for name, score in record.scores.items()}


def _difference(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """By how many points the first arm is above the second: mean over seeds, and its standard error."""
    first, second = ([row[name] for row in rows if row["arm"] == arm] for arm in ARMS)
    each = [a - b for a, b in zip(first, second, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return {"points": statistics.fmean(each), "error": error, "each": each}


if __name__ == "__main__":
    main()
