"""GAIR-TRADES, GAIR-FAT and GAIR-RST: against plain loops, in their limits, and by the invariants J9 and J10."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I
from instar.attacks import Attack
from instar.methods.gair_rst import AttackableShare
from instar.passes import passes

SIZE, CLASSES, STEPS, EPS, STEP = 9, 3, 6, 0.1, 0.03
SETTINGS = {"eps": EPS, "step_size": STEP, "steps": STEPS}
FAMILIES = ["tanh", "sigmoid", "discrete"]
TERMS = ["ce", "kl", "both"]


class Network(nn.Module):
    """Convolution, BatchNorm and a linear layer, smooth and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 3).flatten(1))


@pytest.fixture
def images() -> Tensor:
    x = torch.rand(SIZE, 1, 6, 6, dtype=torch.float64)
    x[x < 0.05] = 0.0
    return x


@pytest.fixture
def model(images: Tensor) -> Network:
    """A network with statistics of its own, whose boundaries run through the middle of the images."""
    made = Network()
    with torch.no_grad():
        made.norm.running_mean.uniform_(-0.3, 0.3)
        made.norm.running_var.uniform_(0.2, 1.0)
        logits = made.eval()(images)
        made.head.bias.sub_(logits.mean(0))
        for parameter in made.head.parameters():
            parameter.mul_(0.5 / logits.std(0).mean())
    return made.train()


@pytest.fixture
def batch(model: Network, images: Tensor) -> I.Batch:
    """The images with what the network takes them for, but for the first."""
    y = copy.deepcopy(model).eval()(images).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    return I.Batch(images, y)


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _near(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


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
            draws = torch.Generator().manual_seed(update)
            computed, _ = I.training_step(net, method, batch, optimizer, progress=progress, generator=draws)
            states += [computed.loss.detach(), computed.adversary.x, computed.adversary.kappa]
            states += [p.grad.clone() for p in net.parameters()] + [t.clone() for t in net.state_dict().values()]
        seen.append(states)
    return all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def _loop_attack(
    model: nn.Module, batch: I.Batch, start: Tensor, objective: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, list[int]]:
    """PGD in eval mode, instance by instance, and the number of iterates still right before each step."""
    model.eval()
    found, kappa = [], []
    for i, y in enumerate(batch.y.tolist()):
        x, moved, right = batch.x[i : i + 1], start[i : i + 1], 0
        for _ in range(STEPS):
            leaf = moved.clone().requires_grad_()
            logits = model(leaf)[0]
            right += int(int(logits.argmax()) == y)
            (gradient,) = torch.autograd.grad(objective(logits, i), leaf)
            moved = torch.max(torch.min(moved + STEP * gradient.sign(), x + EPS), x - EPS).clamp(0, 1)
        found.append(moved)
        kappa.append(right)
    model.train()
    return torch.cat(found).detach(), kappa


def _kl_attack(model: nn.Module, batch: I.Batch, start: Tensor) -> tuple[Tensor, list[int]]:
    p = copy.deepcopy(model).eval()(batch.x).softmax(1).detach()
    return _loop_attack(model, batch, start, lambda z, i: (p[i] * (p[i].log() - z.log_softmax(0))).sum())


def _divergence(clean: Tensor, adv: Tensor) -> Tensor:
    """KL(p ‖ q) of one instance, from its logits, class by class."""
    p, q = clean.exp() / clean.exp().sum(), adv.exp() / adv.exp().sum()
    total = torch.zeros((), dtype=torch.float64)
    for k in range(CLASSES):
        total = total + p[k] * (p[k].log() - q[k].log())
    return total


def _omega(kappa: list[int], shift: float, family: str) -> list[float]:
    u = [shift + 5 * (1 - 2 * k / STEPS) for k in kappa]
    raw = {
        "tanh": [(1 + math.tanh(v)) / 2 for v in u],
        "sigmoid": [1 / (1 + math.exp(-v)) for v in u],
        "discrete": [(STEPS + 1 - k) / (STEPS + 1) for k in kappa],
    }[family]
    return [len(raw) * w / sum(raw) for w in raw]


# GAIR-TRADES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighted", TERMS)
def test_gair_trades_is_a_loop_over_instances_whose_weights_stand_on_the_chosen_term(
    model: Network, batch: I.Batch, weighted: str, family: str
) -> None:
    start = batch.x + 0.001 * torch.randn(batch.x.shape, generator=_seed(), dtype=torch.float64)
    by_hand = copy.deepcopy(model)
    x_adv, kappa = _kl_attack(by_hand, batch, start)
    assert len(set(kappa)) > 2, "equal counts would show nothing"
    omega = _omega(kappa, -0.5, family)
    clean, adv = by_hand(batch.x), by_hand(x_adv)
    total = torch.zeros((), dtype=torch.float64)
    for i, y in enumerate(batch.y.tolist()):
        accurate = -torch.log(clean[i].softmax(0)[y])
        robust = _divergence(clean[i], adv[i])
        total = total + (omega[i] if weighted != "kl" else 1.0) * accurate
        total = total + 4.0 * (omega[i] if weighted != "ce" else 1.0) * robust
    reference = total / SIZE

    method = I.gair_trades(beta=4.0, weighted=weighted, shift=-0.5, burn_in=0, weight=family, **SETTINGS)
    loss, adversary, _ = I.training_loss(model, method, batch, generator=_seed())
    _near(adversary.x, x_adv, 1e-12)
    assert adversary.kappa.tolist() == kappa
    _near(loss.mean(), reference)
    _same_gradients(_gradients(model, loss.mean()), _gradients(by_hand, reference))


def test_gair_trades_weighs_the_cross_entropy_unless_told_otherwise() -> None:
    assert I.gair_trades(**SETTINGS) == I.gair_trades(weighted="ce", **SETTINGS)
    assert len({repr(I.gair_trades(weighted=term, **SETTINGS)) for term in TERMS}) == 3
    with pytest.raises(I.UserError, match=r"unknown term to weigh .adv.*both, ce, kl"):
        I.gair_trades(weighted="adv")


@pytest.mark.parametrize("weighted", TERMS)
def test_gair_trades_with_an_infinite_shift_is_trades_bit_for_bit(
    model: Network, batch: I.Batch, weighted: str
) -> None:
    ours = I.gair_trades(weighted=weighted, shift=math.inf, burn_in=0, **SETTINGS)
    assert _equal_to_the_last_bit(model, batch, ours, I.trades(**SETTINGS))


@pytest.mark.parametrize("weighted", TERMS)
def test_gair_trades_is_trades_bit_for_bit_until_the_burn_in_ends_and_no_longer(
    model: Network, batch: I.Batch, weighted: str
) -> None:
    ours, theirs = I.gair_trades(weighted=weighted, **SETTINGS), I.trades(**SETTINGS)
    for epoch in (0, 74):
        assert _equal_to_the_last_bit(model, batch, ours, theirs, I.Progress(epoch, 100))
    for epoch in (75, 99):
        assert not _equal_to_the_last_bit(model, batch, ours, theirs, I.Progress(epoch, 100))


# GAIR-FAT


def _friendly(model: nn.Module, batch: I.Batch, start: Tensor, tau: int) -> tuple[Tensor, list[int], list[int]]:
    """Early-stopped PGD of single instances with a counter of τ, and the iteration that each one was frozen in."""
    model.eval()
    found, kappa, frozen = [], [], []
    for i, y in enumerate(batch.y.tolist()):
        x, moved, counter, right, when = batch.x[i : i + 1], start[i : i + 1], tau, 0, STEPS
        for k in range(STEPS):
            leaf = moved.clone().requires_grad_()
            logits = model(leaf)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, batch.y[i : i + 1]), leaf)
            if int(logits.argmax()) == y:
                right += 1
            elif counter == 0:
                when = k
                break
            else:
                counter -= 1
            moved = torch.max(torch.min(moved + STEP * gradient.sign(), x + EPS), x - EPS).clamp(0, 1)
        found.append(moved)
        kappa.append(right)
        frozen.append(when)
    model.train()
    return torch.cat(found).detach(), kappa, frozen


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_j9_images_that_stop_early_stay_with_their_own_label_and_clean_image(
    model: Network, batch: I.Batch, tau: int
) -> None:
    noise = 2 * torch.rand(batch.x.shape, generator=_seed(), dtype=torch.float64) - 1
    start = (batch.x + EPS * noise).clamp(0, 1)
    by_hand = copy.deepcopy(model)
    x_adv, kappa, frozen = _friendly(by_hand, batch, start, tau)
    assert len(set(frozen)) > 2, "instances that stop together would show nothing"
    omega, logits = _omega(kappa, 0.0, "tanh"), by_hand(x_adv)
    terms = [w * -z.log_softmax(0)[y] for w, z, y in zip(omega, logits, batch.y, strict=True)]
    reference = sum(terms[1:], terms[0]) / SIZE

    method = I.gair_fat(patience=tau, burn_in=0, **SETTINGS)
    loss, adversary, evidence = I.training_loss(model, method, batch, generator=_seed())
    assert float((adversary.x - batch.x).abs().max()) <= EPS + 1e-12
    _near(adversary.x, x_adv, 1e-12)
    assert adversary.kappa.tolist() == kappa
    assert adversary.moves.tolist() == frozen
    _near(loss, torch.stack(terms))
    _same_gradients(_gradients(model, loss.mean()), _gradients(by_hand, reference))
    # The published script returns images in the order of stopping, and labels in that of the batch.
    order = sorted(range(SIZE), key=lambda i: frozen[i])
    shifted = F.cross_entropy(evidence.adv[order], batch.y, reduction="none") * torch.tensor(omega)[order]
    assert abs(shifted.mean().item() - reference.item()) > 1e-2


@pytest.mark.parametrize("tau", [STEPS, STEPS + 1, math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_j9_gair_fat_with_a_patience_of_all_steps_is_gairat_bit_for_bit(
    model: Network, batch: I.Batch, tau: float, family: str
) -> None:
    weights = {"shift": -0.5, "burn_in": 0, "weight": family}
    theirs = I.gairat(**weights, **SETTINGS)
    assert _equal_to_the_last_bit(model, batch, I.gair_fat(patience=tau, **weights, **SETTINGS), theirs)
    assert not _equal_to_the_last_bit(model, batch, I.gair_fat(patience=1, **weights, **SETTINGS), theirs)


def test_gair_fat_with_an_infinite_shift_and_in_its_burn_in_is_fat_bit_for_bit(model: Network, batch: I.Batch) -> None:
    for tau in (0, 2):
        theirs = I.fat(patience=tau, **SETTINGS)
        ours = I.gair_fat(patience=tau, shift=math.inf, burn_in=0, **SETTINGS)
        assert _equal_to_the_last_bit(model, batch, ours, theirs)
        ours = I.gair_fat(patience=tau, **SETTINGS)
        assert _equal_to_the_last_bit(model, batch, ours, theirs, I.Progress(59, 120))
        assert not _equal_to_the_last_bit(model, batch, ours, theirs, I.Progress(60, 120))


def test_the_patience_of_gair_fat_is_zero_three_and_six_as_in_the_script() -> None:
    method = I.gair_fat(**SETTINGS)
    patience = [method.at(I.Progress(epoch, 120)).attack.stop.steps for epoch in (0, 39, 40, 69, 70, 119)]
    assert patience == [0, 0, 3, 3, 6, 6]
    shifts = [method.at(I.Progress(epoch, 120)).loss.left.shift for epoch in (59, 60, 119)]
    assert shifts == [math.inf, 0.0, 0.0]


# GAIR-RST


def _shares(kappa: list[int], budget: int, shift: float) -> Tensor:
    count = len(kappa)
    return AttackableShare(shift)(
        I.Evidence(
            x=torch.zeros(count, 1, 1, 1),
            y=torch.zeros(count).long(),
            clean=torch.randn(count, 2, dtype=torch.float64, requires_grad=True),
            kappa=torch.tensor(kappa, dtype=torch.int32),
            budget=budget,
        )
    )


@pytest.mark.parametrize("budget", [2, 7, 10, 40])
@pytest.mark.parametrize("shift", [-100.0, -3.0, 0.0, 3.0, 100.0, math.inf])
def test_j10_the_share_of_the_first_adversary_is_the_written_hyperbolic_tangent(budget: int, shift: float) -> None:
    shares = _shares(list(range(budget + 1)), budget, shift)
    expected = [(1 + math.tanh(shift + budget / 2 - k)) / 2 for k in range(budget + 1)]
    _near(shares, torch.tensor(expected, dtype=torch.float64), 1e-15)
    assert bool(((shares >= 0) & (shares <= 1)).all())
    assert bool((shares.diff() <= 0).all())
    assert not shares.requires_grad


def test_j10_shares_are_not_normalised_so_that_an_instance_does_not_see_its_neighbours() -> None:
    alone = _shares([6], 10, 0.0)
    assert alone.item() == pytest.approx((1 + math.tanh(-1)) / 2, abs=1e-15)
    for others in ([6, 6, 6], [0, 0, 0], [10, 10, 10]):
        together = _shares([6, *others], 10, 0.0)
        assert together[0] == alone[0]
        assert abs(together.mean().item() - 1) > 1e-2
    with pytest.raises(I.UserError, match="must be a number or inf; got nan"):
        AttackableShare(math.nan)


@dataclass(frozen=True)
class Refuses(Attack):
    """An attack that must not be run."""

    def __call__(self, model: nn.Module, batch: I.Batch, *, generator: torch.Generator | None = None) -> I.Adversary:
        raise AssertionError("the margin attack was run")


def test_j10_the_burn_in_of_gair_rst_is_trades_in_loss_gradient_and_cost(model: Network, batch: I.Batch) -> None:
    ours, theirs = I.gair_rst(**SETTINGS), I.trades(**SETTINGS)
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def forwards_of(method: I.Method, progress: I.Progress) -> int:
        forwards.clear()
        I.training_loss(model, method, batch, progress=progress, generator=_seed())
        return len(forwards)

    for epoch in (0, 4):
        progress = I.Progress(epoch, 10)
        assert _equal_to_the_last_bit(model, batch, ours, theirs, progress)
        assert passes(ours.at(progress)) == passes(theirs)
        assert forwards_of(ours, progress) == forwards_of(theirs, progress) == STEPS + 3
        quiet = replace(ours, attack=replace(ours.attack, others=(Refuses(),)))
        assert I.training_loss(model, quiet, batch, progress=progress).adversary.others == ()
    progress = I.Progress(5, 10)
    assert not _equal_to_the_last_bit(model, batch, ours, theirs, progress)
    assert forwards_of(ours, progress) == 2 * STEPS + 4
    with pytest.raises(AssertionError, match="the margin attack was run"):
        I.training_loss(model, quiet, batch, progress=progress)


def test_j10_gair_rst_with_an_infinite_shift_has_the_loss_and_gradient_of_trades(
    model: Network, batch: I.Batch
) -> None:
    ours = I.gair_rst(shift=math.inf, burn_in=0, **SETTINGS)
    twin = copy.deepcopy(model)
    loss, adversary, _ = I.training_loss(model, ours, batch, generator=_seed())
    trades = I.training_loss(twin, I.trades(**SETTINGS), batch, generator=_seed())
    assert torch.equal(adversary.x, trades.adversary.x)
    assert torch.equal(loss, trades.loss)
    _same_gradients(_gradients(model, loss.mean()), _gradients(twin, trades.loss.mean()))


def test_j10_two_adversaries_that_are_the_same_make_the_loss_independent_of_the_shift(
    model: Network, batch: I.Batch
) -> None:
    attack = I.PGD(I.Linf(EPS), steps=STEPS, step_size=STEP)
    first, second = attack(model, batch), replace(attack, objective=I.Margin(), start=I.Zero())(model, batch)
    assert len(set(first.kappa.tolist())) > 2
    trades = I.training_loss(model, I.trades(**SETTINGS), batch, adversary=first).loss
    apart = set()
    for shift in (-5.0, 0.0, 3.0, 50.0):
        method = I.gair_rst(shift=shift, burn_in=0, **SETTINGS)
        twice = I.training_loss(model, method, batch, adversary=replace(first, others=(first,))).loss
        _near(twice, trades, 1e-12)
        _same_gradients(_gradients(model, twice.mean()), _gradients(model, trades.mean()))
        mixed = I.training_loss(model, method, batch, adversary=replace(first, others=(second,))).loss
        apart.add(round(mixed.mean().item(), 6))
    assert len(apart) > 2, "two different adversaries are told apart"


@pytest.mark.parametrize("confidence", [50.0, 0.2])
@pytest.mark.parametrize("shift", [-1.0, 0.5])
def test_gair_rst_is_a_loop_over_instances_that_mixes_two_attacks(
    model: Network, batch: I.Batch, shift: float, confidence: float
) -> None:
    draws = _seed()
    noise = [0.001 * torch.randn(batch.x.shape, generator=draws, dtype=torch.float64) for _ in range(2)]
    by_hand = copy.deepcopy(model)

    def margin(z: Tensor, i: int) -> Tensor:
        y = int(batch.y[i])
        return torch.stack([v for k, v in enumerate(z) if k != y]).max().sub(z[y]).clamp_max(confidence)

    x_kl, kappa = _kl_attack(by_hand, batch, batch.x + noise[0])
    x_cw, _ = _loop_attack(by_hand, batch, batch.x + noise[1], margin)
    assert len(set(kappa)) > 2
    assert float((x_kl - x_cw).abs().max()) > EPS
    clean, adv, other = by_hand(batch.x), by_hand(x_kl), by_hand(x_cw)
    terms = []
    for i, y in enumerate(batch.y.tolist()):
        q = (1 + math.tanh(shift + STEPS / 2 - kappa[i])) / 2
        mixed = q * _divergence(clean[i], adv[i]) + (1 - q) * _divergence(clean[i], other[i])
        terms.append(-torch.log(clean[i].softmax(0)[y]) + 5.0 * mixed)
    reference = sum(terms[1:], terms[0]) / SIZE

    method = I.gair_rst(beta=5.0, shift=shift, burn_in=0, confidence=confidence, **SETTINGS)
    loss, adversary, _ = I.training_loss(model, method, batch, generator=_seed())
    _near(adversary.x, x_kl, 1e-12)
    _near(adversary.others[0].x, x_cw, 1e-12)
    assert adversary.kappa.tolist() == kappa
    _near(loss, torch.stack(terms))
    _same_gradients(_gradients(model, loss.mean()), _gradients(by_hand, reference))


def test_several_attacks_keep_their_order_and_the_record_of_the_whole_is_that_of_the_first(
    model: Network, batch: I.Batch
) -> None:
    attacks = (
        I.PGD(I.Linf(EPS), steps=STEPS, step_size=STEP, stop=I.Patience(1)),
        I.PGD(I.Linf(0.1), I.Margin(), steps=3, step_size=0.05),
        I.PGD(I.L2(0.8), steps=5, step_size=0.3),
    )
    draws = _seed()
    first, *rest = (attack(model, batch, generator=draws) for attack in attacks)
    whole = I.Several(attacks[0], attacks[1:])(model, batch, generator=_seed())
    assert len({tuple(a.kappa.tolist()) for a in (first, *rest)}) == 3, "records that agree would show nothing"
    for name in ("x", "kappa", "inspected", "moves"):
        assert torch.equal(getattr(whole, name), getattr(first, name))
    assert whole.budget == STEPS
    assert [other.budget for other in whole.others] == [3, 5]
    for found, expected in zip(whole.others, rest, strict=True):
        assert torch.equal(found.x, expected.x)
        assert torch.equal(found.kappa, expected.kappa)

    method = I.Method(I.Several(attacks[0], attacks[1:]), I.CrossEntropy("clean") + I.KL() + I.KL("other"))
    evidence = I.training_loss(model, method, batch, adversary=whole).evidence
    assert [torch.equal(z, model(a.x)) for z, a in zip(evidence.others, rest, strict=True)] == [True, True]
    assert torch.equal(evidence.logits("other"), evidence.others[0])
    with pytest.raises(I.UserError, match="the attack must be Several"):
        I.Method(attacks[0], I.CrossEntropy("clean") + I.KL("other"))
    with pytest.raises(I.UserError, match="one or more attacks"):
        I.Several(attacks[0], ())
