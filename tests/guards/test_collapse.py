"""Collapse and attacks that find nothing are told with figures, and nobody is told who trains well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from instar import UserError, natural, p_sat, pgd_at
from instar.analyse import overfitting
from instar.data import ResidentImages, SelectionSplit, load
from instar.guards import catastrophic, judge, probe, single_step_only, watch
from instar.guards import collapse as definitions
from instar.guards.collapse import Sight
from instar.instances import InstanceTable
from instar.methods import RECIPES, free_at
from instar.schedules import Progress
from instar.train import train

SMALL = {"model": "small_cnn", "width": 4, "batch_size": 128, "precision": "float32"}
FINE = Sight(clean=0.8, single=0.5, several=0.45, largest=0.12, usual=0.1, broken=9, rise=2.0, most=0.1, count=256)


def _names(*sights: Sight, resting: bool = True) -> list[str]:
    return [alarm.name for alarm in judge(sights, resting=resting)]


def test_robustness_that_falls_while_one_step_is_withstood_is_catastrophic_overfitting() -> None:
    fallen = replace(FINE, single=0.6, several=0.1)
    assert _names(FINE, fallen) == ["catastrophic overfitting"]
    assert _names(FINE, fallen, resting=False) == [], "a curriculum is not judged before it is over"
    assert _names(FINE, fallen, FINE) == [], "what has passed is not told again"
    chance = replace(FINE, single=0.2, several=9 / 64, count=64)
    assert _names(chance, replace(chance, several=4 / 64)) == [], "five images more or less"
    diverged = replace(FINE, clean=0.3, single=0.12, several=0.1)
    assert _names(FINE, diverged) == [], "who loses both has another problem"


def test_a_network_that_never_withstood_more_than_one_step_is_told_too() -> None:
    assert _names(replace(FINE, single=0.75, several=0.02)) == ["single step"]
    assert _names(replace(FINE, single=0.75, several=0.02), resting=False) == []
    assert not single_step_only(0.24, 0.0)
    assert not single_step_only(0.75, 0.45)


def test_one_class_for_most_images_is_told_when_it_lasts() -> None:
    same = replace(FINE, clean=0.1, single=0.1, several=0.1, largest=0.6)
    assert _names(same) == [], "so does a network in its first epoch"
    assert _names(same, same, resting=False) == ["majority class"]
    mostly = replace(same, usual=0.3)
    assert _names(mostly, mostly) == [], "a frequent class may be predicted often: halfway to all is 65 %"


def test_an_attack_that_finds_nothing_is_told_once_there_is_something_to_find() -> None:
    idle = replace(FINE, broken=0, rise=1.005)
    assert _names(idle) == ["idle attack"]
    assert _names(replace(idle, rise=1.02)) == _names(replace(idle, broken=1)) == []
    assert _names(replace(idle, clean=0.15)) == [], "nothing is learned yet"
    assert _names(idle, resting=False) == []


def test_the_analysis_and_training_share_one_definition() -> None:
    assert overfitting.catastrophic is catastrophic is definitions.catastrophic


class Masked(nn.Module):
    """Right about bright and dark images, without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        shade = x.mean((1, 2, 3))
        bright = (shade > 0.5).to(x.dtype) + 0 * shade
        return self.scale * torch.stack([1 - bright, bright], 1)


def _two_classes() -> SelectionSplit:
    images = torch.cat([torch.zeros(20, 1, 8, 8), torch.ones(20, 1, 8, 8)]).mul(255).to(torch.uint8)
    info = replace(load("digits").info, name="shades", classes=("dark", "bright"))
    data = ResidentImages(images, torch.arange(40) // 20, info)
    return SelectionSplit(data, torch.arange(0, 40, 2))


def test_a_gradient_of_zero_is_an_attack_that_finds_nothing_and_the_network_is_left_as_found() -> None:
    model, split, table = Masked().train(), _two_classes(), InstanceTable(40)
    found = watch(
        free_at(eps=0.1),  # attacks in train mode
        model,
        split,
        progress=Progress(epoch=0, epochs=3),
        table=table,
        seed=0,
        train_images=20,
    )
    assert found is not None
    assert (found.sight.clean, found.sight.single, found.sight.several, found.sight.largest) == (1.0, 1.0, 1.0, 0.5)
    assert [alarm.name for alarm in found.alarms] == ["idle attack"]
    assert model.training
    assert float(model.seen) == 0, "buffers are as they were"
    assert probe(natural(), model, split, table=table, seed=0) is None, "natural training attacks nothing"
    assert probe(pgd_at(eps=0.0), model, split, table=table, seed=0) is None, "an eps of 0 is what was asked for"


def test_the_curriculum_of_p_sat_is_judged_when_it_is_over() -> None:
    usual: dict[str, Any] = {"table": InstanceTable(40), "seed": 0, "train_images": 20}
    told = []
    for epoch in range(4):
        found = watch(p_sat(), Masked(), _two_classes(), progress=Progress(epoch=epoch, epochs=4), **usual)
        assert found is not None
        told.append([alarm.name for alarm in found.alarms])
    assert told[0] == told[1] == [], "the bound is still rising"
    assert told[3] == ["idle attack"]


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_an_eps_that_is_far_too_small_is_told_in_the_first_epochs(tmp_path: Path) -> None:
    notes: list[str] = []
    arguments = {"eps": 0.0001, "steps": 1}
    train("pgd_at", out=tmp_path / "run", arguments=arguments, epochs=2, note=notes.append, **SMALL)
    assert len([line for line in notes if "the attack finds nothing" in line]) == 1, "once"
    assert any("Check eps (8/255 is usual" in line for line in notes)
    assert "idle attack" in _log(tmp_path / "run")[-1]["alarms"]


@pytest.mark.parametrize("recipe", ["pgd_at", "p_sat", "free_at", "natural"])
def test_who_trains_well_is_told_nothing(recipe: str, tmp_path: Path) -> None:
    notes: list[str] = []
    short = {} if recipe in ("natural", "free_at") else {"steps": 2}
    train(RECIPES[recipe], out=tmp_path, arguments=short, epochs=3, note=notes.append, **SMALL)
    assert [line for line in notes if "training images" not in line] == []
    lines = _log(tmp_path)
    assert all(line.get("alarms", []) == [] for line in lines)
    assert ("probe_pgd" in lines[0]) == (recipe != "natural")


def test_single_step_training_at_a_far_too_large_eps_is_told_and_stops_where_that_is_wanted(tmp_path: Path) -> None:
    kind = {"model": "preact_resnet18", "width": 4, "batch_size": 64, "precision": "float32", "augment": "none"}
    kind |= {"ema": 0.0, "schedule": "constant", "lr": 0.2, "epochs": 12}
    with pytest.raises(UserError, match=r"stopped: robust against one step only: .*use an attack of several steps"):
        train("fgsm_at", arguments={"eps": 0.3}, out=tmp_path, on_collapse="stop", **kind)
    lines = _log(tmp_path)
    assert len(lines) < 12
    assert lines[-1]["alarms"] == ["single step"]
    assert lines[-1]["probe_fgsm"] - lines[-1]["probe_pgd"] > 0.25
    assert all(line["alarms"] == [] for line in lines[:-1])
    saved = json.loads(safe_open(str(tmp_path / "checkpoints" / "state.safetensors"), "pt").metadata()["state"])
    assert saved["epoch"] == len(lines), "everything up to there is saved"


def test_a_rate_at_which_everything_becomes_one_class_is_told_within_an_epoch_too(tmp_path: Path) -> None:
    kind = SMALL | {"augment": "none", "ema": 0.0, "schedule": "constant", "lr": 5.0, "width": 8, "batch_size": 64}
    with pytest.raises(UserError, match=r"majority class: .* \(threshold 5\d%\).* goes on all the same"):
        train("fgsm_at", arguments={"eps": 0.3}, out=tmp_path, epochs=3, on_collapse="stop", probe_every=5, **kind)
    saved = json.loads(safe_open(str(tmp_path / "checkpoints" / "state.safetensors"), "pt").metadata()["state"])
    assert saved["step"] > 0, "noticed and saved between two epochs"
