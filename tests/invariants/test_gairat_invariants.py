"""The invariants J1 to J8 and J11 of GAIRAT; J9 and J10 are about its variants GAIR-FAT and GAIR-RST.

Where each is proven. Names without a file are tests of this one; those of test_conformance.py are checks that run for
every recipe.

J1: λ = ∞, the burn-in and ω = 1 are PGD-AT, to the last bit
    test_limits.py::test_gairat_with_an_infinite_shift_is_pgd_at_bit_for_bit
    test_limits.py::test_gairat_in_its_burn_in_is_pgd_at_bit_for_bit
    test_j1_a_step_in_which_nobody_was_fooled_is_that_of_pgd_at_bit_for_bit
J2: weights sum to B, are not negative, and fall with κ
    test_limits.py::test_weights_are_finite_have_mean_one_and_fall_with_kappa_for_every_shift
    test_j2_weights_add_up_to_the_batch_and_fall_with_every_step_survived_for_any_counts
J3: equal κ gives weights of 1
    test_limits.py::test_equal_kappa_gives_weights_of_exactly_one_for_every_shift_and_batch_size
J4: κ is whole and in [0, K]; constant classifier; steps of no length; K = 0 is refused
    test_conformance.py::counts_of_the_attack_fit_together
    test_linear_models.py::test_a_constant_classifier_gives_kappa_of_all_to_its_class_and_none_to_others
    test_linear_models.py::test_steps_of_no_length_give_kappa_of_all_or_nothing
    test_limits.py::test_gairat_with_fewer_than_two_steps_is_refused
    test_j4_steps_of_no_length_without_noise_count_all_or_nothing_on_a_network
J5: the three families at their known points
    test_limits.py::test_tanh_of_an_argument_is_sigmoid_of_twice_the_argument
    test_j5_half_of_the_steps_survived_weighs_half_of_one_plus_the_hyperbolic_tangent_of_the_shift
    test_j5_tanh_is_the_sigmoid_of_twice_its_argument_and_so_a_sigmoid_at_half_the_distance
    test_j5_the_discrete_weight_falls_from_one_to_one_over_k_plus_one_in_equal_steps
J6: L = Σ ω CE / Σ ω; the scale of ω does not matter; no gradient goes through ω
    test_loop_references.py::test_gairat_loss_and_gradients_are_those_of_a_loop_over_single_instances
    test_limits.py::test_a_weight_carries_no_gradient_and_its_scale_does_not_matter
    test_j6_weights_of_another_scale_give_the_same_loss_and_gradient
    test_j6_no_gradient_reaches_the_loss_through_the_weights
J7: the attack leaves BatchNorm as found; one update a step
    test_conformance.py::everything_is_left_as_found_in_modes_eval_and_batch
    test_j7_every_step_updates_the_statistics_once_by_the_adversarial_batch
J8: images in ball and box; the order of the batch
    test_conformance.py::ball_and_box_hold
    test_conformance.py::order_is_kept
J11: PGD on scaled logits
    test_j11_pgd_on_logits_scaled_by_one_is_pgd
    test_j11_scaling_misleads_no_attack_on_two_linear_classes_but_any_on_more
    test_j11_an_attack_on_the_margin_is_misled_by_no_scale
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I

SIZE, CLASSES, STEPS = 8, 4, 10
FAMILIES = ["tanh", "sigmoid", "discrete"]


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(model.parameters())))


def _weights(kappa: list[int], budget: int, shift: float, function: str, dtype: torch.dtype = torch.float64) -> Tensor:
    size = len(kappa)
    evidence = I.Evidence(
        x=torch.zeros(size, 1, 1, 1),
        y=torch.zeros(size).long(),
        adv=torch.zeros(size, 2, dtype=dtype),
        kappa=torch.tensor(kappa),
        budget=budget,
    )
    return I.GeometryWeight(shift, function)(evidence)


@pytest.mark.parametrize("function", FAMILIES)
@pytest.mark.parametrize("shift", [-5.0, -1.0, 0.0, 3.0])
def test_j1_a_step_in_which_nobody_was_fooled_is_that_of_pgd_at_bit_for_bit(
    model: nn.Module, batch: I.Batch, shift: float, function: str
) -> None:
    batch = I.Batch(batch.x[1:], batch.y[1:])
    settings = {"eps": 1e-6, "step_size": 1e-7}
    states = []
    for method in (I.gairat(shift=shift, weight=function, burn_in=0, **settings), I.pgd_at(**settings)):
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
        computed, _ = I.training_step(net, method, batch, optimizer, generator=_seed())
        assert computed.adversary.kappa.tolist() == [STEPS] * (SIZE - 1)
        states.append([computed.loss.detach(), *net.state_dict().values()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))


@pytest.mark.parametrize("budget", [2, 3, 7, 10, 20])
@pytest.mark.parametrize("function", FAMILIES)
@pytest.mark.parametrize("shift", [-5.0, -1.0, 0.0, 2.0])
def test_j2_weights_add_up_to_the_batch_and_fall_with_every_step_survived_for_any_counts(
    budget: int, function: str, shift: float
) -> None:
    for size in (1, 2, 7, 80, 128):
        kappa = torch.randint(budget + 1, (size,))
        for dtype in (torch.float32, torch.float64):
            weights = _weights(kappa.tolist(), budget, shift, function, dtype)
            assert weights.dtype == dtype
            assert weights.sum().item() == pytest.approx(size, abs=1e-5 * size)
            assert bool((weights > 0).all())
        weights = _weights(kappa.tolist(), budget, shift, function)
        lighter, longer = weights.unsqueeze(0) < weights.unsqueeze(1), kappa.unsqueeze(0) > kappa.unsqueeze(1)
        assert torch.equal(lighter, longer)


def test_j4_steps_of_no_length_without_noise_count_all_or_nothing_on_a_network(
    model: nn.Module, batch: I.Batch
) -> None:
    attack = I.PGD(I.Linf(0.1), step_size=0.0, start=I.Zero())
    found = attack(model, batch)
    right = model.eval()(batch.x).argmax(1) == batch.y
    assert right.tolist() == [False] + [True] * (SIZE - 1)
    assert found.kappa.tolist() == [STEPS * int(r) for r in right]
    assert not found.kappa.is_floating_point()
    moving = I.gairat(eps=0.1, step_size=0.01, steps=STEPS).attack(model, batch, generator=_seed())
    assert len(set(moving.kappa.tolist())) > 2
    assert set(moving.kappa.tolist()) <= set(range(STEPS + 1))


@pytest.mark.parametrize("shift", [-3.0, -1.0, -0.2, 0.0, 1.5])
def test_j5_half_of_the_steps_survived_weighs_half_of_one_plus_the_hyperbolic_tangent_of_the_shift(
    shift: float,
) -> None:
    # Weights are known up to their common scale, so each is held against that of no step survived.
    for budget in (2, 8, 10, 20):
        half, none = _weights([budget // 2, 0], budget, shift, "tanh").tolist()
        expected = (1 + math.tanh(shift)) / (1 + math.tanh(shift + 5))
        assert half / none == pytest.approx(expected, rel=1e-12)


def test_j5_tanh_is_the_sigmoid_of_twice_its_argument_and_so_a_sigmoid_at_half_the_distance() -> None:
    for shift in (-2.0, -1.0, 0.0, 2.0):
        kappa = list(range(11))
        tanh = _weights(kappa, 10, shift, "tanh")
        omega = torch.tensor([1 / (1 + math.exp(-2 * (shift + 5 * (1 - 2 * k / 10)))) for k in kappa]).double()
        torch.testing.assert_close(tanh, omega / omega.mean(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("budget", [2, 3, 10, 40])
def test_j5_the_discrete_weight_falls_from_one_to_one_over_k_plus_one_in_equal_steps(budget: int) -> None:
    weights = _weights(list(range(budget + 1)), budget, -1.0, "discrete")
    expected = torch.tensor([(budget + 1 - k) / (budget + 1) for k in range(budget + 1)], dtype=torch.float64)
    torch.testing.assert_close(weights / weights[0], expected, rtol=1e-12, atol=0)
    assert (weights[-1] / weights[0]).item() == pytest.approx(1 / (budget + 1), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_j6_weights_of_another_scale_give_the_same_loss_and_gradient(
    model: nn.Module, batch: I.Batch, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = I.gairat(burn_in=0, eps=0.1, step_size=0.01)
    loss, adversary, evidence = I.training_loss(model, method, batch, generator=_seed())
    assert len(set(adversary.kappa.tolist())) > 2
    logarithm = I.GeometryWeight.logarithm
    monkeypatch.setattr(I.GeometryWeight, "logarithm", lambda s, k, b: logarithm(s, k, b) + math.log(scale))
    other = I.training_loss(model, method, batch, adversary=adversary).loss
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-14)
    for found, expected in zip(_gradients(model, other), _gradients(model, loss), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    # And the loss is the weighted mean Σ ω CE / Σ ω.
    omega = [(1 + math.tanh(-1 + 5 * (1 - 2 * k / STEPS))) / 2 for k in adversary.kappa.tolist()]
    ce = F.cross_entropy(evidence.adv, batch.y, reduction="none").tolist()
    expected = sum(w * c for w, c in zip(omega, ce, strict=True)) / sum(omega)
    assert loss.mean().item() == pytest.approx(expected, rel=1e-10)


def test_j6_no_gradient_reaches_the_loss_through_the_weights(model: nn.Module, batch: I.Batch) -> None:
    method = I.gairat(burn_in=0, eps=0.1, step_size=0.01)
    loss, _, evidence = I.training_loss(model, method, batch, generator=_seed())
    weights = I.GeometryWeight(-1.0)(evidence)
    assert not weights.requires_grad
    constant = weights * F.cross_entropy(evidence.adv, batch.y, reduction="none")
    (found,) = torch.autograd.grad(loss.sum(), evidence.adv, retain_graph=True)
    (expected,) = torch.autograd.grad(constant.sum(), evidence.adv)
    assert torch.equal(found, expected)


def test_j7_every_step_updates_the_statistics_once_by_the_adversarial_batch(model: nn.Module, batch: I.Batch) -> None:
    method = I.gairat(eps=0.1, step_size=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        by_hand = copy.deepcopy(model)
        computed, _ = I.training_step(model, method, batch, optimizer, generator=_seed())
        by_hand(computed.adversary.x)
        assert int(model.norm.num_batches_tracked) == step
        for found, expected in zip(model.buffers(), by_hand.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


class Scaled(nn.Module):
    """α f(x)."""

    def __init__(self, model: nn.Module, alpha: float) -> None:
        super().__init__()
        self.model, self.alpha = model, alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * self.model(x)


class Linear(nn.Module):
    """Logits W x + b of 36 pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(36, classes).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


ATTACK = I.PGD(I.Linf(0.1), steps=7, step_size=0.03)


def test_j11_pgd_on_logits_scaled_by_one_is_pgd(model: nn.Module, batch: I.Batch) -> None:
    plain, scaled = ATTACK(model, batch, generator=_seed()), ATTACK(Scaled(model, 1.0), batch, generator=_seed())
    assert torch.equal(scaled.x, plain.x)
    assert torch.equal(scaled.kappa, plain.kappa)


@pytest.mark.parametrize("alpha", [0.1, 10.0])
def test_j11_scaling_misleads_no_attack_on_two_linear_classes_but_any_on_more(images: Tensor, alpha: float) -> None:
    # Not for any α: where one minus a probability rounds to 0, the gradient of the label's logit is lost.
    attack = replace(ATTACK, start=I.Zero())
    for classes in (2, 4):
        linear, batch = Linear(classes), I.Batch(images, torch.arange(SIZE) % classes)
        plain, scaled = attack(linear, batch).x, attack(Scaled(linear, alpha), batch).x
        assert torch.equal(scaled, plain) == (classes == 2)


@pytest.mark.parametrize("alpha", [1e-6, 10.0, 1e6])
def test_j11_an_attack_on_the_margin_is_misled_by_no_scale(model: nn.Module, batch: I.Batch, alpha: float) -> None:
    attack = replace(ATTACK, objective=I.Margin())
    plain, scaled = (attack(net, batch, generator=_seed()).x for net in (model, Scaled(model, alpha)))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-12)
    assert not torch.equal(scaled, ATTACK(Scaled(model, alpha), batch, generator=_seed()).x)
