"""What is disturbed at random moments ends like what is not: the short form, and that the comparison would tell."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from instar.train import train

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)  # seconds on an idle machine; what it waits for are processes that share it
def test_runs_that_are_disturbed_at_random_moments_end_with_the_bytes_of_undisturbed_ones(tmp_path: Path) -> None:
    words = ["--limit", "--moments", "3", "--only", "gairat", "--processes", "1", "--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *words, "--out", str(tmp_path / "found")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 moments in rounds that ended equal; 0 failures" in done.stdout
    assert len(re.findall(r"^moment \d: gairat, 1: .* after", done.stdout, re.MULTILINE)) == 3
    assert "**3 of 3 moments ended so.**" in (tmp_path / "found" / "README.md").read_text()


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_comparison_notices_every_file_that_differs_is_missing_or_too_much(
    chaos: ModuleType, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train("pgd_at", out=whole, arguments={"steps": 1}, width=4, batch_size=1024, epochs=2, keep_every=1)
    shutil.copytree(whole, run)
    assert chaos.difference(run, whole, trains=True) == []
    loose = {run / "run.json", run / "checkpoints" / "state-previous.safetensors"}
    for file in sorted(file for file in run.rglob("*") if file.is_file() and file not in loose):
        content = file.read_bytes()
        name = file.relative_to(run).as_posix()
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert chaos.difference(run, whole, trains=True) == [f"{name} differs"]
        file.unlink()
        assert chaos.difference(run, whole, trains=True) == [f"{name} is missing or too much"]
        file.write_bytes(content)
    (run / "instances" / ".epoch_001.npz.17.tmp").write_bytes(b"left behind")
    assert chaos.difference(run, whole, trains=True) == ["instances/.epoch_001.npz.17.tmp is missing or too much"]
