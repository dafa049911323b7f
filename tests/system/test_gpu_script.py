"""The GPU script: stages that can be called again and again, with a stand-in for Python that remembers its words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="machines with GPUs run Linux: the tools are GNU's")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"
PYTHON = """#!/usr/bin/env bash
# Remembers its words; a run or table in the folder that FAILS names, or a second of SLOW, does not get done.
echo "$*" >> "$CALLS"
words=" $* "
out=$(sed -n 's/.* --out \\([^ ]*\\) .*/\\1/p' <<< "$words")
if [[ $words == *" train "* ]]; then
  mkdir -p "$out" && touch "$out/run.json" && echo '{"epoch": 0}' >> "$out/log.jsonl"
  if [[ -n ${FAILS:-} && $out == *"$FAILS" ]]; then exit 2; fi
  if [[ -n ${SLOW:-} && $out == *"$SLOW" ]]; then exit 143; fi
elif [[ $words == *" bench "* && -n ${FAILS:-} && $out == *"$FAILS" ]]; then
  exit 2
elif [[ $words == *" evaluate "* ]]; then
  if [[ -n ${SLOW:-} && $words == *"/$SLOW "* ]]; then exit 130; fi
fi
"""


class Machine:
    """A folder that stands for a machine: it is called stage by stage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        stand_in = folder / "python"
        stand_in.write_text(PYTHON)
        stand_in.chmod(0o755)
        self.calls.touch()

    def __call__(self, stage: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        given = {
            "STORE": str(self.folder / "store"),
            "CARRIED": str(self.folder / "carried"),
            "OUT": str(self.folder / "out"),
            "PYTHON": str(self.folder / "python"),
            "CALLS": str(self.calls),
            "TINY": "1",
        }
        return subprocess.run(
            ["bash", str(SCRIPT), stage, *words],
            env={**os.environ, **given, **more},
            capture_output=True,
            text=True,
            check=False,
        )

    def asked(self) -> list[str]:
        """What Python was asked since the last look."""
        found = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_script_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_data_arrive_in_portions(machine: Machine, tmp_path: Path) -> None:
    data = tmp_path / "source" / "cifar10"
    data.mkdir(parents=True)
    (data / "batch").write_bytes(os.urandom(3 * 2**20))
    packed = machine("pack", TINY="0", INSTAR_DATA=str(data.parent), PART_MB="1")
    assert packed.returncode == 0, packed.stderr
    carried = tmp_path / "carried"
    parts = sorted(carried.glob("part-*"))
    assert len(parts) == 4
    kept = {part: part.read_bytes() for part in parts}
    for part in parts[2:]:
        part.unlink()
    first = machine("data", TINY="0")
    assert (first.returncode, "2 of 4" in first.stdout) == (3, True)
    for part in parts:
        part.unlink(missing_ok=True)
    for part in parts[2:]:
        part.write_bytes(kept[part])
    second = machine("data", TINY="0")
    assert second.returncode == 0, second.stderr
    arrived = tmp_path / "store" / "data" / "cifar10" / "batch"
    assert arrived.read_bytes() == (data / "batch").read_bytes()


def test_damaged_data_are_refused(machine: Machine, tmp_path: Path) -> None:
    machine("pack")
    (part,) = (tmp_path / "carried").glob("part-*")
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    assert machine("data").returncode not in (0, 3)
    assert not (tmp_path / "store" / "data" / "digits").exists()


def test_a_run_that_was_stopped_is_resumed_and_a_finished_one_left_alone(machine: Machine) -> None:
    assert machine("main", SLOW="main").returncode == 3
    (begun,) = machine.asked()
    assert "-m instar train pgd_at --out" in begun
    assert machine("main").returncode == 0
    (resumed,) = machine.asked()
    assert resumed.endswith("--resume")
    assert "pgd_at" not in resumed
    again = machine("main")
    assert again.returncode == 0
    assert "finished: {" in again.stdout
    assert machine.asked() == []


def test_the_attack_is_timed_with_and_without_each_way_of_making_it_faster(machine: Machine) -> None:
    assert machine("accelerate", WAYS="graphs both").returncode == 0
    for way, line in zip(("graphs", "both"), machine.asked(), strict=True):
        assert f"-m instar bench pgd_at --batch-size 8 --turns 1 --steps 1 --no-memory --accelerate {way}" in line
        assert "--without graphs --without compile" in line
        assert line.endswith(f"/bench/{way}")
    done = machine("accelerate", WAYS="graphs both", FAILS="bench/graphs")
    assert done.returncode == 0
    assert "not measured: graphs" in done.stdout
    assert len(machine.asked()) == 2


def test_training_attacks_as_it_is_told(machine: Machine) -> None:
    machine("main", ACCELERATE="graphs")
    (line,) = machine.asked()
    assert "--accelerate graphs" in line


def test_methods_are_trained_one_after_the_other(machine: Machine) -> None:
    assert machine("methods", SLOW="p_sat").returncode == 3
    assert len(machine.asked()) == 2
    assert machine("methods").returncode == 0
    (resumed,) = machine.asked()
    assert "p_sat --resume" in resumed


def test_a_failure_is_no_lack_of_time(machine: Machine) -> None:
    assert machine("main", FAILS="main").returncode == 2
    assert machine("nosuch").returncode == 2


def test_nothing_is_begun_without_time_for_it(machine: Machine) -> None:
    assert machine("main", LIMIT="10").returncode == 3
    assert machine.asked() == []


def test_finished_runs_are_judged_once(machine: Machine) -> None:
    machine("main")
    machine("methods", METHODS="pgd_at")
    machine.asked()
    assert machine("evaluate", SLOW="pgd_at").returncode == 3
    assert [line.split()[3].rpartition("/")[2] for line in machine.asked()] == ["main", "pgd_at"]
    assert machine("evaluate").returncode == 0
    assert [line.split()[3].rpartition("/")[2] for line in machine.asked()] == ["pgd_at"]


def test_results_come_back_in_small_files(machine: Machine, tmp_path: Path) -> None:
    kept = tmp_path / "store" / "runs" / "main" / "checkpoints"
    kept.mkdir(parents=True)
    (kept / "best.safetensors").write_bytes(os.urandom(31 * 2**20))
    (kept / "state.safetensors").write_bytes(b"large and not wanted")
    (tmp_path / "store" / "bench").mkdir()
    (tmp_path / "store" / "bench" / "bench.md").write_text("a table")
    done = machine("results")
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "out").iterdir())
    assert [path.stat().st_size <= 15 * 2**20 for path in files] == [True] * 3
    whole = b"".join(path.read_bytes() for path in files)
    listed = subprocess.run(["tar", "-tzf", "-"], input=whole, capture_output=True, check=True).stdout.decode().split()
    assert listed == ["bench/bench.md", "runs/main/checkpoints/best.safetensors"]
