"""Attacks captured whole as CUDA graphs: all steps of an attack are handed to the GPU in one go."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from instar.attacks.folded import Folded
from instar.attacks.start import Start, Zero
from instar.errors import first_line
from instar.evidence import Adversary, Batch
from instar.threat import Ball

if TYPE_CHECKING:
    from instar.attacks.pgd import PGD

HELD = 4
"""Captures that are kept at a time: what one reads and finds takes memory, though the activations share theirs."""
IDLE = 16
"""A capture gives way to another one when so many attacks came since it was replayed; a form that came once is
forgotten after as many others."""

Work = Callable[[], tuple[Tensor, ...]]


class Recording(NamedTuple):
    """Work that can be done again.

    Attributes:
        results: Where each repetition leaves what it found.
        replay: Does it again, on what the tensors that it reads hold now.
    """

    results: tuple[Tensor, ...]
    replay: Callable[[], None]


class CudaGraphs:
    """Records work on a GPU as CUDA graphs that share one pool of memory.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, work: Work) -> Recording:
        """Do the work once, which lets libraries choose their algorithms, then record it.

        Args:
            work: Reads and writes tensors of this GPU alone, always the same ones, and never asks what they hold.

        Raises:
            RuntimeError: The work cannot be recorded, because it waits for the GPU or the memory is too small.
        """
        kind = self._device.type
        # A cast that autocast remembers would lie in the graph's memory and be taken for a value afterwards.
        unremembered = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.cuda.device(self._device), unremembered:
            beside = torch.cuda.Stream(self._device)
            beside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(beside):
                work()
            torch.cuda.current_stream(self._device).wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # Other threads (the loader, nccl's watchdog) may go on talking to the GPU meanwhile.
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = work()
        return Recording(results, graph.replay)


@dataclass
class _Capture:
    """An attack on a batch of one form, recorded, the tensors that it reads, and when it was replayed last."""

    x: Tensor
    y: Tensor
    target: Tensor | None
    begin: Tensor
    recording: Recording
    used: int


class Captured(nn.Module):
    """A stand-in on which projected gradient descent of a fixed shape is recorded once and replayed ever after.

    Launching its many small kernels one by one takes a GPU's host longer than the kernels themselves take. A replay
    computes the same numbers from the same random start, which is drawn outside of it. It reads the weights where they
    lie: `refresh` writes them in place, and where they have moved all the same, everything is recorded anew.

    An attack is recorded when it comes for the second time in the same form, so that one whose numbers change at every
    step is never recorded for nothing. Whatever cannot be recorded runs on the stand-in itself: other attacks, rules
    that stop instances, objectives that look at the whole batch.

    Args:
        stand_in: The folded copy.
        record: Records work, see `CudaGraphs`.
        note: Told once of each reason why an attack runs uncaptured.

    Example:
        >>> from instar.attacks import PGD
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> recorded = []
        >>> def record(work):
        ...     recorded.append(work)
        ...     return Recording(work(), lambda: None)
        >>> stand_in = Captured(Folded(net), record)
        >>> for _ in range(3):
        ...     found = PGD(steps=2)(stand_in, Batch(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])))
        >>> len(recorded), found.budget
        (1, 2)
    """

    def __init__(
        self,
        stand_in: Folded,
        record: Callable[[Work], Recording],
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__()
        self.stand_in = stand_in
        self._record, self._note = record, note
        self._told: set[str] = set()
        self._seen: dict[Hashable, None] = {}
        self._held: dict[Hashable, _Capture] = {}
        self._addresses: tuple[float, ...] = ()
        self._attacks = 0
        self._possible = True

    @property
    def logit_scale(self) -> Tensor | float:
        """The stand-in's."""
        return self.stand_in.logit_scale

    def refresh(self, model: nn.Module) -> None:
        """Take over the weights and running statistics that `model` has now, in place."""
        self.stand_in.refresh(model)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) for images (B, C, H, W)."""
        logits: Tensor = self.stand_in(x)
        return logits

    def attack(self, attack: PGD, batch: Batch, *, generator: torch.Generator | None = None) -> Adversary:
        """What ``attack(stand_in, batch)`` gives, by a replay where there is one.

        Args:
            attack: With its schedules resolved.
            batch: The instances.
            generator: Source of the random start.

        Returns:
            The adversary, in tensors of its own.

        Raises:
            UserError: As the attack.
        """
        self._attacks += 1
        form = self._form(attack, batch)
        if form is None or not self._came_before(form):
            return attack(self.stand_in, batch, generator=generator)
        begin = batch.part.drawn(lambda images: attack.start(images, attack.ball, generator), batch.x)
        self._forget_if_moved()
        capture = self._held.get(form)
        if capture is None:
            capture = self._captured(form, attack, batch, begin)
        if capture is None:
            return self._from(attack, batch.x, batch.y, batch.target, begin)
        capture.x.copy_(batch.x)
        capture.y.copy_(batch.y)
        capture.begin.copy_(begin)
        if capture.target is not None and batch.target is not None:
            capture.target.copy_(batch.target)
        capture.used = self._attacks
        capture.recording.replay()
        # Copies: the next replay writes to the same place, and the loss still wants these.
        x, kappa, inspected, moves = (result.clone() for result in capture.recording.results)
        return Adversary(x=x, kappa=kappa, inspected=inspected, moves=moves, budget=attack.numbers()[0])

    def _form(self, attack: PGD, batch: Batch) -> Hashable | None:
        """All that must be equal for a replay; None for what cannot be recorded."""
        if not self._possible:
            return None
        reason = unfit(attack)
        if reason:
            self._tell(f"the attack is not captured: {reason}")
            return None
        tensors = (batch.x, batch.y, batch.target)
        shapes = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        try:
            form = (replace(attack, start=Zero()), shapes)  # the start is no part of what is recorded
            hash(form)
        except TypeError:  # a signal of the user's own
            self._tell(f"the attack is not captured: {attack.objective!r} cannot be compared with what came before")
            return None
        return form

    def _came_before(self, form: Hashable) -> bool:
        if form in self._held or form in self._seen:
            return True
        self._seen[form] = None
        if len(self._seen) > IDLE:
            del self._seen[next(iter(self._seen))]
        return False

    def _forget_if_moved(self) -> None:
        """A recording reads addresses: drop all of them where a tensor of the network lies elsewhere now."""
        tensors = [*self.stand_in.parameters(), *self.stand_in.buffers()]
        scale = self.stand_in.logit_scale
        at = scale.data_ptr() if isinstance(scale, Tensor) else scale  # a number is recorded as what it is
        addresses = (*(tensor.data_ptr() for tensor in tensors), at)
        if addresses != self._addresses:
            self._held.clear()
            self._addresses = addresses

    def _captured(self, form: Hashable, attack: PGD, batch: Batch, begin: Tensor) -> _Capture | None:
        """Record the attack, from copies of what it reads; None where that is impossible, or not worth while."""
        if len(self._held) >= HELD:
            oldest = min(self._held, key=lambda held: self._held[held].used)
            if self._attacks - self._held[oldest].used < IDLE:  # more attacks in turn than can be held
                return None
            del self._held[oldest]
        x, y, held_begin = batch.x.clone(), batch.y.clone(), begin.clone()
        target = None if batch.target is None else batch.target.clone()

        def work() -> tuple[Tensor, ...]:
            found = self._from(attack, x, y, target, held_begin)
            return found.x, found.kappa, found.inspected, found.moves

        try:
            recording = self._record(work)
        except RuntimeError as error:
            self._possible = False
            self._held.clear()
            self._tell(f"the attack cannot be captured and is launched step by step: {first_line(error)}")
            return None
        self._held[form] = capture = _Capture(x, y, target, held_begin, recording, self._attacks)
        return capture

    def _from(self, attack: PGD, x: Tensor, y: Tensor, target: Tensor | None, begin: Tensor) -> Adversary:
        """The attack from a start that was drawn already, of whatever rows these are."""
        return replace(attack, start=_At(begin))(self.stand_in, Batch(x, y, target=target))

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._note(reason)


@dataclass(frozen=True, eq=False)
class _At(Start):
    """Begins exactly there."""

    point: Tensor

    def __call__(self, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
        return self.point


def unfit(attack: PGD) -> str:
    """Why an attack cannot be recorded; nothing where it can.

    Example:
        >>> from instar.attacks import PGD
        >>> unfit(PGD()), unfit(PGD(mode="train"))
        ('', "BatchNorm is in mode 'train' in it, in which a copy with BatchNorm folded away is no stand-in")
    """
    if attack.mode != "eval":
        return f"BatchNorm is in mode {attack.mode!r} in it, in which a copy with BatchNorm folded away is no stand-in"
    if attack.rule is not None:
        return f"{type(attack.rule).__name__} stops instances, and how many are left is not known before"
    if attack.objective.coupling:
        return f"{attack.objective!r} looks at the whole batch"
    return ""


def accelerated(
    stand_in: Folded, how: str, device: torch.device, note: Callable[[str], None] = lambda line: None
) -> Folded | Captured:
    """A stand-in made faster.

    Args:
        stand_in: The folded copy; it is changed.
        how: ``"none"``; ``"compile"``, see `Folded.compile_passes`; ``"graphs"``, see `Captured`; or ``"both"``.
        device: Where it computes; graphs need a GPU.
        note: Told why something runs uncompiled or uncaptured.

    Returns:
        What attacks shall run on.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> type(accelerated(Folded(net), "none", torch.device("cpu"))).__name__
        'Folded'
    """
    if how in ("compile", "both"):
        stand_in.compile_passes(note)
    return Captured(stand_in, CudaGraphs(device), note) if how in ("graphs", "both") else stand_in
