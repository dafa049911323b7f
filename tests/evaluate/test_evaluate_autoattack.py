import logging
from collections.abc import Callable

import numpy as np
import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from instar.arrays import Arrays
from instar.errors import UserError
from instar.evaluate import autoattack
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.sanity import findings
from instar.evaluate.shards import Outcome, Shard
from instar.evaluate.subject import examined
from instar.evaluate.suites import Entry
from instar.threat import L1, L2, Ball, Linf

CPU = torch.device("cpu")


def shard_of(net: nn.Module, x: Tensor, y: Tensor) -> Shard:
    with torch.no_grad():
        correct = net(x).argmax(1) == y
    return Shard(0, 0, x, y, torch.arange(len(y)), correct, "", np.zeros((1, 1)))


def run(attack: AutoAttack, net: nn.Module, x: Tensor, y: Tensor, **options: object) -> Outcome:
    with examined(net, x, device=CPU) as subject:
        return attack.examine(subject, shard_of(net, x, y), seed=3, batch_size=6, **options)


def plain(attack: AutoAttack, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The flags of the reference itself, used as its documentation says, with the same small budget."""
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    made = pyautoattack.AutoAttack(net.eval(), norm=attack.ball.norm, eps=attack.ball.radius, seed=3)
    for name in ("apgd", "apgd_targeted"):
        old = getattr(made, name)
        new = type(old)(
            net, n_iter=attack.steps, norm=old.norm, eps=old.eps, seed=3, device=old.device, logger=old.logger
        )
        new.n_restarts, new.use_largereps = old.n_restarts, old.use_largereps
        setattr(made, name, new)
    made.apgd_targeted.n_target_classes = 5 if attack.ball.norm == "L1" else 9
    made.fab.n_iter, made.square.n_queries = attack.steps, attack.queries
    _, prediction = made.run_standard_evaluation(x, y, batch_size=6)
    return prediction == y


@pytest.mark.parametrize(
    ("ball", "memory_format"),
    [
        (Linf(0.006), torch.contiguous_format),
        (Linf(0.006), torch.channels_last),
        (L2(0.05), torch.channels_last),
        (L1(0.2), torch.channels_last),
    ],
)
def test_verdicts_equal_those_of_the_plain_reference_bit_for_bit(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]], ball: Ball, memory_format: torch.memory_format
) -> None:
    net, x, y = make_task(10, n=24, seed=2)
    attack = AutoAttack(ball, steps=5, queries=30)
    expected = plain(attack, net, x, y)
    net = net.to(memory_format=memory_format)
    found = run(attack, net, x, y)
    assert found.robust.tolist() == expected.tolist()
    assert set(found.broken_by.tolist()) >= {-1, 0, 1}  # else little was compared
    assert ((found.broken_by >= 0) == (~found.robust & (np.arange(24) > 0))).all()
    assert found.flags in ((), ("zero_gradient",))


class Quantised(nn.Module):
    """Images rounded to nine levels: gradients are zero almost everywhere, though the model is as weak as before."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.round(x * 8) / 8)


def test_square_breaks_a_model_without_gradients_as_in_the_reference_and_both_facts_are_flagged(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]],
) -> None:
    net, x, _ = make_task(10, n=24, seed=2)
    masked = Quantised(net).eval()
    y = masked(x).argmax(1)
    attack = AutoAttack(Linf(0.03), steps=5, queries=60)
    expected = plain(attack, masked, x, y)
    found = run(attack, masked, x, y)
    assert found.robust.tolist() == expected.tolist()
    assert found.flags == ("zero_gradient",)
    assert (found.broken_by == found.stages.index("square")).sum() > 2
    entry = Entry("autoattack", "AutoAttack", attack)
    verdicts = {finding.check: finding.verdict for finding in findings((entry,), {"autoattack": found})}
    assert verdicts == {"zero_gradient": "high", "square": "suspect"}


def test_the_standard_budget_is_the_one_of_the_reference(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]],
) -> None:
    net, _, _ = make_task(10)
    for ball in (Linf(0.02), L2(0.1), L1(0.8)):
        attack = AutoAttack(ball)
        ours = attack._reference(net, 10, seed=3, device=CPU)
        theirs = pyautoattack.AutoAttack(net, norm=ball.norm, eps=ball.radius, seed=3, device=CPU)
        assert ours.attacks_to_run == theirs.attacks_to_run == [stage.name for stage in attack.plan(10)]
        changed = {"seed", "targeted", "loss", "logger", "model", "predict"}  # set before each attack in its own loop
        for name in ("apgd", "apgd_targeted", "fab", "square"):
            a, b = vars(getattr(ours, name)), vars(getattr(theirs, name))
            assert {k: v for k, v in a.items() if k not in changed} == {k: v for k, v in b.items() if k not in changed}
        for stage, steps in zip(attack.plan(10), (theirs.apgd, theirs.apgd_targeted, theirs.fab), strict=False):
            assert stage.steps == steps.n_iter
            assert stage.restarts == steps.n_restarts


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("ball", [Linf(0.01), L2(0.1)])
def test_few_classes_are_attacked_by_every_stage(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]], classes: int, ball: Ball
) -> None:
    net, x, y = make_task(classes)
    found = run(AutoAttack(ball, steps=8, queries=30), net, x, y)
    plan = AutoAttack(ball).plan(classes)
    assert [stage.targets for stage in plan] == [0, classes - 1, classes - 1, 0]
    assert (plan[1].loss == "targeted DLR") == (classes >= 4)
    assert 0 < found.robust.sum() < 15


@pytest.mark.parametrize("classes", [2, 3])
def test_the_targeted_margin_below_four_classes_breaks_what_can_be_broken(classes: int) -> None:
    # A linear model: the worst case of z_t - z_y in the l-infinity ball is known.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    x = 0.3 + 0.4 * torch.rand(40, 1, 4, 4)
    with torch.no_grad():
        net[1].bias -= net(x).mean(0)
    y = net(x).argmax(1)
    weight, eps = net[1].weight.detach(), 0.03
    reach = eps * (weight[:, None] - weight[None]).abs().sum(2)[:, y].T  # (n, classes)
    logits = net(x).detach()
    lead = logits.gather(1, y[:, None]) - logits - reach
    lead[torch.arange(40), y] = float("inf")
    expected = lead.amin(1) > 0
    targeted = AutoAttack(Linf(eps), steps=30, queries=1)
    with examined(net, x, device=CPU) as subject:
        reference = targeted._reference(subject.model, subject.classes, seed=0, device=CPU)
        with torch.random.fork_rng():
            found = reference.apgd_targeted.perturb(x, y)
    assert (net(found).argmax(1) == y).tolist() == expected.tolist()
    assert 0 < expected.sum() < 40


def test_a_kill_after_any_batch_is_resumed_without_repeating_a_batch(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = make_task(10, n=24, seed=2)
    attack = AutoAttack(Linf(0.006), steps=5, queries=10)
    batches: list[Arrays] = []
    whole = run(attack, net, x, y, save=batches.append)
    assert len(batches) > 8
    calls: list[str] = []

    original = autoattack._perturb

    def counted(reference: object, stage: object, *images: Tensor) -> Tensor:
        calls.append(stage.name)  # type: ignore[attr-defined]
        return original(reference, stage, *images)  # type: ignore[arg-type]

    monkeypatch.setattr(autoattack, "_perturb", counted)
    for done in (0, 1, 4, len(batches) - 1, len(batches)):
        calls.clear()
        stored = batches[done - 1] if done else None
        resumed = run(attack, net, x, y, stored=stored)
        assert resumed.robust.tolist() == whole.robust.tolist()
        assert resumed.broken_by.tolist() == whole.broken_by.tolist()
        assert len(calls) == len(batches) - done
        assert resumed.reused == (done == len(batches))


def test_progress_rises_to_one_and_ends_with_the_points_that_stand(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]],
) -> None:
    net, x, y = make_task(10)
    heard: list[tuple[float, int]] = []
    found = run(AutoAttack(Linf(0.02), steps=6, queries=10), net, x, y, tick=lambda *said: heard.append(said))
    shares = [share for share, _ in heard]
    assert shares == sorted(shares)
    assert all(0 < share <= 1 for share in shares)
    assert heard[-1] == (1.0, int(found.robust.sum()))


def test_nothing_is_logged_and_the_global_random_state_stays(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    net, x, y = make_task(5)
    before = torch.get_rng_state()
    logger = logging.getLogger("auto-attack")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    with caplog.at_level(logging.DEBUG):
        run(AutoAttack(Linf(0.02), steps=5, queries=3), net, x, y)
    assert not caplog.records
    assert torch.equal(before, torch.get_rng_state())
    assert (list(logger.handlers), logger.propagate) == (handlers, propagate)
    assert logger.level in (level, logging.NOTSET)


def test_a_random_model_is_flagged_as_the_reference_does_and_the_warning_stays_off_the_screen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] + 0.1 * torch.randn(len(x), 4)

    x = torch.rand(6, 1, 4, 4)
    found = run(AutoAttack(Linf(0.01), steps=5, queries=2), Noisy(), x, torch.zeros(6, dtype=torch.int64))
    assert "randomised" in found.flags
    assert not caplog.records


def test_a_ball_without_extent_changes_nothing(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]],
) -> None:
    for ball in (Linf(0), L2(0), L1(0)):
        net, x, y = make_task(5)
        found = run(AutoAttack(ball), net, x, y)
        assert found.robust.tolist() == [False] + [True] * 15


def test_an_unknown_version_or_a_budget_that_cannot_run_is_one_line() -> None:
    with pytest.raises(UserError, match="unknown version of AutoAttack 'plsu'"):
        AutoAttack(Linf(0.1), version="plsu")
    with pytest.raises(UserError, match="at least 5 steps"):
        AutoAttack(Linf(0.1), steps=2)


def test_images_too_small_for_the_reference_are_one_line() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(UserError, match="at least 5×5 pixels; got 4×4"):
        run(AutoAttack(L2(0.1)), net, torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64))


def test_a_part_of_the_ensemble_runs_those_stages_only_and_agrees_with_the_whole_one(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]],
) -> None:
    whole = AutoAttack(Linf(0.02), steps=5, queries=20)
    part = AutoAttack(Linf(0.02), steps=5, queries=20, stages=("apgd-ce", "apgd-t"))
    assert [stage.name for stage in part.plan(10)] == ["apgd-ce", "apgd-t"]
    assert AutoAttack(Linf(0.02)).is_reference
    assert not AutoAttack(Linf(0.02), stages=("apgd-ce", "apgd-t")).is_reference
    net, x, y = make_task(10)
    first, both = run(part, net, x, y), run(whole, net, x, y)
    assert first.stages == ("apgd-ce", "apgd-t")
    early = (both.broken_by == 0) | (both.broken_by == 1)
    assert ((first.broken_by >= 0) == early).all()
    assert (first.broken_by[early] == both.broken_by[early]).all()


@pytest.mark.parametrize("stages", [(), ("apgd-ce", "pgd")])
def test_unknown_stages_get_one_line(stages: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="stages of AutoAttack must be some of apgd-ce, apgd-t, fab-t, square"):
        AutoAttack(Linf(0.02), stages=stages)
