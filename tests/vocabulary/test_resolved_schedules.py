"""Any number in a method may be a schedule; its number is checked in the epoch in which it comes."""

from __future__ import annotations

import math

import pytest
import torch

import instar as I
from instar.schedules import resolve

SCHEDULED = I.Method(
    I.PGD(
        I.Linf(I.Ramp(0, 8 / 255, 0, 0.5)),
        steps=I.Steps(2, ((0.5, 10),)),
        step_size=I.Ramp(1 / 255, 2 / 255),
        stop=I.Exceeds(I.ProbabilityGap(), I.Ramp(0, 0.4, 0.3, 0.7)),
    ),
    I.Steps(math.inf, ((0.5, 1.0),)) * I.CrossEntropy() + I.KL() * I.Ramp(0, 6),
    perturbation=I.AWP(I.Steps(0, ((0.2, 5e-3),)), ascend=I.Ramp(1, 2) * I.CrossEntropy()),
    remember=(("gap", I.Ramp(0, 1) * I.LossGap("clean")),),
)


def test_every_number_wherever_it_stands_is_resolved_at_once() -> None:
    early, late = SCHEDULED.at(I.Progress(0, 10)), SCHEDULED.at(I.Progress(9, 10))
    assert repr(early) == (
        f"Method(PGD(Linf({(8 / 255) * 0.2!r}), steps=2, step_size={1 / 255 + 0.1 / 255!r}, "
        "stop=Exceeds(ProbabilityGap(), 0.0)), "
        "inf * CrossEntropy() + KL() * 0.6000000000000001, "
        "perturbation=AWP(0, ascend=1.1 * CrossEntropy()), remember=(('gap', 0.1 * LossGap('clean')),))"
    ).replace(repr((8 / 255) * 0.2), I.expression.number((8 / 255) * 0.2)).replace(
        repr(1 / 255 + 0.1 / 255), I.expression.number(1 / 255 + 0.1 * (2 / 255 - 1 / 255))
    )
    assert late.attack.ball == I.Linf(8 / 255)
    assert late.attack.steps == 10
    assert late.attack.step_size == pytest.approx(2 / 255)
    assert late.attack.stop.bound == pytest.approx(0.4)
    assert late.perturbation.gamma == 5e-3


def test_a_method_without_schedules_resolves_to_itself() -> None:
    for method in (I.pgd_at(), I.trades(), SCHEDULED.at(I.Progress(3, 10))):
        assert method.at(I.Progress(0, 10)) is method
    assert resolve((1, "a", None), I.Progress(0, 1)) == (1, "a", None)


def test_resolving_leaves_the_method_as_it_is() -> None:
    before = repr(SCHEDULED)
    SCHEDULED.at(I.Progress(0, 10))
    assert repr(SCHEDULED) == before


@pytest.mark.parametrize(
    ("method", "fine", "bad", "message"),
    [
        (I.pgd_at(eps=I.Ramp(0, 2)), 4, 5, "eps of Linf must be in [0, 1] because inputs lie in [0, 1]; got 1.2"),
        (I.pgd_at(step_size=I.Ramp(0.1, -0.9)), 0, 1, "step_size of PGD must be a positive number"),
        (I.pgd_at(steps=I.Steps(3, ((0.5, 2.5),))), 4, 5, "steps of PGD must be a whole number"),
        (I.pgd_at(steps=I.Steps(3, ((0.5, -1),))), 4, 5, "steps of PGD must be a whole number"),
        (I.Method(I.PGD(stop=I.Patience(I.Ramp(0, -1))), I.KL()), None, 0, "steps of Patience (τ) must be at least 0"),
        (I.Method(I.PGD(), I.KL(), perturbation=I.AWP(I.Steps(0, ((0.3, -1),)))), 2, 3, "gamma of AWP must be"),
        (I.Method(I.PGD(), I.Steps(1, ((0.5, math.nan),)) * I.KL()), 4, 5, "must be a number; got nan"),
        (I.gairat(shift=I.Steps(0, ((0.5, math.nan),))), 4, 5, "shift of GeometryWeight (λ) must be a number or inf"),
    ],
)
def test_an_impossible_number_raises_in_the_epoch_where_it_comes(
    method: I.Method, fine: int | None, bad: int, message: str
) -> None:
    if fine is not None:
        method.at(I.Progress(fine, 10))
    with pytest.raises(I.UserError) as caught:
        method.at(I.Progress(bad, 10))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_that_were_not_resolved_say_so_when_they_are_used() -> None:
    model, batch = torch.nn.Flatten(), I.Batch(torch.rand(2, 1, 1, 3), torch.tensor([0, 1]))
    for attack in (I.PGD(I.Linf(I.Ramp(0, 1))), I.PGD(steps=I.Steps(3)), I.PGD(step_size=I.Ramp(0, 1))):
        with pytest.raises(I.UserError, match=r"still .*schedule.*method\.at\(progress\)"):
            attack(model, batch)
    for perturbation in (I.AWP(I.Ramp(0, 1)), I.SAM(I.Ramp(0, 1))):
        with pytest.raises(I.UserError, match=r"still the schedule"):
            perturbation({}, lambda p: torch.zeros(()))


def test_a_loss_without_progress_stands_at_the_end_of_the_run() -> None:
    model, batch = torch.nn.Flatten(), I.Batch(torch.rand(2, 1, 1, 3), torch.tensor([0, 1]))
    method = I.Method(I.NoAttack(), I.Ramp(0, 6, 0.3, 0.9) * I.CrossEntropy("clean"))
    plain = I.training_loss(model, I.Method(I.NoAttack(), I.CrossEntropy("clean")), batch).loss
    torch.testing.assert_close(I.training_loss(model, method, batch).loss, 6 * plain)
    early = I.training_loss(model, method, batch, progress=I.Progress(0, 10)).loss
    assert early.tolist() == [0, 0]


def test_progress_knows_its_share_of_the_run_and_a_schedule_is_constant_within_an_epoch() -> None:
    assert I.Progress(3, 12).fraction == 0.25
    ramp = I.Ramp(0, 1)
    assert ramp(I.Progress(3, 12, step=0, steps_per_epoch=9)) == ramp(I.Progress(3, 12, step=8, steps_per_epoch=9))
