"""Every suite runs on any number of classes, says what it costs, and shares what others have computed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instar.attacks import PGD, Attack, MultiTargeted, Restarts, Square
from instar.errors import UserError
from instar.evaluate import SUITES, AutoAttack, Entry, Suite, evaluate
from instar.evaluate.adaptive import IMAGES, adaptive, sanity
from instar.evaluate.entries import auto_attack, fgsm, margin_pgd, pgd
from instar.evaluate.examine import budget
from instar.evaluate.suites import build
from instar.signals import Margin
from instar.threat import L1, L2, Ball, Linf

MakeTask = Callable[..., tuple[nn.Module, Tensor, Tensor]]


def few(ball: Ball, name: str, shape: tuple[int, int, int] = (3, 8, 8)) -> Suite:
    """A suite of the package with every attack kept and its budget cut."""
    if name == "adaptive":
        return adaptive(ball, steps=5, short=2, restarts=1, queries=5, searches=1)
    if name == "sanity":
        return sanity(ball, steps=1, queries=5)
    made = build(name, ball, shape=shape)
    return replace(made, entries=tuple(replace(entry, attack=cut(entry.attack)) for entry in made.entries))


def cut(attack: Attack | AutoAttack) -> Attack | AutoAttack:
    if isinstance(attack, AutoAttack):
        return AutoAttack(attack.ball, steps=5, queries=5, stages=attack.stages)
    if isinstance(attack, Square):
        return replace(attack, queries=5)
    return replace(attack, steps=3) if isinstance(attack, PGD) else attack


CLASSES = (2, 3, 5, 8, 10, 100)
ATTACKS = (
    "quick",
    "development",
    "standard",
    "sanity",
    "adaptive",
    "robustbench",
    "black_box",
    "multinorm",
    "eps_sweep",
)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", ATTACKS)
def test_every_suite_runs_on_any_number_of_classes(name: str, classes: int, make_task: MakeTask) -> None:
    net, x, y = make_task(classes, n=64, seed=1)
    (record,) = evaluate(net, data=(x, y), suite=partial(few, name=name), eps=0.01)
    entries = few(Linf(0.01), name).entries
    assert list(record.scores) == ["clean", *(entry.name for entry in entries), "worst_case"]
    counted = [record.instances[entry.name] for entry in entries if entry.counts]
    assert record.instances["worst_case"].tolist() == [int(all(row)) for row in zip(*counted, strict=True)]
    assert record.scores["worst_case"].correct <= min(record.scores[e.name].correct for e in entries if e.counts)
    assert record.scores["clean"].correct == 63
    assert record.verdict.word in ("sound", "suspect", "overestimated", "untested")
    for entry in entries:
        told = record.protocol["attacks"][entry.name]
        assert told["budget"]["forwards"] > 0
        assert told.get("counts", True) == entry.counts


@pytest.mark.parametrize("classes", [2, 100])
def test_corruptions_are_measured_for_any_number_of_classes(classes: int, make_task: MakeTask) -> None:
    net, x, y = make_task(classes, n=64, seed=1)

    def some(ball: Ball) -> Suite:  # one severity of each; all of them are measured elsewhere
        made = build("corruptions", ball)
        return replace(made, entries=tuple(entry for entry in made.entries if entry.name.endswith("_3")))

    (record,) = evaluate(net, data=(x, y), suite=some, eps=0.01)
    assert len(record.scores) == 15 + 2
    assert record.scores["worst_case"].correct == record.scores["clean"].correct == 63


@pytest.mark.parametrize(("suite", "title"), [("cifar10_c", "CIFAR-10"), ("cifar100_c", "CIFAR-100")])
@pytest.mark.parametrize("classes", [3, 100])
def test_published_corruptions_of_other_images_are_refused_in_one_line(
    suite: str, title: str, classes: int, make_task: MakeTask
) -> None:
    net, x, y = make_task(classes)
    with pytest.raises(UserError, match=f"the suite {suite} is of the test images of {title}; got") as told:
        evaluate(net, data=(x, y), suite=suite, eps=0.01)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("classes", CLASSES)
def test_plans_at_the_published_budget_are_complete_for_any_number_of_classes(classes: int) -> None:
    """Nine targets at most, and as many as there are other classes; what has no loss below four classes is replaced."""
    ball = Linf(8 / 255)
    targets = min(9, classes - 1)
    stages = {stage["name"]: stage for stage in budget(AutoAttack(ball), classes)["stages"]}
    assert len(stages) == 4
    assert stages["square"]["queries"] == 5000
    for name, stage in stages.items():
        if name != "square":
            assert stage["steps"] in (100, 101)
        if name.endswith("-t"):
            assert stage["targets"] == targets
    assert budget(MultiTargeted(PGD(ball, Margin(), steps=100)), classes)["targets"] == targets
    for name in ATTACKS:
        for entry in build(name, ball).entries:
            assert budget(entry.attack, classes)["forwards"] > 0, (name, entry.name)


@pytest.mark.parametrize("ball", [L2(0.1), L1(0.5)], ids=str)
@pytest.mark.parametrize("name", ["sanity", "adaptive"])
def test_the_suites_run_in_other_norms(name: str, ball: Ball, make_task: MakeTask) -> None:
    net, x, y = make_task(4, n=6)
    (record,) = evaluate(net, data=(x, y), suite=partial(few, name=name), norm=ball.norm, eps=ball.radius)
    assert record.scores["eps_0"].correct == record.scores["clean"].correct == 5
    assert record.scores["eps_box"].correct <= record.scores["worst_case"].correct


def test_suites_are_what_their_documentation_says() -> None:
    ball = Linf(8 / 255)
    assert list(SUITES)[:3] == ["quick", "development", "standard"]
    assert {"sanity", "adaptive", "robustbench"} <= set(SUITES)
    assert (build("quick", ball).forwards(10), build("development", ball).forwards(10)) == (62, 2242)
    assert build("standard", ball).forwards(10) == pytest.approx(10_000, rel=0.05)
    assert build("sanity", ball).forwards(10) == pytest.approx(2_300, rel=0.05)
    assert build("adaptive", ball).forwards(10) == pytest.approx(82_000, rel=0.05)
    assert [build(name, ball).images for name in ("standard", "sanity", "adaptive", "robustbench")] == [
        None,
        IMAGES,
        IMAGES,
        None,
    ]
    assert [entry.attack for entry in build("robustbench", ball).entries] == [AutoAttack(ball)]


def test_the_adaptive_suite_holds_the_published_minimum() -> None:
    suite = adaptive(Linf(8 / 255))
    by_name = {entry.name: entry for entry in suite.entries}
    scaled = [entry for entry in suite.entries if entry.kind == "scaled"]
    assert len(scaled) == 8
    for entry in scaled:
        assert isinstance(entry.attack, Restarts)
        assert isinstance(entry.attack.attack, PGD)
        assert (entry.attack.times, entry.attack.attack.steps) == (5, 100)
    margin = by_name["margin_pgd_100"].attack
    assert isinstance(margin, PGD)
    assert (margin.objective, margin.steps) == (Margin(), 100)
    targeted = by_name["multi_targeted"].attack
    assert isinstance(targeted, MultiTargeted)
    assert (targeted.targets, targeted.attack.steps) == (9, 100)
    assert by_name["square"].attack == Square(Linf(8 / 255), queries=20_000, restarts=3)
    assert by_name["autoattack"].attack == AutoAttack(Linf(8 / 255))
    assert "autoattack_plus" not in by_name
    assert {entry.kind for entry in suite.entries} >= {"noise", "single step", "many steps", "sweep", "unbounded"}
    assert all(entry.counts for entry in suite.entries if entry.kind in ("gradient", "scaled", "black box", "noise"))


def test_autoattack_plus_is_added_if_asked() -> None:
    entries = adaptive(Linf(8 / 255), plus=True).entries
    (plus,) = [entry for entry in entries if entry.name == "autoattack_plus"]
    assert isinstance(plus.attack, AutoAttack)
    assert plus.attack.version == "plus"


def test_a_suite_without_a_number_of_images_takes_all_and_the_user_wins(make_task: MakeTask) -> None:
    net, x, y = make_task(3, n=16)

    def some(ball: Ball) -> Suite:
        return Suite("some", (pgd(ball, steps=2),), images=7)

    def every(ball: Ball) -> Suite:
        return Suite("every", (pgd(ball, steps=2),))

    assert [evaluate(net, data=(x, y), suite=s, eps=0.01)[0].n for s in (some, every)] == [7, 16]
    assert evaluate(net, data=(x, y), suite=some, eps=0.01, n=9)[0].n == 9


def test_a_larger_suite_repeats_no_attack_of_a_smaller_one(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(4, n=8)
    evaluate(net, data=(x, y), suite=partial(few, name="sanity"), eps=0.01, out=tmp_path)

    def larger(ball: Ball) -> Suite:
        return Suite("larger", (*few(ball, "sanity").entries, margin_pgd(ball, steps=7)))

    (record,) = evaluate(net, data=(x, y), suite=larger, eps=0.01, out=tmp_path)
    assert set(record.run["reused"]) == {entry.name for entry in few(Linf(0.01), "sanity").entries}


def test_budgets_count_what_is_asked_of_the_model(make_task: MakeTask) -> None:
    """The forwards that a budget names, against those that a point which nothing breaks has cost."""

    class Certain(nn.Module):
        """Nothing changes its mind; it has gradients."""

        def __init__(self) -> None:
            super().__init__()
            self.asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += len(x)
            value = x.flatten(1).mean(1)
            return torch.stack([value + 10, value * 2, value * 3, value - 1], 1)

    from instar.evidence import Batch

    batch = Batch(torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64))
    for entry in few(Linf(0.01), "adaptive").entries:
        if isinstance(entry.attack, AutoAttack):
            continue
        net = Certain().eval()
        entry.attack(net, batch, generator=torch.Generator().manual_seed(0))
        told = budget(entry.attack, 4)["forwards"]
        # A gradient is one forward more; what is asked here are forwards alone, and the judge asks once more.
        assert net.asked <= told
        gradients = not isinstance(entry.attack, Square)
        assert told <= (2 if gradients else 1) * net.asked + 14, entry.title


def test_what_an_entry_is_can_be_told_from_its_attack() -> None:
    ball = Linf(0.1)
    assert [
        entry.kind for entry in (fgsm(ball), pgd(ball, steps=20), margin_pgd(ball, steps=5), auto_attack(ball))
    ] == [
        "single step",
        "cross-entropy",
        "margin",
        "autoattack",
    ]
    assert Entry("square", "Square", Square(ball)).kind == "black box"
    assert Entry("mine", "mine", Restarts(PGD(ball))).kind == "other"
    assert Entry("far", "far", PGD(Linf(0.5)), counts=False).kind == "other"
    assert Entry("mine", "mine", PGD(ball), role="noise").kind == "noise"


def test_unknown_suites_name_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown suite 'adaptve'"):
        build("adaptve", Linf(0.1))
