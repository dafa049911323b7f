"""What a run keeps: rows of instances, the state that a resume needs, and random numbers that need not be kept."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from instar import UserError
from instar.checkpoint import State, find_state, load_state, save_state
from instar.instances import NEVER, InstanceTable, read_instances
from instar.randomness import generator, key
from instar.storage import WriteError


def test_rows_are_found_where_they_were_written_in_any_order() -> None:
    table = InstanceTable(6, remembered=("gap",))
    table.write(torch.tensor([4, 1]), {"kappa": torch.tensor([7, 3]), "gap": torch.tensor([0.5, -0.25])})
    rows = table.rows(torch.tensor([1, 4, 0]))
    assert rows["kappa"].tolist() == [3, 7, 0]
    assert rows["gap"].tolist() == [-0.25, 0.5, 0.0]
    assert rows["seen"].tolist() == [NEVER] * 3
    assert len(table) == 6
    table.write(torch.tensor([4]), {"kappa": torch.tensor([2])})
    assert table.columns["kappa"].tolist() == [0, 3, 0, 0, 2, 0]


def test_rows_are_copies_as_they_stood_before_the_step() -> None:
    table = InstanceTable(3)
    before = table.rows(torch.tensor([0, 1]))
    table.write(torch.tensor([0, 1]), {"loss": torch.tensor([1.5, 2.5], requires_grad=True)})
    assert before["loss"].tolist() == [0, 0]
    assert table.columns["loss"].tolist() == [1.5, 2.5, 0]
    assert not table.columns["loss"].requires_grad


def test_means_are_over_the_instances_of_one_epoch() -> None:
    table = InstanceTable(5)
    table.write(torch.tensor([0, 1]), {"seen": torch.tensor([0, 0]), "loss": torch.tensor([1.0, 3.0])})
    table.write(torch.tensor([1, 2]), {"seen": torch.tensor([1, 1]), "loss": torch.tensor([5.0, 7.0])})
    assert table.mean("loss", epoch=0) == 1.0
    assert table.mean("loss", epoch=1) == 6.0
    assert np.isnan(table.mean("loss", epoch=2))


def test_a_table_survives_the_disk_and_holds_plain_arrays_of_small_types(tmp_path: Path) -> None:
    table = InstanceTable(4, remembered=("gap",))
    table.write(
        torch.tensor([2]), {"kappa": torch.tensor([9]), "gap": torch.tensor([0.125]), "correct": torch.tensor([1])}
    )
    table.save(tmp_path / "epoch_000.npz")
    stored = read_instances(tmp_path / "epoch_000.npz")
    assert {name: str(array.dtype) for name, array in stored.items()} == {
        "seen": "int32", "kappa": "int16", "loss": "float32", "correct": "uint8", "gap": "float32",
    }  # fmt: skip
    assert stored["kappa"].tolist() == [0, 0, 9, 0]
    assert stored["gap"].tolist() == [0, 0, 0.125, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_000.npz"]


def test_a_table_that_cannot_be_used_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot remember kappa: every instance table has it already"):
        InstanceTable(3, remembered=("kappa", "gap"))
    with pytest.raises(UserError, match="no column 'gap'; it has seen, kappa, loss, correct"):
        InstanceTable(3).write(torch.tensor([0]), {"gap": torch.tensor([1.0])})
    with pytest.raises(UserError, match="cannot read the instance table"):
        read_instances(tmp_path / "missing.npz")
    for content in (b"", b"not a zip file", b"PK\x03\x04 and no more"):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot read the instance table"):
            read_instances(tmp_path / "damaged.npz")


def test_arrays_that_could_run_code_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", kappa=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="cannot read the instance table"):
        read_instances(tmp_path / "evil.npz")


def _network(width: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3)
    )


def _state(kind: str = "sgd", *, width: int = 3, rows: int = 8, average: bool = True) -> State:
    model = _network(width).to(memory_format=torch.channels_last)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    follows = copy.deepcopy(model) if average else None
    return State(model, optimizer, InstanceTable(rows, remembered=("gap",)), follows)


def _run(state: State, steps: int) -> None:
    for _ in range(steps):
        x = torch.rand(4, 1, 4, 4, generator=generator(1, step=state.updates, purpose="images"))
        loss = F.cross_entropy(state.model(x), torch.tensor([0, 1, 2, 0]), reduction="none")
        state.optimizer.zero_grad()
        loss.mean().backward()
        state.optimizer.step()
        state.table.write(torch.arange(4) + state.updates % 4, {"loss": loss, "gap": loss - 1})
        if state.average is not None:
            with torch.no_grad():
                for a, b in zip(state.average.parameters(), state.model.parameters(), strict=True):
                    a.lerp_(b, 0.3)
        state.updates += 1


def _everything(state: State) -> dict[str, torch.Tensor]:
    found = {f"m{k}": v for k, v in state.model.state_dict().items()} | {
        f"t{k}": v for k, v in state.table.columns.items()
    }
    if state.average is not None:
        found |= {f"a{k}": v for k, v in state.average.state_dict().items()}
    for i, entries in state.optimizer.state_dict()["state"].items():
        found |= {f"o{i}{k}": torch.as_tensor(v) for k, v in entries.items()}
    return found


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("average", [True, False])
def test_a_resumed_state_goes_on_bit_for_bit_like_the_uninterrupted_one(
    tmp_path: Path, kind: str, average: bool
) -> None:
    straight = _state(kind, average=average)
    _run(straight, 3)
    straight.epoch, straight.step, straight.seconds = 2, 5, 1.25
    straight.best = {"epoch": 1, "robust": 0.25, "clean": 0.5}
    save_state(straight, tmp_path / "state.safetensors", fingerprint="run 1")
    resumed = _state(kind, average=average)
    load_state(resumed, tmp_path / "state.safetensors", fingerprint="run 1")
    assert (resumed.epoch, resumed.step, resumed.updates, resumed.seconds) == (2, 5, 3, 1.25)
    assert resumed.best == straight.best
    for steps in (0, 3):
        _run(straight, steps)
        _run(resumed, steps)
        ours, theirs = _everything(resumed), _everything(straight)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_state_before_the_first_step_can_be_saved_and_loaded(tmp_path: Path) -> None:
    fresh = _state()
    save_state(fresh, tmp_path / "state.safetensors", fingerprint="run 1")
    other = _state()
    load_state(other, tmp_path / "state.safetensors", fingerprint="run 1")
    assert all(torch.equal(a, b) for a, b in zip(_everything(other).values(), _everything(fresh).values(), strict=True))


def _refused(state: State, path: Path, *, fingerprint: str = "run 1") -> str:
    before = {name: t.clone() for name, t in _everything(state).items()}
    with pytest.raises(UserError) as caught:
        load_state(state, path, fingerprint=fingerprint)
    assert all(torch.equal(t, before[name]) for name, t in _everything(state).items()), "nothing may be loaded in part"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_that_cannot_be_resumed_from_is_one_clear_line_and_changes_nothing(tmp_path: Path) -> None:
    path, state = tmp_path / "state.safetensors", _state()
    assert "there is no checkpoint" in _refused(state, path)
    _run(state, 1)
    save_state(state, path, fingerprint="run 1")
    whole = path.read_bytes()
    assert "belongs to a run with another configuration" in _refused(_state(), path, fingerprint="run 2")
    assert "another architecture or training set" in _refused(_state(width=4), path)
    assert "another architecture or training set" in _refused(_state(rows=9), path)
    assert "another architecture or training set" in _refused(_state(average=False), path)
    for damaged in (b"", whole[:5], whole[:100], whole[: len(whole) // 2], whole[:-1], b"\xff" * 200, whole + b"more"):
        path.write_bytes(damaged)
        assert "is damaged and cannot be resumed from" in _refused(_state(), path)


def test_a_file_of_another_kind_or_format_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    assert "has format None; this version reads 2" in _refused(_state(), path)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata={"state": json.dumps({"format": 99})})
    assert "has format 99; this version reads 2" in _refused(_state(), path)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata={"state": "{not json"})
    assert "is damaged" in _refused(_state(), path)


def test_saving_again_replaces_the_file_whole_and_keeps_nothing_but_the_one_before_it(tmp_path: Path) -> None:
    path, state = tmp_path / "state.safetensors", _state()
    for _ in range(3):
        _run(state, 1)
        save_state(state, path, fingerprint="run 1")
    for file, updates in ((path, 3), (tmp_path / "state-previous.safetensors", 2)):
        resumed = _state()
        load_state(resumed, file, fingerprint="run 1")
        assert resumed.updates == updates
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-previous.safetensors", "state.safetensors"]
    with pytest.raises(UserError, match=r"cannot write .*Is the disk full or read-only\?"):
        save_state(state, tmp_path / "missing" / "state.safetensors", fingerprint="run 1")


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_a_save_that_fails_leaves_both_states_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _refusing(errno.EPERM))
    path, state = tmp_path / "state.safetensors", _state()
    for _ in range(2):
        _run(state, 1)
        save_state(state, path, fingerprint="run 1")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"state.safetensors", "state-previous.safetensors"}
    monkeypatch.setattr("os.fsync", _refusing(errno.ENOSPC))
    with pytest.raises(WriteError, match="No space left on device"):
        save_state(state, path, fingerprint="run 1")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def _refusing(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_every_bit_that_flips_anywhere_in_a_state_is_noticed(tmp_path: Path) -> None:
    path, state = tmp_path / "state.safetensors", _state(width=1, rows=2)
    _run(state, 1)
    save_state(state, path, fingerprint="run 1")
    whole = path.read_bytes()
    # All of them would take minutes; a stride that is prime to eight meets every bit of a byte.
    for place in range(0, 8 * len(whole), 101):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="is damaged and cannot be resumed from"):
            load_state(_state(width=1, rows=2), path, fingerprint="run 1")


def test_a_state_of_the_first_format_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    path, state = tmp_path / "state.safetensors", _state()
    _run(state, 2)
    save_state(state, path, fingerprint="run 1")
    with safetensors.safe_open(str(path), framework="pt") as file:
        numbers = json.loads(file.metadata()["state"]) | {"format": 1}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={"state": json.dumps(numbers)})
    resumed = _state()
    load_state(resumed, path, fingerprint="run 1")
    assert resumed.updates == 2
    assert all(torch.equal(t, _everything(state)[name]) for name, t in _everything(resumed).items())
    numbers["format"] = 2
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata={"state": json.dumps(numbers)})
    assert "is damaged and cannot be resumed from: it tells no checksum" in _refused(_state(), path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the states after two steps and after one."""
    state = _state()
    for _ in range(2):
        _run(state, 1)
        save_state(state, tmp_path / "state.safetensors", fingerprint="run 1")
    return tmp_path


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: bytes(len(b)), lambda b: b[:-1] + bytes([b[-1] ^ 4])]
)
def test_a_damaged_newest_state_is_set_aside_and_the_one_before_it_taken(
    saved: Path, damage: Callable[[bytes], bytes]
) -> None:
    newest, notes = saved / "state.safetensors", list[str]()
    assert find_state(saved, note=notes.append) == newest
    assert notes == []
    damaged = damage(newest.read_bytes())
    newest.write_bytes(damaged)
    for name in ("state-damaged.safetensors", "state-damaged-2.safetensors"):
        assert find_state(saved, note=notes.append) == saved / "state-previous.safetensors"
        assert (saved / name).read_bytes() == damaged
        assert not newest.exists()
        assert "state.safetensors is damaged (" in notes[-1]
        assert notes[-1].endswith(f"it is kept as {name}. Going on from the state before it, epoch 0, step 0")
        newest.write_bytes(damaged)


def test_a_missing_newest_state_gives_way_to_the_one_before_it(saved: Path) -> None:
    (saved / "state.safetensors").unlink()
    notes: list[str] = []
    assert find_state(saved, note=notes.append) == saved / "state-previous.safetensors"
    assert "state.safetensors is missing. Going on from the state before it" in notes[0]


@pytest.mark.parametrize("missing", [None, "state.safetensors", "state-previous.safetensors"])
def test_without_a_whole_state_one_line_says_what_to_do_and_nothing_is_touched(
    saved: Path, missing: str | None
) -> None:
    for file in saved.iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    if missing:
        (saved / missing).unlink()
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(UserError, match=r"Start again into another --out; with --init .*last\.safetensors") as caught:
        find_state(saved, note=pytest.fail)
    assert ("it is missing" in str(caught.value)) == (missing is not None)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_state_of_a_later_version_is_refused_and_not_taken_for_damaged(saved: Path) -> None:
    path = saved / "state.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, metadata={"state": json.dumps({"format": 99})})
    with pytest.raises(UserError, match="has format 99; this version reads 2"):
        find_state(saved, note=pytest.fail)
    assert path.exists()


def test_random_numbers_are_keyed_by_everything_that_tells_draws_apart() -> None:
    base = {"seed": 0, "epoch": 0, "step": 0, "purpose": "start"}
    changes = [{}, {"seed": 1}, {"epoch": 1}, {"step": 1}, {"purpose": "order"}, {"epoch": 10}, {"step": 10}]
    keys = [key(arguments.pop("seed"), **arguments) for arguments in ({**base, **change} for change in changes)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)
    # Digits must not run into one another: epoch 1, step 11 is not epoch 11, step 1.
    assert key(0, epoch=1, step=11, purpose="a") != key(0, epoch=11, step=1, purpose="a")
    assert key(1, epoch=1, step=1, purpose="a") != key(11, epoch=1, step=1, purpose="a")


def test_a_key_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert key(0, purpose="start") == 4296531689870226690
    assert key(7, epoch=3, step=11, purpose="augment") == 8102529956735314966


def test_keyed_generators_repeat_their_draws_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first = torch.rand(4, generator=generator(3, epoch=1, step=2, purpose="start"))
    again = torch.rand(4, generator=generator(3, epoch=1, step=2, purpose="start"))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(4, generator=generator(3, epoch=1, step=3, purpose="start")))
    assert torch.equal(torch.get_rng_state(), before)
