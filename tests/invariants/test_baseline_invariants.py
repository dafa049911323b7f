"""The invariants of attacks, baselines, weight perturbation, averages and weights (section F of the specification).

Where each is proven. Names without a file are tests of this one; those of test_conformance.py are checks that run for
every recipe.

1: images in ball and box, for every method
    test_conformance.py::ball_and_box_hold
2: no steps, no radius, steps of no length
    test_linear_models.py::test_no_steps_or_steps_of_no_length_return_the_start
    test_linear_models.py::test_a_radius_of_zero_returns_the_images_bit_for_bit
3: the optimum of a linear model
    test_linear_models.py::test_pgd_in_linf_reaches_the_corner_that_the_weights_point_to
4: the loss of a convex model never falls
    test_linear_models.py::test_the_loss_of_a_convex_model_never_falls_along_the_attack
5: what an attack leaves as found
    test_conformance.py::everything_is_left_as_found_in_modes_eval_and_batch
    test_conformance.py::every_forward_of_an_attack_in_mode_train_updates_the_statistics_once
6: mean or sum of the objective
    test_linear_models.py::test_the_scale_of_the_objective_does_not_matter
    test_linear_models.py::test_an_instance_is_attacked_the_same_alone_and_in_company
7: seeds (attacks in training have no restarts)
    test_linear_models.py::test_the_same_seed_gives_the_same_attack_and_another_seed_another
8: laws of the starts
    test_balls.py::test_the_start_in_linf_is_uniform_in_every_pixel
    test_balls.py::test_the_start_in_l2_has_a_uniform_radius_and_direction
    test_balls.py::test_the_gaussian_start_is_normal_with_its_deviation_and_ignores_the_ball
9: patience: τ = K, τ = 0, the order of the batch
    test_limits.py::test_a_patience_of_all_steps_is_the_whole_attack_bit_for_bit
    test_conformance.py::order_is_kept
    test_9_friendly_images_are_misclassified_unless_the_attack_took_all_of_its_steps
10: PGD-AT: the gradient of the plain loss at x′
    test_10_the_gradient_of_adversarial_training_is_that_of_the_plain_loss_at_the_adversary_alone
11: PGD-AT: eps = 0 is natural training
    test_limits.py::test_a_radius_of_zero_is_natural_training_bit_for_bit
12: TRADES: β = 0
    test_limits.py::test_trades_without_its_consistency_term_is_the_clean_cross_entropy
13: TRADES: x′ = x has no term and no gradient
    test_published_tables.py::test_the_divergence_of_equal_logits_has_no_gradient_on_either_side
    test_13_trades_with_an_adversary_that_is_the_clean_image_is_natural_training
14: TRADES: the divergence is not negative, a sum over classes and a mean over the batch
    test_loop_references.py::test_trades_loss_and_gradients_are_sums_over_instances_and_classes
    test_14_the_divergence_is_not_negative_and_the_sum_of_p_log_p_over_q
    test_14_a_batch_that_is_doubled_has_the_same_mean_loss_and_gradient
15: TRADES: the direction of the divergence
    test_published_tables.py::test_the_divergence_is_zero_of_equals_positive_of_others_and_not_symmetric
    test_15_the_clean_prediction_is_the_target_of_the_divergence
16: TRADES: the gradient of the clean branch (there is no stop-gradient to ask for)
    test_16_the_divergence_pulls_at_both_branches_by_their_closed_forms
17: TRADES: no gradient at the clean image
    test_limits.py::test_the_divergence_has_no_gradient_at_the_clean_image_which_is_why_trades_starts_beside_it
18: TRADES: one clean forward is as good as two
    test_18_one_clean_forward_for_both_terms_of_trades_is_as_good_as_two
19, 21: MART: the boosted cross-entropy in closed form; its wrong class is never the label
    test_limits.py::test_the_boosted_cross_entropy_adds_the_margin_of_the_best_class_that_is_not_the_label
20: MART: the factor is in [0, 1], up to the 1e-7 of the official code, and 0 where the model is certain
    test_20_the_doubt_of_mart_lies_between_zero_and_one_and_a_certain_image_has_no_consistency_term
22: MART: a batch of one
    test_conformance.py::a_batch_of_one_works
23: MART: the factor carries gradient
    test_23_the_doubt_of_mart_is_not_a_coefficient_but_carries_gradient_to_the_clean_branch
24: AWP: the weights are left as found
    test_conformance.py::the_loss_leaves_modes_gradients_and_weights_as_found
25: AWP: the length of the offsets
    test_loop_references.py::test_awp_loss_and_gradients_are_those_of_an_explicitly_perturbed_copy
26: AWP: the scale of the loss (there is no proxy step)
    test_limits.py::test_awp_does_not_depend_on_the_scale_of_the_loss_it_climbs
27: AWP: γ = 0
    test_limits.py::test_a_weight_perturbation_of_length_zero_is_none_at_all
28: AWP: the loss rises
    test_limits.py::test_a_weight_perturbation_grows_from_nothing_continuously
29: AWP: its own pass updates no statistics
    test_conformance.py::the_declared_training_forwards_and_no_others_update_the_statistics
30: AWP: weight decay sees the perturbed weights
    test_training_step.py::test_weight_decay_of_sgd_sees_the_perturbed_weights_exactly
31: AWP: no call before its epoch
    test_31_a_perturbation_that_begins_later_is_not_called_before_and_changes_nothing_until_then
36: label smoothing
    test_published_tables.py::test_label_smoothing_is_the_library_convention_and_zero_is_the_plain_loss
37: EMA: the decay warms up; constant weights; a decay of 0
    test_published_tables.py::test_the_decay_of_the_average_warms_up_and_reaches_its_value_at_update_1790
    test_published_tables.py::test_the_average_of_constant_weights_is_those_weights_and_a_decay_of_zero_copies
39: EMA: statistics are averaged, and nothing is shared
    test_training_step.py::test_an_averaged_copy_shares_nothing_with_its_model_and_follows_statistics
    test_loop_references.py::test_averaged_weights_follow_the_written_recursion
42: GAIRAT
    test_gairat_invariants.py
43: MAIL: the ranges of margin and weight
    test_published_tables.py::test_the_probability_gap_is_in_its_range_and_tells_right_from_wrong
    test_limits.py::test_a_margin_weight_lies_between_zero_and_three_and_is_half_of_it_where_the_margin_is_minus_the_bias
44: uniform weights, the order of the batch, the mean of the weights
    test_limits.py::test_gairat_with_an_infinite_shift_is_pgd_at_bit_for_bit
    test_limits.py::test_recipes_name_the_limit_in_which_they_are_pgd_at_bit_for_bit
    test_limits.py::test_mail_trades_in_its_burn_in_is_trades_bit_for_bit
    test_limits.py::test_uniform_ranks_are_the_plain_pairing_of_logits_at_that_strength
    test_conformance.py::order_is_kept
    test_44_only_weights_that_compare_instances_are_normalised_and_to_their_documented_mean

Items 32 to 35, 38, 40, 41 and 45 to 55 are about single-step methods, averages of snapshots, data and evaluation.
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
from instar.methods.mart import Doubt

SIZE, CLASSES, STEPS, EPS = 8, 4, 10, 0.3


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def _given(x: Tensor) -> I.Adversary:
    none = torch.zeros(len(x), dtype=torch.int32)
    return I.Adversary(x=x, kappa=none, inspected=none, moves=none, budget=STEPS)


def _nearby(batch: I.Batch) -> I.Adversary:
    return _given((batch.x + 0.1 * torch.randn_like(batch.x)).clamp(0, 1))


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(model.parameters())))


def _same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_9_friendly_images_are_misclassified_unless_the_attack_took_all_of_its_steps(
    model: nn.Module, batch: I.Batch, tau: int
) -> None:
    found = I.fat(patience=tau, eps=EPS, step_size=EPS / STEPS).attack(model, batch, generator=_seed())
    wrong = model.eval()(found.x).argmax(1) != batch.y
    stopped = found.moves < STEPS
    assert bool(wrong[stopped].all())
    assert bool(stopped.any())
    # Those that stopped were misclassified τ + 1 times, once more than the steps they were given.
    assert (found.inspected - found.kappa)[stopped].tolist() == [tau + 1] * int(stopped.sum())


def test_10_the_gradient_of_adversarial_training_is_that_of_the_plain_loss_at_the_adversary_alone(
    model: nn.Module, batch: I.Batch
) -> None:
    adversary, by_hand = _nearby(batch), copy.deepcopy(model)
    loss = I.training_loss(model, I.pgd_at(), batch, adversary=adversary).loss
    _same(_gradients(model, loss), _gradients(by_hand, F.cross_entropy(by_hand(adversary.x), batch.y)), 1e-14)
    elsewhere = I.Batch(torch.rand_like(batch.x), batch.y)
    assert torch.equal(I.training_loss(model, I.pgd_at(), elsewhere, adversary=adversary).loss, loss)


def test_13_trades_with_an_adversary_that_is_the_clean_image_is_natural_training(
    model: nn.Module, batch: I.Batch
) -> None:
    loss, _, evidence = I.training_loss(model, I.trades(beta=100.0), batch, adversary=_given(batch.x))
    assert float(I.KL()(evidence).detach().abs().max()) < 1e-15
    natural = I.training_loss(model, I.natural(), batch).loss
    _same([loss], [natural], 1e-12)
    _same(_gradients(model, loss), _gradients(model, natural), 1e-12)


def test_14_the_divergence_is_not_negative_and_the_sum_of_p_log_p_over_q() -> None:
    for size in (0.1, 1.0, 20.0):
        clean, adv = (size * torch.randn(200, 10, dtype=torch.float64) for _ in range(2))
        evidence = I.Evidence(x=torch.zeros(200, 1, 1, 1), y=torch.zeros(200).long(), clean=clean, adv=adv)
        found = I.KL()(evidence)
        p, log = clean.softmax(1), clean.log_softmax(1) - adv.log_softmax(1)
        torch.testing.assert_close(found, (p * log).sum(1), rtol=1e-12, atol=1e-13)
        assert float(found.min()) >= -1e-13


@pytest.mark.parametrize("recipe", [I.trades, I.mart, I.pgd_at, I.mail_at], ids=lambda r: r.__name__)
def test_14_a_batch_that_is_doubled_has_the_same_mean_loss_and_gradient(
    model: nn.Module, batch: I.Batch, recipe: object
) -> None:
    adversary = _nearby(batch)
    twice = I.Batch(batch.x.repeat(2, 1, 1, 1), batch.y.repeat(2))
    once = I.training_loss(model, recipe(), batch, adversary=adversary).loss
    double = I.training_loss(model, recipe(), twice, adversary=_given(adversary.x.repeat(2, 1, 1, 1))).loss
    assert double.mean().item() == pytest.approx(once.mean().item(), abs=1e-12)
    _same(_gradients(model, double), _gradients(model, once), 1e-11)


def test_15_the_clean_prediction_is_the_target_of_the_divergence() -> None:
    def log(*p: float) -> Tensor:
        return torch.tensor([p], dtype=torch.float64).log()

    p, q = log(0.5, 0.5), log(0.25, 0.75)
    zero = {"x": torch.zeros(1, 1, 1, 1), "y": torch.tensor([0])}
    # ½ log(½ ÷ ¼) + ½ log(½ ÷ ¾) = ½ log(4/3), and the other way round ¼ log ½ + ¾ log(3/2).
    assert I.KL()(I.Evidence(clean=p, adv=q, **zero)).item() == pytest.approx(0.14384103622589042, abs=1e-14)
    assert I.KL()(I.Evidence(clean=q, adv=p, **zero)).item() == pytest.approx(0.13081203594113692, abs=1e-14)


def _branches() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    clean, adv = (torch.randn(6, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = clean.detach().softmax(1), adv.detach().softmax(1)
    return clean, adv, p, q, (p * (p / q).log()).sum(1, keepdim=True)


def test_16_the_divergence_pulls_at_both_branches_by_their_closed_forms() -> None:
    clean, adv, p, q, divergence = _branches()
    I.KL()(I.Evidence(x=torch.zeros(6, 1, 1, 1), y=torch.zeros(6).long(), clean=clean, adv=adv)).sum().backward()
    _same([clean.grad, adv.grad], [p * ((p / q).log() - divergence), q - p])
    assert float(clean.grad.abs().amax(1).min()) > 1e-3


def test_18_one_clean_forward_for_both_terms_of_trades_is_as_good_as_two(model: nn.Module, batch: I.Batch) -> None:
    adversary, by_hand = _nearby(batch), copy.deepcopy(model)
    loss = I.training_loss(model, I.trades(beta=6.0), batch, adversary=adversary).loss
    first, second, adv = by_hand(batch.x), by_hand(batch.x), by_hand(adversary.x)
    divergence = F.kl_div(adv.log_softmax(1), second.softmax(1), reduction="batchmean")
    expected = F.cross_entropy(first, batch.y) + 6 * divergence
    assert loss.mean().item() == pytest.approx(expected.item(), abs=1e-12)
    _same(_gradients(model, loss), _gradients(by_hand, expected))
    assert (int(model.norm.num_batches_tracked), int(by_hand.norm.num_batches_tracked)) == (2, 3)


def test_20_the_doubt_of_mart_lies_between_zero_and_one_and_a_certain_image_has_no_consistency_term() -> None:
    y = torch.arange(200) % CLASSES
    for size in (0.1, 3.0, 300.0):
        clean, adv = (size * torch.randn(200, CLASSES, dtype=torch.float64) for _ in range(2))
        doubt = Doubt()(I.Evidence(x=torch.zeros(200, 1, 1, 1), y=y, clean=clean, adv=adv))
        assert float(doubt.min()) >= 0
        assert float(doubt.max()) <= 1 + 1.0000001e-7, "the official code adds 1e-7"
    certain = 90.0 * F.one_hot(y, CLASSES).double()
    evidence = I.Evidence(x=torch.zeros(200, 1, 1, 1), y=y, clean=certain, adv=torch.zeros(200, CLASSES).double())
    assert float(I.KL()(evidence).min()) > 1
    assert float((Doubt() * I.KL())(evidence).max()) < 2e-7


def test_23_the_doubt_of_mart_is_not_a_coefficient_but_carries_gradient_to_the_clean_branch() -> None:
    clean, adv, p, q, divergence = _branches()
    y = torch.arange(6) % CLASSES
    evidence = I.Evidence(x=torch.zeros(6, 1, 1, 1), y=y, clean=clean, adv=adv)
    (found,) = torch.autograd.grad(I.mart(beta=5.0).loss(evidence).sum(), clean)
    own = p[torch.arange(6), y].unsqueeze(1)
    of_doubt = -own * (F.one_hot(y, CLASSES) - p)
    of_divergence = p * ((p / q).log() - divergence)
    _same([found], [5 * ((1.0000001 - own) * of_divergence + divergence * of_doubt)])
    assert float((divergence * of_doubt).abs().amax(1).min()) > 1e-4


@pytest.mark.parametrize("recipe", [I.pgd_at, I.trades], ids=lambda r: r.__name__)
def test_31_a_perturbation_that_begins_later_is_not_called_before_and_changes_nothing_until_then(
    model: nn.Module, batch: I.Batch, recipe: object
) -> None:
    plain = recipe(steps=2)
    method = replace(plain, perturbation=I.AWP(I.Steps(0, ((0.2, 5e-3),))))
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    state = copy.deepcopy(model.state_dict())

    def passed(method: I.Method, epoch: int) -> tuple[int, I.Loss]:
        model.load_state_dict(state)
        forwards.clear()
        found = I.training_loss(model, method, batch, progress=I.Progress(epoch, 10), generator=_seed())
        return len(forwards), found

    usual, expected = passed(plain, 0)
    for epoch in range(10):
        count, found = passed(method, epoch)
        if epoch < 2:
            assert count == usual
            assert found.evidence.offsets == {}
            assert torch.equal(found.loss, expected.loss)
        else:
            assert count == usual + len(plain.loss.needs)
            assert set(found.evidence.offsets) == {"first.weight", "second.weight", "head.weight"}
            assert not torch.equal(found.loss, expected.loss)


def test_44_only_weights_that_compare_instances_are_normalised_and_to_their_documented_mean(
    model: nn.Module, batch: I.Batch
) -> None:
    settings = {"eps": EPS, "step_size": EPS / STEPS}
    methods = {name: getattr(I, name)(burn_in=0, **settings) for name in ("gairat", "mail_at", "mail_trades")}
    methods["iseat"] = I.iseat(smoothness=0.1, **settings)
    weights = {
        "gairat": methods["gairat"].loss.left,
        "mail_at": methods["mail_at"].loss.left,
        "mail_trades": methods["mail_trades"].loss.right.right.left,
        "iseat": methods["iseat"].loss.right.right.left,
    }
    seen = {name: I.training_loss(model, m, batch, generator=_seed()).evidence for name, m in methods.items()}
    found = {name: weight(seen[name]) for name, weight in weights.items()}
    assert found["gairat"].mean().item() == pytest.approx(1, abs=1e-12)
    assert found["iseat"].mean().item() == pytest.approx((SIZE + 1) / (2 * SIZE), abs=1e-12)
    for name, slope, bias in (("mail_at", 10, -0.5), ("mail_trades", 2, 0)):
        p = seen[name].adv.detach().softmax(1)
        for i, y in enumerate(batch.y.tolist()):
            margin = max(float(v) for k, v in enumerate(p[i]) if k != y) - float(p[i, y])
            expected = 3 / (1 + math.exp(-slope * (margin + bias)))
            assert found[name][i].item() == pytest.approx(expected, abs=1e-12)
        assert abs(found[name].mean().item() - 1) > 0.01
