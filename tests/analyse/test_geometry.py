import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn

from instar.analyse import analyse, capacity, open_files, open_targets, read, reweighting
from instar.analyse.draw_geometry import draw, draw_compared
from instar.analyse.geometry import attack_on, budget_of, compare, measure, principal, profile, worst_pair
from instar.analyse.spread import effective_number
from instar.analyse.target import Target
from instar.attacks import PGD
from instar.errors import UserError
from instar.report.stored import UnavailableError
from instar.report.stored import read as read_run
from instar.signals import GeometryWeight
from instar.threat import Linf

GAIRAT = "Method(PGD(steps=4), GeometryWeight(Steps(inf, changes=((0.5, -1.0),))) * CrossEntropy())"


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model


def target_of(model: nn.Module, count: int = 30, **more: Any) -> Target:
    draws = torch.Generator().manual_seed(5)
    data = 0.3 + 0.4 * torch.rand(count, 1, 2, 2, generator=draws), torch.arange(count) % 3
    return open_targets(model, data=data, eps=0.2, **more)[0]


def test_kappa_equals_a_loop_over_the_steps_of_the_attack() -> None:
    model, target = net(), target_of(net())
    found = measure(target, steps=7, step_size=0.03)
    with target.examined() as subject:
        del subject
        (portion,) = target.portions()
    # The generator of the portion that `piecewise` makes.
    from instar.randomness import generator

    draws = generator(0, step=0, purpose="analyse geometry")
    x, y = portion.x, portion.y
    at = Linf(0.2).project(x + Linf(0.2).sample(x, draws), x)
    kappa = torch.zeros(len(y), dtype=torch.long)
    for _ in range(7):
        at.requires_grad_()
        logits = model(at)
        kappa += logits.argmax(1) == y
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, y), at)
        at = torch.minimum(torch.maximum(at.detach() + 0.03 * slope.sign(), x - 0.2), x + 0.2).clamp(0, 1)
    assert int(((kappa > 0) & (kappa < 7)).sum()) > 0  # some are between
    assert found.tables["instances"]["kappa"].tolist() == kappa.tolist()
    assert found.tables["kappa"]["count"].tolist() == torch.bincount(kappa, minlength=8).tolist()
    assert found.figures["guarded"] == pytest.approx(float((kappa == 7).float().mean()))
    assert found.figures["attackable"] == pytest.approx(float((kappa == 0).float().mean()))
    assert found.figures["mean_kappa"] == pytest.approx(float(kappa.float().mean()))
    loss = F.cross_entropy(model(at), y, reduction="none").detach()
    np.testing.assert_allclose(found.tables["instances"]["adversarial_loss"], loss, rtol=1e-5)


def test_curves_of_the_loss_are_those_of_direct_evaluation_to_1e_12() -> None:
    model = net().double()
    x = torch.rand(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    along = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, reach = torch.tensor([0, 1, 2, 0]), np.array([-0.3, 0.0, 0.2])
    found = profile(model, x, y, along=along, distances=reach)
    for k in range(4):
        for j, t in enumerate(reach):
            two = [F.cross_entropy(model(x[k : k + 1] + s * along[k]), y[k : k + 1]).detach() for s in (float(t), 0.0)]
            assert float(found[k, j]) == pytest.approx(float(two[0] - two[1]), abs=1e-12)


def test_friendly_points_are_no_farther_uphill_than_the_most_adversarial_ones() -> None:
    found = measure(target_of(net()))
    flat, rows = found.tables["flatness"], found.tables["instances"]
    centre = flat["distance"] == 0
    assert not flat["mean"][centre].any()
    uphill = (flat["direction"] == "uphill") & (flat["distance"] > 0)
    assert (flat["mean"][uphill] > 0).all()
    assert (flat["low"] <= flat["high"]).all()
    # Where no iterate is misclassified, both points are the last iterate.
    guarded = rows["kappa"] == 10
    assert guarded.any()
    assert not guarded.all()
    np.testing.assert_allclose(rows["slope_friendly"][guarded], rows["slope_adversarial"][guarded], rtol=1e-5)
    assert (rows["slope_friendly"][~guarded] != rows["slope_adversarial"][~guarded]).any()


def test_projection_is_that_of_scikit_learn_up_to_signs() -> None:
    values = np.random.default_rng(0).normal(size=(40, 5)) @ np.diag([5.0, 3.0, 1.0, 0.5, 0.1])
    places, shares = principal(values)
    theirs = PCA(2).fit(values)
    np.testing.assert_allclose(np.abs(places), np.abs(theirs.transform(values)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shares, theirs.explained_variance_ratio_, rtol=1e-9)
    flat, none = principal(np.ones((3, 1)))
    assert flat.shape == (3, 2)
    assert not flat.any()
    assert none.tolist() == [0.0, 0.0]


def test_the_pair_told_apart_worst_counts_both_ways_and_not_the_diagonal() -> None:
    assert worst_pair(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 0, 1, 2, 2])) == (0, 1)
    assert worst_pair(np.array([0, 1]), np.array([0, 1])) == (0, 1)
    found = measure(target_of(net()), classes=(0, 2))
    placed = np.isfinite(found.tables["instances"]["pair_x"])
    assert set(found.tables["instances"]["label"][placed]) == {0, 2}
    with pytest.raises(UserError, match=r"two different ones of 0\.\.2"):
        measure(target_of(net()), classes=(1, 1))


def test_the_budget_is_that_of_training_unless_it_was_for_another_ball(trained: Path) -> None:
    one, *_ = open_targets(trained, n=5)
    assert one.run is not None
    assert budget_of(one) == (2, one.run.method.attack.step_size)  # type: ignore[union-attr]
    other, *_ = open_targets(trained, n=5, eps=0.01)
    assert budget_of(other) == (10, None)
    assert budget_of(target_of(net())) == (10, None)
    assert attack_on(Linf(0.2)) == PGD(Linf(0.2), steps=10, step_size=0.05)
    with pytest.raises(UserError, match="at least 1"):
        attack_on(Linf(0.2), steps=0)


def test_features_are_what_goes_into_the_head(trained: Path) -> None:
    target, *_ = open_targets(trained, n=20, checkpoint="best")
    with target.examined() as subject, torch.no_grad():
        (portion,) = target.portions()
        features = subject.model.features(portion.x).numpy()
    rows = measure(target).tables["instances"]
    np.testing.assert_allclose(np.stack([rows["x"], rows["y"]], 1), principal(features)[0], rtol=1e-3, atol=1e-3)


def test_stored_results_are_drawn_and_put_side_by_side(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(5)
    data: tuple[Tensor, Tensor] = (torch.rand(30, 1, 2, 2, generator=draws), torch.arange(30) % 3)
    found = [
        read(analyse(net(seed), data=data, eps=0.1, only=["geometry"], out=tmp_path / str(seed))[0].path)  # type: ignore[union-attr, arg-type]
        for seed in (0, 1)
    ]
    pictures = draw(found[0])
    assert f"{100 * found[0].figures['guarded']:.1f}" in pictures["kappa"].get_suptitle()
    bars = next(axes for axes in pictures["kappa"].axes if axes.get_label() == "kappa").patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], found[0].tables["kappa"]["count"] / 30)
    both = compare(found)
    assert both.tables["members"]["guarded"].tolist() == [one.figures["guarded"] for one in found]
    assert list(draw_compared(both)) == ["geometry"]
    with pytest.raises(UnavailableError, match="one checkpoint only"):
        compare(found[:1])


def test_a_broken_model_and_no_points_are_one_clear_line() -> None:
    broken = net()
    broken[3].bias.data[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        measure(target_of(broken))
    with pytest.raises(UserError, match="points must be at least 1"):
        measure(target_of(net()), points=0)


# Reweighting, from instance tables.


def kappa_run(write_run: Callable[..., Path], folder: Path, *kappa: list[int], method: str = GAIRAT) -> Path:
    tables = [{"correct": np.ones(len(values), int), "kappa": values} for values in kappa]
    run = write_run(folder, robust=[0.1] * len(kappa), tables=tables)
    config = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(config | {"recipe": "gairat", "method": method}))
    return run


def test_effective_share_and_half_are_those_of_the_weights_written_out() -> None:
    counts, weights = np.array([2, 0, 3, 5]), np.array([4.0, 9.0, 1.0, 0.2])
    every = np.repeat(weights, counts)
    assert reweighting.effective_share(weights, counts) == pytest.approx(every.sum() ** 2 / (10 * (every**2).sum()))
    assert reweighting.effective_share(weights, counts) == pytest.approx(effective_number(every) / 10)
    # Total 4+4+1+1+1+1 = 12; half, 6, lies on one and a half of the two heaviest of ten.
    assert reweighting.half_share(weights, counts) == pytest.approx(0.15)
    assert math.isnan(reweighting.effective_share(np.zeros(2), np.array([1, 1])))


def test_weights_by_kappa_are_those_that_training_gives_a_batch_of_all_images() -> None:
    from instar.evidence import Evidence

    kappa = torch.tensor([0, 0, 1, 3, 10, 10, 10])
    counts = np.bincount(kappa.numpy(), minlength=11)
    for shape in (*reweighting.SHAPES.values(), GeometryWeight(math.inf), GeometryWeight(-4.0)):
        batch = Evidence(x=torch.zeros(7, 1, 1, 1), y=torch.zeros(7).long(), kappa=kappa, budget=10)
        found = reweighting.weights_by_kappa(shape, counts, 10)
        np.testing.assert_allclose(found[kappa.numpy()], shape(batch).numpy(), rtol=1e-5)
        assert found @ counts / 7 == pytest.approx(1.0)
    alone = np.zeros(11, int)
    alone[10] = 4
    assert reweighting.weights_by_kappa(GeometryWeight(-1000.0), alone, 10)[10] == pytest.approx(1.0)


def test_a_run_of_gairat_shows_its_own_weights_which_are_equal_until_the_burn_in_ends(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = kappa_run(write_run, tmp_path / "a", [0, 1, 2, 4], [0, 0, 4, 4], [0, 4, 4, 4], [0, 4, 4, 4])
    found = reweighting.measure(open_files(run))
    epochs, weights = found.tables["epochs"], found.tables["weights"]
    assert epochs["mean"].tolist() == [1.75, 2.0, 3.0, 3.0]
    assert epochs["median"].tolist() == [1.0, 0.0, 4.0, 4.0]
    assert epochs["guarded"].tolist() == [0.25, 0.5, 0.75, 0.75]
    assert epochs["attackable"].tolist() == [0.25, 0.5, 0.25, 0.25]
    own = {name: column[weights["shape"] == "this run"] for name, column in weights.items()}
    assert own["effective"][:2].tolist() == [1.0, 1.0]
    assert own["effective"][2] == pytest.approx(0.25, abs=1e-4)  # one image carries all but everything
    assert own["attackable"][3] == pytest.approx(1.0, abs=1e-4)
    assert own["largest"][3] == pytest.approx(4.0, abs=1e-3)
    tried = weights["shape"] == "tanh, λ = −1"
    np.testing.assert_allclose(weights["effective"][tried][2:], own["effective"][2:])
    assert reweighting.weight_of(read_run(run), 3) == GeometryWeight(-1.0)
    assert "25.0" in found.summary


def test_a_run_without_weights_shows_what_published_ones_would_do(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = kappa_run(write_run, tmp_path / "a", [0, 1, 4, 4], method="Method(PGD(steps=4), CrossEntropy())")
    other = kappa_run(write_run, tmp_path / "b", [4, 4, 4, 4], method="Method(PGD(steps=4), CrossEntropy())")
    found = [reweighting.measure(open_files(folder)).write(tmp_path / folder.name / "out") for folder in (run, other)]
    assert set(found[0].tables["weights"]["shape"]) == set(reweighting.SHAPES)
    again = [read(one.path) for one in found]  # type: ignore[arg-type]
    assert list(again[0].draw()) == ["kappa", "weights"]
    assert "does not weigh" in again[0].draw()["weights"].texts[-2].get_text().replace("\n", " ")
    both = reweighting.compare(again)
    assert both.figures["guarded_difference"] == pytest.approx(0.5)
    assert list(both.draw()) == ["kappa"]
    with pytest.raises(UnavailableError, match="one run only"):
        reweighting.compare(again[:1])


def test_a_run_without_tables_says_so(write_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no instance table"):
        reweighting.measure(open_files(write_run(tmp_path / "a")))


# Capacity, from logs.


def test_errors_are_those_of_the_log_and_runs_are_ordered_by_radius_and_size(
    write_run: Callable[..., Path], tmp_path: Path
) -> None:
    folders = []
    for name, eps, size, robust in (("a", "16/255", 10, 0.2), ("b", "8/255", 20, 0.6), ("c", "8/255", 10, 0.4)):
        run = write_run(tmp_path / name, robust=[0.1, robust - 0.05], training=[0.15, robust])
        config = json.loads((run / "run.json").read_text())
        config["threat"]["eps"], config["model"]["parameters"] = eps, size
        (run / "run.json").write_text(json.dumps(config))
        folders.append(run)
    found = [capacity.measure(open_files(run)).write(tmp_path / run.name / "out") for run in folders]
    assert found[0].tables["epochs"]["train_adversarial"].tolist() == pytest.approx([0.85, 0.8])
    assert found[0].tables["epochs"]["held_out_natural"].tolist() == [0.5, 0.5]
    assert found[0].figures["gap"] == pytest.approx(0.05)
    both = capacity.compare([read(one.path) for one in found])  # type: ignore[arg-type]
    assert both.tables["members"]["eps"].tolist() == pytest.approx([8 / 255, 8 / 255, 16 / 255])
    assert both.tables["members"]["parameters"].tolist() == [10, 20, 10]
    assert both.figures["difference"] == pytest.approx(0.4)
    picture = both.draw()["errors"]
    assert "from 40.0" in picture.get_suptitle().replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")
    training = next(axes for axes in picture.axes if axes.get_label() == "training")
    assert [line.get_ydata()[-1] for line in training.lines] == pytest.approx([0.6, 0.4, 0.8])
    assert list(found[0].draw()) == ["errors"]
    with pytest.raises(UnavailableError, match="one run only"):
        capacity.compare(found[:1])


def test_a_run_that_has_just_begun_has_no_errors_yet(write_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no finished epoch"):
        capacity.measure(open_files(write_run(tmp_path / "a", robust=[])))
