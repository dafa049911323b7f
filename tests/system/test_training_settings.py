"""Augmentation, mixing, extra data, presets and combinations, through the whole machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import instar
from instar.cli import main
from instar.errors import UserError
from instar.train import Event, Interrupted, StepDone, train

SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "batch_size": 512, "epochs": 2, "precision": "float32"}


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    """A file of 300 generated images of digits, a few of them without a label."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 10, 300)
    labels[::17] = -1
    path = tmp_path / "generated.npz"
    np.savez(path, image=draw.integers(0, 256, (300, 8, 8, 1), dtype=np.uint8), label=labels)
    return path


def _stopping(at: int):
    import os
    import signal

    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, StepDone)
        if isinstance(event, StepDone) and seen == at:
            os.kill(os.getpid(), signal.SIGINT)

    return watch


@pytest.mark.parametrize(
    "settings",
    [{"mix": "cutmix"}, {"augment": "idbh-weak", "mix": "mixup"}, {"extra": True, "extra_smoothing": 0.1}],
    ids=["cutmix", "idbh and mixup", "extra"],
)
def test_a_run_with_mixed_data_resumes_bit_for_bit(settings: dict, extra: Path, tmp_path: Path) -> None:
    if "extra" in settings:
        settings = settings | {"extra": str(extra)}
    arguments = {"steps": 2, "burn_in": 0}
    train("gairat", out=tmp_path / "whole", arguments=arguments, **SMALL, **settings)
    with pytest.raises(Interrupted):
        train("gairat", out=tmp_path / "parts", arguments=arguments, on_event=_stopping(2), **SMALL, **settings)
    train("gairat", out=tmp_path / "parts", arguments=arguments, resume=True, **SMALL, **settings)
    a, b = (load_file(tmp_path / run / "checkpoints" / "state.safetensors") for run in ("whole", "parts"))
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    plain = train("gairat", out=tmp_path / "plain", arguments=arguments, **SMALL)
    assert not torch.equal(next(plain.model.parameters()), a["average.conv1.weight"])


def test_another_extra_file_is_another_run(extra: Path, tmp_path: Path) -> None:
    kind = SMALL | {"epochs": 1, "extra": str(extra)}
    train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, **kind)
    moved = extra.rename(tmp_path / "elsewhere.npz")
    train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, resume=True, **kind | {"extra": str(moved)})
    with np.load(moved) as arrays:
        np.savez(extra, image=arrays["image"], label=(arrays["label"] + 1) % 10)
    with pytest.raises(UserError, match="holds another run: its data setting extra"):
        train("pgd_at", out=tmp_path / "run", arguments={"steps": 1}, resume=True, **kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "idhb-weak"}, "unknown augment 'idhb-weak'. Did you mean 'idbh-weak'"),
        ({"mix": "mixcut"}, "unknown mix 'mixcut'"),
        ({"extra": "nowhere.npz"}, "nowhere.npz"),
        ({"extra": "x.npz", "extra_fraction": 1.5}, "fraction of extra images must be between 0 and 1"),
        ({"extra_smoothing": 1.0}, "extra_smoothing must be in"),
        ({"drops": ((0.7, 0.1), (0.3, 0.01))}, "drops must be pairs"),
    ],
)
def test_a_wrong_setting_of_the_data_gets_one_line(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train("pgd_at", out=tmp_path / "run", **SMALL | settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


COMBINATIONS = {
    "GAIRAT weights, P-SAT curriculum and AWP on TRADES": [
        *("trades", "--set", "loss=CrossEntropy('clean') + 6 * (GeometryWeight(-1.0) * KL())"),
        *("--set", "attack.stop=Exceeds(ProbabilityGap(), Ramp(0, 0.4, 0.3, 0.7))", "--set", "perturbation=AWP(1e-2)"),
    ],
    "ISEAT on hard class pairs": [
        *("iseat", "--set", "requires=CosineHead(8.0, bias=False)"),
        *("--set", "loss=SelfPacedCrossEntropy(of='adv') + 0.1 * (RankWeight(LossGap()) * LogitShift())"),
    ],
    "MAIL weights on SPAT, H-SAT's stop and SAM, averaged by SWA": [
        *("spat", "--set", "attack.stop=Exceeds(LastLayerCurvature(), Ramp(0.2, 1, 0.3, 0.7))"),
        *("--set", "loss=SelfPacedCrossEntropy() + 6 * (ProbabilityMarginWeight(2.0, bias=0.0) * SelfPacedKL())"),
        *("--set", "perturbation=SAM(0.02)", "--set", "average=SWA(0.0)"),
    ],
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_train_from_the_command_line(name: str, tmp_path: Path) -> None:
    small = {"data": "digits", "width": 4, "batch_size": 512, "epochs": 1, "steps": 2, "precision": "float32"}
    flags = [word for name, item in small.items() for word in (f"--{name}", str(item))]
    assert main(["train", *COMBINATIONS[name], *flags, "--out", str(tmp_path / "run")]) == 0
    method = instar.parse(json.loads((tmp_path / "run" / "run.json").read_text())["method"])
    assert repr(method) == json.loads((tmp_path / "run" / "run.json").read_text())["method"]


def test_a_method_that_needs_a_cosine_head_says_so_to_a_foreign_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this method needs a model with a cosine head: the model has no attribute"):
        train("spat", out=tmp_path / "run", **SMALL | {"model": "timm/resnet18", "width": None})


def test_a_preset_is_the_default_and_what_is_given_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "gairat", "--preset", "cifar10-wrn-32-10"]
    assert main([*words, "--print_config"]) == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    assert (whole["epochs"], whole["lr"], whole["eps"], whole["ema"]) == (120, 0.1, 0.031, 0.0)
    assert main([*words, "--epochs", "12", "--width", "2", "--eps", "4/255", "--print_config"]) == 0
    text = capsys.readouterr().out
    given = yaml.safe_load(text)
    assert (given["epochs"], given["width"], given["eps"], given["lr"]) == (12, 2, "4/255", 0.1)
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == text
    assert main(["train", "gairat", "--preset", "nothing"]) != 0
    assert "unknown preset of gairat 'nothing'. Known: " in capsys.readouterr().err


def test_drops_of_the_learning_rate_are_read_from_flag_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "pgd_at", "--schedule", "piecewise", "--drops", "((0.5, 0.2), (150, 0.1))", "--print_config"]
    assert main(words) == 0
    text = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == text
    assert "drops: ((0.5, 0.2), (150, 0.1))" in text


def test_a_run_without_a_better_checkpoint_ends_early_and_stays_ended(tmp_path: Path) -> None:
    notes: list[str] = []
    frozen = {**SMALL, "epochs": 9, "lr": 0.0, "ema": 0.0, "patience": 2, "weight_decay": 0.0}
    done = train("natural", out=tmp_path / "run", note=notes.append, **frozen)
    # With a learning rate of 0 only BatchNorm's statistics move; nothing below depends on when they help last.
    best = int(done.best["epoch"])
    assert [line["epoch"] for line in done.log] == list(range(best + 3))
    assert best + 3 < 9
    assert notes[-1] == f"no better checkpoint in 2 epochs: the run ends after {best + 3} of 9"
    again = instar.train.resume(tmp_path / "run")
    assert [line["epoch"] for line in again.log] == list(range(best + 3))


def test_without_patience_a_run_goes_to_its_end(tmp_path: Path) -> None:
    frozen = {**SMALL, "epochs": 4, "lr": 0.0, "ema": 0.0}
    assert len(train("natural", out=tmp_path / "run", **frozen).log) == 4


def test_patience_is_a_number_of_epochs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="patience must be"):
        train("natural", out=tmp_path / "run", **SMALL, patience=-1)
