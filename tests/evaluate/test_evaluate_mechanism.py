"""Margins before and after an attack, and what is left of each fifth of the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instar.attacks import PGD, Zero
from instar.errors import UserError
from instar.evaluate import Entry, Suite, evaluate, read
from instar.evaluate.adaptive import diagnoses
from instar.evaluate.mechanism import CRITERIA, QUANTITIES, Mechanism, criterion_of, histograms, quintiles
from instar.evidence import Batch
from instar.methods import RECIPES
from instar.report.figures import mechanism_figure
from instar.report.pictures import mechanism_plan
from instar.threat import L2, Ball, Linf

MakeTask = Callable[..., tuple[nn.Module, Tensor, Tensor]]


def suite(ball: Ball) -> Suite:
    return Suite("small", (Entry("pgd", "PGD", PGD(ball, steps=3)), *diagnoses(ball, steps=3)))


@pytest.mark.parametrize(("ball", "dual"), [(Linf(0.01), 1), (L2(0.05), 2)], ids=str)
def test_on_a_linear_model_every_quantity_is_known(ball: Ball, dual: int) -> None:
    """Two classes with logits ±w·x: the gradient of cross-entropy is −2 p_wrong w, and an attack loses ε·2‖w‖*."""
    torch.manual_seed(0)
    w = torch.randn(12)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    net[1].weight = nn.Parameter(torch.stack([w, -w]))
    x, y = 0.4 + 0.2 * torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    made = Mechanism(PGD(ball, steps=40, step_size=ball.radius / 4, start=Zero()))
    batch = Batch(x, y)
    columns = made.measure(net, batch, made(net, batch))
    sign = 1.0 - 2.0 * y
    clean = 2 * sign * (x.flatten(1) @ w)
    reach = 2 * ball.radius * torch.linalg.vector_norm(w, dual)
    torch.testing.assert_close(columns["logit_margin_clean"], clean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(columns["logit_margin_adv"], clean - reach, atol=1e-4, rtol=1e-3)
    for word, margin in (("clean", clean), ("adv", clean - reach)):
        right = torch.sigmoid(margin)
        torch.testing.assert_close(columns[f"probability_margin_{word}"], 2 * right - 1, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(columns[f"logit_norm_{word}"], margin.abs() / 2**0.5, atol=1e-4, rtol=1e-3)
        slope = 2 * (1 - right)
        torch.testing.assert_close(
            columns[f"gradient_norm_{word}"], slope * torch.linalg.vector_norm(w), atol=1e-4, rtol=1e-3
        )
    # At the start everything is still to be gained; at the optimum of a linear model nothing.
    room = 2 * (1 - torch.sigmoid(clean)) * ball.radius * torch.linalg.vector_norm(w, dual)
    torch.testing.assert_close(columns["stationarity_clean"], room, atol=1e-5, rtol=1e-3)
    assert float(columns["stationarity_adv"].max()) < 1e-3 * float(room.max())
    gap = nn.functional.softplus(reach - clean) - nn.functional.softplus(-clean)
    torch.testing.assert_close(columns["loss_gap"], gap, atol=1e-4, rtol=1e-3)


def test_fifths_are_sorted_from_the_easiest_to_the_hardest_and_count_every_image_once() -> None:
    rng = np.random.default_rng(0)
    n = 23
    rows = {criterion.column: rng.normal(size=n) for criterion in CRITERIA.values()}
    rows |= {"clean": np.ones(n, np.uint8), "worst_case": rng.integers(0, 2, n).astype(np.uint8)}
    for name, criterion in CRITERIA.items():
        found = quintiles(rows, name)
        assert [fifth.count for fifth in found] == [5, 5, 5, 4, 4]
        assert sum(fifth.robust for fifth in found) == rows["worst_case"].sum()
        hardness = [criterion.sign * end for fifth in found for end in (fifth.low, fifth.high)]
        assert hardness == sorted(hardness)
        # By hand, for the hardest.
        hardest = np.argsort(criterion.sign * rows[criterion.column])[-4:]
        assert found[-1].robust == rows["worst_case"][hardest].sum()
    assert len(quintiles({name: column[:3] for name, column in rows.items()}, "kappa")) == 3


def test_the_criterion_is_the_one_that_the_method_goes_by() -> None:
    expected = {
        "gairat": "kappa",
        "gair_trades": "kappa",
        "iseat": "vulnerability",
        "mail_at": "attacked_margin",
        "p_sat": "attacked_margin",
        "fat": "kappa",
        "mart": "initial_margin",
        "spat": "initial_margin",
        "pgd_at": "initial_margin",
        "trades": "initial_margin",
    }
    for recipe, name in expected.items():
        assert criterion_of(repr(RECIPES[recipe]()))[0] == name, recipe
    assert "alike" in criterion_of(repr(RECIPES["pgd_at"]()))[1]
    assert criterion_of("MyOwn(3)")[1] == "the method holds values that are not known here"


def test_the_record_keeps_rows_fifths_and_histograms(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(4, n=20)
    common = {"data": (x, y), "suite": suite, "eps": 0.02, "out": tmp_path, "shard_size": 8, "batch_size": 3}
    (record,) = evaluate(net, **common)
    again = read(record.path)
    for name in QUANTITIES:
        for word in ("clean", "adv"):
            column = again.instances[f"mechanism_{name}_{word}"]
            assert column.shape == (20,)
            assert np.isfinite(column).all()
    np.testing.assert_allclose(
        again.instances["mechanism_logit_margin_clean"], again.instances["clean_margin"], atol=1e-5
    )
    told = json.loads(record.path.read_text())["mechanism"]
    assert told["criterion"] == "initial_margin"
    fifths = told["quintiles"]["kappa"]["fifths"]
    assert [fifth["count"] for fifth in fifths] == [4, 4, 4, 4, 4]
    total = sum(fifth["robust"] * fifth["count"] for fifth in fifths)
    assert total == pytest.approx(record.scores["worst_case"].correct)
    drawn = told["histograms"]["logit_margin"]
    assert sum(drawn["clean"]) == sum(drawn["adversarial"]) == 20
    assert len(drawn["edges"]) == len(drawn["clean"]) + 1
    # It is no accuracy, and survives being taken over from the store.
    assert "mechanism" in record.diagnoses
    (reused,) = evaluate(net, **common)
    assert "mechanism" in reused.run["reused"]
    assert {name: column.tolist() for name, column in reused.instances.items()} == {
        name: column.tolist() for name, column in record.instances.items()
    }
    plain = evaluate(
        net,
        **{**common, "out": None},
    )[0]
    for name in ("mechanism_kappa", "mechanism_loss_gap"):
        np.testing.assert_array_equal(plain.instances[name], record.instances[name])
    with pytest.raises(UserError, match=r"or mechanism_\.\.\."):
        Entry("mechanism_x", "mine", PGD())


def test_the_figure_shows_the_fifths_and_the_margins(make_task: MakeTask) -> None:
    net, x, y = make_task(4, n=20)
    (record,) = evaluate(net, data=(x, y), suite=suite, eps=0.02)
    figure = mechanism_figure([record, record], labels=["one", "two"])
    labels = [axes.get_label() for axes in figure.axes]
    assert labels == [f"{what} {row}" for row in (0, 1) for what in ("fifths", "logit_margin", "probability_margin")]
    heights = {bar.get_gid(): bar.get_height() for bar in figure.axes[0].patches}
    found = quintiles(record.instances, "initial_margin")
    for place, fifth in enumerate(found, start=1):
        assert heights[f"robust {place}: one"] == pytest.approx(fifth.robust / fifth.count)
        assert heights[f"clean {place}: one"] == pytest.approx(fifth.clean / fifth.count)
    steps = {patch.get_gid(): patch for patch in figure.axes[1].patches if patch.get_gid()}
    counts = histograms(record.instances)["logit_margin"]
    shown = steps["adversarial: one"].get_data()
    assert len(shown.values) < len(counts["adversarial"])  # 20 images do not fill 40 bins
    for low, high, share in zip(shown.edges[:-1], shown.edges[1:], shown.values, strict=True):
        inside = [
            c for c, edge in zip(counts["adversarial"], counts["edges"], strict=False) if low <= edge < high - 1e-12
        ]
        assert share == pytest.approx(sum(inside) / 20)
    assert figure.axes[0].get_xticklabels()[0].get_text().startswith("easiest")
    assert len(mechanism_plan([("one", record)])) == 1
    (without,) = evaluate(net, data=(x, y), suite="quick", eps=0.02)
    assert mechanism_plan([("one", without)]) == []
    for records, names, words in (([without], ["one"], "run sanity"), ([], [], "1 to 6"), ([record], [], "a label")):
        with pytest.raises(UserError, match=words):
            mechanism_figure(records, labels=names)


def test_a_model_that_cuts_the_graph_has_gradients_of_zero() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.detach().flatten(1).sum(1), x.detach().flatten(1)[:, 0]], 1)

    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    made = Mechanism(PGD(Linf(0.1), steps=1))
    from instar.evidence import Adversary

    none = torch.zeros(2, dtype=torch.int32)
    columns = made.measure(Cut(), Batch(x, y), Adversary(x, none, none, none, 1))
    assert columns["gradient_norm_clean"].tolist() == [0.0, 0.0]
    assert columns["loss_gap"].tolist() == [0.0, 0.0]


def test_the_suites_sanity_and_adaptive_measure_it() -> None:
    from instar.evaluate.adaptive import adaptive, sanity

    for made in (sanity(Linf(0.1)), partial(adaptive)(Linf(0.1))):
        (entry,) = [entry for entry in made.entries if entry.name == "mechanism"]
        assert entry.everyone
        assert not entry.counts
        assert isinstance(entry.attack, Mechanism)
        assert entry.attack.attack.steps == 10
        assert entry.attack.attack.stop is None
