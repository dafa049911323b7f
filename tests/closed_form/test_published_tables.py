"""Numbers that the papers and their codes print or imply: schedules, weights of instances, decays of averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from instar import EMA, CrossEntropy, Evidence, GeometryWeight, Progress, Ramp, RankWeight, Steps, UserError, gairat
from instar.signals import KL, LogitShift, Margin, ProbabilityGap, mean_one


def _values(schedule: Ramp | Steps, epochs: int) -> list[float]:
    return [schedule(Progress(epoch, epochs)) for epoch in range(epochs)]


def test_the_linear_curriculum_of_sat_on_cifar_rises_from_epoch_30_to_epoch_69() -> None:
    table = _values(Ramp(0, 0.4, 0.3, 0.7), 100)
    assert table[:30] == [0.0] * 30
    assert table[30:70] == pytest.approx([0.01 * (i + 1) for i in range(40)], abs=1e-12)
    assert table[69:] == pytest.approx([0.4] * 31, abs=1e-15)


def test_the_curriculum_of_sat_on_mnist_climbs_in_three_steps() -> None:
    steps = Steps(0, ((30 / 70, 1 / 3), (45 / 70, 2 / 3), (60 / 70, 1)))
    assert _values(steps, 70) == [0] * 30 + [1 / 3] * 15 + [2 / 3] * 15 + [1] * 10


def test_the_curriculum_in_absolute_epochs_is_that_in_fractions() -> None:
    assert _values(Ramp(0, 0.4, 30, 70), 100) == _values(Ramp(0, 0.4, 0.3, 0.7), 100)
    assert _values(Steps(0, ((30, 1), (45, 2))), 70) == _values(Steps(0, ((30 / 70, 1), (45 / 70, 2))), 70)


def test_a_short_run_is_the_long_one_in_small() -> None:
    long, short = _values(Ramp(0, 0.4, 0.3, 0.7), 100), _values(Ramp(0, 0.4, 0.3, 0.7), 10)
    assert short == pytest.approx(long[9::10], abs=1e-12)


def test_a_ramp_over_the_whole_run_ends_at_its_final_value() -> None:
    assert _values(Ramp(0, 1), 4) == [0.25, 0.5, 0.75, 1.0]
    assert _values(Ramp(1, 0), 4) == [0.75, 0.5, 0.25, 0.0]
    assert Ramp(0, 1)(Progress(4, 4)) == 1


def test_a_fraction_that_names_an_epoch_begins_in_that_epoch() -> None:
    # 0.3 · 10 is 3 and 0.7 · 10 is 7, whatever floating point makes of the products.
    for epochs in range(1, 130):
        for k in range(1, epochs):
            steps = Steps(0, ((k / epochs, 1),))
            assert (steps(Progress(k - 1, epochs)), steps(Progress(k, epochs))) == (0, 1)


def test_the_stage_schedule_of_iseat_begins_with_the_first_decay_of_the_learning_rate() -> None:
    assert _values(Steps(0.0, ((0.5, 0.1),)), 200) == [0.0] * 100 + [0.1] * 100


@pytest.mark.parametrize(("epochs", "gate"), [(120, 60), (100, 50), (30, 15), (7, 4), (1, 1)])
def test_the_gate_of_gairat_keeps_weights_uniform_until_half_of_the_run(epochs: int, gate: int) -> None:
    shifts = [gairat().at(Progress(e, epochs)).loss.left.shift for e in range(epochs)]
    assert shifts == [math.inf] * gate + [-1.0] * (epochs - gate)


def test_the_gate_of_gairat_can_be_moved_removed_and_written_in_epochs() -> None:
    assert gairat(burn_in=0).loss.left.shift == -1.0
    third = gairat(burn_in=30)
    assert [third.at(Progress(e, 100)).loss.left.shift for e in (29, 30)] == [math.inf, -1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp(0, 1, 0.7, 0.3), "times of Ramp must be non-negative and in ascending order; got 0.7, 0.3"),
        (lambda: Ramp(0, 1, 0.5, 0.5), "a Ramp must end after it begins; got 0.5 to 0.5. Use Steps for a jump"),
        (lambda: Ramp(0, 1, -0.1, 0.5), "times of Ramp must be non-negative"),
        (lambda: Ramp(0, 1, float("nan"), 0.5), "times of Ramp must be non-negative"),
        (lambda: Steps(0, ((0.5, 1), (0.2, 2))), "times of Steps must be non-negative and in ascending order"),
        (lambda: Steps(0, (0.5, 1)), "changes of Steps must be pairs (time, value)"),
        (lambda: Progress(5, 4), "epoch must be in [0, epochs] and epochs at least 1; got 5 of 4"),
        (lambda: Progress(0, 0), "got 0 of 0"),
    ],
)
def test_an_impossible_schedule_is_one_clear_line(make: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", [Ramp(0, 1, 0.5, 30), Steps(0, ((0.5, 1), (30, 2)))], ids=repr)
def test_times_that_change_their_order_on_a_run_of_this_length_are_refused_there(schedule: Ramp | Steps) -> None:
    # Half of 20 epochs comes before epoch 30, half of 100 epochs after it.
    assert schedule(Progress(0, 20)) == 0
    with pytest.raises(UserError, match=r"ascending order|end after it begins"):
        schedule(Progress(0, 100))


def _counted(kappa: list[int], budget: int = 10) -> Evidence:
    x = torch.zeros(len(kappa), 1, 1, 1, dtype=torch.float64)
    logits = torch.zeros(len(kappa), 2, dtype=torch.float64)
    return Evidence(x=x, y=torch.zeros(len(kappa)).long(), adv=logits, kappa=torch.tensor(kappa), budget=budget)


TABLES = {
    ("tanh", -1.0): [1, 0.998, 0.982, 0.881, 0.5, 0.119, 0.018, 0.00247, 3.4e-4, 4.5e-5, 6.1e-6],
    ("tanh", 0.0): [1, 1, 0.998, 0.982, 0.881, 0.5, 0.119, 0.018, 0.00247, 3.4e-4, 4.5e-5],
    ("sigmoid", -1.0): [0.982, 0.953, 0.881, 0.731, 0.5, 0.269, 0.119, 0.047, 0.018, 0.0067, 0.0025],
    ("discrete", -1.0): [1, 0.909, 0.818, 0.727, 0.636, 0.545, 0.455, 0.364, 0.273, 0.182, 0.091],
}


@pytest.mark.parametrize(("function", "shift"), list(TABLES))
def test_geometry_weights_of_all_eleven_values_of_kappa_are_those_tabulated(function: str, shift: float) -> None:
    table = torch.tensor(TABLES[function, shift], dtype=torch.float64)
    found = GeometryWeight(shift, function)(_counted(list(range(11))))
    torch.testing.assert_close(found, table / table.mean(), rtol=0.03, atol=2e-3)
    assert found.mean().item() == pytest.approx(1, abs=1e-12)
    assert bool((found.diff() < 0).all())


def test_half_of_the_example_batch_of_gairat_is_as_good_as_dropped() -> None:
    found = GeometryWeight(-1.0)(_counted([0, 2, 5, 8, 10, 10, 10, 10]))
    expected = torch.tensor([3.81, 3.74, 0.454, 0.0013, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-3)


@pytest.mark.parametrize("budget", [7, 3, 11])
def test_an_odd_budget_uses_half_of_it_as_the_paper_writes(budget: int) -> None:
    u = [-1 + 5 * (1 - 2 * k / budget) for k in range(budget + 1)]
    omega = torch.tensor([(1 + math.tanh(v)) / 2 for v in u], dtype=torch.float64)
    found = GeometryWeight(-1.0)(_counted(list(range(budget + 1)), budget))
    torch.testing.assert_close(found, omega / omega.mean(), rtol=1e-9, atol=1e-12)


def test_ranks_are_the_multiset_of_multiples_of_one_over_b_and_follow_the_difficulty() -> None:
    gap = torch.tensor([0.3, -2.0, 7.0, 0.1, 0.2])
    logits = torch.stack([torch.zeros(5), gap], 1)
    evidence = Evidence(x=torch.zeros(5, 1, 1, 1), y=torch.zeros(5).long(), adv=logits)
    weights = RankWeight(Margin())(evidence)
    assert weights.tolist() == pytest.approx([0.8, 0.2, 1.0, 0.4, 0.6])
    assert weights.sum().item() == pytest.approx((5 + 1) / 2)
    # Any increasing transform of the difficulty leaves the ranks, and so the loss, as they are.
    assert torch.equal(RankWeight(3 * Margin() + 100)(evidence), weights)


@pytest.mark.parametrize(
    ("step", "decay"), [(0, 0.1), (1, 2 / 11), (9, 10 / 19), (1789, 1790 / 1799), (1790, 0.995), (10**6, 0.995)]
)
def test_the_decay_of_the_average_warms_up_and_reaches_its_value_at_update_1790(step: int, decay: float) -> None:
    assert EMA(0.995).at_step(step) == pytest.approx(decay, abs=1e-15)
    assert (EMA(0.995).at_step(step) == 0.995) == (step >= 1790)


def test_the_average_of_constant_weights_is_those_weights_and_a_decay_of_zero_copies() -> None:
    model, average = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        for tensor in [*model.parameters(), model.running_mean, model.running_var]:
            tensor.copy_(torch.rand(3))
    EMA(0.0).update(average, model, Progress(0, 1))
    for found, expected in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected)
    for step in range(50):
        EMA(0.9).update(average, model, Progress(0, 1, step=step))
    for found, expected in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def _pair(clean: list[float], adv: list[float], y: int = 0) -> Evidence:
    z = [torch.tensor([v], dtype=torch.float64) for v in (clean, adv)]
    return Evidence(x=torch.zeros(1, 1, 1, 1), y=torch.tensor([y]), clean=z[0], adv=z[1], anchor=z[0])


def test_the_divergence_is_zero_of_equals_positive_of_others_and_not_symmetric() -> None:
    p, q = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]
    log = [[math.log(v) for v in r] for r in (p, q)]
    forth = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    back = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert KL()(_pair(log[0], log[1])).item() == pytest.approx(forth, abs=1e-12)
    assert KL()(_pair(log[1], log[0])).item() == pytest.approx(back, abs=1e-12)
    assert abs(forth - back) > 0.04
    assert KL()(_pair(log[0], [v + 3 for v in log[0]])).item() == pytest.approx(0, abs=1e-12)


def test_the_divergence_of_equal_logits_has_no_gradient_on_either_side() -> None:
    clean = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    adv = clean.detach().clone().requires_grad_()
    KL()(Evidence(x=torch.zeros(4, 1, 1, 1), y=torch.zeros(4).long(), clean=clean, adv=adv)).sum().backward()
    assert float(clean.grad.abs().max()) < 1e-14
    assert float(adv.grad.abs().max()) < 1e-14


def test_label_smoothing_is_the_library_convention_and_zero_is_the_plain_loss() -> None:
    z, y, s = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 4, 0.1
    evidence = Evidence(x=torch.zeros(6, 1, 1, 1), y=y, adv=z)
    target = torch.full((6, 4), s / 4).double() + (1 - s) * torch.eye(4).double()[y]
    assert target.sum(1).tolist() == pytest.approx([1] * 6)
    expected = -(target * z.log_softmax(1)).sum(1)
    torch.testing.assert_close(CrossEntropy(smoothing=s)(evidence), expected)
    # Bag of Tricks writes 1 − t on the label and t / (K − 1) elsewhere: that is s = t K / (K − 1) here.
    t = s * 3 / 4
    tricks = torch.full((6, 4), t / 3).double() * (1 - torch.eye(4).double()[y]) + (1 - t) * torch.eye(4).double()[y]
    torch.testing.assert_close(expected, -(tricks * z.log_softmax(1)).sum(1))
    torch.testing.assert_close(CrossEntropy()(evidence), -z.log_softmax(1)[torch.arange(6), y])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_soft_target_that_is_a_label_gives_the_loss_of_the_label(smoothing: float) -> None:
    z, y = torch.randn(6, 4), torch.arange(6) % 4
    hard = Evidence(x=torch.zeros(6, 1, 1, 1), y=y, adv=z)
    soft = Evidence(x=torch.zeros(6, 1, 1, 1), y=torch.full((6,), -1), adv=z, target=torch.eye(4)[y])
    signal = CrossEntropy(smoothing=smoothing)
    torch.testing.assert_close(signal(soft), signal(hard))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_probability_gap_is_in_its_range_and_tells_right_from_wrong(classes: int) -> None:
    z = 3 * torch.randn(200, classes, dtype=torch.float64)
    y = torch.arange(200) % classes
    evidence = Evidence(x=torch.zeros(200, 1, 1, 1), y=y, adv=z)
    gap = ProbabilityGap()(evidence)
    assert bool((gap.abs() <= 1).all())
    assert torch.equal(gap > 0, z.argmax(1) != y)
    assert torch.equal(Margin()(evidence) > 0, z.argmax(1) != y)
    shifted = Evidence(x=evidence.x, y=y, adv=z + 50)
    torch.testing.assert_close(ProbabilityGap()(shifted), gap, rtol=0, atol=1e-12)
    if classes == 2:
        torch.testing.assert_close(gap, 1 - 2 * z.softmax(1)[torch.arange(200), y])
    uniform = Evidence(x=evidence.x, y=y, adv=torch.zeros_like(z))
    assert not ProbabilityGap()(uniform).any()


def test_the_logit_shift_sums_squares_over_classes_and_ignores_a_constant_on_both_sides() -> None:
    assert LogitShift()(_pair([1.0, 2.0, -3.0], [2.0, 0.0, 0.0])).item() == 1 + 4 + 9
    shifted = _pair([1.5, 2.5, -2.5], [2.5, 0.5, 0.5])
    assert LogitShift()(shifted).item() == pytest.approx(14)


def test_all_logit_margins_work_where_every_wrong_score_is_negative() -> None:
    # Masking the true class by a product with zero would report a lead of 0 − 5 here.
    evidence = _pair([0.0, 0.0, 0.0], [-1.0, -3.0, -4.0])
    assert Margin()(evidence).item() == -2.0


def _mean_one(values: list[float]) -> Tensor:
    return mean_one(torch.tensor(values, dtype=torch.float64))


def test_weights_from_logarithms_have_mean_one_for_any_size_of_the_logarithms() -> None:
    for values in ([0.0, 1.0, 2.0], [-1e6, -1e6 + 1, -1e6 - 3], [700.0, 900.0, 1e5], [-math.inf, 0.0, 0.0]):
        found = _mean_one(values)
        assert bool(found.isfinite().all())
        assert found.mean().item() == pytest.approx(1, abs=1e-12)
        assert bool((found[torch.tensor(values).argsort()].diff() >= 0).all())
