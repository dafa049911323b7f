"""Several processes as one: what they exchange, and which rows of the global batch each of them holds.

Every process holds the whole model, optimiser, average and instance table, and a share of each batch. Random numbers
are drawn for the whole batch, coefficients are computed over the whole batch, and gradients are added up, so that the
number of processes changes no result but by the order in which numbers are added.

``DistributedDataParallel`` is not used: it adds up gradients of *its own* forward pass, while perturbed weights (AWP),
second evaluations (anchors) and queries of signals are calls of the plain module with other parameters. Gradients are
added up after the last backward pass, in flat buckets.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from instar.errors import UserError

BUCKET = 25 * 2**20
"""Bytes that are added up in one message; larger ones cost memory, smaller ones waiting."""
PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for the others, which may be writing a checkpoint to a slow disk."""


class ProcessLost(UserError):  # noqa: N818
    """Another process of the run has gone. Nothing that was saved is lost."""


@dataclass(frozen=True)
class Group:
    """The processes of a run, by itself a single one, which exchanges nothing.

    All processes call the same methods in the same order; each call waits for the others.

    Attributes:
        rank: This process, from 0. The first one writes files and reports.
        size: Number of processes.
        local: This process among those of its machine, which chooses its GPU.
        restarts: How often ``torchrun`` has started the processes of this machine anew, after one of them failed.
        launch: What ``torchrun`` calls the run (``--rdzv-id``), the same after a restart; empty if unknown.
        handle: The process group of ``torch.distributed``; None is its default one.
        carriers: Kinds of devices whose tensors the process group can exchange; others are copied there and back. Empty
            means all.

    Example:
        >>> alone = Group()
        >>> alone.leads, alone.part(10).whole, alone.any(True), alone.largest(3)
        (True, True, True, 3)
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    restarts: int = 0
    launch: str = ""
    handle: Any = None
    carriers: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a connection has no copies

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def part(self, total: int) -> Part:
        """This process's share of a batch of `total` rows: contiguous, as even as can be.

        Example:
            >>> [(part.start, part.stop) for part in (Group(rank, 3).part(10) for rank in range(3))]
            [(0, 4), (4, 7), (7, 10)]
        """
        if self.alone:
            return WHOLE
        bounds = _bounds(total, self.size)
        return Part(self, bounds[self.rank], bounds[self.rank + 1], total)

    def device(self, device: torch.device) -> torch.device:
        """Where this process computes: each has a GPU of its own.

        Raises:
            UserError: The machine has fewer GPUs than processes.
        """
        if device.type != "cuda" or device.index is not None or self.alone:
            return device
        return torch.device("cuda", _take_gpu(self.local, self.local + 1))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes, without gradient; equal bit for bit in all of them."""
        if self.alone:
            return tensor
        return self._reduced(tensor.detach().clone(), distributed.ReduceOp.SUM)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over processes in the place of the tensors, in flat buckets.

        Raises:
            ProcessLost: Another process has gone.
        """
        if self.alone:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            _scatter(self._reduced(flat, distributed.ReduceOp.SUM), bucket)

    def equalise(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values in the place of everybody's, bit for bit."""
        if self.alone:
            return
        for bucket in _buckets(tensors):
            _scatter(self._told(torch.cat([tensor.detach().reshape(-1) for tensor in bucket])), bucket)

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """The rows (total, ...) of the whole batch from everybody's share, without gradient, in the batch's order.

        Args:
            rows: This process's rows, of any type.
            total: Rows of the whole batch.

        Raises:
            ProcessLost: Another process has gone.
        """
        if self.alone:
            return rows
        bounds = _bounds(total, self.size)
        counts = [stop - start for start, stop in itertools.pairwise(bounds)]
        # As bytes, so that every type can travel; padded, so that all messages have one length.
        mine = rows.new_zeros(max(counts), *rows.shape[1:])
        mine[: len(rows)] = rows.detach()
        sent = self._carried(mine.reshape(-1).view(torch.uint8))
        received = [torch.empty_like(sent) for _ in range(self.size)]
        with _together():
            distributed.all_gather(received, sent, group=self.handle)
        shares = [part.view(rows.dtype).view(mine.shape)[:count] for part, count in zip(received, counts, strict=True)]
        return torch.cat(shares).to(rows.device)

    def any(self, flag: Tensor | bool) -> bool:
        """Whether the flag of any process is set."""
        return bool(flag) if self.alone else bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; exchanged over the CPU, so that no GPU is waited for."""
        if self.alone:
            return number
        return int(self._reduced(torch.tensor(number), distributed.ReduceOp.MAX))

    def agree(self, number: int) -> bool:
        """Whether all processes hold the same number."""
        if self.alone:
            return True
        found = self._reduced(torch.tensor([number, -number]), distributed.ReduceOp.MAX)
        return bool(found.sum() == 0)

    def first(self, work: Callable[[], bytes]) -> bytes:
        """What the first process's work gives, done there alone and told to all.

        Raises:
            UserError: As the work, in every process.
        """
        if self.alone:
            return work()
        content, failed = b"", False
        if self.leads:
            try:
                content = work()
            except UserError as error:
                content, failed = str(error).encode(), True
        head = self._told(torch.tensor([len(content), failed]))
        told = torch.zeros(int(head[0]), dtype=torch.uint8)
        if self.leads and content:
            told.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        told = self._told(told)
        heard = content if self.leads else told.numpy().tobytes()
        if head[1]:
            raise UserError(heard.decode())
        return heard

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        carried = self._carried(tensor)
        with _together():
            distributed.all_reduce(carried, how, group=self.handle)
        return carried.to(tensor.device)

    def _told(self, tensor: Tensor) -> Tensor:
        carried = self._carried(tensor)
        with _together():
            distributed.broadcast(carried, src=0, group=self.handle)
        return carried.to(tensor.device)

    def _carried(self, tensor: Tensor) -> Tensor:
        """The tensor where it can be exchanged: a group that somebody made for nccl alone takes none of the CPU's."""
        if not self.carriers or tensor.device.type in self.carriers:
            return tensor
        return tensor.to(self.carriers[0])

    def same(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are, whose gradient is that of the sum of all processes' losses.

        Gradients may be differentiated again, for Hessian-vector products of the whole batch.
        """
        if self.alone:
            return dict(tensors)
        held = _Same.apply(self, *tensors.values())
        return dict(zip(tensors, held, strict=True))

    def sum_through(self, tensor: Tensor) -> Tensor:
        """The sum over processes, through which gradients flow back to every process."""
        if self.alone:
            return tensor
        summed: Tensor = _SumThrough.apply(self, tensor)
        return summed


ALONE = Group()


@dataclass(frozen=True)
class Part:
    """Which rows of the global batch a `Batch` holds, and how it is made whole again.

    Attributes:
        group: The processes that share the batch.
        start: First row.
        stop: Row behind the last one; None is the end.
        total: Rows of the whole batch; None if this is all of it.
        piece: Whether this is a piece of a process's share, whose other pieces come before and after it.

    Example:
        >>> part = Part(start=2, stop=4, total=4)
        >>> part.of(torch.arange(4)), part.mean(torch.tensor([1.0, 3.0]))
        (tensor([2, 3]), tensor(1.))
        >>> part.drawn(lambda x: x + torch.arange(4.0), torch.zeros(2))
        tensor([2., 3.])
    """

    group: Group = ALONE
    start: int = 0
    stop: int | None = None
    total: int | None = None
    piece: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.total is None

    def of(self, rows: Tensor) -> Tensor:
        """This part's rows of a tensor of the whole batch."""
        return rows[self.start : self.stop]

    def size(self, rows: Tensor) -> int:
        """Rows of the whole batch, of which these are this part's."""
        return len(rows) if self.total is None else self.total

    def drawn(self, draw: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """What `draw` makes of these rows when its random numbers are drawn for the whole batch.

        Args:
            draw: Treats each row by itself, with random numbers for as many rows as it gets.
            rows: This part's rows; those of the others are shown as zeros.
        """
        if self.whole:
            return draw(rows)
        assert self.total is not None
        shown = rows.new_zeros(self.total, *rows.shape[1:])
        shown[self.start : self.stop] = rows
        return self.of(draw(shown))

    def mean(self, values: Tensor) -> Tensor:
        """This part's contribution to the mean over the whole batch: the contributions add up to it."""
        return values.mean() if self.total is None else values.sum() / self.total

    def gather(self, rows: Tensor) -> Tensor:
        """The whole batch's rows from every process's, without gradient.

        Raises:
            UserError: This is a piece of a share, and the others are not there at the same time.
        """
        if self.total is None:
            return rows
        if self.piece:
            raise UserError(
                "something asks for the whole batch where only a piece is there: signals that do must say so "
                "(couples = True); in an attack they need accumulate=1"
            )
        return self.group.gather(rows, self.total)

    def batchwide(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """This part's rows of a function of all instances' values.

        Args:
            function: (B,) → (B,) over the whole batch, such as ranks or a normalisation.
            values: (b,), this part's; they must carry no gradient if there are others.

        Raises:
            UserError: Values with a gradient, which would stop at the border of this part.
        """
        if self.whole:
            return function(values)
        if values.requires_grad:
            raise UserError("values of batchwide() are coefficients: detach() them, for no gradient crosses processes")
        return self.of(function(self.gather(values)))

    def any(self, mask: Tensor) -> bool:
        """Whether the mask is set anywhere in the processes' parts."""
        return self.group.any(bool(mask.any()))

    def split(self, pieces: int, rows: int) -> list[Part]:
        """This part in pieces, as even as can be.

        Args:
            pieces: Their number.
            rows: Rows of this part.

        Raises:
            UserError: There are fewer rows than pieces.
        """
        if pieces == 1:
            return [self]
        if rows < pieces:
            raise UserError(f"{rows} instances cannot be accumulated in {pieces} parts")
        total = rows if self.total is None else self.total
        bounds = [self.start + bound for bound in _bounds(rows, pieces)]
        return [Part(self.group, start, stop, total, piece=True) for start, stop in itertools.pairwise(bounds)]


WHOLE = Part()


def leading(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this is the first, or the only, of the processes that ``torchrun`` started: the one that reports.

    Example:
        >>> leading({}), leading({"RANK": "1"})
        (True, False)
    """
    return (os.environ if environment is None else environment).get("RANK", "0") == "0"


def claim_gpu(environment: Mapping[str, str] | None = None, *, gpus: int | None = None) -> int | None:
    """Make the GPU of this process the current one, before anything touches the first GPU in its place.

    A process that has touched a GPU keeps half a gigabyte there, for as long as it lives.

    Args:
        environment: ``torchrun``'s variables ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``; None is the
            process's own.
        gpus: GPUs of this machine; None asks PyTorch.

    Returns:
        Its number on this machine; None for a single process, or where there is no GPU.

    Raises:
        UserError: There are more processes than GPUs; all of them say so.

    Example:
        >>> claim_gpu({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, gpus=4)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        instar.errors.UserError: 8 processes of this machine need a GPU each, and it has 4: start torchrun with ...
        >>> claim_gpu({}, gpus=4) is None
        True
    """
    found = os.environ if environment is None else environment
    if int(found.get("WORLD_SIZE", 1)) == 1:
        return None
    local = int(found.get("LOCAL_RANK", 0))
    here = int(found.get("LOCAL_WORLD_SIZE", local + 1))
    count = torch.cuda.device_count() if gpus is None else gpus
    return _take_gpu(local, here, count) if count else None


def _take_gpu(local: int, processes: int, gpus: int | None = None) -> int:
    count = torch.cuda.device_count() if gpus is None else gpus
    if processes > count:
        raise UserError(
            f"{processes} processes of this machine need a GPU each, and it has {count}: start torchrun with "
            f"--nproc-per-node {max(count, 1)}, or train with --device cpu"
        )
    torch.cuda.set_device(local)
    return local


def backend(device: torch.device) -> str:
    """What processes exchange tensors through: GPUs through nccl, where this PyTorch has it, and CPUs through gloo.

    Small numbers travel between CPUs in both cases, so that no GPU is waited for.

    Example:
        >>> backend(torch.device("cpu"))
        'gloo'
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" and distributed.is_nccl_available() else "gloo"


def _carriers() -> tuple[str, ...]:
    """The kinds of devices whose tensors the default process group can exchange."""
    told = str(distributed.get_backend_config())  # "cpu:gloo,cuda:nccl"
    return tuple(sorted(pair.partition(":")[0] for pair in told.split(",")))


@contextlib.contextmanager
def launched(device: torch.device, environment: Mapping[str, str] | None = None) -> Iterator[Group]:
    """The processes that ``torchrun`` started, for as long as they train together.

    A process group that exists already is used and left alone.

    Args:
        device: Where the processes compute: ``cuda`` exchanges through nccl, everything else through gloo.
        environment: ``torchrun``'s variables ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
            ``MASTER_PORT``, ``TORCHELASTIC_RESTART_COUNT``, ``TORCHELASTIC_RUN_ID``; None is the process's own. Without
            them there is one process.

    Yields:
        The group.

    Raises:
        UserError: The variables do not fit together, nobody answers, or this PyTorch was built without distributed.

    Example:
        >>> with launched(torch.device("cpu"), {}) as group:
        ...     group.size
        1
    """
    found = os.environ if environment is None else environment
    restarts = int(found.get("TORCHELASTIC_RESTART_COUNT", 0))
    launch = found.get("TORCHELASTIC_RUN_ID", "")
    launch = "" if launch == "none" else launch  # what torchrun says when it was not told
    if not distributed.is_available() or not (distributed.is_initialized() or int(found.get("WORLD_SIZE", 1)) > 1):
        if int(found.get("WORLD_SIZE", 1)) > 1:
            raise UserError("this PyTorch was built without torch.distributed: train in one process")
        yield Group(restarts=restarts, launch=launch)
        return
    made = not distributed.is_initialized()
    if made:
        try:
            from torch.distributed.rendezvous import rendezvous

            store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
            mine = distributed.PrefixStore(  # type: ignore[attr-defined]
                f"instar/{_meet(store, rank, size)}", store
            )
            distributed.init_process_group(backend(device), store=mine, rank=rank, world_size=size, timeout=PATIENCE)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"cannot join the processes that torchrun describes: {reason}") from None
    rank = distributed.get_rank()
    try:
        yield Group(
            rank,
            distributed.get_world_size(),
            int(found.get("LOCAL_RANK", rank)),
            restarts,
            launch,
            carriers=_carriers(),
        )
    finally:
        if made:
            distributed.destroy_process_group()


def _meet(store: Any, rank: int, size: int) -> str:
    """A name for this attempt that all of its processes know, and that no earlier attempt had.

    ``torchrun``'s store outlives the processes, and after a restart it still holds the addresses of those that have
    gone, which gloo would try to reach. Nor can restarts be counted: each machine counts its own.

    Every process says hello with a word that is new; the first one answers each word that it has not answered yet,
    until everybody has heard the name.
    """
    if rank:
        word = uuid.uuid4().hex
        store.set(f"instar/hello/{rank}", word)
        name: str = store.get(f"instar/welcome/{word}").decode()  # waits for it
        store.set(f"instar/{name}/{rank}", "here")
        return name
    name = uuid.uuid4().hex
    missing, answered = set(range(1, size)), set[str]()
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(missing)} of {size} processes did not come within {PATIENCE}")
        for other in sorted(missing):
            if store.check([f"instar/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"instar/hello/{other}"]):
                word = store.get(f"instar/hello/{other}").decode()
                if word not in answered:  # from an earlier attempt, perhaps; its successor will say another one
                    store.set(f"instar/welcome/{word}", name)
                    answered.add(word)
        time.sleep(0.02)
    return name


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Says in one line that a partner has gone; ``torch.distributed`` says it in many."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ProcessLost(f"another process of this run has gone, so this one stops too ({lines[0][:200]})") from None


def _bounds(total: int, parts: int) -> list[int]:
    """Where parts as even as can be begin, and the end; the first ones have one row more.

    Example:
        >>> _bounds(10, 4)
        [0, 3, 6, 8, 10]
    """
    share, more = divmod(total, parts)
    return [share * part + min(part, more) for part in range(parts + 1)]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of one type and device of up to `BUCKET` bytes (one tensor may be larger)."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if bucket and (held + size > BUCKET or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket


def _scatter(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    """Write a flat tensor back into those that it was made of."""
    for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.detach().copy_(values.view(tensor.shape))


def _summed(group: Group, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Copies of the tensors, added up over processes; what is None stays None."""
    # Contiguous copies: a gradient may be an expanded number, or overlap itself.
    copies = [
        None if tensor is None else tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors
    ]
    group.add_up([copy for copy in copies if copy is not None])
    return tuple(copies)


class _Same(torch.autograd.Function):
    """Forward: nothing. Backward: the sum over processes."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)  # a tensor that the loss does not depend on keeps having no gradient
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        known = [gradient for gradient in gradients if gradient is not None]
        summed = iter(_Sum.apply(ctx.group, *known) if known else ())
        return (None, *(None if gradient is None else next(summed) for gradient in gradients))


class _Sum(torch.autograd.Function):
    """Forward: the sum over processes. Backward: nothing, for everybody holds the same function of the same sum."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        return _summed(group, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *gradients)


class _SumThrough(torch.autograd.Function):
    """Forward and backward: the sum over processes, for everybody's loss depends on the sum."""

    @staticmethod
    def forward(ctx: Any, group: Group, tensor: Tensor) -> Tensor:
        ctx.group = group
        return group.total(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, _SumThrough.apply(ctx.group, gradient)
