"""Runs with averaged weights are judged by the average and by the weights that were trained."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from instar.attacks.transfer import online
from instar.cli import main
from instar.errors import UserError
from instar.evaluate import evaluate, read
from instar.evaluate.adaptive import adaptive
from instar.train import train

FEW = partial(adaptive, steps=5, short=2, restarts=1, queries=2, searches=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average and one without, on the embedded digits."""
    place = tmp_path_factory.mktemp("runs")
    for name, ema in (("averaged", 0.9), ("plain", 0.0)):
        common = {"data": "digits", "model": "small_cnn", "width": 4, "epochs": 1, "batch_size": 64}
        train("natural", out=place / name, ema=ema, lr=0.05, device="cpu", **common)
    return place


def test_online_weights_are_a_checkpoint_that_differs_from_the_average(runs: Path, tmp_path: Path) -> None:
    run = runs / "averaged"
    (record,) = evaluate(run, checkpoint="online", suite="quick", n=40, out=tmp_path)
    assert record.checkpoint == "online"
    told = record.protocol["checkpoint"]
    assert told["which"] == told["weights"] == "online"
    assert told["file"] == "state.safetensors"
    assert told["epoch"] == 0
    assert "best and last hold their average" in told["rule"]
    (last,) = evaluate(run, checkpoint="last", suite="quick", n=40, out=tmp_path)
    assert last.protocol["checkpoint"]["weights"] == "average"
    assert last.protocol["weights_sha256"] != record.protocol["weights_sha256"]
    assert last.instances["clean_margin"].tolist() != record.instances["clean_margin"].tolist()
    # It is the network of the resume state, not another one.
    state = run / "checkpoints" / "state.safetensors"
    net, images = online(state), record.instances["index"]
    from instar.data import load as load_data
    from instar.data.indexed import as_float

    test = load_data("digits", split="test")
    with torch.no_grad():
        said = net(as_float(test.fetch(torch.from_numpy(images)))).argmax(1)
    assert said.tolist() == record.instances["prediction"].tolist()
    (by_file,) = evaluate(state, suite="quick", n=40, out=tmp_path / "by file")
    assert by_file.checkpoint == "online"
    assert by_file.protocol["key"] == record.protocol["key"]


def test_all_checkpoints_are_best_last_and_online_where_there_is_an_average(runs: Path, tmp_path: Path) -> None:
    found = evaluate(runs / "averaged", checkpoint="all", suite="quick", n=10, out=tmp_path / "a")
    assert [record.checkpoint for record in found] == ["best", "last", "online"]
    assert [record.path for record in found if record.path] == [
        tmp_path / "a" / f"quick-{name}.json" for name in ("best", "last", "online")
    ]
    plain = evaluate(runs / "plain", checkpoint="all", suite="quick", n=10, out=tmp_path / "b")
    assert [record.checkpoint for record in plain] == ["best", "last"]
    usual = evaluate(runs / "averaged", suite="quick", n=10, out=tmp_path / "a")
    assert [record.checkpoint for record in usual] == ["best", "last"]


def test_the_adaptive_suite_judges_average_and_online_weights_and_each_through_the_other(
    runs: Path, tmp_path: Path
) -> None:
    run = runs / "averaged"
    found = {r.checkpoint: r for r in evaluate(run, suite=FEW, n=6, out=tmp_path)}
    assert list(found) == ["best", "last", "online"]
    for name, column in (("best", "transfer_online"), ("last", "transfer_online"), ("online", "transfer_average")):
        crossed = [key for key in found[name].scores if key.startswith("transfer")]
        assert crossed == [column]
    source = found["online"].protocol["attacks"]["transfer_average"]["expression"]
    assert str(run / "checkpoints" / "last.safetensors") in source
    assert "averaged weights" in found["online"].scores["transfer_average"].title
    assert read(tmp_path / "adaptive-online.json").protocol == found["online"].protocol
    only = evaluate(run, suite=FEW, n=6, out=tmp_path, checkpoint="last")
    assert [record.checkpoint for record in only] == ["last"]
    plain = evaluate(runs / "plain", suite=FEW, n=6, out=tmp_path / "plain")
    assert [record.checkpoint for record in plain] == ["best", "last"]
    assert not [key for record in plain for key in record.scores if key.startswith("transfer")]


def test_runs_without_an_average_or_without_its_state_say_so_in_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"plain has no average.*Give --checkpoint last"):
        evaluate(runs / "plain", checkpoint="online", suite="quick", n=4)
    bare = tmp_path / "bare"
    shutil.copytree(runs / "averaged", bare)
    (bare / "checkpoints" / "state.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be evaluated by its online weights: there is no .*state\.safetensors"):
        evaluate(bare, checkpoint="online", suite="quick", n=4)
    with pytest.warns(UserWarning, match="online weights of .* are not evaluated"):
        found = evaluate(bare, checkpoint="all", suite="quick", n=4)
    assert [record.checkpoint for record in found] == ["best", "last"]
    (bare / "checkpoints" / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        evaluate(bare, checkpoint="online", suite="quick", n=4)
    with pytest.raises(UserError, match=r"unknown checkpoint 'onlin'.*online"):
        evaluate(bare, checkpoint="onlin", suite="quick", n=4)
    assert main(["evaluate", str(runs / "plain"), "--checkpoint", "online", "--suite", "quick", "--n", "4"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no average" in line


def test_online_weights_from_the_command_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", "online", "--suite", "quick", "--n", "10", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["evaluate", str(runs / "averaged"), *words]) == 0
    said = capsys.readouterr().out
    assert "online weights, as the optimiser left them at the end" in said
    record = json.loads((tmp_path / "quick-online.json").read_text())
    assert record["protocol"]["checkpoint"]["weights"] == "online"
