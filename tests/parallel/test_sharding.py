"""Networks in shards: what a single process can show of them. Several processes are held to one in test_processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

import instar as I
from instar.evidence import Batch
from instar.instances import InstanceTable
from instar.method import Method
from instar.methods import RECIPES
from instar.methods.grad_align import GradientMisalignment
from instar.models import create
from instar.parallel import Group
from instar.sharding import Shards, blocks, displaced, is_sharded, local, norms, put, reshard, shard, whole
from instar.step import check_shardable, training_loss, training_step
from instar.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[Group]:
    """A group of one process, which shards like any other."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Group()
    distributed.destroy_process_group()


def _pair(group: Group, name: str = "small_cnn", **more: int) -> tuple[nn.Module, nn.Module]:
    """A network, and the same one in shards."""
    plain = create(name, classes=4, channels=1, width=4, seed=0, image_size=8, **more).train()
    sharded = copy.deepcopy(plain)
    shard(sharded, group=group, device=CPU)
    return plain, sharded


def _batch(count: int = 6) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.rand(count, 1, 8, 8), torch.arange(count) % 4)


def _weights_after_a_step(model: nn.Module, method: Method) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for step in range(2):
        training_step(model, method, _batch(), optimizer, generator=torch.Generator().manual_seed(step))
    reshard(model)
    return {name: whole(p).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "wrn-10-1", "small_cnn"])
def test_instars_networks_shard_block_by_block_and_compute_the_same(name: str, group: Group) -> None:
    plain, sharded = _pair(group, name)
    assert is_sharded(sharded)
    assert not is_sharded(plain)
    assert len(blocks(plain)) == {"resnet18": 8, "preact_resnet18": 8, "wrn-10-1": 3, "small_cnn": 0}[name]
    method = replace(I.trades(steps=1), perturbation=I.AWP(0.01))
    ours, theirs = (_weights_after_a_step(model, method) for model in (sharded, plain))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], atol=2e-5, rtol=1e-4, msg=key)
    for (key, ours_), theirs_ in zip(sharded.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=1e-5, rtol=1e-4, msg=key)


def test_in_bfloat16_a_perturbation_is_seen_although_autocast_remembers_weights(group: Group) -> None:
    found = {}
    for name, gamma in (("still", 0.0), ("moved", 0.5)):
        for kind, model in zip(("plain", "sharded"), _pair(group), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                weights = _weights_after_a_step(model, replace(I.pgd_at(steps=1), perturbation=I.AWP(gamma)))
            found[name, kind] = torch.cat([weight.reshape(-1) for weight in weights.values()])
    effect = (found["moved", "plain"] - found["still", "plain"]).norm()
    assert (found["moved", "sharded"] - found["moved", "plain"]).norm() < 0.1 * effect


def test_a_displaced_network_computes_elsewhere_and_comes_back_bit_for_bit_also_after_an_error(group: Group) -> None:
    plain, sharded = _pair(group)
    before = {name: whole(p).clone() for name, p in sharded.named_parameters()}
    x = _batch().x
    offsets = {name: torch.full_like(p, 0.3) for name, p in sharded.named_parameters()}
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.3)
        expected = plain.eval()(x)
        with contextlib.suppress(KeyError), displaced(sharded, offsets):
            torch.testing.assert_close(sharded.eval()(x), expected)
            raise KeyError
        assert float((sharded.eval()(x) - expected).abs().max()) > 1e-3
    reshard(sharded)
    assert all(torch.equal(whole(p), before[name]) for name, p in sharded.named_parameters())


def test_lengths_of_shards_are_those_of_the_whole(group: Group) -> None:
    _, sharded = _pair(group)
    parameters = list(sharded.parameters())
    torch.testing.assert_close(torch.stack(norms(parameters)), torch.stack([whole(p).norm() for p in parameters]))
    assert all(not hasattr(length, "full_tensor") for length in norms(parameters))


def test_what_is_put_into_shards_comes_together_again(group: Group) -> None:
    _, sharded = _pair(group)
    parameter = next(sharded.parameters())
    values = torch.rand(parameter.shape)
    put(parameter, values)
    assert torch.equal(whole(parameter), values)
    assert local(parameter).data_ptr() == local(parameter).data_ptr(), "no copy"


def test_a_state_goes_into_shards_and_out_again_with_all_that_the_optimiser_remembers(group: Group) -> None:
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        torch.manual_seed(0)
        model = create("small_cnn", classes=4, channels=1, width=4, seed=0, image_size=8)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind([{"params": list(model.parameters()), "weight_decay": 0.1}], lr=0.1, **options)
        training_step(model, I.pgd_at(steps=1), _batch(), optimizer)
        state = I.checkpoint.State(model, optimizer, InstanceTable(6), copy.deepcopy(model), epoch=3, updates=7)
        twin = copy.deepcopy(model)
        found = copy.deepcopy(optimizer.state_dict())
        shards = Shards(state, group=group, device=CPU)
        assert is_sharded(shards.state.model)
        assert is_sharded(shards.state.average)  # type: ignore[arg-type]
        assert shards.state.optimizer.param_groups[0]["weight_decay"] == 0.1
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()  # what is gathered must come from the shards
        again = shards.gather()
        assert again is not None
        assert (again.epoch, again.updates) == (3, 7)
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in again.model.state_dict().items())
        for place, entries in again.optimizer.state_dict()["state"].items():
            for key, entry in entries.items():
                assert torch.equal(entry, found["state"][place][key]), (kind, key)


def test_the_memory_order_of_weights_does_not_matter(group: Group) -> None:
    model = create("small_cnn", classes=4, channels=1, width=4, seed=0, image_size=8)
    expected = [p.detach().clone() for p in model.parameters()]
    shard(model.to(memory_format=torch.channels_last), group=group, device=CPU)  # type: ignore[call-overload]
    assert all(torch.equal(whole(p), e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_parameter_that_is_one_number_is_refused_in_a_line(group: Group) -> None:
    model = nn.Module()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(I.UserError, match="temperature is a single number, which cannot be sharded"):
        shard(model, group=group, device=CPU)


REFUSED = {
    "free_at": "makes steps of its own",
    "grad_align": "queries the network again",
    "iseat": "needs weights with and without AWP",
}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "kd_swa"])
def test_a_method_is_sharded_or_refused_with_its_reason(name: str) -> None:
    method = RECIPES[name]()
    if name not in REFUSED:
        check_shardable(method)
        return
    with pytest.raises(I.UserError, match=REFUSED[name]) as refused:
        check_shardable(method)
    assert "\n" not in str(refused.value)
    assert "--shard none" in str(refused.value)


@pytest.mark.parametrize("estimator", ["power", "gauss_newton"])
def test_curvature_in_weight_space_is_refused(estimator: str) -> None:
    with pytest.raises(I.UserError, match="computes with the weights themselves"):
        check_shardable(I.h_sat(estimator=estimator))


def test_remembered_signals_stop_rules_and_ascents_are_looked_at_too() -> None:
    queries = GradientMisalignment()
    for method in (
        replace(I.pgd_at(), remember=(("gap", queries),)),
        replace(I.pgd_at(), perturbation=I.AWP(5e-3, ascend=queries)),
    ):
        with pytest.raises(I.UserError, match="queries the network again"):
            check_shardable(method)


def test_a_loss_with_perturbed_weights_outlives_no_call(group: Group) -> None:
    _, sharded = _pair(group)
    with pytest.raises(I.UserError, match="within training_step only"):
        training_loss(sharded, replace(I.pgd_at(), perturbation=I.AWP(5e-3)), _batch())


def test_one_process_has_nothing_to_shard_and_a_wrong_word_gets_the_known_ones(tmp_path: Path) -> None:
    distributed.destroy_process_group()
    try:
        usual = {"epochs": 1, "width": 4, "batch_size": 256, "arguments": {"steps": 1}}
        done = train("pgd_at", out=tmp_path / "run", shard="full", **usual)
        assert not is_sharded(done.model)
        with pytest.raises(I.UserError, match=r"unknown shard 'ful'.*full"):
            train("pgd_at", out=tmp_path / "other", shard="ful")
    finally:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
