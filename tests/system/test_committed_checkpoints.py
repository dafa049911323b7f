"""The checkpoints that the repository keeps load, and are what their cards and the results page say they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import instar
from instar.models import read_card

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = sorted((ROOT / "checkpoints").rglob("*.safetensors"))


def test_there_are_checkpoints_and_they_stay_small() -> None:
    assert WEIGHTS
    assert sum(path.stat().st_size for path in WEIGHTS) < 20_000_000


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: "/".join(path.parts[-3:]))
def test_a_committed_checkpoint_loads_and_its_card_is_true(path: Path) -> None:
    card = read_card(path)
    model = instar.load(path)  # compares the card's sha256 with the file
    assert (card["dataset"], len(card["class_names"])) == ("cifar10", 10)
    plain = {"gairat", "pgd_at"} & set(path.parts)  # TRADES and SPAT attack something else
    assert not plain or instar.parse(card["method"]).attack == instar.PGD()
    with torch.no_grad():
        logits = model(torch.rand(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: "/".join(path.parts[-3:]))
def test_the_log_on_the_results_page_has_the_accuracies_of_the_card(path: Path) -> None:
    log = ROOT / "docs" / "results" / path.parts[-3] / path.parts[-2] / "log.jsonl"
    lines = {line["epoch"]: line for line in map(json.loads, log.read_text().splitlines())}
    card = read_card(path)
    line = lines[card["epoch"]]
    assert card["selection"]["clean"] == line["selection_clean"]
    assert card["selection"]["robust"] == line["selection_robust"]


def test_gairat_is_plain_adversarial_training_until_its_burn_in_ends() -> None:
    folder = ROOT / "docs" / "results" / "cifar10-resnet18-w16"
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (folder / name / "log.jsonl").read_text().splitlines()]
        for name in ("gairat", "pgd_at")
    ]
    assert [a == b for a, b in zip(*logs, strict=True)] == [True, True, True, False, False]
