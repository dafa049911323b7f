"""Other people's checkpoints: wrappings, prefixes, layouts, and files that would run code."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from instar.errors import UserError
from instar.evaluate import evaluate
from instar.models.files import load, read_card, save
from instar.models.foreign import load_foreign
from instar.models.registry import create


def narrow(**changes: object) -> nn.Module:
    return create("resnet18", **{"classes": 10, "width": 4, "seed": 0, **changes})


def published(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as a training code without a normalisation layer would have it."""
    return OrderedDict((key, value.clone()) for key, value in model.state_dict().items() if "normalize" not in key)


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packaged(name: str) -> Path:
    found = [file for file in importlib.metadata.files("pyautoattack") or () if file.name == name]
    return Path(str(found[0].locate()))


def test_a_published_cifar10_checkpoint_gives_the_logits_of_its_own_code() -> None:
    path = packaged("model_test.pt")
    model = create("resnet18", classes=10)
    report = load_foreign(path, model)
    assert (report.loaded, report.normalization) == (122, "identity")
    space: dict[str, object] = {}
    exec(packaged("resnet.py").read_text(), space)  # the network's code as its authors ship it
    reference = space["ResNet18"]()
    reference.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = model.double().eval()(x)
        torch.testing.assert_close(logits, reference.double().eval()(x), rtol=0, atol=1e-10)
    # Trained: sure of something, even on noise; fresh weights give almost equal logits.
    assert logits.softmax(dim=1).amax(dim=1).mean() > 0.5


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "unaveraged_model_state_dict": prefixed(state, "x.")},
    "net": lambda state: {"net": state, "acc": numpy.float64(0.5), "args": argparse.Namespace(eps=8)},
    "nested": lambda state: {"model": {"state_dict": state}, "optimizer": {"state": {}}},
    "rmodel": lambda state: {"rmodel": state, "best": numpy.int64(3), "curve": numpy.zeros(3)},
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: {"model": prefixed(state, "_orig_mod.")},
    "both": lambda state: {"state_dict": prefixed(state, "module._orig_mod.model.")},
    "lightning": lambda state: {"state_dict": prefixed(state, "network."), "hyper_parameters": attributes(lr=0.1)},
    "lightning with a loss": lambda state: {
        "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(10), "metric.total": torch.zeros(1)}
    },
    "MAIR": lambda state: {
        "rmodel": prefixed(state, "model."),
        "optimizer": {"state": {}},
        "record_info": {"Clean": 84},
    },
    "AWP": lambda state: {
        "state_dict": prefixed(state, "module."),
        "test_robust_acc": 0.5,
        "test_adv_output": numpy.float32(1),
    },
}


def attributes(**entries: object) -> dict[str, object]:
    """A dictionary of the class in which Lightning pickles hyperparameters."""
    made: dict[str, object] = AttributeDict(entries)
    return made


class AttributeDict(dict[str, object]):
    """Stands in for Lightning's class of that name."""


AttributeDict.__module__ = "pytorch_lightning.utilities.parsing"


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's module as far as pickling looks for it."""
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing"):
        module = types.ModuleType(name)
        module.AttributeDict = AttributeDict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.usefixtures("lightning")
def test_usual_wrappings_and_prefixes_are_taken_off(wrapping: str, tmp_path: Path) -> None:
    source, target = narrow(seed=1), narrow(seed=2)
    torch.save(WRAPPINGS[wrapping](published(source)), tmp_path / "a.pt")
    report = load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)
    assert report.normalization == "identity"


NORMALISED = {
    "Sequential": lambda state, mean, std: prefixed(state, "1.") | {"0.mean": mean, "0.std": std},
    "RobustBench": lambda state, mean, std: (
        prefixed(state, "model.") | {"normalize.mean": mean.view(1, 3, 1, 1), "normalize.std": std.view(1, 3, 1, 1)}
    ),
    "Rice": lambda state, mean, std: state | {"mu": mean.view(1, 3, 1, 1), "sigma": std.view(1, 3, 1, 1)},
    "DataParallel": lambda state, mean, std: prefixed(state | {"mean": mean, "std": std}, "module."),
    "Madry": lambda state, mean, std: (
        prefixed(state, "module.model.")
        | {"module.normalizer.new_mean": mean.view(3, 1, 1), "module.normalizer.new_std": std.view(3, 1, 1)}
        | prefixed(state, "module.attacker.model.")
        | {"module.attacker.normalize.new_mean": mean, "module.attacker.normalize.new_std": std}
    ),
}


@pytest.mark.parametrize("layout", NORMALISED)
def test_normalisation_buffers_of_other_codes_are_found(layout: str, tmp_path: Path) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    source, target = narrow(seed=1, mean=mean, std=std), narrow(seed=2)
    torch.save(NORMALISED[layout](published(source), torch.tensor(mean), torch.tensor(std)), tmp_path / "a.pt")
    report = load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)
    assert report.normalization == "file"


@pytest.mark.parametrize(
    ("choice", "mean", "source"),
    [("identity", 0.0, "identity"), ("keep", 0.5, "keep"), (([0.25] * 3, [0.5] * 3), 0.25, "given")],
)
def test_missing_normalisation_is_what_the_caller_chooses(
    choice: object, mean: float, source: str, tmp_path: Path
) -> None:
    torch.save(published(narrow(seed=1)), tmp_path / "a.pt")
    model = narrow(mean=[0.5] * 3, std=[0.5] * 3)
    assert load_foreign(tmp_path / "a.pt", model, normalize=choice).normalization == source
    assert model.normalize.mean.flatten().tolist() == [mean] * 3
    # A card written from now on says what the model really does.
    save(model, tmp_path / "b.safetensors", {})
    assert read_card(tmp_path / "b.safetensors")["arguments"]["mean"] == [mean] * 3
    assert same(load(tmp_path / "b.safetensors"), model)


def test_trades_wide_resnet_loads_without_its_unused_block(tmp_path: Path) -> None:
    source, target = (create("wrn-10-1", classes=10, seed=seed) for seed in (1, 2))
    state = published(source)
    unused = {f"sub_{key}": value + 1 for key, value in state.items() if key.startswith("block1.")}
    torch.save(prefixed(state | unused, "module."), tmp_path / "a.pt")
    report = load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)
    assert len(report.dropped) == len(unused)


def deepmind(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DeepMind's key names for the layout of TRADES."""
    renamed = {}
    inner = {
        "bn1": "batchnorm_0",
        "conv1": "conv_0",
        "bn2": "batchnorm_1",
        "conv2": "conv_1",
        "convShortcut": "shortcut",
    }
    outer = {"conv1": "init_conv", "bn1": "batchnorm", "fc": "logits"}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0].startswith("block"):
            stage = int(parts[0].removeprefix("block")) - 1
            renamed[f"layer.{stage}.block.{parts[2]}.{inner[parts[3]]}.{parts[4]}"] = value
        else:
            renamed[f"{outer[parts[0]]}.{parts[1]}"] = value
    return renamed


def test_deepmind_wide_resnet_is_translated_and_asks_for_its_padding(tmp_path: Path) -> None:
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    source = create(
        "wrn-16-1", classes=10, padding="same", mean=mean.flatten().tolist(), std=std.flatten().tolist(), seed=1
    )
    torch.save(prefixed(deepmind(published(source)) | {"mean": mean, "std": std}, "module."), tmp_path / "a.pt")
    target = create("wrn-16-1", classes=10, padding="same", seed=2)
    load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)
    message = one_line(lambda: load_foreign(tmp_path / "a.pt", create("wrn-16-1", classes=10)))
    assert "padding='same'" in message


def test_what_stands_beside_the_network_is_reported(tmp_path: Path) -> None:
    state = prefixed(published(narrow(seed=1)), "model.") | {"criterion.weight": torch.ones(10)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    assert load_foreign(tmp_path / "a.ckpt", narrow(seed=2)).dropped == ("criterion.weight",)


def test_shortcuts_of_torchvision_are_translated(tmp_path: Path) -> None:
    source, target = narrow(seed=1), narrow(seed=2)
    state = {key.replace(".shortcut.", ".downsample."): value for key, value in published(source).items()}
    assert any(".downsample." in key for key in state)
    torch.save(state, tmp_path / "a.pt")
    load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)


def test_timm_residual_nets_load_from_files_of_the_hub(tmp_path: Path) -> None:
    source, target = (create("timm/resnet10t", classes=10, seed=seed) for seed in (1, 2))
    safetensors.torch.save_file(source.net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t", "num_classes": 10}')
    load_foreign(tmp_path / "model.safetensors", target)
    assert same(source, target)


@pytest.mark.parametrize("name", ["fc", "logits", "classifier", "head", "last_linear"])
def test_head_of_another_name_is_translated(name: str, tmp_path: Path) -> None:
    source, target = narrow(seed=1), narrow(seed=2)
    state = {key.replace("linear.", f"{name}."): value for key, value in published(source).items()}
    torch.save(state, tmp_path / "a.pt")
    load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)


def test_timm_weights_load_under_their_own_names(tmp_path: Path) -> None:
    source, target = (create("timm/convnext_atto", classes=10, seed=seed) for seed in (1, 2))
    torch.save(source.net.state_dict(), tmp_path / "a.pt")
    load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)


def test_safetensors_of_others_load(tmp_path: Path) -> None:
    source, target = narrow(seed=1), narrow(seed=2)
    safetensors.torch.save_file(prefixed(published(source), "model."), tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text('{"config": "of somebody else"}')
    load_foreign(tmp_path / "a.safetensors", target)
    assert same(source, target)


def test_our_own_file_starts_a_fine_tuning_with_its_normalisation(tmp_path: Path) -> None:
    source = narrow(seed=1, mean=[0.5] * 3, std=[0.2] * 3)
    save(source, tmp_path / "a.safetensors", {})
    target = narrow(seed=2, classes=7)
    report = load_foreign(tmp_path / "a.safetensors", target, new_head=True)
    assert report.new_head
    assert report.normalization == "file"
    assert torch.equal(target.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(target.normalize.mean, source.normalize.mean)
    assert torch.equal(target.linear.weight, narrow(seed=2, classes=7).linear.weight)
    assert "new head" in str(report)


def test_other_number_of_classes_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    torch.save(published(narrow(seed=1)), tmp_path / "a.pt")
    target = narrow(seed=2, classes=100)
    message = one_line(lambda: load_foreign(tmp_path / "a.pt", target))
    assert "has 10 classes, the model 100" in message
    assert "new_head" in message
    assert same(target, narrow(seed=2, classes=100))


def test_linear_weights_load_into_a_cosine_head_which_keeps_its_scale(tmp_path: Path) -> None:
    torch.save(published(narrow(seed=1)), tmp_path / "a.pt")
    target = narrow(seed=2, head="cosine", scale=5.0)
    load_foreign(tmp_path / "a.pt", target)
    assert target.linear.scale.item() == 5.0
    assert torch.equal(target.linear.weight, narrow(seed=1).linear.weight)


def test_old_files_without_batch_counters_load(tmp_path: Path) -> None:
    source, target = narrow(seed=1), narrow(seed=2)
    torch.save({k: v for k, v in published(source).items() if "num_batches" not in k}, tmp_path / "a.pt")
    load_foreign(tmp_path / "a.pt", target)
    assert same(source, target)


def test_another_architecture_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    torch.save(published(create("wrn-10-1", classes=10)), tmp_path / "a.pt")
    target = narrow(seed=2)
    message = one_line(lambda: load_foreign(tmp_path / "a.pt", target))
    assert "does not fit resnet18" in message
    torch.save(published(narrow(width=5)), tmp_path / "a.pt")
    message = one_line(lambda: load_foreign(tmp_path / "a.pt", target))
    assert "conv1.weight (5, 3, 3, 3) in the file, (4, 3, 3, 3) in the model" in message
    assert same(target, narrow(seed=2))


def test_loading_what_fits_reports_the_rest(tmp_path: Path) -> None:
    state = published(narrow(seed=1))
    del state["bn1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["layer1.0.conv1.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pt")
    report = load_foreign(tmp_path / "a.pt", narrow(), strict=False)
    assert report.missing == ("bn1.weight",)
    assert report.unexpected == ("extra.weight",)
    assert report.mismatched == ("layer1.0.conv1.weight",)
    torch.save({"nothing.weight": torch.zeros(1)}, tmp_path / "a.pt")
    assert "does not fit" in one_line(lambda: load_foreign(tmp_path / "a.pt", narrow(), strict=False))


def test_entry_chooses_among_several_state_dicts(tmp_path: Path) -> None:
    first, second = narrow(seed=1), narrow(seed=2)
    torch.save({"state_dict": published(first), "raw": published(second)}, tmp_path / "a.pt")
    target = narrow()
    load_foreign(tmp_path / "a.pt", target, entry="raw")
    assert same(second, target)
    assert "has state_dict, raw" in one_line(lambda: load_foreign(tmp_path / "a.pt", target, entry="rwa"))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_file_that_would_run_code_is_refused_in_one_line(legacy: bool, tmp_path: Path) -> None:
    state = published(narrow(seed=1)) | {"state": Hostile(tmp_path / "ran")}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    message = one_line(lambda: load_foreign(tmp_path / "a.pt", narrow()))
    assert "system" in message
    assert "could run code" in message
    assert not (tmp_path / "ran").exists()


def test_pickled_module_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    assert "torch.nn.modules.linear.Linear" in one_line(lambda: load_foreign(tmp_path / "a.pt", narrow()))


def test_torchscript_is_refused_in_one_line(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch advise against it
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    assert "TorchScript" in one_line(lambda: load_foreign(tmp_path / "a.pt", narrow()))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_file_is_one_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save(published(narrow()), path)
    else:
        safetensors.torch.save_file(published(narrow()), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        assert "damaged" in one_line(lambda: load_foreign(path, narrow()))


def test_other_mistakes_are_one_line(tmp_path: Path) -> None:
    assert "no weights at" in one_line(lambda: load_foreign(tmp_path / "a.pt", narrow()))
    assert "cannot read" in one_line(lambda: load_foreign(tmp_path, narrow()))
    torch.save({"epoch": 3, "history": [1, 2]}, tmp_path / "a.pt")
    assert "no state dict under a usual name; it has epoch, history" in one_line(
        lambda: load_foreign(tmp_path / "a.pt", narrow())
    )
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    assert "it has a Tensor" in one_line(lambda: load_foreign(tmp_path / "a.pt", narrow()))
    torch.save(published(narrow()), tmp_path / "a.pt")
    assert "'identity', 'keep'" in one_line(lambda: load_foreign(tmp_path / "a.pt", narrow(), normalize="none"))


def test_an_archive_that_claims_absurd_sizes_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in range(4):
            archive.writestr(f"archive/data/{part}", b"\0" * 50_000_000)
    assert (tmp_path / "a.pt").stat().st_size < 1_000_000
    message = one_line(lambda: load_foreign(tmp_path / "a.pt", narrow()))
    assert "claims to unpack to 200,000,000 bytes" in message


def test_tensors_of_absurd_shapes_are_one_line(tmp_path: Path) -> None:
    state = published(narrow(seed=1))
    state["conv1.weight"] = torch.zeros(1).expand(10**12)
    torch.save(state, tmp_path / "a.pt")
    assert "conv1.weight (1000000000000,) in the file" in one_line(lambda: load_foreign(tmp_path / "a.pt", narrow()))
    header = b'{"w":{"dtype":"F32","shape":[1000000000000,4],"data_offsets":[0,16000000000000]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "damaged" in one_line(lambda: load_foreign(tmp_path / "a.safetensors", narrow()))
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "damaged" in one_line(lambda: load_foreign(tmp_path / "a.safetensors", narrow()))


def threshold(*, at: float) -> tuple[nn.Module, Tensor]:
    """A network that compares the brightness of one pixel with `at`, and images at all brightnesses."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        net[1].bias.copy_(torch.tensor([-at, 0.0]))
    return net, torch.rand(160, 1, 2, 2, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("name", "mean", "std", "at"),
    [("identity", 0.0, 1.0, 0.5), ("half", 0.5, 0.5, 0.5), ("0..255", 0.0, 1 / 255, 120.0)],
)
def test_normalisation_is_found_out_from_a_few_labelled_images(
    name: str, mean: float, std: float, at: float, tmp_path: Path
) -> None:
    net, x = threshold(at=at)
    y = net((x - mean) / std).argmax(1)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=f"normalization detected: {name}"):
        (record,) = evaluate(tmp_path / "a.pt", model=net, data=(x, y), suite="quick", eps=0.01, normalize="auto")
    assert record.scores["clean"].correct == 160


def test_an_unclear_normalisation_asks_instead_of_guessing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    data = torch.rand(160, 1, 2, 2), torch.arange(160) % 2
    wished = {"model": net, "data": data, "suite": "quick", "eps": 0.01}
    message = one_line(lambda: evaluate(tmp_path / "a.pt", normalize="auto", **wished))
    assert "cannot be told from the images" in message
    message = one_line(lambda: evaluate(tmp_path / "a.pt", normalize="whitened", **wished))
    assert "identity, dataset, auto, or mean/std" in message
