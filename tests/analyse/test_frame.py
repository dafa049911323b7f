"""The frame: results survive their files, long work resumes, and what cannot be done is told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instar.analyse import ANALYSES, Found, Missing, analyse, open_files, open_targets, read, stored
from instar.analyse.perform import renamed
from instar.analyse.target import Portion, Target
from instar.cli import main
from instar.errors import UserError
from instar.report.stored import UnavailableError
from instar.train import train

Pictures = Callable[..., tuple[Tensor, Tensor]]


def some_found(**protocol: object) -> Found:
    tables = {"rows": {"index": np.arange(3), "name": np.array(["a", "b", "ç"])}, "one": {"x": np.array([np.nan])}}
    known = {"label": "AT, best", "checkpoint": "best", "split": "test", "key": "k1", "n": 3} | protocol
    return Found("pairs", "Pairs", "A summary.", {"share": 0.1 + 0.2, "none": float("nan")}, tables, known)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def count_images(target: Target, seen: list[int], *, fail_at: int | None = None) -> dict[str, np.ndarray]:
    def compute(portion: Portion) -> dict[str, Tensor]:
        if fail_at is not None and int(portion.index[0]) >= fail_at:
            raise KeyboardInterrupt
        seen.append(len(portion.y))
        return {"total": portion.x.sum((1, 2, 3))}

    with target.examined() as subject:
        return target.piecewise("totals", subject, {"what": 1}, compute)[0]


def test_a_result_survives_its_files(tmp_path: Path) -> None:
    found = some_found()
    again = read(found.write(tmp_path).path or "")
    assert again.figures["share"] == found.figures["share"]  # to the last bit
    assert np.isnan(again.figures["none"])
    assert again.protocol == found.protocol
    assert (again.name, again.title, again.summary) == (found.name, found.title, found.summary)
    assert again.tables["rows"]["name"].tolist() == ["a", "b", "ç"]
    assert np.isnan(again.tables["one"]["x"]).all()
    assert again.path == tmp_path / "best-pairs.json"
    assert "NaN" not in again.path.read_text()


def test_a_table_must_be_a_table() -> None:
    with pytest.raises(UserError, match="equally long"):
        Found("x", "", "", {}, {"rows": {"a": np.arange(2), "b": np.arange(3)}}, {})
    with pytest.raises(UserError, match="not objects"):
        Found("x", "", "", {}, {"rows": {"a": np.array([None])}}, {})


def test_a_damaged_result_is_one_clear_line(tmp_path: Path) -> None:
    found = some_found().write(tmp_path)
    assert found.path is not None
    table = found.path.with_suffix(".npz")
    whole = table.read_bytes()
    for content in (whole[:-30], b"", b"no archive"):
        table.write_bytes(content)
        with pytest.raises(UserError, match="cannot read the analysis"):
            read(found.path)
    table.unlink()
    with pytest.raises(UserError, match="cannot read the analysis"):
        read(found.path)
    found.path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="no analysis of format 1"):
        read(found.path)


def test_a_result_of_another_protocol_is_kept(tmp_path: Path) -> None:
    some_found(n=50000).write(tmp_path)
    some_found(n=50000).write(tmp_path)
    assert not (tmp_path / "earlier").exists()  # the same again
    some_found(key="k2", n=3).write(tmp_path)
    (kept,) = (tmp_path / "earlier").glob("*.json")
    assert read(kept).protocol["n"] == 50000
    assert [found.protocol["key"] for found in stored(tmp_path)] == ["k2"]


def test_names_of_files_tell_splits_apart_where_they_are_not_the_usual_ones() -> None:
    assert some_found().stem == "best-pairs"
    assert some_found(split="train").stem == "best-pairs-train"
    assert replace(some_found(), name="vulnerability").stem == "best-vulnerability-test"
    assert some_found(checkpoint="compared", split=None).stem == "compared-pairs"


def test_interrupted_work_goes_on_where_it_stopped(pictures: Pictures, tmp_path: Path) -> None:
    model, data = net(), pictures(25)
    (target,) = open_targets(model, data=data, eps=0.1, batch_size=5, out=tmp_path)
    target = replace(target, shard_size=10)
    first: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        count_images(target, first, fail_at=20)
    assert sum(first) == 20
    second: list[int] = []
    rows = count_images(target, second)
    assert sum(second) == 5
    np.testing.assert_allclose(rows["total"], data[0].sum((1, 2, 3)), rtol=1e-6)
    assert rows["index"].tolist() == list(range(25))
    assert rows["label"].tolist() == data[1].tolist()
    third: list[int] = []
    count_images(target, third)
    assert third == []


def test_finished_parts_of_another_model_or_of_other_images_are_not_taken(pictures: Pictures, tmp_path: Path) -> None:
    model, (x, y) = net(), pictures(10)

    def counted(model: nn.Module, x: Tensor, **options: object) -> int:
        (target,) = open_targets(model, data=(x, y), eps=0.1, out=tmp_path, **options)
        seen: list[int] = []
        count_images(target, seen)
        return sum(seen)

    assert counted(model, x) == 10
    assert counted(model, x) == 0
    assert counted(net(), x) == 10
    assert counted(model, x + 1e-4) == 10
    assert counted(model, x, seed=1) == 10


def test_a_model_is_left_as_it_was_found(pictures: Pictures) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (found,) = analyse(model, data=pictures(20), eps=0.1, only=["vulnerability"], split="test")
    assert isinstance(found, Found)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_images_are_those_that_the_run_was_trained_on(trained: Path) -> None:
    (target,) = open_targets(trained, which="train", n=None, checkpoint="last")
    run = open_files(trained).require_run()
    assert len(target.split) == run.config["data"]["train_images"]
    seen = np.unique(np.concatenate([run.instances(epoch)["position"] for epoch in run.tables]))
    assert np.isin(seen, target.split.indices).all()
    assert "held out" in target.images
    (test,) = open_targets(trained, which="test", n=50, checkpoint="last")
    assert test.images == "first 50 of the 360 official test images of Digits (8×8)"


def test_a_run_gets_every_analysis_and_its_comparison(trained: Path) -> None:
    heard: list[Found | Missing] = []
    done = analyse(
        trained, n=20, only=["vulnerability", "pairs", "overfitting", "agreement"], heard=heard.append,
        settings={"vulnerability": {"landscapes": False}},
    )  # fmt: skip
    assert heard == done
    assert all(isinstance(one, Found) for one in done), done
    names = {path.name for path in (trained / "analyses").glob("*.json")}
    assert names >= {
        "best-vulnerability.json", "last-vulnerability-test.json", "best-pairs.json", "run-overfitting.json",
        "run-agreement.json", "compared-vulnerability.json",
    }  # fmt: skip
    again = stored(trained)
    assert [one.name for one in again] == sorted((one.name for one in again), key=list(ANALYSES).index)
    joined = next(one for one in again if one.name == "agreement").tables["difficulty"]
    assert "vulnerability" in joined  # agreement reads what was stored before it


def test_kept_epochs_are_put_side_by_side_as_a_run_and_as_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    usual = {"data": "digits", "width": 4, "batch_size": 512, "ema": 0.0, "arguments": {"steps": 1}}
    train("pgd_at", out=run, epochs=3, keep_every=1, **usual)
    how = {"only": ["vulnerability"], "split": "train", "n": 30, "settings": {"vulnerability": {"landscapes": False}}}
    of_run = analyse(run, checkpoint="kept", **how)
    files = [run / "checkpoints" / f"epoch_{epoch:03d}.safetensors" for epoch in range(3)]
    of_files = analyse(files, out=tmp_path / "files", **how)
    for done in (of_run, of_files):
        assert [one.checkpoint for one in done[:3]] == ["epoch_000", "epoch_001", "epoch_002"]
        compared = done[-1]
        assert isinstance(compared, Found)
        assert compared.compares
        changes = compared.tables["changes"]
        assert [(a, b) for a, b in zip(changes["from_epoch"], changes["to_epoch"], strict=True)] == [(0, 1), (1, 2)]
        before, after = (one.tables["instances"] for one in done[1:3] if isinstance(one, Found))
        assert changes["more_vulnerable_share"][1] == np.mean(after["vulnerability"] > before["vulnerability"])
    plain = tmp_path / "plain"
    train("pgd_at", out=plain, epochs=1, **usual)
    with pytest.raises(UserError, match="kept no epochs but best and last; instar train --keep-every 1 keeps each"):
        open_targets(plain, checkpoint="kept")


def test_what_is_not_there_is_told_and_the_rest_is_done(trained: Path) -> None:
    for path in (trained / "checkpoints").iterdir():
        path.unlink()
    done = analyse(trained, n=20, only=["pairs", "overfitting"])
    missing, found = done
    assert isinstance(missing, Missing)
    assert "has no checkpoint" in missing.reason
    assert isinstance(found, Found)


def test_weights_alone_have_no_training_to_look_at(trained: Path, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"best{suffix}").write_bytes((trained / "checkpoints" / f"best{suffix}").read_bytes())
    found, missing = analyse(tmp_path / "best.safetensors", n=20, only=["pairs", "overfitting"])
    assert isinstance(found, Found)
    assert found.path == tmp_path / "analyses" / "best-pairs.json"
    assert isinstance(missing, Missing)
    assert not missing.failed
    assert "no log and no instance tables" in missing.reason
    with pytest.raises(UnavailableError, match="weights file"):
        open_files(tmp_path / "best.safetensors")


def test_a_model_of_another_data_set_is_one_line(trained: Path) -> None:
    coloured = torch.rand(20, 3, 8, 8), torch.arange(20) % 10
    (missing,) = analyse(trained, data=coloured, eps=0.1, checkpoint="last", only=["pairs"])
    assert isinstance(missing, Missing)
    assert missing.failed
    assert "Is it made for this data set?" in missing.reason


def test_equal_weights_are_one_member_of_a_comparison() -> None:
    best = some_found(weights_sha256="w", target="run")
    last = some_found(weights_sha256="w", target="run", checkpoint="last", label="AT, last")
    other = some_found(weights_sha256="v", target="run", checkpoint="last", label="AT, last")
    assert [one.label for one in renamed([best, last])] == ["AT, best and last"]
    assert [one.label for one in renamed([best, other])] == ["AT, best", "AT, last"]
    seeds = [some_found(target=f"/r/{k}", training_seed=k, weights_sha256=str(k)) for k in (0, 1)]
    assert [one.label for one in renamed(seeds)] == ["AT, best, seed 0", "AT, best, seed 1"]
    folders = [some_found(target=f"/r/{k}", training_seed=0, weights_sha256=str(k)) for k in ("a", "b")]
    assert [one.label for one in renamed(folders)] == ["AT, best, a", "AT, best, b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["pears"]}, "unknown analysis 'pears'. Did you mean 'pairs'"),
        ({"split": "tset"}, "unknown split 'tset'"),
        ({"only": ["pairs"], "settings": {"pairs": {"atack": 1}}}, "unknown setting of pairs 'atack'"),
        ({"only": ["pairs"], "settings": {"overfitting": {}}}, "unknown analysis in settings"),
    ],
)
def test_a_wrong_name_is_said_at_once(trained: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        analyse(trained, **options)  # type: ignore[arg-type]


def test_the_command_prints_summaries_and_where_results_lie(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    words = ["analyse", "pgd_at", "--only", "pairs,overfitting", "--n", "20", "--checkpoint", "last", "--device", "cpu"]
    assert main([*words, "--set", "pairs.attack=PGD(Linf(0.1), steps=2)"]) == 0
    printed = capsys.readouterr().out
    assert "pairs (PGD-AT, last): Under attack" in printed
    assert "pgd_at/analyses" in printed
    assert "2 results in" in printed
    assert read(trained / "analyses" / "last-pairs.json").protocol["attack"].startswith("PGD-2 ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "analyse what?"),
        (["nowhere"], "no run folder or weights file nowhere"),
        (["pgd_at", "--n", "0"], "--n must be a number of images, or all"),
        (["pgd_at", "--set", "pairs"], "--set takes analysis.setting=value"),
        (["pgd_at", "--set", "pears.x=1"], "unknown analysis 'pears'"),
        (["pgd_at", "--onyl", "pairs"], "unknown flag 'onyl'"),
        (["pgd_at", "--eps", "8"], "Did you mean 8/255?"),
        (["pgd_at", "--norm", "L7", "--eps", "0.1"], "unknown norm 'L7'"),
        (["pgd_at", "--checkpoint", "besst"], "unknown checkpoint 'besst'"),
        (["pgd_at", "--data", "digist"], "unknown data set 'digist'"),
        (["pgd_at", "--device", "tpu"], "device 'tpu' cannot be used here"),
        (["pgd_at", "--batch-size", "0"], "batch_size must be at least 1; got 0"),
        (["pgd_at", "--only", ""], "no analysis is named"),
        (["pgd_at", "--set", "pairs.attack=3"], "attack of pairs must be Attack | None; got 3"),
        (["pgd_at", "--set", "geometry.classes=(1, 2, 3)"], "classes of geometry must be tuple[int, int] | None"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    trained: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(trained.parent)
    assert main(["analyse", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_failed_analysis_is_told_by_the_exit_status(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained / "log.jsonl").write_text("{damaged\n")
    monkeypatch.chdir(trained.parent)
    assert main(["analyse", "pgd_at", "--only", "overfitting"]) == 2
    assert "log.jsonl is damaged" in capsys.readouterr().err
    (trained / "log.jsonl").write_text("")
    (trained / "instances" / "epoch_001.npz").write_bytes(b"damaged")
    assert main(["analyse", "pgd_at", "--only", "agreement"]) == 1
    printed = capsys.readouterr().out
    assert "agreement (PGD-AT) failed: cannot read the instance table" in printed
    assert "1 failed" in printed


def test_what_is_missing_without_being_asked_for_leaves_the_other_analyses(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (trained / "checkpoints").glob("*.safetensors"):
        file.unlink()
    assert main(["analyse", str(trained), "--only", "pairs,overfitting", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "pairs" in printed
    assert "has no checkpoint best or last" in printed
    assert "1 results in" in printed


def test_a_run_whose_best_epoch_is_its_last_is_not_compared_with_itself(trained: Path) -> None:
    for suffix in (".safetensors", ".json"):
        best, last = (trained / "checkpoints" / f"{name}{suffix}" for name in ("best", "last"))
        best.write_bytes(last.read_bytes())
    done = analyse(trained, n=20, only=["pairs"])
    assert [one.checkpoint for one in done if isinstance(one, Found)] == ["best", "last"]
    assert len(done) == 2
