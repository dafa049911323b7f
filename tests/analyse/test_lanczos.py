import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.analyse.hessian import InputHessian, Layout, WeightHessian
from instar.analyse.lanczos import Density, lanczos, rule_of, spectral_density, top_eigenpairs, top_of
from instar.errors import UserError


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    size = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(size, size, generator=draws(seed), dtype=torch.float64)).Q
    return q @ torch.diag(eigenvalues.double()) @ q.T


def small_net(kind: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), kind(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    net[1].running_mean.normal_(generator=draws(4))
    net[1].running_var.uniform_(0.5, 2.0, generator=draws(5))
    return net


def data(count: int = 11) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 6, 6, generator=draws(1), dtype=torch.float64)
    return x, torch.arange(count) % 3


def dense(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The whole Hessian in the weights, by torch's own second derivatives of a function of one flat vector."""
    layout = Layout.of(dict(net.named_parameters()))

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net.eval(), layout.split(flat), (x,)), y)

    flat = layout.join({name: p.detach() for name, p in net.named_parameters()})
    return torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("kind", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("batch_size", [100, 4])
def test_products_are_those_of_the_dense_hessian_whatever_the_batches(kind: type[nn.Module], batch_size: int) -> None:
    net, (x, y) = small_net(kind), data()
    hessian = WeightHessian(net, x, y, batch_size=batch_size)
    vectors = hessian.start(draws(), probes=3)
    expected = vectors @ dense(net, x, y)
    for _ in range(2):  # the second time from the graph that is kept
        torch.testing.assert_close(hessian(vectors), expected, rtol=1e-11, atol=1e-13)
    assert net[1].num_batches_tracked == 0
    flat = torch.autograd.grad(F.cross_entropy(net.eval()(x), y), list(net.parameters()))
    torch.testing.assert_close(hessian.gradient(), torch.cat([g.flatten() for g in flat]), rtol=1e-11, atol=1e-14)


def test_a_model_in_train_mode_and_frozen_is_seen_in_eval_mode_and_left_as_it_was() -> None:
    net, (x, y) = small_net(), data()
    expected = dense(net, x, y)
    net.train().requires_grad_(False)
    hessian = WeightHessian(net, x, y, batch_size=5)
    torch.testing.assert_close(hessian(torch.eye(len(expected), dtype=torch.float64)), expected, rtol=1e-10, atol=1e-12)
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_all_steps_find_every_eigenvalue_of_a_network() -> None:
    net, (x, y) = small_net(), data()
    exact = torch.linalg.eigvalsh(dense(net, x, y))
    hessian = WeightHessian(net, x, y)
    found = lanczos(hessian, hessian.start(draws()), steps=10_000, generator=draws(7))
    assert found.steps == len(exact)
    torch.testing.assert_close(found.ritz()[0][0], exact, rtol=0, atol=1e-9 * float(exact.abs().max()))


def test_the_largest_eigenvalues_of_a_network_are_found_within_their_residuals() -> None:
    net, (x, y) = small_net(), data()
    exact = torch.linalg.eigvalsh(dense(net, x, y)).flip(0)
    hessian = WeightHessian(net, x, y)
    found = top_eigenpairs(hessian, hessian.start(draws()), top=4, steps=40, tolerance=1e-6)
    assert found.steps < hessian.layout.size
    torch.testing.assert_close(found.values[0], exact[:4], rtol=1e-6, atol=0)
    for value, residual, vector in zip(found.values[0], found.residuals[0], found.vectors[0], strict=True):
        left = hessian(vector[None])[0] - value * vector
        torch.testing.assert_close(left.norm(), residual, rtol=1e-3, atol=1e-10)


def test_multiple_eigenvalues_and_a_large_null_space_are_all_found_after_an_early_end() -> None:
    exact = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 3.0, 3.0, 3.0], dtype=torch.float64)
    matrix = symmetric(exact)
    found = lanczos(lambda v: v @ matrix, torch.randn(1, 10, generator=draws(), dtype=torch.float64), steps=10)
    torch.testing.assert_close(found.ritz()[0][0], exact, rtol=0, atol=1e-12)
    assert int((found.beside[0, :9] == 0).sum()) == 3  # four blocks: as often as the most frequent value occurs, or so


def test_the_basis_stays_orthogonal_over_hundreds_of_steps_in_float32() -> None:
    exact = torch.cat(
        [torch.linspace(-1e-3, 1e-3, 290), torch.tensor([5.0, 10.0, 20.0, 30.0, 50.0, 80.0, 90.0, 95.0, 99.0, 100.0])]
    )
    matrix = symmetric(exact).float()
    found = lanczos(lambda v: v @ matrix, torch.randn(1, 300, generator=draws()), steps=200, generator=draws(1))
    assert found.basis is not None
    basis = found.basis[:, 0]
    assert float((basis @ basis.T - torch.eye(200)).abs().max()) < 1e-5
    largest = found.ritz()[0][0].flip(0)[:10]
    torch.testing.assert_close(largest, exact.double().flip(0)[:10], rtol=1e-5, atol=0)  # each once: no ghosts


def test_rows_are_independent_matrices() -> None:
    matrices = torch.stack(
        [symmetric(torch.arange(6.0) * factor, seed) for seed, factor in ((0, 1.0), (1, -2.0), (2, 0.0))]
    )
    start = torch.randn(3, 6, generator=draws(), dtype=torch.float64)
    found = lanczos(lambda v: torch.einsum("bij,bj->bi", matrices, v), start, steps=6, generator=draws(9))
    torch.testing.assert_close(found.ritz()[0], torch.linalg.eigvalsh(matrices), rtol=0, atol=1e-11)


def test_a_quadrature_rule_has_the_moments_of_its_start_up_to_twice_its_steps() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 30))
    start = torch.randn(1, 30, generator=draws(), dtype=torch.float64)
    nodes, weights = rule_of(lanczos(lambda v: v @ matrix, start, steps=5))
    unit = start[0] / start.norm()
    for order in range(10):
        exact = unit @ torch.linalg.matrix_power(matrix, order) @ unit
        assert (weights * nodes**order).sum() == pytest.approx(float(exact), rel=1e-10)
    wrong = unit @ torch.linalg.matrix_power(matrix, 10) @ unit
    assert (weights * nodes**10).sum() != pytest.approx(float(wrong), rel=1e-6)


def test_probes_that_span_everything_give_the_density_of_the_dense_hessian_exactly() -> None:
    net, (x, y) = small_net(), data(6)
    matrix = dense(net, x, y)
    exact = torch.linalg.eigvalsh(matrix).numpy()
    size = len(matrix)
    starts = torch.linalg.qr(torch.randn(size, size, generator=draws(), dtype=torch.float64)).Q
    found = spectral_density(lambda v: v @ matrix, starts, steps=size, generator=draws(2))
    for order in range(1, 6):
        assert found.moment(order) == pytest.approx(float((exact**order).mean()), rel=1e-9)
    # Away from the eigenvalues themselves, where rounding decides on which side one lies.
    gaps = np.diff(exact)
    at = (exact[:-1] + gaps / 2)[gaps > 1e-6]
    np.testing.assert_allclose(found.cdf(at), np.searchsorted(exact, at) / size, atol=1e-8)
    mass = np.abs(exact)
    assert found.negative == pytest.approx(mass[exact < 0].sum() / mass.sum(), rel=1e-6)
    assert found.beyond(0.1) == pytest.approx((mass > 0.1).mean(), abs=1e-8)


def test_a_few_random_probes_estimate_trace_and_distribution_within_their_error() -> None:
    exact = torch.cat([torch.linspace(-0.1, 0.3, 195), torch.tensor([2.0, 4.0, 6.0, 8.0, 10.0])])
    matrix = symmetric(exact)
    starts = torch.randn(20, 200, generator=draws(), dtype=torch.float64)
    found = spectral_density(lambda v: v @ matrix, starts, steps=40)
    assert found.probes == 20
    assert abs(found.moment(1) - float(exact.mean())) < 4 * found.moment_error(1)
    at = np.array([-0.05, 0.05, 0.2, 1.0, 5.0])
    np.testing.assert_allclose(found.cdf(at), [(exact.numpy() <= a).mean() for a in at], atol=0.03)
    grid = np.linspace(-2, 12, 4001)
    smooth = found.smoothed(grid, 0.05)
    assert np.trapezoid(smooth, grid) == pytest.approx(1.0, abs=1e-6)
    assert np.trapezoid(smooth * grid, grid) == pytest.approx(found.moment(1), abs=1e-6)


def test_equal_generators_give_equal_numbers_and_other_ones_do_not() -> None:
    net, (x, y) = small_net(), data()
    hessian = WeightHessian(net, x, y)
    one, two, other = (
        top_eigenpairs(hessian, hessian.start(draws(seed)), steps=3, tolerance=0).values for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_input_hessians_are_those_of_each_image_alone() -> None:
    net, (x, y) = small_net(), data(4)
    net.train().requires_grad_(False)
    hessian = InputHessian(net, x, y)
    for row in range(4):

        def loss(pixels: Tensor, row: int = row) -> Tensor:
            return F.cross_entropy(net.eval()(pixels.view(1, 1, 6, 6)), y[row : row + 1])

        exact = torch.autograd.functional.hessian(loss, x[row].flatten())
        vectors = torch.zeros(4, 36, dtype=torch.float64)
        vectors[row] = torch.randn(36, generator=draws(row), dtype=torch.float64)
        found = hessian(vectors)
        torch.testing.assert_close(found[row], exact @ vectors[row], rtol=1e-10, atol=1e-14)
        assert float(found.abs().sum() - found[row].abs().sum()) == 0.0
        slope = torch.autograd.functional.jacobian(loss, x[row].flatten())
        torch.testing.assert_close(hessian.gradient[row], slope, rtol=1e-10, atol=1e-14)


def test_a_linear_loss_has_no_curvature() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 2) + 0 * self.w

    x, y = torch.rand(3, 1, 2, 2), torch.zeros(3).long()
    hessian = WeightHessian(Flat(), x, y)
    found = lanczos(hessian, hessian.start(draws()), steps=2, generator=draws())
    assert found.ritz()[0].abs().max() == 0


def test_what_cannot_be_done_is_said() -> None:
    eye = torch.eye(3)
    with pytest.raises(UserError, match="at least 1; got 0"):
        lanczos(lambda v: v, eye[:1], steps=0)
    with pytest.raises(UserError, match="not zero"):
        lanczos(lambda v: v, torch.zeros(1, 3), steps=2)
    with pytest.raises(UserError, match="NaN or infinite"):
        lanczos(lambda v: v * float("nan"), eye[:1], steps=2)
    with pytest.raises(UserError, match=r"shape \(B, D\)"):
        lanczos(lambda v: v, torch.ones(3), steps=2)
    with pytest.raises(UserError, match="the size of the matrix, 3; got 4"):
        top_eigenpairs(lambda v: v, eye[:1], top=4)
    with pytest.raises(UserError, match="got 1 for 2"):
        top_eigenpairs(lambda v: v, eye[:1], top=2, steps=1)
    with pytest.raises(UserError, match="at least one probe"):
        spectral_density(lambda v: v, torch.zeros(0, 3))
    with pytest.raises(UserError, match="basis"):
        top_of(lanczos(lambda v: v, eye[:1], steps=2, keep=False), 1)
    with pytest.raises(UserError, match="must be"):
        Density(np.zeros((1, 2)), np.zeros((1, 3)))
    with pytest.raises(UserError, match="no parameters"):
        WeightHessian(nn.Flatten(), torch.ones(1, 2), torch.zeros(1).long())
    with pytest.raises(UserError, match="half precision"):
        WeightHessian(nn.Linear(2, 2).half(), torch.ones(1, 2), torch.zeros(1).long())
    with pytest.raises(UserError, match="needs images"):
        WeightHessian(nn.Linear(2, 2), torch.ones(0, 2), torch.zeros(0).long())
