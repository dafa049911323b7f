"""Benchmarks of the evaluator name what they are given alike."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", ["plain_autoattack", "bf16_search"])
def test_weights_are_named_and_taken_as_their_card_or_the_caller_says(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    made = importlib.import_module(script)
    parser = argparse.ArgumentParser()
    made.add_arguments(parser)
    chosen = parser.parse_args(["a.pt", "b.pt", "--model", "wrn-10-1"])
    assert (chosen.targets, chosen.n) == (["a.pt", "b.pt"], 500)
    (tmp_path / "best.json").touch()
    assert made.named(tmp_path / "best.safetensors", chosen) == (f"{tmp_path.name}-best", {})
    assert made.named(str(tmp_path / "other.pt"), chosen) == ("other", {"data": "cifar10", "model": "wrn-10-1"})
