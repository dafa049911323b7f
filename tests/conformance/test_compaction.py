"""Instances that have stopped leave the batch: less work, the same adversary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from instar.attacks import PGD, Gaussian
from instar.evidence import Batch
from instar.methods import RECIPES
from instar.signals import KL, Exceeds, Margin, Patience, ProbabilityGap, Signal
from instar.threat import Linf


class Counting(nn.Module):
    """A network with BatchNorm that counts the images it was shown, and the batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4))
        self.double()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = 6 * self.body(x)
        return logits


def instances(count: int = 40) -> Batch:
    draws = torch.Generator().manual_seed(5)
    x = torch.rand(count, 2, 6, 6, generator=draws, dtype=torch.float64)
    net = Counting().eval()
    with torch.no_grad():
        y = net(x).argmax(1)  # so that the attack has something to break
    return Batch(x, y, torch.arange(count), memory={"kappa": torch.arange(count)})


ATTACKS = {
    "p_sat": PGD(Linf(0.3), steps=8, step_size=0.04, stop=Exceeds(ProbabilityGap(), 0.3)),
    "fat": PGD(Linf(0.3), steps=8, step_size=0.04, stop=Patience(2)),
    "fat, KL": PGD(Linf(0.3), KL(), steps=8, step_size=0.04, start=Gaussian(1e-3), stop=Patience(1)),
    "margin": PGD(Linf(0.2), Margin(), steps=8, step_size=0.02, stop=Exceeds(Margin(), 0.0)),
    "no ball": PGD(Linf(0.02), steps=8, step_size=0.02, stop=Exceeds(ProbabilityGap(), 0.1), project=False),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_adversary_is_the_same_and_the_work_is_less(name: str) -> None:
    batch, attack, sizes, found = instances(), ATTACKS[name], {}, {}
    for compact in (True, False):
        net = Counting()
        found[compact] = replace(attack, compact=compact)(net, batch, generator=torch.Generator().manual_seed(2))
        sizes[compact] = net.sizes
    torch.testing.assert_close(found[True].x, found[False].x, rtol=0, atol=1e-12)
    for count in ("kappa", "inspected", "moves"):
        assert torch.equal(getattr(found[True], count), getattr(found[False], count)), count
    assert len(found[True].moves.unique()) > 2  # they stop at different steps
    assert set(sizes[False]) == {40}
    assert sum(sizes[True]) < 0.9 * sum(sizes[False])
    assert len(sizes[True]) == len(sizes[False])
    needed = int(found[True].inspected.sum())
    assert sum(sizes[True]) >= needed


def test_soft_labels_leave_with_their_images() -> None:
    batch = instances()
    target = torch.nn.functional.one_hot(batch.y, 4).double() * 0.8 + 0.05
    batch = replace(batch, target=target)
    both = [
        replace(ATTACKS["p_sat"], compact=compact)(Counting(), batch, generator=torch.Generator().manual_seed(2))
        for compact in (True, False)
    ]
    torch.testing.assert_close(both[0].x, both[1].x, rtol=0, atol=1e-12)


class Neighbours(Signal):
    """A rule that looks at its neighbours, and says so."""

    couples = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"adv"})

    def __call__(self, evidence: object) -> Tensor:
        gap: Tensor = Margin()(evidence)  # type: ignore[arg-type]
        return gap > gap.median()


@pytest.mark.parametrize(
    "change",
    [{"mode": "train"}, {"mode": "batch"}, {"overshoot": False}, {"stop": Neighbours()}, {"compact": False}],
    ids=lambda change: next(iter(change)),
)
def test_where_an_instance_depends_on_the_others_all_of_them_stay(change: dict[str, object]) -> None:
    net, batch = Counting(), instances()
    replace(ATTACKS["p_sat"], **change)(net, batch, generator=torch.Generator().manual_seed(2))
    assert set(net.sizes) == {40}


def test_the_switch_is_a_field_of_the_attack_that_is_written_down() -> None:
    method = RECIPES["fat"]()
    assert "compact" not in repr(method)
    off = replace(method, attack=replace(method.attack, compact=False))
    assert "compact=False" in repr(off)
