"""Values that can be written down: every part of a method prints as the expression that makes it, and is read back.

``repr(method)`` is what a run stores, what ``instar explain`` shows and what ``--set`` accepts. Reading goes through a
whitelist over Python's own grammar and never through ``eval``: only the names of registered values, numbers, strings,
tuples and the operators ``+ - * /`` have a meaning.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, dataclass_transform

from instar.errors import UserError, unknown

T = TypeVar("T")

_VALUES: dict[str, type] = {}
_WORDS: dict[str, Any] = {"inf": math.inf, "nan": math.nan, "None": None, "True": True, "False": False}
_LONGEST, _DEEPEST, _LARGEST = 20_000, 60, 2**53

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that prints as an expression and may stand in expressions.

    A class decorated outside of the package (a user's own Signal) joins the whitelist by being imported.

    Args:
        cls: The class, with annotated fields.

    Returns:
        The frozen dataclass, with ``repr`` from `express`.

    Example:
        >>> @value
        ... class Halves:
        ...     count: int = 2
        >>> Halves(3), parse("Halves(3)") == Halves(3)
        (Halves(3), True)
    """
    own_repr = "__repr__" in cls.__dict__
    validate: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)

    def check(self: Any) -> None:
        try:
            if validate is not None:
                validate(self)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            _check_kinds(self)  # says it better, if a field of the wrong kind is what the validation stumbled over
            raise UserError(f"cannot make {type(self).__name__}: {error}") from None
        _check_kinds(self)

    if "__post_init__" in cls.__dict__ or validate is None:  # an inherited one checks already
        check.__doc__ = validate.__doc__ if validate is not None else "Check the kinds of the fields."
        cls.__post_init__ = check  # type: ignore[attr-defined]
    made = dataclasses.dataclass(frozen=True, repr=False)(cls)
    if not own_repr:
        made.__repr__ = express  # type: ignore[method-assign]
    _VALUES[made.__name__] = made
    return made


@functools.cache
def _kinds(cls: Any) -> dict[str, tuple[tuple[type, ...], str]]:
    """For each field the types that its annotation allows, and their names; fields that cannot be told are left out."""
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError):  # annotations of a class inside a function may name what is not there any more
        return {}
    allowed: dict[str, tuple[tuple[type, ...], str]] = {}
    for entry in dataclasses.fields(cls):
        options = typing.get_args(hints[entry.name]) if _is_union(hints[entry.name]) else (hints[entry.name],)
        plain = [typing.get_origin(option) or option for option in options]
        if all(isinstance(option, type) for option in plain):
            names = ["None" if option is type(None) else option.__name__ for option in plain]
            allowed[entry.name] = (tuple(plain), " or ".join(names))
    return allowed


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _check_kinds(item: Any) -> None:
    """Refuse a field of another kind than its annotation says; a whole number passes for a float.

    Raises:
        UserError: With the field, what it must be and what it is.
    """
    for name, (kinds, names) in _kinds(typing.cast(Hashable, type(item))).items():
        given = getattr(item, name)
        if isinstance(given, kinds) and (bool in kinds or not isinstance(given, bool)):
            continue
        number_like = isinstance(given, (int, float)) and not isinstance(given, bool)
        if number_like and (float in kinds or (int in kinds and float(given).is_integer())):
            continue
        shown = repr(given)
        raise UserError(
            f"{name} of {type(item).__name__} must be {names}; got {type(given).__name__}: "
            f"{shown if len(shown) < 80 else shown[:77] + '...'}"
        )


def known() -> dict[str, type]:
    """The registered values by name."""
    return dict(_VALUES)


def number(x: float) -> str:
    """A number as people in this field write it: thirds and the like, and multiples of half a pixel level, as such.

    Example:
        >>> number(8 / 255), number(0.1), number(float("inf")), number(1 / 3), number(0.8 / 255)
        ('8/255', '0.1', 'inf', '1/3', '0.8/255')
    """
    written = repr(x)
    # 0.1 and 0.2 are multiples of 1/510 too: only what has no short decimal is a fraction to a reader.
    if isinstance(x, float) and abs(x) <= 4 and len(written) > 8:
        for below in (3, 6, 7, 9, 11, 12, 13):  # shares of a run; none of them is a usual number of pixel levels
            if x and round(x * below) / below == x:
                return f"{round(x * below)}/{below}"
        halves = round(x * 510)
        if halves / 2 / 255 == x:
            return f"{halves // 2 if halves % 2 == 0 else halves / 2}/255"
        tenths = round(x * 2550)
        if tenths / 10 / 255 == x:  # a tenth of a radius of 8/255 is 0.8/255
            return f"{tenths / 10}/255"
    return written


def express(item: Any) -> str:
    """The expression that makes `item`: what differs from the defaults, the first field by position, others by name.

    Args:
        item: A registered value, a number, a string, None, a boolean, or a tuple of those.

    Returns:
        Text that `parse` reads back to an equal value.
    """
    if isinstance(item, float):
        return number(item)
    if isinstance(item, tuple):
        inner = ", ".join(map(express, item))
        return f"({inner},)" if len(item) == 1 else f"({inner})"
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        return repr(item)
    if "__repr__" in type(item).__dict__ and type(item).__repr__ is not express:
        return repr(item)
    written = []
    by_position = True
    for position, entry in enumerate(dataclasses.fields(item)):
        if not entry.init:
            continue
        current = getattr(item, entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if default is not dataclasses.MISSING and _same(current, default):
            by_position = False
            continue
        by_position &= (default is dataclasses.MISSING or position == 0) and not entry.kw_only
        written.append(express(current) if by_position else f"{entry.name}={express(current)}")
    return f"{type(item).__name__}({', '.join(written)})"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def parse(text: str, *, words: bool = False) -> Any:
    """Read an expression back into the value it writes.

    Args:
        text: For example ``"CrossEntropy(of='clean') + 6 * KL()"`` or ``"8/255"``.
        words: Whether a single word stands for itself (``tanh`` for ``'tanh'``), as a shell user types it.

    Returns:
        The value.

    Raises:
        UserError: Not an expression, an unknown name, something else than the whitelist allows, or arguments that the
            named value refuses.

    Example:
        >>> parse("(1, 8/255, inf)") == (1, 8 / 255, math.inf)
        True
        >>> parse("__import__('os')")
        Traceback (most recent call last):
            ...
        instar.errors.UserError: unknown value '__import__'. Known: ...
    """
    if len(text) > _LONGEST:
        raise UserError(f"an expression may have {_LONGEST} characters; got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        raise UserError(f"cannot read the expression {text[:80]!r}: {reason}") from None
    if words and isinstance(tree, ast.Name) and tree.id not in _WORDS:
        return tree.id
    return _read(tree, text, 0)


def _read(node: ast.expr, text: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise UserError(f"the expression {text[:60]!r}... is nested more than {_DEEPEST} levels deep")
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        if isinstance(node.value, int) and abs(node.value) > _LARGEST:
            raise UserError(f"a whole number may be at most {_LARGEST}; got one of {node.value.bit_length()} bits")
        return node.value
    if isinstance(node, ast.Name):
        if node.id in _WORDS:
            return _WORDS[node.id]
        if node.id in _VALUES:
            raise UserError(f"{node.id} needs its arguments: write {node.id}(...)")
        raise unknown("value", node.id, _VALUES)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_read(item, text, depth + 1) for item in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        operand = _read(node.operand, text, depth + 1)
        return _apply(operator.neg if isinstance(node.op, ast.USub) else operator.pos, text, operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _read(node.left, text, depth + 1), _read(node.right, text, depth + 1)
        if isinstance(left, (str, tuple)) or isinstance(right, (str, tuple)):
            raise UserError(f"only numbers and signals can be added, multiplied or divided in {text[:80]!r}")
        return _apply(_BINARY[type(node.op)], text, left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in _VALUES:
            raise unknown("value", node.func.id, _VALUES)
        cls = _VALUES[node.func.id]
        if any(keyword.arg is None for keyword in node.keywords):
            raise UserError(f"** cannot be used in an expression: {text[:80]!r}")
        arguments = [_read(item, text, depth + 1) for item in node.args]
        named = {str(keyword.arg): _read(keyword.value, text, depth + 1) for keyword in node.keywords}
        if len(named) < len(node.keywords):
            raise UserError(f"{node.func.id} got an argument twice in {text[:80]!r}")
        return build(cls, arguments, named)
    try:
        part = ast.unparse(node)
    except RecursionError:
        part = text
    raise UserError(f"{part[:60]!r} is not allowed in an expression: use names of values and numbers")


def _apply(function: Callable[..., Any], text: str, *operands: Any) -> Any:
    try:
        return function(*operands)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"cannot compute {text[:80]!r}: {error}") from None


def build(cls: type, arguments: list[Any], named: dict[str, Any]) -> Any:
    """Make a registered value, turning a wrong argument into one line.

    Raises:
        UserError: A field that does not exist (with the nearest names), too many or too few arguments, or a value
            that the class refuses.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(cls) if entry.init}
    for name in named:
        if name not in fields:
            raise unknown(f"field of {cls.__name__}", name, fields)
    try:
        return cls(*arguments, **named)
    except TypeError as error:
        shape = ", ".join(fields)
        raise UserError(f"cannot make {cls.__name__}({shape}): {str(error).split(') ', 1)[-1]}") from None


def assign(item: Any, path: str, new: Any) -> Any:
    """A copy of `item` with one field, anywhere inside of it, replaced.

    A name that is not a field of the value itself is looked for one level below and taken if just one part has it, so
    that ``attack.eps`` finds the radius of the attack's ball.

    Args:
        item: A registered value, such as a method.
        path: Dotted field names, for example ``"attack.step_size"``.
        new: The field's new value.

    Returns:
        The changed copy; `item` stays as it is.

    Raises:
        UserError: No such field (with the nearest names), or more than one candidate.
    """
    name, _, rest = path.partition(".")
    fields = [entry.name for entry in dataclasses.fields(item) if entry.init] if dataclasses.is_dataclass(item) else []
    if name in fields:
        changed = assign(getattr(item, name), rest, new) if rest else new
        try:
            return dataclasses.replace(item, **{name: changed})
        except TypeError as error:
            raise UserError(f"cannot set {path} of {type(item).__name__}: {error}") from None
    below = [f for f in fields if dataclasses.is_dataclass(getattr(item, f)) and name in _fields(getattr(item, f))]
    if len(below) == 1:
        return assign(item, f"{below[0]}.{path}", new)
    if below:
        raise UserError(f"{name!r} could mean {' or '.join(f'{f}.{name}' for f in below)}: write which")
    inside = {
        f"{f}.{n}" for f in fields if dataclasses.is_dataclass(getattr(item, f)) for n in _fields(getattr(item, f))
    }
    raise unknown(f"field of {type(item).__name__}", name, [*fields, *inside])


def _fields(item: Any) -> list[str]:
    return [entry.name for entry in dataclasses.fields(item) if entry.init]
