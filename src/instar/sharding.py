"""Weights in shards, for networks that one GPU cannot hold: PyTorch's ``fully_shard`` (FSDP2) behind a few functions.

Each process keeps its rows of every parameter, and of its gradient, momentum and average. A block of the network is
put together from everybody's rows right before it computes, forward and backward, and freed right after. Whoever
changes weights changes the shards; weights that exist for a moment only (AWP, SAM) take their place in the shards, and
leave it again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from instar.errors import UserError
from instar.parallel import Group

if TYPE_CHECKING:
    from instar.checkpoint import State

KINDS = ("none", "full")
"""``"none"``: every process holds the whole network. ``"full"``: each holds its share of every parameter."""


def is_sharded(model: nn.Module) -> bool:
    """Whether a network's weights lie in shards, so that all processes must make the same passes through it.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    loaded = sys.modules.get("torch.distributed.fsdp")  # only who shards has imported it
    kind = getattr(loaded, "FSDPModule", None)
    return kind is not None and isinstance(model, kind)


def shard(model: nn.Module, *, group: Group, device: torch.device) -> None:
    """Move a network to the device in shards, block by block, so that the whole of it is never there.

    A block is an entry of a ``Sequential`` or ``ModuleList`` that is made of further layers; what belongs to none is a
    block of its own. The optimiser must be made afterwards.

    Args:
        model: A network on the CPU, equal in all processes, whose parameters are contiguous.
        group: The processes.
        device: Where they compute.

    Raises:
        UserError: A parameter cannot be sharded, or this PyTorch knows no ``fully_shard``.

    Source: Zhao et al. 2023, "PyTorch FSDP"; ``torch.distributed.fsdp.fully_shard``.
    """
    try:
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError(
            f"shard = full needs PyTorch 2.6 or newer with fully_shard; this is {torch.__version__}"
        ) from None
    _check_parameters(model)
    if group.handle is None:
        mesh = init_device_mesh(device.type, (group.size,))
    else:
        mesh = DeviceMesh.from_group(group.handle, device.type)
    for unit in (*blocks(model), model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of a network that are put together one after the other, inner ones first; the rest is one more.

    Example:
        >>> block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> len(blocks(nn.Sequential(block, nn.Linear(2, 2))))
        1
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for entry in module.children():
                inner = any(True for _ in entry.children()) and not isinstance(entry, nn.ModuleList | nn.ModuleDict)
                if inner and any(True for _ in entry.parameters()):
                    found[id(entry)] = entry
    found.pop(id(model), None)
    return list(found.values())[::-1]


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"the parameter {name} is a single number, which cannot be sharded: train with --shard none"
            )
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()  # the only memory order that fully_shard takes


def reshard(model: nn.Module) -> None:
    """Give back blocks that are still whole after a forward pass that no backward pass followed."""
    if is_sharded(model):
        for module in model.modules():
            if is_sharded(module):
                module.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a parameter, sharing its memory and without gradient; all of it where nothing is sharded.

    Example:
        >>> local(torch.ones(2, requires_grad=True))
        tensor([1., 1.])
    """
    own: Any = tensor.detach()
    return cast("Tensor", own.to_local() if _is_shard(own) else own)


def whole(tensor: Tensor) -> Tensor:
    """A parameter from everybody's rows, without gradient; all processes must ask for it."""
    own: Any = tensor.detach()
    return cast("Tensor", own.full_tensor() if _is_shard(own) else own)


def put(target: Tensor, values: Tensor) -> None:
    """Write a whole parameter into this process's rows of it."""
    if not _is_shard(target):
        target.detach().copy_(values)
        return
    mesh = target.device_mesh  # type: ignore[attr-defined]
    rows = values.chunk(mesh.size())  # as fully_shard does: the last processes may get nothing
    rank, own = mesh.get_local_rank(), local(target)
    if own.numel():
        own.copy_(rows[rank])


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, of all of its rows where it is sharded; these are added up in one message.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.ones(4)])
        [tensor(5.), tensor(2.)]
    """
    if not any(_is_shard(tensor) for tensor in tensors):
        return [tensor.norm() for tensor in tensors]
    mesh = next(tensor for tensor in tensors if _is_shard(tensor)).device_mesh  # type: ignore[attr-defined]
    squares = torch.stack([local(tensor).norm().square() for tensor in tensors])
    return list(Group(0, mesh.size(), handle=mesh.get_group()).total(squares).sqrt())


@contextlib.contextmanager
def placed(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts values in the place of a sharded network's parameters, and what was there back at the end, bit for bit.

    Forward passes in between and their backward passes must be over by then: blocks are put together anew for each.

    Args:
        model: A sharded network.
        values: Shards by the name of the parameter.
    """
    reshard(model)
    parameters = {name: local(p) for name, p in model.named_parameters() if name in values}
    before = {name: own.clone() for name, own in parameters.items()}
    try:
        with torch.no_grad():
            for name, own in parameters.items():
                own.copy_(local(values[name]))
        torch.clear_autocast_cache()  # it knows parameters by identity, and would bring the former ones back
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for name, own in parameters.items():
                own.copy_(before[name])
        torch.clear_autocast_cache()


@contextlib.contextmanager
def displaced(model: nn.Module, offsets: Mapping[str, Tensor]) -> Iterator[None]:
    """Moves a sharded network by offsets; any other is left alone, whose weights are handed over with each call."""
    if not offsets or not is_sharded(model):
        yield
        return
    reshard(model)
    with torch.no_grad():
        values = {name: p.detach() + offsets[name] for name, p in model.named_parameters() if name in offsets}
    with placed(model, values):
        yield


def sum_gradients(model: nn.Module, group: Group) -> None:
    """Put the sums over processes in the place of the gradients.

    Those of a sharded network are averages already, of which each process holds its rows.
    """
    reshard(model)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not is_sharded(model):
        group.add_up(gradients)
        return
    for gradient in gradients:
        local(gradient).mul_(group.size)


class Shards:
    """A run's state in shards, and how the whole of it comes together in the first process, to be saved.

    Args:
        state: The state as one process holds it, on the CPU, equal in all processes.
        group: The processes.
        device: Where they compute.

    Attributes:
        state: The same state in shards.

    Raises:
        UserError: As `shard`.
    """

    def __init__(self, state: State, *, group: Group, device: torch.device) -> None:
        self._whole = state if group.leads else None
        # The first process keeps the whole network, in the memory of its host, as the form in which files are written.
        model, average = copy.deepcopy((state.model, state.average)) if group.leads else (state.model, state.average)
        self._forms = _form(model), None if average is None else _form(average)
        before = dict(state.model.named_parameters())
        shard(model, group=group, device=device)
        if average is not None:
            shard(average, group=group, device=device)
        after = dict(model.named_parameters())
        optimizer = _over(state.optimizer, before, after)
        optimizer.state.update(_remembered(state.optimizer, before, after))
        self.state = dataclasses.replace(state, model=model, average=average, optimizer=optimizer)

    def restore(self, load: Callable[[State], None]) -> None:
        """Put another state in the place of the one that stands; all processes must ask for it.

        Each process holds the whole network in the memory of its host until it is done.

        Args:
            load: Fills the whole state that it is given, in all processes alike.
        """
        current, plain = self.state, self._plain()
        plain.optimizer.state.clear()
        load(plain)
        _spread(plain.model, current.model)
        if plain.average is not None and current.average is not None:
            _spread(plain.average, current.average)
        shards = dict(current.model.named_parameters())
        current.optimizer.state.clear()
        current.optimizer.state.update(_remembered(plain.optimizer, dict(plain.model.named_parameters()), shards))
        current.epoch, current.step, current.updates = plain.epoch, plain.step, plain.updates
        current.best, current.seconds = plain.best, plain.seconds

    def _plain(self) -> State:
        """The state in the form in which one process holds it, on the CPU, to be filled."""
        kept = self._whole
        if kept is not None:
            return dataclasses.replace(self.state, model=kept.model, average=kept.average, optimizer=kept.optimizer)
        model, average = (None if form is None else _form(form).to_empty(device="cpu") for form in self._forms)
        assert model is not None
        shards, parameters = dict(self.state.model.named_parameters()), dict(model.named_parameters())
        optimizer = _over(self.state.optimizer, shards, parameters)
        return dataclasses.replace(self.state, model=model, average=average, optimizer=optimizer)

    def gather(self) -> State | None:
        """The whole state as it stands, on the first process's CPU; None elsewhere. All processes must ask for it."""
        current, kept = self.state, self._whole
        _collect(current.model, None if kept is None else kept.model)
        if current.average is not None:
            _collect(current.average, None if kept is None else kept.average)
        plain = dict(kept.model.named_parameters()) if kept is not None else {}
        for name, owner in current.model.named_parameters():
            for key, entry in current.optimizer.state.get(owner, {}).items():
                full = whole(entry).cpu() if isinstance(entry, Tensor) else entry
                if kept is not None:
                    kept.optimizer.state[plain[name]][key] = full.clone() if isinstance(full, Tensor) else full
        if kept is None:
            return None
        return dataclasses.replace(current, model=kept.model, average=kept.average, optimizer=kept.optimizer)


def _form(module: nn.Module) -> nn.Module:
    """The same network without values, which takes no memory."""
    values: dict[int, Tensor] = {id(b): b.to("meta") for b in module.buffers()}
    values |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, cast("dict[int, Any]", values))


def _over(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The same optimiser over other parameters of the same names, which remembers nothing."""
    names = {id(parameter): name for name, parameter in before.items()}
    groups = [{**group, "params": [after[names[id(p)]] for p in group["params"]]} for group in optimizer.param_groups]
    made: torch.optim.Optimizer = type(optimizer)(groups, lr=groups[0]["lr"])  # type: ignore[call-arg]
    return made


def _remembered(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> dict[Tensor, dict[str, Any]]:
    """What an optimiser remembers of parameters, as this process's rows, for the shards of the same names."""
    return {
        after[name]: {key: _share(entry, after[name]) for key, entry in optimizer.state[parameter].items()}
        for name, parameter in before.items()
        if parameter in optimizer.state
    }


def _share(entry: Any, owner: Tensor) -> Any:
    """What an optimiser remembers of a parameter, for this process's rows of it."""
    if not isinstance(entry, Tensor) or entry.shape != owner.shape:
        return entry
    shard_of = torch.empty_like(owner.detach())
    put(shard_of, entry)
    return shard_of


@torch.no_grad()
def _spread(whole: nn.Module, shards: nn.Module) -> None:
    """Write a whole network into this process's rows of the same."""
    reshard(shards)
    values = whole.state_dict()
    for name, tensor in shards.state_dict().items():
        put(tensor, values[name])


@torch.no_grad()
def _collect(ours: nn.Module, theirs: nn.Module | None) -> None:
    """Gather one tensor after the other; the first process writes them into its whole network."""
    reshard(ours)
    into = {} if theirs is None else theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        full = whole(tensor)
        if theirs is not None:
            into[name].copy_(full)
