"""Records made of chosen verdicts, as an evaluation would have written them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instar.evaluate import Record, Score

Make = Callable[..., Record]


def made(
    columns: Mapping[str, Sequence[int]],
    *,
    target: str = "runs/a",
    suite: str = "mine",
    checkpoint: str = "last",
    index: Sequence[int] | None = None,
    label: Sequence[int] | None = None,
    norm: str = "Linf",
    eps: str = "8/255",
    weights: str | None = None,
    digest: str = "pixels",
    data: str = "digits",
    beside: Sequence[str] = (),
    expressions: Mapping[str, str] | None = None,
) -> Record:
    """A record whose columns, ``clean`` among them, hold these verdicts; those in `beside` do not count."""
    rows = {name: np.array(values, np.uint8) for name, values in columns.items()}
    count = len(rows["clean"])
    counting = [rows[name] for name in rows if name not in beside]
    worst = np.logical_and.reduce(counting).astype(np.uint8)
    attacks = {
        name: {
            "title": name.replace("_", "-"),
            "expression": (expressions or {}).get(name, f"{name}({norm}, {eps})"),
            **({"counts": False} if name in beside else {}),
        }
        for name in rows
        if name != "clean"
    }
    top, bottom = map(int, eps.split("/"))
    protocol: dict[str, Any] = {
        "norm": norm,
        "eps": eps,
        "eps_value": top / bottom,
        "attacks": attacks,
        "n": count,
        "images": f"first {count} test images of Digits" if index is None else f"{count} chosen images of Digits",
        "images_sha256": digest,
        "data": {"name": data, "title": data.title(), "shape": [1, 8, 8], "classes": 10},
        "seed": 0,
        "batch_size": 250,
        "shard_size": 500,
        "checkpoint": {"which": checkpoint, "rule": f"the {checkpoint} one"},
        "weights_sha256": weights or f"{target} {checkpoint}",
        "model": {"architecture": "small_cnn", "arguments": None, "parameters": 10, "classes": 10},
        "training": {"recipe": None},
        "bn_mode": "eval",
        "precision": "float32",
        "reference_autoattack": False,
        "key": f"{target} {suite} {checkpoint} {norm} {eps} {count}",
    }
    labels = np.arange(count) % 10 if label is None else np.array(label)
    scores = {name: Score(name.replace("_", "-"), int(values.sum()), count) for name, values in rows.items()}
    instances = {
        "index": np.arange(count) if index is None else np.array(index),
        "label": labels,
        **rows,
        "worst_case": worst,
    }
    scores["worst_case"] = Score("worst case", int(worst.sum()), count)
    return Record(target, suite, checkpoint, protocol, scores, instances=instances, run={"seconds": {}, "reused": []})


@pytest.fixture
def make() -> Make:
    return made


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """A run folder with a ``run.json`` and records in ``evaluations``."""

    def build(name: str, *records: Record, seed: int = 0, recipe: str = "pgd_at", **training: Any) -> Path:
        folder = tmp_path / name
        (folder / "evaluations").mkdir(parents=True)
        content = {
            "recipe": recipe,
            "method": f"{recipe}()",
            "training": {"epochs": 5, **training, "seed": seed},
            "data": {"name": "digits", "path": str(folder), "classes": [f"digit {label}" for label in range(10)]},
            "model": {"name": "small_cnn"},
        }
        (folder / "run.json").write_text(json.dumps(content))
        for record in records:
            record.write(folder / "evaluations")
        return folder

    return build
