"""Runs of a sweep as processes: killed and gone on with, failed and told of, handed to submitit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import submitit

from instar.cli import main
from instar.errors import UserError
from instar.sweep import Configuration, Task, choices, plan, slurm, work_through
from instar.sweep.plan import Member
from instar.sweep.state import error_of, look, status
from instar.sweep.work import locked

WORDS = ("--recipes", "pgd_at", "--seeds", "0,1", "--data", "digits", "--epochs", "1", "--width", "4", "--steps", "1")
TIME = 60.0


def member(out: Path, **flags: object) -> Member:
    (found,) = plan(
        choices({"recipes": "pgd_at", **flags}, {}),
        out=out,
        configure=lambda words: Configuration("", {"seed": 0, "epochs": 1}),
    )
    return found


def finished(task: Task) -> None:
    until = time.monotonic() + TIME
    while task.running:
        assert time.monotonic() < until
        time.sleep(0.05)


def standing_in(task: Task, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a task whose process is a few lines of Python instead of a training run."""
    started = subprocess.Popen

    def popen(words: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        assert words[1:3] == ["-m", "instar"]
        return started([sys.executable, "-c", script, *words[3:]], **more)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", popen)
        assert task.begin()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; print('instar: note: a'); sys.exit('instar: the disk is full')", "the disk is full"),
        ("raise ValueError('nobody expected this')", "train ended with status 1: ValueError: nobody expected this"),
        ("import os; os.kill(os.getpid(), 9)", "train was ended by SIGKILL; was there too little memory?"),
    ],
)
def test_a_failed_run_says_why_in_one_line(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = member(tmp_path)
    task = Task(one)
    standing_in(task, script, monkeypatch)
    finished(task)
    assert status(one, look(one)) == f"failed: {said}"
    assert not locked(one.log)
    # Tried again, the old reason is gone.
    again = Task(one)
    standing_in(again, "pass", monkeypatch)
    finished(again)
    assert error_of(one.log) == ""


def test_a_run_that_is_asked_to_stop_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = member(tmp_path)
    task = Task(one)
    standing_in(task, "import time; print('up', flush=True); time.sleep(60)", monkeypatch)
    until = time.monotonic() + TIME
    while not one.log.read_text().endswith("up\n"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert locked(one.log)
    assert not Task(one).begin(), "two processes would work on one run"
    task.stop()
    task.wait(seconds=TIME)
    assert (task.running, locked(one.log), status(one, look(one))) == (False, False, "not begun")


def test_an_interrupted_sweep_asks_every_process_to_stop_and_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [member(tmp_path, eps=eps) for eps in ("0.1", "0.2", "0.3")]
    found = [dataclasses.replace(one, log=tmp_path / f"{place}.log") for place, one in enumerate(found)]
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print('saved', flush=True), sys.exit(143)))\n"
        "print('up', flush=True)\ntime.sleep(60)"
    )
    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **more: started([sys.executable, "-c", script], **more))
    begun: list[str] = []

    def report(one: Member, what: str) -> None:
        begun.append(what)
        until = time.monotonic() + TIME
        while not one.log.read_text().endswith("up\n"):
            assert time.monotonic() < until
            time.sleep(0.05)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    # Background jobs of a shell without job control inherit SIGINT as ignored, and with them this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work_through(found, jobs=2, threads=1, report=report)
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun == ["begun", "begun"]
    for one in found[:2]:
        assert one.log.read_text().endswith("saved\n")
        assert not locked(one.log)
        assert error_of(one.log) == ""
    assert not found[2].log.exists()


@pytest.mark.slow
def test_what_a_killed_sweep_leaves_behind_keeps_its_run_until_it_ends(tmp_path: Path) -> None:
    one = member(tmp_path)
    script = f"""
import pathlib, subprocess, sys, os
from tests.sweep.test_sweep_runs import member
from instar.sweep import Task
started = subprocess.Popen
subprocess.Popen = lambda words, **more: started([sys.executable, "-c", "input()"], **{{**more, "stdin": 0}})
Task(member(pathlib.Path({str(tmp_path)!r}))).begin()
print("begun", flush=True)
os.kill(os.getpid(), 9)
"""
    root = Path(__file__).resolve().parents[2]
    gate_out, gate_in = os.pipe()
    sweep = subprocess.run(
        [sys.executable, "-c", script], cwd=root, stdin=gate_out, stdout=subprocess.PIPE, check=False
    )
    os.close(gate_out)
    assert (sweep.returncode, sweep.stdout) == (-signal.SIGKILL, b"begun\n")
    assert locked(one.log)
    assert not Task(one).begin()
    os.write(gate_in, b"\n")
    os.close(gate_in)
    until = time.monotonic() + TIME
    while locked(one.log):
        assert time.monotonic() < until
        time.sleep(0.05)


# submitit's executor within the process leaves its log files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_submitit_runs_a_job_and_what_it_lacks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = member(tmp_path)
    seen: list[Member] = []
    monkeypatch.setattr(slurm, "finish", lambda task: seen.append(task.member))
    (job,) = slurm.submit([one], folder=tmp_path / "jobs", parameters={"timeout_min": 5}, cluster="debug")
    assert isinstance(job, submitit.core.core.Job)
    ended: list[tuple[str, str]] = []
    assert job.result() == one.name
    slurm.watch([one], [job], report=lambda found, what: ended.append((found.name, what)))
    assert (seen, ended) == ([one], [(one.name, "ended")])
    with pytest.raises(UserError, match="cannot be handed over"):
        slurm.submit([one], folder=tmp_path / "jobs", parameters={"partitoin": "gpu"}, cluster="debug")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'instar\[slurm\]'"):
        slurm.submit([one], folder=tmp_path / "jobs", parameters={})


def test_a_job_that_must_end_stops_its_process_and_asks_to_be_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = member(tmp_path)
    job = slurm.Job(one, threads=1)

    def begin(task: Task) -> None:
        standing_in(task, "import time; print('up', flush=True); time.sleep(60)", monkeypatch)
        until = time.monotonic() + TIME
        while not one.log.read_text().endswith("up\n"):
            assert time.monotonic() < until
            time.sleep(0.05)

    monkeypatch.setattr(slurm, "finish", begin)
    job()
    # The signal that announces the end reaches all processes of a job; a training run must not die of it.
    assert job._task is not None
    assert job._task._process is not None
    os.kill(job._task._process.pid, signal.SIGUSR2)
    time.sleep(0.2)
    assert job._task.running
    delayed = job.checkpoint()
    assert not job._task.running
    assert (delayed.function.member, delayed.function.threads, delayed.function._task) == (one, 1, None)


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(tmp_path: Path) -> None:
    words = [*WORDS, "--batch_size", "512", "--suite", "quick", "--n", "10"]

    def sweep(name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "instar", "sweep", *words, "--out", str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, process_group=0)

    def content(name: str) -> dict[str, Any]:
        found = json.loads((tmp_path / name / "results.json").read_text())
        for row in [*found["runs"], *found["groups"]]:
            del row["hours"]
        return found

    assert main(["sweep", *words, "--out", str(tmp_path / "plain")]) == 0
    first = sweep("killed")
    until = time.monotonic() + TIME
    while not list((tmp_path / "killed").glob("*/run.json")):
        assert first.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert main(["sweep", *words, "--out", str(tmp_path / "killed")]) == 0
    assert content("killed") == content("plain")
    assert [run["status"] for run in content("plain")["runs"]] == ["done", "done"]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "plain").glob("*/*")}
    assert main(["sweep", *words, "--out", str(tmp_path / "plain")]) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "plain").glob("*/*")} == before
