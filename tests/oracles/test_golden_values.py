"""Held against the official codes' numbers; golden/README.md says where they come from."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instar as I

Opened = Callable[[str], Any]

PLACE = {"eps": 0.031, "step_size": 0.007}
UNLIMITED = I.PGD(I.Linf(0.031), step_size=0.007, start=I.Zero())


def _given(x: Tensor, budget: int = 10) -> I.Adversary:
    none = torch.zeros(len(x), dtype=torch.int32)
    return I.Adversary(x=x, kappa=none, inspected=none, moves=none, budget=budget)


def _near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)


def test_trades_attack_loss_and_every_gradient_are_those_of_the_official_code(golden: Opened) -> None:
    g = golden("trades")
    method = I.trades(beta=6.0, **PLACE)
    method = replace(method, attack=replace(method.attack, start=I.Given(g.noise)))
    loss, adversary, _ = I.training_loss(g.network, method, g.batch)
    _near(adversary.x, g.numbers["x_adv"])
    g.loss_and_gradients_agree(loss)


def test_mart_attack_loss_and_every_gradient_are_those_of_the_official_code(golden: Opened) -> None:
    g = golden("mart")
    method = I.mart(beta=6.0, **PLACE)
    method = replace(method, attack=replace(method.attack, start=I.Given(g.noise)))
    loss, adversary, _ = I.training_loss(g.network, method, g.batch)
    _near(adversary.x, g.numbers["x_adv"])
    g.loss_and_gradients_agree(loss)


def test_spat_attack_loss_and_every_gradient_are_those_of_the_official_code(golden: Opened) -> None:
    g = golden("spat")
    method = I.spat(beta=6.0, scale=8.0, margin=0.2, offset=0.2, **PLACE)
    method = replace(method, attack=replace(method.attack, start=I.Given(g.noise)))
    loss, adversary, _ = I.training_loss(g.network, method, g.batch)
    _near(adversary.x, g.numbers["x_adv"])
    g.loss_and_gradients_agree(loss)


def test_gairat_attack_kappa_loss_and_every_gradient_are_those_of_the_official_code(golden: Opened) -> None:
    g = golden("gairat")
    method = I.gairat(shift=-1.0, **PLACE)
    method = replace(method, attack=replace(method.attack, start=I.Zero()))
    loss, adversary, _ = I.training_loss(g.network, method, g.batch)
    _near(adversary.x, g.numbers["x_adv"])
    assert adversary.kappa.tolist() == g.numbers["kappa"].long().tolist()
    assert len(set(adversary.kappa.tolist())) > 1
    g.loss_and_gradients_agree(loss)


@pytest.mark.parametrize("shift", ["-1.0", "0.0"])
@pytest.mark.parametrize("function", ["tanh", "sigmoid", "discrete"])
def test_geometry_weights_are_those_of_the_official_code(golden: Opened, function: str, shift: str) -> None:
    g = golden("gairat")
    evidence = I.Evidence(
        x=g.batch.x, y=g.batch.y, adv=torch.zeros(24, 10).double(), kappa=g.numbers["kappa"], budget=10
    )
    _near(I.GeometryWeight(float(shift), function)(evidence), g.numbers[f"weight.{function}.{shift}"])


def test_awp_offsets_loss_and_every_gradient_are_those_of_the_official_code(golden: Opened) -> None:
    g = golden("awp")
    method = I.Method(I.PGD(), I.CrossEntropy(), perturbation=I.AWP(float(g.numbers["gamma"])))
    x_adv = golden("gairat").numbers["x_adv"]
    loss, _, evidence = I.training_loss(g.network, method, g.batch, adversary=_given(x_adv))
    assert set(evidence.offsets) == {"c.weight", "l.weight"}
    for name, offset in evidence.offsets.items():
        _near(offset, g.numbers[f"offset.{name}"])
    g.loss_and_gradients_agree(loss)


def _iseat(numbers: dict[str, Tensor]) -> I.Method:
    loss = I.CrossEntropy() + float(numbers["lam"]) * (I.RankWeight(I.LossGap()) * I.LogitShift())
    attack = I.PGD(I.Linf(0.031), step_size=0.007, start=I.Zero(), mode="train")
    perturbation = I.AWP(float(numbers["gamma"]), ascend=I.CrossEntropy())
    return I.Method(attack, loss, perturbation=perturbation, updates_bn=("adv",))


def test_iseat_vulnerability_weights_loss_and_every_gradient_are_those_of_the_official_code(golden: Opened) -> None:
    g = golden("iseat")
    method = _iseat(g.numbers)
    loss, _, evidence = I.training_loss(g.network, method, g.batch, adversary=_given(g.numbers["x_adv"]))
    _near(I.LossGap()(evidence), g.numbers["vulnerability"])
    _near(I.RankWeight(I.LossGap())(evidence), g.numbers["weight"])
    _near(I.LogitShift()(evidence), g.numbers["logit_distance"])
    g.loss_and_gradients_agree(loss)


def test_the_recipe_of_iseat_is_the_method_that_agrees_with_the_official_code(golden: Opened) -> None:
    g = golden("iseat")
    assert replace(I.iseat(smoothness=float(g.numbers["lam"])), attack=I.PGD()) == replace(
        _iseat(g.numbers), attack=I.PGD()
    )


def test_iseat_images_are_those_of_a_plain_attack_from_the_clean_image(golden: Opened) -> None:
    g = golden("iseat")
    _near(I.PGD(I.Linf(8 / 255), step_size=2 / 255, start=I.Zero())(g.network, g.batch).x, g.numbers["x_adv"])


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_friendly_attack_stops_where_the_official_code_stops_in_batch_order(golden: Opened, tau: int) -> None:
    g = golden("fat")
    found = replace(UNLIMITED, stop=I.Patience(tau))(g.network, g.batch)
    _near(found.x[:12], g.numbers[f"x_adv.tau{tau}"])
    assert int(found.moves.sum()) == int(g.numbers[f"moves.tau{tau}"])


@pytest.mark.parametrize("bound", ["-0.5", "-0.2", "0.0", "0.4", "1.0"])
def test_self_adaptive_attack_stops_where_the_official_code_stops(golden: Opened, bound: str) -> None:
    g = golden("p_sat")
    found = replace(UNLIMITED, stop=I.Exceeds(I.ProbabilityGap(), float(bound)))(g.network, g.batch)
    # Two sets of images equal others and are stored once; see golden/README.md.
    expected = g.batch.x[:12] if bound == "-0.5" else g.numbers[f"x_adv.bound{'0.4' if bound == '1.0' else bound}"]
    _near(found.x[:12], expected)
    # These logits, of all 24 images, are those of the loss: with batch statistics.
    _near(g.network.train()(found.x), g.numbers[f"logits_adv.bound{bound}"])
