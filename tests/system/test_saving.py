"""What a run keeps, and what happens when the disk or the memory does not take it."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import instar
from instar import UserError
from instar.checkpoint import NEWEST, PREVIOUS, State
from instar.cli import main
from instar.config import Settings
from instar.evaluate import evaluate
from instar.instances import InstanceTable, read_instances
from instar.models import create, save
from instar.room import Sizes, check_disk, check_memory, sizes
from instar.saving import LONGEST_WAIT, Saves, rewind
from instar.storage import WriteError
from instar.train import Event, Interrupted, StepDone, resume, train

SMALL = {"model": "small_cnn", "width": 4, "batch_size": 256, "epochs": 3, "precision": "float32"}
STEPS = 5  # an epoch
METHOD = {"recipe": "gairat", "arguments": {"steps": 2, "burn_in": 0}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(**METHOD, out=out, keep_every=1, **SMALL)
    return out


def _assert_equal(run: Path, whole: Path) -> None:
    names = {file.relative_to(whole) for file in whole.rglob("*") if file.is_file()} - {Path("run.json")}
    there = {file.relative_to(run) for file in run.rglob("*") if file.is_file()} - {Path("run.json")}
    assert {name for name in there if "damaged" not in name.name} == names
    for name in names:
        if name.suffix == ".safetensors":
            ours, theirs = load_file(run / name), load_file(whole / name)
            assert ours.keys() == theirs.keys()
            assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name
        elif name.suffix == ".npz":
            rows, others = read_instances(run / name), read_instances(whole / name)
            assert all((rows[key] == others[key]).all() for key in others), name
        elif name.suffix == ".jsonl":
            logs = [[json.loads(line) for line in (r / name).read_text().splitlines()] for r in (run, whole)]
            assert [a | {"seconds": 0} for a in logs[0]] == [b | {"seconds": 0} for b in logs[1]]
        else:
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def _after(number: int, act: Callable[[], None]) -> Callable[[Event], None]:
    """Do something after the step with this number in the run, from 1."""
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if isinstance(event, StepDone) and seen == number:
            act()

    return watch


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_run_whose_newest_state_is_lost_goes_on_from_the_one_before_and_ends_equal(
    how: str, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted) as stopped:  # one step after the second epoch: what it wrote is taken back too
        train(**METHOD, out=out, keep_every=1, on_event=_after(2 * STEPS + 1, _interrupt), **SMALL)
    assert stopped.value.signal_number == signal.SIGTERM
    newest, previous = (out / "checkpoints" / name for name in (NEWEST, PREVIOUS))
    content = newest.read_bytes()
    flipped = content[:-7] + bytes([content[-7] ^ 64]) + content[-6:]
    damaged = {"truncated": content[:-7], "flipped": flipped}
    if how == "missing":
        newest.unlink()
    else:
        newest.write_bytes(damaged[how])
    notes: list[str] = []
    assert previous.exists()
    resume(out, note=notes.append)
    assert len([line for line in notes if "Going on from the state before it, epoch 2, step 0" in line]) == 1
    assert (out / "checkpoints" / "state-damaged.safetensors").exists() == (how != "missing")
    _assert_equal(out, whole)


def test_a_fallback_across_the_end_of_an_epoch_takes_back_what_that_epoch_wrote(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)  # complete: its newest state is that of the third epoch's end
    newest = out / "checkpoints" / NEWEST
    newest.write_bytes(newest.read_bytes()[:-1])
    (out / "checkpoints" / ".state.safetensors.4711ab.tmp").write_bytes(b"half of a state")
    seen: list[tuple[int, set[str], list[int]]] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepDone):
            tables = {file.name for file in (out / "instances").iterdir()}
            kept = sorted(int(file.stem[-3:]) for file in (out / "checkpoints").glob("epoch_*.safetensors"))
            seen.append((event.epoch, tables, kept))

    resume(out, on_event=watch)
    assert [epoch for epoch, _, _ in seen] == [2] * STEPS
    assert seen[0][1:] == ({"epoch_000.npz", "epoch_001.npz"}, [0, 1])
    _assert_equal(out, whole)


def test_a_best_checkpoint_of_an_epoch_that_is_computed_again_is_not_taken_for_the_best_so_far(tmp_path: Path) -> None:
    best, notes = tmp_path / "checkpoints" / "best.safetensors", list[str]()
    net = nn.Linear(2, 2)
    state = State(net, torch.optim.SGD(net.parameters(), lr=1.0), InstanceTable(2), epoch=2)
    state.best = {"epoch": 1, "robust": 0.5, "clean": 0.75}
    save(net, best, {"epoch": 1})
    assert rewind(tmp_path, state, epochs=3, note=notes.append) == state.best
    best.write_bytes(best.read_bytes().replace(best.read_bytes()[-4:], b"torn"))  # weights and card of two saves
    assert rewind(tmp_path, state, epochs=3, note=notes.append) == {}
    assert rewind(tmp_path, state, epochs=2, note=notes.append) == state.best, "nothing is computed any more"
    save(net, best, {"epoch": 2})
    assert rewind(tmp_path, state, epochs=3, note=notes.append) == {}
    assert notes == []
    best.unlink()
    assert rewind(tmp_path, state, epochs=3, note=notes.append) == {}
    assert notes == [f"{best} is gone: the best checkpoint is chosen from the epochs to come"]


def test_a_run_with_epochs_in_its_log_and_no_state_is_not_begun_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in (NEWEST, PREVIOUS):
        (out / "checkpoints" / name).unlink()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"has 3 epochs, but there is no .* Start again into .*--init"):
        resume(out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """A disk that is full while its ``"full"`` is set."""
    state, flush = {"full": False}, os.fsync

    def fsync(descriptor: int) -> None:
        if state["full"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("instar.saving.FIRST_WAIT", 0.02)
    return state


def test_a_disk_that_is_full_within_an_epoch_is_told_once_and_training_goes_on(
    disk: dict[str, bool], whole: Path, tmp_path: Path
) -> None:
    out, notes = tmp_path / "run", list[str]()
    saved: list[str] = []

    def watch(event: Event) -> None:
        if isinstance(event, StepDone):
            disk["full"] = event.epoch == 1 and event.step < 3
            newest = out / "checkpoints" / NEWEST
            saved.append(hashlib.sha256(newest.read_bytes()).hexdigest() if newest.exists() else "")

    train(**METHOD, out=out, keep_every=1, save_steps=1, on_event=watch, note=notes.append, **SMALL)
    assert len(notes) == 3, "the first one tells where training takes place"
    assert "No space left on device. Is the disk full or read-only? Training goes on" in notes[1]
    assert notes[2] == f"saved again into {out / 'checkpoints'}"
    assert len(set(saved[STEPS : STEPS + 4])) == 1, "the state before the disk was full stays"
    assert len(set(saved)) >= 8, "and is replaced after every step otherwise"
    for name in (NEWEST, PREVIOUS):  # the undisturbed run has an older previous state
        assert (out / "checkpoints" / name).exists()
    shutil.copy(whole / "checkpoints" / PREVIOUS, out / "checkpoints")
    _assert_equal(out, whole)


def test_the_end_of_an_epoch_waits_for_the_disk(disk: dict[str, bool], whole: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "run", list[str]()

    def note(line: str) -> None:
        notes.append(line)
        if "waits" in line:
            signal.setitimer(signal.ITIMER_REAL, 0.3)

    former = signal.signal(signal.SIGALRM, lambda *_: disk.update(full=False))
    try:
        full = _after(2 * STEPS, lambda: disk.update(full=True))
        train(**METHOD, out=out, keep_every=1, on_event=full, note=note, **SMALL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert len(notes) == 3
    assert "No space left on device. Is the disk full or read-only? The run waits up to 300 s for it" in notes[1]
    assert "saved again" in notes[2]
    _assert_equal(out, whole)


def test_a_run_stops_in_one_line_if_the_disk_stays_full_and_goes_on_when_it_is_not(
    disk: dict[str, bool], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instar.saving.PATIENCE", 0.0)
    out = tmp_path / "run"
    full = _after(2 * STEPS, lambda: disk.update(full=True))
    with pytest.raises(WriteError, match=r"No space left on device.* The run waited 0 s; what was saved is whole"):
        train(**METHOD, out=out, keep_every=1, on_event=full, **SMALL)
    disk["full"] = False
    resume(out)
    _assert_equal(out, whole)


def test_a_run_that_waits_for_the_disk_still_listens_to_a_signal(
    disk: dict[str, bool], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    full = _after(2 * STEPS, lambda: disk.update(full=True))
    with pytest.raises(Interrupted, match="SIGTERM: the disk did not take the end of epoch 1") as stopped:
        train(
            **METHOD,
            out=out,
            keep_every=1,
            on_event=full,
            note=lambda line: _interrupt() if "waits" in line else None,
            **SMALL,
        )
    assert stopped.value.signal_number == signal.SIGTERM
    disk["full"] = False
    resume(out)
    _assert_equal(out, whole)


def test_a_stop_on_a_full_disk_says_that_the_state_before_is_whole(
    disk: dict[str, bool], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop = _after(STEPS + 2, lambda: (disk.update(full=True), _interrupt()))
    with pytest.raises(Interrupted, match=r"SIGTERM: cannot write .* was saved before is whole; go on with: instar"):
        train(**METHOD, out=out, keep_every=1, on_event=stop, **SMALL)
    disk["full"] = False
    resume(out)
    _assert_equal(out, whole)


def test_saves_are_due_by_seconds_and_steps_and_failed_ones_later_and_later(tmp_path: Path) -> None:
    now, notes = 0.0, list[str]()
    settings = Settings(save_every=100.0, save_steps=7)
    saves = Saves(tmp_path / "gone", fingerprint="x", settings=settings, note=notes.append, clock=lambda: now)
    net = nn.Linear(2, 2)
    state = State(net, torch.optim.SGD(net.parameters(), lr=1.0), InstanceTable(2))
    due = []
    for state.updates in range(1, 15):
        due += [state.updates] if saves.due(state) else []
    assert due == [7, 14]
    now = 101.0
    state.updates = 15
    assert saves.due(state)
    tried = []
    while now < 1000 - 1:
        if saves.due(state):
            assert not saves.attempt(state), "its folder does not exist"
            tried.append(now)
        now += 1.0
    waits = [after - before for before, after in itertools.pairwise(tried)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, LONGEST_WAIT]
    assert len(notes) == 1


def test_a_slow_save_is_not_repeated_before_a_hundred_times_its_length(tmp_path: Path, monkeypatch) -> None:
    now, took = 0.0, 2.0

    def slow(*_: object, **__: object) -> None:
        nonlocal now
        now += took

    monkeypatch.setattr("instar.saving.save_state", slow)
    saves = Saves(tmp_path, fingerprint="x", settings=Settings(), note=print, clock=lambda: now)
    net = nn.Linear(2, 2)
    state = State(net, torch.optim.SGD(net.parameters(), lr=1.0), InstanceTable(2))
    begun = []
    for _ in range(2000):
        now += 1.0
        if saves.due(state):
            begun.append(now)
            took = 8.0 if len(begun) == 1 else 2.0
            saves.write(state)
    assert begun == [301, 309 + 801, 1112 + 301, 1415 + 301]


def test_every_so_many_epochs_are_kept_and_the_newest_of_them_alone_if_wished(tmp_path: Path, capsys) -> None:
    out, kind = tmp_path / "run", SMALL | {"epochs": 7, "batch_size": 1024}
    train("pgd_at", out=out, arguments={"steps": 1}, keep_every=2, keep_newest=2, **kind)
    kept = sorted(file.name for file in (out / "checkpoints").glob("epoch*"))
    assert kept == ["epoch_003.json", "epoch_003.safetensors", "epoch_005.json", "epoch_005.safetensors"]
    model = instar.load(out, checkpoint="epoch_005")
    alone = instar.load(out / "checkpoints" / "epoch_005.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    for target, which in ((out / "checkpoints" / "epoch_003.safetensors", "both"), (out, "epoch_003")):
        (record,) = evaluate(target, suite="quick", n=4, checkpoint=which)
        assert (record.checkpoint, record.protocol["checkpoint"]["epoch"]) == ("epoch_003", 3)
        assert record.path.parent == out / "evaluations"
    words = ["--only", "geometry", "--n", "4"]
    assert main(["analyse", str(out / "checkpoints" / "epoch_003.safetensors"), *words]) == 0
    assert list((out / "analyses").glob("epoch_003-geometry*.json"))
    capsys.readouterr()
    assert main(["evaluate", str(out), "--suite", "quick", "--n", "4", "--checkpoint", "epoch_9"]) == 2
    assert "unknown checkpoint 'epoch_9'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no checkpoint epoch_001"):
        evaluate(out, suite="quick", n=4, checkpoint="epoch_001")


def test_what_is_kept_and_when_may_change_at_a_resume(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(**METHOD, out=out, on_event=_after(2, _interrupt), **SMALL)
    stored = json.loads((out / "run.json").read_text())
    for name in ("save_steps", "keep_every", "keep_newest"):  # a run from before these settings
        del stored["training"][name]
    (out / "run.json").write_text(json.dumps(stored))
    assert main(["train", "--resume", "--out", str(out), "--keep-every", "1", "--save-every", "300"]) == 0
    _assert_equal(out, whole)
    with pytest.raises(UserError, match="unknown setting that may differ at a resume 'batch_size'"):
        resume(out, batch_size=128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_steps": -1}, "save_steps must be at least 0; got -1"),
        ({"save_every": float("nan")}, "save_every must be at least 0; got nan"),
        ({"keep_every": 1.5}, "keep_every must be int; got 1.5"),
        ({"keep_newest": 2}, "keep_newest = 2 needs keep_every"),
    ],
)
def test_intervals_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**settings)


class _Greedy(nn.Module):
    """A network that runs out of memory in a certain forward pass."""

    def __init__(self, error: Exception, *, after: int) -> None:
        super().__init__()
        self.net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
        self.error, self.left = error, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        if self.left < 0:
            raise self.error
        return self.net(x)


GREEDY = {"batch_size": 512, "epochs": 2, "ema": 0.0, "arguments": {"steps": 1}, "fold": False, "save_steps": 1}


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")],
    ids=["python", "cpu"],
)
def test_too_little_memory_is_one_line_that_says_what_to_lower(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--accumulate 4 .* smaller --batch_size than 512, --precision bf16") as caught:
        train("pgd_at", out=tmp_path / "run", model=_Greedy(error, after=0), accumulate=2, **GREEDY)
    assert "\n" not in str(caught.value)


def test_a_run_that_ran_out_of_memory_goes_on_from_its_last_save(tmp_path: Path) -> None:
    error, out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), tmp_path / "run"
    with pytest.raises(UserError, match=f"go on with: instar train --resume --out {out} --accumulate 2"):
        train("pgd_at", out=out, model=_Greedy(error, after=3), **GREEDY)
    train("pgd_at", out=out, model=_Greedy(error, after=99), resume=True, **GREEDY)
    train("pgd_at", out=tmp_path / "whole", model=_Greedy(error, after=99), **GREEDY)
    ours, theirs = (load_file(run / "checkpoints" / "last.safetensors") for run in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train("pgd_at", out=tmp_path / "run", model=_Greedy(RuntimeError("shapes do not fit"), after=0), fold=False)


def test_the_size_of_a_run_is_known_before_it_starts(whole: Path) -> None:
    settings = Settings(epochs=3, keep_every=1, keep_newest=2)
    net = instar.load(whole, checkpoint="last")
    table = len(read_instances(whole / "instances" / "epoch_000.npz")["seen"])
    needed = sizes(net, instar.gairat(), settings, rows=table)
    needed = Sizes(**{**vars(needed), "average": needed.weights})
    on_disk = (whole / "checkpoints" / NEWEST).stat().st_size
    assert needed.state <= on_disk < 1.2 * needed.state + 8000, "what safetensors tells of each tensor comes to it"
    assert needed.kept == 2


def test_a_disk_and_a_memory_that_certainly_cannot_hold_the_run_are_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = Sizes(weights=10, trained=10, optimizer=10, average=10, table=30, kept=2, epochs=5)
    assert (needed.state, needed.least, needed.most) == (60, 80, 3 * 60 + 5 * 10 + 5 * 30)
    notes: list[str] = []
    for free, resumed in ((379, False), (79, True)):
        monkeypatch.setattr("instar.room.disk_free", lambda folder, free=free: free)
        check_disk(needed, tmp_path, resume=resumed, note=notes.append)
    assert len(notes) == 2
    for free in (380, None):
        monkeypatch.setattr("instar.room.disk_free", lambda folder, free=free: free)
        check_disk(needed, tmp_path, resume=False, note=pytest.fail)
    monkeypatch.setattr("instar.room.disk_free", lambda folder: 1000)
    out = tmp_path / "run"
    with pytest.raises(UserError, match="has room for 0 MiB, and the first epoch alone writes 0 MiB"):
        train("pgd_at", out=out, **SMALL)
    assert not out.exists()
    monkeypatch.setattr("instar.room.disk_free", lambda folder: None)
    monkeypatch.setattr("instar.room.memory_free", lambda device: 59)
    monkeypatch.setattr("instar.room._memory_information", lambda: {"SwapFree": 0})
    with pytest.raises(UserError, match="alone take 0 MiB: take a smaller model or width"):
        check_memory(needed, torch.device("cpu"))
    monkeypatch.setattr("instar.room.memory_free", lambda device: 60)
    check_memory(needed, torch.device("cpu"))
    with pytest.raises(UserError, match="average, the copies that on_nan=skip keeps and instance table alone take"):
        check_memory(replace(needed, spare=30), torch.device("cpu"))


def test_the_copies_of_a_run_that_skips_bad_steps_count_as_memory_and_not_on_the_disk() -> None:
    net = nn.Linear(250, 1000, bias=False)
    plain, skips = (sizes(net, instar.gairat(), Settings(on_nan=how), rows=10) for how in ("stop", "skip"))
    assert plain.spare == 0
    assert skips == replace(plain, spare=plain.weights + plain.optimizer + plain.average)
    assert (skips.state, skips.most) == (plain.state, plain.most)
