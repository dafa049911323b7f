"""Normalisation layer, heads and weight-decay groups, held against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from instar.errors import UserError
from instar.models.decay import parameter_groups
from instar.models.heads import Cosine, build_head
from instar.models.normalize import Normalize
from instar.models.registry import create


def test_normalisation_is_the_first_layer_and_equals_normalising_by_hand() -> None:
    mean, std = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
    inside = create("resnet18", classes=10, width=4, mean=mean, std=std, seed=0).eval()
    outside = create("resnet18", classes=10, width=4, seed=0).eval()
    x = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(x[:, c] - torch.tensor(mean[c])) / torch.tensor(std[c]) for c in range(3)], dim=1)
    assert torch.equal(inside(x), outside(by_hand))
    assert next(iter(inside.children())) is inside.normalize


def test_normalisation_without_statistics_changes_nothing() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(Normalize(channels=3)(x), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [125.3, 123.0, 113.9]}, "Divide statistics of 0..255 images by 255"),
        ({"std": [0.2, 0.2, 0.0]}, "std must be in (0, 1]"),
        ({"mean": [0.5, 0.5]}, "3 finite numbers"),
        ({"mean": [float("nan")] * 3}, "finite"),
        ({"mean": "a"}, "list of 3 numbers"),
        ({"mean": 0.5}, "list of 3 numbers"),
    ],
)
def test_impossible_statistics_are_one_clear_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Normalize(channels=3, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e3), st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), st.booleans())
def test_cosine_logits_ignore_the_length_of_features_and_of_weight_rows(
    length: float, lengths: list[float], bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = Cosine(6, 4, scale=8.0, bias=bias).double()
    h = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    expected = head(h)
    torch.testing.assert_close(head(length * h), expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        head.weight *= torch.tensor(lengths, dtype=torch.float64)[:, None]
    torch.testing.assert_close(head(h), expected, rtol=0, atol=1e-10)


def test_cosine_logits_are_the_scale_times_the_angle_cosine_plus_bias() -> None:
    head = Cosine(2, 2, scale=5.0).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
        head.bias.copy_(torch.tensor([0.1, -0.2]))
    logits = head(torch.tensor([[0.0, 7.0]], dtype=torch.float64))
    torch.testing.assert_close(logits, torch.tensor([[0.5, 5 * (0.5**0.5 - 0.2)]], dtype=torch.float64))


def test_logits_of_a_cosine_model_carry_the_scale() -> None:
    small, large = (create("small_cnn", classes=10, width=4, head="cosine", scale=s, seed=0).eval() for s in (1.0, 8.0))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(8 * small(x), large(x))
    assert large.head.scale.item() == 8.0
    assert "linear.scale" in large.state_dict()


def test_cosine_head_leaves_its_weights_as_they_are() -> None:
    head = Cosine(3, 2).double()
    before = head.weight.detach().clone()
    head(torch.rand(4, 3, dtype=torch.float64)).sum().backward()
    assert torch.equal(head.weight, before)
    # Tangential: moving a row along itself changes nothing, so the gradient has no part along it.
    assert (head.weight.grad * head.weight).sum(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_head_bias_is_optional(kind: str) -> None:
    assert build_head(kind, 3, 2, bias=False).bias is None
    assert build_head(kind, 3, 2).bias is not None


def test_head_mistakes_are_one_clear_line() -> None:
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        build_head("cosin", 3, 2)
    with pytest.raises(UserError, match="must be positive"):
        Cosine(3, 2, scale=0.0)


def test_weight_decay_acts_on_everything_as_published_or_spares_norms_and_biases() -> None:
    model = create("resnet18", classes=10, width=4)
    (everything,) = parameter_groups(model, 5e-4)
    assert [id(p) for p in everything["params"]] == [id(p) for p in model.parameters()]
    decayed, spared = parameter_groups(model, 5e-4, decay_norm=False)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (5e-4, 0.0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = {id(p) for m in norms for p in m.parameters()} | {id(model.linear.bias)}
    assert {id(p) for p in spared["params"]} == expected
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_weight_decay_leaves_out_frozen_parameters_and_what_timm_exempts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    decayed, spared = parameter_groups(model, 0.1, decay_norm=False)
    assert [id(p) for p in decayed["params"] + spared["params"]] == [id(model[1].weight), id(model[1].bias)]
    vit = create("timm/vit_tiny_patch16_224", classes=10, depth=1, embed_dim=24, num_heads=2)
    spared_ids = {id(p) for p in parameter_groups(vit, 0.1, decay_norm=False)[1]["params"]}
    assert id(vit.net.pos_embed) in spared_ids


def test_negative_weight_decay_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="0 or larger"):
        parameter_groups(nn.Linear(1, 1), -1.0)
