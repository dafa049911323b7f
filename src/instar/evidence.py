"""What flows through a training step: the batch, its adversary, and the evidence that signals look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instar.errors import UserError
from instar.parallel import WHOLE, Group, Part

if TYPE_CHECKING:
    from instar.threat import Ball

UNLABELLED = -1
"""The label of an instance that has none."""


@dataclass(frozen=True)
class Batch:
    """Training instances with their identity.

    Attributes:
        x: Images (B, C, H, W), floating point, in [0, 1].
        y: Labels (B,), of any integer type, kept as int64; −1 marks an instance without a label.
        index: Positions (B,) in the training set, or None outside a run.
        memory: This batch's rows of the `InstanceTable` as they stood before the step: name → (B,).
        target: Soft labels (B, K) that take the place of `y` in cross-entropies, or None.
        labelled: Mask (B,) of instances with a label, or None when all have one.
        source: Integer (B,) that says which data set an instance came from, or None when there is one.
        shared: Tensors that a method keeps from step to step and that belong to no instance (a warm start, a running
            reference), by name. Whoever reads them writes them in place; a run saves them with its state. They are
            equal in all processes.
        part: Which rows of the global batch these are, when processes share it or it is treated in pieces.

    Raises:
        UserError: `x` is not (B, C, H, W), `y` not (B,), or `y` not of an integer type.

    Example:
        >>> batch = Batch(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> len(batch), batch.index is None
        (2, True)
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    labelled: Tensor | None = None
    source: Tensor | None = None
    shared: MutableMapping[str, Tensor] = field(default_factory=dict)
    part: Part = WHOLE

    def __post_init__(self) -> None:
        """Check shapes and types, which costs nothing; values are checked where data enter."""
        if self.x.ndim != 4 or not self.x.is_floating_point():
            raise UserError(
                f"x must be floating-point images (B, C, H, W) in [0, 1]; got {tuple(self.x.shape)} of {self.x.dtype}"
            )
        if self.y.shape != self.x.shape[:1] or self.y.is_floating_point() or self.y.dtype == torch.bool:
            raise UserError(
                f"y must be integer labels ({len(self.x)},), one for each image; got {tuple(self.y.shape)} of "
                f"{self.y.dtype}. Soft labels go into target"
            )
        if self.y.dtype != torch.int64:  # what PyTorch's losses and scatters take
            object.__setattr__(self, "y", self.y.long())

    def __len__(self) -> int:
        """Number of instances B."""
        return self.x.shape[0]

    def rows(self, start: int, stop: int, part: Part) -> Batch:
        """Some of these instances, as the given part of the global batch."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return replace(
            self,
            x=self.x[start:stop],
            y=self.y[start:stop],
            index=cut(self.index),
            memory={name: row[start:stop] for name, row in self.memory.items()},
            target=cut(self.target),
            labelled=cut(self.labelled),
            source=cut(self.source),
            part=part,
        )

    def share(self, group: Group) -> Batch:
        """What one of several processes treats of this whole batch."""
        part = group.part(len(self))
        return self if part.stop is None else self.rows(part.start, part.stop, part)

    def split(self, pieces: int) -> list[Batch]:
        """This batch in pieces, to be treated one after the other.

        Raises:
            UserError: There are fewer instances than pieces.

        Example:
            >>> [len(piece) for piece in Batch(torch.rand(3, 1, 2, 2), torch.arange(3)).split(2)]
            [2, 1]
        """
        if pieces == 1:
            return [self]
        first = self.part.start
        parts = self.part.split(pieces, len(self))
        return [self.rows(part.start - first, (part.stop or 0) - first, part) for part in parts]


@dataclass(frozen=True)
class Adversary:
    """What an attack found, in the order of the batch.

    Attributes:
        x: Adversarial images (B, C, H, W), detached, inside the ball and the box.
        kappa: GAIRAT's geometry value (B,), integer: of the iterates that were inspected before a step, how many were
            still classified correctly. The final `x` is not inspected.
        inspected: How many iterates were inspected (B,), integer. An instance that stopped is no longer inspected.
        moves: Gradient steps taken (B,), integer.
        budget: The largest number of steps the attack may take (K).
        others: Further adversaries of the same batch (a second objective, a second norm).
    """

    x: Tensor
    kappa: Tensor
    inspected: Tensor
    moves: Tensor
    budget: int
    others: tuple[Adversary, ...] = ()


def _no_forward(x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    raise UserError("this Evidence has no model to query; signals that call forward() need one from training_loss()")


def _within_batch(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return function(values)


@dataclass(frozen=True)
class Evidence:
    """All that a `Signal` may look at. Read-only, and complete before the first signal is asked.

    Logits that nobody `needs` are None: they are computed eagerly, in the order anchor, anchor_adv, clean, adv, and
    only if some signal declares them, because logits computed by whoever asks first would silently lose gradients (a
    signal asked under ``no_grad``) or add BatchNorm updates.

    Attributes:
        x: Clean images (B, C, H, W).
        y: Labels (B,).
        clean: Logits (B, K) of `x` at the current weights, perturbed if the method perturbs them.
        adv: Logits (B, K) of `x_adv` at the same weights.
        anchor: Logits (B, K) of `x` at the *unperturbed* weights. ISEAT compares with these; one `clean` for both
            would change the gradient.
        anchor_adv: Logits (B, K) of `x_adv` at the unperturbed weights.
        x_adv: Adversarial images (B, C, H, W).
        kappa: See `Adversary`.
        inspected: See `Adversary`.
        budget: See `Adversary`.
        index: Positions in the training set (B,), or None.
        memory: Rows of the instance table, name → (B,).
        target: Soft labels (B, K) or None.
        labelled: Mask (B,) or None.
        source: Integer (B,) or None.
        others: Logits (B, K) of each further adversary.
        features: Penultimate features (B, D) of `x_adv`, for the few that need them.
        params: The model's trainable parameters by name, for the few that need them (H-SAT).
        ball: The attack's ball, or None.
        scale: What the model multiplies its logits by, the scale of a cosine head; 1 for others.
        shared: See `Batch`.
        input_grad: Gradient of the attack's objective at the current iterate (B, C, H, W); for stop rules only.
        offsets: The weight perturbation in force, by parameter name; empty without one.
        generator: Random numbers for signals that draw.
        forward: The model at the current weights, images → logits, for signals that query elsewhere. Parameters by
            name as a second argument take the place of the current ones. BatchNorm's statistics are not updated.
        batchwide: Applies a function of all instances' values (ranks, normalisations) over the global batch. A signal
            that calls it says so: ``couples = True``.
        part: Which rows of the global batch these are.
    """

    x: Tensor
    y: Tensor
    clean: Tensor | None = None
    adv: Tensor | None = None
    anchor: Tensor | None = None
    anchor_adv: Tensor | None = None
    x_adv: Tensor | None = None
    kappa: Tensor | None = None
    inspected: Tensor | None = None
    budget: int = 0
    index: Tensor | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    labelled: Tensor | None = None
    source: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    features: Tensor | None = None
    params: Mapping[str, Tensor] | None = None
    ball: Ball | None = None
    scale: Tensor | float = 1.0
    shared: MutableMapping[str, Tensor] = field(default_factory=dict)
    input_grad: Tensor | None = None
    offsets: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None
    forward: Callable[..., Tensor] = _no_forward
    batchwide: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = _within_batch
    part: Part = WHOLE

    def logits(self, of: str) -> Tensor:
        """The logits (B, K) called `of`, a field's name, or ``"other"`` for the first of `others`.

        Raises:
            UserError: They were not computed, because no signal declared that it needs them.
        """
        if of == "other":
            if not self.others:
                raise UserError("this Evidence has no further adversary: the attack must be Several(...)")
            return self.others[0]
        value: Tensor | None = getattr(self, of)
        if value is None:
            raise UserError(
                f"this Evidence carries no {of!r} logits: a Signal that reads them must list {of!r} in `needs`"
            )
        return value
