"""What users read: verdicts of models with nothing left, stand-ins that are refused, and mistakes in one line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instar.analyse.target import open_targets
from instar.attacks import FoldingError, fold
from instar.cli import main
from instar.cli.evaluate import _Lines
from instar.errors import UserError
from instar.evaluate import Entry, Suite, conclude, evaluate
from instar.evaluate.entries import pgd
from instar.evaluate.symptoms import nothing_left
from instar.evaluate.targets import radius
from instar.models import create, save
from instar.threat import Ball

MakeTask = Callable[..., tuple[nn.Module, Tensor, Tensor]]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    net = create("small_cnn", classes=10, channels=1, image_size=8, width=4, seed=0)
    save(net, tmp_path / "net.safetensors", {"dataset": "digits"})
    return tmp_path / "net.safetensors"


def test_chance_and_nothing_left_are_told_apart_from_soundness() -> None:
    label = np.arange(100) % 10
    none, all_of_it = np.zeros(100, bool), np.ones(100, bool)
    for share, worst, words in (
        (0.12, none, "clean accuracy is 12.0 %, always the same class gives 10.0 %"),
        (0.0, none, "clean accuracy is 0.0 %"),
        (0.9, none, "no image of 100 withstands, so that nothing is left to overestimate"),
    ):
        correct = np.arange(100) < 100 * share
        (finding,) = nothing_left(label, correct, worst)
        assert words in finding.text
        line = conclude([finding]).line
        assert line.startswith("untested")  # no check was made
    for share in (0.3, 0.9):
        assert nothing_left(label, np.arange(100) < 100 * share, all_of_it) == []
    assert nothing_left(np.zeros(5, int), np.ones(5, bool), np.ones(5, bool)) == []


def test_the_verdict_of_a_broken_model_does_not_begin_with_sound(make_task: MakeTask) -> None:
    net, x, y = make_task(4, n=40)
    (broken,) = evaluate(net, data=(x, y), suite="quick", eps=0.5)
    assert broken.scores["worst_case"].correct == 0
    for text in (broken.verdict.line, broken.verdict.short):
        assert "nothing is left to overestimate" in text
        assert not text.startswith("sound")
    assert broken.verdict.word == "sound"  # its number of 0 % is right
    assert "note" in broken.verdict.to_json()
    torch.manual_seed(1)
    (chance,) = evaluate(net, data=(x, torch.randint(0, 4, (40,))), suite="quick", eps=0.001)
    assert "nothing to attack" in chance.verdict.line
    (whole,) = evaluate(net, data=(x, y), suite="quick", eps=0.001)
    assert whole.verdict.line.startswith("sound, as far as this suite can tell")
    assert "note" not in whole.verdict.to_json()


class Branching(nn.Module):
    """Looks at something while it is called."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
        self.how, self.calls, self.seen = how, 0, []
        self.register_buffer("count", torch.zeros(()))
        self.random = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        if self.how == "counter":
            self.calls += 1
            return logits if self.calls % 50 else -logits
        if self.how == "buffer":
            self.count = self.count + 1
            return logits * (1 + self.count / 1e9)
        if self.how == "list":
            self.seen.append(len(self.seen))
            return logits
        if self.how == "chance":
            return logits if self.random.random() < 0.5 else -logits
        if self.how == "value":
            return logits if float(x.sum()) > 0 else -logits
        if self.how == "size":
            return logits if len(x) > 4 else -logits
        if self.how == "hidden":  # from the tracer, which follows no array of numpy
            dark = bool(np.mean(np.asarray(x.detach())) < 0.1)
            return -logits if dark else logits
        return logits


def test_models_whose_forward_branches_or_counts_have_no_stand_in() -> None:
    x = torch.rand(6, 1, 8, 8)
    for how in ("counter", "buffer", "list", "chance", "value", "size", "hidden"):
        torch.manual_seed(0)
        with pytest.raises(FoldingError):
            fold(Branching(how).eval(), x)
    assert fold(Branching("").eval(), x) is not None


def test_a_model_that_flips_dark_images_is_attacked_itself() -> None:
    torch.manual_seed(0)
    net, x = Branching("hidden").eval(), torch.rand(12, 1, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(1)
    (record,) = evaluate(net, data=(x, y), suite=lambda ball: Suite("s", (pgd(ball, steps=3),)), eps=0.05)
    assert record.protocol["folded"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eps", "nix"], "eps must be a number such as 8/255; got 'nix'"),
        (["--normalize", "dataset"], "--normalize is for foreign weights"),
        (["--width", "8"], "--width belongs to --model"),
        (["--suite", "cifar10_c"], "is of the test images of CIFAR-10; got Digits"),
    ],
)
def test_mistakes_on_the_command_line_are_one_short_line(
    words: list[str], said: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(weights), "--n", "4", "--suite", "quick", "--device", "cpu", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert len(line) < 250


def test_foreign_weights_are_asked_about_in_the_words_of_the_command_line(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="give data: --data cifar10"):
        evaluate(tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="give model: --model resnet18"):
        evaluate(tmp_path / "foreign.pt", data="digits")
    with pytest.raises(UserError, match="got 'about a tenth'"):
        radius("about a tenth")


def test_a_model_of_three_channels_refuses_images_of_one(make_task: MakeTask) -> None:
    net = create("small_cnn", classes=3, channels=3, image_size=8, width=4, mean=[0.4] * 3, std=[0.2] * 3)
    with pytest.raises(UserError, match=r"takes 3 channels of 8×8 .* has 1 channel of 8×8"):
        evaluate(net, data=(torch.rand(6, 1, 8, 8), torch.arange(6) % 3), suite="quick", eps=0.1)


def test_progress_names_checkpoint_and_title_and_condenses_corruptions(
    make_task: MakeTask, capsys: pytest.CaptureFixture[str]
) -> None:
    net, x, y = make_task(4, n=8)

    def some(ball: Ball) -> Suite:
        from instar.evaluate.suites import build

        fog = [entry for entry in build("corruptions", ball).entries if entry.name.startswith("fog_")]
        return Suite("s", (Entry("pgd_2", "PGD-2", pgd(ball, steps=2).attack), *fog))

    evaluate(net, data=(x, y), suite=some, eps=0.01, progress=_Lines())
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "module, clean: 8/8, 7 right"
    assert lines[1].startswith("module, PGD-2: 8/8, ")
    assert lines[1].endswith(" robust")
    assert len(lines) == 3
    assert lines[2].startswith("module, fog 5: 8/8, ")
    assert lines[2].endswith(" right")


def test_images_of_another_kind_than_the_network_takes_are_told_with_both_sides(weights: Path) -> None:
    pairs = torch.rand(4, 3, 32, 32), torch.arange(4)
    with pytest.raises(UserError) as caught:
        evaluate(weights, data=pairs, eps=0.1)
    told = str(caught.value)
    assert "takes 1 channel of 8×8 and knows 10 classes; " in told
    assert "has 3 channels of 32×32 and 4 classes" in told
    (target,) = open_targets(weights, data=pairs, eps=0.1)
    with pytest.raises(UserError, match="takes 1 channel of 8×8 and knows 10 classes"), target.examined():
        pytest.fail("it must not be analysed")
