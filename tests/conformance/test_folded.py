"""The folded copy that eval-mode attacks run on: the same function, and the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import instar as I
from instar.attacks.folded import FoldingError, fold
from instar.models.registry import create, names

ARCHITECTURES = [*names(), "wide_resnet_10_1"]
MODERN = [
    ("small_cnn", {"head": "cosine"}),
    ("preact_resnet18", {"activation": "silu"}),
    ("resnet18", {"head": "cosine"}),
]


def _randomise(model: nn.Module) -> nn.Module:
    """Statistics, scales and biases as training leaves them: none of them trivial, logits of order 1."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.6, 1.0)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.8, 2.0)
        model.head.weight.normal_(0, 0.5)
        if model.head.bias is not None:
            model.head.bias.normal_(0, 0.2)
    return model


def _made(name: str, **arguments: object) -> tuple[nn.Module, Tensor]:
    side = 28 if name == "mnist_cnn" else 16
    model = create(
        name, classes=3, channels=2, image_size=side, width=2, mean=[0.4, 0.5], std=[0.2, 0.3], seed=0, **arguments
    )
    return _randomise(model), torch.rand(2, 2, side, side, dtype=torch.float64)


def _gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    return found


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    assert float((found - expected).detach().abs().max()) <= tolerance * scale


@pytest.mark.parametrize(("name", "arguments"), [*((name, {}) for name in ARCHITECTURES), *MODERN])
def test_logits_and_input_gradients_of_the_folded_copy_are_those_of_the_model(
    name: str, arguments: dict[str, object]
) -> None:
    model, x = _made(name, **arguments)
    model = model.double().eval()
    folded = I.Folded(model)
    expected = model(x)
    assert float(expected.detach().std()) > 1e-3, "constant logits would show nothing"
    _close(folded(x), expected, 1e-12)
    _close(_gradient(folded, x), _gradient(model, x), 1e-10)
    assert folded(x).dtype == torch.float64


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18", "resnet50", "wide_resnet_10_1"])
def test_refreshing_follows_weights_and_statistics_and_nothing_else_does(name: str) -> None:
    model, x = _made(name)
    model = model.double().eval()
    folded = I.Folded(model)
    before, gradient = folded(x), _gradient(folded, x)
    _randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert torch.equal(folded(x), before), "a copy that shares storage would have moved"
    folded.refresh(model)
    _close(folded(x), model(x), 1e-12)
    assert not torch.allclose(folded(x), before)
    assert not torch.allclose(_gradient(folded, x), gradient)


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18", "resnet18"])
def test_the_model_that_is_folded_stays_as_it_was(name: str) -> None:
    model, x = _made(name)
    x, model = x.float(), model.train()
    state = copy.deepcopy(model.state_dict())
    folded = I.Folded(model, dtype=torch.bfloat16)
    folded.refresh(model)
    _gradient(folded, x)
    folded.train()
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert not any(m.training for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    shared = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not shared & {t.data_ptr() for t in [*folded.parameters(), *folded.buffers()]}


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "preact_resnet18", "wide_resnet_10_1", "mnist_cnn"])
def test_half_precision_stays_close_and_returns_float32(name: str) -> None:
    model, x = _made(name)
    x, model = x.float(), model.eval()
    folded = I.Folded(model, dtype=torch.bfloat16)
    assert folded(x).dtype == torch.float32
    _close(folded(x), model(x), 0.06)
    ours, theirs = _gradient(folded, x).flatten(), _gradient(model, x).flatten()
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.98
    _randomise(model)
    folded.refresh(model)
    _close(folded(x), model(x), 0.06)


def test_half_precision_does_not_round_the_image() -> None:
    # 1000 (x − ½) tells pixels apart that bfloat16 rounds to one number.
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(1000.0)
        model[0].bias.fill_(-500.0)
        model[2].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[2].bias.zero_()
    x = (0.5 + torch.tensor([0.0, 1e-4, 2e-4, 1e-3])).view(4, 1, 1, 1)
    found = I.Folded(model, dtype=torch.bfloat16)(x)[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.1, 0.2, 1.0]), rtol=0.01, atol=2e-3)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(I.Folded(model)(x)[:, 0], torch.tensor([0.0, 0.1, 0.2, 1.0]), rtol=1e-3, atol=1e-4)


class Crooked(nn.Module):
    """Everything that must not be folded, and one pair that must."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(2, 2, 3, padding=1)
        self.shared = nn.BatchNorm2d(2)
        self.read_twice = nn.Conv2d(2, 2, 3, padding=1, bias=True)
        self.after = nn.BatchNorm2d(2)
        self.bare = nn.BatchNorm2d(2, affine=False)
        self.batchwise = nn.BatchNorm2d(2, track_running_stats=False)
        self.pair, self.norm = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.shared(self.twice(x)).relu()
        out = self.shared(self.twice(out)) * self.scale
        both = self.read_twice(out)
        out = self.after(both) + both
        out = self.bare(out).relu()
        out = self.norm(self.pair(out)) + self.batchwise(out)
        return self.head(out.mean((2, 3)))


def test_only_a_normalisation_that_alone_reads_a_convolution_is_folded_into_it() -> None:
    model, x = _randomise_any(Crooked()).double().eval(), torch.rand(5, 2, 4, 4, dtype=torch.float64)
    folded = I.Folded(model)
    _close(folded(x), model(x), 1e-12)
    _close(_gradient(folded, x), _gradient(model, x), 1e-10)
    _randomise_any(model)
    folded.refresh(model)
    _close(folded(x), model(x), 1e-12)


def _randomise_any(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.uniform_(0.3, 1.2)
    return model


@pytest.mark.parametrize(
    "method", [I.pgd_at(steps=4), I.trades(steps=4), I.gairat(steps=4)], ids=["at", "trades", "gairat"]
)
def test_training_with_the_folded_copy_attacked_is_training_with_the_model_attacked(method: I.Method) -> None:
    model, x = _made("small_cnn")
    model, batch = model.double().train(), I.Batch(x.repeat(3, 1, 1, 1), torch.arange(6) % 3)
    noise = 0.01 * torch.rand_like(batch.x)
    method = replace(method, attack=replace(method.attack, start=I.Given(noise)))
    plain = I.training_loss(copy.deepcopy(model), method, batch)
    folded = I.training_loss(model, method, batch, attacked=I.Folded(model))
    torch.testing.assert_close(folded.adversary.x, plain.adversary.x, rtol=0, atol=1e-12)
    assert torch.equal(folded.adversary.kappa, plain.adversary.kappa)
    torch.testing.assert_close(folded.loss, plain.loss, rtol=0, atol=1e-10)


class Branches(nn.Module):
    """A forward that depends on its data, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) if float(x.sum()) > 0 else self.head(-x.flatten(1))


def _hooked() -> nn.Module:
    """A hook on the whole model, which a trace leaves out."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


@pytest.mark.parametrize("make", [Branches, _hooked])
def test_a_model_without_a_true_stand_in_gets_none_and_stays_as_it_was(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    with pytest.raises(FoldingError):
        fold(model, torch.rand(3, 1, 2, 2))
    assert all(m.training for m in model.modules())


def test_a_stand_in_that_was_checked_is_the_folded_copy() -> None:
    model, x = _made("small_cnn")
    model.train()
    stand_in = fold(model, x.float())
    assert isinstance(stand_in, I.Folded)
    assert model.training
    _close(stand_in(x.float()), model.eval()(x.float()), 1e-5)
    assert fold(model, x.float(), dtype=torch.bfloat16)(x.float()).dtype == torch.float32
