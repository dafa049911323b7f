"""The benchmark: its baseline is the algorithm, its figures are those of closed forms, and its words are one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar
from instar.attacks import PGD
from instar.bench import SWITCHES, Budget, Case, bench, in_turns, matmul_rate, official, operations, prepare, ratio_of
from instar.bench.child import memory
from instar.bench.subject import _EveryGradient, _Recomputing, cases_of
from instar.cli import main
from instar.errors import UserError
from instar.evidence import Batch
from instar.method import Method
from instar.methods import RECIPES

SMALL = {"model": "small_cnn", "width": 4, "batch_size": 8, "device": "cpu", "precision": "float32"}


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of small matrices and of few batches: tests do not want the figures."""
    monkeypatch.setattr("instar.bench.rates.SIZES", {"cpu": (64,)})
    monkeypatch.setattr("instar.bench.measure.LOADER_SECONDS", 0.01)


class Counting(nn.Module):
    """A small network that counts its forward passes and sees how it is asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        self.passes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append(self.training)
        logits: Tensor = self.body(x)
        return logits


@pytest.mark.parametrize(("name", "attack", "after"), [("pgd_at", 4, 1), ("gairat", 4, 1), ("trades", 8, 3)])
def test_the_official_style_makes_the_passes_of_the_published_codes(name: str, attack: int, after: int) -> None:
    net, x, y = Counting(), torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    official(name)(net, torch.optim.SGD(net.parameters(), lr=0.1), x, y, Budget(steps=4))
    assert net.passes == [False] * attack + [True] * after  # in eval mode, then in train mode


@pytest.mark.parametrize("name", ["pgd_at", "gairat", "trades"])
def test_the_official_style_updates_the_weights_as_our_method_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.rand(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    noise = torch.rand_like(x) * 2 - 1
    theirs, ours = Counting().double(), Counting().double()
    monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: self.copy_(noise * high))
    monkeypatch.setattr(torch, "randn_like", lambda like: noise.to(like))
    budget = Budget(0.1, 0.03, 3)
    start = torch.clamp(x + noise * budget.eps, 0, 1) if name != "trades" else x + 0.001 * noise
    official(name)(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), x, y, budget)
    monkeypatch.undo()
    arguments = {"burn_in": 0} if name == "gairat" else {}
    method: Method = RECIPES[name](eps=0.1, step_size=0.03, steps=3, **arguments)
    method = replace(method, attack=replace(method.attack, start=Given(start)))
    instar.training_step(ours, method, Batch(x, y), torch.optim.SGD(ours.parameters(), lr=0.1))
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        # κ of the official style and its weights are float32.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 if name == "gairat" else 1e-12)


class Given(instar.attacks.Start):
    """Begins exactly there."""

    def __init__(self, at: Tensor) -> None:
        self.at = at

    def __call__(self, x: Tensor, ball: object, generator: object) -> Tensor:
        return self.at.clone()


def test_operations_of_convolutions_are_counted_forward_and_backward() -> None:
    conv, x = nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.rand(2, 3, 8, 8, requires_grad=True)
    once = 2 * 2 * 8 * 8 * 5 * 3 * 9
    assert operations(lambda: conv(x)) == once
    assert operations(lambda: conv(x).sum().backward()) == 3 * once
    assert operations(lambda: torch.autograd.grad(conv(x).sum(), x)) == 2 * once


def test_ratios_are_paired_by_turn() -> None:
    drifting = [1.0, 2.0, 4.0, 8.0]
    found = ratio_of([3 * t for t in drifting], drifting)
    assert (found.median, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))
    spread = ratio_of([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])  # logarithms 0, log 2, 2 log 2: Student's t of 2 is 4.303
    half = 4.302653 * torch.tensor(2.0).log().item() / 3**0.5
    assert torch.tensor([spread.low, spread.high]).log().tolist() == pytest.approx([0.693147 - half, 0.693147 + half])


def test_cases_are_timed_in_turns_after_a_warm_up() -> None:
    seen: list[tuple[str, int]] = []
    steps = {name: lambda number, name=name: seen.append((name, number)) for name in "ab"}
    found = in_turns(steps, turns=2, count=3, device=torch.device("cpu"))
    order = [("a", [0, 1]), ("b", [0, 1]), ("a", [2, 3, 4]), ("b", [2, 3, 4]), ("a", [5, 6, 7]), ("b", [5, 6, 7])]
    assert seen == [(name, number) for name, numbers in order for number in numbers]
    assert [len(turns) for turns in found.values()] == [2, 2]


def test_the_rate_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from instar.bench import rates

    clock = iter(k / 2 for k in range(1000))  # every product takes half a second
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    best, each = matmul_rate(torch.float32, torch.device("cpu"), sizes=(8, 16))
    assert each == {8: 2 * 8**3 / 0.5}  # which is more than may be spent: no larger size is tried
    assert best == each[8]


def test_leaving_a_trick_out_changes_the_work_and_not_the_result() -> None:
    net = Counting().eval()
    x = torch.rand(4, 3, 8, 8)
    gradients = {}
    for name, wrapped in {"": net, "every": _EveryGradient(net), "again": _Recomputing(net, x)}.items():
        at = x.clone().requires_grad_()

        def attack(at: Tensor = at, wrapped: nn.Module = wrapped) -> None:
            (gradients["now"],) = torch.autograd.grad(F.cross_entropy(wrapped(at), torch.arange(4) % 3), at)

        gradients["work " + name] = operations(attack)
        gradients[name] = gradients.pop("now")
    assert torch.equal(gradients[""], gradients["every"])
    assert torch.equal(gradients[""], gradients["again"])
    assert gradients["work every"] > gradients["work "]  # the weights' gradients
    forward = operations(lambda: net(x))
    assert gradients["work again"] == gradients["work "] + forward
    assert all(p.grad is None for p in net.parameters())


def test_a_row_is_left_out_where_a_trick_is_not_used() -> None:
    common = {"precision": "float32"}
    every = ("fold", "bf16", "channels_last", "input_gradients", "shared_logits", "compaction")
    named = {name: None for name in ("pgd_at", "trades", "p_sat", "iseat")}
    found = {(case.recipe, *case.without) for case in cases_of(named, without=every, common=common)}
    assert ("trades", "shared_logits") in found
    assert ("pgd_at", "shared_logits") not in found
    assert ("p_sat", "compaction") in found
    assert ("pgd_at", "compaction") not in found
    assert ("iseat", "fold") not in found  # which attacks in train mode
    assert not any("bf16" in case for case in found)


def test_a_row_without_acceleration_is_of_the_methods_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instar.bench.subject.choose_acceleration", lambda name, device: name)
    named = {name: None for name in ("pgd_at", "trades", "p_sat", "iseat")}
    found = cases_of(named, without=tuple(SWITCHES), baseline=True, common={"accelerate": "both", "precision": "bf16"})
    ways = {(case.recipe, case.style, *case.without): case.acceleration for case in found}
    assert ways["pgd_at", "instar"] == "both"
    assert ways["pgd_at", "instar", "graphs"] == "compile"
    assert ways["pgd_at", "instar", "compile"] == "graphs"
    assert ways["pgd_at", "official"] == "none"
    assert ways["p_sat", "instar", "compile"] == "graphs"
    assert ("p_sat", "instar", "graphs") not in ways  # its attack stops instances
    assert ("iseat", "instar", "compile") not in ways  # which attacks in train mode
    # What wastes work on purpose wraps the network or has no copy of it: nothing of it could be captured.
    assert not any({"fold", "input_gradients", "shared_logits"} & set(way) for way in ways)
    assert ("trades", "instar", "bf16") in ways
    plain = cases_of({"pgd_at": None}, without=("graphs", "compile"), common={"accelerate": "none"})
    assert len(plain) == 1


def test_what_is_accelerated_is_ready_before_the_clock_and_counted_as_what_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    class Again:
        def __init__(self, device: torch.device) -> None:
            pass

        def __call__(self, work: Any) -> instar.attacks.Recording:
            events.append("recorded")
            return instar.attacks.Recording(work(), lambda: events.append("replayed"))

    monkeypatch.setattr("instar.attacks.captured.CudaGraphs", Again)
    monkeypatch.setattr("instar.bench.subject.choose_acceleration", lambda name, device: name)
    found = bench(
        ["pgd_at"],
        without=["graphs"],
        turns=1,
        steps=1,
        accelerate="graphs",
        measure_memory=False,
        note=events.append,
        **SMALL,
    )
    assert events == ["2 cases on cpu", "recorded", "replayed", "replayed", "warmed up", "replayed", "turn 1 of 1"]
    assert found["pgd_at"].operations == found["pgd_at, without graphs"].operations > 0
    assert "accelerate=graphs" in found.what()


def test_the_table_tells_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instar.bench.measure.memory", lambda case: (3 * 2**20, 2**20))
    found = bench(["pgd_at", "p_sat"], baseline=True, turns=2, steps=1, out=tmp_path, **SMALL)
    stored = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in stored["rows"]}
    assert list(rows) == ["pgd_at", "pgd_at, official style", "p_sat"]
    ours, theirs = rows["pgd_at"], rows["pgd_at, official style"]
    assert theirs["operations"] > 1.2 * ours["operations"]  # weight gradients in the attack
    assert ours["units"] == 23
    assert ours["images_per_second"] == pytest.approx(8 * ours["steps_per_second"])
    assert ours["operations_per_second"] == pytest.approx(ours["operations"] * ours["steps_per_second"])
    assert ours["speedup_over_official"]["median"] == found.speedup(found["pgd_at"]).median  # type: ignore[union-attr]
    assert ours["time_over_first"] is None
    assert (ours["peak_memory"], ours["step_memory"]) == (3 * 2**20, 2**20)
    assert stored["machine"]["torch"] == torch.__version__
    table = (tmp_path / "bench.md").read_text()
    assert "3 MiB" in table
    assert "| pgd_at, official style |" in table
    assert table.count("\n| ") == 5
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_that_of_a_process_of_its_own() -> None:
    peak, added = memory(Case("pgd_at", repr(RECIPES["pgd_at"](steps=1)), **{**SMALL, "batch_size": 512}))
    assert added > 6 * 2**20  # the images alone
    assert added < peak < 4 * 2**30


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], "recipe"),
        (["pgd_at", "--without", "speed"], "switch"),
        (["pgd_at", "--turns", "0"], "turns"),
        (["pgd_at", "--steps", "0"], "steps"),
        (["pgd_at", "--batch-size", "0"], "batch_size"),
        (["pgd_at", "--batch-size", "many"], "--batch-size"),
        (["pgd_at", "--width", "0"], "width"),
        (["pgd_at", "--precision", "fp8"], "precision"),
        (["pgd_at", "--clock", "sun"], "clock"),
        (["pgd_at", "--at", "2"], "at must"),
        (["pgd_at", "--data", "nosuch"], "nosuch"),
        (["pgd_at", "--nosuch"], "flag"),
        (["pgd_at", "--accelerate", "fast"], "accelerate"),
        (["pgd_at", "--accelerate", "graphs"], "need a GPU"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words, "--device", "cpu", "--model", "small_cnn", "--no-memory"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("instar:")]) == 1
    assert said in lines[-1]


def test_a_child_that_fails_leaves_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from instar.bench import child

    monkeypatch.setattr(child.sys, "executable", "false")
    with pytest.raises(UserError, match="memory of pgd_at failed: status 1"):
        memory(Case("pgd_at", "nosuch()", **SMALL))
    found = bench(["pgd_at"], turns=1, steps=1, **SMALL)
    assert found["pgd_at"].peak_memory is None
    assert "failed" in found.markdown()


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "small_cnn", "--width", "4", "--batch-size", "4", "--turns", "1", "--steps", "1", "--no-memory"]
    assert main(["bench", "fat", *flags, "--without", "compaction", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "| fat, without compaction |" in printed


def test_without_compaction_the_attack_keeps_its_batch() -> None:
    case = Case("fat", repr(RECIPES["fat"]()), without=("compaction",), **SMALL)
    attack = prepare(case).method.attack
    assert isinstance(attack, PGD)
    assert not attack.compact
