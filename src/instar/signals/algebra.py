"""Signals and their algebra: `+`, `-` and `*` build losses out of terms and weights."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from instar.errors import UserError
from instar.evidence import Evidence
from instar.expression import express, value
from instar.schedules import Schedule

Number = int | float | Schedule


class Signal(abc.ABC):
    """A number for every instance, computed from the `Evidence`: a loss term, a weight, a difficulty, a stop rule.

    A signal declares in `needs` which logits it reads; they are then there, with their gradients, whoever else asks.
    A signal that is a coefficient detaches its *result*, never its inputs.

    Signals add and multiply, with one another and with numbers or schedules:

        >>> from instar.signals import CrossEntropy, KL
        >>> CrossEntropy("clean") + 6 * KL()
        CrossEntropy('clean') + 6 * KL()
    """

    @property
    def needs(self) -> frozenset[str]:
        """Names of the `Evidence` fields that must be computed for it.

        ``"clean"``, ``"adv"``, ``"anchor"``, ``"anchor_adv"``, ``"others"`` are logits, ``"features"`` what goes into
        the head, ``"params"`` the weights; ``"kappa"`` and ``"input_grad"`` are what an attack keeps; ``"forward"`` and
        ``"generator"`` say that a signal queries the model elsewhere, or draws random numbers.
        """
        return frozenset[str]().union(*(part.needs for part in self.parts))

    vanishes_at_clean: ClassVar[bool] = False
    """Whether its gradient is zero at the clean image, so that an attack on it must start elsewhere."""

    largest: ClassVar[float] = math.inf
    """The largest value there is, for difficulties; a stop rule with this bound never stops."""

    couples: ClassVar[bool] = False
    """Whether it looks at the whole batch (`Evidence.batchwide`, `Evidence.part`), and not at each instance alone."""

    @property
    def idle(self) -> bool:
        """For a stop rule: whether it can never stop anything, so that nothing has to be computed for it."""
        return False

    @property
    def parts(self) -> tuple[Signal, ...]:
        """The signals that this one is made of."""
        if not dataclasses.is_dataclass(self):
            return ()
        fields = (getattr(self, entry.name) for entry in dataclasses.fields(self))
        return tuple(item for item in fields if isinstance(item, Signal))

    @property
    def coupling(self) -> int:
        """How many signals that look at the whole batch stand within one another; 0 if none does."""
        return self.couples + max((part.coupling for part in self.parts), default=0)

    @abc.abstractmethod
    def __call__(self, evidence: Evidence) -> Tensor:
        """The value (B,) for each instance of the batch, in its order."""

    def __add__(self, other: Signal | Number) -> Signal:
        """Sum."""
        return Sum(self, as_signal(other))

    def __radd__(self, other: Number) -> Signal:
        """Sum."""
        return Sum(as_signal(other), self)

    def __sub__(self, other: Signal | Number) -> Signal:
        """Difference."""
        return Sum(self, Negated(as_signal(other)))

    def __rsub__(self, other: Number) -> Signal:
        """Difference."""
        return Sum(as_signal(other), Negated(self))

    def __mul__(self, other: Signal | Number) -> Signal:
        """Product."""
        return Product(self, as_signal(other))

    def __rmul__(self, other: Number) -> Signal:
        """Product."""
        return Product(as_signal(other), self)

    def __neg__(self) -> Signal:
        """Negation."""
        return Negated(self)

    def __pos__(self) -> Signal:
        """The signal itself."""
        return self


def as_signal(item: Signal | Number) -> Signal:
    """`item` as a signal: numbers and schedules become a `Constant`.

    Raises:
        TypeError: `item` is neither.
    """
    if isinstance(item, Signal):
        return item
    if isinstance(item, (int, float, Schedule)) and not isinstance(item, bool):
        return Constant(item)
    raise TypeError(f"a Signal combines with signals, numbers and schedules; got {type(item).__name__}")


@value
class Constant(Signal):
    """The same number for every instance.

    Attributes:
        amount: The number, or a `Schedule` of it.

    Raises:
        UserError: `amount` is not a number.

    Example:
        >>> Constant(3.0)
        Constant(3.0)
    """

    amount: Number

    def __post_init__(self) -> None:
        """Refuse what is not a number."""
        if isinstance(self.amount, float) and math.isnan(self.amount):
            raise UserError("a coefficient of a loss must be a number; got nan")

    def __call__(self, evidence: Evidence) -> Tensor:
        """The number, in the shape (B,)."""
        if isinstance(self.amount, Schedule):
            raise UserError(f"the coefficient is still the schedule {self.amount!r}: use method.at(progress) first")
        logits = next((z for z in (evidence.adv, evidence.clean, evidence.anchor) if z is not None), evidence.x)
        return torch.full((len(evidence.y),), float(self.amount), device=logits.device, dtype=logits.dtype)


@value
class Sum(Signal):
    """left + right.

    Attributes:
        left: First signal.
        right: Second signal.
    """

    left: Signal
    right: Signal

    def __post_init__(self) -> None:
        """Take numbers for signals."""
        _as_signals(self, "left", "right")

    def __call__(self, evidence: Evidence) -> Tensor:
        """The sum (B,)."""
        return self.left(evidence) + self.right(evidence)

    def __repr__(self) -> str:
        """`a + b`, or `a - b` where b is negated."""
        if _numbers(self.left, self.right):
            return f"Sum({self.left!r}, {self.right!r})"
        if isinstance(self.right, Negated):
            return f"{_term(self.left)} - {_factor(self.right.operand, last=True)}"
        right = f"({self.right!r})" if isinstance(self.right, Sum) else _term(self.right)
        return f"{_term(self.left)} + {right}"


@value
class Product(Signal):
    """left · right. A factor that is the number 0 makes it 0 without the other one being computed.

    Attributes:
        left: First signal, usually the coefficient or weight.
        right: Second signal.
    """

    left: Signal
    right: Signal

    def __post_init__(self) -> None:
        """Take numbers for signals."""
        _as_signals(self, "left", "right")

    @property
    def needs(self) -> frozenset[str]:
        """What both factors need; nothing if one is 0."""
        return frozenset() if self._zero else self.left.needs | self.right.needs

    @property
    def _zero(self) -> bool:
        """Whether a factor is the number 0, such as a coefficient before its time has come."""
        return any(isinstance(f, Constant) and f.amount == 0 for f in (self.left, self.right))

    def __call__(self, evidence: Evidence) -> Tensor:
        """The product (B,)."""
        if self._zero:
            return Constant(0.0)(evidence)
        if isinstance(self.left, Constant) and not isinstance(self.left.amount, Schedule):
            return float(self.left.amount) * self.right(evidence)
        return self.left(evidence) * self.right(evidence)

    def __repr__(self) -> str:
        """`a * b`, with parentheses where a or b is a sum, or b a product."""
        if _numbers(self.left, self.right):
            return f"Product({self.left!r}, {self.right!r})"
        right = f"({self.right!r})" if isinstance(self.right, Product) else _factor(self.right, last=True)
        return f"{_factor(self.left)} * {right}"


@value
class Negated(Signal):
    """−operand.

    Attributes:
        operand: The signal to negate.
    """

    operand: Signal

    def __post_init__(self) -> None:
        """Take a number for a signal."""
        _as_signals(self, "operand")

    def __call__(self, evidence: Evidence) -> Tensor:
        """The negative (B,)."""
        return -self.operand(evidence)

    def __repr__(self) -> str:
        """`-a`."""
        if isinstance(self.operand, Constant):
            return f"Negated({self.operand!r})"
        return f"-({self.operand!r})" if isinstance(self.operand, (Sum, Product, Negated)) else f"-{self.operand!r}"


def _as_signals(signal: Signal, *names: str) -> None:
    for name in names:
        object.__setattr__(signal, name, as_signal(getattr(signal, name)))


def _numbers(left: Signal, right: Signal) -> bool:
    """Whether operators between the two would compute a number instead of reading back as signals."""
    bare = right.operand if isinstance(right, Negated) else right
    return isinstance(left, Constant) and isinstance(bare, Constant)


def _term(signal: Signal) -> str:
    """A signal as a term of a sum; constants are bare numbers there."""
    return express(signal.amount) if isinstance(signal, Constant) else repr(signal)


def _factor(signal: Signal, *, last: bool = False) -> str:
    """A signal as a factor; behind another factor, a number with an operator of its own needs parentheses."""
    text = _term(signal)
    compound = isinstance(signal, (Sum, Negated)) or (last and isinstance(signal, Constant) and not text.isidentifier())
    return f"({text})" if compound and (not isinstance(signal, Constant) or "/" in text or "-" in text) else text
