"""What must stay in float32 under autocast, does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from instar.models.precision import FloatStemConv2d
from instar.models.registry import create

QUARTER_LEVEL = 0.25 / 255


def outputs(stem: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.full((1, 3, 8, 8), 0.75)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return stem(x), stem(x + QUARTER_LEVEL)


def test_plain_convolution_loses_a_small_perturbation_to_bfloat16() -> None:
    torch.manual_seed(0)
    clean, moved = outputs(nn.Conv2d(3, 4, 3))
    assert torch.equal(clean, moved)


def test_stem_sees_a_small_perturbation_exactly_as_in_float32() -> None:
    torch.manual_seed(0)
    stem = FloatStemConv2d(3, 4, 3)
    clean, moved = outputs(stem)
    assert clean.dtype == torch.float32
    with torch.no_grad():
        x = torch.full((1, 3, 8, 8), 0.75)
        assert torch.equal(clean, stem(x))
        assert torch.equal(moved, stem(x + QUARTER_LEVEL))
    assert not torch.equal(clean, moved)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "wide_resnet_10_1", "small_cnn", "timm/convnext_atto"])
def test_half_a_grey_level_reaches_the_first_layer_of_every_model(name: str) -> None:
    width = None if name.startswith("timm/") else 4
    model = create(name, classes=10, width=width, seed=0).eval()
    seen: list[torch.Tensor] = []
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    stem.register_forward_hook(lambda module, given, out: seen.append(out))
    x = torch.full((1, 3, 32, 32), 0.75)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
        model(x + 0.5 / 255)
    expected = stem(torch.full((1, 3, 32, 32), 0.75)), stem(x + 0.5 / 255)
    for got, want in zip(seen[:2], expected, strict=True):
        torch.testing.assert_close(got, want)
    difference = seen[1] - seen[0]
    wanted = expected[1] - expected[0]
    torch.testing.assert_close(difference, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_logits_are_float32_under_autocast_and_the_trunk_is_not(head: str) -> None:
    model = create("resnet18", classes=10, width=4, head=head, seed=0).eval()
    seen: list[torch.dtype] = []
    model.layer1.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(2, 3, 32, 32))
    assert logits.dtype == torch.float32
    # The residual stream too: a sum with the float32 stem would make the whole first stage float32, at twice the cost.
    assert seen == [torch.bfloat16]


def test_a_model_moved_to_another_type_computes_in_it() -> None:
    model = create("small_cnn", classes=10, width=4, mean=[0.5] * 3, std=[0.2] * 3).double().eval()
    assert model(torch.rand(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    assert model(torch.rand(2, 3, 32, 32)).dtype == torch.float64


def test_gradients_flow_through_the_stem_under_autocast() -> None:
    model = create("resnet18", classes=10, width=4, seed=0).eval()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().sum()
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert x.grad.abs().amax(dim=(1, 2, 3)).gt(0).all()
    assert model.conv1.weight.grad.dtype == torch.float32
