"""An evaluation that is killed at random moments ends with the record of an undisturbed one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_evaluation.py"


@pytest.mark.slow
def test_three_kills_at_random_moments_change_nothing_and_cost_no_more_than_a_shard_each() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--kills", "3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=290,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all records equal" in done.stdout
    rounds = re.findall(r"(\d+) kills, equal: True, (-?\d+) images seen twice of at most (\d+)", done.stdout)
    assert sum(int(kills) for kills, _, _ in rounds) == 3
    assert all(int(twice) <= int(most) for _, twice, most in rounds)
