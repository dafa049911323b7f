"""Averaged weights: SWA and EMA by hand, and whose BatchNorm statistics they have (invariants F37 to F39)."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import instar as I
from instar.models import load
from instar.train import EpochDone, Event, Interrupted, StepDone, resume, train
from instar.weightspace.average import BATCH_NORM, Average, averaged_copy, reestimate_batch_norm

SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "batch_size": 256, "epochs": 3, "precision": "float32"}


class Network(nn.Module):
    """Two convolutions, each with BatchNorm, and a linear layer, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.second, self.two = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, momentum=0.3)
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.two(self.second(F.relu(self.one(self.first(x))))))
        return self.head(F.avg_pool2d(hidden, 2).flatten(1))


@pytest.fixture
def model() -> Network:
    return Network().train()


def _batch() -> I.Batch:
    return I.Batch(torch.rand(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3)


def _follow(
    rule: Average, model: nn.Module, *, epochs: int, steps: int, first: int = 0
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The average after training with it, and the trained network's state at every epoch's end."""
    average, ends = averaged_copy(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for epoch in range(first, epochs):
        for step in range(steps):
            I.training_step(model, I.natural(), _batch(), optimizer)
            before = {name: t.clone() for name, t in average.state_dict().items()}
            rule.update(average, model, I.Progress(epoch, epochs, step, steps))
            if isinstance(rule, I.SWA) and step < steps - 1:
                assert all(torch.equal(t, before[name]) for name, t in average.state_dict().items())
        ends.append({name: t.clone() for name, t in model.state_dict().items()})
    return average, ends


def _near(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance)


def _parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _buffers(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_buffers()]


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.parametrize(("begin", "counted"), [(0.0, 6), (0.5, 3), (3, 3), (0.3, 4), (5, 1)])
def test_f38_an_average_of_snapshots_is_their_arithmetic_mean(
    model: Network, begin: float, counted: int, batch_norm: str
) -> None:
    average, ends = _follow(I.SWA(begin, batch_norm), model, epochs=6, steps=2)
    snapshots = ends[-counted:]
    for name in _parameters(model):
        mean = sum(s[name] for s in snapshots) / counted
        _near(average.state_dict()[name], mean)
        assert counted == 1 or float((mean - snapshots[-1][name]).abs().max()) > 1e-3
    for name in _buffers(model):
        averaged = batch_norm == "average" and not name.endswith("num_batches_tracked")
        expected = sum(s[name] for s in snapshots) / counted if averaged else snapshots[-1][name]
        _near(average.state_dict()[name], expected)


@pytest.mark.parametrize("begin", [0.5, 4, 6, 1.0])
def test_f38_before_its_time_an_average_of_snapshots_is_a_copy_of_the_last_one(model: Network, begin: float) -> None:
    rule, average = I.SWA(begin), averaged_copy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for epoch in range(4):
        for step in range(2):
            I.training_step(model, I.natural(), _batch(), optimizer)
            rule.update(average, model, I.Progress(epoch, 8, step, 2))
        for name, found in average.state_dict().items():
            assert torch.equal(found, model.state_dict()[name])


def test_the_time_of_the_first_snapshot_is_a_share_of_the_run_or_an_epoch() -> None:
    def first(begin: float, epochs: int) -> int | None:
        rule = I.SWA(begin)
        later = [e for e in range(epochs) if rule.weight(I.Progress(e, epochs)) < 1]
        return later[0] - 1 if later else None

    assert first(55 / 200, 200) == first(0.275, 200) == first(55, 200) == 55
    for begin, epochs, epoch in ((0.5, 10, 5), (5, 10, 5), (0.3, 7, 3), (0.29, 100, 29), (0, 4, 0), (2.5, 9, 3)):
        assert first(begin, epochs) == epoch
    assert first(1.0, 10) is None, "1 is the share, not the epoch: the run is over by then"
    assert [I.SWA(0.5).weight(I.Progress(e, 8)) for e in range(8)] == [1, 1, 1, 1, 1, 1 / 2, 1 / 3, 1 / 4]


def test_a_time_or_a_treatment_that_is_impossible_is_refused() -> None:
    for begin in (-0.1, float("nan")):
        with pytest.raises(I.UserError, match="begin of SWA must be a share of the run or an epoch"):
            I.SWA(begin)
    for rule in (I.SWA, I.EMA):
        with pytest.raises(I.UserError, match="'average', 'copy', 'reestimate'; got 'frozen'"):
            rule(batch_norm="frozen")


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
def test_f37_f39_a_moving_average_is_the_written_recursion_and_takes_statistics_from_where_it_says(
    model: Network, batch_norm: str
) -> None:
    rule, average = I.EMA(0.3, batch_norm), averaged_copy(model)
    expected = {name: t.clone() for name, t in average.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for t in range(6):
        I.training_step(model, I.natural(), _batch(), optimizer)
        rule.update(average, model, I.Progress(t // 2, 3, t % 2, 2))
        decay = min(0.3, (1 + t) / (10 + t))
        for name, now in model.state_dict().items():
            statistic = "running" in name
            if name.endswith("num_batches_tracked") or (statistic and batch_norm != "average"):
                expected[name] = now.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * now
            _near(average.state_dict()[name], expected[name])
    apart = float((average.one.running_mean - model.one.running_mean).abs().max())
    assert (apart > 1e-4) == (batch_norm == "average")
    assert int(average.one.num_batches_tracked) == 6


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_f39_an_average_never_shares_storage_with_the_trained_network(kind: str, batch_norm: str) -> None:
    model = Network().train()
    rule = I.EMA(0.5, batch_norm) if kind == "ema" else I.SWA(0.0, batch_norm)
    average, _ = _follow(rule, model, epochs=2, steps=2)
    ours, theirs = ({t.data_ptr() for t in net.state_dict().values()} for net in (average, model))
    assert len(ours) == len(theirs) == len(model.state_dict())
    assert not ours & theirs
    kept = {name: t.clone() for name, t in average.state_dict().items()}
    for _ in range(2):
        I.training_step(model, I.natural(), _batch(), torch.optim.SGD(model.parameters(), lr=0.5))
    assert all(torch.equal(t, kept[name]) for name, t in average.state_dict().items())
    assert not any(p.requires_grad for p in average.parameters())


def _statistics_by_hand(network: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    """For each BatchNorm, the mean over batches of the mean and the unbiased variance of what goes into it."""
    network = copy.deepcopy(network).train()
    found: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def note(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                rows = inputs[0].detach().transpose(0, 1).flatten(1)
                centre = rows.sum(1) / rows.shape[1]
                variance = (rows - centre.unsqueeze(1)).square().sum(1) / (rows.shape[1] - 1)
                found.setdefault(f"{name}.running_mean", []).append(centre)
                found.setdefault(f"{name}.running_var", []).append(variance)

            module.register_forward_pre_hook(note)
    for x in images:
        network(x)
    return {name: sum(seen[1:], seen[0]) / len(seen) for name, seen in found.items()}


def test_f39_statistics_that_are_estimated_anew_are_those_computed_by_hand(model: Network) -> None:
    average, _ = _follow(I.SWA(0.0), model, epochs=2, steps=2)
    images = [2 + torch.randn(size, 1, 4, 4, dtype=torch.float64) for size in (8, 8, 3)]
    before = {name: p.clone() for name, p in average.named_parameters()}
    average.one.running_mean.fill_(1e6)  # whatever they were, nothing of it stays
    reestimate_batch_norm(average, images)
    expected = _statistics_by_hand(average, images)
    assert set(expected) == {name for name in _buffers(model) if "running" in name}
    for name, statistic in expected.items():
        _near(average.state_dict()[name], statistic)
    assert all(torch.equal(p, before[name]) for name, p in average.named_parameters())
    assert not average.training
    assert not average.two.training
    assert (average.one.momentum, average.two.momentum) == (0.1, 0.3)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().eval()
    reestimate_batch_norm(bare, images)
    assert not bare.training


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The training batches of every pass over them in a run, in order: a list for each pass."""
    import instar.train as machine

    passed: list[list[Tensor]] = []
    usual = machine.batches

    def watched(*arguments: Any, **options: Any) -> Any:
        if not options["shuffle"]:
            yield from usual(*arguments, **options)
            return
        passed.append([])
        for batch in usual(*arguments, **options):
            passed[-1].append(batch.x.clone())
            yield batch

    monkeypatch.setattr(machine, "batches", watched)
    return passed


RULES = {
    "swa": I.SWA(0.0),
    "ema_reestimate": I.EMA(0.5, "reestimate"),
    "ema_copy": I.EMA(0.5, "copy"),
    "ema_average": I.EMA(0.5, "average"),
}


@pytest.mark.parametrize("name", RULES)
def test_f39_a_run_saves_its_average_with_the_documented_statistics(
    name: str, tmp_path: Path, stream: list[list[Tensor]]
) -> None:
    method = replace(I.pgd_at(steps=1), average=RULES[name])
    train(method, out=tmp_path / "run", **SMALL | {"epochs": 1})
    state = load_file(tmp_path / "run" / "checkpoints" / "state.safetensors")
    saved = load(tmp_path / "run" / "checkpoints" / "last.safetensors")
    anew = RULES[name].batch_norm == "reestimate"
    assert [len(passed) for passed in stream] == [5] * (1 + anew)
    own = {key: state[f"model.{key}"] for key in saved.state_dict() if "running" in key}
    assert own
    if anew:
        assert all(torch.equal(a, b) for a, b in zip(*stream, strict=True)), "the very batches of the epoch"
        expected = _statistics_by_hand(saved, stream[1])
        for key, statistic in expected.items():
            _near(saved.state_dict()[key], statistic, 1e-5)
            assert float((statistic - own[key]).abs().max()) > 1e-3
    else:
        apart = max(float((saved.state_dict()[key] - own[key]).abs().max()) for key in own)
        assert apart == 0 if name == "ema_copy" else apart > 1e-3
    for key, tensor in saved.state_dict().items():
        assert torch.equal(tensor, state[f"average.{key}"])


def _interrupting(at: int) -> Callable[[Event], None]:
    """Ask to stop after the step with this number in the run, as Ctrl-C does."""
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        if isinstance(event, StepDone):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGINT)

    return watch


def test_f38_a_run_averages_the_ends_of_its_epochs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    method = replace(I.pgd_at(steps=1), average=I.SWA(1 / 3))
    ends: list[dict[str, Tensor]] = []

    def keep(event: Event) -> None:
        if isinstance(event, EpochDone):
            ends.append(load_file(tmp_path / "whole" / "checkpoints" / "state.safetensors"))

    train(method, out=tmp_path / "whole", on_event=keep, **SMALL)
    parameters = [key for key in ends[0] if key.startswith("average.") and "running" not in key and "num_" not in key]
    assert parameters
    for key in parameters:
        trained = [state[key.replace("average.", "model.", 1)] for state in ends]
        assert torch.equal(ends[0][key], trained[0])
        if key.endswith(("weight", "bias")):
            _near(ends[1][key], trained[1])
            _near(ends[2][key], (trained[1] + trained[2]) / 2, 1e-6)

    again = False
    for at in (2, 4, 6):  # within epochs 0 and 1, and within epoch 2 (5 steps an epoch)
        with pytest.raises(Interrupted, match="--resume"):
            train(method, out=tmp_path / "parts", resume=again, on_event=_interrupting(at), **SMALL)
        again = True
    resume(tmp_path / "parts")
    for file in ("state", "best", "last"):
        a, b = (load_file(tmp_path / run / "checkpoints" / f"{file}.safetensors") for run in ("whole", "parts"))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
