"""Following a run while it trains."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from instar import UserError
from instar.cli import main
from instar.follow import Follower, follow, following
from instar.train import EpochDone, StepDone


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed = True


def step(epoch: int, number: int, loss: list[float], correct: list[int]) -> StepDone:
    return StepDone(epoch, number, 3, len(loss), torch.tensor(loss), torch.tensor(correct))


def test_steps_are_written_as_means_over_all_images_since_the_last_writing() -> None:
    kept = Kept()
    follower = Follower(lambda first: kept, seconds=1e9)
    follower(step(0, 0, [1.0, 2.0, 3.0], [1, 1, 0]))
    follower(step(0, 1, [6.0], [0]))
    assert kept.lines == []
    follower(EpochDone({"epoch": 0, "train_loss": 2.5, "note": "text", "lr": float("nan")}, 2))
    assert kept.lines == [
        (2, {"step/loss": 3.0, "step/robust": 0.5}),
        (3, {"epoch/epoch": 0.0, "epoch/train_loss": 2.5}),
    ]


def test_what_is_held_back_is_written_at_the_end() -> None:
    kept = Kept()
    follower = Follower(lambda first: kept, seconds=1e9)
    follower(step(1, 2, [1.0], [1]))
    follower.close()
    assert kept.lines == [(6, {"step/loss": 1.0, "step/robust": 1.0})]
    assert kept.closed


def test_a_writer_is_opened_at_the_step_that_a_resumed_run_goes_on_from() -> None:
    opened = []
    follower = Follower(lambda first: opened.append(first) or Kept(), seconds=0)
    for number in range(3):
        follower(step(2, number, [1.0], [1]))
    assert opened == [7]


def test_a_service_that_fails_is_left_alone_with_one_line_and_training_goes_on() -> None:
    class Down(Kept):
        def write(self, numbers: Mapping[str, float], step: int) -> None:
            super().write(numbers, step)
            raise ConnectionError("the network\nis down")

    down, notes = Down(), []
    follower = Follower(lambda first: down, note=notes.append, seconds=0)
    for number in range(3):
        follower(step(0, number, [1.0], [1]))
    follower.close()
    assert len(down.lines) == 1
    assert notes == ["following stopped, training goes on: ConnectionError: the network is down"]


def test_numbers_are_read_from_the_device_only_when_they_are_written() -> None:
    class Unread:
        def numel(self) -> int:
            raise AssertionError("read too early")

        float = numel

    follower = Follower(lambda first: Kept(), seconds=1e9)
    follower(StepDone(0, 0, 3, 1, Unread(), Unread()))  # type: ignore[arg-type]


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_services_get_the_configuration_and_go_on_under_the_same_name(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    module = types.ModuleType(service)
    module.init = lambda **given: calls.append(("init", given))  # type: ignore[attr-defined]
    module.log = lambda numbers, step: calls.append(("log", {"step": step, **numbers}))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish", {}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, service, module)
    run = tmp_path / "trades"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"recipe": "trades", "fingerprint": "abc"}))
    with following([service], out=run) as listen:
        listen(step(0, 0, [1.0], [1]))
        listen(EpochDone({"epoch": 0, "train_loss": 2.5}, 2))
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"]
    given = calls[0][1]
    assert given["name"] == "trades"
    assert given["resume"] == "allow"
    assert given["config"]["recipe"] == "trades"
    assert given.get("id") == ("trades-abc" if service == "wandb" else None)
    assert calls[2][1] == {"step": 3, "epoch/epoch": 0.0, "epoch/train_loss": 2.5}


def test_sinks_that_do_not_exist_or_are_not_installed_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--log wandb needs the package wandb: pip install wandb"):
        follow("wandb", out=tmp_path)
    assert main(["train", "pgd_at", "--out", str(tmp_path / "run"), "--log", "tensorbord"]) == 2
    assert "unknown sink 'tensorbord'. Did you mean 'tensorboard'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_writes_tensorboard_files_that_hold_the_log(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package, when it is imported
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run = tmp_path / "run"
        words = ["train", "pgd_at", "--width", "4", "--epochs", "2", "--batch-size", "256", "--steps", "1"]
        assert main([*words, "--out", str(run), "--log", "tensorboard"]) == 0
        found = EventAccumulator(str(run / "tensorboard"))
        found.Reload()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    written = found.Scalars("epoch/selection_robust")
    assert [event.value for event in written] == pytest.approx([line["selection_robust"] for line in log])
    assert [event.step for event in written] == [5, 10]
    assert found.Scalars("step/loss")[-1].step == 10
