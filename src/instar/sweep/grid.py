"""What a sweep consists of: methods × seeds × any flag of ``instar train`` that is given several values."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instar.errors import UserError

REFUSED = {
    "out": "the sweep gives every run a folder of its own",
    "resume": "the sweep resumes what was begun by itself",
    "config": "settings stand in the sweep's own YAML file",
    "print_config": "--dry-run prints what would be run",
    "preset": "a preset is part of the method's name: trades@cifar10-wrn-34-10",
}
"""Flags of ``instar train`` that mean nothing in a sweep, and why."""

SEVERAL = {"recipes": "recipe", "seeds": "seed"}


@dataclass(frozen=True)
class Choice:
    """One run of a sweep, as words of ``instar train``.

    Attributes:
        method: The method as the user wrote it.
        varied: Settings that differ between the runs of the sweep, as written; methods and seeds are not among them.
        words: What follows ``instar train``, without the seed.
        seed: The seed.
    """

    method: str
    varied: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    seed: int

    @property
    def label(self) -> str:
        """The run in words, without its seed."""
        return ", ".join([self.method, *(f"{name} {given}" for name, given in self.varied)])


def listed(given: Any) -> list[str]:
    """The values of a setting: a list, or text in which commas outside of brackets and quotes separate them.

    Raises:
        UserError: There is no value, or a bracket is left open.

    Example:
        >>> listed("4/255, 8/255"), listed("Ramp(0, 0.4),Const(1)"), listed([0, 1]), listed(True)
        (['4/255', '8/255'], ['Ramp(0, 0.4)', 'Const(1)'], ['0', '1'], ['true'])
    """
    found = [part for entry in given for part in listed(entry)] if isinstance(given, list) else _split(_text(given))
    if not found or not all(found):
        raise UserError(f"expected values separated by commas; got {given!r}")
    return found


def _text(given: Any) -> str:
    return str(given).lower() if isinstance(given, bool) else str(given)


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == "," and not depth:
            parts.append("")
            continue
        parts[-1] += sign
    if depth or quote:
        raise UserError(f"a bracket or quote is left open in {text!r}")
    return [part.strip() for part in parts]


def method_words(text: str) -> tuple[str, ...]:
    """A method as words of ``instar train``: ``RECIPE``, ``RECIPE@PRESET`` or ``file.py:function``, with arguments.

    Raises:
        UserError: It cannot be read so.

    Example:
        >>> method_words("trades(beta=3)")
        ('--recipe', 'trades', '--beta', '3')
        >>> method_words("my_method.py:mine"), method_words("gairat@cifar10-wrn-32-10")
        (('--recipe', 'my_method.py:mine'), ('--recipe', 'gairat', '--preset', 'cifar10-wrn-32-10'))
    """
    name, bracket, rest = text.partition("(")
    recipe, at, preset = name.strip().partition("@")
    words = ["--recipe", recipe, *(["--preset", preset] if at else [])]
    if not recipe or (at and not preset):
        raise UserError(f"a method is RECIPE, RECIPE@PRESET or file.py:function; got {text!r}")
    if bracket:
        try:
            call = ast.parse(f"f({rest}", mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            call = None
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise UserError(f"arguments of a method are written as trades(beta=3, steps=5); got {text!r}")
        for keyword in call.keywords:
            words += [f"--{keyword.arg}", ast.unparse(keyword.value)]
    return tuple(words)


def choices(flags: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Choice]:
    """Every run of a sweep: the product of all that is given several values, seeds innermost.

    Args:
        flags: Flags of ``instar train`` by name, with one or several values each; ``recipes`` and ``seeds`` among them.
        changes: Dotted paths into the method, as of ``--set``, with one or several values each.

    Returns:
        The runs, in order.

    Raises:
        UserError: No method, a flag that means nothing here, a value twice, or a seed that is no whole number.

    Example:
        >>> found = choices({"recipes": "gairat,trades", "seeds": "0,1", "eps": "4/255,8/255", "epochs": 3}, {})
        >>> len(found), found[0].label, found[0].words
        (8, 'gairat, eps 4/255', ('--recipe', 'gairat', '--eps', '4/255', '--epochs', '3'))
    """
    given: dict[str, list[str]] = {}
    for name, entry in flags.items():
        key = SEVERAL.get(name, name)
        if key in REFUSED:
            raise UserError(f"--{key} means nothing in a sweep: {REFUSED[key]}")
        if key in given:
            raise UserError(f"--{name} and --{key} are the same: give one of them")
        given[key] = listed(entry)
    paths = {path: listed(entry) for path, entry in changes.items()}
    for name, values in [*given.items(), *paths.items()]:
        if len(set(values)) < len(values):
            raise UserError(f"--{name} has a value twice: {', '.join(values)}")
    methods = given.pop("recipe", None)
    if methods is None:
        raise UserError("a sweep needs methods: --recipes gairat,trades")
    seeds = [_seed(text) for text in given.pop("seed", ["0"])]
    axes = [[(name, value) for value in values] for name, values in given.items()]
    axes += [[(path, value) for value in values] for path, values in paths.items()]
    found = []
    for method, settings in itertools.product(methods, itertools.product(*axes)):
        words = [*method_words(method)]
        for name, value in settings:
            words += ["--set", f"{name}={value}"] if name in paths else [f"--{name}", value]
        varied = tuple((name, value) for (name, value), axis in zip(settings, axes, strict=True) if len(axis) > 1)
        found += [Choice(method, varied, tuple(words), seed) for seed in seeds]
    return found


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"seeds are whole numbers; got {text!r}") from None


def words_of(settings: Mapping[str, Any]) -> Sequence[str]:
    """Settings as flags.

    Example:
        >>> words_of({"suite": "quick", "n": 100})
        ['--suite', 'quick', '--n', '100']
    """
    return [word for name, given in settings.items() for word in (f"--{name}", _text(given))]
