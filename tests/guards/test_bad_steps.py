"""A step that went wrong is noticed within a few steps, and skipped, rolled back or reported as the user chose."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import instar.saving
import instar.train
from instar import UserError, pgd_at
from instar.checkpoint import State, save_state
from instar.cli import main
from instar.data import ResidentImages, load
from instar.evidence import Batch
from instar.guards import Health, clip_gradients, gradient_norm, skipped
from instar.guards.health import IN_A_ROW, READ_EVERY, REMEMBERED, ROLLBACKS
from instar.instances import InstanceTable
from instar.methods import free_at
from instar.models import create
from instar.step import training_step
from instar.train import Event, Interrupted, StepDone, resume, train

SMALL = {"model": "small_cnn", "width": 4, "batch_size": 40, "epochs": 2, "precision": "float32", "selection": 40}
LONG = {"batch_size": 16}  # epochs in which the notes are read before they end
METHOD = pgd_at(eps=0.1, steps=1)


@pytest.fixture(scope="module")
def few() -> ResidentImages:
    """A few digits: 40 to select by, and 10 steps of 40, or 25 of 16, in an epoch."""
    digits = load("digits")
    rows = torch.arange(440)
    return ResidentImages(digits.fetch(rows), digits.labels[rows], digits.info)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the images of chosen steps NaN, whenever and however often these steps are made."""

    def poison(*places: tuple[int, int]) -> None:
        def step(model: nn.Module, method: Any, batch: Batch, optimizer: Any, **options: Any) -> Any:
            progress = options["progress"]
            if (progress.epoch, progress.step) in places:
                batch = dataclasses.replace(batch, x=batch.x * float("nan"))
            return training_step(model, method, batch, optimizer, **options)

        monkeypatch.setattr(instar.train, "training_step", step)

    return poison


def _run(few: ResidentImages, out: Path, **more: Any) -> instar.train.Result:
    return train(METHOD, data=few, out=out, **(SMALL | more))


def _state(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = out / "checkpoints" / "state.safetensors"
    with safe_open(str(path), framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["state"])


def _differences(first: Path, second: Path) -> list[str]:
    a, b = _state(first)[0], _state(second)[0]
    return [name for name in a if not name.startswith("shared.guard.") and not torch.equal(a[name], b[name])]


def test_a_run_that_stops_does_so_within_the_epoch_and_leaves_a_sound_state(
    few: ResidentImages, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned((1, 2))
    steps: list[int] = []

    def count(event: Event) -> None:
        steps.append(1) if isinstance(event, StepDone) else None

    with pytest.raises(UserError, match=r"epoch 1, step 2 of 25 \(learning rate 0\.13.*--lr, --clip_grad 1 or --prec"):
        _run(few, tmp_path / "run", save_every=0.0, on_event=count, **LONG)
    assert 28 <= len(steps) <= 27 + READ_EVERY < 50, "noticed before the epoch was over"
    tensors, numbers = _state(tmp_path / "run")
    assert numbers["updates"] == 27, "saved after every step, up to the one that went wrong"
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(log) == 1


def test_skipping_and_rolling_back_end_with_the_same_weights(
    few: ResidentImages, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned((0, 3), (1, 2))
    notes: list[str] = []
    done = _run(few, tmp_path / "skip", on_nan="skip", note=notes.append, **LONG)
    assert sum("1 step was skipped, the last in epoch" in line for line in notes) == 2
    assert done.log[-1]["skipped"] == 2
    notes.clear()
    again = _run(few, tmp_path / "rollback", on_nan="rollback", note=notes.append, **LONG)
    assert sum("back to epoch" in line for line in notes) == 2
    assert again.log[-1]["skipped"] == 2
    assert _differences(tmp_path / "skip", tmp_path / "rollback") == []
    assert [line | {"seconds": 0} for line in done.log] == [line | {"seconds": 0} for line in again.log]
    table = load_file(tmp_path / "skip" / "checkpoints" / "state.safetensors")["table.seen"]
    assert int((table >= 0).sum()) == 400, "every image was seen in one of the two epochs"
    assert int((table == 1).sum()) == 400 - 16, "those of the skipped step not in the second"


@pytest.mark.parametrize("how", ["damaged", "not finite"])
def test_a_rollback_passes_over_a_save_that_is(
    how: str, few: ResidentImages, poisoned: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"epochs": 2, "batch_size": 80, "on_nan": "rollback"}
    poisoned((1, 2))
    _run(few, tmp_path / "whole", **kind)
    spoilt: list[int] = []

    def save(state: State, path: Path, *, fingerprint: str) -> None:
        weight = next(state.model.parameters()).data
        kept = weight.clone()
        if state.epoch == 1 and not spoilt:
            weight[0] = float("nan") if how == "not finite" else weight[0]
        save_state(state, path, fingerprint=fingerprint)
        if state.epoch == 1 and not spoilt:
            spoilt.append(state.updates)
            weight.copy_(kept)
            if how == "damaged":
                path.write_bytes(path.read_bytes()[:-9])

    monkeypatch.setattr(instar.saving, "save_state", save)
    notes: list[str] = []
    done = _run(few, tmp_path / "run", note=notes.append, **kind)
    assert spoilt == [5]
    assert any(("is passed over" if how == "not finite" else "is damaged") in line for line in notes)
    assert any("back to epoch 0, step 0, to go on without that batch (1 left out" in line for line in notes)
    assert _differences(tmp_path / "whole", tmp_path / "run") == []
    assert [line["epoch"] for line in done.log] == [0, 1]
    assert done.best == _state(tmp_path / "whole")[1]["best"]


def test_a_rollback_with_nothing_sound_to_go_back_to_is_one_line(
    few: ResidentImages, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned((0, 1))

    def damage(event: Event) -> None:
        for path in (tmp_path / "run" / "checkpoints").glob("state*"):
            path.write_bytes(b"nothing")

    with pytest.raises(UserError, match=r"no state in .* is whole"):
        _run(few, tmp_path / "run", epochs=1, batch_size=80, on_nan="rollback", on_event=damage)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_that_is_interrupted_around_a_bad_step_ends_as_if_it_had_not_been(
    policy: str, few: ResidentImages, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned((0, 5))
    kind = {"on_nan": policy, "epochs": 1}
    _run(few, tmp_path / "whole", **kind)

    def stop(at: int) -> Callable[[Event], None]:
        seen = [0]

        def watch(event: Event) -> None:
            seen[0] += isinstance(event, StepDone)
            if isinstance(event, StepDone) and seen[0] == at:
                os.kill(os.getpid(), signal.SIGTERM)

        return watch

    again = False
    for at in (3, 3, 3):  # before the bad step, behind it before it was read, and later
        with pytest.raises(Interrupted):
            _run(few, tmp_path / "parts", resume=again, on_event=stop(at), **kind)
        again = True
    _run(few, tmp_path / "parts", resume=True, **kind)
    a, b = _state(tmp_path / "whole")[0], _state(tmp_path / "parts")[0]
    differ = [name for name in a if not torch.equal(a[name], b[name]) and name != "shared.guard.notes"]
    assert differ == []
    notes = [t["shared.guard.notes"].tolist() for t in (a, b)]
    assert notes[0][:5] == notes[1][:5]


def test_a_stopped_run_goes_on_from_its_save_with_another_policy(
    few: ResidentImages, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned((1, 2))
    with pytest.raises(UserError, match="with --on_nan skip or rollback"):
        _run(few, tmp_path / "run")
    _run(few, tmp_path / "run", resume=True, on_nan="rollback")
    _run(few, tmp_path / "skip", on_nan="skip")
    assert _differences(tmp_path / "skip", tmp_path / "run") == []


def test_neither_policy_goes_on_for_ever(few: ResidentImages, poisoned: Callable[..., None], tmp_path: Path) -> None:
    poisoned(*((0, step) for step in range(4, 25)))
    with pytest.raises(UserError, match=f"{IN_A_ROW} steps in a row were skipped"):
        _run(few, tmp_path / "skip", on_nan="skip", epochs=1, **LONG)
    with pytest.raises(UserError, match=rf"epoch 0, step {4 + ROLLBACKS} of .*although {ROLLBACKS} batches were left"):
        _run(few, tmp_path / "rollback", on_nan="rollback", epochs=1, **LONG)


def test_a_guard_changes_nothing_where_nothing_goes_wrong(few: ResidentImages, tmp_path: Path) -> None:
    for policy in ("stop", "skip", "rollback"):
        _run(few, tmp_path / policy, on_nan=policy, epochs=1)
    assert _differences(tmp_path / "stop", tmp_path / "skip") == []
    assert _differences(tmp_path / "stop", tmp_path / "rollback") == []


def _bare(optimizer: str, method: Any) -> tuple[State, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 10))
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }
    state = State(model, kinds[optimizer](model.parameters()), InstanceTable(32), copy.deepcopy(model))
    return state, Batch(torch.rand(32, 1, 8, 8), torch.arange(32) % 10, torch.arange(32))


def _everything(state: State) -> dict[str, Tensor]:
    found = dict(state.model.state_dict())
    assert state.average is not None
    found |= {f"average.{name}": t for name, t in state.average.state_dict().items()}
    for place, entries in enumerate(state.optimizer.state.values()):
        found |= {f"{place}.{name}": t for name, t in entries.items() if isinstance(t, Tensor)}
    found |= {name: t for name, t in state.table.shared.items() if not name.startswith("guard.")}
    found |= {f"table.{name}": t for name, t in state.table.columns.items()}
    return {name: t.clone() for name, t in found.items()}


def _step(state: State, batch: Batch, method: Any, health: Health) -> None:
    kept = health.before(state)
    assert batch.index is not None
    batch = dataclasses.replace(batch, memory=state.table.rows(batch.index), shared=state.table.shared)
    draws = torch.Generator().manual_seed(state.updates)
    computed, _ = training_step(state.model, method, batch, state.optimizer, generator=draws)
    assert state.average is not None
    for mine, theirs in zip(state.average.parameters(), state.model.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 0.5)
    rows = health.after(state, {"index": batch.index, "loss": computed.loss, "seen": torch.full((32,), 3)}, kept)
    state.table.write(rows["index"], {name: row for name, row in rows.items() if name != "index"})
    state.updates += 1


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", [METHOD, free_at(replays=2)], ids=["pgd_at", "free_at"])
@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
def test_a_skipped_step_leaves_everything_as_it_was(optimizer: str, method: Any, first: bool) -> None:
    state, batch = _bare(optimizer, method)
    health = Health("skip", 20.0, 10)
    if not first:
        _step(state, batch, method, health)
    before = _everything(state)
    _step(state, dataclasses.replace(batch, x=batch.x * float("nan")), method, health)
    after = _everything(state)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert skipped(state) == 1
    _step(state, batch, method, health)
    assert not torch.equal(before["0.weight"], state.model.state_dict()["0.weight"]), "a good one does what it does"
    assert skipped(state) == 1


def test_a_gradient_that_is_not_finite_is_a_bad_step_though_the_loss_is_fine() -> None:
    state, batch = _bare("sgd", METHOD)
    health = Health("skip", 20.0, 10)
    before = _everything(state)
    hook = state.model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    _step(state, batch, METHOD, health)
    hook.remove()
    assert skipped(state) == 1
    assert all(torch.equal(before[name], t) for name, t in _everything(state).items())
    note: list[str] = []
    health.read(state, note=note.append, where=lambda update: f"in step {update}")
    assert "the gradient is not finite" in note[0]


@pytest.mark.parametrize(
    ("usual", "limit", "loss", "bad"),
    [
        (3.0, 20.0, 61.0, True),
        (3.0, 20.0, 59.0, False),
        (0.001, 20.0, 40.0, False),  # a network that has learned the data by heart meets a hard batch: ln 10 counts
        (0.001, 20.0, 47.0, True),
        (3.0, float("inf"), 1e9, False),
    ],
)
def test_a_loss_explodes_relative_to_its_running_median(usual: float, limit: float, loss: float, bad: bool) -> None:
    state, _ = _bare("sgd", METHOD)
    health = Health("stop", limit, 10)

    def take(value: float) -> float:
        health.after(state, {"index": torch.arange(2), "loss": torch.full((2,), value)}, None)
        state.updates += 1
        return float(state.table.shared["guard.notes"][2])

    for _ in range(REMEMBERED // 2):
        assert take(usual) == 0
    assert take(1e4) == 0, "too few are known to say what is usual"
    assert take(loss) == float(bad)
    if bad:
        with pytest.raises(UserError, match=f"the loss rose to {loss:g}, above 20 times its usual value in step 33"):
            health.read(state, note=print, where=lambda update: f"in step {update}")


def test_weights_that_are_not_finite_are_not_saved_though_no_loss_has_seen_them() -> None:
    state, _ = _bare("sgd", METHOD)
    health = Health("stop", 20.0, 10)
    assert health.sound(state)
    state.model[0].weight.data[0, 0, 0, 0] = float("nan")
    assert not health.sound(state)


def test_clipping_bounds_the_gradient_of_every_step() -> None:
    state, batch = _bare("sgd", METHOD)
    handle = clip_gradients(state.optimizer, 0.01)
    norms = []
    state.optimizer.register_step_pre_hook(lambda *_: norms.append(float(gradient_norm(state.optimizer))))
    training_step(state.model, METHOD, batch, state.optimizer)
    training_step(state.model, free_at(replays=3), batch, state.optimizer)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    handle.remove()
    training_step(state.model, METHOD, batch, state.optimizer)
    assert norms[-1] > 0.1


def test_clipping_is_a_setting_and_another_run(few: ResidentImages, tmp_path: Path) -> None:
    kind = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "ema": 0.0, "schedule": "constant"}
    moved = {}
    for name, limit in (("free", None), ("short", 1e-3)):
        done = _run(few, tmp_path / name, clip_grad=limit, **kind)
        fresh = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
        start = {key: p.detach() for key, p in fresh.named_parameters()}
        assert start.keys() == dict(done.model.named_parameters()).keys()
        moved[name] = done.model
    first, second = (dict(model.named_parameters()) for model in moved.values())
    assert any(not torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(UserError, match=r"clip_grad is 0\.001, not None"):
        _run(few, tmp_path / "short", resume=True, **kind)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on_nan", "pray"], "unknown on_nan 'pray'"),
        (["--clip_grad", "0"], "clip_grad must be the largest norm of a gradient, above 0"),
        (["--loss_limit", "1"], "loss_limit must be a multiple of the usual loss, above 1"),
        (["--on_collapse", "panic"], "unknown on_collapse 'panic'"),
        (["--probe_every", "-1"], "probe_every must be 0 or a number of steps"),
    ],
)
def test_bad_values_get_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "pgd_at", *words]) == 2
    told = capsys.readouterr().err
    assert message in told or message.split()[-1].strip("'") in told
    assert "Traceback" not in told


def test_the_command_line_goes_on_with_another_policy(
    poisoned: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned((0, 1))
    words = ["train", "pgd_at", "--epochs", "1", "--width", "4", "--batch_size", "400", "--steps", "1"]
    out = ["--out", str(tmp_path / "run")]
    assert main([*words, *out]) == 2
    assert "no longer a finite number in epoch 0, step 1" in capsys.readouterr().err
    assert main(["train", "--resume", *out, "--on_nan", "skip"]) == 0
    assert "1 step was skipped" in capsys.readouterr().out
    assert resume(tmp_path / "run").log[-1]["skipped"] == 1
