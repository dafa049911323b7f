"""Largest eigenvalues of loss Hessians, against dense ones in float64 and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from instar import UserError
from instar.curvature import gauss_newton_curvature, hessian_eigenvalue, last_layer_curvature, softmax_curvature

WIDE = torch.float64


class MLP(nn.Module):
    """Two smooth layers; `features` are what goes into the last one."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(5, 6), nn.Softplus())
        self.head = nn.Linear(6, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class ConvNet(nn.Module):
    """Convolution, BatchNorm, a smooth activation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.softplus(self.norm(self.conv(x))).flatten(1))


def _mlp(classes: int = 4) -> tuple[MLP, Tensor, Tensor]:
    return MLP(classes).to(WIDE).eval(), torch.rand(6, 5, dtype=WIDE) * 2, torch.arange(6) % classes


def _conv() -> tuple[ConvNet, Tensor, Tensor]:
    model = ConvNet().to(WIDE)
    x = torch.rand(6, 1, 4, 4, dtype=WIDE)
    for _ in range(20):
        model(3 * torch.rand(8, 1, 4, 4, dtype=WIDE) - 1)  # running statistics that are no batch's
    return model.eval(), x, torch.arange(6) % 3


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {"mlp": _mlp, "conv with BatchNorm": _conv}
networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def _parameters(model: nn.Module, only: str = "") -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith(only)}


def _logits_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,))


def _loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: F.cross_entropy(functional_call(model, parameters, (x,)), y)


def _flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parameters.values()])


def _named(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([p.numel() for p in like.values()])
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts, strict=True)}


def _hessian(loss_of: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]) -> Tensor:
    """The dense Hessian (P, P), by torch."""
    return torch.autograd.functional.hessian(lambda flat: loss_of(_named(flat, parameters)), _flat(parameters))


def _dense_gauss_newton(model: nn.Module, parameters: dict[str, Tensor], image: Tensor) -> Tensor:
    """Jᵀ A J (P, P) of one image, written out."""

    def logits(flat: Tensor) -> Tensor:
        return functional_call(model, _named(flat, parameters), (image[None],))[0]

    jacobian = torch.autograd.functional.jacobian(logits, _flat(parameters))
    return jacobian.T @ _covariance(logits(_flat(parameters)).softmax(0)) @ jacobian


def _covariance(p: Tensor) -> Tensor:
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def _top(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix)[..., -1]


def _dominant(matrix: Tensor) -> float:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[values.abs().argmax()])


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0)


# The softmax.


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_the_root_of_the_secular_equation_is_the_eigenvalue_of_a_dense_solver(classes: int) -> None:
    count = 2000 if classes <= 10 else 200 if classes <= 100 else 8
    # From nearly uniform to nearly one-hot.
    logits = torch.randn(count, classes, dtype=WIDE) * torch.logspace(-3, 1, count, dtype=WIDE)[:, None]
    found = softmax_curvature(logits)
    expected = _top(_covariance(logits.softmax(1)))
    large = expected > 1e-3  # a dense solver is exact to 1e-16 of the largest entry, not of the eigenvalue
    assert large.sum() > 0.8 * count
    _close(found[large], expected[large], 1e-12)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-15)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_eigenvalue_stays_below_its_three_bounds(classes: int) -> None:
    logits = 3 * torch.randn(2000, classes, dtype=WIDE)
    p = logits.softmax(1)
    found = softmax_curvature(logits)
    slack = 1 + 1e-12
    assert (found >= 0).all()
    assert (found <= 0.5).all()
    assert (found <= slack * (1 - p.square().sum(1)) + 1e-15).all()
    assert (found[:, None] <= slack * 2 * (1 - p) + 1e-15).all()


def test_two_classes_have_a_closed_form_to_the_last_digits_however_sure_the_network_is() -> None:
    distance = torch.tensor([0.0, 1e-9, 0.3, 5.0, 40.0, 200.0, 700.0], dtype=WIDE)
    found = softmax_curvature(torch.stack([distance, torch.zeros_like(distance)], 1))
    _close(found, 2 * distance.sigmoid() * (-distance).sigmoid(), 1e-14)


def test_an_almost_one_hot_distribution_keeps_its_digits() -> None:
    # p = (1 − 2q, q, q): the eigenvector (−2, 1, 1) gives 3 q (1 − 2 q) exactly.
    logits = torch.tensor([[0.0, -50.0, -50.0]], dtype=WIDE)
    q = torch.exp(torch.tensor(-50.0, dtype=WIDE))
    _close(softmax_curvature(logits), (3 * q).unsqueeze(0), 1e-13)


def test_ties_of_the_largest_probabilities_give_exactly_that_probability() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, -500.0], [7.0, -500.0, 7.0]], dtype=WIDE)
    _close(softmax_curvature(logits), logits.softmax(1).amax(1), 1e-15)
    _close(softmax_curvature(torch.zeros(1, 1000, dtype=WIDE)), torch.tensor([1e-3], dtype=WIDE), 1e-13)


@pytest.mark.parametrize("gap", [1e-16, 1e-13, 1e-9, 1e-5])
def test_near_ties_and_clusters_of_probabilities_are_solved(gap: float) -> None:
    logits = torch.randn(500, 10, dtype=WIDE)
    logits[:, 1:6] = logits[:, :1] - gap * torch.rand(500, 5, dtype=WIDE)
    _close(softmax_curvature(logits), _top(_covariance(logits.softmax(1))), 1e-12)


def test_a_one_hot_distribution_has_no_curvature_and_one_that_is_not_a_number_says_so() -> None:
    infinite = float("inf")
    logits = torch.tensor([[2000.0, 0.0, 0.0], [0.0, -infinite, -infinite], [0.0, float("nan"), 0.0], [infinite, 0, 0]])
    found = softmax_curvature(logits)
    assert found[:2].tolist() == [0.0, 0.0]
    assert found[2:].isnan().all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_are_solved_in_float64_and_returned_in_float32(kind: torch.dtype) -> None:
    logits = (4 * torch.randn(50, 10)).to(kind)
    found = softmax_curvature(logits)
    assert found.dtype == torch.float32
    assert torch.equal(found, softmax_curvature(logits.double()).float())


def test_the_softmax_curvature_ignores_a_common_shift_and_the_order_of_the_classes() -> None:
    logits = torch.randn(20, 7, dtype=WIDE)
    expected = softmax_curvature(logits)
    _close(softmax_curvature(logits + 3.5), expected, 1e-13)
    _close(softmax_curvature(logits[:, torch.randperm(7)]), expected, 1e-13)


def test_no_instances_give_no_curvatures() -> None:
    model, x, _ = _mlp()
    assert softmax_curvature(torch.zeros(0, 3)).shape == (0,)
    assert last_layer_curvature(torch.zeros(0, 3), torch.zeros(0, 5)).shape == (0,)
    assert gauss_newton_curvature(_logits_of(model), _parameters(model), x[:0]).shape == (0,)


# The last layer.


@pytest.mark.parametrize("bias", [True, False])
def test_the_last_layer_has_the_eigenvalue_of_its_dense_hessian(bias: bool) -> None:
    for classes in (2, 3, 5):
        head = nn.Linear(4, classes, bias=bias).to(WIDE)
        h = 2 * torch.randn(5, 4, dtype=WIDE)
        found = last_layer_curvature(head(h), h, bias=bias)
        for i in range(5):
            loss_of = _loss_of(head, h[i : i + 1], torch.tensor([i % classes]))
            _close(found[i], _top(_hessian(loss_of, _parameters(head))), 1e-10)


def test_logistic_regression_has_the_curvature_that_links_it_to_the_probability_gap() -> None:
    x = torch.randn(30, 4, dtype=WIDE)
    weight = torch.randn(4, dtype=WIDE)
    score = x @ weight
    psi = (-score).sigmoid() - score.sigmoid()
    logistic = x.square().sum(1) * (1 - psi.square()) / 4
    for i in range(3):
        hessian = torch.autograd.functional.hessian(lambda w, i=i: F.softplus(-(x[i] @ w)), weight)
        _close(logistic[i], _top(hessian), 1e-10)
    logits = torch.stack([score, torch.zeros_like(score)], 1)
    only_first = gauss_newton_curvature(
        lambda p, x: torch.stack([x @ p["weight"], torch.zeros_like(x[:, 0])], 1), {"weight": weight}, x
    )
    _close(only_first, logistic, 1e-10)
    # Two rows of weights, the overparametrised form of the same model, bend twice as much.
    _close(last_layer_curvature(logits, x, bias=False), 2 * logistic, 1e-12)


# Gauss-Newton.


@networks
def test_the_small_matrix_has_the_eigenvalue_of_the_dense_gauss_newton_matrix(
    network: Callable[[], tuple[nn.Module, Tensor, Tensor]],
) -> None:
    model, x, _ = network()
    parameters = _parameters(model)
    found = gauss_newton_curvature(_logits_of(model), parameters, x)
    expected = torch.stack([_top(_dense_gauss_newton(model, parameters, image)) for image in x])
    _close(found, expected, 1e-10)
    narrow = gauss_newton_curvature(
        _logits_of(model.float()), {name: p.float() for name, p in parameters.items()}, x.float()
    )
    assert narrow.dtype == torch.float32
    _close(narrow.double(), expected, 1e-5)


def test_gauss_newton_of_the_last_layer_alone_is_the_last_layers_curvature() -> None:
    model, x, _ = _mlp()
    found = gauss_newton_curvature(_logits_of(model), _parameters(model, only="head"), x)
    _close(found, last_layer_curvature(model(x), model.features(x)), 1e-12)


def test_gauss_newton_keeps_its_digits_where_the_network_is_sure() -> None:
    model, x, _ = _mlp()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([60.0, 0.0, 0.0, 0.0]))
    found = gauss_newton_curvature(_logits_of(model), _parameters(model, only="head"), x)
    assert found.max() < 1e-20
    _close(found, last_layer_curvature(model(x), model.features(x)), 1e-12)
    # In float32 too, where all of the sure network's logits share a large gradient that A removes.
    narrow = gauss_newton_curvature(_logits_of(model.float()), _parameters(model, only="head"), x.float())
    _close(narrow.double(), found, 1e-4)


def test_gauss_newton_of_a_linear_network_is_its_hessian() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(WIDE)
    x = torch.randn(4, 1, 2, 2, dtype=WIDE)
    found = gauss_newton_curvature(_logits_of(model), _parameters(model), x)
    for i in range(4):
        hessian = _hessian(_loss_of(model, x[i : i + 1], torch.tensor([i % 3])), _parameters(model))
        _close(found[i], _top(hessian), 1e-10)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_chunk_changes_no_curvature(chunk: int) -> None:
    model, x, _ = _conv()
    expected = gauss_newton_curvature(_logits_of(model), _parameters(model), x)
    _close(gauss_newton_curvature(_logits_of(model), _parameters(model), x, chunk=chunk), expected, 1e-12)


def test_the_default_chunk_keeps_the_jacobians_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = _mlp()
    parameters = _parameters(model)
    one = 4 * 8 * sum(p.numel() for p in parameters.values())  # 4 classes, float64
    calls = []

    def function(p: dict[str, Tensor], images: Tensor) -> Tensor:
        calls.append(len(images))
        return functional_call(model, p, (images,))

    monkeypatch.setattr("instar.curvature._BYTES_ON_CPU", 2 * one)
    gauss_newton_curvature(function, parameters, x)
    assert calls == [6, 1, 1, 1]  # the logits, then three chunks of two under vmap
    calls.clear()
    monkeypatch.setattr("instar.curvature._BYTES_ON_CPU", one - 1)
    gauss_newton_curvature(function, parameters, x)
    assert calls == [6, 1, 1, 1, 1, 1, 1]


def test_an_instance_that_is_not_a_number_spoils_no_other() -> None:
    model, x, _ = _mlp()
    expected = gauss_newton_curvature(_logits_of(model), _parameters(model), x)
    x[2, 0] = float("nan")
    found = gauss_newton_curvature(_logits_of(model), _parameters(model), x)
    assert found.isnan().tolist() == [False, False, True, False, False, False]
    others = [0, 1, 3, 4, 5]
    _close(found[others], expected[others], 1e-12)


# The Hessian.


def _quadratic(matrix: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda p: 0.5 * _flat(p) @ matrix @ _flat(p)


def _symmetric(values: list[float]) -> Tensor:
    rotation = torch.linalg.qr(torch.randn(len(values), len(values), dtype=WIDE))[0]
    return rotation @ torch.diag(torch.tensor(values, dtype=WIDE)) @ rotation.T


POINT = {"a": torch.zeros(2, 2, dtype=WIDE), "b": torch.ones(3, dtype=WIDE)}


def test_power_iteration_finds_the_top_eigenpair_of_a_quadratic() -> None:
    matrix = _symmetric([5.0, 3.0, 1.0, 0.0, -0.5, -1.0, -2.0])
    value, vector = hessian_eigenvalue(_quadratic(matrix), POINT, iterations=80)
    assert float(value) == pytest.approx(5.0, rel=1e-12)
    assert {name: v.shape for name, v in vector.items()} == {name: p.shape for name, p in POINT.items()}
    flat = _flat(vector)
    assert float(flat.norm()) == pytest.approx(1.0, rel=1e-14)
    torch.testing.assert_close(matrix @ flat, 5.0 * flat, rtol=0.0, atol=1e-10)


def test_without_a_shift_the_largest_magnitude_wins_and_with_one_the_largest_value() -> None:
    matrix = _symmetric([4.0, 2.0, 1.0, 0.5, 0.0, -1.0, -6.0])
    negative, _ = hessian_eigenvalue(_quadratic(matrix), POINT, iterations=100)
    assert float(negative) == pytest.approx(-6.0, rel=1e-12)
    largest, vector = hessian_eigenvalue(_quadratic(matrix), POINT, iterations=200, shift=-float(negative))
    assert float(largest) == pytest.approx(4.0, rel=1e-10)
    flat = _flat(vector)
    torch.testing.assert_close(matrix @ flat, 4.0 * flat, rtol=0.0, atol=1e-6)


@networks
def test_the_hessian_of_a_network_has_the_eigenvalues_of_the_dense_one(
    network: Callable[[], tuple[nn.Module, Tensor, Tensor]],
) -> None:
    model, x, y = network()
    parameters, loss_of = _parameters(model), _loss_of(model, x, y)
    dense = _hessian(loss_of, parameters)
    found, vector = hessian_eigenvalue(loss_of, parameters, iterations=300)
    assert float(found) == pytest.approx(_dominant(dense), rel=1e-6)
    again = float(_flat(vector) @ dense @ _flat(vector))
    assert again == pytest.approx(float(found), rel=1e-6)
    lowest = torch.linalg.eigvalsh(dense)[0]
    assert lowest < -1e-4  # softplus in front of a layer bends down somewhere: a shift has something to do
    shifted, _ = hessian_eigenvalue(loss_of, parameters, iterations=600, shift=-float(lowest))
    assert float(shifted) == pytest.approx(float(_top(dense)), rel=1e-6)
    negated, _ = hessian_eigenvalue(lambda p: -loss_of(p), parameters, iterations=300)
    assert float(negated) == pytest.approx(-float(found), rel=1e-6)


def test_one_iteration_from_a_converged_vector_keeps_what_it_had() -> None:
    model, x, y = _mlp()
    parameters, loss_of = _parameters(model), _loss_of(model, x, y)
    value, vector = hessian_eigenvalue(loss_of, parameters, iterations=300)
    cold, _ = hessian_eigenvalue(loss_of, parameters, iterations=1)
    assert abs(float(cold) / float(value) - 1) > 0.1
    scaled = {name: -1e-30 * v for name, v in vector.items()}  # only the direction of a start counts
    warm, after = hessian_eigenvalue(loss_of, parameters, iterations=1, start=scaled)
    assert float(warm) == pytest.approx(float(value), rel=1e-12)
    torch.testing.assert_close(_flat(after), -_flat(vector), rtol=0.0, atol=1e-7)


def test_repeated_calls_of_one_iteration_are_one_call_of_many() -> None:
    model, x, y = _conv()
    parameters, loss_of = _parameters(model), _loss_of(model, x, y)
    many, last = hessian_eigenvalue(loss_of, parameters, iterations=5, generator=torch.Generator().manual_seed(3))
    value, vector = hessian_eigenvalue(loss_of, parameters, iterations=1, generator=torch.Generator().manual_seed(3))
    for _ in range(4):
        value, vector = hessian_eigenvalue(loss_of, parameters, iterations=1, start=vector)
    assert float(value) == pytest.approx(float(many), rel=1e-12)
    torch.testing.assert_close(_flat(vector), _flat(last), rtol=1e-10, atol=1e-12)


def test_the_generator_decides_the_start_and_the_global_one_is_left_alone() -> None:
    model, x, y = _mlp()
    parameters, loss_of = _parameters(model), _loss_of(model, x, y)

    def draw(seed: int) -> float:
        return float(hessian_eigenvalue(loss_of, parameters, iterations=1, generator=_seeded(seed))[0])

    before = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_tolerance_stops_once_the_value_has_settled() -> None:
    matrix = 1e-3 * _symmetric([5.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])  # small: only a relative change tells
    loose, vector = hessian_eigenvalue(_quadratic(matrix), POINT, iterations=1000, tolerance=1e-2, generator=_seeded(0))
    values = [
        float(hessian_eigenvalue(_quadratic(matrix), POINT, iterations=n, generator=_seeded(0))[0])
        for n in range(1, 12)
    ]
    changes = [abs(b - a) / abs(b) for a, b in pairwise(values)]
    first = next(i for i, change in enumerate(changes) if change < 1e-2)
    assert float(loose) == values[first + 1]
    assert (matrix @ _flat(vector) - 5e-3 * _flat(vector)).norm() > 1e-12  # it did not use all of its iterations


def test_parameters_that_the_loss_ignores_are_left_out_and_flat_ones_stay() -> None:
    parameters = {"bent": torch.ones(2), "flat": torch.ones(2), "unused": torch.ones(2)}
    value, vector = hessian_eigenvalue(lambda p: 3 * p["bent"].square().sum() + p["flat"].sum(), parameters)
    assert float(value) == pytest.approx(6.0)
    assert vector.keys() == {"bent", "flat"}
    assert vector["flat"].tolist() == [0.0, 0.0]


def test_a_loss_without_curvature_has_the_value_0_and_a_direction_of_norm_1() -> None:
    value, vector = hessian_eigenvalue(lambda p: p["w"].sum(), {"w": torch.ones(3)})
    assert float(value) == 0
    assert float(vector["w"].norm()) == pytest.approx(1.0)


def test_a_sure_networks_tiny_hessian_is_not_lost_in_float32() -> None:
    value, vector = hessian_eigenvalue(
        lambda p: 0.5 * (1e-30 * p["w"].square() * torch.tensor([1.0, 0.1])).sum(), {"w": torch.ones(2)}, iterations=30
    )
    assert float(value) == pytest.approx(1e-30, rel=1e-5)
    assert vector["w"].abs().tolist() == pytest.approx([1.0, 0.0], abs=1e-5)


# All together.


@networks
def test_the_mean_hessian_bends_no_more_than_the_instances_do_on_average(
    network: Callable[[], tuple[nn.Module, Tensor, Tensor]],
) -> None:
    model, x, y = network()
    parameters = _parameters(model)
    whole, _ = hessian_eigenvalue(_loss_of(model, x, y), parameters, iterations=400, shift=1.0)
    single = [
        hessian_eigenvalue(_loss_of(model, x[i : i + 1], y[i : i + 1]), parameters, iterations=400, shift=1.0)[0]
        for i in range(len(x))
    ]
    assert float(whole) < float(torch.stack(single).mean())


def test_on_the_last_layer_all_estimators_agree() -> None:
    model, x, y = _mlp()
    head = _parameters(model, only="head")
    exact = last_layer_curvature(model(x), model.features(x))
    for i in range(len(x)):
        found, _ = hessian_eigenvalue(_loss_of(model, x[i : i + 1], y[i : i + 1]), head, iterations=200)
        assert float(found) == pytest.approx(float(exact[i]), rel=1e-8)


@pytest.mark.parametrize("surroundings", ["no_grad", "autocast"])
def test_surroundings_change_no_curvature(surroundings: str) -> None:
    model, x, y = _conv()
    model, x = model.float(), x.float()
    logits, features = torch.randn(6, 4), torch.randn(6, 5)

    def all_of_them() -> list[Tensor]:
        value, vector = hessian_eigenvalue(_loss_of(model, x, y), _parameters(model), generator=_seeded(0))
        return [
            softmax_curvature(logits),
            last_layer_curvature(logits, features),
            gauss_newton_curvature(_logits_of(model), _parameters(model), x),
            value,
            _flat(vector),
        ]

    expected = all_of_them()
    context = torch.no_grad() if surroundings == "no_grad" else torch.autocast("cpu", torch.bfloat16)
    with context:
        found = all_of_them()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_nothing_of_the_network_changes_and_no_result_carries_a_graph() -> None:
    model, x, y = _conv()
    model.head.train()  # a mixture that has to survive
    modes = [module.training for module in model.modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    trainable = dict(model.named_parameters())
    results = [
        softmax_curvature(model(x)),
        last_layer_curvature(model(x), x.flatten(1).requires_grad_()),
        gauss_newton_curvature(_logits_of(model), {"conv.weight": trainable["conv.weight"]}, x),
    ]
    value, vector = hessian_eigenvalue(_loss_of(model, x, y), trainable)
    plain = _parameters(model)
    hessian_eigenvalue(_loss_of(model, x, y), plain)
    assert not any(p.requires_grad for p in plain.values())
    assert not any(t.requires_grad for t in (*results, value, *vector.values()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


HALF = {"w": torch.ones(2, dtype=torch.bfloat16)}
ONE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax_curvature(torch.zeros(3)), r"of shape \(B, K\)"),
        (lambda: softmax_curvature(torch.zeros(3, 1)), "at least two classes"),
        (lambda: softmax_curvature(torch.zeros(3, 2, dtype=torch.long)), "floating point"),
        (lambda: last_layer_curvature(torch.zeros(3, 2), torch.zeros(2, 4)), r"of shape \(3, D\)"),
        (lambda: last_layer_curvature(torch.zeros(3, 2), torch.zeros(3, 4, 1, 1)), r"of shape \(3, D\)"),
        (lambda: gauss_newton_curvature(lambda p, x: x, {}, torch.zeros(1, 2)), "at least one tensor"),
        (lambda: gauss_newton_curvature(lambda p, x: x, HALF, torch.zeros(1, 2)), "float32 or float64"),
        (lambda: gauss_newton_curvature(lambda p, x: x, ONE, torch.zeros(1, 2), chunk=0), "at least 1 instance"),
        (lambda: gauss_newton_curvature(lambda p, x: x[0], ONE, torch.zeros(1, 2)), r"of shape \(B, K\)"),
        (lambda: gauss_newton_curvature(lambda p, x: x[:1], ONE, torch.zeros(2, 2)), "one row of logits an image"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), {}), "at least one tensor"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), HALF), "noise"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, iterations=0), "at least 1"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, tolerance=0.0), "above 0"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, shift=float("nan")), "finite"),
        (lambda: hessian_eigenvalue(lambda p: p["w"], ONE), "mean"),
        (lambda: hessian_eigenvalue(lambda p: torch.zeros(()), ONE), "depend on the parameters"),
        (lambda: hessian_eigenvalue(lambda p: torch.ones((), requires_grad=True) * 2, ONE), "functional_call"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, start={}), "missing"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, start={**ONE, "v": torch.ones(1)}), "unknown"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, start={"w": torch.ones(3)}), "shape"),
        (lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, start={"w": torch.zeros(2)}), "not zero"),
        (
            lambda: hessian_eigenvalue(lambda p: p["w"].sum(), ONE, start={"w": torch.tensor([1.0, float("nan")])}),
            "fin",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
