"""Flags and YAML files over one schema, with errors of one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from instar.config import read_value
from instar.errors import UserError, unknown


class _Help(DefaultHelpFormatter):
    """Help whose description keeps its paragraphs, and the lines of lists and examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip().split("\n\n")
        return "\n\n".join(
            part if "\n  " in part else str(super(_Help, self)._fill_text(part, width, indent)) for part in parts
        )


def parser(command: str, description: str) -> ArgumentParser:
    """A parser of one command that raises instead of exiting."""
    return ArgumentParser(
        prog=f"instar {command}",
        description=description,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
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


expression = _Expression()


def parse(made: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Parse the words of a command line; dashes in flag names stand for underscores.

    Raises:
        UserError: An unknown flag (with the nearest ones) or a value that does not fit.
    """
    normal = [re.sub(r"^--([\w-]+)", lambda m: "--" + m.group(1).replace("-", "_"), word) for word in words]
    try:
        return made.parse_args(_joined(normal))
    except ArgumentError as error:
        raise _one_line(str(error), made) from None


def _joined(words: Sequence[str]) -> list[str]:
    """The words, with negative values tied to their flags: ``--eps -8/255`` would read as two flags."""
    found: list[str] = []
    for word in words:
        if re.match(r"-[\d.]", word) and found and re.fullmatch(r"--\w+", found[-1]):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _one_line(message: str, made: ArgumentParser) -> UserError:
    found_flags = (flag[2:] for action in made._actions for flag in action.option_strings if flag.startswith("--"))
    flags = [flag for flag in found_flags if flag not in ("print_shtab", "recipe", "target", "name")]
    if found := re.search(r"unrecognized arguments: ([^-\s]\S*)", message):
        return UserError(f"what is {found.group(1)!r} for? No flag stands before it")
    for pattern in (r"unrecognized arguments: (?:--)?([\w.-]+)", r"Option '([^']+)' is not accepted"):
        if found := re.search(pattern, message):
            return unknown("flag", found.group(1), flags)
    if found := re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL):
        reason = " ".join(found.group(2).split())
        reason = re.sub(r"Expected an? (?:<class '(\w+)'>|typing\.)", lambda m: f"expected {m.group(1) or ''}", reason)
        return UserError(f"--{found.group(1)}: {reason}")
    return UserError(" ".join(message.split()))
