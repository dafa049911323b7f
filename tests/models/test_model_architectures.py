"""The networks against their published code: sizes, key names, forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional

from instar.errors import UserError
from instar.models.classifier import Classifier
from instar.models.precision import trace
from instar.models.registry import create

OWN = {
    "resnet18": {},
    "resnet34": {"activation": "softplus"},
    "resnet50": {"activation": "silu"},
    "preact_resnet18": {},
    "preact_resnet34": {"shortcut": "input", "final_norm": False, "activation": "gelu"},
    "wide_resnet_10_2": {},
    "wide_resnet_16_1": {"padding": "same", "activation": "silu", "head": "cosine"},
    "small_cnn": {"head": "cosine"},
    "mnist_cnn": {},
}


def own(name: str, **changes: object) -> Classifier:
    model = create(name, **{"classes": 10, "width": 4, "seed": 3, **OWN[name], **changes})
    assert isinstance(model, Classifier)
    return model


def with_running_statistics(model: nn.Module) -> nn.Module:
    """Gives every BatchNorm statistics and an affine map that are not the identity, so that a wrong order shows."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(
    ("name", "arguments", "published"),
    [
        ("resnet18", {}, 11_173_962),
        ("resnet34", {}, 21_282_122),
        ("resnet50", {}, 23_520_842),
        ("preact_resnet18", {}, 11_172_170),
        ("preact_resnet18", {"final_norm": False}, 11_171_146),
        ("wide_resnet_28_10", {}, 36_479_194),
        ("wide_resnet_34_10", {}, 46_160_474),
        ("mnist_cnn", {"channels": 1, "image_size": 28}, 312_202),
    ],
)
def test_parameter_count_is_the_published_one(name: str, arguments: dict[str, object], published: int) -> None:
    with torch.device("meta"):
        model = create(name, classes=10, **arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def norm_keys(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def resnet_keys(counts: tuple[int, ...], convolutions: int) -> Iterator[str]:
    yield from ["conv1.weight", *norm_keys("bn1")]
    for stage, count in enumerate(counts, start=1):
        for block in range(count):
            path = f"layer{stage}.{block}"
            for number in range(1, convolutions + 1):
                yield from [f"{path}.conv{number}.weight", *norm_keys(f"{path}.bn{number}")]
            if block == 0 and (stage > 1 or convolutions == 3):
                yield from [f"{path}.shortcut.0.weight", *norm_keys(f"{path}.shortcut.1")]
    yield from ["linear.weight", "linear.bias"]


def preact_keys() -> Iterator[str]:
    yield "conv1.weight"
    for stage in range(1, 5):
        for block in range(2):
            path = f"layer{stage}.{block}"
            for number in (1, 2):
                yield from [*norm_keys(f"{path}.bn{number}"), f"{path}.conv{number}.weight"]
            if block == 0 and stage > 1:
                yield f"{path}.shortcut.0.weight"
    yield from [*norm_keys("bn"), "linear.weight", "linear.bias"]


def wide_keys(blocks: int) -> Iterator[str]:
    yield "conv1.weight"
    for stage in range(1, 4):
        for block in range(blocks):
            path = f"block{stage}.layer.{block}"
            for number in (1, 2):
                yield from [*norm_keys(f"{path}.bn{number}"), f"{path}.conv{number}.weight"]
            if block == 0:
                yield f"{path}.convShortcut.weight"
    yield from [*norm_keys("bn1"), "fc.weight", "fc.bias"]


def mnist_keys() -> Iterator[str]:
    for name in (
        *(f"feature_extractor.conv{number}" for number in range(1, 5)),
        *(f"classifier.fc{number}" for number in range(1, 4)),
    ):
        yield from [f"{name}.weight", f"{name}.bias"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet18", resnet_keys((2, 2, 2, 2), 2)),
        ("resnet34", resnet_keys((3, 4, 6, 3), 2)),
        ("resnet50", resnet_keys((3, 4, 6, 3), 3)),
        ("preact_resnet18", preact_keys()),
        ("wide_resnet_28_10", wide_keys(4)),
        ("wide_resnet_34_10", wide_keys(5)),
        ("mnist_cnn", mnist_keys()),
    ],
)
def test_state_dict_has_the_published_keys_and_the_normalisation(name: str, keys: Iterator[str]) -> None:
    with torch.device("meta"):
        model = create(name, classes=10)
    assert set(model.state_dict()) == {"normalize.mean", "normalize.std", *keys}


def batch_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return functional.batch_norm(x, *parts)


def published_resnet(state: dict[str, Tensor], x: Tensor, counts: tuple[int, ...] = (2, 2, 2, 2)) -> Tensor:
    """pytorch-cifar's ResNet-18, written from its forward passes."""
    out = functional.relu(batch_norm(state, "bn1", functional.conv2d(x, state["conv1.weight"], padding=1)))
    for stage, count in enumerate(counts, start=1):
        for block in range(count):
            path, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = functional.conv2d(out, state[f"{path}.conv1.weight"], stride=stride, padding=1)
            inner = functional.relu(batch_norm(state, f"{path}.bn1", inner))
            inner = batch_norm(state, f"{path}.bn2", functional.conv2d(inner, state[f"{path}.conv2.weight"], padding=1))
            if f"{path}.shortcut.0.weight" in state:
                projected = functional.conv2d(out, state[f"{path}.shortcut.0.weight"], stride=stride)
                out = batch_norm(state, f"{path}.shortcut.1", projected)
            out = functional.relu(inner + out)
    return functional.linear(functional.avg_pool2d(out, 4).flatten(1), state["linear.weight"], state["linear.bias"])


def published_preact(state: dict[str, Tensor], x: Tensor, shortcut: str) -> Tensor:
    """RobustBench's PreActResNet-18 of ``PreActBlockV2`` (activated) or ``PreActBlock`` (input)."""
    out = functional.conv2d(x, state["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for block in range(2):
            path, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            activated = functional.relu(batch_norm(state, f"{path}.bn1", out))
            if f"{path}.shortcut.0.weight" in state:
                seen = activated if shortcut == "activated" else out
                out = functional.conv2d(seen, state[f"{path}.shortcut.0.weight"], stride=stride)
            inner = functional.conv2d(activated, state[f"{path}.conv1.weight"], stride=stride, padding=1)
            inner = functional.relu(batch_norm(state, f"{path}.bn2", inner))
            out = out + functional.conv2d(inner, state[f"{path}.conv2.weight"], padding=1)
    if "bn.weight" in state:
        out = functional.relu(batch_norm(state, "bn", out))
    return functional.linear(functional.avg_pool2d(out, 4).flatten(1), state["linear.weight"], state["linear.bias"])


def published_wide(
    state: dict[str, Tensor], x: Tensor, blocks: int, padding: str, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """TRADES' WideResNet, or with ``"same"`` padding DeepMind's, which shifts the strided convolutions."""
    out = functional.conv2d(x, state["conv1.weight"], padding=1)
    for stage in range(1, 4):
        for block in range(blocks):
            path, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            activated = activation(batch_norm(state, f"{path}.bn1", out))
            shifted = stride == 2 and padding == "same"
            padded = functional.pad(activated, (0, 1, 0, 1) if shifted else (1, 1, 1, 1))
            inner = functional.conv2d(padded, state[f"{path}.conv1.weight"], stride=stride)
            inner = activation(batch_norm(state, f"{path}.bn2", inner))
            inner = functional.conv2d(inner, state[f"{path}.conv2.weight"], padding=1)
            if f"{path}.convShortcut.weight" in state:
                out = functional.conv2d(activated, state[f"{path}.convShortcut.weight"], stride=stride)
            out = out + inner
    out = functional.avg_pool2d(activation(batch_norm(state, "bn1", out)), 8).flatten(1)
    return functional.linear(out, state["fc.weight"], state["fc.bias"])


def test_resnet_computes_what_the_published_code_computes() -> None:
    model = with_running_statistics(own("resnet18")).double()
    x = images(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), published_resnet(model.state_dict(), x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("shortcut", ["activated", "input"])
def test_preact_resnet_computes_what_the_published_code_computes(shortcut: str, final_norm: bool) -> None:
    model = with_running_statistics(own("preact_resnet18", shortcut=shortcut, final_norm=final_norm)).double()
    x = images(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), published_preact(model.state_dict(), x, shortcut), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("padding", "name", "activation"), [("symmetric", "relu", functional.relu), ("same", "silu", functional.silu)]
)
def test_wide_resnet_computes_what_the_published_code_computes(
    padding: str, name: str, activation: Callable[[Tensor], Tensor]
) -> None:
    model = with_running_statistics(create("wrn-16-1", classes=10, padding=padding, activation=name, seed=0)).double()
    x = images(2, 3, 32, 32, dtype=torch.float64)
    expected = published_wide(model.state_dict(), x, 2, padding, activation)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OWN)
def test_forward_is_the_head_of_the_features(name: str) -> None:
    model = own(name).eval()
    x = images(3, 3, 32, 32)
    features = model.features(x)
    assert features.shape == (3, model.head.in_features)
    assert torch.equal(model(x), model.head(features))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_every_own_model_gives_the_same_logits_when_traced(name: str, autocast: bool) -> None:
    model = with_running_statistics(own(name))
    x = images(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
        assert torch.equal(trace(model)(x), expected)


@pytest.mark.parametrize("name", OWN)
def test_traced_graph_keeps_every_convolution_as_a_module(name: str) -> None:
    model = own(name)
    called = {node.target for node in trace(model).graph.nodes if node.op == "call_module"}
    assert {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)} <= called


@pytest.mark.parametrize("name", OWN)
def test_channels_last_gives_the_same_logits_and_input_gradient(name: str) -> None:
    model = with_running_statistics(own(name)).double()
    x = images(2, 3, 32, 32, dtype=torch.float64).requires_grad_()
    expected = model(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    model = model.to(memory_format=torch.channels_last)
    other = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    logits = model(other)
    (gradient,) = torch.autograd.grad(logits.square().sum(), other)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(gradient.contiguous(), expected_gradient.contiguous(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 8), ("resnet18", 64), ("wide_resnet_10_2", 28), ("small_cnn", 8)]
)
def test_networks_take_other_image_sizes(name: str, size: int) -> None:
    assert own(name, image_size=size).eval()(images(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("size", "side"), [(32, 32), (96, 24)])
def test_resnet_looks_at_large_images_through_the_imagenet_stem(size: int, side: int) -> None:
    model = own("resnet18", image_size=size).eval()
    seen: list[torch.Size] = []
    model.layer1.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    model(images(1, 3, size, size))
    assert seen == [(1, 4, side, side)]


def test_width_is_the_number_of_channels_of_the_first_stage() -> None:
    assert own("resnet18", width=5).layer1[0].conv2.out_channels == 5
    assert create("wide_resnet_10_2", classes=10).block1.layer[0].conv2.out_channels == 32
    assert create("wide_resnet_10_2", classes=10, width=5).block1.layer[0].conv2.out_channels == 5


def test_wide_resnet_starts_from_the_published_distribution() -> None:
    model = create("wide_resnet_10_4", classes=10, seed=0)
    weight = model.block3.layer[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not model.fc.bias.any()


def test_mnist_network_starts_with_a_head_of_zeros() -> None:
    model = create("mnist_cnn", classes=10, channels=1, image_size=28, width=2, seed=0).eval()
    assert not model(images(2, 1, 28, 28)).any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wide_resnet_27_10", {}, "6n + 4"),
        ("wide_resnet_28_10", {"padding": "sym"}, "'same' or 'symmetric'"),
        ("resnet18", {"stem": "imagnet"}, "Did you mean 'imagenet'"),
        ("preact_resnet18", {"shortcut": "activate"}, "Did you mean 'activated'"),
        ("small_cnn", {"activation": "relo"}, "Did you mean 'relu'"),
        ("small_cnn", {"image_size": 3}, "at least 4x4"),
        ("mnist_cnn", {"image_size": 8}, "at least 16x16"),
        ("mnist_cnn", {"dropout": 2.0}, "refused its arguments"),
    ],
)
def test_impossible_network_is_one_clear_line(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        create(name, **{"classes": 10, **arguments})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
