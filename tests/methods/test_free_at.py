"""Free-AT: against the loop of its paper, with a perturbation that outlives batches, saves and interruptions (F35)."""

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
from instar.expression import assign
from instar.instances import read_instances
from instar.methods.free_at import PERTURBATION, Replays
from instar.passes import Passes, passes
from instar.train import Event, Interrupted, StepDone, resume, train

SIZE, CLASSES, EPS = 8, 3, 0.1
SMALL = {"data": "digits", "model": "small_cnn", "width": 4, "batch_size": 256, "epochs": 2, "precision": "float32"}


class Network(nn.Module):
    """Convolution, BatchNorm and a linear layer, smooth and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 3).flatten(1))


@pytest.fixture
def model() -> Network:
    return Network().train()


@pytest.fixture
def batches() -> list[I.Batch]:
    """Two batches with many pixels at the edge of the box, where the perturbation of one does not fit the other."""
    made = []
    for _ in range(2):
        x = torch.rand(SIZE, 1, 6, 6, dtype=torch.float64)
        x[x < 0.2], x[x > 0.8] = 0.0, 1.0
        made.append(I.Batch(x, torch.randint(CLASSES, (SIZE,))))
    return made


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def _same_state(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, found), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def _near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=1e-12)


def _replay(
    model: nn.Module, batch: I.Batch, delta: Tensor, optimizer: torch.optim.Optimizer, step: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One replay of Algorithm 1: the loss, which images were right, and the new perturbation."""
    leaf = (batch.x + delta).clamp(0, 1).requires_grad_()
    logits = model(leaf)
    losses = F.cross_entropy(logits, batch.y, reduction="none")
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    delta = (delta + step * leaf.grad.sign()).clamp(-EPS, EPS)
    return losses.detach(), logits.argmax(1) == batch.y, (batch.x + delta).clamp(0, 1) - batch.x


def test_f35_one_replay_from_no_perturbation_is_a_joint_step_by_the_gradients_at_the_clean_images(
    model: Network, batches: list[I.Batch]
) -> None:
    batch, by_hand = batches[0], copy.deepcopy(model)
    theirs = _sgd(by_hand)
    x = batch.x.clone().requires_grad_()
    F.cross_entropy(by_hand(x), batch.y).backward()
    theirs.step()
    I.training_step(model, I.free_at(replays=1, eps=EPS), batch, _sgd(model))
    _same_state(model, by_hand)
    expected = (batch.x + EPS * x.grad.sign()).clamp(0, 1) - batch.x
    _near(batch.shared[PERTURBATION], expected)
    assert float(expected.abs().max()) == pytest.approx(EPS)


@pytest.mark.parametrize("replays", [1, 3])
@pytest.mark.parametrize("step", [EPS, 0.03])
def test_f35_replays_of_two_batches_are_the_written_loop_with_one_perturbation(
    model: Network, batches: list[I.Batch], replays: int, step: float
) -> None:
    by_hand = copy.deepcopy(model)
    ours, theirs = _sgd(model), _sgd(by_hand)
    method = I.free_at(replays=replays, eps=EPS, step_size=step)
    shared: dict[str, Tensor] = {}
    delta = torch.zeros_like(batches[0].x)
    for batch in (*batches, *batches):
        right = torch.zeros(SIZE, dtype=torch.int32)
        for _ in range(replays):
            last = (batch.x + delta).clamp(0, 1)
            losses, correct, delta = _replay(by_hand, batch, delta, theirs, step)
            right += correct
        computed, _ = I.training_step(model, method, replace(batch, shared=shared), ours)
        _same_state(model, by_hand)
        _near(shared[PERTURBATION], delta)
        _near(computed.loss, losses)
        _near(computed.adversary.x, last)
        assert computed.adversary.kappa.tolist() == right.tolist()
        assert float(delta.abs().max()) <= EPS + 1e-12
    assert int(model.norm.num_batches_tracked) == 4 * replays


def test_f35_the_perturbation_of_a_batch_is_where_the_next_one_begins(model: Network, batches: list[I.Batch]) -> None:
    method, first, second = I.free_at(replays=1, eps=EPS), *batches
    shared: dict[str, Tensor] = {}
    optimizer = _sgd(model)
    I.training_step(model, method, replace(first, shared=shared), optimizer)
    kept = shared[PERTURBATION].clone()
    found = I.training_step(model, method, replace(second, shared=shared), optimizer)[0].adversary
    _near(found.x, (second.x + kept).clamp(0, 1))
    assert float((found.x - second.x).abs().max()) == pytest.approx(EPS)
    fresh = I.training_step(model, method, replace(second, shared={}), optimizer)[0].adversary
    assert torch.equal(fresh.x, second.x)


def test_a_batch_of_another_size_begins_without_a_perturbation(model: Network, batches: list[I.Batch]) -> None:
    method, shared = I.free_at(replays=2, eps=EPS), {}
    I.training_step(model, method, replace(batches[0], shared=shared), _sgd(model))
    smaller = I.Batch(batches[1].x[:5], batches[1].y[:5], shared=shared)
    twin = copy.deepcopy(model)
    ours, _ = I.training_step(model, method, smaller, _sgd(model))
    theirs, _ = I.training_step(twin, method, replace(smaller, shared={}), _sgd(twin))
    assert torch.equal(ours.loss, theirs.loss)
    assert shared[PERTURBATION].shape == smaller.x.shape


def test_a_radius_of_zero_is_as_many_natural_steps_as_there_are_replays(model: Network, batches: list[I.Batch]) -> None:
    natural = copy.deepcopy(model)
    ours, theirs = _sgd(model), _sgd(natural)
    for batch in batches:
        I.training_step(model, I.free_at(replays=3, eps=0.0), batch, ours)
        for _ in range(3):
            I.training_step(natural, I.natural(), batch, theirs)
    _same_state(model, natural)


def test_modes_and_images_are_left_as_found(model: Network, batches: list[I.Batch]) -> None:
    model.head.eval()
    before = batches[0].x.clone()
    I.training_step(model, I.free_at(replays=2, eps=EPS), batches[0], _sgd(model))
    assert [m.training for m in (model, model.conv, model.norm, model.head)] == [True, True, True, False]
    assert torch.equal(batches[0].x, before)
    assert not batches[0].shared[PERTURBATION].requires_grad


PLAIN = I.free_at()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(PLAIN, attack=replace(PLAIN.attack, stop=I.Patience(1))), "without a stop rule"),
        (lambda: assign(PLAIN, "attack.stop", I.Exceeds(I.ProbabilityGap(), 0.1)), "without a stop rule"),
        (lambda: replace(PLAIN, attack=I.trades().attack), r"PGD on CrossEntropy\(\)"),
        (lambda: replace(PLAIN, attack=I.NoAttack()), r"PGD on CrossEntropy\(\)"),
        (lambda: replace(PLAIN, attack=I.Several(PLAIN.attack, (PLAIN.attack,))), r"PGD on CrossEntropy\(\)"),
        (lambda: replace(PLAIN, perturbation=I.AWP(5e-3)), "no room for a weight perturbation"),
        (lambda: replace(PLAIN, loss=I.CrossEntropy() + 6 * I.KL()), "adversarial logits only"),
        (lambda: replace(PLAIN, loss=I.CrossEntropy("clean")), "adversarial logits only"),
        (lambda: replace(PLAIN, loss=I.GeometryWeight(0.0) * I.CrossEntropy()), "adversarial logits only"),
        (lambda: I.free_at(replays=0), r"count of Replays \(m\) must be at least 1; got 0"),
        (lambda: replace(I.trades(), step=Replays(4)), "Replays takes"),
    ],
    ids=["patience", "bound", "kl", "no_attack", "several", "awp", "consistency", "clean", "kappa", "count", "trades"],
)
def test_parts_for_which_one_shared_gradient_leaves_no_room_are_refused_in_one_line(
    change: Callable[[], I.Method], message: str
) -> None:
    with pytest.raises(I.UserError, match=message) as refused:
        change()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("replays", [1, 2, 8])
def test_a_step_costs_one_forward_and_one_full_backward_a_replay(
    model: Network, batches: list[I.Batch], replays: int
) -> None:
    method = I.free_at(replays=replays, eps=EPS)
    assert passes(method) == Passes(replays, 0, replays)
    assert passes(method).units == 3 * replays
    forwards, gradients = [], []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    model.conv.weight.register_hook(lambda _: gradients.append(1))
    I.training_step(model, method, batches[0], _sgd(model))
    assert (len(forwards), len(gradients)) == (replays, replays)


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


def test_a_run_resumed_in_the_middle_of_an_epoch_goes_on_with_its_perturbation(tmp_path: Path) -> None:
    kind = SMALL | {"arguments": {"replays": 2}}
    train("free_at", out=tmp_path / "whole", **kind)
    with pytest.raises(Interrupted, match="--resume"):
        train("free_at", out=tmp_path / "parts", on_event=_interrupting(2), **kind)
    name = f"shared.{PERTURBATION}"
    kept = load_file(tmp_path / "parts" / "checkpoints" / "state.safetensors")[name]
    assert kept.shape == (256, 1, 8, 8)
    assert float(kept.abs().max()) > 0
    with pytest.raises(Interrupted):
        train("free_at", out=tmp_path / "parts", resume=True, on_event=_interrupting(5), **kind)
    resume(tmp_path / "parts")
    for file in ("state", "best", "last"):
        a, b = (load_file(tmp_path / run / "checkpoints" / f"{file}.safetensors") for run in ("whole", "parts"))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
        assert (name in a) == (file == "state")
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    for table in ("epoch_000.npz", "epoch_001.npz"):
        rows, others = (read_instances(tmp_path / run / "instances" / table) for run in ("whole", "parts"))
        assert all((rows[key] == others[key]).all() for key in rows)
        assert rows["kappa"].max() == 2


def test_a_resume_that_lost_the_perturbation_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SMALL | {"epochs": 1, "arguments": {"replays": 2}}
    whole = train("free_at", out=tmp_path / "whole", **kind).model.state_dict()
    with pytest.raises(Interrupted):
        train("free_at", out=tmp_path / "parts", on_event=_interrupting(2), **kind)
    step = Replays.__call__

    def forgetful(self: Replays, model: nn.Module, method: I.Method, batch: I.Batch, *rest: Any, **options: Any) -> Any:
        if options["progress"].step == 2:
            batch.shared.clear()
        return step(self, model, method, batch, *rest, **options)

    monkeypatch.setattr(Replays, "__call__", forgetful)
    parts = resume(tmp_path / "parts").model.state_dict()
    assert not all(torch.equal(whole[key], parts[key]) for key in whole)
