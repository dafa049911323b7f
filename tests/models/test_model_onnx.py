"""ONNX models and TorchScript programs: the former without gradients, the latter on the user's word only."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from instar.errors import UserError
from instar.evaluate import evaluate
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.black_box import black_box, usual_suite
from instar.evaluate.entries import Entry, Suite
from instar.evaluate.subject import is_black_box
from instar.models import onnx as onnx_models
from instar.models.export import export
from instar.models.files import save
from instar.models.onnx import OnnxClassifier
from instar.models.reading import kind
from instar.models.registry import create
from instar.models.torchscript import load_torchscript
from instar.threat import Ball, Linf

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="the extra `onnx` is not installed",
)
IMAGES = torch.rand(12, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def network() -> nn.Module:
    net = create("small_cnn", classes=4, image_size=12, width=4, mean=[0.4] * 3, std=[0.2] * 3, seed=1)
    for _ in range(5):
        net(IMAGES)
    with torch.no_grad():
        net.eval()
        net.head.bias -= net(IMAGES).mean(0)  # without a favourite class, so that decisions are close
    return net


def labels() -> torch.Tensor:
    with torch.no_grad():
        return network()(IMAGES).argmax(1)


def small(ball: Ball) -> Suite:
    return black_box(ball, draws=3, queries=60)


def one_line(call: object) -> str:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One exported network for all tests: exporting takes seconds."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export(network(), path, format="onnx", card={"dataset": "mine", "threat": {"norm": "Linf", "eps": "16/255"}})
    return path


@needs_onnx
def test_an_exported_model_gives_the_logits_of_the_network_for_any_batch_size(exported: Path) -> None:
    model, net = OnnxClassifier(exported), network()
    for count in (1, 2, 5, 12):
        with torch.no_grad():
            torch.testing.assert_close(model(IMAGES[:count]), net(IMAGES[:count]), rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_other_types_are_taken_and_answered_in_kind(dtype: torch.dtype, exported: Path) -> None:
    logits = OnnxClassifier(exported)(IMAGES.to(dtype))
    assert logits.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(logits.float(), network()(IMAGES.to(dtype).float()), rtol=2e-2, atol=2e-2)


@needs_onnx
def test_black_box_attacks_judge_it_and_its_clean_accuracy_is_that_of_the_network(exported: Path) -> None:
    (record,) = evaluate(exported, data=(IMAGES, labels()), suite=small, out=exported.parent / "out")
    assert record.scores["clean"].correct == len(IMAGES)
    assert record.scores["worst_case"].correct <= record.scores["square"].correct < len(IMAGES)
    assert record.protocol["eps"] == "16/255"
    assert "normalization identity" in record.protocol["checkpoint"]["loaded"]


@needs_onnx
def test_gradient_attacks_are_refused_in_one_line_that_names_the_suite_to_take(exported: Path) -> None:
    assert is_black_box(nn.Sequential(OnnxClassifier(exported)))
    assert usual_suite(OnnxClassifier(exported)) == "black_box"
    seen: list[str] = []
    message = one_line(
        lambda: evaluate(exported, data=(IMAGES, labels()), suite="quick", progress=lambda *told: seen.append(told[0]))
    )
    assert message.startswith("PGD-10, margin PGD-20 of the suite quick need gradients, and this model gives no grad")
    assert "--suite black_box" in message
    assert seen == [], "refused before anything is computed"
    square = Suite("mine", (Entry("aa", "AutoAttack's Square", AutoAttack(Linf(0.1), stages=("square",), queries=20)),))
    evaluate(exported, data=(IMAGES[:4], labels()[:4]), suite=lambda ball: square)


def written(path: Path, *, shape: list[object], permuted: bool = False, inputs: int = 1, width: int = 3) -> Path:
    """A tiny model by hand: the mean over pixels, as logits."""
    import onnx

    axes = [1, 2] if permuted else [2, 3]
    nodes = [
        onnx.helper.make_node("ReduceMean", ["images"], ["logits"], axes=axes, keepdims=0),
    ]
    declared = [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)]
    declared += [onnx.helper.make_tensor_value_info(f"more{n}", onnx.TensorProto.FLOAT, [1]) for n in range(1, inputs)]
    result = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [shape[0], width])
    graph = onnx.helper.make_graph(nodes, "g", declared, [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@needs_onnx
def test_fixed_batch_sizes_and_channels_last_inputs_are_understood(tmp_path: Path) -> None:
    expected = IMAGES.mean((2, 3))
    fixed = OnnxClassifier(written(tmp_path / "fixed.onnx", shape=[5, 3, 12, 12]))
    torch.testing.assert_close(fixed(IMAGES), expected)
    nhwc = OnnxClassifier(written(tmp_path / "nhwc.onnx", shape=["n", 12, 12, 3], permuted=True))
    torch.testing.assert_close(nhwc(IMAGES), expected)


@needs_onnx
def test_normalisation_in_front_of_an_onnx_model_is_what_was(tmp_path: Path) -> None:
    path = written(tmp_path / "a.onnx", shape=["n", 3, 12, 12])
    right = ((IMAGES.mean((2, 3)) - torch.tensor([0.4, 0.5, 0.6])) / 0.5).argmax(1)
    wished = {"data": (IMAGES, right), "suite": small, "eps": 4 / 255, "out": tmp_path}
    (raw,) = evaluate(path, **wished)
    (asked,) = evaluate(path, normalize="0.4,0.5,0.6/0.5", **wished)
    assert asked.scores["clean"].correct == len(IMAGES) > raw.scores["clean"].correct
    assert "as asked for" in asked.protocol["checkpoint"]["loaded"]


@needs_onnx
def test_damaged_onnx_files_are_one_line(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    path = tmp_path / "a.onnx"
    for content in (b"", b"not a model at all", whole[: len(whole) // 2], os.urandom(1000), b"\x08\x07" * 50):
        path.write_bytes(content)
        assert "no ONNX model, or damaged" in one_line(lambda: OnnxClassifier(path))
    assert "no weights at" in one_line(lambda: OnnxClassifier(tmp_path / "absent.onnx"))
    two = written(tmp_path / "two.onnx", shape=["n", 3, 12, 12], inputs=2)
    assert "must have one input" in one_line(lambda: OnnxClassifier(two))
    other = OnnxClassifier(written(tmp_path / "other.onnx", shape=["n", 3, 8, 8]))
    assert "cannot process images of shape (2, 3, 12, 12)" in one_line(lambda: other(IMAGES[:2]))


@needs_onnx
def test_absurd_sizes_are_refused_before_they_take_the_memory(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    shape = onnx.numpy_helper.from_array(np.array([10**6, 10**7], np.int64), "shape")
    nodes = [
        onnx.helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        onnx.helper.make_node("ReduceSum", ["huge"], ["sum"]),
        onnx.helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        onnx.helper.make_node("Add", ["mean", "sum"], ["logits"]),
    ]
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 12, 12])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])
    graph = onnx.helper.make_graph(nodes, "g", [images], [logits], [shape])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    (tmp_path / "huge.onnx").write_bytes(model.SerializeToString())
    one_line(lambda: OnnxClassifier(tmp_path / "huge.onnx")(IMAGES))
    monkeypatch.setattr(onnx_models, "LARGEST", 100)
    assert "too large" in one_line(lambda: OnnxClassifier(exported))


@needs_onnx
def test_weights_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    import onnx

    (tmp_path / "secret").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    (tmp_path / "inside").mkdir()
    tensor = onnx.numpy_helper.from_array(np.zeros(3, np.float32), "bias")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("length", "12")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    nodes = [
        onnx.helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        onnx.helper.make_node("Add", ["mean", "bias"], ["logits"]),
    ]
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 12, 12])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])
    graph = onnx.helper.make_graph(nodes, "g", [images], [logits], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    path = tmp_path / "inside" / "a.onnx"
    path.write_bytes(model.SerializeToString())
    assert "no ONNX model, or damaged" in one_line(lambda: OnnxClassifier(path))


@needs_onnx
def test_an_altered_file_does_not_pass_under_its_card(exported: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", shape=["n", 3, 12, 12])
    path.with_name("net.onnx.json").write_bytes(exported.with_name("net.onnx.json").read_bytes())
    message = one_line(lambda: evaluate(path, data=(IMAGES, labels()), suite=small))
    assert "sha256 differs" in message


@needs_onnx
def test_a_wrong_export_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_models, "exported", lambda model, shape: other)
    other = written(tmp_path / "other.onnx", shape=["n", 3, 12, 12], width=3).read_bytes()
    net = create("small_cnn", classes=3, image_size=12, width=4, seed=1)
    assert "gives other logits" in one_line(lambda: export(net, tmp_path / "net.onnx", format="onnx"))
    assert not (tmp_path / "net.onnx").exists()


def test_without_the_packages_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(onnx_models.importlib, "import_module", missing)
    assert "pip install 'instar[onnx]'" in one_line(lambda: OnnxClassifier(tmp_path / "a.onnx"))
    assert "pip install 'instar[onnx]'" in one_line(lambda: export(network(), tmp_path / "a.onnx", format="onnx"))


class Writes(nn.Module):
    """What a program can do: it leaves a mark when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 144, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch advise against the format
        torch.manual_seed(1)
        torch.jit.save(torch.jit.script(Writes()), tmp_path / "net.pt")
        yield tmp_path / "net.pt"


def test_a_torchscript_program_runs_only_when_it_is_trusted(program: Path) -> None:
    assert kind(program) == "torchscript"
    data = (IMAGES, torch.arange(12) % 4)
    message = one_line(lambda: evaluate(program, data=data, suite="quick", eps=0.1))
    assert "--trust" in message
    loaded = load_torchscript(program, trust=True)
    (record,) = evaluate(loaded, data=data, suite="quick", eps=0.1)
    assert record.scores["worst_case"].correct <= record.scores["clean"].correct


def test_a_program_under_the_name_of_weights_is_still_refused(program: Path, tmp_path: Path) -> None:
    from instar.models import load_foreign

    disguised = tmp_path / "weights.safetensors"
    disguised.write_bytes(program.read_bytes())
    assert "TorchScript" in one_line(lambda: load_foreign(disguised, network()))


def test_damaged_programs_are_one_line(program: Path, tmp_path: Path) -> None:
    whole = program.read_bytes()
    for content in (whole[: len(whole) // 2], b"PK\x03\x04", b""):
        program.write_bytes(content)
        assert "damaged" in one_line(lambda: load_torchscript(program, trust=True))
    assert "no weights at" in one_line(lambda: load_torchscript(tmp_path / "absent.pt", trust=True))
    save(network(), tmp_path / "plain.pt", {})
    assert kind(tmp_path / "plain.pt") == "pickle"
    assert "no TorchScript program" in one_line(lambda: load_torchscript(tmp_path / "plain.pt", trust=True))
