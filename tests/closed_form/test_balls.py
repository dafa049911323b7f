"""The three balls: projections against independent oracles, steepest steps against dual norms, starts against laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from instar import L1, L2, Ball, Gaussian, Given, Linf, UserError, Zero, ball
from instar import Uniform as UniformStart

BALLS = [Linf(0.2), L2(0.7), L1(1.1)]
each_ball = pytest.mark.parametrize("where", BALLS, ids=lambda b: b.norm)

pixel = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-9]), st.floats(0, 1))
change = st.one_of(st.sampled_from([0.0, 0.25, -0.25, 1.0]), st.floats(-3, 3))
pair = st.lists(st.tuples(pixel, change), min_size=1, max_size=7)
radius = st.one_of(st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 4))


def _image(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def _problem(drawn: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    x = _image([p for p, _ in drawn])
    return x, x + _image([c for _, c in drawn])


def _make(norm: str, eps: float) -> Ball:
    return ball(norm, min(eps, 1.0) if norm == "Linf" else eps)


def _bisect(where: Ball, moved: Tensor, x: Tensor) -> Tensor:
    """The nearest point of ball and box, by bisection on the multiplier of the norm constraint."""
    offset = moved - x
    if where.norm == "Linf":
        return x + offset.clamp(-where.radius, where.radius).clamp(-x, 1 - x)

    def at(lam: float) -> Tensor:
        shrunk = offset.sign() * (offset.abs() - lam).clamp_min(0) if where.norm == "L1" else offset / (1 + lam)
        return torch.clamp(shrunk, -x, 1 - x)

    low, high = 0.0, 1e12 if where.norm == "L2" else 10.0
    if float(where.size(at(low))) <= where.radius:
        return x + at(low)
    for _ in range(400):
        middle = (low + high) / 2
        low, high = (middle, high) if float(where.size(at(middle))) > where.radius else (low, middle)
    return x + at(high)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@settings(max_examples=120)
@given(drawn=pair, eps=radius)
def test_projection_is_the_nearest_point_of_ball_and_box(
    norm: str, drawn: list[tuple[float, float]], eps: float
) -> None:
    where, (x, moved) = _make(norm, eps), _problem(drawn)
    torch.testing.assert_close(where.project(moved, x), _bisect(where, moved, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@settings(max_examples=120)
@given(drawn=pair, eps=radius)
def test_projection_is_feasible_and_projecting_again_changes_nothing(
    norm: str, drawn: list[tuple[float, float]], eps: float
) -> None:
    where, (x, moved) = _make(norm, eps), _problem(drawn)
    once = where.project(moved, x)
    assert float(where.size(once - x)) <= where.radius + 1e-12
    assert float(once.min()) >= 0
    assert float(once.max()) <= 1
    torch.testing.assert_close(where.project(once, x), once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@settings(max_examples=120)
@given(drawn=st.lists(st.tuples(pixel, change, change), min_size=1, max_size=7), eps=radius)
def test_projection_brings_no_two_points_further_apart(
    norm: str, drawn: list[tuple[float, float, float]], eps: float
) -> None:
    where = _make(norm, eps)
    x = _image([p for p, _, _ in drawn])
    a, b = x + _image([c for _, c, _ in drawn]), x + _image([c for _, _, c in drawn])
    apart = float((where.project(a, x) - where.project(b, x)).norm())
    assert apart <= float((a - b).norm()) + 1e-12


@pytest.mark.parametrize("where", [L2(0.4), L1(0.5), L1(0.9)], ids=repr)
def test_projection_agrees_with_a_general_purpose_solver(where: Ball) -> None:
    x, moved = _image([0.1, 0.9, 0.5, 0.0]), _image([0.9, 1.4, -0.3, 0.6])
    start, goal, n = x.flatten().numpy(), moved.flatten().numpy(), 4
    if where.norm == "L2":
        inside = {"type": "ineq", "fun": lambda z: where.radius**2 - ((z - start) ** 2).sum()}
        solved = optimize.minimize(
            lambda z: ((z - goal) ** 2).sum(),
            start,
            bounds=[(0, 1)] * n,
            constraints=[inside],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        ).x
    else:
        # The offset as p − q with p, q ≥ 0, which makes its absolute sum linear.
        inside = {"type": "ineq", "fun": lambda v: where.radius - v.sum()}
        bounds = [(0, 1 - v) for v in start] + [(0, v) for v in start]
        v = optimize.minimize(
            lambda v: ((start + v[:n] - v[n:] - goal) ** 2).sum(),
            np.zeros(2 * n),
            bounds=bounds,
            constraints=[inside],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        ).x
        solved = start + v[:n] - v[n:]
    np.testing.assert_allclose(where.project(moved, x).flatten().numpy(), solved, atol=2e-6)


@each_ball
def test_projection_treats_every_instance_of_a_batch_by_itself(where: Ball) -> None:
    x = torch.rand(5, 3, 2, 2, dtype=torch.float64)
    moved = x + torch.randn_like(x) * torch.tensor([0.0, 0.01, 0.3, 1.0, 9.0]).double().view(-1, 1, 1, 1)
    alone = torch.cat([where.project(moved[i : i + 1], x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(where.project(moved, x), alone, rtol=0, atol=1e-14)


@each_ball
def test_projection_in_float32_stays_inside_to_the_last_digits(where: Ball) -> None:
    x = torch.rand(64, 3, 8, 8).round(decimals=1)
    found = where.project(x + 2 * torch.randn_like(x), x)
    assert found.dtype == torch.float32
    assert float(where.size((found - x).double()).max()) <= where.radius * (1 + 1e-5)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@each_ball
def test_a_point_inside_ball_and_box_is_left_as_it_is(where: Ball) -> None:
    x = torch.full((3, 1, 2, 2), 0.5)
    moved = x + 0.1 * (torch.rand_like(x) - 0.5)
    assert torch.equal(where.project(moved, x), x + (moved - x))


def _dual(norm: str, gradient: Tensor) -> Tensor:
    flat = gradient.flatten(1)
    return {"Linf": flat.abs().sum(1), "L2": flat.norm(dim=1), "L1": flat.abs().amax(1)}[norm]


@each_ball
def test_steepest_step_has_norm_one_and_reaches_the_dual_norm(where: Ball) -> None:
    gradient = torch.randn(16, 2, 3, 3, dtype=torch.float64)
    step = where.steepest(gradient, torch.full_like(gradient, 0.5))
    torch.testing.assert_close(where.size(step), torch.ones(16).double(), rtol=0, atol=1e-12)
    gain = (step * gradient).flatten(1).sum(1)
    torch.testing.assert_close(gain, _dual(where.norm, gradient), rtol=0, atol=1e-12)
    for _ in range(50):
        other = torch.randn_like(gradient)
        other = other / where.size(other).view(-1, 1, 1, 1)
        assert bool(((other * gradient).flatten(1).sum(1) <= gain + 1e-12).all())


@each_ball
def test_a_zero_gradient_gives_no_step_and_a_tiny_one_a_whole_step(where: Ball) -> None:
    at = torch.full((2, 1, 2, 2), 0.5)
    assert not where.steepest(torch.zeros_like(at), at).any()
    tiny = torch.full_like(at, 1e-18)
    tiny[:, :, 0, 0] = 2e-18
    torch.testing.assert_close(where.size(where.steepest(tiny, at)), torch.ones(2))


def test_the_step_in_l1_goes_to_the_best_pixel_that_the_box_lets_move() -> None:
    gradient = _image([5.0, -4.0, 3.0, -2.0])
    at = _image([1.0, 0.0, 0.5, 0.5])
    assert L1(1.0).steepest(gradient, at).flatten().tolist() == [0, 0, 1, 0]
    assert L1(1.0).steepest(-gradient, at).flatten().tolist() == [-1, 0, 0, 0]
    assert L1(1.0, coordinates=2).steepest(gradient, at).flatten().tolist() == [0, 0, 0.5, -0.5]


def test_a_step_in_l1_shared_by_several_pixels_takes_those_with_the_largest_gradients() -> None:
    gradient = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    step = L1(1.0, coordinates=3).steepest(gradient, torch.full_like(gradient, 0.5))
    torch.testing.assert_close(L1(1.0).size(step), torch.ones(8).double())
    largest = gradient.flatten(1).abs().topk(3, 1).values.mean(1)
    torch.testing.assert_close((step * gradient).flatten(1).sum(1), largest)


def _uniform(values: Tensor) -> float:
    return float(stats.kstest(values.double().numpy(), "uniform").pvalue)


@each_ball
def test_random_offsets_lie_in_the_ball_and_fill_it(where: Ball) -> None:
    x = torch.full((4000, 1, 2, 3), 0.5)
    size = where.size(where.sample(x, torch.Generator().manual_seed(1)).double())
    assert float(size.max()) <= where.radius * (1 + 1e-6)
    assert float(size.max()) > 0.99 * where.radius


def test_the_start_in_linf_is_uniform_in_every_pixel() -> None:
    offset = Linf(0.2).sample(torch.full((4000, 1, 2, 3), 0.5), torch.Generator().manual_seed(1))
    assert _uniform((offset.flatten() / 0.2 + 1) / 2) > 1e-3
    assert abs(float(np.corrcoef(offset.flatten(1).T.numpy())[0, 1])) < 0.06


def test_the_start_in_l2_has_a_uniform_radius_and_direction() -> None:
    where = L2(0.7)
    offset = where.sample(torch.full((6000, 1, 1, 3), 0.5), torch.Generator().manual_seed(1))
    size = where.size(offset)
    assert _uniform(size / 0.7) > 1e-3
    # Archimedes: on the sphere in three dimensions every coordinate is uniform in [−1, 1].
    direction = offset.flatten(1) / size.view(-1, 1)
    assert all(_uniform((direction[:, i] + 1) / 2) > 1e-3 for i in range(3))
    assert abs(float(np.corrcoef(size.numpy(), direction[:, 0].abs().numpy())[0, 1])) < 0.05


def test_the_start_in_l1_has_a_uniform_radius_and_direction() -> None:
    where = L1(1.1)
    offset = where.sample(torch.full((6000, 1, 1, 4), 0.5), torch.Generator().manual_seed(1))
    size = where.size(offset)
    assert _uniform(size / 1.1) > 1e-3
    # On the unit simplex in n dimensions every coordinate is Beta(1, n − 1); signs are fair coins.
    share = (offset.flatten(1).abs() / size.view(-1, 1)).double().numpy()
    assert all(stats.kstest(share[:, i], stats.beta(1, 3).cdf).pvalue > 1e-3 for i in range(4))
    assert abs(float((offset > 0).double().mean()) - 0.5) < 4 * math.sqrt(0.25 / 24000)


def test_the_gaussian_start_is_normal_with_its_deviation_and_ignores_the_ball() -> None:
    x = torch.full((2000, 1, 2, 3), 0.5, dtype=torch.float64)
    offset = Gaussian(0.001)(x, Linf(1e-6), torch.Generator().manual_seed(1)) - x
    assert stats.kstest((offset / 0.001).flatten().numpy(), "norm").pvalue > 1e-3


@each_ball
def test_uniform_starts_are_random_points_of_ball_and_box(where: Ball) -> None:
    x = torch.rand(200, 1, 2, 3).round()
    start = UniformStart()(x, where, torch.Generator().manual_seed(1))
    assert float(where.size(start - x).max()) <= where.radius * (1 + 1e-5)
    assert float(start.min()) >= 0
    assert float(start.max()) <= 1
    assert not torch.equal(start, UniformStart()(x, where, torch.Generator().manual_seed(2)))
    assert torch.equal(start, UniformStart()(x, where, torch.Generator().manual_seed(1)))


def test_the_zero_start_is_a_copy_and_a_given_start_exactly_the_noise() -> None:
    x, noise = torch.rand(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    start = Zero()(x, Linf(0.1), None)
    assert torch.equal(start, x)
    assert start.data_ptr() != x.data_ptr()
    assert torch.equal(Given(noise)(x, Linf(0.1), None), x + noise)
    with pytest.raises(UserError, match=r"noise of Given must have the shape \(2, 1, 2, 2\); got \(3, 1, 2, 2\)"):
        Given(torch.zeros(3, 1, 2, 2))(x, Linf(0.1), None)


@pytest.mark.parametrize(
    ("name", "eps", "expected"),
    [("Linf", 8 / 255, Linf(8 / 255)), ("linf", 0.3, Linf(0.3)), ("inf", 0.3, Linf(0.3)), (math.inf, 0.3, Linf(0.3)),
     ("L2", 0.5, L2(0.5)), (2, 0.5, L2(0.5)), ("l1", 12, L1(12)), (1, 12.0, L1(12.0))],
)  # fmt: skip
def test_balls_are_found_by_the_usual_names_of_their_norms(name: str | float, eps: float, expected: Ball) -> None:
    assert ball(name, eps) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linf(8), "eps of Linf must be in [0, 1] because inputs lie in [0, 1]; got 8. Did you mean 8/255?"),
        (lambda: Linf(300), "got 300."),
        (lambda: Linf(-0.1), "eps of Linf must not be negative; got -0.1"),
        (lambda: L2(float("nan")), "eps of L2 must be a number such as 8/255; got nan"),
        (lambda: L1("12"), "eps of L1 must be a number such as 8/255; got '12'"),
        (lambda: L1(1.0, coordinates=0), "coordinates of L1 must be at least 1; got 0"),
        (lambda: ball("Linv", 0.1), "unknown norm 'Linv'. Did you mean 'Linf'? Known: L1, L2, Linf"),
    ],
)
def test_an_impossible_ball_is_one_clear_line(make: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
