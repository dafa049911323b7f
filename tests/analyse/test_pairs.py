"""Hard class pairs: a planted pair is found, and shares, entropies and correlations are those worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instar.analyse import open_targets
from instar.analyse.analysis import Found
from instar.analyse.pairs import compare, confusion, final_layer, measure, summarise
from instar.errors import UserError

EPS = 0.04
# Directions of four classes: 0 and 1 lie close together, 2 and 3 far from everything.
DIRECTIONS = torch.tensor([[1.0, 0.1, 0.0, 0.0], [1.0, -0.1, 0.0, 0.0], [0.0, 0.0, 2.0, -1.0], [0.0, 0.0, -1.0, 2.0]])


def planted() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A linear model with one hard pair, and images of each class at a distance that the pair alone cannot keep."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        net[1].weight.copy_(8 * DIRECTIONS)
        net[1].bias.copy_(-8 * 0.41 * DIRECTIONS.sum(1))  # as if the images were centred
    y = torch.arange(80) % 4
    noise = 0.02 * torch.rand(80, 4, generator=torch.Generator().manual_seed(1))
    x = 0.4 + 0.25 * (DIRECTIONS / DIRECTIONS.norm(dim=1, keepdim=True))[y] + noise
    return net, (x.clamp(0, 1).view(80, 1, 2, 2), y)


def found_for(model: nn.Module, data: tuple[Tensor, Tensor], eps: float = EPS) -> Found:
    (target,) = open_targets(model, data=data, eps=eps)
    return measure(target)


def test_a_planted_hard_pair_is_found_and_its_similarity_explains_it() -> None:
    net, data = planted()
    found = found_for(net, data)
    figures = found.figures
    assert {int(figures["hardest_true"]), int(figures["hardest_predicted"])} == {0, 1}
    assert figures["hardest_share"] == 1.0
    shares = found.tables["pairs"]["attacked"].reshape(4, 4)
    assert shares[2, 2] == shares[3, 3] == 1.0
    assert (found.tables["instances"]["prediction"] == found.tables["instances"]["label"]).all()
    assert figures["runner_up_share"] == 1.0
    similar = found.tables["pairs"]["weights"].reshape(4, 4)
    cosine = (1 - 0.01) / (1 + 0.01)
    assert similar[0, 1] == pytest.approx(cosine, abs=1e-6)
    assert np.allclose(np.diag(similar), 1)
    # Of the pairs whose class has errors at all, the similar one is the one that is confused.
    rows = found.tables["classes"]
    assert rows["spearman_weights"][:2] == pytest.approx([1.0, 1.0])
    assert np.isnan(rows["spearman_weights"][2:]).all()  # no error: nothing to rank


def test_rows_are_shares_of_each_class() -> None:
    label = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    attacked = np.array([1, 1, 2, 0, 1, 0, 2, 2])
    clean = np.array([0, 0, 2, 0, 1, 1, 2, 2])
    pairs = confusion(label, clean, attacked, 4)
    assert pairs["attacked"].reshape(4, 4)[0].tolist() == [0.25, 0.5, 0.25, 0.0]
    assert pairs["errors"].reshape(4, 4)[0] == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert pairs["clean"].reshape(4, 4)[0].tolist() == [0.75, 0.0, 0.25, 0.0]
    assert np.isnan(pairs["attacked"].reshape(4, 4)[3]).all()
    assert np.isnan(pairs["errors"].reshape(4, 4)[2]).all()
    pairs |= {"weights": np.arange(16.0), "features": np.full(16, np.nan)}
    rows = summarise(pairs, label, clean, attacked, ["a", "b", "c", "d"])
    assert rows["top_wrong"][0] == 1
    assert rows["top_wrong_share"][0] == 0.5
    assert rows["top_wrong_of_errors"][0] == pytest.approx(2 / 3)
    assert rows["entropy"][0] == pytest.approx(1.5 * np.log(2))
    assert rows["error_entropy"][0] == pytest.approx(np.log(3) - 2 / 3 * np.log(2))
    assert rows["clean_accuracy"].tolist()[:3] == [0.75, 1.0, 1.0]
    assert rows["robust_accuracy"].tolist()[:3] == [0.25, 0.5, 1.0]
    # Row 0 off the diagonal: similarity 1 < 2 < 3, shares 0.5 > 0.25 > 0.
    assert rows["spearman_weights"][0] == pytest.approx(-1.0)
    assert rows["kendall_weights"][0] == pytest.approx(-1.0)
    assert np.isnan(rows["spearman_features"]).all()
    assert np.isnan(rows["top_wrong_share"][3])


def test_features_are_what_goes_into_the_last_layer() -> None:
    net, (x, y) = planted()
    found = found_for(net, (x, y))
    h = x.flatten(1)
    cosines = nn.functional.normalize(h, dim=1) @ nn.functional.normalize(8 * DIRECTIONS, dim=1).T
    expected = torch.stack([cosines[y == k].mean(0) for k in range(4)])
    np.testing.assert_allclose(found.tables["pairs"]["features"].reshape(4, 4), expected, atol=1e-6)


def test_a_network_without_a_last_layer_has_confusion_but_no_similarity() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x.flatten(1)[:, :3]

    x = torch.rand(30, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    found = found_for(Bare(), (x, torch.arange(30) % 3))
    assert final_layer(Bare(), 3) is None
    assert np.isnan(found.tables["pairs"]["weights"]).all()
    assert np.isnan(found.figures["spearman_features"])
    np.testing.assert_allclose(found.tables["pairs"]["attacked"].reshape(3, 3).sum(1), 1)
    assert set(found.draw()) == {"confusion"}


def test_a_stronger_attack_leaves_fewer_images_in_their_class() -> None:
    net, data = planted()
    weak, strong = (found_for(net, data, eps).figures["robust_accuracy"] for eps in (0.01, EPS))
    assert (weak, strong) == (1.0, 0.5)


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    net, data = planted()
    after, before = found_for(net, data, 0.01), found_for(net, data)
    founds = [
        replace(found, protocol={**found.protocol, "label": label, "weights_sha256": label})
        for found, label in ((before, "before"), (after, "after"))
    ]
    compared = compare(founds)
    pairs = compared.tables["pairs"]
    hard = (pairs["true"] == 0) & (pairs["predicted"] == 1)
    assert [pairs[f"attacked_{k}"][hard].item() for k in (0, 1)] == [1.0, 0.0]
    assert "100.0 % (before)".replace(" %", "\N{NO-BREAK SPACE}%") in compared.summary
    assert set(compared.draw()) == {"hardest_pairs"}
    other = replace(founds[1], protocol={**founds[1].protocol, "class_names": ["cat"]})
    with pytest.raises(UserError, match="same classes"):
        compare([founds[0], other])


def test_the_picture_names_the_hardest_pair(pictures: Callable[..., tuple[Tensor, Tensor]]) -> None:
    net, data = planted()
    found = found_for(net, data)
    figure = found.draw()["confusion"]
    true, predicted = int(found.figures["hardest_true"]), int(found.figures["hardest_predicted"])
    assert f"class {true} are taken for class {predicted}" in figure.get_suptitle().replace("\n", " ")
    (matrix,) = [axes for axes in figure.axes if axes.get_label() == "matrix"]
    written = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in matrix.texts}
    assert written[true, predicted] == "100"
    assert (2, 3) not in written
