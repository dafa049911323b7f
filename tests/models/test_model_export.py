"""Exported networks: whatever is written is read back with the same logits and the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from instar.cli import main
from instar.errors import UserError
from instar.evaluate import evaluate
from instar.models.export import export
from instar.models.files import load, read_card, save
from instar.models.hub import readme
from instar.models.registry import create, origin

IMAGES = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def trained(**changes: object) -> nn.Module:
    """A network with a normalisation, settled statistics and a logit scale, so that each of them could be lost."""
    wishes = {"classes": 4, "image_size": 16, "width": 4, "head": "cosine", "scale": 5.0, "seed": 1, **changes}
    net = create("small_cnn", mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], **wishes)
    for _ in range(5):
        net(IMAGES)
    with torch.no_grad():
        net.eval()
        net.head.bias -= net(IMAGES).mean(0) / 5.0  # without a favourite class, so that decisions are close
    return net


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights with a card and an evaluation record beside them, as a run has them."""
    path = tmp_path / "run" / "checkpoints" / "best.safetensors"
    threat = {"norm": "Linf", "eps": "1/255"}
    save(trained(), path, {"dataset": "mine", "threat": threat, "epoch": 3, "checkpoint": "best", "method": "Method()"})
    evaluate(path, data=labelled(trained()), suite="quick", out=tmp_path / "run" / "evaluations")
    return path


def labelled(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return IMAGES, net(IMAGES).argmax(1)


@pytest.mark.parametrize(("format", "name"), [("safetensors", "a.safetensors"), ("state_dict", "a.pt"), ("hub", "hub")])
def test_what_was_exported_gives_the_same_numbers_without_further_flags(
    format: str, name: str, weights: Path, tmp_path: Path
) -> None:
    done = export(weights, tmp_path / name, format=format)
    again = load(done.path)
    assert origin(again) == origin(load(weights))
    with torch.no_grad():
        assert torch.equal(again(IMAGES), load(weights)(IMAGES))
    data = labelled(trained())
    (before,) = evaluate(weights, data=data, suite="quick", out=tmp_path / "before")
    (after,) = evaluate(done.path, data=data, suite="quick", out=tmp_path / "after")
    assert 0 < after.scores["worst_case"].correct < len(IMAGES)
    assert after.scores == before.scores
    assert after.protocol["eps"] == "1/255"


def test_state_dict_is_plain_tensors_that_torch_loads_without_running_code(weights: Path, tmp_path: Path) -> None:
    done = export(weights, tmp_path / "net.pt", format="state_dict")
    state = torch.load(done.path, weights_only=True)
    assert type(state) is dict
    assert {type(value) for value in state.values()} == {torch.Tensor}
    fresh = trained(seed=2)
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(IMAGES), trained()(IMAGES))


def test_a_foreign_reader_gets_the_same_tensors_from_the_hub_folder(weights: Path, tmp_path: Path) -> None:
    done = export(weights, tmp_path / "hub", format="hub")
    state = safetensors.torch.load_file(done.path / "model.safetensors")
    assert state["normalize.mean"].flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert float(state["linear.scale"] if "linear.scale" in state else state["fc.scale"]) == 5.0
    config = json.loads((done.path / "config.json").read_text())
    assert (config["model_type"], config["id2label"]) == ("instar", {"0": "0", "1": "1", "2": "2", "3": "3"})
    assert read_card(done.path)["sha256"] == config["sha256"]


def test_the_model_card_gives_every_number_with_its_protocol(weights: Path, tmp_path: Path) -> None:
    record = json.loads((tmp_path / "run" / "evaluations" / "quick-best.json").read_text())
    text = (export(weights, tmp_path / "hub", format="hub").path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: instar")
    assert f"{100 * record['results']['worst_case']['accuracy']:.2f}" in text
    for part in (
        "Linf, eps 1/255",
        "BatchNorm eval",
        "seed 0",
        "margin PGD-20",
        "float32",
        record["protocol"]["images"],
    ):
        assert part in text


def test_numbers_of_other_weights_do_not_get_into_the_model_card(weights: Path, tmp_path: Path) -> None:
    save(trained(seed=2), weights, {"dataset": "mine"})
    text = (export(weights, tmp_path / "hub", format="hub").path / "README.md").read_text()
    assert "None is recorded" in text
    (tmp_path / "run" / "evaluations" / "broken.json").write_text("{")
    export(weights, tmp_path / "other", format="hub")


def test_names_from_a_file_cannot_break_out_of_the_model_card() -> None:
    text = readme("net", {"method": "a | b\n# Robust: 99 %", "dataset": "x]\nlicense: mit"}, [])
    assert "\n# Robust" not in text
    assert "\nlicense" not in text
    assert "a \\| b # Robust: 99 %" in text


def test_nothing_is_overwritten_and_mistakes_are_one_line(weights: Path, tmp_path: Path) -> None:
    export(weights, tmp_path / "a.safetensors")
    export(weights, tmp_path / "hub", format="hub")
    cases = {
        "exists already": (weights, "a.safetensors", "safetensors"),
        "model.safetensors exists already": (weights, "hub", "hub"),
        "must end in .pt": (weights, "b.safetensors", "state_dict"),
        "unknown format 'pickle'": (weights, "b.pkl", "pickle"),
        "no run folder or weights file": (tmp_path / "nothing", "b.safetensors", "safetensors"),
        "no card": (foreign(tmp_path), "b.safetensors", "safetensors"),
    }
    for words, (target, name, format) in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            export(target, tmp_path / name, format=format)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "b.safetensors").exists()


def foreign(folder: Path) -> Path:
    path = folder / "foreign.pt"
    torch.save(trained().state_dict(), path)
    return path


def test_the_network_is_left_as_it_was_found(tmp_path: Path) -> None:
    net = trained().train()
    export(net, tmp_path / "a.pt", format="state_dict", card={"dataset": "mine"})
    assert net.training
    assert read_card(tmp_path / "a.pt")["dataset"] == "mine"


def test_the_command_writes_what_evaluate_reads(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(weights), "--format", "state_dict", "--out", str(tmp_path / "net.pt")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(tmp_path / "net.pt"), str(tmp_path / "net.pt.json")]
    assert main(["export", str(weights), "--format", "zip", "--out", "a"]) == 2
    assert "unknown format 'zip'" in capsys.readouterr().err
    assert main(["export", "--format", "hub"]) == 2
    assert "export what?" in capsys.readouterr().err
    assert main(["export", str(weights)]) == 2
    assert "--out net.safetensors" in capsys.readouterr().err
