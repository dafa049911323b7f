"""Several processes give the record of one, whoever does what, and stop together with one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from instar.data import load
from instar.data.indexed import as_float
from instar.errors import UserError
from instar.evaluate import Record, Team, attacks_of, evaluate
from instar.evaluate.team import LostError
from instar.models import create, save

ATTACKS = ["PGD(Linf(0.08), steps=3, step_size=0.04)", "AutoAttack(Linf(0.08), steps=5, queries=30)"]
SIZES: dict[str, Any] = {"n": 40, "shard_size": 10, "batch_size": 6}
WORDS = [word for text in ATTACKS for word in ("--attack", text)]
WORDS += ["--n", "40", "--shard-size", "10", "--batch-size", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that is right on most digits."""
    images = load("digits", split="train")
    x, y = as_float(images.fetch(torch.arange(600))), images.labels[:600]
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    file = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save(net.eval(), file, {"dataset": "digits", "threat": {"norm": "Linf", "eps": "0.08"}})
    return file


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What one process finds."""
    (record,) = evaluate(weights, suite=attacks_of(ATTACKS), **SIZES, out=tmp_path_factory.mktemp("whole"))
    assert 0 < record.scores["worst_case"].correct < record.scores["clean"].correct
    return record


def command(*words: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lasting(record: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(record.read_text()).items() if key != "run"}


def same(record: Path, whole: Record) -> bool:
    assert whole.path is not None
    rows = record.with_suffix(".npz").read_bytes() == whole.path.with_suffix(".npz").read_bytes()
    return rows and lasting(record) == lasting(whole.path)


def test_two_processes_of_torchrun_give_the_record_of_one(weights: Path, whole: Record, tmp_path: Path) -> None:
    # Without the "--" torchrun takes the --n of the evaluation for one of its own flags.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "instar")
    running = command(*launcher, "evaluate", str(weights), *WORDS, "--out", "out", folder=tmp_path)
    printed, complaints = running.communicate(timeout=240)
    assert running.returncode == 0, complaints
    record = tmp_path / "out" / "attacks-net.json"
    assert same(record, whole)
    assert json.loads(record.read_text())["run"]["processes"] == 2
    assert printed.count("worst case") == 1  # one process prints
    assert re.search(r"AutoAttack.*: 40/40", printed)
    assert json.loads(record.read_text())["run"]["reused"] == []


def test_what_several_killed_processes_did_is_taken_over_by_one(weights: Path, whole: Record, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = command(
        "-m", "instar", "evaluate", str(weights), *WORDS, "--out", "out", "--processes", "2", folder=tmp_path
    )
    while running.poll() is None and len(list((out / "shards").glob("autoattack-*.npz"))) < 2:
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    before = {file.name: file.read_bytes() for file in (out / "shards").glob("pgd-*.npz")}
    (record,) = evaluate(weights, suite=attacks_of(ATTACKS), **SIZES, out=out)
    assert record.path is not None
    assert same(record.path, whole)
    assert len(before) == 4
    assert all((out / "shards" / name).read_bytes() == content for name, content in before.items())


FAILING = """
import os, pathlib, time
from instar.models import create
import torch

class Failing(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.net = create("small_cnn", classes=classes, channels=1, image_size=8, width=4, seed=0)

    def forward(self, x):
        if torch.is_grad_enabled():
            failed = pathlib.Path("failed")
            if os.environ["RANK"] == "1":
                failed.touch()
                raise RuntimeError("the device is gone")
            until = time.monotonic() + 120
            while not failed.exists() and time.monotonic() < until:  # or this process does all the work by itself
                time.sleep(0.02)
        return self.net(x)

def make(classes, **rest):
    return Failing(classes)
"""


def test_if_one_process_fails_all_stop_with_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "failing_network.py").write_text(FAILING)
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
    torch.save({f"net.{key}": tensor for key, tensor in net.state_dict().items()}, tmp_path / "weights.pt")
    words = ["weights.pt", "--model", "failing_network:make", "--data", "digits", "--norm", "Linf", "--eps", "0.08"]
    running = command("-m", "instar", "evaluate", *words, *WORDS, "--out", "out", "--processes", "2", folder=tmp_path)
    _, complaints = running.communicate(timeout=240)
    assert running.returncode == 2
    lines = [line for line in complaints.splitlines() if line.startswith("instar: ")]
    assert len(lines) == 1
    assert "RuntimeError: the device is gone" in lines[0]
    assert "Traceback" not in complaints


def team_of(size: int) -> list[Team]:
    store = distributed.HashStore()
    return [Team(rank=rank, size=size, local=rank, store=store) for rank in range(size)]


def test_every_number_is_claimed_once() -> None:
    teams, claimed = team_of(3), []

    def claim(team: Team) -> None:
        while (number := team.claim("pieces")) < 30:
            claimed.append(number)

    threads = [threading.Thread(target=claim, args=(team,)) for team in teams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(30))


def test_a_process_that_stops_ends_the_waiting_of_the_others_and_one_of_them_says_why() -> None:
    first, second, third = team_of(3)
    assert second.fail(UserError("no memory"))
    assert not third.fail(UserError("no memory either"))
    with pytest.raises(LostError) as lost:
        first.wait("what the second one will never give")
    assert not first.fail(lost.value)
    with pytest.raises(LostError):
        first.claim("pieces")
    assert Team().fail(UserError("alone, it always says why"))


def test_processes_with_other_settings_are_found_out() -> None:
    first, second = team_of(2)
    first.agree("identity", "seed 0", what="settings")
    second.agree("identity", "seed 0", what="settings")
    with pytest.raises(UserError, match="process 1 has other settings than process 0"):
        second.agree("identity", "seed 1", what="settings")


def test_the_smallest_batch_size_is_agreed_on() -> None:
    first, second = team_of(2)
    second.put("size/1", b"125")
    assert first.fewest("size", 250) == 125
    assert second.fewest("size", 125) == 125
    assert Team().fewest("size", 250) == 250


def test_without_a_launcher_there_is_one_process() -> None:
    assert Team.from_environment({}).alone
    assert Team.from_environment({"WORLD_SIZE": "8"}).alone  # a scheduler's, that started one process
    assert Team.from_environment({"RANK": "0", "WORLD_SIZE": "1"}).alone


def test_a_number_of_processes_below_one_is_one_line(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from instar.cli import main

    assert main(["evaluate", str(weights), "--processes", "0"]) == 2
    assert "processes must be at least 1; got 0" in capsys.readouterr().err
