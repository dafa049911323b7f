"""Clocks that jump, readers that fail, and runs that shall repeat bit for bit."""

from __future__ import annotations

import datetime
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import instar.data.ahead
import instar.saving
from instar import UserError, pgd_at
from instar.data import DatasetInfo, load
from instar.data.ahead import one_ahead
from instar.data.indexed import FolderImages
from instar.guards import deterministic
from instar.guards.deterministic import WORKSPACE
from instar.train import train

pytestmark = pytest.mark.timeout(900)  # two starts of PyTorch on a machine that may be busy

SMALL = {"model": "small_cnn", "width": 4, "batch_size": 512, "epochs": 2, "precision": "float32"}


def _flags() -> tuple[Any, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32, os.environ.get(WORKSPACE)


def test_the_flags_are_set_within_and_restored_behind_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    before = _flags()
    assert not before[0]
    seen = []

    def work() -> None:
        with deterministic():
            seen.append(_flags())
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert seen == [(True, True, False, False, False, ":4096:8")]
    assert _flags() == before
    with deterministic(False):
        assert _flags() == before


def test_it_says_when_it_comes_too_late_and_what_has_no_deterministic_algorithm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=r"too late: CUDA has started already. Set CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        deterministic(device="cuda").__enter__()
    assert not torch.are_deterministic_algorithms_enabled()
    text = "adaptive_backward_cuda does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(UserError, match=r"no deterministic algorithm .*adaptive_backward_cuda"),
        deterministic(device="cpu"),
    ):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="another matter"), deterministic(device="cpu"):
        raise RuntimeError("another matter")


RECIPES = ("gairat", "spat", "iseat", "free_at")


def test_two_runs_in_new_processes_give_the_same_bits(tmp_path: Path) -> None:
    kind = SMALL | {"epochs": 1, "batch_size": 20, "selection": 10}
    code = (
        "import sys, torch; from instar.train import train; from instar.data import ResidentImages, load\n"
        "digits = load('digits'); rows = torch.arange(70)\n"
        "few = ResidentImages(digits.fetch(rows), digits.labels[rows], digits.info)\n"
        f"for name in {RECIPES!r}:\n"
        "    given = {} if name == 'free_at' else {'steps': 2}\n"
        "    out = sys.argv[1] + '/' + name\n"
        f"    train(name, data=few, out=out, arguments=given, deterministic=True, **{kind!r})\n"
    )
    running = []
    for name, salt in (("a", "1"), ("b", "2")):  # sets and dictionaries of the two have another order
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": salt}
        running.append(subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], env=environment))
    assert [process.wait() for process in running] == [0, 0]
    for recipe in RECIPES:
        a, b = (load_file(tmp_path / name / recipe / "checkpoints" / "state.safetensors") for name in "ab")
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], recipe


def test_deterministic_mode_is_written_down_but_is_no_other_run(tmp_path: Path) -> None:
    train(pgd_at(steps=1), out=tmp_path, deterministic=True, **SMALL | {"epochs": 1})
    assert '"deterministic": true' in (tmp_path / "run.json").read_text()
    train(pgd_at(steps=1), out=tmp_path, resume=True, **SMALL | {"epochs": 1})


def test_a_clock_that_jumps_disturbs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], float]:
        began = time.monotonic()
        done = train(pgd_at(steps=1), out=tmp_path / name, save_every=1e6, **SMALL)
        return load_file(tmp_path / name / "checkpoints" / "state.safetensors"), done.log, time.monotonic() - began

    weights, log, _ = run("usual")
    jumps = itertools.cycle([0.0, 4e9, 1.7e9, -1e9, 2.5e9])  # 1970, 2096, 2023, 1938, 2049
    monkeypatch.setattr(time, "time", lambda: next(jumps))

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(abs(next(jumps)), tz)

    monkeypatch.setattr(datetime, "datetime", Jumping)
    saves: list[int] = []
    real = instar.saving.save_state
    monkeypatch.setattr(
        instar.saving, "save_state", lambda state, *a, **k: (saves.append(state.updates), real(state, *a, **k))
    )
    again, other, seconds = run("jumping")
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert [line | {"seconds": 0} for line in log] == [line | {"seconds": 0} for line in other]
    assert saves == [2, 4], "saved at the ends of epochs, not whenever the clock has jumped"
    assert 0 < other[-1]["seconds"] < seconds


def test_no_source_measures_time_by_the_clock_on_the_wall() -> None:
    source = Path(instar.__file__).parent
    found = {path.name for path in source.rglob("*.py") if "time.time()" in path.read_text(encoding="utf-8")}
    assert found == set()


def test_a_reader_that_fails_is_one_line() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise OSError(5, "Input/output error")
        return number

    taken = []
    with pytest.raises(UserError, match=r"images could not be read: OSError: .*Input/output error"):
        taken.extend(one_ahead(work, range(4)))
    with pytest.raises(UserError, match=r"^as it is$"):
        list(one_ahead(lambda _: (_ for _ in ()).throw(UserError("as it is")), [1]))


def test_results_before_a_failure_are_still_given() -> None:
    def work(number: int) -> int:
        return 6 // (2 - number)

    stream = one_ahead(work, range(4))
    assert [next(stream), next(stream)] == [3, 6]
    with pytest.raises(UserError, match="ZeroDivisionError"):
        next(stream)


def test_a_reader_that_has_died_or_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(_: int) -> int:
        raise SystemExit  # ends the thread without a word

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    with pytest.raises(UserError, match="the thread that reads images has died"):
        list(one_ahead(leave, [1]))
    release = threading.Event()
    monkeypatch.setattr(instar.data.ahead, "PATIENCE", 1)
    try:
        with pytest.raises(UserError, match="no images came for"):
            list(one_ahead(lambda _: release.wait(), [1]))
    finally:
        release.set()


def test_a_picture_that_vanishes_during_training_is_one_line(tmp_path: Path) -> None:
    from PIL import Image

    files = []
    for number in range(40):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
        files.append(file)
    info = DatasetInfo(
        **{
            **vars(load("digits").info),
            "name": "pictures",
            "classes": ("a", "b"),
            "shape": (3, 8, 8),
            "mean": (0.5,) * 3,
            "std": (0.2,) * 3,
        }
    )
    images = FolderImages(tuple(files), torch.arange(40) % 2, info)
    files[7].unlink()
    with pytest.raises(UserError, match=r"7\.png"):
        train(pgd_at(steps=1), data=images, out=tmp_path / "run", **SMALL | {"batch_size": 8, "selection": 4})
