from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.analyse import analyse, open_targets, read
from instar.analyse.curvature import attack_on
from instar.analyse.draw_landscape import draw, draw_compared, radial
from instar.analyse.hessian import weights_of
from instar.analyse.landscape import compare, filter_normalised, loss_at, measure, moved, pixel_plane, thirds
from instar.analyse.target import Target
from instar.errors import UserError
from instar.evidence import Batch
from instar.randomness import generator
from instar.report.stored import UnavailableError
from instar.threat import Linf

SMALL: dict[str, Any] = {"points": 2, "line_points": 2, "input_points": 2, "attack_steps": 3}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    model[1].running_mean.uniform_(-0.3, 0.3)
    model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


def pairs(count: int = 14) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(5)
    return 0.3 + 0.4 * torch.rand(count, 1, 3, 3, generator=draws), torch.arange(count) % 3


def target_of(model: nn.Module, out: Path | None = None, **more: Any) -> Target:
    return open_targets(model, data=pairs(), eps=0.1, out=out, **more)[0]


def directions(model: nn.Module) -> list[dict[str, Tensor]]:
    draws = [generator(0, step=k, purpose="landscape direction") for k in range(2)]
    return [filter_normalised(weights_of(model), each) for each in draws]


def test_every_filter_of_a_direction_has_the_norm_of_the_networks_own_and_the_rest_does_not_move() -> None:
    weights = weights_of(net())
    found = filter_normalised(weights, torch.Generator().manual_seed(0))
    assert list(found) == list(weights)
    for name, weight in weights.items():
        assert found[name].dtype == weight.dtype
        if weight.ndim < 2:
            assert not found[name].any()
            continue
        for own, drawn in zip(weight, found[name], strict=True):
            torch.testing.assert_close(drawn.norm(), own.norm(), rtol=1e-6, atol=0)
    # Random, not the weights again: two draws differ, and are nearly at right angles to the weights.
    other = filter_normalised(weights, torch.Generator().manual_seed(1))
    assert not torch.equal(found["4.weight"], other["4.weight"])
    again = filter_normalised(weights, torch.Generator().manual_seed(0))
    assert torch.equal(found["4.weight"], again["4.weight"])


def test_the_plane_of_weights_is_that_of_direct_evaluation_to_1e_12() -> None:
    model = net().double()
    x, y = pairs()
    x = x.double()
    kept = {name: p.clone() for name, p in model.state_dict().items()}
    both = directions(model)
    for a, b in ((0.0, 0.0), (0.5, -1.0), (-0.25, 0.75)):
        found = loss_at(model, moved(weights_of(model), [a, b], both), x, y, batch_size=4)
        direct = net().double()
        with torch.no_grad():
            for name, p in direct.named_parameters():
                p += a * both[0][name] + b * both[1][name]
        logits = direct(x).detach()
        assert found[0] == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-12)
        assert found[1] == float((logits.argmax(1) == y).double().mean())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_the_plane_of_pixels_is_that_of_direct_evaluation_to_1e_12() -> None:
    model = net().double()
    x, y = pairs(5)
    x = x.double()
    draws = torch.Generator().manual_seed(0)
    one, two = (torch.randn(x.shape, generator=draws, dtype=torch.float64) for _ in range(2))
    axis = np.array([-0.2, 0.0, 0.3])
    found = pixel_plane(model, x, y, directions=(one, two), axis=axis, batch_size=2)
    for i in range(5):
        for j, u in enumerate(axis):
            for k, w in enumerate(axis):
                at = x[i] + float(u) * one[i] + float(w) * two[i]
                exact = F.cross_entropy(model(at[None]), y[i : i + 1]).detach()
                assert found[i, j, k] == pytest.approx(float(exact), abs=1e-12)


def test_what_is_stored_is_the_loss_of_the_attacked_images_at_moved_weights() -> None:
    model = net()
    found = measure(target_of(model), **SMALL)
    x, y = pairs()
    attack = attack_on(Linf(0.1), steps=3)

    def attacked(at: nn.Module) -> Tensor:
        return attack(at, Batch(x, y), generator=generator(0, step=0, purpose="landscape attack")).x

    centre, both = attacked(model), directions(model)
    plane, line = found.tables["plane"], found.tables["line"]
    assert sorted(set(plane["a"].tolist())) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    for row in (0, 7, 12, 21):
        weights = moved(weights_of(model), [float(plane["a"][row]), float(plane["b"][row])], both)
        for name, images in (("clean", x), ("adversarial", centre)):
            loss, accuracy = loss_at(model, weights, images, y)
            assert plane[name][row] == pytest.approx(loss, rel=1e-5)
            assert plane[f"{name}_accuracy"][row] == accuracy
    for row, a in enumerate(line["a"]):
        changed = net()
        with torch.no_grad():
            for name, p in changed.named_parameters():
                p += float(a) * both[0][name]
        for name, images in (("clean", x), ("fixed", centre), ("again", attacked(changed))):
            exact = F.cross_entropy(changed(images), y).detach()
            assert line[name][row] == pytest.approx(float(exact), rel=1e-5)
    assert line["again"][2] == pytest.approx(line["fixed"][2], rel=1e-6)
    assert line["again"][0] != pytest.approx(line["fixed"][0], rel=1e-4)


def test_thirds_are_by_what_the_attack_adds_and_average_to_all() -> None:
    model = net()
    found = measure(target_of(model), **SMALL).tables["pixels"]
    x, y = pairs()
    attack = attack_on(Linf(0.1), steps=3)
    moved_to = attack(model, Batch(x, y), generator=generator(0, step=0, purpose="landscape attack")).x
    before, after = (F.cross_entropy(model(at), y, reduction="none").detach() for at in (x, moved_to))
    order = (after - before).argsort(stable=True)
    middle = (found["u"] == 0) & (found["w"] == 0)
    for name, part in zip(("least", "middle", "most"), thirds(order.numpy()), strict=True):
        assert found[name][middle][0] == pytest.approx(float(before[part].mean()), rel=1e-5)
    mixed = (5 * found["least"] + 5 * found["middle"] + 4 * found["most"]) / 14
    np.testing.assert_allclose(mixed, found["all"], rtol=1e-6)
    # Up the gradient's sign at full length: the step of FGSM.
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    end = (found["u"] == 1) & (found["w"] == 0)
    exact = F.cross_entropy(model(x + 0.1 * slope.sign()), y).detach()
    assert found["all"][end][0] == pytest.approx(float(exact), rel=1e-5)


def test_an_interrupted_analysis_goes_on_with_the_rows_that_it_has(tmp_path: Path) -> None:
    straight = measure(target_of(net(), tmp_path / "a"), **SMALL)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "landscape: plane of weights" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(target_of(net(), tmp_path / "b", tick=interrupt), **SMALL)
    rows = list((tmp_path / "b" / "parts").glob("landscape-plane-*.npz"))
    assert len(rows) == 3
    before = {path.name: path.stat().st_mtime_ns for path in rows}
    found = measure(target_of(net(), tmp_path / "b"), **SMALL)
    after = {path.name: path.stat().st_mtime_ns for path in rows}
    assert after == before
    for name, table in straight.tables.items():
        for column, values in table.items():
            np.testing.assert_array_equal(found.tables[name][column], values, err_msg=f"{name}/{column}")


def test_stored_surfaces_are_drawn_and_put_side_by_side(tmp_path: Path) -> None:
    common: dict[str, Any] = {"data": pairs(), "eps": 0.1, "split": "test", "only": ["landscape"]}
    common["settings"] = {"landscape": {**SMALL, "again": False, "images": 9}}
    made = [analyse(net(seed), out=tmp_path / str(seed), **common)[0] for seed in (0, 1)]
    found = [read(one.path) for one in made]  # type: ignore[union-attr, arg-type]
    assert found[0].protocol["n"] == 9
    assert np.isnan(found[0].tables["line"]["again"]).all()
    pictures = draw(found[0])
    assert list(pictures) == ["weights", "pixels"]
    assert f"{found[0].figures['adversarial_half']:.2f}" in pictures["weights"].get_suptitle().replace("\n", " ")
    (line,) = [axes for axes in pictures["weights"].axes if axes.get_label() == "line"]
    assert {one.get_gid() for one in line.lines} == {"fixed", "clean"}
    both = compare(found)
    rise = both.tables["members"]["adversarial_half"] - both.tables["members"]["adversarial_loss"]
    assert both.figures["largest_rise"] == pytest.approx(float(rise.max()))
    together = draw_compared(both)
    assert {axes.get_label() for axes in together["weights"].axes} == {"line", "distance"}
    assert [axes.get_label() for axes in together["planes"].axes] == ["plane 0", "plane 1"]
    highest = [float((one.tables["plane"]["adversarial"] - one.figures["adversarial_loss"]).max()) for one in found]
    assert f"up to {max(highest):.1f} nats" in together["planes"].get_suptitle().replace("\n", " ")
    with pytest.raises(UnavailableError, match="one checkpoint only"):
        compare(found[:1])


def test_rings_of_a_plane_hold_the_mean_of_their_points_and_no_corners() -> None:
    side = np.linspace(-1, 1, 41)
    a, b = (grid.ravel() for grid in np.meshgrid(side, side))
    distance, height = radial({"a": a, "b": b, "adversarial": 3 * (a**2 + b**2) + 7 * a}, bins=11)
    assert distance[0] == 0
    assert distance[-1] <= 1
    np.testing.assert_allclose(height, 3 * distance**2, atol=0.02)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"points": 0}, "points must be at least 1"),
        ({"span": 0.0}, "span must be a positive number"),
        ({"span": float("inf")}, "span must be a positive number"),
        ({"images": 0}, "images must be at least 1"),
    ],
)
def test_settings_out_of_range_are_one_clear_line(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        measure(target_of(net()), **setting)
