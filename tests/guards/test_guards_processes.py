"""Two processes decide alike about a step that went wrong in the share of one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(600)

WORKER = Path(__file__).parents[1] / "parallel" / "worker.py"
CASES = {
    f"{policy}, {kind}": {
        "recipe": "pgd_at",
        "norm": "batch",
        "poison": [0, 1],
        "settings": {"on_nan": policy, "epochs": 2, "optimizer": kind, "lr": 1e-3},
    }
    for policy, kind in (("skip", "sgd"), ("rollback", "sgd"), ("skip", "adamw"), ("stop", "sgd"))
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("guards")
    for count in ("1", "2"):
        (base / count).mkdir()
    (base / "cases.json").write_text(json.dumps(CASES))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(base / "cases.json"), str(base), "2", "1"]
    status = subprocess.run(command, env=environment, check=False).returncode
    traces = [path.read_text() for path in sorted(base.rglob("*.traceback"))]
    assert status == 0, "\n".join(traces)
    return base


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("stop")])
def test_the_run_goes_on_in_both_and_equals_that_of_one_process(case: str, trained: Path) -> None:
    a, b = (load_file(trained / count / case / "checkpoints" / "state.safetensors") for count in "12")
    assert a.keys() == b.keys()
    assert max(float((a[name].double() - b[name].double()).abs().max()) for name in a) < 1e-9
    assert all(bool(t.isfinite().all()) for t in b.values())
    assert int((b["table.seen"] == 0).sum()) == 0, "all were trained on in the second epoch"
    log = [json.loads(line) for line in (trained / "2" / case / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log] == [1, 1]


def test_skipping_and_rolling_back_agree_among_processes(trained: Path) -> None:
    a, b = (
        load_file(trained / "2" / f"{name}, sgd" / "checkpoints" / "state.safetensors") for name in ("skip", "rollback")
    )
    assert [name for name in a if not name.startswith("shared.guard.") and not torch.equal(a[name], b[name])] == []


def test_both_stop_with_the_same_line(trained: Path) -> None:
    lines = [(trained / "2" / f"stop, sgd.{rank}.error").read_text() for rank in (0, 1)]
    assert lines[0] == lines[1]
    assert "no longer a finite number in epoch 0, step 1 of 2" in lines[0]
