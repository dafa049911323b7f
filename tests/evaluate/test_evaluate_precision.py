"""Search in bfloat16, compaction, batch sizes that fit, adversarial examples: faster or more, with equal verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instar.attacks import PGD, Attack, Zero
from instar.errors import UserError
from instar.evaluate import (
    AutoAttack,
    Entry,
    Suite,
    auto_attack,
    evaluate,
    fitting,
    margin_pgd,
    pgd,
    read,
    read_examples,
)
from instar.evaluate.compaction import compacts, run
from instar.evaluate.examine import attacked
from instar.evaluate.precision import searcher
from instar.evaluate.shards import Shard
from instar.evaluate.subject import Subject, examined
from instar.evaluate.suites import ONCE_WRONG
from instar.evidence import Adversary, Batch
from instar.signals import KL
from instar.threat import L1, L2, Ball, Linf

MakeTask = Callable[..., tuple[nn.Module, Tensor, Tensor]]
CPU = torch.device("cpu")


def small(ball: Ball) -> Suite:
    few = AutoAttack(ball, steps=6, queries=20)
    return Suite("small", (pgd(ball, steps=5), margin_pgd(ball, steps=5), Entry("few", "few", few)))


def test_a_search_in_bf16_finds_what_float32_finds_and_says_so(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=24, seed=2)
    evaluation = partial(evaluate, net, data=(x, y), suite=small, eps=0.006, out=tmp_path)
    (exact,), (fast,) = evaluation(), evaluation(precision="bf16", save_examples=True)
    assert fast.run["reused"] == []  # other conditions, so nothing is taken over
    assert exact.protocol["precision"] == "float32"
    assert fast.protocol["precision"] == "bf16 search, confirmed in float32"
    assert exact.protocol["key"] != fast.protocol["key"]
    columns = ("pgd_5", "margin_pgd_5", "few", "worst_case")
    differing = {name: int((exact.instances[name] != fast.instances[name]).sum()) for name in columns}
    assert all(count <= 2 for count in differing.values()), differing
    assert 3 < fast.scores["worst_case"].correct < 21
    # Whatever counts as broken is broken in float32.
    found = read_examples(tmp_path / "small-module-examples.safetensors")
    assert found.broken(net.eval()).all()
    assert len(found) == 23 - fast.scores["worst_case"].correct


def test_a_number_from_a_bf16_search_is_not_called_the_reference(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=3, seed=2)

    def published(ball: Ball) -> Suite:
        return Suite("published", (auto_attack(ball),))

    references = [
        evaluate(net, data=(x, y), suite=published, eps=0.5, precision=precision)[0].protocol["reference_autoattack"]
        for precision in ("float32", "bf16")
    ]
    assert references == [True, False]


class WrongEverywhere(nn.Module):
    """What rounding can do to a point on the boundary, done to all of them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return -logits


@pytest.mark.parametrize("kind", ["pgd", "autoattack"])
def test_what_the_model_does_not_confirm_is_attacked_again_on_the_model(make_task: MakeTask, kind: str) -> None:
    net, x, y = make_task(10, n=16, seed=2)
    net.eval()
    with torch.no_grad():
        correct = net(x).argmax(1) == y
    shard = Shard(0, 0, x, y, torch.arange(16), correct, "", np.zeros((1, 1)))
    with examined(net, x, device=CPU) as subject:
        if kind == "autoattack":
            attack = AutoAttack(Linf(0.006), stages=("apgd-ce",), steps=6)
            expected = attack.examine(subject, shard, seed=0, batch_size=16).robust
            found = attack.examine(subject, shard, seed=0, batch_size=16, search=WrongEverywhere(net)).robust
        else:
            descent = margin_pgd(Linf(0.006), steps=20).attack
            rows = correct.nonzero().flatten()
            batch = Batch(x[rows], y[rows])

            def robust(search: nn.Module | None) -> np.ndarray:
                draws = torch.Generator().manual_seed(0)
                _, verdict, unbroken = attacked(descent, subject, batch, draws, search=search)  # type: ignore[arg-type]
                return (verdict.right & unbroken).numpy()

            expected, found = robust(None), robust(WrongEverywhere(net))
    assert (found != expected).sum() <= 1  # a random start of another draw
    assert 0 < expected.sum() < 15


def test_a_copy_in_bf16_keeps_its_first_layer_and_the_image_in_float32() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    net = nn.Sequential(*layers).eval()

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x) if float(x.detach().sum()) >= 0 else -self.net(x)
            return logits

    x = torch.rand(4, 3, 8, 8)
    nudged = x + 1e-4  # less than bfloat16 tells apart in an image
    for model in (net, Branching().eval()):
        copy = searcher(Subject(model, model, 5, CPU), x, precision="bf16")
        assert copy is not None
        seen: list[tuple[torch.dtype, torch.dtype]] = []

        def note(module: nn.Module, inputs: tuple[Tensor], out: Tensor, seen: list[Any] = seen) -> None:
            seen.append((inputs[0].dtype, out.dtype))

        for module in copy.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        logits = copy(x)
        assert logits.dtype == torch.float32
        assert seen[0] == (torch.float32, torch.float32)
        assert seen[1][1] == torch.bfloat16
        assert not torch.equal(logits, model(x))
        assert torch.allclose(logits, model(x), atol=0.03)
        assert not torch.equal(copy(nudged), logits)
    assert type(net[0]) is nn.Conv2d  # the model itself stays as it was


def test_an_unknown_precision_is_one_line(make_task: MakeTask) -> None:
    net, x, y = make_task(5)
    with pytest.raises(UserError, match=r"unknown precision 'fp8'\. .*Known: bf16, float32"):
        evaluate(net, data=(x, y), suite="quick", eps=0.01, precision="fp8")


@pytest.mark.parametrize("ball", [Linf(0.006), L2(0.06), L1(0.3)], ids=lambda ball: ball.norm)
@pytest.mark.parametrize("steps", [0, 1, 4, 10])
def test_leaving_out_the_broken_ones_changes_nothing_but_the_work(make_task: MakeTask, ball: Ball, steps: int) -> None:
    net, x, y = make_task(10, n=24, seed=2)
    net.eval()
    attack = pgd(ball, steps=steps).attack
    assert isinstance(attack, PGD)
    seen: list[int] = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    whole = attack(net, Batch(x, y), generator=torch.Generator().manual_seed(1))
    cost = max(sum(seen), steps * len(x))  # the descent leaves out stopped instances itself where it can
    seen.clear()
    found = run(attack, net, Batch(x, y), torch.Generator().manual_seed(1))
    for name in ("kappa", "inspected", "moves"):
        assert getattr(found, name).tolist() == getattr(whole, name).tolist()
    assert torch.allclose(found.x, whole.x, atol=1e-6)
    assert found.budget == whole.budget
    assert sum(seen) < cost if steps == 10 else sum(seen) <= cost


def test_only_attacks_whose_instances_are_on_their_own_are_compacted() -> None:
    attack = margin_pgd(Linf(0.1), steps=10).attack
    assert isinstance(attack, PGD)
    assert compacts(attack)
    others: list[dict[str, Any]] = [{"mode": "batch"}, {"stop": None}, {"objective": KL()}, {"overshoot": False}]
    for other in others:
        fields = {"steps": 10, "objective": attack.objective, "stop": ONCE_WRONG, "start": Zero(), **other}
        assert not compacts(PGD(Linf(0.1), **fields))


@pytest.mark.parametrize("ball", [Linf(0.006), L2(0.05), L1(0.15)], ids=lambda ball: ball.norm)
def test_examples_are_scored_from_disk_as_in_the_record_and_stay_in_the_ball(
    make_task: MakeTask, tmp_path: Path, ball: Ball
) -> None:
    net, x, y = make_task(10, n=20, seed=2)
    (record,) = evaluate(
        net,
        data=(x, y),
        suite=small,
        norm=ball.norm,
        eps=ball.radius,
        batch_size=6,
        shard_size=8,
        out=tmp_path,
        save_examples=True,
    )
    found = read_examples(tmp_path / "small-module-examples.safetensors")
    rows = record.instances
    broken = (rows["worst_case"] == 0) & (rows["clean"] == 1)
    assert found.index.tolist() == np.flatnonzero(broken).tolist()
    assert found.attack == tuple(rows["broken_by"][broken].tolist())
    assert found.label.tolist() == y[found.index].tolist()
    assert len(set(found.attack)) > 1
    assert found.broken(net.eval(), batch_size=7).all()
    assert found.x.dtype == torch.float32
    assert ((found.x >= 0) & (found.x <= 1)).all()
    assert (ball.size(found.x - x[found.index]) <= ball.radius * (1 + 1e-5) + 1e-6).all()


def test_examples_survive_a_kill_and_are_not_asked_for_in_vain(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=20, seed=2)
    evaluation = partial(evaluate, net, data=(x, y), suite=small, eps=0.006, batch_size=6, shard_size=8)
    evaluation(out=tmp_path / "whole", save_examples=True)
    whole = (tmp_path / "whole" / "small-module-examples.safetensors").read_bytes()

    class Kill(BaseException):
        pass

    left = [9]

    def progress(*said: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise Kill

    with pytest.raises(Kill):
        evaluation(out=tmp_path / "killed", save_examples=True, progress=progress)
    evaluation(out=tmp_path / "killed", save_examples=True)
    assert (tmp_path / "killed" / "small-module-examples.safetensors").read_bytes() == whole
    # What was run without keeping examples is run again when they are wanted, and then no more.
    (plain,) = evaluation(out=tmp_path / "later")
    (kept,) = evaluation(out=tmp_path / "later", save_examples=True)
    (again,) = evaluation(out=tmp_path / "later", save_examples=True)
    assert kept.run["reused"] == []
    assert again.run["reused"] == ["pgd_5", "margin_pgd_5", "few"]
    assert plain.instances["worst_case"].tolist() == kept.instances["worst_case"].tolist()
    assert (tmp_path / "later" / "small-module-examples.safetensors").read_bytes() == whole
    with pytest.raises(UserError, match="give out with save_examples"):
        evaluation(save_examples=True)
    with pytest.raises(UserError, match="cannot read the adversarial examples"):
        read_examples(tmp_path / "none.safetensors")


def test_the_margin_says_how_far_attacks_came(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=20, seed=2)
    (record,) = evaluate(net, data=(x, y), suite=small, eps=0.006, out=tmp_path, save_examples=True)
    rows = record.instances
    assert rows["adv_margin"].dtype == np.float32
    assert (rows["adv_margin"] <= rows["clean_margin"]).all()
    assert ((rows["adv_margin"] < 0) == (rows["worst_case"] == 0)).all()
    assert (rows["adv_margin"][rows["worst_case"] == 1] < rows["clean_margin"][rows["worst_case"] == 1]).any()
    # The example that is kept is one of those that the smallest margin was taken over.
    found = read_examples(tmp_path / "small-module-examples.safetensors")
    with torch.no_grad():
        logits = net.eval()(found.x)
    true = logits.gather(1, found.label[:, None]).squeeze(1)
    margin = true - logits.scatter(1, found.label[:, None], float("-inf")).amax(1)
    assert (torch.from_numpy(rows["adv_margin"])[found.index] <= margin + 1e-6).all()
    assert read(tmp_path / "small-module.json").instances["adv_margin"].tolist() == rows["adv_margin"].tolist()


def test_the_batch_size_is_what_fits_and_stays_so(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    evaluation = partial(evaluate, net, data=(x, y), suite="quick", eps=0.006)
    assert evaluation()[0].protocol["batch_size"] == 250
    monkeypatch.setattr(fitting, "_fits", lambda subject, image, size, processes: size <= 40 / processes)
    (record,) = evaluation(out=tmp_path)
    assert record.protocol["batch_size"] == 31
    # Less memory at the next attempt must not throw away what was computed.
    monkeypatch.setattr(fitting, "_fits", lambda subject, image, size, processes: size <= 4)
    (again,) = evaluation(out=tmp_path)
    assert again.protocol["batch_size"] == 31
    assert again.run["reused"] == ["pgd_10", "margin_pgd_20"]
    assert evaluation(out=tmp_path, batch_size=5)[0].protocol["batch_size"] == 5
    monkeypatch.setattr(fitting, "_fits", lambda subject, image, size, processes: False)
    with pytest.raises(UserError, match=r"not even one image \(3, 8, 8\) fits"):
        evaluation()


def test_an_estimate_of_the_memory_grows_with_the_batch(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, _ = make_task(10)
    subject = Subject(net.eval(), net, 10, CPU)
    sizes = []
    for free in (10**12, 2 * 10**6, 10**6):
        monkeypatch.setattr("instar.evaluate.fitting.memory_free", lambda device, free=free: free)
        sizes.append(fitting.fitting(subject, x[:1]))
    assert sizes[0] == 250 > sizes[1] > sizes[2]


class Greedy(nn.Module):
    """A device that takes so many images at a time and no more, when it comes to gradients."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most and x.requires_grad:
            raise torch.OutOfMemoryError("no more")
        logits: Tensor = self.net(x)
        return logits


def test_a_batch_that_turns_out_too_large_is_halved_unless_it_was_asked_for(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = make_task(10, n=24, seed=2)
    monkeypatch.setattr(fitting, "_fits", lambda subject, image, size, processes: size <= 31)
    model = Greedy(net, 9)
    (record,) = evaluate(model, data=(x, y), suite="quick", eps=0.006, out=tmp_path)
    assert record.protocol["batch_size"] == 7  # 31, 15, 7
    (same,) = evaluate(model, data=(x, y), suite="quick", eps=0.006, batch_size=7)
    assert same.instances["worst_case"].tolist() == record.instances["worst_case"].tolist()
    with pytest.raises(
        UserError, match="PGD-10 needs more memory than there is for 20 images at a time; give a smaller"
    ):
        evaluate(model, data=(x, y), suite="quick", eps=0.006, batch_size=20)


def test_an_evaluation_that_cannot_go_on_leaves_a_record_of_what_it_knows(make_task: MakeTask, tmp_path: Path) -> None:
    net, x, y = make_task(10, n=12, seed=2)
    broken = [False]

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net.eval()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits[:, :7] if broken[0] and float(images.detach().sum()) else logits

    def progress(attack: str, done: int, total: int, robust: int) -> None:
        broken[0] = attack == "few"

    evaluation = partial(evaluate, Sometimes(), data=(x, y), suite=small, eps=0.006, out=tmp_path)
    with pytest.raises(UserError, match=r"few|logits of shape \(\d+, 10\)") as caught:
        evaluation(progress=progress)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.json"))
    partial_record = read(tmp_path / "partial" / "small-module.json")
    assert list(partial_record.scores) == ["clean", "pgd_5", "margin_pgd_5", "worst_case"]
    assert partial_record.run["stopped"] == str(caught.value)
    broken[0] = False
    (record,) = evaluation()
    assert record.run["reused"] == ["pgd_5", "margin_pgd_5"]
    assert not (tmp_path / "partial").exists()
    assert "stopped" not in json.loads((tmp_path / "small-module.json").read_text())["run"]


class Standing(Attack):
    """An attack that returns the very images it was given, and claims to have seen a misclassified one."""

    def __call__(self, model: nn.Module, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        one = torch.ones_like(batch.y)
        return Adversary(x=batch.x, kappa=0 * one, inspected=one, moves=0 * one, budget=0)


def test_an_attack_that_returns_its_images_does_not_lose_them(make_task: MakeTask) -> None:
    net, x, y = make_task(10, n=8, seed=2)
    net.eval()
    before = x.clone()
    subject = Subject(net, nn.Sequential(net), 10, CPU)
    found, verdict, unbroken = attacked(Standing(), subject, Batch(x, y), None, search=WrongEverywhere(net))
    assert torch.equal(x, before)
    assert torch.equal(found, before)
    assert found.data_ptr() != x.data_ptr()
    assert verdict.right.tolist() == [False] + [True] * 7
    assert not unbroken.any()
