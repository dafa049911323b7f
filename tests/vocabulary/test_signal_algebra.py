"""Adding and multiplying signals means adding and multiplying their values, and what they need."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import instar as I
from instar.methods.mail import After
from instar.signals import Constant, Negated, Product, Sum
from instar.signals.algebra import as_signal


@pytest.fixture
def evidence() -> I.Evidence:
    z = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    return I.Evidence(
        x=torch.rand(5, 1, 2, 2).double(), y=torch.tensor([0, 1, 2, 0, 1]), clean=z[0], adv=z[1], anchor=z[2],
        kappa=torch.tensor([0, 1, 5, 9, 10]), inspected=torch.full((5,), 10), budget=10,
    )  # fmt: skip


def _same(signal: I.Signal, expected: Tensor, evidence: I.Evidence) -> None:
    found = signal(evidence)
    assert found.shape == (5,)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_operators_compute_what_they_say(evidence: I.Evidence) -> None:
    ce, kl = I.CrossEntropy(), I.KL()
    a, b = ce(evidence), kl(evidence)
    _same(ce + kl, a + b, evidence)
    _same(ce - kl, a - b, evidence)
    _same(ce * kl, a * b, evidence)
    _same(-ce, -a, evidence)
    _same(+ce, a, evidence)
    _same(ce + 2, a + 2, evidence)
    _same(2 + ce, a + 2, evidence)
    _same(ce - 2, a - 2, evidence)
    _same(2 - ce, 2 - a, evidence)
    _same(0.5 * ce, a / 2, evidence)
    _same(ce * 0.5, a / 2, evidence)
    _same(ce + 6 * kl * 0.5 - (ce - 1) * (kl + 2), a + 3 * b - (a - 1) * (b + 2), evidence)


def test_gradients_flow_through_every_term_of_an_expression(evidence: I.Evidence) -> None:
    (I.CrossEntropy("clean") + 6 * I.KL() - 0.1 * I.LogitShift())(evidence).sum().backward()
    assert all(bool(z.grad.any()) for z in (evidence.clean, evidence.adv, evidence.anchor))


def test_a_coefficient_detaches_its_result_and_not_what_it_reads(evidence: I.Evidence) -> None:
    weight, term = I.RankWeight(I.LossGap()), I.LogitShift()
    product = (weight * term)(evidence)
    product.sum().backward()
    expected = weight(evidence).unsqueeze(1) * 2 * (evidence.adv - evidence.anchor)
    torch.testing.assert_close(evidence.adv.grad, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(evidence.anchor.grad, -expected.detach(), rtol=0, atol=1e-12)
    assert not weight(evidence).requires_grad
    assert not I.LossGap()(evidence).requires_grad
    assert not I.RankWeight(I.Margin())(evidence).requires_grad


def test_an_expression_needs_what_its_parts_need() -> None:
    assert I.CrossEntropy("clean").needs == {"clean"}
    assert (I.CrossEntropy("clean") + 6 * I.KL()).needs == {"clean", "adv"}
    assert (I.GeometryWeight(-1.0) * I.CrossEntropy()).needs == {"kappa", "adv"}
    assert I.RankWeight(I.LossGap()).needs == {"adv", "anchor"}
    assert I.Exceeds(I.ProbabilityGap(), 0.4).needs == {"adv"}
    assert I.Patience(1).needs == {"adv", "kappa"}
    assert (-(2 * I.LossGap("clean"))).needs == {"adv", "clean"}
    assert Constant(2).needs == frozenset()
    method = I.Method(I.PGD(), I.CrossEntropy(), remember=(("gap", I.LossGap("clean")),))
    assert method.needs == {"adv", "clean"}


def test_numbers_and_schedules_become_constants_and_nothing_else_does() -> None:
    assert as_signal(2) == Constant(2)
    assert as_signal(I.Ramp(0, 1)) == Constant(I.Ramp(0, 1))
    assert as_signal(I.KL()) == I.KL()
    for other in (True, "6", None, (1, 2), I.PGD(), torch.tensor(1.0)):
        with pytest.raises(TypeError, match="combines with signals, numbers and schedules"):
            as_signal(other)
        with pytest.raises((TypeError, RuntimeError)):
            _ = I.KL() * other


def test_a_constant_takes_the_precision_of_the_logits(evidence: I.Evidence) -> None:
    assert Constant(3)(evidence).tolist() == [3.0] * 5
    assert Constant(3)(evidence).dtype == torch.float64
    half = I.Evidence(x=torch.zeros(5, 1, 1, 1), y=evidence.y, adv=torch.zeros(5, 3))
    assert (Constant(3) + 0.5)(half).dtype == torch.float32
    assert Constant(math.inf)(half).tolist() == [math.inf] * 5


def test_a_schedule_that_was_not_resolved_is_an_error_where_it_is_used(evidence: I.Evidence) -> None:
    for signal in (
        I.Ramp(0, 1) * I.KL(),
        I.KL() * I.Ramp(0, 1),
        I.KL() + I.Ramp(0, 1),
        I.GeometryWeight(I.Ramp(0, 1)) * I.KL(),
        I.Exceeds(I.ProbabilityGap(), I.Ramp(0, 1)),
        I.Patience(I.Steps(0)),
        After(I.Margin(), I.Ramp(0, 1)),
    ):
        with pytest.raises(I.UserError, match=r"still the schedule .*method\.at\(progress\)"):
            signal(evidence)


def test_expressions_are_trees_of_the_operators_as_written() -> None:
    a, b, c = I.KL(), I.Margin(), I.CrossEntropy()
    assert a + b + c == Sum(Sum(a, b), c)
    assert a - b == Sum(a, Negated(b))
    assert 2 * a * b == Product(Product(Constant(2), a), b)
    assert a + 2 * b == Sum(a, Product(Constant(2), b))


def test_signals_that_need_counts_say_so_where_there_are_none() -> None:
    bare = I.Evidence(x=torch.zeros(2, 1, 1, 1), y=torch.zeros(2).long(), adv=torch.zeros(2, 2))
    for signal in (I.GeometryWeight(-1.0), I.SurvivedSteps(), I.Patience(0)):
        with pytest.raises(I.UserError, match="κ"):
            signal(bare)


def test_survived_steps_are_a_share_and_correctness_is_zero_or_one(evidence: I.Evidence) -> None:
    assert I.SurvivedSteps()(evidence).tolist() == [0, 0.1, 0.5, 0.9, 1.0]
    right = I.Correct("clean")(evidence)
    assert torch.equal(right.bool(), evidence.clean.argmax(1) == evidence.y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: I.CrossEntropy("attacked"), "of of CrossEntropy must be one of 'adv', 'clean', 'anchor'"),
        (lambda: I.CrossEntropy(smoothing=1.0), "smoothing must be in [0, 1); got 1.0"),
        (lambda: I.CrossEntropy(smoothing=-0.1), "smoothing must be in [0, 1)"),
        (lambda: I.LossGap("adv"), "reference of LossGap must be one of 'anchor', 'clean'; got 'adv'"),
        (lambda: I.LogitShift("adv"), "reference of LogitShift must be one of"),
        (lambda: I.Margin("all"), "of of Margin must be one of"),
        (lambda: I.Correct("all"), "of of Correct must be one of"),
        (lambda: I.GeometryWeight(-1.0, "linear"), "weight of GeometryWeight must be one of 'tanh'"),
        (lambda: I.Patience(-1), "steps of Patience (τ) must be at least 0; got -1"),
        (lambda: I.AWP(-1e-3), "gamma of AWP must be a number of at least 0; got -0.001"),
        (lambda: I.SAM(math.inf), "rho of SAM must be a number of at least 0; got inf"),
        (lambda: I.EMA(1.0), "decay of EMA must be in [0, 1); got 1.0"),
        (lambda: I.Gaussian(0.0), "std of Gaussian must be a positive number such as 0.001; got 0.0"),
        (lambda: I.PGD(objective=I.LogitShift()), "objective of PGD must be a signal of clean and adversarial logits"),
        (lambda: I.PGD(objective=I.GeometryWeight(-1.0) * I.KL()), "objective of PGD must be a signal of clean"),
        (lambda: I.PGD(stop=I.Exceeds(I.LossGap(), 0.1)), "stop of PGD must be a signal of clean and adversarial"),
        (lambda: I.PGD(mode="test"), "mode of PGD must be one of 'eval', 'train', 'batch'; got 'test'"),
        (lambda: I.PGD(step_size=2), "Did you mean 2/255?"),
        (lambda: I.Method(I.Linf(0.1), I.KL()), "attack of a Method must be an Attack; got Linf"),
        (lambda: I.Method(I.PGD(), I.PGD()), "loss of a Method: a Signal combines with signals, numbers and schedules"),
        (lambda: I.Method(I.PGD(), I.KL(), updates_bn=("all",)), "updates_bn of a Method may name anchor"),
    ],
)  # fmt: skip
def test_a_value_that_is_refused_is_one_clear_line(make: object, message: str) -> None:
    with pytest.raises(I.UserError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
