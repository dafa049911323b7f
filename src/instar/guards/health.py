"""Steps that went wrong: a loss or gradient that is not finite, or a loss that explodes.

Whether a step went wrong is decided on the device and written down there; the notes are read every few steps, so that
no step waits for the device. They lie in the run's shared tensors, and so in its saved state: a resume knows what an
uninterrupted run would know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instar.checkpoint import State
from instar.errors import UserError
from instar.guards.gradients import gradient_norm, total_norm

READ_EVERY = 20
"""Steps between two readings of the notes."""
REMEMBERED = 64
"""Losses whose median is what a loss is measured by; it is known once more than half of them are."""
IN_A_ROW = 10
"""So many steps in a row are skipped before the run stops: it is not the batch then."""
ROLLBACKS = 5
"""So many batches are left out by rolling back before the run stops."""

LOSSES, NOTES, LEFT_OUT = "guard.losses", "guard.notes", "guard.left_out"
_FIRST, _LAST, _TOTAL, _ROW, _MOST, _TOLD, _LOSS, _REASON = range(8)
_FRESH = (-1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_NOT_FINITE, _EXPLODED, _GRADIENT = 1.0, 2.0, 3.0
_UNKNOWN = 1e30


@dataclass(frozen=True)
class Kept:
    """Everything that a step may change, as it was before, beside what holds it now."""

    live: Sequence[Tensor]
    before: Sequence[Tensor]
    shared: Mapping[str, Tensor]
    parameters: int


@dataclass(frozen=True)
class Trouble:
    """A step that went wrong.

    Attributes:
        update: Its number in the run, from 0.
        text: What went wrong, for a user.
    """

    update: int
    text: str


@dataclass(frozen=True)
class Health:
    """What is done about a step whose loss is not finite, or explodes.

    A loss explodes when the mean over its batch is more than `limit` times the median of the last 64 that were well,
    or, where that is lower, than that of guessing, ln K. Half of the 64 must be known. `stop` looks at the loss alone;
    the others look at the norm of the gradient too, for what they repair must be the step that spoiled the weights, not
    the one after.

    Attributes:
        policy: ``"stop"`` ends the run, the last save and checkpoints untouched. ``"skip"`` leaves weights, buffers,
            momentum, average, instance table and shared tensors as they were before the step, decided on the device.
            ``"rollback"`` goes back to the last save and goes on from there without the batch that did it. The two end
            with the same weights; the first costs a copy of the state in each step, the second the steps since the last
            save, and only when something went wrong.
        limit: Largest loss, as a multiple of the median; ``inf`` looks for what is not finite alone.
        classes: K.

    Example:
        >>> Health("skip", 20.0, 10).due(40), Health("skip", 20.0, 10).due(41)
        (True, False)
    """

    policy: str
    limit: float
    classes: int

    def due(self, update: int) -> bool:
        """Whether the notes are read after this number of steps in the run."""
        return update % READ_EVERY == 0

    def before(self, state: State) -> Kept | None:
        """What a step may change, as it is now; None unless steps are skipped.

        Args:
            state: Before the step.
        """
        if self.policy != "skip":
            return None
        _join_parameters(state.optimizer)
        live = list(_tensors(state))
        shared = {name: t.clone() for name, t in state.table.shared.items() if not name.startswith("guard.")}
        return Kept(live, [t.detach().clone() for t in live], shared, len(state.optimizer.state))

    @torch.no_grad()
    def after(self, state: State, rows: Mapping[str, Tensor], kept: Kept | None) -> dict[str, Tensor]:
        """Decide on the device whether the step went well, write it down, and undo it where that is the policy.

        Args:
            state: After the step, its ``updates`` not yet counted; the table is not written yet.
            rows: What the table would get of every instance of the global batch, ``"index"`` and ``"loss"`` among it.
            kept: What `before` gave.

        Returns:
            What the table shall get.
        """
        device = rows["loss"].device
        losses, notes = _kept_in(state.table.shared, device)
        loss = rows["loss"].detach().double().mean()
        finite = loss.isfinite()
        usual = _median(losses).clamp_min(math.log(max(self.classes, 2)))
        exploded = loss > self.limit * usual
        reason = torch.where(finite, torch.where(exploded, _EXPLODED, 0.0), _NOT_FINITE)
        if self.policy != "stop":
            whole = gradient_norm(state.optimizer).isfinite().to(device)
            reason = torch.where((reason == 0) & ~whole, _GRADIENT, reason)
        bad = reason > 0
        place = state.updates % REMEMBERED
        losses[place] = torch.where(bad, losses[place], loss)
        first = bad & (notes[_FIRST] < 0)
        told = bad if self.policy == "skip" else first  # the others end at the first one
        row = torch.where(bad, notes[_ROW] + 1, 0.0)
        numbers = (
            torch.where(first, float(state.updates), notes[_FIRST]),
            torch.where(bad, float(state.updates), notes[_LAST]),
            notes[_TOTAL] + bad,
            row,
            torch.maximum(row, notes[_MOST]),
            notes[_TOLD],
            torch.where(told, loss.nan_to_num(0.0, 0.0, 0.0), notes[_LOSS]),
            torch.where(told, reason, notes[_REASON]),
        )
        notes.copy_(torch.stack([number.double() for number in numbers]))
        if kept is None:
            return dict(rows)
        return self._undone(state, rows, kept, bad)

    def _undone(self, state: State, rows: Mapping[str, Tensor], kept: Kept, bad: Tensor) -> dict[str, Tensor]:
        """Put everything back where `bad` is set, without asking whether it is."""
        for now, before in zip(kept.live, kept.before, strict=True):
            _choose(bad, before, now)
        shared = state.table.shared
        for name, before in kept.shared.items():
            # What lives on the host while the run lives elsewhere counts steps; it is no value that could be spoiled.
            if name in shared and shared[name].shape == before.shape and shared[name].device == bad.device:
                _choose(bad, before, shared[name])
        fresh = [name for name in shared if name not in kept.shared and not name.startswith("guard.")]
        # What this very step has made had no value before: the one case in which the device is asked, in a first step.
        if (fresh or len(state.optimizer.state) > kept.parameters) and bool(bad):
            for name in fresh:
                del shared[name]
            for parameter in list(state.optimizer.state)[kept.parameters :]:
                del state.optimizer.state[parameter]
        known = state.table.rows(rows["index"])
        return {
            name: row if name == "index" else torch.where(bad, known[name].to(row.dtype), row)
            for name, row in rows.items()
        }

    def sound(self, state: State) -> bool:
        """Whether nothing that is left in the weights went wrong, so that they may be saved; asks the device."""
        return self._trouble(state) is None

    def read(self, state: State, *, note: Callable[[str], None], where: Callable[[int], str]) -> Trouble | None:
        """Read the notes and act by the policy; the device is waited for.

        All processes read after the same step, and hold the same notes.

        Args:
            state: After a step, ``updates`` counted.
            note: Called with a line on steps that were skipped.
            where: Says epoch, step and learning rate of a step by its number in the run.

        Returns:
            The step that the run must be rolled back for, or None.

        Raises:
            UserError: The run stops, with what went wrong and what to try.
        """
        found = self._trouble(state)
        if self.policy == "skip":
            _, notes = _kept_in(state.table.shared, _device(state))
            last, total, most, told = (float(notes[place]) for place in (_LAST, _TOTAL, _MOST, _TOLD))
            if found is None and most >= IN_A_ROW:
                found = Trouble(int(last), f"{IN_A_ROW} steps in a row were skipped, since {self._what(notes)}")
            if found is None and total > told:
                steps = "step was" if total - told == 1 else "steps were"
                note(
                    f"{total - told:.0f} {steps} skipped, the last {where(int(last))}, since {self._what(notes)}. If "
                    "it happens often, try a lower --lr, --clip_grad 1 or --precision float32"
                )
                notes[_TOLD] = total
        if found is None:
            return None
        if self.policy == "rollback" and len(left_out(state)) < ROLLBACKS:
            return found
        tried = "" if self.policy != "rollback" else f" although {ROLLBACKS} batches were left out"
        other = "--on_nan skip or rollback" if self.policy == "stop" else "another --on_nan"
        raise UserError(
            f"training stopped: {found.text} {where(found.update)}{tried}. Try a lower --lr, --clip_grad 1 or "
            "--precision float32. What was saved before is kept and sound; "
            f"instar train --resume goes on from it, with {other} without such a step"
        )

    def _trouble(self, state: State) -> Trouble | None:
        """A step that left something behind, or weights that are not finite."""
        _, notes = _kept_in(state.table.shared, _device(state))
        parameters = [t.detach() for t in state.model.parameters()]
        buffers = [t for t in state.model.buffers() if t.is_floating_point()]
        norms = [total_norm(part).double().to(notes.device) for part in (parameters, buffers)]
        finite = torch.stack(norms).isfinite()
        first, well = torch.stack([notes[_FIRST], finite.all().double()]).tolist()
        if self.policy != "skip" and first >= 0:
            return Trouble(int(first), self._what(notes))
        return None if well else Trouble(state.updates - 1, "the weights are no longer finite numbers")

    def _what(self, notes: Tensor) -> str:
        loss, reason = float(notes[_LOSS]), float(notes[_REASON])
        if reason == _GRADIENT:
            return "the gradient is not finite"
        if reason == _EXPLODED:
            return f"the loss rose to {loss:g}, above {self.limit:g} times its usual value"
        return "the loss is no longer a finite number"


def skipped(state: State) -> int:
    """Steps of the run that went wrong and were skipped, or left out by a rollback."""
    notes = state.table.shared.get(NOTES)
    return len(left_out(state)) + (0 if notes is None else int(notes[_TOTAL]))


def left_out(state: State) -> tuple[int, ...]:
    """Numbers of the steps whose batches a rollback leaves out."""
    numbers = state.table.shared.get(LEFT_OUT)
    return () if numbers is None else tuple(int(number) for number in numbers.tolist())


def leave_out(state: State, updates: Sequence[int]) -> None:
    """From now on the batches of these steps are passed over: no attack, no update, the learning rate goes on.

    Args:
        state: As it was loaded from before them; it holds the numbers from now on.
        updates: Numbers of the steps in the run, from 0.
    """
    every = sorted({*left_out(state), *updates})
    state.table.shared[LEFT_OUT] = torch.tensor(every, dtype=torch.int64, device=_device(state))


def _kept_in(shared: MutableMapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The last losses (64,), huge where there is none yet, and the notes (8,)."""
    if LOSSES not in shared or NOTES not in shared:
        shared[LOSSES] = torch.full((REMEMBERED,), _UNKNOWN, dtype=torch.float64, device=device)
        shared[NOTES] = torch.tensor(_FRESH, dtype=torch.float64, device=device)
    return shared[LOSSES], shared[NOTES]


def _median(losses: Tensor) -> Tensor:
    """The median of those that are known, once they are more than half; without waiting to learn how many there are."""
    known = (losses < _UNKNOWN).sum()
    middle = losses.sort().values.gather(0, (known // 2).reshape(1))[0]
    return torch.where(known > REMEMBERED // 2, middle, _UNKNOWN)


def _device(state: State) -> torch.device:
    return state.table.columns["seen"].device


def _tensors(state: State) -> Iterator[Tensor]:
    """Everything that a step changes in place."""
    for module in (state.model, state.average):
        if module is not None:
            yield from module.parameters()
            yield from module.buffers()
    for entries in state.optimizer.state.values():
        yield from (entry for entry in entries.values() if isinstance(entry, Tensor))


def _join_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Adam's count of steps goes to where the decision is made; a loaded state has it on the host."""
    if not optimizer.defaults.get("capturable"):
        return
    for parameter, entries in optimizer.state.items():
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry.device != parameter.device:
                entries[name] = entry.to(parameter.device)


def _choose(bad: Tensor, before: Tensor, now: Tensor) -> None:
    """Write `before` into `now` where `bad` is set; of a sharded tensor, this process's shard."""
    mine, old = (t.to_local() if hasattr(t, "to_local") else t.detach() for t in (now, before))
    torch.where(bad, old, mine, out=mine)
