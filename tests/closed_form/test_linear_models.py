"""PGD on linear models, whose worst perturbations are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar import (
    L1,
    L2,
    PGD,
    Ball,
    Batch,
    CrossEntropy,
    Exceeds,
    Gaussian,
    Given,
    Linf,
    Margin,
    ProbabilityGap,
    Uniform,
    Zero,
)

SHAPE = (1, 3, 3)


class Linear(nn.Module):
    """Logits W x + b in float64."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.head = nn.Linear(9, classes).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def _middle(count: int) -> Tensor:
    """Images far from the edge of the box."""
    return 0.4 + 0.2 * torch.rand(count, *SHAPE, dtype=torch.float64)


def _edge(count: int) -> Tensor:
    """Images in which most pixels touch the edge of the box or come near it."""
    x = torch.rand(count, *SHAPE, dtype=torch.float64)
    return torch.where(x < 0.4, 0.05 * x, torch.where(x > 0.6, 1 - 0.05 * (1 - x), x)).round(decimals=1)


def _direction(model: Linear, y: Tensor) -> Tensor:
    """Gradient (B, 9) of the wrong class's lead over the true one."""
    w = model.head.weight.detach()
    return w[1 - y] - w[y]


def _lead(model: Linear, x: Tensor, y: Tensor) -> Tensor:
    z = model(x).detach()
    rows = torch.arange(len(y))
    return z[rows, 1 - y] - z[rows, y]


def _best_l1(w: Tensor, x: Tensor, eps: float) -> Tensor:
    """The budget goes to the pixels of largest weight, each until the box stops it."""
    found = x.flatten(1).clone()
    for i in range(len(found)):
        left = eps
        for j in w[i].abs().argsort(descending=True).tolist():
            room = float(1 - found[i, j] if w[i, j] > 0 else found[i, j])
            moved = min(left, room)
            found[i, j] += moved if w[i, j] > 0 else -moved
            left -= moved
    return found.view_as(x)


def _best_l2(w: Tensor, x: Tensor, eps: float) -> Tensor:
    """x + clip(t w) to the box with the t at which the length is eps, by bisection."""
    flat = x.flatten(1)
    low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e6).double()
    for _ in range(200):
        t = (low + high) / 2
        length = torch.clamp(flat + t * w, 0, 1).sub(flat).norm(dim=1, keepdim=True)
        low, high = torch.where(length > eps, low, t), torch.where(length > eps, t, high)
    return torch.clamp(flat + low * w, 0, 1).view_as(x)


@pytest.mark.parametrize("images", [_middle, _edge])
@pytest.mark.parametrize("objective", [CrossEntropy(), Margin()], ids=repr)
@pytest.mark.parametrize("start", [Zero(), Uniform(), Gaussian(0.01)], ids=repr)
def test_pgd_in_linf_reaches_the_corner_that_the_weights_point_to(
    images: object, objective: object, start: object
) -> None:
    model, x, y = Linear(), images(12), torch.arange(12) % 2
    found = PGD(Linf(0.1), objective, steps=10, step_size=0.02, start=start)(model, Batch(x, y)).x
    expected = torch.clamp(x + 0.1 * _direction(model, y).sign().view_as(x), 0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [Zero(), Uniform()], ids=repr)
def test_pgd_in_l2_reaches_the_point_that_the_weights_point_to(start: object) -> None:
    model, x, y = Linear(), _middle(12), torch.arange(12) % 2
    found = PGD(L2(0.3), steps=80, step_size=0.3, start=start)(model, Batch(x, y)).x
    w = _direction(model, y)
    expected = x + 0.3 * (w / w.norm(dim=1, keepdim=True)).view_as(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_pgd_in_l2_reaches_the_worst_point_where_the_box_is_in_the_way() -> None:
    model, x, y = Linear(), _edge(12), torch.arange(12) % 2
    found = PGD(L2(0.6), steps=200, step_size=0.3, start=Zero())(model, Batch(x, y)).x
    best = _best_l2(_direction(model, y), x, 0.6)
    assert int(((best == 0) | (best == 1)).sum()) > 24, "the box must be in the way"
    torch.testing.assert_close(_lead(model, found, y), _lead(model, best, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [Zero(), Uniform()], ids=repr)
def test_pgd_in_l1_puts_everything_on_the_pixel_of_largest_weight(start: object) -> None:
    model, x, y = Linear(), _middle(12), torch.arange(12) % 2
    found = PGD(L1(0.3), steps=40, step_size=0.1, start=start)(model, Batch(x, y)).x
    torch.testing.assert_close(found, _best_l1(_direction(model, y), x, 0.3), rtol=0, atol=1e-12)


def test_pgd_in_l1_comes_within_a_step_of_the_worst_point_where_the_box_is_in_the_way() -> None:
    model, x, y, step = Linear(), _edge(12), torch.arange(12) % 2, 0.01
    found = PGD(L1(1.7), steps=600, step_size=step, start=Zero())(model, Batch(x, y)).x
    w = _direction(model, y)
    best = _best_l1(w, x, 1.7)
    assert int(((best != x) & ((best == 0) | (best == 1))).sum()) >= 12, "the box must be in the way"
    # Weight moves to and fro between the last two pixels in turn, half a step at a time.
    missing = _lead(model, best, y) - _lead(model, found, y)
    assert bool((missing >= -1e-9).all())
    assert bool((missing <= step * w.abs().amax(1)).all())


@pytest.mark.parametrize("where", [Linf(0.1), L2(0.4), L1(0.8)], ids=repr)
@pytest.mark.parametrize("start", [Zero(), Uniform(), Given(torch.full((6, *SHAPE), 0.02).double())], ids=repr)
def test_no_steps_or_steps_of_no_length_return_the_start(where: Ball, start: object) -> None:
    model, batch = Linear(), Batch(_middle(6), torch.arange(6) % 2)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    expected = start(batch.x, where, generator())
    for attack in (PGD(where, steps=0, start=start), PGD(where, steps=5, step_size=0.0, start=start)):
        found = attack(model, batch, generator=generator())
        torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-12)
        assert found.moves.tolist() == [attack.steps] * 6
    assert not PGD(where, steps=0)(model, batch).kappa.any()


def test_steps_of_no_length_give_kappa_of_all_or_nothing() -> None:
    model, batch = Linear(), Batch(_middle(40), torch.arange(40) % 2)
    found = PGD(Linf(0.1), steps=7, step_size=0.0, start=Zero())(model, batch)
    right = model(batch.x).argmax(1) == batch.y
    assert found.kappa.tolist() == [7 * int(r) for r in right]
    assert 0 < int(right.sum()) < 40


@pytest.mark.parametrize("where", [Linf(0.0), L2(0.0), L1(0.0)], ids=repr)
@pytest.mark.parametrize("start", [Zero(), Uniform(), Gaussian(0.01)], ids=repr)
def test_a_radius_of_zero_returns_the_images_bit_for_bit(where: Ball, start: object) -> None:
    x = torch.rand(6, *SHAPE, dtype=torch.float64).round(decimals=1)
    found = PGD(where, steps=3, step_size=0.1, start=start)(Linear(), Batch(x, torch.arange(6) % 2))
    assert torch.equal(found.x, x)


@pytest.mark.parametrize("where", [Linf(0.1), L2(0.4)], ids=repr)
@pytest.mark.parametrize("images", [_middle, _edge])
def test_the_loss_of_a_convex_model_never_falls_along_the_attack(where: Ball, images: object) -> None:
    model, batch = Linear(4), Batch(images(10), torch.arange(10) % 4)
    losses = []
    for steps in range(12):
        x = PGD(where, steps=steps, step_size=where.radius / 5, start=Zero())(model, batch).x
        losses.append(F.cross_entropy(model(x).detach(), batch.y, reduction="none"))
    rises = torch.stack(losses).diff(dim=0)
    assert bool((rises >= -1e-12).all())
    assert bool((rises[0] > 0).all())


@pytest.mark.parametrize("where", [Linf(0.1), L2(0.4), L1(0.8)], ids=repr)
def test_the_scale_of_the_objective_does_not_matter(where: Ball) -> None:
    model, batch = Linear(4), Batch(_edge(10), torch.arange(10) % 4)
    attack = PGD(where, CrossEntropy(), step_size=0.05, start=Zero())
    for scale in (1 / 10, 128.0):
        scaled = replace(attack, objective=scale * CrossEntropy())
        torch.testing.assert_close(scaled(model, batch).x, attack(model, batch).x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", [Linf(0.1), L2(0.4), L1(0.8)], ids=repr)
def test_an_instance_is_attacked_the_same_alone_and_in_company(where: Ball) -> None:
    model, batch = Linear(4), Batch(_edge(10), torch.arange(10) % 4)
    attack = PGD(where, step_size=0.05, start=Zero())
    together = attack(model, batch)
    for i in range(10):
        alone = attack(model, Batch(batch.x[i : i + 1], batch.y[i : i + 1]))
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=0, atol=1e-12)
        assert alone.kappa.item() == together.kappa[i].item()


@pytest.mark.parametrize("where", [Linf(0.1), L2(0.4), L1(0.8)], ids=repr)
@pytest.mark.parametrize("start", [Uniform(), Gaussian(0.01)], ids=repr)
def test_the_same_seed_gives_the_same_attack_and_another_seed_another(where: Ball, start: object) -> None:
    model, batch = Linear(), Batch(_middle(6), torch.arange(6) % 2)
    attack = PGD(where, steps=1, step_size=0.001, start=start)
    first, again, other = (attack(model, batch, generator=torch.Generator().manual_seed(s)).x for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_kappa_counts_the_iterates_before_the_boundary_of_a_line() -> None:
    # Logits ±(x − ½): an image at ½ − d with label 0 is right until it has moved by d, a step of 0.1 at a time.
    model = Linear()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[:, 0] = torch.tensor([-1.0, 1.0])
        model.head.bias.copy_(torch.tensor([0.5, -0.5]))
    x = torch.full((5, *SHAPE), 0.5, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([0.45, 0.35, 0.25, 0.05, 0.6])
    found = PGD(Linf(0.3), steps=5, step_size=0.1, start=Zero())(model, Batch(x, torch.zeros(5).long()))
    assert found.kappa.tolist() == [1, 2, 3, 5, 0]
    assert found.inspected.tolist() == found.moves.tolist() == [5] * 5


@pytest.mark.parametrize("label", [0, 1])
def test_a_constant_classifier_gives_kappa_of_all_to_its_class_and_none_to_others(label: int) -> None:
    model = Linear()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0.0]))
    found = PGD(Linf(0.1), steps=4)(model, Batch(_middle(3), torch.full((3,), label)))
    assert found.kappa.tolist() == [4 * (1 - label)] * 3


@pytest.mark.parametrize("bound", [-0.5, -0.1, 0.0, 0.2, 0.6])
@pytest.mark.parametrize("where", [Linf(0.3), L2(0.6)], ids=repr)
def test_a_stopped_attack_is_a_prefix_of_the_whole_one(bound: float, where: Ball) -> None:
    model, batch = Linear(3), Batch(_edge(20), torch.arange(20) % 3)
    with torch.no_grad():
        model.head.weight.mul_(8)
    attack = PGD(where, steps=8, step_size=where.radius / 8, start=Zero())
    trajectory = [replace(attack, steps=k)(model, batch).x for k in range(9)]
    found = replace(attack, stop=Exceeds(ProbabilityGap(), bound))(model, batch)

    def gap(x: Tensor, i: int) -> float:
        p = model(x[i : i + 1]).detach().softmax(1)[0]
        return float(p[torch.arange(3) != batch.y[i]].max() - p[batch.y[i]])

    for i, moves in enumerate(found.moves.tolist()):
        torch.testing.assert_close(found.x[i], trajectory[moves][i], rtol=0, atol=1e-12)
        assert moves == 8 or gap(found.x, i) > bound, "stopped too early"
        assert moves == 0 or gap(trajectory[moves - 1], i) <= bound, "stopped too late"
    assert len(set(found.moves.tolist())) > 1
