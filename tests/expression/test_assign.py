"""Setting one field anywhere inside of a method, as ``--set`` does."""

from __future__ import annotations

from dataclasses import replace

import pytest

import instar as I
from instar.expression import assign

P_SAT = replace(I.gairat(), attack=I.PGD(stop=I.Exceeds(I.ProbabilityGap(), 0.3)), perturbation=I.AWP(5e-3))


@pytest.mark.parametrize(
    ("path", "new", "expected"),
    [
        ("attack.eps", 4 / 255, replace(P_SAT, attack=replace(P_SAT.attack, ball=I.Linf(4 / 255)))),
        ("attack.ball.eps", 4 / 255, replace(P_SAT, attack=replace(P_SAT.attack, ball=I.Linf(4 / 255)))),
        ("attack.ball", I.L2(0.5), replace(P_SAT, attack=replace(P_SAT.attack, ball=I.L2(0.5)))),
        ("attack.steps", 7, replace(P_SAT, attack=replace(P_SAT.attack, steps=7))),
        ("steps", 7, replace(P_SAT, attack=replace(P_SAT.attack, steps=7))),
        ("attack.mode", "train", replace(P_SAT, attack=replace(P_SAT.attack, mode="train"))),
        ("attack.stop", None, replace(P_SAT, attack=replace(P_SAT.attack, stop=None))),
        ("attack.stop.bound", 0.4, replace(P_SAT, attack=I.PGD(stop=I.Exceeds(I.ProbabilityGap(), 0.4)))),
        ("attack.bound", I.Ramp(0, 1), replace(P_SAT, attack=I.PGD(stop=I.Exceeds(I.ProbabilityGap(), I.Ramp(0, 1))))),
        ("perturbation.gamma", 1e-2, replace(P_SAT, perturbation=I.AWP(1e-2))),
        ("gamma", 1e-2, replace(P_SAT, perturbation=I.AWP(1e-2))),
        ("perturbation", None, replace(P_SAT, perturbation=None)),
        ("average", I.EMA(0.9), replace(P_SAT, average=I.EMA(0.9))),
        ("loss.left.shift", -3.0, replace(P_SAT, loss=I.GeometryWeight(-3.0) * I.CrossEntropy())),
        ("loss.shift", -3.0, replace(P_SAT, loss=I.GeometryWeight(-3.0) * I.CrossEntropy())),
        ("loss.right.smoothing", 0.1, replace(P_SAT, loss=P_SAT.loss.left * I.CrossEntropy(smoothing=0.1))),
        ("loss", 2 * I.KL(), replace(P_SAT, loss=2 * I.KL())),
        ("updates_bn", ("adv",), replace(P_SAT, updates_bn=("adv",))),
    ],
)
def test_a_field_is_found_by_its_path_and_by_a_shorter_one_that_is_not_ambiguous(
    path: str, new: object, expected: I.Method
) -> None:
    before = repr(P_SAT)
    assert assign(P_SAT, path, new) == expected
    assert assign(P_SAT, path, new) != P_SAT
    assert repr(P_SAT) == before


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("attack.epps", 0.1, "unknown field of PGD 'epps'. Did you mean"),
        ("atack.eps", 0.1, "unknown field of Method 'atack'. Did you mean 'attack'"),
        ("attack.stpes", 3, "Did you mean 'steps'"),
        ("attack.ball.radius", 3, "unknown field of Linf 'radius'"),
        ("attack.eps.more", 3, "unknown field of float 'more'"),
        ("", 3, "unknown field of Method ''"),
        ("attack.eps", 8, "eps of Linf must be in [0, 1] because inputs lie in [0, 1]; got 8. Did you mean 8/255?"),
        ("attack.step_size", 2, "step_size of PGD in Linf must be at most 1"),
        ("attack.step_size", -0.1, "step_size of PGD must be a positive number"),
        ("attack.steps", -1, "steps of PGD must be a whole number of at least 0; got -1"),
        ("attack.steps", 2.5, "steps of PGD must be a whole number of at least 0; got 2.5"),
        ("attack.steps", True, "steps of PGD must be a whole number of at least 0; got True"),
        ("attack.steps", "ten", "steps of PGD"),
        ("attack.steps", None, "steps"),
        ("attack.steps", float("inf"), "steps of PGD"),
        ("attack.steps", float("nan"), "steps of PGD"),
        ("attack.step_size", "small", "step_size"),
        ("attack.mode", "test", "mode of PGD must be one of 'eval', 'train', 'batch'; got 'test'"),
        ("attack.ball", 0.1, "ball of PGD"),
        ("attack.ball", "Linf", "ball of PGD"),
        ("attack.objective", "KL", "objective of PGD"),
        ("attack.objective", I.LossGap(), "LossGap() needs anchor"),
        ("attack.stop", "never", "stop of PGD"),
        ("attack.start", "zero", "start of PGD"),
        ("attack.stop.difficulty", "gap", "difficulty of Exceeds"),
        ("attack", I.Linf(0.1), "attack of a Method must be an Attack; got Linf"),
        ("loss", "CrossEntropy", "loss of a Method"),
        ("perturbation", 0.1, "perturbation of a Method"),
        ("perturbation.ascend", 3.5j, "ascend of AWP"),
        ("average", 0.99, "average of a Method must be an Average; got float"),
        ("remember", (("a",),), "remember of a Method must hold pairs (name, signal)"),
        ("updates_bn", ("adv", "attack"), "updates_bn of a Method may name anchor, anchor_adv, clean, adv; got attack"),
        ("loss.left.weight", "tan", "weight of GeometryWeight must be one of 'tanh', "),
        ("loss.left.shift", float("nan"), "shift of GeometryWeight"),
        ("perturbation.gamma", -1.0, "gamma of AWP must be a number of at least 0; got -1.0"),
    ],
)
def test_a_wrong_path_or_value_is_one_line(path: str, new: object, message: str) -> None:
    with pytest.raises(I.UserError) as caught:
        assign(P_SAT, path, new)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_two_parts_have_must_be_written_out() -> None:
    twice = I.CrossEntropy("clean") + I.CrossEntropy("adv")
    with pytest.raises(I.UserError, match=r"'of' could mean left\.of or right\.of: write which"):
        assign(replace(P_SAT, loss=twice), "loss.of", "adv")
    assert assign(twice, "right.of", "anchor") == I.CrossEntropy("clean") + I.CrossEntropy("anchor")
