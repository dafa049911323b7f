"""Flags and YAML files over one schema, with errors of one line."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

from instar.config import read_value
from instar.errors import UserError


class _Help(DefaultHelpFormatter):
    """Help whose description keeps its paragraphs and the lines of lists, and whose flags are written with dashes."""

    def format_help(self) -> str:
        """The whole text."""
        return re.sub(r"--[a-z]\w*", lambda flag: flag.group().replace("_", "-"), super().format_help())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip().split("\n\n")
        return "\n\n".join(
            part if "\n  " in part else str(super(_Help, self)._fill_text(part, width, indent)) for part in parts
        )


def _configuration(text: str) -> Any:
    """YAML, in whose names dashes stand for underscores, and whose numbers may be written as `--print-config` does."""
    content = get_loader("yaml")(text)
    if not isinstance(content, dict):
        return content
    names = [name.replace("-", "_") if isinstance(name, str) else name for name in content]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the configuration has {name} twice, with a dash and with an underscore")
    found = dict(zip(names, content.values(), strict=True))
    return {name: _number(item) if name in _floats.get() else item for name, item in found.items()}


_floats: ContextVar[frozenset[str]] = ContextVar("floats", default=frozenset())
"""Names of the numbers that the command knows which is being parsed: of them alone ``inf`` and ``1/3`` are no text."""
_INFINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)
_FRACTION = re.compile(r"[+-]?\d+(\.\d*)?/\d+(\.\d*)?")


def _number(item: Any) -> Any:
    """The number that a word stands for, though YAML calls it a word: ``inf``, ``1/3``; all else as it is."""
    if isinstance(item, str) and _INFINITE.fullmatch(item):
        return float(item.replace(".", ""))
    if isinstance(item, str) and _FRACTION.fullmatch(item):
        above, _, below = item.partition("/")
        return float(above) / float(below) if float(below) else item
    return item


_YAML = "yaml with dashes"
set_loader(_YAML, _configuration, exceptions=(yaml.YAMLError,))


def parser(command: str, description: str) -> ArgumentParser:
    """A parser of one command that raises instead of exiting."""
    return ArgumentParser(
        prog=f"instar {command}",
        description=description,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode=_YAML,
        print_config=None,  # commands that have --print-config print what was resolved, not what was typed
    )


class _Expression:
    """Type of arguments that are values: ``8/255``, ``tanh``, ``Ramp(0, 0.4, 0.3, 0.7)``."""

    def __call__(self, text: Any) -> Any:
        """The value that a text stands for."""
        return read_value(text)

    def __repr__(self) -> str:
        """How the help calls this type."""
        return "expression"


class _Radius:
    """Type of a radius: ``8/255`` or a number, read where it is needed and the mistake can be told."""

    def __call__(self, text: Any) -> Any:
        """Numbers of a YAML file as they are, all else as text."""
        return text if isinstance(text, (int, float)) else str(text)

    def __repr__(self) -> str:
        """How the help calls this type."""
        return "expression"


expression = _Expression()
radius = _Radius()


def width_of(given: Namespace) -> dict[str, Any] | None:
    """The argument that ``--width`` stands for, of the network that ``--model`` names.

    Raises:
        UserError: A width without a network, or one that is impossible.
    """
    if given.width is None:
        return None
    if given.model is None:
        raise UserError("--width belongs to --model, the network of a foreign state dict; all others know their width")
    if given.width < 1:
        raise UserError(f"--width must be at least 1; got {given.width}")
    return {"width": given.width}


def parse(made: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse the words of a command line; dashes in flag names stand for underscores.

    Raises:
        UserError: An unknown flag (with the nearest ones) or a value that does not fit.
    """
    normal = [re.sub(r"^--([\w-]+)", lambda m: "--" + m.group(1).replace("-", "_"), word) for word in words]
    before = _floats.set(frozenset(action.dest for action in made._actions if _takes_float(action)))
    try:
        given = made.parse_args(_with_numbers(_joined(normal)))
    except ArgumentError as error:
        raise _one_line(str(error), made) from None
    finally:
        _floats.reset(before)
    for action in made._actions:
        if action.const is True and not isinstance(said := getattr(given, action.dest), bool):
            raise UserError(f"--{action.dest.replace('_', '-')}: expected true or false. Got value: {said}")
    return given


def divided(made: ArgumentParser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands among the flags without being the value of one: paths, which may stand in any place.

    Args:
        made: The parser, which knows the flags that take a value.
        words: The words of a command line.

    Returns:
        These words, and the flags with their values.

    Example:
        >>> made = parser("try", "A command with one flag that takes a value.")
        >>> _ = made.add_argument("--batch_size", type=int), made.add_argument("--common", action="store_true")
        >>> divided(made, ["runs/a", "--batch-size", "4", "--common", "runs/b"])
        (['runs/a', 'runs/b'], ['--batch-size', '4', '--common'])

    Raises:
        UserError: An unknown flag: nobody knows whether the word behind it is its value.
    """
    valued = {flag for action in made._actions if action.nargs != 0 for flag in action.option_strings}
    known = {flag for action in made._actions for flag in action.option_strings}
    loose: list[str] = []
    flags: list[str] = []
    waiting = False
    for word in words:
        if waiting or word.startswith("-"):
            flag = re.sub(r"(?<=\w)-", "_", word.partition("=")[0])
            if not waiting and flag.startswith("--") and flag not in known:
                raise _one_line(f"unrecognized arguments: {flag}", made)
            waiting = not waiting and word == word.partition("=")[0] and flag in valued
            flags.append(word)
        else:
            loose.append(word)
    return loose, flags


def pointed(made: ArgumentParser, words: Sequence[str], flag: str = "--target") -> list[str]:
    """The words with a flag before the one that stands alone, in whatever place.

    Raises:
        UserError: Several words stand alone, or the flag is given besides.

    Example:
        >>> made = parser("try", "A command with a target.")
        >>> _ = made.add_argument("--target", type=str), made.add_argument("--n", type=int)
        >>> pointed(made, ["--n", "4", "runs/a"])
        ['--target', 'runs/a', '--n', '4']
    """
    loose, flags = divided(made, words)
    given = [*loose, *(flag for word in flags if word.partition("=")[0] == flag)]
    if len(given) > 1:
        raise UserError(f"{made.prog} takes one {flag[2:]}; got {' and '.join(given)}")
    return [*([flag, loose[0]] if loose else []), *flags]


def _takes_float(action: Any) -> bool:
    kind = getattr(action, "_typehint", action.type)
    return kind is float or float in typing.get_args(kind)


def _with_numbers(words: Sequence[str]) -> list[str]:
    """The words, with the values of numbers as YAML writes them: it calls ``inf`` a word, and ``1/3`` too."""
    found: list[str] = []
    for word in words:
        flag, tied, value = word.partition("=") if word.startswith("--") else (found[-1] if found else "", "", word)
        number = _number(value) if flag[2:] in _floats.get() else value
        text = value if number is value else f"{number!r}".replace("inf", ".inf").replace("nan", ".nan")
        found.append(f"{flag}={text}" if tied else text if flag != word else word)
    return found


def _joined(words: Sequence[str]) -> list[str]:
    """The words, with negative values tied to their flags: ``--eps -8/255`` would read as two flags."""
    found: list[str] = []
    for word in words:
        if re.match(r"-([\d.]|(inf|nan)\b)", word, re.IGNORECASE) and found and re.fullmatch(r"--\w+", found[-1]):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _one_line(message: str, made: ArgumentParser) -> UserError:
    found_flags = (flag[2:] for action in made._actions for flag in action.option_strings if flag.startswith("--"))
    unsaid = ("print_shtab", "recipe", "target", "name")
    flags = [flag.replace("_", "-") for flag in found_flags if flag not in unsaid]
    if message.startswith("Unexpected config"):
        return UserError("--config: the file must be a mapping of names to values, such as a line `epochs: 30`")
    if found := re.search(r"unrecognized arguments: ([^-\s]\S*)", message):
        return UserError(f"what is {found.group(1)!r} for? No flag stands before it")
    for pattern in (r"unrecognized arguments: (?:--)?([\w.-]+)", r"Option '([^']+)' is not accepted"):
        if found := re.search(pattern, message):
            name = found.group(1).replace("_", "-")
            near = difflib.get_close_matches(name, sorted(set(flags)), n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            return UserError(f"unknown flag {name!r}.{hint} All flags: {made.prog} --help")
    if found := re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        reason = " ".join(found.group(2).split())
        reason = re.sub(r"Expected an? (?:<class '(\w+)'>|typing\.)", lambda m: f"expected {m.group(1) or ''}", reason)
        if "Union subtypes" in reason:
            kinds = [kind.replace("NoneType", "null") for kind in re.findall(r"- expected (\w+)", reason)]
            value = reason.rpartition("Given value:")[2].strip()
            reason = f"expected {' or '.join(kinds)}. Got value: {value}"
        if choices := re.search(r"Literal\[(.*?)\]", reason):
            reason = reason.replace(choices.group(), f"one of {choices.group(1)}")
        return UserError(f"--{found.group(1).replace('_', '-')}: {reason}")
    return UserError(" ".join(message.split()))
