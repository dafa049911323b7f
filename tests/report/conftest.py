"""Run folders whose every number is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import HOSTILE, train_on

from instar.evaluate.record import Record, Score
from instar.evaluate.sanity import Finding

GAIRAT = "Method(PGD(steps=4), GeometryWeight(Steps(inf, changes=((0.5, -1.0),))) * CrossEntropy())"

Table = dict[str, Any]


def write_run(
    folder: Path,
    *,
    robust: Sequence[float] = (0.1, 0.3, 0.3, 0.2),
    tables: Sequence[Table] = (),
    method: str = GAIRAT,
    epochs: int | None = None,
    **changes: Any,
) -> Path:
    """A run with one finished epoch for each of `robust`, and the instance tables of its first epochs."""
    total = len(robust) if epochs is None else epochs
    config = {
        "recipe": "gairat",
        "method": method,
        "training": {"epochs": total, "seed": 3, "root": None, "size": None},
        "data": {"name": "digits", "path": "digits", "train_images": 1294, "classes": []},
        "model": {"name": "small_cnn", "arguments": {"width": 8}, "parameters": 10},
        "threat": {"norm": "Linf", "eps": 0.2},
        "selection": {"n": 100, "rule": "margin PGD-10", "seed": 3},
        "precision": "float32",
        "versions": {"instar": "0.1.0"},
    }
    config.update(changes)
    (folder / "instances").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(config))
    lines = [
        {
            "epoch": epoch,
            "lr": 0.1 / (epoch + 1),
            "train_loss": 2.0 - 0.25 * epoch,
            "train_robust": share / 2,
            "train_kappa": 1.0,
            "selection_clean": 0.5 + 0.1 * epoch,
            "selection_robust": share,
            "seconds": 1.0,
        }
        for epoch, share in enumerate(robust)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch, table in enumerate(tables):
        write_table(folder, epoch, **table)
    return folder


def write_table(
    folder: Path, epoch: int, *, kappa: Sequence[int], loss: Sequence[float], seen: Sequence[int] | None = None
) -> None:
    np.savez_compressed(
        folder / "instances" / f"epoch_{epoch:03d}.npz",
        seen=np.array([epoch] * len(kappa) if seen is None else seen, dtype=np.int32),
        kappa=np.array(kappa, dtype=np.int16),
        loss=np.array(loss, dtype=np.float32),
        correct=np.zeros(len(kappa), dtype=np.uint8),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four epochs of GAIRAT with K = 4 on eight images, of which the last is never trained on."""
    return write_run(
        tmp_path / "gairat",
        tables=[
            {
                "seen": [epoch] * 7 + [-1],
                "kappa": [0, 0, 0, 1, 2, 4, 4, 4],
                "loss": [4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.125, 99.0],
            }
            for epoch in range(4)
        ],
    )


def make_record(
    *,
    checkpoint: str = "best",
    counts: dict[str, int],
    n: int = 200,
    gap: tuple[float, float] | None = None,
    **other: Any,
) -> Record:
    """An evaluation with these counts of right images, and the PGD − AutoAttack gap with its standard error."""
    titles = {"clean": "clean", "pgd_20": "PGD-20", "autoattack": "AutoAttack", "worst_case": "worst case"}
    findings = ()
    if gap is not None:
        findings = (Finding("pgd_minus_autoattack", "suspect", *gap, 0.045, 0.06, "text", "a rule of thumb"),)
    protocol = {
        "norm": "Linf",
        "eps": "8/255",
        "images": f"first {n} images",
        "images_sha256": "abc123",
        "data": {"name": "cifar10"},
        "model": {"architecture": "resnet18"},
        "reference_autoattack": False,
        "seed": 0,
        "precision": "float32",
        "bn_mode": "eval",
        "checkpoint": {"rule": f"the {checkpoint} one"},
        "versions": {"instar": "0.1.0"},
        "n": n,
        "key": "0123456789",
    }
    return Record(
        target="model",
        suite="standard",
        checkpoint=checkpoint,
        protocol={**protocol, **other},
        scores={name: Score(titles[name], correct, n) for name, correct in counts.items()},
        findings=findings,
        instances={"index": np.arange(n)},
    )


@pytest.fixture
def record() -> Callable[..., Record]:
    return make_record


@pytest.fixture(scope="session")
def new_run() -> Callable[..., Path]:
    return write_run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs a Chromium; left out, with the reason, where there is none")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with weights, instance tables and an evaluation, on pictures whose classes have hostile names."""
    return train_on(tmp_path_factory.mktemp("trained"), HOSTILE)
