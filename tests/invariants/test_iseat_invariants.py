"""The invariants I1 to I11 of ISEAT: what its specification says of weights, penalty, step and schedule.

Where each is proven. Names without a file are tests of this one; those of test_conformance.py are checks that run for
every recipe.

I1: λ = γ = 0 is PGD-AT, to the last bit
    test_limits.py::test_iseat_without_smoothing_and_without_weight_perturbation_is_pgd_at_in_train_mode
I2: λ = 0 is AT-AWP
    test_limits.py::test_iseat_without_smoothing_is_awp
    test_limits.py::test_iseat_before_the_first_drop_of_the_learning_rate_is_awp
I3: weights are ranks, 1 for the most vulnerable, whatever the order of the batch
    test_i3_of_any_two_instances_the_more_vulnerable_one_weighs_more_whatever_the_order_of_the_batch
    test_published_tables.py::test_ranks_are_the_multiset_of_multiples_of_one_over_b_and_follow_the_difficulty
I4: offsets are γ‖θ‖ long, none on BatchNorm and biases, and the loss rises along them (there is no proxy step η)
    test_i4_the_loss_of_the_adversary_rises_along_offsets_that_ignore_the_penalty
    test_loop_references.py::test_awp_loss_and_gradients_are_those_of_an_explicitly_perturbed_copy
    test_limits.py::test_awp_does_not_depend_on_the_scale_of_the_loss_it_climbs
I5: a learning rate of 0 changes no weight; 11 updates of the statistics
    test_i5_a_step_of_no_length_keeps_every_weight_and_updates_the_statistics_eleven_times
I6: images in ball and box; without steps there is no distance
    test_conformance.py::ball_and_box_hold
    test_i6_without_attack_steps_and_weight_perturbation_there_is_nothing_to_smooth
I7: the penalty equals a loop, its gradient finite differences and that of two merged modules
    test_loop_references.py::test_iseat_gradients_are_the_sum_of_those_of_a_perturbed_and_an_unperturbed_copy
    test_i7_the_gradient_is_the_sum_of_the_slopes_at_perturbed_and_at_unperturbed_weights
I8: a constant added to all logits changes nothing
    test_i8_a_constant_added_to_all_logits_changes_neither_the_loss_nor_its_gradient
I9: λ = 0 for 100 of 200 epochs, then 0.1
    test_published_tables.py::test_the_stage_schedule_of_iseat_begins_with_the_first_decay_of_the_learning_rate
    test_i9_the_recipe_smooths_from_the_first_drop_of_the_learning_rate_and_perturbs_weights_always
I10: uniform weights are plain logit pairing
    test_limits.py::test_uniform_ranks_are_the_plain_pairing_of_logits_at_that_strength
    test_i10_with_weights_of_one_and_still_weights_a_step_is_that_of_squared_logit_pairing
I11: only the order of the vulnerabilities counts, and no gradient goes through them
    test_i11_any_increasing_function_of_the_vulnerability_gives_the_same_loss_and_gradient
    test_i11_no_gradient_reaches_the_loss_through_the_vulnerability
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import instar as I

SIZE, CLASSES, EPS, GAMMA, LAM = 8, 4, 0.1, 0.01, 0.5


class Network(nn.Module):
    """Two convolutions, BatchNorm and a linear layer, smooth and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.softplus(self.second(F.softplus(self.norm(self.first(x)))))
        return 4 * self.head(F.avg_pool2d(hidden, 3).flatten(1))


@pytest.fixture
def model() -> Network:
    return Network().train()


@pytest.fixture
def batch() -> I.Batch:
    return I.Batch(torch.rand(SIZE, 1, 6, 6, dtype=torch.float64), torch.arange(SIZE) % CLASSES)


def _iseat(lam: float = LAM, gamma: float = GAMMA, *, steps: int = 3) -> I.Method:
    return I.iseat(smoothness=lam, gamma=gamma, eps=EPS, step_size=EPS / 4, steps=steps)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss.mean(), parameters), strict=True))


def _logits(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Logits at other weights, with the statistics of the batch."""
    return functional_call(model, {**weights, **{name: b.clone() for name, b in model.named_buffers()}}, (x,))


def test_i3_of_any_two_instances_the_more_vulnerable_one_weighs_more_whatever_the_order_of_the_batch() -> None:
    for size in [*range(1, 20), 128]:
        adv, anchor = (torch.randn(size, CLASSES, dtype=torch.float64) for _ in range(2))
        y = torch.randint(CLASSES, (size,))
        rows = torch.arange(size)
        vulnerability = anchor.log_softmax(1)[rows, y] - adv.log_softmax(1)[rows, y]
        evidence = I.Evidence(x=torch.zeros(size, 1, 1, 1), y=y, adv=adv, anchor=anchor)
        weights = I.RankWeight(I.LossGap())(evidence)
        assert sorted(weights.tolist()) == pytest.approx([(k + 1) / size for k in range(size)], abs=1e-15)
        assert weights.sum().item() == pytest.approx((size + 1) / 2, abs=1e-12)
        assert weights[vulnerability.argmax()].item() == 1
        heavier, worse = (v.unsqueeze(0) > v.unsqueeze(1) for v in (weights, vulnerability))
        assert torch.equal(heavier, worse)
        order = torch.randperm(size)
        shuffled = I.Evidence(x=evidence.x, y=y[order], adv=adv[order], anchor=anchor[order])
        assert torch.equal(I.RankWeight(I.LossGap())(shuffled), weights[order])


@pytest.mark.parametrize("lam", [0.0, LAM, 1e3])
def test_i4_the_loss_of_the_adversary_rises_along_offsets_that_ignore_the_penalty(
    model: Network, batch: I.Batch, lam: float
) -> None:
    plain = copy.deepcopy(model)
    _, adversary, evidence = I.training_loss(model, _iseat(lam), batch)
    offsets = evidence.offsets
    assert set(offsets) == {"first.weight", "second.weight", "head.weight"}
    gradient = _gradients(plain, F.cross_entropy(plain(adversary.x), batch.y))
    weights = {name: p.detach() for name, p in plain.named_parameters()}
    expected = {name: GAMMA * weights[name].norm() * gradient[name] / gradient[name].norm() for name in offsets}
    for name, offset in offsets.items():
        assert offset.norm().item() == pytest.approx(GAMMA * weights[name].norm().item(), rel=1e-10)
        torch.testing.assert_close(offset, expected[name], rtol=0, atol=1e-12)

    def risen(share: float) -> float:
        moved = {name: w + share * offsets[name] if name in offsets else w for name, w in weights.items()}
        return F.cross_entropy(_logits(plain, moved, adversary.x), batch.y).item()

    slope = (risen(1e-4) - risen(-1e-4)) / 2e-4
    assert slope == pytest.approx(sum(GAMMA * float(weights[n].norm() * gradient[n].norm()) for n in offsets), rel=1e-5)
    assert slope > 0


@pytest.mark.parametrize("gamma", [0.0, GAMMA])
@pytest.mark.parametrize("lam", [0.0, LAM])
def test_i5_a_step_of_no_length_keeps_every_weight_and_updates_the_statistics_eleven_times(
    model: Network, batch: I.Batch, lam: float, gamma: float
) -> None:
    method, by_hand = _iseat(lam, gamma, steps=10), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    computed, _ = I.training_step(model, method, batch, optimizer)
    for found, before in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(found, before)
    assert int(model.norm.num_batches_tracked) == 11
    # Ten iterates of the attack, the clean image first; then the adversary at the perturbed weights; never the anchor.
    still = dict(by_hand.named_parameters())
    iterates = [replace(method.attack, steps=k, mode="batch")(by_hand, batch).x for k in range(10)]
    for x in iterates:
        by_hand(x)
    offsets = computed.evidence.offsets
    functional_call(by_hand, {n: p + offsets.get(n, 0) for n, p in still.items()}, (computed.adversary.x,))
    for found, expected in zip(model.buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_i6_without_attack_steps_and_weight_perturbation_there_is_nothing_to_smooth(
    model: Network, batch: I.Batch
) -> None:
    # The step takes the statistics of the batch in both forwards, so that equal images have equal logits.
    loss, adversary, evidence = I.training_loss(model, _iseat(gamma=0.0, steps=0), batch)
    assert torch.equal(adversary.x, batch.x)
    assert I.LogitShift()(evidence).tolist() == [0.0] * SIZE
    assert torch.equal(loss, F.cross_entropy(evidence.anchor, batch.y, reduction="none"))
    _, _, attacked = I.training_loss(model, _iseat(gamma=0.0, steps=3), batch)
    _, _, perturbed = I.training_loss(model, _iseat(gamma=GAMMA, steps=0), batch)
    assert bool((I.LogitShift()(attacked) > 0).all())
    assert bool((I.LogitShift()(perturbed) > 0).all())


@pytest.mark.parametrize("name", ["first.weight", "norm.weight", "norm.bias", "second.bias", "head.weight"])
def test_i7_the_gradient_is_the_sum_of_the_slopes_at_perturbed_and_at_unperturbed_weights(
    model: Network, batch: I.Batch, name: str
) -> None:
    loss, adversary, evidence = I.training_loss(model, _iseat(), batch)
    gradient = _gradients(model, loss)[name]
    rank = I.RankWeight(I.LossGap())(evidence)
    q = {n: p.detach() for n, p in model.named_parameters()}
    p = {n: w + evidence.offsets[n] if n in evidence.offsets else w for n, w in q.items()}

    def objective(p: Mapping[str, Tensor], q: Mapping[str, Tensor]) -> float:
        adv, clean = _logits(model, p, adversary.x), _logits(model, q, batch.x)
        penalty = sum(float(w) * float((a - c).square().sum()) for w, a, c in zip(rank, adv, clean, strict=True))
        return F.cross_entropy(adv, batch.y).item() + LAM / SIZE * penalty

    assert loss.mean().item() == pytest.approx(objective(p, q), abs=1e-12)
    direction = torch.randn_like(gradient)

    def slope(moves: Callable[[float], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> float:
        return (objective(*moves(1e-6)) - objective(*moves(-1e-6))) / 2e-6

    at_perturbed = slope(lambda h: ({**p, name: p[name] + h * direction}, q))
    at_unperturbed = slope(lambda h: (p, {**q, name: q[name] + h * direction}))
    assert float((gradient * direction).sum()) == pytest.approx(at_perturbed + at_unperturbed, rel=1e-6, abs=1e-8)
    if name != "second.bias":
        assert abs(at_unperturbed) > 1e-4, "the clean branch must carry gradient for this test to see it"


@pytest.mark.parametrize("constant", [-30.0, 3.7])
def test_i8_a_constant_added_to_all_logits_changes_neither_the_loss_nor_its_gradient(
    model: Network, batch: I.Batch, constant: float
) -> None:
    lifted = copy.deepcopy(model)
    with torch.no_grad():
        lifted.head.bias.add_(constant / 4)
    ours, theirs = (I.training_loss(net, _iseat(), batch) for net in (lifted, model))
    assert (ours.evidence.adv - theirs.evidence.adv).mean().item() == pytest.approx(constant)
    torch.testing.assert_close(ours.adversary.x, theirs.adversary.x, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-11)
    found, expected = _gradients(lifted, ours.loss), _gradients(model, theirs.loss)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11)


def test_i9_the_recipe_smooths_from_the_first_drop_of_the_learning_rate_and_perturbs_weights_always() -> None:
    stages = [I.iseat().at(I.Progress(epoch, 200)) for epoch in range(200)]
    assert [stage.loss.right.left.amount for stage in stages] == [0.0] * 100 + [0.1] * 100
    assert {stage.perturbation.gamma for stage in stages} == {7e-3}


def test_i10_with_weights_of_one_and_still_weights_a_step_is_that_of_squared_logit_pairing(
    model: Network, batch: I.Batch
) -> None:
    by_hand = copy.deepcopy(model)
    method = replace(_iseat(gamma=0.0), loss=I.CrossEntropy() + LAM * (I.Constant(1.0) * I.LogitShift()))
    I.training_step(model, method, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    x_adv = replace(method.attack, mode="batch")(by_hand, batch).x
    adv, clean = by_hand(x_adv), by_hand(batch.x)
    pairing = torch.stack([(a - c).square().sum() for a, c in zip(adv, clean, strict=True)]).mean()
    gradients = _gradients(by_hand, F.cross_entropy(adv, batch.y) + LAM * pairing)
    for name, weight in by_hand.named_parameters():
        expected = weight - 0.1 * gradients[name]
        torch.testing.assert_close(dict(model.named_parameters())[name], expected, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Through(I.Signal):
    """A function of another signal."""

    difficulty: I.Signal
    function: Callable[[Tensor], Tensor]

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return self.function(self.difficulty(evidence))


@dataclass(frozen=True, eq=False)
class Fixed(I.Signal):
    """Numbers that nothing depends on."""

    values: Tensor

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return self.values


RISING = {
    "3 v + 100": lambda v: 3 * v + 100,
    "v³": lambda v: v**3,
    "exp v": torch.exp,
    "arctan v": torch.arctan,
}


@pytest.mark.parametrize("name", RISING)
def test_i11_any_increasing_function_of_the_vulnerability_gives_the_same_loss_and_gradient(
    model: Network, batch: I.Batch, name: str
) -> None:
    other = I.CrossEntropy() + LAM * (I.RankWeight(Through(I.LossGap(), RISING[name])) * I.LogitShift())
    ours = I.training_loss(model, replace(_iseat(), loss=other), batch)
    theirs = I.training_loss(model, _iseat(), batch)
    assert torch.equal(ours.loss, theirs.loss)
    found, expected = _gradients(model, ours.loss), _gradients(model, theirs.loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    falling = I.CrossEntropy() + LAM * (I.RankWeight(-I.LossGap()) * I.LogitShift())
    turned = I.training_loss(model, replace(_iseat(), loss=falling), batch).loss
    assert not torch.allclose(turned, theirs.loss)


def test_i11_no_gradient_reaches_the_loss_through_the_vulnerability(model: Network, batch: I.Batch) -> None:
    loss, adversary, evidence = I.training_loss(model, _iseat(), batch)
    rank = Fixed(I.RankWeight(I.LossGap())(evidence))
    fixed = replace(_iseat(), loss=I.CrossEntropy() + LAM * (rank * I.LogitShift()))
    other = I.training_loss(model, fixed, batch, adversary=adversary).loss
    assert torch.equal(other, loss)
    found, expected = _gradients(model, loss), _gradients(model, other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
