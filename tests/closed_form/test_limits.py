"""What every method becomes where one of its numbers goes to the end of its range."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I
from instar.signals import Constant, mean_one

SIZES = [*range(1, 41), 127, 128, 129, 257]
FAMILIES = ["tanh", "sigmoid", "discrete"]


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ).train()


def _batch(size: int, seed: int = 1) -> I.Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 1, 4, 4, generator=generator)
    return I.Batch(x, torch.randint(3, (size,), generator=generator))


def _train(method: I.Method, batch: I.Batch, *, updates: int = 3, progress: I.Progress | None = None) -> list[Tensor]:
    """Losses, gradients and the whole state after every one of a few steps."""
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    seen = []
    for update in range(updates):
        generator = torch.Generator().manual_seed(update)
        computed, _ = I.training_step(model, method, batch, optimizer, progress=progress, generator=generator)
        seen.append(computed.loss.detach())
        seen.append(computed.adversary.x)
        seen.extend(p.grad.clone() for p in model.parameters())
        seen.extend(t.clone() for t in model.state_dict().values())
    return seen


def _equal_to_the_last_bit(method: I.Method, other: I.Method, size: int, **arguments: object) -> None:
    ours, theirs = _train(method, _batch(size), **arguments), _train(other, _batch(size), **arguments)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_gairat_with_an_infinite_shift_is_pgd_at_bit_for_bit(size: int) -> None:
    _equal_to_the_last_bit(I.gairat(shift=math.inf, steps=2), I.pgd_at(steps=2), size)


@pytest.mark.parametrize("function", FAMILIES)
def test_gairat_in_its_burn_in_is_pgd_at_bit_for_bit(function: str) -> None:
    _equal_to_the_last_bit(
        I.gairat(weight=function, steps=3), I.pgd_at(steps=3), 7, progress=I.Progress(epoch=4, epochs=10)
    )


def test_gairat_after_its_burn_in_is_not_pgd_at() -> None:
    settings = {"steps": 4, "eps": 0.5, "step_size": 0.02}
    after = {"updates": 1, "progress": I.Progress(epoch=5, epochs=10)}
    ours, theirs = _train(I.gairat(**settings), _batch(16), **after), _train(I.pgd_at(**settings), _batch(16), **after)
    assert not torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("size", [1, 5, 33])
def test_a_radius_of_zero_is_natural_training_bit_for_bit(size: int) -> None:
    natural = I.Method(I.NoAttack(), I.CrossEntropy())
    for norm in ("Linf", "L2", "L1"):
        ours = _train(I.pgd_at(eps=0.0, steps=2, norm=norm), _batch(size))
        assert all(torch.equal(a, b) for a, b in zip(ours, _train(natural, _batch(size)), strict=True))


def test_natural_training_is_the_plain_loop_bit_for_bit() -> None:
    model, batch = _network(), _batch(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x), batch.y, reduction="none").mean().backward()
        optimizer.step()
    ours = _train(I.Method(I.NoAttack(), I.CrossEntropy()), batch)
    for found, expected in zip(ours[-len(model.state_dict()) :], model.state_dict().values(), strict=True):
        assert torch.equal(found, expected)


def test_trades_without_its_consistency_term_is_the_clean_cross_entropy() -> None:
    model, batch = _network(), _batch(9)
    loss, _, evidence = I.training_loss(model, I.trades(beta=0.0, steps=2), batch)
    expected = F.cross_entropy(evidence.clean, batch.y, reduction="none")
    assert torch.equal(loss, expected)
    ours = torch.autograd.grad(loss.mean(), list(model.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(expected.mean(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_trades_at_a_radius_of_zero_has_no_consistency_term_in_eval_mode_statistics() -> None:
    # One network without BatchNorm, so that the two forwards of one image agree.
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    loss, adversary, evidence = I.training_loss(model, I.trades(eps=0.0, steps=2), _batch(9))
    assert torch.equal(adversary.x, evidence.x)
    assert float(I.KL()(evidence).detach().abs().max()) < 1e-7
    torch.testing.assert_close(loss, F.cross_entropy(evidence.clean, evidence.y, reduction="none"))


def test_the_divergence_has_no_gradient_at_the_clean_image_which_is_why_trades_starts_beside_it() -> None:
    model, batch = _network().double().eval(), _batch(5)
    x = batch.x.double()
    lengths = []
    for noise in (0.0, 1e-3):
        at = (x + noise * torch.randn_like(x)).requires_grad_()
        evidence = I.Evidence(x=x, y=batch.y, clean=model(x).detach(), adv=model(at))
        lengths.append(float(torch.autograd.grad(I.KL()(evidence).sum(), at)[0].norm()))
    assert lengths[0] < 1e-14
    assert lengths[1] > 1e-6


@pytest.mark.parametrize("perturbation", [I.AWP(0.0), I.AWP(0.0, ascend=I.CrossEntropy()), I.SAM(0.0)], ids=repr)
@pytest.mark.parametrize("recipe", [I.pgd_at, I.trades, I.gairat])
def test_a_weight_perturbation_of_length_zero_is_none_at_all(perturbation: object, recipe: object) -> None:
    method = recipe(steps=2)
    _equal_to_the_last_bit(replace(method, perturbation=perturbation), method, 6)


def test_a_weight_perturbation_grows_from_nothing_continuously() -> None:
    batch = _batch(12)
    none, _, _ = I.training_loss(_network(), I.Method(I.NoAttack(), I.CrossEntropy()), batch)
    distances = []
    for gamma in (1e-2, 1e-3, 1e-4):
        method = I.Method(I.NoAttack(), I.CrossEntropy(), perturbation=I.AWP(gamma))
        loss, _, _ = I.training_loss(_network(), method, batch)
        assert loss.mean().item() > none.mean().item()
        distances.append((loss.mean() - none.mean()).item())
    assert distances[0] == pytest.approx(10 * distances[1], rel=0.1)


@pytest.mark.parametrize("bound", [1.0, 1.5, math.inf])
def test_a_self_adaptive_bound_of_one_or_more_is_pgd_at_bit_for_bit(bound: float) -> None:
    plain = I.pgd_at(steps=4, eps=0.5, step_size=0.2)
    stopped = replace(plain, attack=replace(plain.attack, stop=I.Exceeds(I.ProbabilityGap(), bound)))
    _equal_to_the_last_bit(stopped, plain, 24)


def test_a_gap_that_equals_the_bound_is_still_attacked() -> None:
    x, undecided = torch.rand(3, 1, 4, 4), nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        undecided[1].weight.zero_()
        undecided[1].bias.zero_()
    for bias, label, bound in ((0.0, 0, 0.0), (200.0, 1, 1.0), (200.0, 0, -1.0)):
        with torch.no_grad():
            undecided[1].bias[0] = bias
        batch = I.Batch(x, torch.full((3,), label))
        found = I.PGD(steps=3, stop=I.Exceeds(I.ProbabilityGap(), bound))(undecided, batch)
        assert found.moves.tolist() == [3, 3, 3], "the gap is exactly the bound, and not above it"


@pytest.mark.parametrize("bound", [-1.01, -math.inf])
def test_a_self_adaptive_bound_below_minus_one_trains_on_the_start_without_a_move(bound: float) -> None:
    batch, where = _batch(9), I.Linf(0.1)
    attack = I.PGD(where, stop=I.Exceeds(I.ProbabilityGap(), bound))
    found = attack(_network(), batch, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found.x, I.Uniform()(batch.x, where, torch.Generator().manual_seed(4)))
    assert found.moves.tolist() == [0] * 9
    assert found.inspected.tolist() == [1] * 9


@pytest.mark.parametrize("tau", [4, 5, 100, math.inf])
def test_a_patience_of_all_steps_is_the_whole_attack_bit_for_bit(tau: float) -> None:
    plain = I.pgd_at(steps=4, eps=0.5, step_size=0.2)
    _equal_to_the_last_bit(replace(plain, attack=replace(plain.attack, stop=I.Patience(tau))), plain, 24)


def test_a_bound_of_zero_is_a_patience_of_zero() -> None:
    batch = _batch(40)
    attack = I.PGD(I.Linf(0.5), steps=6, step_size=0.05, start=I.Zero())
    bound = replace(attack, stop=I.Exceeds(I.ProbabilityGap(), 0.0))(_network(), batch)
    patience = replace(attack, stop=I.Patience(0))(_network(), batch)
    assert torch.equal(bound.x, patience.x)
    assert bound.moves.tolist() == patience.moves.tolist()
    assert bound.kappa.tolist() == patience.kappa.tolist()
    assert len(set(bound.moves.tolist())) > 2


def _counted(kappa: list[int], budget: int = 10, dtype: torch.dtype = torch.float32) -> I.Evidence:
    x = torch.zeros(len(kappa), 1, 1, 1, dtype=dtype)
    logits = torch.zeros(len(kappa), 2, dtype=dtype)
    return I.Evidence(x=x, y=torch.zeros(len(kappa)).long(), adv=logits, kappa=torch.tensor(kappa), budget=budget)


@pytest.mark.parametrize("function", FAMILIES)
@pytest.mark.parametrize("shift", [-1e9, -500.0, -5.0, -1.0, 0.0, 3.0, 1e9, -math.inf, math.inf])
def test_equal_kappa_gives_weights_of_exactly_one_for_every_shift_and_batch_size(shift: float, function: str) -> None:
    # In float64 too: float32 would round away what B · softmax gets wrong.
    for size in SIZES:
        for kappa in (0, 3, 5, 9, 10):
            weights = I.GeometryWeight(shift, function)(_counted([kappa] * size, dtype=torch.float64))
            assert torch.equal(weights, torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logarithms_give_weights_of_exactly_one_for_every_batch_size(dtype: torch.dtype) -> None:
    for size in range(1, 300):
        for logarithm in (-745.0, -0.3, 0.0, 1e6):
            assert torch.equal(mean_one(torch.full((size,), logarithm, dtype=dtype)), torch.ones(size, dtype=dtype))


@pytest.mark.parametrize("function", FAMILIES)
@pytest.mark.parametrize("shift", [-math.inf, -1e9, -500.0, -20.0, -5.0, -1.0, -1e-9, 0.0, 1.0, 20.0, 1e9, math.inf])
def test_weights_are_finite_have_mean_one_and_fall_with_kappa_for_every_shift(shift: float, function: str) -> None:
    weights = I.GeometryWeight(shift, function)(_counted(list(range(11)), dtype=torch.float64))
    assert bool(weights.isfinite().all())
    assert weights.mean().item() == pytest.approx(1, abs=1e-12)
    assert bool((weights >= 0).all())
    assert bool((weights.diff() <= 0).all())
    if abs(shift) <= 5 or (function == "discrete" and shift != math.inf):
        assert bool((weights.diff() < 0).all())


def test_a_very_negative_shift_still_ranks_instances_by_the_slope_of_the_logarithm() -> None:
    expected = torch.tensor([-20 * k / 10 for k in range(11)], dtype=torch.float64).exp()
    for shift in (-40.0, -1e9, -math.inf):
        weights = I.GeometryWeight(shift)(_counted(list(range(11)), dtype=torch.float64))
        torch.testing.assert_close(weights, expected / expected.mean(), rtol=1e-9, atol=0)


def test_constant_weights_are_exactly_one_whatever_the_shift() -> None:
    kappa = torch.tensor([0, 3, 10, 10, 1])
    evidence = I.Evidence(x=torch.zeros(5, 1, 1, 1), y=torch.zeros(5).long(), kappa=kappa, budget=10)
    for shift in (-50.0, 0.0, 3.0, math.inf):
        assert I.GeometryWeight(shift, "constant")(evidence).tolist() == [1.0] * 5


def test_discrete_weights_do_not_depend_on_a_finite_shift() -> None:
    evidence = _counted(list(range(11)))
    first = I.GeometryWeight(-1e9, "discrete")(evidence)
    assert all(torch.equal(I.GeometryWeight(s, "discrete")(evidence), first) for s in (-1.0, 0.0, 1e9))


@pytest.mark.parametrize("shift", [-4.0, -1.0, -0.3, 0.0, 0.7, 3.0])
def test_tanh_of_an_argument_is_sigmoid_of_twice_the_argument(shift: float) -> None:
    u = shift + 5 * (1 - 2 * torch.arange(11).double() / 10)
    evidence = _counted(list(range(11)), dtype=torch.float64)
    tanh, sigmoid = (I.GeometryWeight(shift, function)(evidence) for function in ("tanh", "sigmoid"))
    torch.testing.assert_close(tanh, torch.sigmoid(2 * u) / torch.sigmoid(2 * u).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(tanh, (1 + torch.tanh(u)) / (1 + torch.tanh(u)).mean(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sigmoid, torch.sigmoid(u) / torch.sigmoid(u).mean(), rtol=1e-9, atol=0)


def test_a_weight_carries_no_gradient_and_its_scale_does_not_matter() -> None:
    # Doubling every omega is a shift of log 2 in all logarithms, which mean_one takes out again.
    logarithm = torch.randn(9, dtype=torch.float64)
    torch.testing.assert_close(mean_one(logarithm + math.log(2)), mean_one(logarithm), rtol=1e-12, atol=0)
    assert not I.GeometryWeight(-1.0)(_counted([1, 5])).requires_grad


@pytest.mark.parametrize("steps", [0, 1])
def test_gairat_with_fewer_than_two_steps_is_refused(steps: int) -> None:
    with pytest.raises(I.UserError, match="steps must be at least 2"):
        I.gairat(steps=steps)
    with pytest.raises(I.UserError, match="at least 2 steps to rank instances"):
        I.GeometryWeight(-1.0)(_counted([0], budget=steps))


def test_a_bound_below_minus_one_is_refused_by_the_recipe_because_it_trains_on_noise() -> None:
    with pytest.raises(I.UserError, match="bound of P-SAT must be at least -1"):
        I.p_sat(bound=-1.01)
    assert I.p_sat(bound=-1.0).attack.stop.bound == -1.0


def test_a_shift_or_coefficient_that_is_not_a_number_is_refused() -> None:
    for make in (lambda: I.gairat(shift=math.nan), lambda: I.GeometryWeight(math.nan), lambda: math.nan * I.KL()):
        with pytest.raises(I.UserError, match="nan"):
            make()


ISEAT = I.iseat(smoothness=0.1, gamma=0.01, eps=0.1, steps=3)


def test_iseat_without_smoothing_and_without_weight_perturbation_is_pgd_at_in_train_mode() -> None:
    plain = I.Method(ISEAT.attack, I.CrossEntropy())
    _equal_to_the_last_bit(I.iseat(smoothness=0.0, gamma=0.0, eps=0.1, steps=3), plain, 12)
    _equal_to_the_last_bit(replace(ISEAT, loss=I.CrossEntropy(), perturbation=None), plain, 12)


def test_iseat_without_smoothing_is_awp() -> None:
    awp = I.Method(ISEAT.attack, I.CrossEntropy(), perturbation=I.AWP(0.01))
    _equal_to_the_last_bit(I.iseat(smoothness=0.0, gamma=0.01, eps=0.1, steps=3), awp, 12)


def test_iseat_before_the_first_drop_of_the_learning_rate_is_awp() -> None:
    awp = I.Method(ISEAT.attack, I.CrossEntropy(), perturbation=I.AWP(0.01))
    _equal_to_the_last_bit(I.iseat(gamma=0.01, eps=0.1, steps=3), awp, 12, progress=I.Progress(49, 100))


@pytest.mark.parametrize(
    "method",
    [
        I.mail_at(eps=0.5, steps=3),
        I.p_sat(bound=1.0, eps=0.5, steps=3),
        I.fat(patience=3, eps=0.5, steps=3),
        I.gairat(eps=0.5, steps=3),
    ],
    ids=["mail_at in its burn-in", "p_sat", "fat", "gairat in its burn-in"],
)
def test_recipes_name_the_limit_in_which_they_are_pgd_at_bit_for_bit(method: I.Method) -> None:
    _equal_to_the_last_bit(method, I.pgd_at(eps=0.5, steps=3), 24, progress=I.Progress(1, 10))


def test_mail_trades_in_its_burn_in_is_trades_bit_for_bit() -> None:
    settings = {"eps": 0.5, "steps": 3}
    _equal_to_the_last_bit(I.mail_trades(**settings), I.trades(**settings), 24, progress=I.Progress(1, 10))


def test_mail_with_a_slope_of_zero_weighs_everything_by_one_and_a_half() -> None:
    batch = _batch(12)
    flat, _, _ = I.training_loss(_network(), I.mail_at(slope=0.0, eps=0.0), batch)
    plain, _, _ = I.training_loss(_network(), I.pgd_at(eps=0.0), batch)
    torch.testing.assert_close(flat, 1.5 * plain)


def test_a_margin_weight_lies_between_zero_and_three_and_is_half_of_it_where_the_margin_is_minus_the_bias() -> None:
    evidence = I.Evidence(
        x=torch.zeros(3, 1, 1, 1), y=torch.zeros(3).long(), adv=torch.tensor([[9.0, -9.0], [0.0, 0.0], [-9.0, 9.0]])
    )
    weight = I.mail_at(bias=0.0, burn_in=0).loss.left(evidence)
    assert weight[1].item() == pytest.approx(1.5)
    assert 0 < weight[0].item() < 0.01
    assert 2.99 < weight[2].item() < 3


def test_a_natural_recipe_looks_at_clean_images_only() -> None:
    ours, theirs = _train(I.natural(), _batch(9)), _train(I.Method(I.NoAttack(), I.CrossEntropy()), _batch(9))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert I.natural().needs == {"clean"}


@pytest.mark.parametrize("y", [0, 1])
def test_the_boosted_cross_entropy_adds_the_margin_of_the_best_class_that_is_not_the_label(y: int) -> None:
    p = [0.5, 0.3, 0.2]
    z = torch.tensor([[math.log(v) for v in p]], dtype=torch.float64)
    evidence = I.Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([y]), clean=z, adv=z)
    boosted, doubt = I.mart(beta=0.0).loss.left, I.mart().loss.right.right.left
    wrong = max(v for k, v in enumerate(p) if k != y)
    assert boosted(evidence).item() == pytest.approx(-math.log(p[y]) - math.log(1.0001 - wrong), abs=1e-10)
    assert doubt(evidence).item() == pytest.approx(1 - p[y] + 1e-7, abs=1e-12)
    certain = replace(evidence, clean=torch.tensor([[90.0 * (k == y) for k in range(3)]]))
    assert doubt(certain).item() == pytest.approx(0, abs=2e-7)


def test_uniform_ranks_are_the_plain_pairing_of_logits_at_that_strength() -> None:
    batch = _batch(8)
    for weight, strength in ((Constant(0.5), 0.05), (Constant(1.0), 0.1)):
        loss = replace(ISEAT, loss=I.CrossEntropy() + 0.1 * (weight * I.LogitShift()))
        computed = I.training_loss(_network(), loss, batch)
        expected = F.cross_entropy(computed.evidence.adv, batch.y, reduction="none") + strength * (
            computed.evidence.adv - computed.evidence.anchor
        ).square().sum(1)
        torch.testing.assert_close(computed.loss, expected)


def test_awp_does_not_depend_on_the_scale_of_the_loss_it_climbs() -> None:
    batch, offsets = _batch(10), []
    for scale in (1e-3, 1.0, 1e3):
        method = I.Method(I.NoAttack(), I.CrossEntropy(), perturbation=I.AWP(0.01, ascend=scale * I.CrossEntropy()))
        offsets.append(I.training_loss(copy.deepcopy(_network()), method, batch).evidence.offsets)
    for name, offset in offsets[0].items():
        torch.testing.assert_close(offset, offsets[1][name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(offset, offsets[2][name], rtol=1e-4, atol=1e-7)
