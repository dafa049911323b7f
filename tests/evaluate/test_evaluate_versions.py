"""AutoAttack's versions against the reference itself, for every norm and number of classes; attacks as expressions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from instar import parse
from instar.arrays import Arrays
from instar.errors import UserError
from instar.evaluate import AutoAttack, Suite, attacks_of, evaluate, quick
from instar.evaluate.shards import Outcome, Shard
from instar.evaluate.subject import examined
from instar.threat import L1, L2, Ball, Linf

MakeTask = Callable[..., tuple[nn.Module, Tensor, Tensor]]
CPU = torch.device("cpu")
SEED, BATCH = 3, 5
ORDER = ("square", "fab-t", "fab", "apgd-dlr")
"""An order of its own, with FAB behind FAB-T, where the reference runs it once instead of five times."""


def run(attack: AutoAttack, net: nn.Module, x: Tensor, y: Tensor, **options: object) -> Outcome:
    with torch.no_grad():
        correct = net.eval()(x).argmax(1) == y
    shard = Shard(0, 0, x, y, torch.arange(len(y)), correct, "", np.zeros((1, 1)))
    with examined(net, x, device=CPU) as subject:
        return attack.examine(subject, shard, seed=SEED, batch_size=BATCH, **options)  # type: ignore[arg-type]


def reference(attack: AutoAttack, net: nn.Module) -> pyautoattack.AutoAttack:
    """The reference as its documentation says, with the same small budget."""
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    chosen = {"attacks": list(attack.stages)} if attack.version == "custom" else {}
    made = pyautoattack.AutoAttack(
        net.eval(), norm=attack.ball.norm, eps=attack.ball.radius, seed=SEED, version=attack.version, **chosen
    )
    for name in ("apgd", "apgd_targeted"):
        old = getattr(made, name)
        new = type(old)(
            net, n_iter=attack.steps, norm=old.norm, eps=old.eps, seed=SEED, device=old.device, logger=old.logger
        )
        for kept in ("n_restarts", "use_largereps", "eot_iter"):
            setattr(new, kept, getattr(old, kept))
        setattr(made, name, new)
    if attack.version != "custom":
        made.apgd_targeted.n_target_classes = 5 if attack.ball.norm == "L1" and attack.version == "standard" else 9
    made.fab.n_iter, made.square.n_queries = attack.steps, attack.queries
    return made


BALLS = [Linf(0.006), L2(0.06), L1(0.3)]


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("version", ["plus", "rand", "custom"])
def test_verdicts_of_every_version_equal_those_of_the_plain_reference_bit_for_bit(
    make_task: MakeTask, version: str, ball: Ball
) -> None:
    net, x, y = make_task(10, n=13, seed=2)
    attack = AutoAttack(ball, version=version, steps=5, queries=10, stages=ORDER if version == "custom" else None)
    _, prediction = reference(attack, net).run_standard_evaluation(x, y, batch_size=BATCH)
    found = run(attack, net, x, y)
    assert found.robust.tolist() == (prediction == y).tolist()
    assert 0 < found.robust.sum() < 12  # else nothing was compared
    assert found.stages == tuple(stage.name for stage in attack.plan(10))
    assert ((found.broken_by >= 0) == (~found.robust & (np.arange(13) > 0))).all()


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("version", ["standard", "plus", "rand", "custom"])
def test_the_published_budgets_are_those_that_the_reference_sets_up(
    make_task: MakeTask, version: str, ball: Ball
) -> None:
    net, _, _ = make_task(10)
    stages = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t") if version == "custom" else None
    attack = AutoAttack(ball, version=version, stages=stages)
    chosen = {"attacks": list(stages)} if stages else {}
    theirs = pyautoattack.AutoAttack(
        net, norm=ball.norm, eps=ball.radius, version=version, seed=SEED, device=CPU, **chosen
    )
    ours = attack._reference(net, 10, seed=SEED, device=CPU)
    assert ours.attacks_to_run == theirs.attacks_to_run == [stage.name for stage in attack.plan(10)]
    changed = {"seed", "targeted", "loss", "logger", "model", "predict"}  # set before each attack in its own loop
    if "fab-t" in theirs.attacks_to_run and "fab" in theirs.attacks_to_run:
        changed.add("n_restarts")  # of FAB, which their loop sets to 1 before FAB-T
    for name in ("apgd", "apgd_targeted", "fab", "square"):
        a, b = vars(getattr(ours, name)), vars(getattr(theirs, name))
        assert {k: v for k, v in a.items() if k not in changed} == {k: v for k, v in b.items() if k not in changed}
    plan = {stage.name: stage for stage in attack.plan(10)}
    assert plan["apgd-ce"].restarts == theirs.apgd.n_restarts
    assert max(plan["apgd-ce"].samples, 1) == theirs.apgd.eot_iter
    assert (version == "rand") == (plan["apgd-ce"].samples == 20)
    if "fab" in plan:
        assert plan["fab"].restarts == theirs.fab.n_restarts == 5
    if "square" in plan:
        assert plan["square"].queries == theirs.square.n_queries == 5000
    if "apgd-t" in plan:
        assert plan["apgd-t"].targets == theirs.apgd_targeted.n_target_classes
        assert plan["fab-t"].targets == theirs.fab.n_target_classes == 9


def test_a_custom_version_takes_restarts_targets_and_samples(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    stages = ("apgd-dlr", "apgd-t", "fab-t")
    attack = AutoAttack(
        Linf(0.005), version="custom", stages=stages, restarts=2, targets=3, samples=2, steps=5, queries=5
    )
    theirs = reference(attack, net)
    theirs.apgd.n_restarts, theirs.apgd.eot_iter, theirs.apgd_targeted.eot_iter = 2, 2, 2
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 3
    _, prediction = theirs.run_standard_evaluation(x, y, batch_size=BATCH)
    assert run(attack, net, x, y).robust.tolist() == (prediction == y).tolist()
    assert [(stage.restarts, stage.targets, stage.samples) for stage in attack.plan(10)] == [
        (2, 0, 2),
        (1, 3, 2),
        (1, 3, 0),
    ]
    assert not attack.is_reference


@pytest.mark.parametrize("version", ["standard", "plus"])
@pytest.mark.parametrize("classes", [2, 3, 5, 8, 10, 100])
def test_any_number_of_classes_is_attacked_by_every_stage(make_task: MakeTask, version: str, classes: int) -> None:
    net, x, y = make_task(classes, n=6)
    found = run(AutoAttack(Linf(0.01), version=version, steps=5, queries=10), net, x, y)
    plan = {stage.name: stage for stage in AutoAttack(Linf(0.01), version=version).plan(classes)}
    assert found.stages == tuple(plan)
    assert plan["apgd-t"].targets == plan["fab-t"].targets == min(9, classes - 1)
    assert plan["apgd-t"].loss == ("targeted DLR" if classes >= 4 else "targeted margin")
    if version == "plus":
        assert plan["apgd-dlr"].loss == ("DLR" if classes >= 3 else "margin")
        assert plan["fab"].classes == classes
    assert not found.robust[0]
    assert (found.broken_by >= 0).any()


@pytest.mark.parametrize(
    ("stage", "classes"),
    # With three classes DLR exists, and its optimum need not be the margin's.
    [("apgd-dlr", 2), ("apgd-t", 2), ("fab", 2), ("fab-t", 2), ("apgd-t", 3), ("fab", 3), ("fab-t", 3)],
)
def test_with_few_classes_every_gradient_stage_reaches_the_optimum_of_a_linear_model(stage: str, classes: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    x = 0.3 + 0.4 * torch.rand(20, 1, 4, 4)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)
        logits = net(x)
    y, weight, eps = logits.argmax(1), net[1].weight.detach(), 0.03
    reach = eps * (weight[:, None] - weight[None]).abs().sum(2)[:, y].T  # how far each z_j - z_y can rise (n, K)
    lead = logits.gather(1, y[:, None]) - logits - reach
    lead[torch.arange(20), y] = float("inf")
    expected = lead.amin(1) > 0
    attack = AutoAttack(Linf(eps), version="custom", stages=(stage,), steps=20, restarts=1)
    assert run(attack, net, x, y).robust.tolist() == expected.tolist()
    assert 0 < expected.sum() < 20


def test_versions_are_written_down_and_read_back() -> None:
    for attack in (
        AutoAttack(Linf(8 / 255), version="plus"),
        AutoAttack(L2(0.5), version="rand", steps=50),
        AutoAttack(L1(12.0), version="custom", stages=("square", "apgd-ce"), restarts=2),
    ):
        assert parse(repr(attack)) == attack
    assert AutoAttack(Linf(8 / 255), version="plus").is_reference
    assert not AutoAttack(Linf(8 / 255), version="plus", stages=("square",)).is_reference


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "custom"}, "needs its stages, some of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square"),
        ({"version": "custom", "stages": ("square", "square")}, "each once"),
        ({"version": "rand", "stages": ("square",)}, "must be some of apgd-ce, apgd-dlr"),
        ({"restarts": 2}, "version standard of AutoAttack fixes restarts; version custom"),
        ({"version": "plus", "targets": 3}, "fixes targets"),
        ({"version": "custom", "stages": ("fab",), "restarts": 0}, "restarts of AutoAttack must be at least 1; got 0"),
    ],
)
def test_a_version_that_cannot_be_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutoAttack(Linf(0.1), **options)  # type: ignore[arg-type]


class Noisy(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + 0.02 * logits.std() * torch.randn_like(logits)


def test_a_random_model_is_judged_the_same_again_and_after_a_kill(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    model, attack = Noisy(net), AutoAttack(Linf(0.004), version="rand", steps=5)
    saved: list[Arrays] = []
    whole = run(attack, model, x, y, save=saved.append)
    assert "randomised" not in whole.flags  # the version is made for it
    torch.manual_seed(99)
    for stored in (None, saved[1], saved[-2]):
        again = run(attack, model, x, y, stored=stored)
        assert again.robust.tolist() == whole.robust.tolist()
        assert again.margin is not None
        assert whole.margin is not None
        assert np.array_equal(again.margin, whole.margin, equal_nan=True)
    assert 0 < whole.robust.sum() < 11


def test_a_random_model_is_named_in_the_record_of_any_suite(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    evaluation = partial(evaluate, Noisy(net), data=(x, y), suite="quick", eps=0.004)
    (first,), (again,) = evaluation(out=tmp_path / "a"), evaluation(out=tmp_path / "b")
    assert [finding.verdict for finding in first.findings if finding.check == "randomised"] == ["suspect"]
    assert first.instances["worst_case"].tolist() == again.instances["worst_case"].tolist()
    (sound,) = evaluate(net, data=(x, y), suite="quick", eps=0.004)
    assert not [finding for finding in sound.findings if finding.check == "randomised"]


def test_attacks_are_given_as_expressions_and_count_if_they_stay_in_the_ball(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    suite = attacks_of(
        [
            "AutoAttack(Linf(0.005), version='plus', steps=5, queries=10)",
            "PGD(Linf(0.005), steps=3)",
            "PGD(Linf(0.004), steps=3)",
            "PGD(Linf(0.5), steps=3)",
            "PGD(L2(0.005), steps=3)",
        ]
    )
    entries = suite(Linf(0.005)).entries
    assert [(entry.name, entry.counts) for entry in entries] == [
        ("autoattack_plus", True),
        ("pgd_3", True),
        ("pgd_3_2", True),
        ("pgd_3_3", False),
        ("pgd_3_4", False),
    ]
    (record,) = evaluate(net, data=(x, y), suite=suite, eps=0.005)
    assert record.suite == "attacks"
    assert record.protocol["attacks"]["autoattack_plus"]["expression"].startswith("AutoAttack(Linf(0.005), version=")
    assert record.scores["worst_case"].correct > record.scores["pgd_3_3"].correct
    behind: Suite = attacks_of(["PGD(Linf(0.005), steps=10)"], suite=quick)(Linf(0.005))
    assert [entry.name for entry in behind.entries] == ["pgd_10", "margin_pgd_20", "pgd_10_2"]
    assert behind.name == "quick-attacks"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AutoAttak(Linf(8/255))", "unknown value 'AutoAttak'. Did you mean 'AutoAttack'"),
        ("Linf(8/255)", "an attack must be an expression such as .* is Linf"),
        ("AutoAttack(Linf(8/255), version='plsu')", "unknown version of AutoAttack 'plsu'"),
    ],
)
def test_an_expression_that_is_no_attack_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attacks_of([text])
