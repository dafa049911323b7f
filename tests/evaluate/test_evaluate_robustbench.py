"""The entry of a leaderboard is complete, or says what it lacks and where it departs from the protocol."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from instar.cli.evaluate import run
from instar.errors import UserError
from instar.evaluate import AutoAttack, Entry, Record, Score, Suite, evaluate, robustbench
from instar.evaluate.finding import Finding
from instar.models import create, save
from instar.threat import Linf

ABOUT = {
    "name": "Overfitting in training",
    "link": "https://example.org/paper",
    "authors": "A. One, B. Two",
    "venue": "NoConf 2031",
    "reported": "52.10",
    "model_name": "One2031Overfitting",
    "checkpoint": "https://example.org/weights",
    "license": "MIT",
}


def record(*, n: int = 10_000, robust: int = 4_876, worst: int | None = None, **protocol: Any) -> Record:
    known = {
        "norm": "Linf",
        "eps": "8/255",
        "eps_value": 8 / 255,
        "data": {"name": "cifar10"},
        "model": {"architecture": "resnet18"},
        "training": {"data": {"name": "cifar10", "additional_data": False}},
        "reference_autoattack": True,
        "weights_sha256": "ab" * 32,
        "images": "all 10000 official test images of CIFAR-10",
        "seed": 0,
        "batch_size": 250,
        "shard_size": 500,
        "precision": "float32",
        "versions": {"pyautoattack": "0.2.0", "torch": "2.6.0"},
        "key": "k",
        **protocol,
    }
    scores = {
        "clean": Score("clean", 8_250, n),
        "autoattack": Score("AutoAttack", robust, n),
        "worst_case": Score("worst case", robust if worst is None else worst, n),
    }
    return Record("runs/a", "robustbench", "best", known, scores)


def test_a_complete_claim_has_every_field_and_nothing_against_it() -> None:
    claim = robustbench.model_info(record(), ABOUT)
    assert dict(claim.info) == {
        "link": "https://example.org/paper",
        "name": "Overfitting in training",
        "authors": "A. One, B. Two",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": "NoConf 2031",
        "architecture": "resnet18",
        "eps": "8/255",
        "clean_acc": "82.50",
        "reported": "52.10",
        "autoattack_acc": "48.76",
        "footnote": None,
        "external": None,
        "unreliable": False,
    }
    assert list(claim.info) == list(robustbench.FIELDS)
    assert (claim.missing, claim.departures) == ((), ())
    for line in (
        "# [New Model] One2031Overfitting",
        "- Robust accuracy: 48.76",
        "- Additional data: false",
        "- Licence: MIT",
    ):
        assert line in claim.text.splitlines()
    assert "TO BE FILLED" not in claim.text


def test_what_nobody_said_is_null_and_listed() -> None:
    claim = robustbench.model_info(record(training={"data": None}))
    told = {"link", "name", "authors", "venue", "reported", "additional_data"}
    assert {field for field in told if claim.info[field] is None} == told
    assert set(claim.missing) == told | {"model_name", "checkpoint", "license"}
    assert claim.text.count("TO BE FILLED") == 8
    assert "- to be filled: authors" in claim.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 500}, "500 images were evaluated, the leaderboard takes 10000"),
        ({"eps": "0.031", "eps_value": 0.031}, "eps is 0.031, the leaderboard's is 8/255"),
        ({"reference_autoattack": False}, "not run in its standard version"),
        ({"data": {"name": "digits"}}, "there is no leaderboard for digits in Linf"),
        ({"norm": "L2", "eps": "0.5", "eps_value": 0.5}, ""),
        ({"data": {"name": "imagenet"}, "eps": "4/255", "eps_value": 4 / 255}, "the leaderboard takes 5000"),
        ({"data": {"name": "cifar100"}, "norm": "L2"}, "no leaderboard for cifar100 in L2"),
    ],
)
def test_departures_from_the_protocol_are_told(changes: Mapping[str, Any], said: str) -> None:
    found = robustbench.departures(record(**changes))
    assert bool(found) == bool(said)
    assert said in "; ".join(found)


def test_a_beaten_autoattack_shows_the_lower_number_and_masked_models_are_marked() -> None:
    claim = robustbench.model_info(record(worst=4_000), ABOUT)
    assert (claim.info["autoattack_acc"], claim.info["external"]) == ("48.76", "40.00")
    assert "- Robust accuracy: 40.00" in claim.text
    from dataclasses import replace

    finding = Finding("headline", "overestimated", 0.1, 0.0, 0.0, 0.0, "beaten by 10 points", "source")
    random = Finding("randomised", "suspect", 1.0, None, 0.0, 0.0, "outputs differ", "source")
    masked = robustbench.model_info(replace(record(), findings=(finding, random)), ABOUT)
    assert masked.info["unreliable"] is True
    assert masked.departures == ("models of this kind are not accepted: outputs differ",)
    assert "beaten by 10 points" in masked.text


def test_files_lie_beside_the_record_where_no_reader_of_records_meets_them(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]], tmp_path: Path
) -> None:
    net, x, y = make_task(10, n=12)
    few = AutoAttack(Linf(0.01), steps=5, queries=5)
    suite = Suite("robustbench", (Entry("autoattack", "AutoAttack", few),))
    (found,) = evaluate(net, data=(x, y), suite=lambda ball: suite, eps=0.01, out=tmp_path)
    entry, text = robustbench.write(found, ABOUT)
    assert (entry, text) == (
        tmp_path / "robustbench-module" / "One2031Overfitting.json",
        tmp_path / "robustbench-module" / "submission.md",
    )
    content = json.loads(entry.read_text())
    assert content["clean_acc"] == f"{100 * 11 / 12:.2f}"
    assert content["autoattack_acc"] == f"{100 * found.scores['autoattack'].accuracy:.2f}"
    assert len(content["departures"]) == 2
    assert [path.name for path in tmp_path.glob("*.json")] == ["robustbench-module.json"]
    with pytest.raises(UserError, match="model_name must be letters"):
        robustbench.write(found, {"model_name": "../elsewhere"})
    with pytest.raises(UserError, match="the record was not written anywhere"):
        robustbench.write(record())


def test_the_command_writes_them_and_takes_what_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4)
    save(net, tmp_path / "net.safetensors", {"dataset": "digits", "threat": {"norm": "Linf", "eps": "0.0"}})
    words = [str(tmp_path / "net.safetensors"), "--suite", "robustbench", "--n", "20", "--device", "cpu"]
    assert run([*words, "--about", "name=A title, with a comma", "--about", "additional_data=no"]) == 0
    content = json.loads((tmp_path / "evaluations" / "robustbench-net" / "model_info.json").read_text())
    assert (content["name"], content["additional_data"], content["eps"]) == ("A title, with a comma", False, "0.0")
    assert "submission.md" in capsys.readouterr().out


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match="unknown field of RobustBench's entries 'autor'"):
        robustbench.model_info(record(), {"autor": "A"})
    with pytest.raises(UserError, match="field=text"):
        robustbench.told(["authors"])
    with pytest.raises(UserError, match="unknown field of RobustBench's entries 'title'"):
        robustbench.told(["title=T"])
    with pytest.raises(UserError, match="additional_data must be true or false; got 'some'"):
        robustbench.model_info(record(), {"additional_data": "some"})
