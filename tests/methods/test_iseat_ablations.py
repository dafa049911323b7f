"""ISEAT's ablations against plain loops: weights, distances, detached ends, where logits live, warm start."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import instar as I

SHAPES = ("rank", "reversed", "uniform", "proportional", "top")


class Network(nn.Module):
    """Without BatchNorm, so that a loop over instances is the same function."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.head(F.softplus(self.hidden(x.flatten(1))))


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def batch() -> I.Batch:
    draw = torch.Generator().manual_seed(1)
    return I.Batch(torch.rand(12, 2, 2, 2, generator=draw, dtype=torch.float64), torch.arange(12) % 4)


def _weights_by_loop(gaps: list[float], shape: str) -> list[float]:
    count = len(gaps)
    mean = (count + 1) / (2 * count)
    rank = [1 + sum(other < gap for other in gaps) for gap in gaps]
    if shape == "rank":
        return [r / count for r in rank]
    if shape == "reversed":
        return [(count + 1 - r) / count for r in rank]
    raw = {
        "uniform": [1.0] * count,
        "proportional": [max(gap, 0.0) for gap in gaps],
        "top": [float(r > count - math.ceil(count / 10)) for r in rank],
    }[shape]
    return [mean * count * r / sum(raw) for r in raw]


def _distance_by_loop(moved: Tensor, clean: Tensor, y: int, distance: str) -> Tensor:
    p, q = clean.softmax(0), moved.softmax(0)
    return {
        "l2": ((moved - clean) ** 2).sum(),
        "l1": (moved - clean).abs().sum(),
        "softmax_l2": ((p - q) ** 2).sum(),
        "kl": (p * (p / q).log()).sum(),
        "loss": (q[y].log() - p[y].log()).abs(),
    }[distance]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("detach", ["none", "clean", "adv"])
@pytest.mark.parametrize("distance", ["l2", "l1", "softmax_l2", "kl", "loss"])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_those_of_a_loop(
    model: Network, batch: I.Batch, shape: str, distance: str, detach: str, joint: bool
) -> None:
    lam = 0.7
    ablated = {"weight": shape, "distance": distance, "detach": detach, "joint": joint}
    method = I.iseat(smoothness=lam, gamma=0.05, **ablated)
    loss, adversary, evidence = I.training_loss(model, method, batch)
    found = torch.autograd.grad(loss.mean(), list(model.parameters()))
    weights = dict(model.named_parameters())
    moved_to = {name: p + evidence.offsets.get(name, 0) for name, p in weights.items()}
    at_moved = functional_call(model, moved_to, (adversary.x,))
    clean, here = model(batch.x), at_moved if joint else model(adversary.x)
    losses = [F.cross_entropy(z, batch.y, reduction="none").tolist() for z in (here, clean)]
    omega = _weights_by_loop([a - c for a, c in zip(*losses, strict=True)], shape)
    ends = here.detach() if detach == "adv" else here, clean.detach() if detach == "clean" else clean
    smooth = [_distance_by_loop(ends[0][i], ends[1][i], int(batch.y[i]), distance) for i in range(len(batch))]
    expected = F.cross_entropy(at_moved, batch.y) + lam * sum(w * s for w, s in zip(omega, smooth, strict=True)) / 12
    torch.testing.assert_close(loss.mean(), expected, rtol=1e-9, atol=1e-10)
    for a, b in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_same_mean_and_leaves_out_the_unlabelled(batch: I.Batch, shape: str) -> None:
    y = batch.y.clone()
    y[[2, 7]] = -1
    clean, adv = (torch.randn(12, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (3, 4))
    evidence = I.Evidence(x=batch.x, y=y, anchor=clean, adv=clean - 2 * F.one_hot(batch.y, 4) + 0.3 * adv)
    weights = I.RankWeight(I.LossGap(), shape)(evidence)
    labelled = y >= 0
    assert weights[labelled].mean().item() == pytest.approx(11 / 20)
    assert weights[~labelled].tolist() == pytest.approx([11 / 20] * 2)
    alone = replace(evidence, x=batch.x[labelled], y=y[labelled], anchor=clean[labelled], adv=evidence.adv[labelled])
    torch.testing.assert_close(I.RankWeight(I.LossGap(), shape)(alone), weights[labelled])


def test_proportional_weights_of_an_attack_that_gained_nothing_are_uniform(batch: I.Batch) -> None:
    z = torch.randn(12, 4, dtype=torch.float64)
    weights = I.RankWeight(I.LossGap(), "proportional")(I.Evidence(x=batch.x, y=batch.y, anchor=z, adv=z))
    assert weights.tolist() == pytest.approx([13 / 24] * 12)


def test_uniform_weights_without_weight_perturbation_are_alp(model: Network, batch: I.Batch) -> None:
    attack = I.PGD(start=I.Zero())
    ours = replace(I.iseat(smoothness=0.5, gamma=0.0, weight="uniform"), attack=attack)
    alp = replace(I.alp(pairing=0.5 * 13 / 24), attack=attack)
    torch.testing.assert_close(I.training_loss(model, ours, batch).loss, I.training_loss(model, alp, batch).loss)


def test_the_warm_start_grows_the_radius_and_switches_the_perturbation_off() -> None:
    method = I.iseat(warm_start=5 / 20, eps=0.1, step_size=0.02)
    stages = [method.at(I.Progress(epoch, 20)) for epoch in range(20)]
    assert [s.attack.ball.radius for s in stages[:6]] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert [s.attack.step_size for s in stages[:6]] == pytest.approx([0.004, 0.008, 0.012, 0.016, 0.02, 0.02])
    assert [s.perturbation.gamma for s in stages[:6]] == [0, 0, 0, 0, 0, 7e-3]
    assert stages[-1] == I.iseat(eps=0.1, step_size=0.02).at(I.Progress(19, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": "ranks"}, "shape of RankWeight must be one of 'rank'"),
        ({"distance": "l3"}, "distance of LogitShift must be one of 'l2'"),
        ({"detach": "both"}, "detach of LogitShift must be one of 'none'"),
        ({"warm_start": 0.1, "gamma": I.Ramp(0, 0.01)}, "warm_start makes schedules of gamma, eps and step_size"),
    ],
)
def test_a_wrong_ablation_gets_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(I.UserError) as caught:
        I.iseat(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
