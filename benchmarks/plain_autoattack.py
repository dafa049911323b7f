"""Judge models by `instar evaluate` and by plain `pyautoattack`, and compare the robust flags image by image.

    python benchmarks/plain_autoattack.py WEIGHTS... --n 500 --out runs/plain-autoattack

Each target is judged twice on the same first test images, in float32: by our `standard` suite with all images in one
shard, and by `run_standard_evaluation` of the reference, called as its documentation says, with the same batch size
and seed. Our evaluation resumes; what the reference found is kept as ``<out>/<name>/plain.npz`` and not computed again.
Writes ``<out>/plain_autoattack.json`` and prints one line a target. Exit status 1 if any flag differs.

A weights file without a card is taken as ``--model`` on ``--data``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyautoattack
import torch
from weights import add_arguments, named

from instar.data.indexed import as_float
from instar.evaluate import evaluate
from instar.evaluate.evaluation import some_of
from instar.evaluate.targets import Case, Wishes, resolve

BATCH, SEED = 64, 0


def plain(case: Case, n: int, kept: Path) -> tuple[np.ndarray, float]:
    """Which of the first images withstand the reference itself (n,), boolean, and the CPU seconds it took."""
    if kept.exists():
        with np.load(kept, allow_pickle=False) as stored:
            return stored["robust"], float(stored["seconds"])
    split = some_of(case.split, n)
    x, y = as_float(split.images.fetch(split.indices)), split.labels
    begun = time.process_time()
    attack = pyautoattack.AutoAttack(
        case.model.eval(), norm=case.ball.norm, eps=case.ball.radius, seed=SEED, device=torch.device("cpu")
    )
    _, predicted = attack.run_standard_evaluation(x, y, batch_size=BATCH)
    robust, seconds = (predicted == y).numpy(), time.process_time() - begun
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez(kept, robust=robust, seconds=seconds)
    return robust, seconds


def compared(target: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One target judged by both."""
    name, wishes = named(target, chosen)
    (case,) = resolve(target, Wishes(**wishes))
    folder = chosen.out / name
    (record,) = evaluate(
        target, suite="standard", n=chosen.n, seed=SEED, batch_size=BATCH, shard_size=chosen.n, out=folder, **wishes
    )
    robust, seconds = plain(case, chosen.n, folder / "plain.npz")
    ours = record.instances["autoattack"]
    return {
        "target": folder.name,
        "images": chosen.n,
        "robust_by_instar": int(ours.sum()),
        "robust_by_reference": int(robust.sum()),
        "flags_that_differ": int((ours != robust).sum()),
        "right": {column: score.correct for column, score in record.scores.items()},
        "verdict": record.verdict.line,
        "cpu_seconds_of_reference": round(seconds),
    }


def main() -> int:
    """Judge every target twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    chosen = parser.parse_args()
    found = []
    for target in chosen.targets:
        found.append(compared(target, chosen))
        line = found[-1]
        print(
            f"{line['target']}: {line['robust_by_instar']} robust by instar, {line['robust_by_reference']} by the "
            f"reference, {line['flags_that_differ']} of {line['images']} flags differ; {line['verdict']}",
            flush=True,
        )
        (chosen.out / "plain_autoattack.json").write_text(json.dumps(found, indent=2) + "\n")
    return int(any(line["flags_that_differ"] for line in found))


if __name__ == "__main__":
    sys.exit(main())
