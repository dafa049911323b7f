"""The benchmark that trains and judges every recipe, on the smallest budget."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "all_methods.py"
    spec = importlib.util.spec_from_file_location("all_methods", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_judges_and_tables_and_does_nothing_twice(script: ModuleType, tmp_path: Path) -> None:
    small = ["--data", "digits", "--width", "4", "--epochs", "1", "--suite", "quick", "--n", "20"]
    words = [*small, "--out", str(tmp_path), "--only", "kd_swa,natural,pgd_at,spat"]
    text = script.main(words).read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["kd_swa", "natural", "pgd_at", "spat"]
    assert "| clean | PGD-10 | margin PGD-20 | worst case |" in text
    assert " – |" not in text.replace(" | – |", "")  # every row has its numbers; findings may be none
    states = sorted(tmp_path.rglob("state.safetensors"))
    assert len(states) == 4
    before = [path.stat().st_mtime_ns for path in states]
    assert script.main(words).read_text() == text
    assert [path.stat().st_mtime_ns for path in states] == before


def test_a_recipe_that_cannot_run_has_its_reason_in_the_table(script: ModuleType, tmp_path: Path) -> None:
    words = [
        "--data",
        "digits",
        "--width",
        "4",
        "--epochs",
        "1",
        "--suite",
        "quick",
        "--n",
        "20",
        "--out",
        str(tmp_path),
    ]
    text = script.main([*words, "--only", "kd_swa"]).read_text()
    assert "cannot read the teacher" in text
