"""A run that is interrupted and resumed equals one that is not, bit for bit on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instar import AWP, Correct, CrossEntropy, Exceeds, Given, ProbabilityGap, Ramp, UserError, gairat, pgd_at, trades
from instar.instances import read_instances
from instar.train import EpochDone, Event, Interrupted, StepDone, resume, train

SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "batch_size": 256, "epochs": 3, "precision": "float32"}


def _combined():
    method = trades(steps=2)
    stopped = dataclasses.replace(method.attack, stop=Exceeds(ProbabilityGap(), Ramp(0.0, 0.5)))
    return dataclasses.replace(
        method, attack=stopped, perturbation=AWP(5e-3), remember=(("clean_correct", Correct("clean")),)
    )


METHODS = {"pgd_at": pgd_at(steps=2), "trades": trades(steps=2), "gairat": gairat(steps=2), "combined": _combined()}


def _interrupting(at: int):
    """Ask to stop after the step with this number in the run, as Ctrl-C does."""
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        if isinstance(event, StepDone):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGINT)

    return watch


def _assert_equal_runs(first: Path, second: Path) -> None:
    for name in ("state", "best", "last"):
        a, b = (load_file(folder / "checkpoints" / f"{name}.safetensors") for folder in (first, second))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (first, second)]
    for a, b in zip(*logs, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    tables = [sorted((folder / "instances").iterdir()) for folder in (first, second)]
    for a, b in zip(*tables, strict=True):
        rows, others = read_instances(a), read_instances(b)
        assert all((rows[key] == others[key]).all() for key in rows)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_interrupted_within_and_between_epochs_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    train(method, out=tmp_path / "whole", **SMALL)
    resume = False
    for at in (2, 3, 5):  # within epoch 0, at its end, and within a later one (5 steps an epoch)
        with pytest.raises(Interrupted, match="--resume"):
            train(method, out=tmp_path / "parts", resume=resume, on_event=_interrupting(at), **SMALL)
        resume = True
    train(method, out=tmp_path / "parts", resume=True, **SMALL)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw"}, {"ema": 0.0}, {"precision": "bf16", "schedule": "piecewise"}]
)
def test_resume_is_exact_with_other_settings_too(settings: dict, tmp_path: Path) -> None:
    kind = SMALL | settings | {"epochs": 2}
    train("pgd_at", out=tmp_path / "whole", arguments={"steps": 1}, **kind)
    with pytest.raises(Interrupted):
        train("pgd_at", out=tmp_path / "parts", arguments={"steps": 1}, on_event=_interrupting(7), **kind)
    train("pgd_at", out=tmp_path / "parts", arguments={"steps": 1}, resume=True, **kind)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_is_killed_outright_resumes_from_its_last_save(tmp_path: Path) -> None:
    train("gairat", out=tmp_path / "whole", arguments={"steps": 2}, **SMALL)
    code = (
        "import sys; from instar.train import train;"
        f"train('gairat', out=sys.argv[1], arguments={{'steps': 2}}, save_every=0.0, **{SMALL!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "parts")])
    state = tmp_path / "parts" / "checkpoints" / "state.safetensors"
    give_up = time.monotonic() + 120
    while not state.exists() and child.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert state.exists()
    train("gairat", out=tmp_path / "parts", arguments={"steps": 2}, resume=True, **SMALL)
    _assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_resumes_from_its_folder_alone(tmp_path: Path) -> None:
    train("gairat", out=tmp_path / "whole", arguments={"steps": 2}, lr=8 / 255, **SMALL)
    with pytest.raises(Interrupted):
        train("gairat", out=tmp_path / "parts", arguments={"steps": 2}, lr=8 / 255, on_event=_interrupting(7), **SMALL)
    resume(tmp_path / "parts")
    _assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_was_killed_before_its_first_save_begins_again(tmp_path: Path) -> None:
    kind = SMALL | {"epochs": 1}
    train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, **kind)
    weights = load_file(tmp_path / "run" / "checkpoints" / "last.safetensors")
    for part in (tmp_path / "run").rglob("*.safetensors"):
        part.unlink()
    resume(tmp_path / "run")
    again = load_file(tmp_path / "run" / "checkpoints" / "last.safetensors")
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first = train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, **SMALL)
    before = (tmp_path / "run" / "checkpoints" / "state.safetensors").read_bytes()
    again = train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, resume=True, **SMALL)
    assert first.log == again.log
    assert (tmp_path / "run" / "checkpoints" / "state.safetensors").read_bytes() == before


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run: choose another --out"):
        train("pgd_at", out=tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_with_other_settings_names_the_difference(tmp_path: Path) -> None:
    kind = SMALL | {"epochs": 1}
    train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, **kind)
    with pytest.raises(UserError, match="batch_size is 256, not 128"):
        train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, resume=True, **kind | {"batch_size": 128})
    with pytest.raises(UserError, match="its method is"):
        train("pgd_at", out=tmp_path / "run", arguments={"steps": 2}, resume=True, **kind)


def test_without_a_state_before_it_a_damaged_one_is_refused_in_one_line(tmp_path: Path) -> None:
    kind = SMALL | {"epochs": 1}
    train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, **kind)
    state = tmp_path / "run" / "checkpoints" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"no state in .* is whole .*state-previous.safetensors: it is missing"):
        train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, resume=True, **kind)


def test_the_seed_decides_everything_and_another_seed_gives_another_model(tmp_path: Path) -> None:
    kind = SMALL | {"epochs": 1}
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)  # whatever the caller's generator holds
        train("pgd_at", out=tmp_path / name, arguments={"steps": 1}, seed=seed, **kind)
        weights.append(load_file(tmp_path / name / "checkpoints" / "last.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_a_loss_that_is_not_finite_stops_with_one_line_and_keeps_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no longer a finite number .*learning rate 1e\+30"):
        train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, lr=1e30, schedule="constant", **SMALL)


def test_a_given_start_has_no_expression_and_says_so() -> None:
    assert "noise" in repr(Given(torch.zeros(1, 1, 2, 2)))
    assert repr(CrossEntropy()) == "CrossEntropy()"


def test_events_and_log_tell_the_same(tmp_path: Path) -> None:
    events: list[Event] = []
    done = train("gairat", out=tmp_path / "run", arguments={"steps": 2}, on_event=events.append, **SMALL)
    assert [dict(e.record) for e in events if isinstance(e, EpochDone)] == done.log
    assert sum(isinstance(e, StepDone) for e in events) == 3 * 5
    table = read_instances(tmp_path / "run" / "instances" / "epoch_002.npz")
    seen = table["seen"] == 2
    assert seen.sum() == 5 * 256
    assert table["loss"][seen].mean() == pytest.approx(done.log[-1]["train_loss"], rel=1e-5)
    assert table["correct"][seen].mean() == pytest.approx(done.log[-1]["train_robust"])
    assert table["kappa"].max() <= 2
