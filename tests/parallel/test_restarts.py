"""A run of several processes loses nothing: a process that is killed, a launcher that is told to stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(1200)  # five starts of PyTorch, one after the other

WORKER = Path(__file__).with_name("worker.py")
RUN = {"recipe": "iseat", "norm": "batch", "settings": {"epochs": 3, "save_every": 0.0}}


def _torchrun(folder: Path, cases: dict[str, dict[str, Any]], *, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    arguments = [str(WORKER), str(folder / "cases.json"), str(folder)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _assert_equal(first: Path, second: Path) -> None:
    for part in ("state", "best", "last"):
        a, b = (load_file(folder / "checkpoints" / f"{part}.safetensors") for folder in (first, second))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (first, second)]
    assert [a | {"seconds": 0} for a in logs[0]] == [b | {"seconds": 0} for b in logs[1]]
    assert len(logs[0]) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four: undisturbed; with a process killed in the fourth of six steps; with a launcher that was stopped."""
    base = tmp_path_factory.mktemp("restarts")
    (base / "2").mkdir()
    whole = RUN | {"out": "whole"}
    first = _torchrun(base, {"whole": whole, "killed": RUN | {"out": "killed", "kill after": 4}}, restarts=1)
    assert first.returncode == 0, first.stderr
    (base / "killed.txt").write_text(first.stderr)
    rarely = {"settings": {"epochs": 3}}  # saved at the ends of epochs, and when it is stopped
    second = _torchrun(base, {"stopped": RUN | rarely | {"out": "stopped", "stop launcher": 3}})
    assert second.returncode != 0, "a launcher that is stopped says so"
    return base


def test_a_process_that_is_killed_is_restarted_and_the_run_ends_as_if_nothing_had_happened(folder: Path) -> None:
    _assert_equal(folder / "whole", folder / "killed")
    assert "exitcode: -9" in (folder / "killed.txt").read_text(), "the launcher saw it die"


def test_a_launcher_that_is_stopped_leaves_a_state_behind_that_goes_on_exactly(folder: Path) -> None:
    with safe_open(str(folder / "stopped" / "checkpoints" / "state.safetensors"), framework="pt") as file:
        numbers = json.loads(file.metadata()["state"])
    assert (numbers["epoch"], numbers["step"]) == (1, 1), "saved in the middle of the second epoch"
    done = _torchrun(folder, {"stopped": RUN | {"out": "stopped", "resume": True}})
    assert done.returncode == 0, done.stderr
    _assert_equal(folder / "whole", folder / "stopped")
