"""Each check of the doctor catches the mistake that it is for, and says nothing about a sound model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instar.cli import main
from instar.data.catalogue import CATALOGUE
from instar.doctor import Report, examine, examine_machine
from instar.doctor import machine as machines
from instar.doctor.checks import radius_check
from instar.errors import UserError
from instar.models import create, save
from instar.models.registry import Normalized
from instar.threat import L2, Linf

CLASSES = 3


def images(count: int = 96) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Tells apart which channel is brightest, through a layer with BatchNorm, sharply enough that it is never close."""

    def __init__(self, *, sharpness: float = 30.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        return self.sharpness * self.norm(x).mean((2, 3))


class Around(nn.Module):
    """A network with something wrong around it."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.net, self.wrong = Net(), wrong
        if wrong == "flat":
            self.net.sharpness = 1e6
        if wrong == "neighbours":
            self.net.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.wrong == "quantised":
            x = (255 * x).round() / 255
        if self.wrong == "detached":
            x = x.detach() + 0 * x.sum().detach()
        logits: Tensor = self.net(x)
        if self.wrong == "random":
            logits = logits + torch.randn_like(logits)
        if self.wrong == "probabilities":
            logits = logits.softmax(1)
        if self.wrong == "nan":
            logits = logits / 0 * 0
        if self.wrong == "shape":
            logits = logits[:, :, None]
        if self.wrong == "raises":
            raise RuntimeError("expected 28x28\nimages")
        return logits


def labels(x: Tensor) -> Tensor:
    return x.mean((2, 3)).argmax(1)


def looked(model: nn.Module, *, x: Tensor | None = None, **wishes: object) -> Report:
    seen = images()
    told = {"eps": "2/255", "suites": (), "n": 96, "device": "cpu", **wishes}
    return examine(model, data=(seen if x is None else x, labels(seen)), **told)


def levels(report: Report) -> dict[str, str]:
    return {check.name: check.level for check in report.checks if check.level != "ok"}


def test_a_sound_model_has_no_complaint() -> None:
    report = looked(Around("nothing").eval())
    assert levels(report) == {}
    assert report.ok
    assert report["clean accuracy"].value == 1.0
    assert {check.name for check in report.checks} >= {
        "versions",
        "device",
        "input range",
        "output",
        "classes",
        "clean accuracy",
        "normalisation",
        "mode",
        "determinism",
        "batch independence",
        "gradients",
        "float64",
        "precision",
        "eps",
    }


@pytest.mark.parametrize(
    ("wrong", "check", "level", "words"),
    [
        ("probabilities", "output", "error", "probabilities"),
        ("nan", "output", "error", "NaN"),
        ("shape", "output", "error", "shape"),
        ("raises", "output", "error", "expected 28x28 images"),
        ("random", "determinism", "error", "random in eval mode"),
        ("neighbours", "batch independence", "error", "neighbours"),
        ("quantised", "gradients", "error", "100% of images have an input gradient of exactly zero"),
        ("detached", "gradients", "error", "100% of images"),
        ("flat", "gradients", "warning", "loss of exactly zero"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_on_one_line(wrong: str, check: str, level: str, words: str) -> None:
    report = looked(Around(wrong).eval())
    assert report[check].level == level
    assert words in str(report[check])
    assert report.ok == (level != "error")
    assert all("\n" not in line for line in report.lines())


def test_gradients_that_vanish_in_float32_only_are_told_from_those_that_are_zero() -> None:
    report = looked(Around("flat").eval())
    assert report["float64"].level == "ok"  # the loss is zero in either precision
    close = Around("nothing").eval()
    close.net.sharpness = 4000.0  # exp(−200) is a number in float64 only
    report = looked(close)
    assert report["float64"].level == "warning"
    assert "vanish in float32 only" in report["float64"].text


def test_a_model_that_was_trained_on_other_inputs_is_told_which() -> None:
    inner = Normalized(Threshold(), mean=[0.5], std=[0.5], channels=3)
    x = images()
    y = inner(x).argmax(1)
    assert 0.2 < float(y.float().mean()) < 0.8
    told = {"eps": "2/255", "suites": (), "n": 96, "device": "cpu"}
    report = examine(Threshold(), data=(x, y), **told)
    assert report["normalisation"].level == "error"
    assert "--normalize" in report["normalisation"].advice
    twice = Normalized(inner, mean=[0.5], std=[0.5], channels=3)
    report = examine(twice, data=(x, y), **told)
    assert report["normalisation"].level == "error"
    assert "normalised twice" in report["normalisation"].advice
    assert "normalised inside by normalize, net.normalize" in report["normalisation"].text
    report = examine(inner, data=(x, y), **told)
    assert report["normalisation"].level == "ok"


class Threshold(nn.Module):
    """Whether the first pixel is brighter than what is 0.65 before (x − 0.5) / 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        bright = 20 * (x[:, 0, 0, 0] - 0.3)
        return torch.stack([bright.neg(), bright], dim=1)


def test_the_wrong_number_of_classes_is_an_error_on_a_known_data_set() -> None:
    net = create("small_cnn", classes=7, channels=1, image_size=8, width=4)
    report = examine(net, data="digits", suites=(), n=32, device="cpu")
    assert report["classes"].level == "error"
    assert "7 outputs" in report["classes"].text
    few = Around("nothing").eval()
    few.net.norm.num_features = 3
    report = examine(few, data=(images(), torch.arange(96) % 5), eps=0.01, suites=(), device="cpu")
    assert report["classes"].level == "error"


def test_normalised_images_are_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match="Are they normalised"):
        looked(Around("nothing").eval(), x=(images() - 0.5) / 0.25)
    later = images()
    later[5] *= 3  # data are looked at in full when they are fetched, not when they are handed over
    report = looked(Around("nothing").eval(), x=later)
    assert report["input range"].level == "error"
    assert "put it into the model" in str(report["input range"])


@pytest.mark.parametrize(
    ("eps", "level"), [(8, "error"), ("8/255", "ok"), (0, "warning"), (0.9, "error"), (-1, "error")]
)
def test_eps_in_the_wrong_unit_is_noticed(eps: object, level: str) -> None:
    report = looked(Around("nothing").eval(), eps=eps)
    assert report["eps"].level == level
    if eps == 8:
        assert "8/255" in str(report["eps"])


def test_eps_far_from_the_usual_one_asks_what_was_meant() -> None:
    info = CATALOGUE["cifar10"]
    assert radius_check(Linf(8 / 255), info).level == "ok"
    assert radius_check(Linf(0.3), info).level == "warning"
    assert radius_check(L2(8.0), info).level == "ok"  # no usual one is known in L2
    assert radius_check(L2(128.0), info).level == "error"
    assert "128/255" in str(radius_check(L2(128.0), info))
    assert radius_check(L2(8.0), replace(info, norm="L2", eps=0.5)).level == "warning"


def test_running_statistics_that_do_not_fit_are_noticed() -> None:
    net = Around("nothing")
    net.net.norm.running_mean += torch.tensor([3.0, 0.0, -3.0])
    report = looked(net)
    assert report["mode"].level == "warning"
    assert "estimate them anew" in report["mode"].advice
    assert "given in train mode" in report["mode"].text


def test_the_model_and_the_random_generator_are_left_as_they_were_found() -> None:
    net = nn.Sequential(Around("nothing"), nn.Dropout(0.5)).train()
    net[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    looked(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.training
    assert not net[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_a_black_box_is_told_to_take_its_suite() -> None:
    net = Around("nothing").eval()
    net.black_box = True  # type: ignore[assignment]
    report = looked(net, suites=None, images=20)
    assert report["gradients"].level == "warning"
    assert [cost.suite for cost in report.costs] == ["black_box"]


def test_a_file_is_examined_as_evaluate_would_see_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
    save(net, tmp_path / "net.safetensors", {"dataset": "digits", "threat": {"norm": "Linf", "eps": "0.2"}})
    status = main(["doctor", str(tmp_path / "net.safetensors"), "--suite", "quick", "--n", "50", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert status == 1  # untrained: no better than chance
    assert "error    clean accuracy" in printed
    assert "cost     quick on 50 images: about" in printed
    main(["doctor", str(tmp_path / "net.safetensors"), "--suite", "quick", "--n", "50", "--device", "cpu", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["costs"][0]["suite"] == "quick"
    assert {check["name"]: check["level"] for check in told["checks"]}["classes"] == "ok"
    assert told["machine"]["torch"] == torch.__version__


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "GiB free" in printed or "MiB free" in printed


def test_builds_of_torch_and_torchvision_that_do_not_belong_together_are_an_error() -> None:
    known = dict(examine_machine("cpu").machine) | {"torch": "2.15.0+cpu", "torchvision": "0.29.2+cu126"}
    (versions, *_) = machines.machine_checks(known, torch.device("cpu"))
    assert versions.level == "error"
    assert "one package index" in versions.advice


def test_little_memory_and_disk_are_warned_of() -> None:
    known = dict(examine_machine("cpu").machine) | {"memory_free": 2**20, "disk_free": 2**20}
    found = {check.name: check.level for check in machines.machine_checks(known, torch.device("cpu"))}
    assert (found["memory"], found["disk"]) == ("warning", "warning")


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in (
        (["nowhere"], "there is no run folder or weights file nowhere"),
        (["nowhere", "--suite", "quik"], "Did you mean 'quick'"),
        (["nowhere", "--checkpoint", "both"], "unknown checkpoint"),
        (["--recipe", "gairt"], "Did you mean 'gairat'"),
        (["--recipe"], "which recipe?"),
    ):
        assert main(["doctor", *words]) == 2
        complaint = capsys.readouterr().err
        assert expected in complaint
        assert complaint.count("\n") == 1
    with pytest.raises(UserError, match="give data with a module"):
        examine(nn.Linear(2, 2))
    assert math.isfinite(examine_machine("cpu").machine["cores"])


def test_a_preset_or_a_configuration_is_foretold_like_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["--data=digits", "--width=4", "--size=8", "--seconds=0.3", "--json"]
    assert main(["doctor", "--recipe", "pgd_at", "--preset", "fast-cifar10", "--epochs=3", *usual]) == 0
    preset = json.loads(capsys.readouterr().out)
    assert preset["target"] == "pgd_at on digits"
    file = tmp_path / "run.yaml"
    file.write_text("recipe: trades\nepochs: 2\ndata: digits\nbatch_size: 500\n")
    assert main(["doctor", "--config", str(file), "--width=4", "--seconds=0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 2 * 2
    file.write_text("epochs: 2\n")
    assert main(["doctor", "--config", str(file)]) == 2
    assert "the configuration names no recipe" in capsys.readouterr().err
