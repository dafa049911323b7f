"""The invariants of P-SAT: what the specification of SAT says of its attack and its schedule.

Where each is proven. Names without a file are tests of this one; those of test_conformance.py are checks that run for
every recipe.

P1: λ ≥ 1 is PGD-AT, to the last bit
    test_limits.py::test_a_self_adaptive_bound_of_one_or_more_is_pgd_at_bit_for_bit
    test_limits.py::test_recipes_name_the_limit_in_which_they_are_pgd_at_bit_for_bit
P2: λ < −1 is the random start without a step, and so is a start above λ
    test_limits.py::test_a_self_adaptive_bound_below_minus_one_trains_on_the_start_without_a_move
    test_p2_an_instance_that_starts_above_the_bound_is_trained_on_its_noisy_start
P3: the result is an iterate of the whole attack
    test_linear_models.py::test_a_stopped_attack_is_a_prefix_of_the_whole_one
    test_p3_p5_the_result_is_that_iterate_of_the_whole_attack_which_first_exceeds_the_bound
P4: steps grow with λ; who stopped stays stopped
    test_p4_a_larger_bound_never_takes_fewer_steps
    test_p4_an_instance_that_stopped_stays_stopped_however_long_the_others_go_on
P5: all steps are taken, or the gap is above λ
    test_linear_models.py::test_a_stopped_attack_is_a_prefix_of_the_whole_one
    test_p3_p5_the_result_is_that_iterate_of_the_whole_attack_which_first_exceeds_the_bound
P6: λ = 0 is FAT with τ = 0
    test_limits.py::test_a_bound_of_zero_is_a_patience_of_zero
    test_p6_a_step_with_a_bound_of_zero_is_that_of_fat_without_patience_bit_for_bit
P7: ψ: range, sign, uniform prediction, two classes, shift of the logits
    test_published_tables.py::test_the_probability_gap_is_in_its_range_and_tells_right_from_wrong
P8: tables of λ on CIFAR and MNIST
    test_published_tables.py::test_the_linear_curriculum_of_sat_on_cifar_rises_from_epoch_30_to_epoch_69
    test_published_tables.py::test_the_curriculum_of_sat_on_mnist_climbs_in_three_steps
    test_p8_the_recipe_follows_the_table_of_cifar_and_takes_that_of_mnist
P9: the attack leaves weights, .grad and statistics as found; images in ball and box; the order of the batch
    test_conformance.py::everything_is_left_as_found_in_modes_eval_and_batch
    test_conformance.py::ball_and_box_hold
    test_conformance.py::order_is_kept
P10: one update of the statistics a step
    test_p10_every_step_updates_the_statistics_once_by_the_images_where_the_attack_stopped
P11: the active instances alone give the same images
    test_conformance.py::an_instance_does_not_see_its_neighbours_in_eval_mode
P12: strict: the gap stays within λ wherever it was, at most one step less
    test_p12_the_strict_rule_takes_back_at_most_one_step_and_stays_within_the_bound_wherever_it_starts_within
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import instar as I

SIZE, CLASSES, STEPS, EPS = 8, 4, 10, 0.3
BOUNDS = [-1.0, -0.9, -0.7, -0.5, -0.3, -0.1, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _p_sat(bound: float, *, steps: int = STEPS) -> I.Method:
    return I.p_sat(bound=bound, eps=EPS, step_size=EPS / STEPS, steps=steps)


def _gap(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """ψ (B,) of the network in eval mode, written out."""
    with torch.no_grad():
        p = copy.deepcopy(model).eval()(x).softmax(1)
    return torch.stack([max(v for k, v in enumerate(row) if k != int(j)) - row[j] for row, j in zip(p, y, strict=True)])


def _iterates(model: nn.Module, batch: I.Batch) -> Tensor:
    """The start and every iterate (K + 1, B, C, H, W) of the attack that never stops."""
    whole = I.pgd_at(eps=EPS, step_size=EPS / STEPS).attack
    return torch.stack([replace(whole, steps=k)(model, batch, generator=_seed()).x for k in range(STEPS + 1)])


def test_p2_an_instance_that_starts_above_the_bound_is_trained_on_its_noisy_start(
    model: nn.Module, batch: I.Batch
) -> None:
    start = I.Uniform()(batch.x, I.Linf(EPS), _seed())
    gap = _gap(model, start, batch.y)
    bound = gap.sort().values[3:5].mean().item()
    found = _p_sat(bound).attack(model, batch, generator=_seed())
    above = gap > bound
    assert int(above.sum()) == SIZE - 4
    assert torch.equal(found.moves == 0, above)
    torch.testing.assert_close(found.x[above], start[above], rtol=0, atol=1e-15)
    assert not torch.allclose(found.x[above], batch.x[above], atol=0.1)


def test_p3_p5_the_result_is_that_iterate_of_the_whole_attack_which_first_exceeds_the_bound(
    model: nn.Module, batch: I.Batch
) -> None:
    iterates = _iterates(model, batch)
    gaps = torch.stack([_gap(model, x, batch.y) for x in iterates])
    for bound in BOUNDS:
        found = _p_sat(bound).attack(model, batch, generator=_seed())
        above = gaps > bound
        first = torch.where(above.any(0), above.int().argmax(0), torch.tensor(STEPS))
        assert found.moves.tolist() == first.tolist()
        torch.testing.assert_close(found.x, iterates[first, torch.arange(SIZE)], rtol=0, atol=1e-12)
        assert bool(((found.moves == STEPS) | (_gap(model, found.x, batch.y) > bound)).all())


def test_p4_a_larger_bound_never_takes_fewer_steps(model: nn.Module, batch: I.Batch) -> None:
    moves = torch.stack([_p_sat(bound).attack(model, batch, generator=_seed()).moves for bound in BOUNDS])
    assert bool((moves.diff(dim=0) >= 0).all())
    assert moves[-1].tolist() == [STEPS] * SIZE
    assert len(set(moves.flatten().tolist())) > 5, "bounds that stop nothing would show nothing"


@pytest.mark.parametrize("bound", [0.0, 0.5, 0.9])
def test_p4_an_instance_that_stopped_stays_stopped_however_long_the_others_go_on(
    model: nn.Module, batch: I.Batch, bound: float
) -> None:
    last = _p_sat(bound).attack(model, batch, generator=_seed())
    assert bool((last.moves < STEPS).any())
    for steps in range(STEPS):
        found = _p_sat(bound, steps=steps).attack(model, batch, generator=_seed())
        assert found.moves.tolist() == last.moves.clamp_max(steps).tolist()
        done = last.moves <= steps
        torch.testing.assert_close(found.x[done], last.x[done], rtol=0, atol=1e-12)


def test_p6_a_step_with_a_bound_of_zero_is_that_of_fat_without_patience_bit_for_bit(
    model: nn.Module, batch: I.Batch
) -> None:
    settings = {"eps": EPS, "step_size": EPS / STEPS}
    states = []
    for method in (I.p_sat(bound=0.0, **settings), I.fat(patience=0, **settings)):
        net = copy.deepcopy(model)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        computed, _ = I.training_step(net, method, batch, optimizer, generator=_seed())
        found = computed.adversary
        states.append([computed.loss.detach(), found.x, found.kappa, found.moves, *net.state_dict().values()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))
    assert len(set(states[0][3].tolist())) > 2


def test_p8_the_recipe_follows_the_table_of_cifar_and_takes_that_of_mnist() -> None:
    cifar = [I.p_sat().at(I.Progress(epoch, 100)).attack.stop.bound for epoch in range(100)]
    assert cifar[:30] == [0.0] * 30
    assert cifar[30:70] == pytest.approx([k / 100 for k in range(1, 41)], abs=1e-12)
    assert cifar[69:] == pytest.approx([0.4] * 31, abs=1e-15)
    steps = I.Steps(0, ((30 / 70, 1 / 3), (45 / 70, 2 / 3), (60 / 70, 1)))
    mnist = [I.p_sat(bound=steps).at(I.Progress(epoch, 70)).attack.stop.bound for epoch in range(70)]
    assert mnist == [0] * 30 + [1 / 3] * 15 + [2 / 3] * 15 + [1] * 10


def test_p10_every_step_updates_the_statistics_once_by_the_images_where_the_attack_stopped(
    model: nn.Module, batch: I.Batch
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        by_hand = copy.deepcopy(model)
        computed, _ = I.training_step(model, _p_sat(0.2), batch, optimizer, generator=_seed())
        by_hand(computed.adversary.x)
        assert int(model.norm.num_batches_tracked) == step
        for found, expected in zip(model.buffers(), by_hand.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bound", [-0.2, 0.0, 0.5, 0.9])
def test_p12_the_strict_rule_takes_back_at_most_one_step_and_stays_within_the_bound_wherever_it_starts_within(
    model: nn.Module, batch: I.Batch, bound: float
) -> None:
    strict = I.p_sat(bound=bound, eps=EPS, step_size=EPS / STEPS, strict=True).attack
    found, kept = strict(model, batch, generator=_seed()), _p_sat(bound).attack(model, batch, generator=_seed())
    start = I.Uniform()(batch.x, I.Linf(EPS), _seed())
    within = _gap(model, start, batch.y) <= bound
    assert bool(within.any())
    assert bool((_gap(model, found.x, batch.y)[within] <= bound).all())
    iterates = _iterates(model, batch)[found.moves.long(), torch.arange(SIZE)]
    torch.testing.assert_close(found.x[within], iterates[within], rtol=0, atol=1e-12)
    assert set((kept.moves - found.moves).tolist()) <= {0, 1}
    assert torch.equal(kept.moves > found.moves, within & (_gap(model, kept.x, batch.y) > bound))
    # Where even the start is above the bound: the clean image if that is within it, else the start.
    clean = (_gap(model, batch.x, batch.y) <= bound).view(-1, 1, 1, 1)
    expected = torch.where(clean, batch.x, start)[~within]
    torch.testing.assert_close(found.x[~within], expected, rtol=0, atol=1e-15)
