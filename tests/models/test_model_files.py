"""Our own files: round trips, atomic writing, and what damaged or foreign ones say."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from instar.errors import UserError
from instar.models import files
from instar.models.files import load, read_card, save
from instar.models.registry import create, origin
from instar.storage import write_atomically


def small(**changes: object) -> nn.Module:
    return create("small_cnn", **{"classes": 10, "width": 4, "seed": 0, **changes})


def saved(folder: Path, **changes: object) -> tuple[Path, nn.Module]:
    model = small(mean=[0.5] * 3, std=[0.25] * 3, **changes)
    model(torch.rand(8, 3, 32, 32))  # moves the running statistics
    path = folder / "best.safetensors"
    save(model, path, {"dataset": "digits", "epoch": 3})
    return path, model


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("small_cnn", {"width": 4, "head": "cosine", "scale": 5.0}),
        ("resnet18", {"width": 4, "image_size": 96, "activation": "silu"}),
        ("preact_resnet18", {"width": 4, "final_norm": False}),
        ("wrn-10-1", {"padding": "same"}),
        ("mnist_cnn", {"width": 4, "channels": 1, "image_size": 28, "dropout": 0.1}),
        ("timm/convnext_atto", {"mean": [0.5] * 3}),
    ],
)
def test_loading_what_was_saved_gives_the_same_logits(name: str, arguments: dict[str, object], tmp_path: Path) -> None:
    model = create(name, **{"classes": 7, "seed": 1, **arguments}).eval()
    made = origin(model)
    x = torch.rand(2, made.arguments["channels"], made.arguments["image_size"], made.arguments["image_size"])
    expected = model(x)
    save(model.to(memory_format=torch.channels_last), tmp_path / "last.safetensors", {})
    again = load(tmp_path / "last.safetensors")
    assert torch.equal(again(x), expected)
    assert not again.training
    assert origin(again) == made


def test_loading_leaves_the_random_generator_as_found(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    before = torch.get_rng_state()
    load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_card_says_what_the_weights_are(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    card = json.loads((tmp_path / "best.json").read_text())
    assert card == read_card(path) == read_card(tmp_path / "best.json")
    assert card["architecture"] == "small_cnn"
    assert card["arguments"] == {
        "classes": 10,
        "channels": 3,
        "image_size": 32,
        "width": 4,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    assert (card["classes"], card["mean"], card["dataset"], card["epoch"]) == (10, [0.5] * 3, "digits", 3)
    assert len(card["sha256"]) == 64
    create(card["architecture"], **card["arguments"])


def test_caller_may_say_more_about_the_classes_than_their_number(tmp_path: Path) -> None:
    save(small(), tmp_path / "a.safetensors", {"classes": ["zero", "one"]})
    assert read_card(tmp_path / "a.safetensors")["classes"] == ["zero", "one"]


def test_wrappers_are_taken_off_before_saving(tmp_path: Path) -> None:
    model = small()
    average = torch.optim.swa_utils.AveragedModel(model)
    save(nn.DataParallel(average), tmp_path / "a.safetensors", {})
    assert load(tmp_path / "a.safetensors").state_dict().keys() == model.state_dict().keys()


def test_shared_tensors_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save(model, tmp_path / "a.safetensors", {})
    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load(tmp_path / "a.safetensors", model=fresh)
    assert torch.equal(fresh[1].weight, model[0].weight)


def test_full_disk_is_one_line_and_leaves_the_previous_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    message = one_line(lambda: save(model, path, {"epoch": 4}))
    assert "No space left on device" in message
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_interrupted_write_leaves_the_previous_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, path, {"epoch": 4})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in one_line(lambda: save(small(), tmp_path / "file" / "a.safetensors", {}))
    assert "cannot write" in one_line(lambda: write_atomically(tmp_path / "file" / "a.json", b""))
    assert ".safetensors" in one_line(lambda: save(small(), tmp_path / "a.onnx", {}))
    assert "JSON" in one_line(lambda: save(small(), tmp_path / "a.safetensors", {"when": object()}))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_truncated_weights_are_one_line(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or cut short" in one_line(lambda: load(path))
    path.write_bytes(b"")
    assert "damaged or cut short" in one_line(lambda: load(path))


def test_changed_weights_are_one_line(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "sha256 differs" in one_line(lambda: load(path))


def test_missing_files_are_one_line_with_what_is_there(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    assert "has best.safetensors" in one_line(lambda: load(tmp_path / "bset.safetensors"))
    assert "there is no folder" in one_line(lambda: load(tmp_path / "nowhere" / "a.safetensors"))
    (tmp_path / "best.json").unlink()
    assert "has no card best.json" in one_line(lambda: load(path))
    path.unlink()
    assert "has no weights" in one_line(lambda: load(path))


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"architecture": 5, "sha256": "a"}', '{"sha256": 3}', "[" * 10_000])
def test_card_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    path, _ = saved(tmp_path)
    (tmp_path / "best.json").write_text(text)
    assert "is not a card" in one_line(lambda: load(path))


def edited(path: Path, **changes: object) -> None:
    card = path.with_suffix(".json")
    content = json.loads(card.read_text())
    content.update(changes)
    card.write_text(json.dumps(content))


def test_card_of_another_architecture_is_one_line(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    other = create("resnet18", classes=10, width=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    assert "holds small_cnn, the model is resnet18" in one_line(lambda: load(path, model=other))
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert "does not fit small_cnn" in one_line(lambda: load(path, model=small(width=5)))
    edited(path, architecture="resnet18")
    assert "does not fit resnet18" in one_line(lambda: load(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "resnet81"},
        {"arguments": {}},
        {"arguments": {"classes": "ten"}},
        {"arguments": {"classes": 10, "width": 10**12}},
        {"arguments": {"classes": 10, "name": "resnet18"}},
    ],
)
def test_impossible_card_is_one_line(tmp_path: Path, changes: dict[str, object]) -> None:
    path, _ = saved(tmp_path)
    edited(path, **changes)
    assert "cannot be rebuilt" in one_line(lambda: load(path))


def test_card_cannot_choose_code_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "hostile_module.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef net(classes): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    path, _ = saved(tmp_path)
    edited(path, architecture="hostile_module:net")
    assert "no file may choose code" in one_line(lambda: load(path))
    assert not mark.exists()


def test_card_cannot_make_timm_fetch_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked: list[dict[str, object]] = []
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: asked.append(kw) or original(name, **kw))
    model = create("timm/convnext_atto", classes=10)
    save(model, tmp_path / "a.safetensors", {})
    edited(tmp_path / "a.safetensors", arguments={"classes": 10, "pretrained": True})
    load(tmp_path / "a.safetensors")
    assert not any(kw.get("pretrained") for kw in asked)


def test_model_of_own_code_loads_into_the_model_given(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(model, tmp_path / "a.safetensors", {})
    assert "names no architecture" in one_line(lambda: load(tmp_path / "a.safetensors"))
    fresh = nn.Linear(2, 2)
    assert torch.equal(load(tmp_path / "a.safetensors", model=fresh).weight, model.weight)
