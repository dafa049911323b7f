"""Linear models, whose most harmful perturbation is known: every attack of a suite must reach exactly that verdict."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from instar.attacks import PGD
from instar.evaluate import AutoAttack, Entry, Suite, evaluate, fgsm, margin_pgd, pgd
from instar.evaluate.examine import withstands
from instar.evaluate.subject import Subject
from instar.evidence import Batch
from instar.threat import L1, Ball, Linf


def linear_task() -> tuple[nn.Module, Tensor, Tensor]:
    """Two classes on 6×6 images, far enough from 0 and 1 that the box never matters."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    x = 0.4 + 0.2 * torch.rand(60, 1, 6, 6)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)
        y = net(x).argmax(1)
    return net, x, y


def distances(net: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """How far each point is from the boundary: its lead divided by the dual norm of the difference of the two rows."""
    with torch.no_grad():
        logits = net(x)
        lead = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
        difference = net[1].weight[0] - net[1].weight[1]
    dual = {"Linf": 1, "L2": 2, "L1": float("inf")}[norm]
    return lead.flatten() / torch.linalg.vector_norm(difference, dual)


def halfway(found: Tensor) -> float:
    """A radius that half of the points withstand, between two of their distances."""
    ranked = found.sort().values
    return float(ranked[len(found) // 2 - 1 : len(found) // 2 + 1].mean())


def everything(ball: Ball) -> Suite:
    few = AutoAttack(ball, steps=20, queries=20)
    entries = [fgsm(ball), pgd(ball, steps=10), pgd(ball, steps=20), margin_pgd(ball, steps=100)]
    return Suite("everything", (*entries, Entry("few", "AutoAttack with few steps", few)))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_attack_reaches_the_known_optimum(norm: str) -> None:
    net, x, y = linear_task()
    found = distances(net, x, y, norm)
    eps = halfway(found)
    expected = found > eps
    (record,) = evaluate(net, data=(x, y), suite=everything, norm=norm, eps=eps)
    # Descent in l2 approaches the optimum geometrically from its random start: no verdict within 1 % of the radius.
    clear = ((found - eps).abs() > 0.01 * eps).numpy()
    assert clear.sum() > 50
    for name in ("fgsm", "pgd_10", "pgd_20", "margin_pgd_100", "few", "worst_case"):
        assert (record.instances[name].astype(bool) == expected.numpy())[clear].all(), name


def test_steps_along_one_coordinate_reach_the_l1_optimum() -> None:
    net, x, y = linear_task()
    found = distances(net, x, y, "L1")
    eps = halfway(found)
    expected = found > eps

    def steepest(ball: Ball) -> Suite:
        # One coordinate at a time is exact here; entries of the suites share a step among several.
        entry = margin_pgd(ball, steps=20)
        attack = entry.attack
        assert isinstance(attack, PGD)
        return Suite("steepest", (dataclasses.replace(entry, attack=dataclasses.replace(attack, ball=L1(eps))),))

    (record,) = evaluate(net, data=(x, y), suite=steepest, norm="L1", eps=eps)
    assert record.instances["worst_case"].astype(bool).tolist() == expected.tolist()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_with_eps_zero_robust_accuracy_is_clean_accuracy(norm: str) -> None:
    net, x, y = linear_task()
    y = torch.where(torch.arange(60) < 5, 1 - y, y)
    (record,) = evaluate(net, data=(x, y), norm=norm, eps=0)
    assert {score.correct for score in record.scores.values()} == {55}


def test_a_stronger_threat_never_leaves_more_points_standing() -> None:
    net, x, y = linear_task()
    counts = [
        evaluate(net, data=(x, y), suite="quick", eps=eps)[0].scores["worst_case"].correct
        for eps in (0.0, 0.01, 0.02, 0.04, 0.3)
    ]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (60, 0)


def test_saturated_logits_mislead_cross_entropy_and_are_called_suspect() -> None:
    """With logits 10⁵ times as large the softmax of float32 is exactly one-hot, and cross-entropy has no gradient."""

    class Scaled(nn.Module):
        def __init__(self, net: nn.Module, scale: float) -> None:
            super().__init__()
            self.net, self.scale = net, scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    net, x, y = linear_task()
    eps = halfway(distances(net, x, y, "Linf"))
    expected = distances(net, x, y, "Linf") > eps
    (record,) = evaluate(Scaled(net, 1e5), data=(x, y), suite="quick", eps=eps)
    assert record.instances["margin_pgd_20"].astype(bool).tolist() == expected.tolist()
    assert record.scores["pgd_10"].correct > expected.sum()
    assert record.suspect
    assert [finding.verdict for finding in record.findings if finding.check == "pgd_minus_margin"] == ["suspect"]
    (sound,) = evaluate(Scaled(net, 1), data=(x, y), suite="quick", eps=eps)
    assert not sound.suspect


def test_points_broken_only_in_between_count_as_broken() -> None:
    """An attack that overshoots: the middle of its path is misclassified, its last iterate is not."""

    class Ridge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = x.flatten(1).mean(1)
            wrong = 0.02 - (value - 0.55).abs()  # class 1 only on a narrow strip that PGD steps across
            return torch.stack([torch.zeros_like(wrong), wrong + 10 * (value - 0.5).clamp_max(0)], 1)

    x = torch.full((4, 1, 2, 2), 0.5)
    y = torch.zeros(4, dtype=torch.int64)
    overshoot = partial(Suite, "overshoot")
    attack = PGD(Linf(0.1), steps=3, step_size=0.045)
    (record,) = evaluate(
        Ridge(), data=(x, y), suite=lambda ball: overshoot((Entry("pgd_3", "PGD-3", attack),)), eps=0.1
    )
    assert record.scores["clean"].correct == 4
    assert record.scores["pgd_3"].correct == 0


def test_what_only_the_stand_in_gets_wrong_is_attacked_again_on_the_model_itself() -> None:
    net, x, y = linear_task()
    eps = halfway(distances(net, x, y, "Linf"))
    expected = distances(net, x, y, "Linf") > eps

    class WrongEverywhere(nn.Module):
        """What rounding can do to a point on the boundary, done to all of them."""

        def forward(self, images: Tensor) -> Tensor:
            return -net(images)

    subject = Subject(net.eval(), WrongEverywhere(), classes=2, device=torch.device("cpu"))
    attack = margin_pgd(Linf(eps), steps=20).attack
    assert isinstance(attack, PGD)
    found = withstands(attack, subject, Batch(x, y), torch.Generator().manual_seed(0))
    assert found.tolist() == expected.tolist()
