"""Shares and pieces of a batch: together they are the batch, and what cannot be divided says so."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import instar as I
from instar.attacks import PGD, Gaussian, Start, Uniform
from instar.data import AUGMENTATIONS, TrainSplit, augmentation, batches, load
from instar.method import Step
from instar.models.batch_norm import normalised_by
from instar.parallel import ALONE, Group, _carriers, _meet, backend, claim_gpu, launched
from instar.signals import Signal
from instar.step import training_step
from instar.train import _was_restarted, train


def _shares(count: int) -> list[Group]:
    """The groups that so many processes would have; nothing here makes them exchange anything."""
    return [Group(rank, count) for rank in range(count)]


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_shares_of_every_augmented_batch_are_the_batch(name: str) -> None:
    images = load("digits")
    split = TrainSplit(images)
    usual = {"batch_size": 10, "epoch": 3, "seed": 5, "shuffle": True, "drop_last": True, "limit": 2}
    augment = augmentation(name, images.info)
    whole = list(batches(split, augment=augment, **usual))
    shares = [list(batches(split, augment=augment, group=group, **usual)) for group in _shares(4)]
    assert [len(share[0]) for share in shares] == [3, 3, 2, 2]
    for step, batch in enumerate(whole):
        for field in ("x", "y", "index"):
            assert torch.equal(torch.cat([getattr(share[step], field) for share in shares]), getattr(batch, field))


def test_a_process_without_a_row_in_the_last_batch_goes_without_it() -> None:
    split = TrainSplit(load("digits"))  # 1,437 images: the last batch of 100 has 37
    usual = {"batch_size": 718, "epoch": 0, "seed": 0, "shuffle": False, "drop_last": False}
    lengths = [[len(batch) for batch in batches(split, group=group, **usual)] for group in _shares(2)]
    assert lengths == [[359, 359, 1], [359, 359]]


@pytest.mark.parametrize("ball", [I.Linf(0.1), I.L2(0.5), I.L1(3.0)])
@pytest.mark.parametrize("start", [Uniform(), Gaussian(0.01), Uniform(2.0)])
def test_starts_are_drawn_for_the_whole_batch(start: Start, ball: I.Ball) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    batch = I.Batch(torch.rand(7, 1, 4, 4, dtype=torch.float64), torch.arange(7) % 3)
    attack = PGD(ball, start=start, steps=2, step_size=0.05)

    def found(part: I.Batch) -> Tensor:
        return attack(model, part, generator=torch.Generator().manual_seed(3)).x

    whole = found(batch)
    torch.testing.assert_close(
        torch.cat([found(batch.share(group)) for group in _shares(3)]), whole, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(torch.cat([found(piece) for piece in batch.split(4)]), whole, atol=1e-12, rtol=0)


def test_pieces_carry_all_that_a_batch_knows() -> None:
    batch = I.Batch(
        torch.rand(5, 1, 2, 2), torch.arange(5), index=torch.arange(5) + 7, memory={"gap": torch.rand(5)},
        target=torch.rand(5, 5), labelled=torch.ones(5).bool(), source=torch.arange(5), shared={"w": torch.ones(1)},
    )  # fmt: skip
    pieces = batch.share(Group(1, 2)).split(2)
    assert [(piece.part.start, piece.part.stop, piece.part.total) for piece in pieces] == [(3, 4, 5), (4, 5, 5)]
    for field in ("x", "y", "index", "target", "labelled", "source"):
        assert torch.equal(torch.cat([getattr(piece, field) for piece in pieces]), getattr(batch, field)[3:])
    assert torch.equal(torch.cat([piece.memory["gap"] for piece in pieces]), batch.memory["gap"][3:])
    assert all(piece.shared is batch.shared for piece in pieces)


@I.expression.value
class _Coupled(Signal):
    """Looks at the whole batch; says so, or does not."""

    says: bool = True

    @property
    def couples(self) -> bool:  # type: ignore[override]
        return self.says

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"adv"})

    def __call__(self, evidence: I.Evidence) -> Tensor:
        return evidence.batchwide(lambda v: v - v.mean(), I.CrossEntropy()(evidence).detach())


def _step(loss: Signal, *, accumulate: int = 2, generator: torch.Generator | None = None) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    batch = I.Batch(torch.rand(6, 1, 2, 2), torch.arange(6) % 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training_step(
        model, replace(I.pgd_at(steps=1), loss=loss), batch, optimizer, accumulate=accumulate, generator=generator
    )


def test_a_signal_that_looks_at_the_whole_batch_in_pieces_must_say_so() -> None:
    draws = torch.Generator().manual_seed(0)
    _step(_Coupled(True) * I.CrossEntropy(), generator=draws)
    with pytest.raises(I.UserError, match="couples = True"):
        _step(_Coupled(False) * I.CrossEntropy(), generator=draws)


def test_pieces_without_a_generator_are_refused() -> None:
    with pytest.raises(I.UserError, match="needs a generator"):
        _step(I.CrossEntropy())


def test_more_pieces_than_instances_are_refused() -> None:
    with pytest.raises(I.UserError, match="6 instances cannot be accumulated in 7 parts"):
        _step(I.CrossEntropy(), accumulate=7, generator=torch.Generator())


def test_values_with_a_gradient_do_not_cross_processes() -> None:
    with pytest.raises(I.UserError, match="detach"):
        Group(0, 2).part(4).batchwide(lambda v: v, torch.ones(2, requires_grad=True))


def test_a_step_of_ones_own_that_does_not_divide_is_refused() -> None:
    @dataclass(frozen=True)
    class Own(Step):
        divides: ClassVar[bool] = False

        def check(self, method: I.Method) -> None: ...

        def __call__(self, *arguments: object, **options: object) -> None:  # type: ignore[override]
            raise AssertionError("it must not get here")

    model = nn.Linear(1, 2)
    batch = I.Batch(torch.rand(4, 1, 1, 1), torch.zeros(4).long())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(I.UserError, match="does not say that it can divide"):
        training_step(model, replace(I.pgd_at(), step=Own()), batch.share(Group(1, 2)), optimizer)


def test_batch_norm_is_left_as_found_and_frozen_layers_use_their_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)).train()
    x = torch.rand(4, 1, 5, 5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with normalised_by(net, "frozen", ALONE):
        found = net(x)
        assert isinstance(net[1], nn.BatchNorm2d)
        assert net[1].training
    assert type(net[1]) is nn.BatchNorm2d
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    torch.testing.assert_close(found, net.eval()(x))
    with pytest.raises(I.UserError, match="unknown kind of BatchNorm 'globl'"), normalised_by(net, "globl", ALONE):
        pass
    with normalised_by(net, "sync", ALONE):
        assert type(net[1]) is nn.BatchNorm2d, "a single process pays nothing"


def test_layers_of_a_deep_copy_keep_their_group() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2))
    with normalised_by(net, "sync", Group(0, 2)):
        twin = copy.deepcopy(net).eval()
        x = torch.rand(3, 2, 4, 4)
        torch.testing.assert_close(twin(x), F.batch_norm(x, net[0].running_mean, net[0].running_var))


def test_without_a_launcher_there_is_one_process_and_restarts_are_counted() -> None:
    with launched(torch.device("cpu"), {}) as group:
        assert (group.rank, group.size, group.restarts) == (0, 1, 0)
    with launched(torch.device("cpu"), {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RESTART_COUNT": "2"}) as group:
        assert (group.size, group.restarts) == (1, 2)


def _launch(local: int, here: int) -> dict[str, str]:
    return {"WORLD_SIZE": "8", "RANK": str(4 + local), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(here)}


def test_each_process_of_a_machine_takes_its_gpu_before_another_one_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [claim_gpu(_launch(local, 4), gpus=4) for local in range(4)] == [0, 1, 2, 3]
    assert taken == [0, 1, 2, 3]
    assert claim_gpu({"LOCAL_RANK": "3"}, gpus=4) is None, "a single process takes what PyTorch gives it"
    assert claim_gpu(_launch(1, 2), gpus=0) is None, "without a GPU there is none to take"
    assert taken == [0, 1, 2, 3]


def test_a_run_takes_its_gpu_first_unless_it_is_to_run_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []

    def take(local: int) -> None:
        order.append(f"take {local}")

    def touch(name: str) -> torch.device:
        order.append(f"touch {name}")
        raise I.UserError("far enough")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    monkeypatch.setattr("instar.train.choose_device", touch)
    for name, value in _launch(1, 2).items():
        monkeypatch.setenv(name, value)
    for device in ("cuda", "auto", "cpu"):
        with pytest.raises(I.UserError, match="far enough"):
            train("pgd_at", out=tmp_path / "run", device=device)
    assert order == ["take 1", "touch cuda", "take 1", "touch auto", "touch cpu"]


def test_every_process_of_a_machine_with_too_few_gpus_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda local: None)
    for local in range(4):
        with pytest.raises(I.UserError, match="4 processes of this machine need a GPU each, and it has 2") as refused:
            claim_gpu(_launch(local, 4), gpus=2)
        assert "--nproc-per-node 2" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_gpus_exchange_through_nccl_and_numbers_through_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: True)
    assert backend(torch.device("cuda", 3)) == "cpu:gloo,cuda:nccl"
    assert backend(torch.device("cpu")) == "gloo"
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: False)
    assert backend(torch.device("cuda")) == "gloo"


def test_what_a_group_cannot_carry_goes_through_a_device_that_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "get_backend_config", lambda: "cuda:nccl")
    assert _carriers() == ("cuda",)
    sent: list[Tensor] = []

    def reduce(tensor: Tensor, how: object, group: object) -> None:
        sent.append(tensor)
        tensor += 1

    monkeypatch.setattr(distributed, "all_reduce", reduce)
    # A group for "meta" tensors alone stands in for nccl's: both take none of the CPU's.
    meta = Group(0, 2, carriers=("meta",))
    with pytest.raises(NotImplementedError, match="meta"):  # it was carried there, and has no data to come back with
        meta.total(torch.ones(2))
    assert sent[0].device.type == "meta"
    found = Group(0, 2, carriers=("cpu", "cuda")).total(torch.ones(2))
    assert sent[1].device.type == "cpu"
    assert torch.equal(found, torch.full((2,), 2.0))


def test_more_processes_than_instances_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(I.UserError, match="batch_size must be at least 8"):
        train("pgd_at", out=tmp_path / "run", batch_size=4, accumulate=8, width=4)
    assert not (tmp_path / "run").exists()


class _Store(dict):
    """As much of a store as meeting needs, for processes that are threads."""

    def set(self, key: str, word: str) -> None:
        self[key] = word.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        while key not in self:
            time.sleep(0.001)
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_processes_that_are_started_again_meet_under_a_new_name_in_the_store_that_the_dead_have_left() -> None:
    store = _Store()
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            met = set(threads.map(lambda rank: _meet(store, rank, 3), (2, 0, 1)))
        assert len(met) == 1
        names += met
    assert names[0] != names[1]


@pytest.mark.parametrize(
    ("launch", "restarts", "expected"), [("", 0, False), ("42", 0, True), ("43", 0, False), ("43", 1, True)]
)
def test_a_restarted_launch_knows_its_own_folder(launch: str, restarts: int, expected: bool, tmp_path: Path) -> None:
    group = Group(launch=launch, restarts=restarts)
    assert not _was_restarted(tmp_path, group)
    (tmp_path / "run.json").write_text('{"launch": "42"}')
    assert _was_restarted(tmp_path, group) is expected
