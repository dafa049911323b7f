"""What a step of each method costs: the smallest published numbers of passes, counted while a step runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import instar as I
from instar.passes import Passes, passes

AWP = I.AWP(5e-3, ascend=None)
ISEAT = I.Method(
    I.PGD(start=I.Zero(), mode="train"),
    I.CrossEntropy() + 0.1 * (I.RankWeight(I.LossGap()) * I.LogitShift()),
    perturbation=I.AWP(7e-3, ascend=I.CrossEntropy()),
    updates_bn=("adv",),
)
MINIMAL = {
    "natural training": (I.Method(I.NoAttack(), I.CrossEntropy()), Passes(1, 0, 1), 3),
    "one step": (I.pgd_at(steps=1), Passes(2, 1, 1), 5),
    "PGD-2": (I.pgd_at(steps=2), Passes(3, 2, 1), 7),
    "PGD-7": (I.pgd_at(steps=7), Passes(8, 7, 1), 17),
    "PGD-10": (I.pgd_at(), Passes(11, 10, 1), 23),
    "TRADES": (I.trades(), Passes(13, 10, 2), 27),
    "GAIRAT": (I.gairat(), Passes(11, 10, 1), 23),
    "AT-AWP": (replace(I.pgd_at(), perturbation=AWP), Passes(12, 10, 2), 26),
    "TRADES-AWP": (replace(I.trades(), perturbation=AWP), Passes(15, 10, 4), 33),
    "GAIRAT-AWP": (replace(I.gairat(), perturbation=AWP), Passes(12, 10, 2), 26),
    "SAM on TRADES": (replace(I.trades(), perturbation=I.SAM()), Passes(15, 10, 4), 33),
    "AWP switched off": (replace(I.pgd_at(), perturbation=I.AWP(0.0)), Passes(11, 10, 1), 23),
    "ISEAT": (ISEAT, Passes(13, 10, 3), 29),
    "ISEAT without AWP": (replace(ISEAT, perturbation=None), Passes(12, 10, 2), 26),
    "a margin objective": (replace(I.pgd_at(), attack=I.PGD(objective=I.Margin())), Passes(11, 10, 1), 23),
}


@pytest.mark.parametrize("name", MINIMAL)
def test_a_step_takes_no_more_passes_than_it_must(name: str) -> None:
    method, expected, units = MINIMAL[name]
    assert passes(method) == expected
    assert passes(method).units == units


def test_remembering_what_the_loss_knows_costs_nothing_and_what_it_does_not_one_forward() -> None:
    known = replace(I.trades(), remember=(("gap", I.LossGap("clean")), ("kappa", I.SurvivedSteps())))
    assert passes(known) == passes(I.trades())
    more = replace(I.pgd_at(), remember=(("gap", I.LossGap("clean")),))
    assert passes(more) == Passes(12, 10, 1)


def test_a_stopped_batch_costs_less_and_no_rule_costs_more() -> None:
    for bound in (-1.5, -0.4, 0.0, 0.3):
        stopped = replace(I.pgd_at(), attack=I.PGD(stop=I.Exceeds(I.ProbabilityGap(), bound)))
        found = passes(stopped)
        assert found.forward == found.backward_input + 1 <= 11
    assert passes(replace(I.pgd_at(), attack=I.PGD(stop=I.Exceeds(I.ProbabilityGap(), -1.5)))) == Passes(2, 1, 1)


def test_counting_leaves_the_global_generator_as_found() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    passes(I.gairat())
    assert torch.equal(torch.get_rng_state(), before)


class Watched(nn.Module):
    """A real little network that counts forwards and tells when a gradient of a weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(48, 3)
        self.forwards = self.weight_gradients = 0
        for p in self.parameters():
            p.register_hook(self._seen)

    def _seen(self, gradient: Tensor) -> None:
        self.weight_gradients += 1

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


@pytest.mark.parametrize("name", MINIMAL)
def test_counts_on_a_real_network_are_the_same_and_attacks_compute_no_gradient_of_weights(name: str) -> None:
    method, expected, _ = MINIMAL[name]
    model, batch = Watched(), I.Batch(torch.rand(4, 1, 4, 4), torch.arange(4) % 3)
    adversary = method.attack(model, batch)
    assert model.forwards >= expected.backward_input
    assert model.weight_gradients == 0
    loss, _, _ = I.training_loss(model, method, batch, adversary=adversary)
    assert model.forwards == expected.forward
    # The perturbation's ascent takes its gradients at leaves of its own.
    assert model.weight_gradients == 0
    loss.mean().backward()
    assert model.weight_gradients == len(list(model.parameters()))
