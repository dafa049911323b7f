"""Times that are foretold: against runs that are timed, and against passes that are counted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from instar.attacks import PGD, MultiTargeted, OutputDiversified, Restarts, Square
from instar.doctor import estimate, predict
from instar.doctor.estimate import Pace, cost
from instar.evaluate import AutoAttack, evaluate
from instar.evaluate.entries import Entry, Suite, descent
from instar.evaluate.subject import examined
from instar.evaluate.suites import development, quick, standard
from instar.signals import Margin
from instar.step import END
from instar.threat import Ball, Linf
from instar.train import train


class Clock:
    """A clock that only moves when a network works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(nn.Module):
    """A network whose passes take a known time: a fixed one, and one for each image."""

    def __init__(self, clock: Clock, *, fixed: float, each: float) -> None:
        super().__init__()
        self.clock, self.fixed, self.each = clock, fixed, each
        self.linear = nn.Linear(12, 3)
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.fixed + self.each * len(x)
        self.largest = max(self.largest, len(x))
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(("batch_size", "timed"), [(24, 24), (4000, 500)])
def test_the_pace_is_that_of_the_passes_at_the_batch_size_of_the_evaluation(
    batch_size: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(estimate, "time", clock)
    net, x = Slow(clock, fixed=0.1, each=0.001), torch.rand(8, 3, 2, 2)
    net.black_box = True  # type: ignore[assignment]  # which keeps the passes countable: no copy is attacked
    with examined(net.eval(), x, device=torch.device("cpu")) as subject:
        pace = estimate.measure(subject, x, torch.arange(8) % 3, batch_size=batch_size, seconds=6.0)
    assert pace.forward == pytest.approx(0.1 / batch_size + 0.001)
    assert net.largest == timed


def test_costs_follow_from_the_budget_of_the_attacks() -> None:
    pace = Pace(forward=0.001, both=0.003, stand_in=0.002, memory=10)
    ball = Linf(8 / 255)
    pgd = Suite("a", (Entry("pgd", "PGD", PGD(ball, steps=20)),))
    found = cost(pgd, pace, images=100, classes=10, clean=0.5, robust=0.25)
    # Clean predictions of all, then 41 forward units of half a pass each for the half that is right.
    assert found.most == pytest.approx(100 * 0.001 + 50 * 41 * 0.001)
    assert found.most == found.expected == found.least
    square = Suite("b", (Entry("square", "Square", Square(ball, queries=1000)),))
    found = cost(square, pace, images=100, classes=10, clean=0.5, robust=0.25)
    assert found.most == pytest.approx(0.1 + 50 * 1.003, rel=1e-3)
    assert found.least < found.expected < found.most
    full = cost(standard(ball), pace, images=100, classes=10, clean=0.5, robust=0.25)
    assert full.forwards == standard(ball).forwards(10) > 9_000
    assert full.least < full.expected < full.most
    sure = cost(standard(ball), pace, images=100, classes=10, clean=0.5, robust=0.5)
    assert sure.expected == pytest.approx(sure.most)


def test_memory_grows_with_the_batch_and_counts_the_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3))
    x = torch.rand(4, 3, 8, 8)
    small, large = (estimate.memory(net, x, size) for size in (100, 200))
    weights = sum(4 * parameter.numel() for parameter in net.parameters())
    activations = 4 * 8 * 64  # one map of the convolution, which ReLU and the next layer keep
    assert large - small > 100 * activations
    assert large - small < 100 * activations * 12
    assert small > weights


def test_an_undefended_model_is_foretold_to_be_broken_at_once() -> None:
    pace = Pace(forward=0.001, both=0.002, stand_in=0.002, memory=10)
    broken = cost(quick(Linf(8 / 255)), pace, images=100, classes=10, clean=1.0, robust=0.0)
    standing = cost(quick(Linf(8 / 255)), pace, images=100, classes=10, clean=1.0, robust=0.5)
    assert broken.expected < 0.6 * standing.expected


def test_logits_that_mislead_cross_entropy_do_not_mislead_the_forecast() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    x = torch.rand(64, 3, 2, 2)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)
        y = net(x).argmax(1)
    shares = []
    for scale in (1.0, 1e6):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter *= scale
        with examined(net, x[:8], device=torch.device("cpu")) as subject:
            shares.append(estimate.standing(subject, x, y, Linf(0.02)))
    assert shares[0] == shares[1]
    assert 0.2 < shares[0][1] < 0.8


class Counted(nn.Module):
    """Counts images by forward pass, those with a gradient twice: a backward pass to the input costs as much."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) < 0:  # which cannot be traced, so that no copy is attacked
            raise AssertionError
        self.seen += len(x) * (2 if x.requires_grad else 1)
        found: Tensor = self.net(x)
        return found


def _standard(ball: Ball) -> Suite:
    made = standard(ball)
    short = replace(made.entries[-1], attack=AutoAttack(ball, steps=20, queries=300))
    return replace(made, entries=(*made.entries[:-1], short))


def _in_turn(ball: Ball) -> Suite:
    """Restarts and targets, whose descents leave out by themselves what is broken."""
    return Suite(
        "in turn",
        (
            Entry("restarts", "restarts", Restarts(descent(ball, Margin(), 20), 3)),
            Entry("targets", "targets", MultiTargeted(descent(ball, Margin(), 20), 3)),
            Entry("diversified", "diversified", Restarts(OutputDiversified(descent(ball, Margin(), 20)), 2)),
        ),
    )


@pytest.mark.parametrize("suite", [quick, development, _standard, _in_turn])
def test_a_foretold_suite_costs_the_passes_that_it_makes(suite: Callable[[Ball], Suite]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))
    x, ball = torch.rand(64, 3, 8, 8), Linf(0.006)
    with torch.no_grad():
        net[-1].bias -= net(x).mean(0)
        y = net(x).argmax(1)
    model = Counted(net).eval()
    with examined(model, x[:8], device=torch.device("cpu")) as subject:
        clean, robust = estimate.standing(subject, x, y, ball)
    assert 0.2 < robust < 0.8
    units = Pace(forward=1.0, both=2.0, stand_in=2.0, memory=0)
    foretold = cost(suite(ball), units, images=64, classes=10, clean=clean, robust=robust)
    model.seen = 0
    evaluate(model, data=(x, y), suite=suite, eps=ball.radius, batch_size=64)
    assert foretold.least < model.seen < foretold.most
    assert foretold.expected == pytest.approx(model.seen, rel=0.3)


def test_a_foretold_run_takes_about_as_long_as_it_does(tmp_path: Path) -> None:
    settings = {"data": "digits", "model": "small_cnn", "width": 8, "epochs": 3, "batch_size": 64, "device": "cpu"}
    foretold = predict("pgd_at", seconds=1.0, arguments={"steps": 4}, **settings)
    began = time.perf_counter()
    train("pgd_at", out=tmp_path / "run", arguments={"steps": 4}, **settings)
    taken = time.perf_counter() - began
    assert foretold.steps == 3 * 20
    # Within 20 % on a machine of one's own; tests share theirs.
    assert 0.3 < foretold.seconds / taken < 3


def test_epochs_are_weighed_by_their_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import instar.doctor.training as training

    monkeypatch.setattr(training, "_step", lambda *_: (2.0, "said"))
    monkeypatch.setattr(training, "_epoch_end", lambda *_, **__: 5.0)
    common = {"data": "digits", "model": "small_cnn", "epochs": 4, "batch_size": 64, "device": "cpu"}
    steady = predict("pgd_at", arguments={"steps": 10}, **common)
    assert steady.seconds == pytest.approx(80 * 2.0 + 4 * 5.0)
    assert steady.most == steady.seconds
    # Two steps in the first half, ten in the second: 7 and 23 units.
    changes = {"attack.steps": training_steps()}
    growing = predict("pgd_at", changes=changes, **common)
    assert growing.seconds == pytest.approx(40 * 2.0 * 7 / 23 + 40 * 2.0 + 20.0)


def training_steps() -> object:
    from instar.schedules import Steps

    return Steps(2, ((0.5, 10),))


def foretold(
    recipe: str, monkeypatch: pytest.MonkeyPatch, *, inspected: object, epochs: int = 40, fixed: float = 0.0
) -> object:
    """A forecast of 20 steps an epoch, each of one second at full length."""
    import instar.doctor.training as training

    monkeypatch.setattr(training, "_step", lambda *_: (1.0, "said"))
    monkeypatch.setattr(training, "_epoch_end", lambda *_, **__: 0.0)
    monkeypatch.setattr(training, "_inspected", inspected)
    monkeypatch.setattr(training, "_fixed", lambda *_, **__: fixed)
    return predict(recipe, data="digits", model="small_cnn", epochs=epochs, batch_size=64, device="cpu")


def test_an_attack_that_stops_early_is_foretold_by_the_iterates_that_it_inspects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = foretold("fat", monkeypatch, inspected=lambda *_: 1.0)
    assert full.seconds == pytest.approx(full.most) == pytest.approx(40 * 20)  # type: ignore[attr-defined]
    none = foretold("fat", monkeypatch, inspected=lambda *_: 0.0)
    # 23 units, of which 20 are the attack's: none of them before training, half of them once the network has learnt.
    learning = 0.15 * 40 * 20
    learnt = 1 - learning / 800 * (1 - math.exp(-800 / learning))
    share = (3 + 10 * learnt) / 23
    assert none.seconds / none.most == pytest.approx(share)  # type: ignore[attr-defined]
    # Where a third of the time is the same for any batch, only the rest is saved.
    some = foretold("fat", monkeypatch, inspected=lambda *_: 0.0, fixed=1 / 3)
    assert some.seconds / some.most == pytest.approx(1 - 2 / 3 * (1 - share))  # type: ignore[attr-defined]
    assert "at most" in str(none)


def test_the_fixed_share_of_a_step_is_that_of_a_line_through_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    import instar.doctor.training as training
    from instar.config import Settings

    monkeypatch.setattr(training, "_timed", lambda *_, batch_size, **__: (0.5 + 0.01 * batch_size, 4))
    found = training._fixed(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        Settings(batch_size=150),
        torch.device("cpu"),
        step=2.0,
        seconds=1.0,
    )
    assert found == pytest.approx(0.25)


def test_the_points_of_a_schedule_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []

    def inspected(method: object, *_: object) -> float:
        bounds.append(method.attack.stop.bound)  # type: ignore[attr-defined]
        return 1.0 if bounds[-1] > 0 else 0.2

    found = foretold("p_sat", monkeypatch, inspected=inspected, epochs=50)
    assert bounds == sorted(bounds)
    assert len(bounds) == 8
    assert bounds[0] == 0
    assert bounds[-1] == 0.4
    assert 0.8 < found.seconds / found.most < 0.95  # type: ignore[attr-defined]  # 30 % of the run has a bound of 0


def test_iterates_are_counted_by_whole_batches_where_nobody_can_leave() -> None:
    from instar.config import Settings
    from instar.data import load
    from instar.doctor.training import _inspected
    from instar.methods import RECIPES

    settings = Settings(model="small_cnn", device="cpu", width=4)
    images, device = load("digits"), torch.device("cpu")
    free = RECIPES["fat"]()
    bound = replace(free, attack=replace(free.attack, compact=False))
    mean, longest = (_inspected(method.at(END), images, settings, device) for method in (free, bound))
    assert 0 < mean < longest <= 1
    never = replace(free, attack=replace(free.attack, stop=None))
    assert _inspected(never.at(END), images, settings, device) == 1.0


def test_large_steps_are_extended_from_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    import instar.doctor.training as training

    asked: list[int] = []

    def timed(*_: object, batch_size: int, seconds: float) -> tuple[float, int]:
        asked.append(batch_size)
        return 0.5 + 0.1 * batch_size, 4

    monkeypatch.setattr(training, "_timed", timed)
    monkeypatch.setattr(training, "_epoch_end", lambda *_, **__: 0.0)
    found = predict("pgd_at", data="digits", model="small_cnn", epochs=1, batch_size=512, seconds=10.0, device="cpu")
    assert found.seconds / found.steps == pytest.approx(0.5 + 0.1 * 512)
    assert max(asked) < 512
    assert "extended from batches" in found.probed
