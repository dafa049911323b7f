"""The scripts that start several processes: valid shell and the right commands, as stand-ins for launchers see them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [*sorted(EXAMPLES.glob("*.sh")), EXAMPLES / "slurm.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_scripts_are_valid_shell(script: Path, shell: str) -> None:
    checked = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def _run(folder: Path, script: str, *words: str, status: int = 0, **environment: str) -> tuple[int, list[str]]:
    """Run a script whose launchers only say how they were called; `status` is what training ends with."""
    stands = folder / "bin"
    stands.mkdir(exist_ok=True)
    said = folder / "said.txt"
    said.unlink(missing_ok=True)
    for name, ends in {
        "torchrun": f"exit {status}",
        "srun": 'exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo first; echo second; fi',
    }.items():
        stand = stands / name
        stand.write_text(f'#!/bin/sh\necho {name} "$@" >> {said}\n{ends}\n')
        stand.chmod(0o755)
    path = f"{stands}:{os.environ['PATH']}"
    command = ["sh", str(EXAMPLES / script), *words]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment | {"PATH": path}, check=False)
    return done.returncode, said.read_text().splitlines()


def test_one_machine_starts_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    launch = "torchrun --standalone --nproc-per-node 4 --max-restarts 3 -m instar train"
    begun = _run(tmp_path, "torchrun.sh", "4", "run")
    assert begun == (0, [f"{launch} gairat --data cifar10 --model resnet18 --epochs 30 --out run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert _run(tmp_path, "torchrun.sh", "4", "run") == (0, [f"{launch} --resume --out run"])


JOB = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "first,second", "SLURM_NNODES": "2"}


def _epochs_done(folder: Path, count: int) -> None:
    run = folder / "runs" / "gairat-cluster"
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text('{"training": {"epochs": 3}}')
    (run / "log.jsonl").write_text("{}\n" * count)


def test_several_machines_meet_at_the_first_one_under_the_name_of_the_job(tmp_path: Path) -> None:
    _epochs_done(tmp_path, 3)
    status, said = _run(tmp_path, "slurm.sbatch", **JOB)
    assert status == 0
    (launch,) = (line for line in said if line.startswith("srun"))
    assert "torchrun --nnodes 2 --nproc-per-node gpu --max-restarts 3 --rdzv-id 42" in launch
    assert (
        "--rdzv-backend c10d --rdzv-endpoint first:29500 -m instar train --resume --out runs/gairat-cluster" in launch
    )
    assert "scontrol requeue 42" not in said, "the run is over"


@pytest.mark.parametrize(
    ("done", "status", "restarts", "queued"), [(2, 143, "0", True), (2, 143, "20", False), (3, 1, "0", False)]
)
def test_a_job_that_was_stopped_queues_itself_again_until_its_run_is_over(
    done: int, status: int, restarts: str, queued: bool, tmp_path: Path
) -> None:
    _epochs_done(tmp_path, done)
    ended, said = _run(tmp_path, "slurm.sbatch", status=status, **JOB, SLURM_RESTART_COUNT=restarts)
    assert ended == status
    assert ("scontrol requeue 42" in said) is queued


def test_slurm_warns_before_it_kills_and_may_queue_the_job_again() -> None:
    asked = [line for line in (EXAMPLES / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(asked)
