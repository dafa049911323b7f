"""ALP, and the recipes with a weight perturbation: against plain loops and explicit copies, and in their limits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I

SIZE, CLASSES, EPS, STEP, STEPS = 8, 3, 0.1, 0.03, 4
SETTINGS = {"eps": EPS, "step_size": STEP, "steps": STEPS}


class Network(nn.Module):
    """Convolution, BatchNorm and a linear layer, smooth and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 3).flatten(1))


@pytest.fixture
def model() -> Network:
    return Network().train()


@pytest.fixture
def batch() -> I.Batch:
    return I.Batch(torch.rand(SIZE, 1, 6, 6, dtype=torch.float64), torch.arange(SIZE) % CLASSES)


def _seed(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _near(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(model.parameters()), retain_graph=True))


def _same_gradients(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert max(float(g.abs().max()) for g in theirs) > 1e-3, "a loss without a gradient would show nothing"
    for found, expected in zip(ours, theirs, strict=True):
        _near(found, expected)


def _equal_to_the_last_bit(
    model: nn.Module, batch: I.Batch, ours: I.Method, theirs: I.Method, progress: I.Progress | None = None
) -> bool:
    """Whether losses, adversaries, gradients and the whole state agree after every one of three steps."""
    seen: list[list[Tensor]] = []
    for method in (ours, theirs):
        net, states = copy.deepcopy(model), []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for update in range(3):
            computed, _ = I.training_step(net, method, batch, optimizer, progress=progress, generator=_seed(update))
            states += [computed.loss.detach(), computed.adversary.x]
            states += [p.grad.clone() for p in net.parameters()] + [t.clone() for t in net.state_dict().values()]
        seen.append(states)
    return all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# ALP


@pytest.mark.parametrize("pairing", [0.5, 2.0])
@pytest.mark.parametrize("clean", [0.0, 0.7])
def test_alp_is_a_loop_over_instances_and_classes(model: Network, batch: I.Batch, pairing: float, clean: float) -> None:
    by_hand = copy.deepcopy(model)
    method = I.alp(pairing=pairing, clean=clean, **SETTINGS)
    loss, adversary, _ = I.training_loss(model, method, batch, generator=_seed())
    _near(adversary.x, I.pgd_at(**SETTINGS).attack(by_hand, batch, generator=_seed()).x, 1e-12)
    plain, adv = by_hand(batch.x), by_hand(adversary.x)
    terms = []
    for i, y in enumerate(batch.y.tolist()):
        distance = torch.zeros((), dtype=torch.float64)
        for k in range(CLASSES):
            distance = distance + (plain[i, k] - adv[i, k]) ** 2
        terms.append(
            -adv[i].log_softmax(0)[y] + pairing * distance - (clean * plain[i].log_softmax(0)[y] if clean else 0)
        )
        assert float(distance.detach()) > 1e-4
    _near(loss, torch.stack(terms))
    _same_gradients(_gradients(model, loss), _gradients(by_hand, torch.stack(terms)))
    for found, expected in zip(model.buffers(), by_hand.buffers(), strict=True):
        _near(found, expected, 1e-12)


def test_alp_without_pairing_is_pgd_at_bit_for_bit(model: Network, batch: I.Batch) -> None:
    assert _equal_to_the_last_bit(model, batch, I.alp(pairing=0, **SETTINGS), I.pgd_at(**SETTINGS))
    assert not _equal_to_the_last_bit(model, batch, I.alp(pairing=0.01, **SETTINGS), I.pgd_at(**SETTINGS))
    growing = I.alp(pairing=I.Steps(0.0, ((0.5, 0.5),)), **SETTINGS)
    assert _equal_to_the_last_bit(model, batch, growing, I.pgd_at(**SETTINGS), I.Progress(4, 10))
    assert _equal_to_the_last_bit(model, batch, growing, I.alp(**SETTINGS), I.Progress(5, 10))


@pytest.mark.parametrize("strength", [0.1, 1.5])
def test_alp_is_iseat_with_weights_of_one_and_weights_that_stay(
    model: Network, batch: I.Batch, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adversary = I.pgd_at(**SETTINGS).attack(model, batch, generator=_seed())
    iseat = I.iseat(smoothness=strength, gamma=0.0, **SETTINGS)
    alp = I.training_loss(model, I.alp(pairing=strength, **SETTINGS), batch, adversary=adversary)
    ranked = I.training_loss(model, iseat, batch, adversary=adversary)
    assert float((ranked.loss - alp.loss).detach().abs().max()) > 1e-3, "ranks weigh by less than one"
    monkeypatch.setattr(I.RankWeight, "__call__", lambda self, e: torch.ones_like(self.difficulty(e)).detach())
    uniform = I.training_loss(model, iseat, batch, adversary=adversary)
    _near(uniform.loss, alp.loss, 1e-12)
    _same_gradients(_gradients(model, uniform.loss), _gradients(model, alp.loss))
    perturbed = I.training_loss(model, I.iseat(smoothness=strength, **SETTINGS), batch, adversary=adversary)
    assert float((perturbed.loss - alp.loss).detach().abs().max()) > 1e-3


# Weight perturbations

PAIRS: dict[str, tuple[Callable[..., I.Method], Callable[..., I.Method], str, Callable[[float], object]]] = {
    "at_awp": (I.at_awp, I.pgd_at, "gamma", I.AWP),
    "trades_awp": (I.trades_awp, I.trades, "gamma", I.AWP),
    "mart_awp": (I.mart_awp, lambda **given: I.mart(**{"beta": 6.0} | given), "gamma", I.AWP),
    "at_sam": (I.at_sam, I.pgd_at, "rho", I.SAM),
}
DEFAULTS = {"at_awp": 1e-2, "mart_awp": 5e-3, "at_sam": 0.05}


@pytest.mark.parametrize("name", PAIRS)
def test_a_recipe_with_a_weight_perturbation_is_its_base_with_that_field_replaced(name: str) -> None:
    recipe, base, size, perturbation = PAIRS[name]
    for amount in (0.0, 0.02):
        assert recipe(**{size: amount}, **SETTINGS) == replace(base(**SETTINGS), perturbation=perturbation(amount))
    if name in DEFAULTS:
        assert recipe() == replace(base(), perturbation=perturbation(DEFAULTS[name]))
    if name in ("trades_awp", "mart_awp"):
        assert recipe(beta=2.5, gamma=0.0) == replace(base(beta=2.5), perturbation=perturbation(0.0))


@pytest.mark.parametrize("name", PAIRS)
def test_a_perturbation_of_no_length_is_the_base_bit_for_bit_and_a_short_one_is_not(
    model: Network, batch: I.Batch, name: str
) -> None:
    recipe, base, size, _ = PAIRS[name]
    assert _equal_to_the_last_bit(model, batch, recipe(**{size: 0.0}, **SETTINGS), base(**SETTINGS))
    assert not _equal_to_the_last_bit(model, batch, recipe(**{size: 1e-3}, **SETTINGS), base(**SETTINGS))


@pytest.mark.parametrize("name", PAIRS)
def test_a_negative_length_is_refused(name: str) -> None:
    recipe, _, size, _ = PAIRS[name]
    for wrong in (-0.1, math.nan):
        with pytest.raises(I.UserError, match=f"{size} of .* must be a number of at least 0"):
            recipe(**{size: wrong})


def _cross_entropy(net: nn.Module, batch: I.Batch, x_adv: Tensor) -> Tensor:
    return F.cross_entropy(net(x_adv), batch.y, reduction="none")


def _trades(net: nn.Module, batch: I.Batch, x_adv: Tensor) -> Tensor:
    clean, adv = net(batch.x), net(x_adv)
    p = clean.softmax(1)
    divergence = (p * (p.log() - adv.log_softmax(1))).sum(1)
    return F.cross_entropy(clean, batch.y, reduction="none") + 6 * divergence


def _mart(net: nn.Module, batch: I.Batch, x_adv: Tensor) -> Tensor:
    clean, adv = net(batch.x).softmax(1), net(x_adv).softmax(1)
    terms = []
    for i, y in enumerate(batch.y.tolist()):
        wrong = max((adv[i, k] for k in range(CLASSES) if k != y), key=float)
        boosted = -torch.log(adv[i, y]) - torch.log(1 - wrong + 1e-4 + 1e-12)
        divergence = (clean[i] * (clean[i] / adv[i]).log()).sum()
        terms.append(boosted + 6 * divergence * (1 - clean[i, y] + 1e-7))
    return torch.stack(terms)


LOSSES = {"at_awp": _cross_entropy, "trades_awp": _trades, "mart_awp": _mart, "at_sam": _cross_entropy}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradient_are_those_of_a_copy_whose_weights_were_moved_up_its_own_loss(
    model: Network, batch: I.Batch, name: str
) -> None:
    recipe, _, size, _ = PAIRS[name]
    amount, loss_of = 0.03, LOSSES[name]
    method, by_hand = recipe(**{size: amount}, **SETTINGS), copy.deepcopy(model)
    adversary = method.attack(model, batch, generator=_seed())
    gradients = _gradients(by_hand, loss_of(by_hand, batch, adversary.x))
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    before = loss_of(by_hand, batch, adversary.x).detach().mean()
    with torch.no_grad():
        for parameter, g in zip(by_hand.parameters(), gradients, strict=True):
            if name == "at_sam":
                parameter.add_(amount * g / length)
            elif parameter.ndim > 1:
                parameter.add_(amount * parameter.norm() * g / g.norm())
    expected = loss_of(by_hand, batch, adversary.x)
    loss, _, evidence = I.training_loss(model, method, batch, adversary=adversary)
    _near(loss, expected)
    _same_gradients(_gradients(model, loss), _gradients(by_hand, expected))
    assert float(expected.detach().mean()) > float(before) + 1e-3
    if name == "at_sam":
        assert set(evidence.offsets) == {n for n, _ in model.named_parameters()}
        total = math.sqrt(sum(float(v.square().sum()) for v in evidence.offsets.values()))
        assert total == pytest.approx(amount, rel=1e-9)
    else:
        assert set(evidence.offsets) == {"conv.weight", "head.weight"}
        for key, offset in evidence.offsets.items():
            weight = dict(model.named_parameters())[key].detach()
            assert float(offset.norm() / weight.norm()) == pytest.approx(amount, rel=1e-9)


def test_trades_awp_is_trades_for_ten_of_two_hundred_epochs_and_the_others_begin_at_once(
    model: Network, batch: I.Batch
) -> None:
    ours, theirs = I.trades_awp(**SETTINGS), I.trades(**SETTINGS)
    for epoch in (0, 9):
        assert _equal_to_the_last_bit(model, batch, ours, theirs, I.Progress(epoch, 200))
    fixed = I.trades_awp(gamma=5e-3, **SETTINGS)
    for epoch in (10, 199):
        assert not _equal_to_the_last_bit(model, batch, ours, theirs, I.Progress(epoch, 200))
        assert _equal_to_the_last_bit(model, batch, ours, fixed, I.Progress(epoch, 200))
    assert [ours.at(I.Progress(e, 20)).perturbation.gamma for e in range(3)] == [0, 5e-3, 5e-3]
    for recipe in (I.at_awp, I.mart_awp, I.at_sam):
        computed = I.training_loss(model, recipe(**SETTINGS), batch, progress=I.Progress(0, 200), generator=_seed())
        assert computed.evidence.offsets
