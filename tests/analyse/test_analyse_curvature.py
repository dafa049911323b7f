import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.analyse import analyse, open_targets, read
from instar.analyse.curvature import attack_on, compare, fewer, input_curvature, linearity, measure
from instar.analyse.draw_curvature import draw, draw_compared
from instar.analyse.hessian import Layout
from instar.analyse.target import Target
from instar.errors import UserError
from instar.evidence import Batch
from instar.randomness import generator
from instar.report.stored import UnavailableError
from instar.threat import L2, Linf

SMALL = {"steps": 12, "top": 3, "input_steps": 4}


def net(seed: int = 0, kind: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), kind(), nn.Linear(3, 3))


def pairs(count: int = 20) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return 0.2 + 0.6 * torch.rand(count, 1, 2, 2, generator=draws), torch.arange(count) % 3


def target_of(model: nn.Module, out: Path | None = None, **more: object) -> Target:
    return open_targets(model, data=pairs(), eps=0.1, which="train", out=out, **more)[0]  # type: ignore[arg-type]


def dense(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    wide = copy.deepcopy(model).double()
    layout = Layout.of(dict(wide.named_parameters()))

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(wide, layout.split(flat), (x.double(),)), y)

    flat = layout.join({name: p.detach() for name, p in wide.named_parameters()})
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).numpy()


def attacked(model: nn.Module, radius: float) -> tuple[Tensor, Tensor]:
    x, y = pairs()
    if radius == 0:
        return x, y
    draws = generator(0, step=0, purpose="curvature attack")
    return attack_on(Linf(0.1 * radius))(model, Batch(x, y), generator=draws).x, y


@pytest.mark.parametrize("radius", [0.0, 1.0, 2.0])
def test_eigenvalues_at_every_radius_are_those_of_the_dense_hessian_at_the_attacked_images(radius: float) -> None:
    model = net()
    exact = dense(model, *attacked(model, radius))
    found = measure(target_of(model), radii=(0.0, 1.0, 2.0), steps=27, top=4, probes=1, instances=False, chunk=7)
    rows = found.tables["top"]["radius"] == radius
    np.testing.assert_allclose(found.tables["top"]["value"][rows], exact[::-1][:4], rtol=2e-5, atol=2e-6)
    row = int(np.flatnonzero(found.tables["radii"]["radius"] == radius)[0])
    assert found.tables["radii"]["largest"][row] == pytest.approx(exact[-1], rel=1e-5)
    assert found.tables["radii"]["smallest"][row] == pytest.approx(exact[0], abs=1e-5)
    x, y = attacked(model, radius)
    assert found.tables["radii"]["loss"][row] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)
    assert found.tables["radii"]["eps"][row] == pytest.approx(0.1 * radius)
    loss = F.cross_entropy(model(x), y)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    assert found.tables["radii"]["gradient"][row] == pytest.approx(float(slope), rel=1e-4)


def test_the_density_has_the_trace_of_the_dense_hessian_within_its_error() -> None:
    model = net()
    exact = dense(model, *attacked(model, 1.0))
    found = measure(target_of(model), radii=(1.0,), steps=27, top=1, probes=25, instances=False)
    row = {name: column[0] for name, column in found.tables["radii"].items()}
    assert abs(row["mean_eigenvalue"] - exact.mean()) < 4 * row["mean_eigenvalue_error"]
    assert row["mean_eigenvalue_error"] < 0.3 * exact.mean()
    assert len(np.unique(found.tables["spectrum"]["probe"])) == 25


def test_curvature_of_an_instance_in_the_weights_is_that_of_its_own_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))  # whose Hessian is its Gauss-Newton matrix
    rows = measure(target_of(linear), **SMALL).tables["instances"]
    x, y = pairs()
    for k in range(0, 20, 6):
        assert rows["clean_curvature"][k] == pytest.approx(dense(linear, x[k : k + 1], y[k : k + 1])[-1], rel=1e-5)
    assert (rows["curvature"] != rows["clean_curvature"]).any()


def test_columns_of_instances_do_not_depend_on_chunks_and_lie_beside_their_images() -> None:
    model = net()
    one, other = (measure(target_of(model), chunk=chunk, **SMALL).tables["instances"] for chunk in (64, 1))
    x, y = pairs()
    assert one["index"].tolist() == list(range(20))
    np.testing.assert_allclose(one["loss"], F.cross_entropy(model(x), y, reduction="none").detach(), rtol=1e-5)
    exact = [_dense_in_pixels(model, x[k], y[k]) for k in range(20)]
    np.testing.assert_allclose(one["largest"], [values[-1] for values in exact], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one["smallest"], [values[0] for values in exact], rtol=1e-4, atol=1e-6)
    # What is drawn at random depends on how many are drawn at once; what is not, does not.
    for name in ("loss", "correct", "clean_curvature", "largest", "smallest", "slope", "bend"):
        np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=1e-6)
    assert (one["adversarial_loss"] > one["loss"]).all()


def _dense_in_pixels(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    wide = copy.deepcopy(model).double()

    def loss(pixels: Tensor) -> Tensor:
        return F.cross_entropy(wide(pixels.view(1, 1, 2, 2)), y[None])

    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, x.double().flatten())).numpy()


def test_input_curvature_of_a_logistic_model_is_its_closed_form() -> None:
    w = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    model[1].weight.data = torch.stack([w / 2, -w / 2])  # logits differ by wᵀx
    x = torch.rand(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(x.flatten(1) @ w)
    found = input_curvature(model, x, torch.zeros(6).long(), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, p * (1 - p) * w.square().sum(), rtol=1e-8, atol=0)


def test_input_curvature_is_the_largest_eigenvalue_not_the_one_of_largest_size() -> None:
    class Bowl(nn.Module):
        """Cross-entropy of class 0 of exactly ½ xᵀ diag(c) x + log 2, up to fourth order at x = 0."""

        def forward(self, x: Tensor) -> Tensor:
            c = torch.tensor([1.0, -8.0, 0.0, 0.5], dtype=x.dtype)
            height = (c * x.flatten(1).square()).sum(1) / 2
            return torch.stack([-height, height], dim=1)

    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    found = input_curvature(Bowl(), x, torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0))
    # d CE / d height = 1 at 0 for class 0, −1 for class 1, whose bowl is upside down.
    torch.testing.assert_close(found, torch.tensor([1.0, 8.0], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.1)])
def test_a_linear_loss_is_its_tangent_and_a_quadratic_one_leaves_it_by_its_closed_form(ball: Linf | L2) -> None:
    class Quadratic(nn.Module):
        """Cross-entropy of class 0 equal to b Σ(x − ½) + a Σ(x − ½)²/2 + const, by inverting log(1 + e^−2z)."""

        def __init__(self, a: float) -> None:
            super().__init__()
            self.a = a

        def forward(self, x: Tensor) -> Tensor:
            at = x.flatten(1) - 0.5
            loss = 2.0 + 0.5 * at.sum(1) + self.a * at.square().sum(1) / 2
            z = -0.5 * torch.log(torch.expm1(loss))
            return torch.stack([z, -z], dim=1)

    x, y = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(3).long()

    def look(a: float) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        return linearity(Quadratic(a), x, y, ball=ball, steps=20, generator=draws)

    flat = look(0.0)
    assert float(flat["nonlinearity"].max()) < 1e-12
    assert float(flat["bend"].max()) < 1e-12
    torch.testing.assert_close(flat["alignment"], torch.ones(3, dtype=torch.float64))
    bent = look(3.0)
    most = 4 * 0.1**2 if ball.norm == "Linf" else 0.1**2  # the largest ‖δ‖² in the ball
    torch.testing.assert_close(
        bent["nonlinearity"], torch.full((3,), 3.0 * most / 2, dtype=torch.float64), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(bent["bend"], torch.full((3,), 3.0, dtype=torch.float64), rtol=1e-9, atol=0)
    assert bool((bent["alignment"] < 1).all())


def test_a_gradient_of_zero_has_no_direction_and_no_error() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 2) + 0 * x.flatten(1).sum(1, keepdim=True)

    found = linearity(Constant(), torch.full((2, 1, 2, 2), 0.5), torch.zeros(2).long(), ball=Linf(0.1))
    assert {name: values.tolist() for name, values in found.items()} == {
        "nonlinearity": [0.0, 0.0],
        "bend": [0.0, 0.0],
        "alignment": [0.0, 0.0],
    }


def test_an_interrupted_analysis_goes_on_with_the_probes_that_it_has(
    tmp_path: Path,
) -> None:
    model = net()
    straight = measure(target_of(model, tmp_path / "a"), **SMALL)
    called: list[str] = []

    def interrupt(what: str, done: int, total: int) -> None:
        called.append(what)
        if what.endswith("probe 2 of 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(target_of(model, tmp_path / "b", tick=interrupt), **SMALL)
    again: list[str] = []
    found = measure(target_of(model, tmp_path / "b", tick=lambda what, *_: again.append(what)), **SMALL)
    assert not any("probe 1 of 2" in what or "0 eps" in what for what in again)
    assert any("probe 2 of 2" in what for what in again)
    for name, table in straight.tables.items():
        for column, values in table.items():
            np.testing.assert_array_equal(found.tables[name][column], values, err_msg=f"{name}/{column}")


def test_fewer_images_are_the_first_ones_and_are_called_so() -> None:
    target = target_of(net())
    some = fewer(target, 5)
    assert some.split.indices.tolist() == [0, 1, 2, 3, 4]
    assert some.images.startswith("first 5 of the 20 training images")
    assert fewer(some, 3).images.startswith("first 3 of the 20 training images")
    assert fewer(target, None) is target
    assert fewer(target, 20) is target
    with pytest.raises(UserError, match="at least 1"):
        fewer(target, 0)


def test_the_command_finds_it_and_its_pictures_say_its_numbers(tmp_path: Path) -> None:
    settings = {"curvature": {"images": 12, **SMALL}}
    data = pairs()
    found = [
        analyse(
            net(seed),
            data=data,
            eps=0.1,
            split="train",
            only=["curvature"],
            settings=settings,
            out=tmp_path / str(seed),
        )[0]
        for seed in (0, 1)
    ]
    again = [read(one.path) for one in found]  # type: ignore[union-attr, arg-type]
    assert again[0].protocol["n"] == 12
    pictures = draw(again[0])
    assert list(pictures) == ["spectrum", "instances"]
    assert f"{again[0].figures['largest']:.3g}" in pictures["spectrum"].get_suptitle()
    (largest,) = [axes for axes in pictures["spectrum"].axes if axes.get_label() == "largest"]
    drawn = np.concatenate([line.get_xdata() for line in largest.lines if line.get_marker() == "o"])
    assert set(np.round(again[0].tables["top"]["value"], 9)) <= set(np.round(drawn, 9))
    both = compare(again)
    assert both.tables["members"]["largest"].tolist() == [one.figures["largest"] for one in again]
    assert len(both.tables["spectrum"]["member"]) == sum(len(one.tables["spectrum"]["radius"]) for one in again)
    ratio = max(both.tables["members"]["largest"]) / min(both.tables["members"]["largest"])
    assert f"{ratio:.1f} times" in draw_compared(both)["spectra"].get_suptitle().replace("\n", " ")
    with pytest.raises(UnavailableError, match="one checkpoint only"):
        compare(again[:1])


def test_without_instances_there_is_no_picture_of_them() -> None:
    found = measure(target_of(net()), radii=(1.0,), instances=False, **SMALL)
    assert list(draw(found)) == ["spectrum"]
    assert "largest_clean" not in found.figures


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"radii": ()}, "radii"),
        ({"radii": (-1.0,)}, "radii"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"steps": 2}, "steps must be at least top"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"images": 0}, "images must be at least 1"),
    ],
)
def test_settings_out_of_range_are_one_clear_line(setting: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        measure(target_of(net()), **setting)  # type: ignore[arg-type]


def test_linearity_needs_a_step() -> None:
    with pytest.raises(UserError, match="at least 1"):
        linearity(net(), *pairs(), ball=Linf(0.1), steps=0)
