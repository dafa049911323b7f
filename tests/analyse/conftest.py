"""A small trained run, run folders whose every number is known, and images for models of a few lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instar.evaluate.record import Record, Score
from instar.train import train

Table = dict[str, Any]


@pytest.fixture(scope="session")
def once_trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pgd_at"
    train("pgd_at", out=folder, data="digits", epochs=2, width=4, batch_size=128, arguments={"steps": 2})
    return folder


@pytest.fixture
def trained(once_trained: Path, tmp_path: Path) -> Path:
    """A copy of a real run on digits, so that each test may write into it."""
    return Path(shutil.copytree(once_trained, tmp_path / "pgd_at"))


def _write_run(
    folder: Path,
    *,
    robust: Sequence[float] = (0.1, 0.3, 0.3, 0.2),
    training: Sequence[float] | None = None,
    tables: Sequence[Table] = (),
    records: Sequence[Record] = (),
    seed: int = 3,
    held_out: int = 1000,
) -> Path:
    config = {
        "recipe": "pgd_at",
        "method": "Method(PGD(), CrossEntropy())",
        "training": {"epochs": len(robust), "seed": seed, "root": None, "size": None},
        "data": {"name": "digits", "path": "digits", "size": 8, "train_images": 1294, "classes": []},
        "model": {"name": "small_cnn", "arguments": {"width": 8}, "parameters": 10},
        "threat": {"norm": "Linf", "eps": 0.2},
        "selection": {"n": held_out, "rule": "margin PGD-10", "seed": seed},
        "precision": "float32",
        "versions": {"instar": "0.1.0"},
    }
    (folder / "instances").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(config))
    trained_to = [share + 0.05 for share in robust] if training is None else training
    lines = [
        {
            "epoch": epoch,
            "lr": 0.1,
            "train_loss": 2.0 - 0.1 * epoch,
            "train_robust": other,
            "train_kappa": 1.0,
            "selection_clean": 0.5,
            "selection_robust": share,
            "seconds": 1.0,
        }
        for epoch, (share, other) in enumerate(zip(robust, trained_to, strict=True))
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for epoch, table in enumerate(tables):
        count = len(table["correct"])
        columns = {"seen": np.full(count, epoch), "kappa": np.zeros(count, int), "loss": np.ones(count)} | table
        kinds = {"seen": np.int32, "kappa": np.int16, "loss": np.float32, "correct": np.uint8}
        arrays: Any = {name: np.asarray(column, kinds[name]) for name, column in columns.items()}
        np.savez_compressed(folder / "instances" / f"epoch_{epoch:03d}.npz", **arrays)
    for record in records:
        record.write(folder / "evaluations")
    return folder


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Writes a run folder with the given accuracies and instance tables."""
    return _write_run


@pytest.fixture
def verdicts() -> Callable[..., Record]:
    """An evaluation record of which the verdicts are given."""

    def made(robust: Sequence[int], *, eps: str = "8/255", index: Sequence[int] | None = None) -> Record:
        count = len(robust)
        columns = {
            "index": np.arange(count) if index is None else np.asarray(index),
            "label": np.arange(count) % 10,
            "worst_case": np.asarray(robust, np.uint8),
        }
        protocol = {
            "norm": "Linf", "eps": eps, "n": count, "key": "k", "reference_autoattack": False,
            "data": {"name": "digits"}, "model": {"architecture": "small_cnn"},
        }  # fmt: skip
        scores = {name: Score(name, sum(robust), count) for name in ("clean", "worst_case")}
        return Record("run", "quick", "last", protocol, scores, instances=columns)

    return made


@pytest.fixture
def pictures() -> Callable[..., tuple[Tensor, Tensor]]:
    """Images (n, 1, 2, 2) well inside of [0, 1], drawn from a fixed seed, and labels (n,)."""

    def drawn(count: int, classes: int = 2) -> tuple[Tensor, Tensor]:
        draws = torch.Generator().manual_seed(5)
        return 0.3 + 0.4 * torch.rand(count, 1, 2, 2, generator=draws), torch.arange(count) % classes

    return drawn
