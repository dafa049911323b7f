"""What a run is made of, as flags, presets and YAML files say it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from instar.cli.arguments import expression, parse
from instar.config import Settings, find_recipe, read_value
from instar.errors import UserError
from instar.methods import Recipe
from instar.presets import Preset, apply, changes_of, preset


@dataclass(frozen=True)
class Configuration:
    """A run before it starts.

    Attributes:
        recipe: The recipe, or None where none was named.
        arguments: What was said of each of its arguments; None where nothing was.
        fields: Every field of `Settings`.
        changes: Dotted paths into the method and their values.
        given: All flags, those of the command's own included.
    """

    recipe: Recipe | None
    arguments: dict[str, Any]
    fields: dict[str, Any]
    changes: dict[str, Any]
    given: Namespace


def configured(name: str | None, words: Sequence[str], made: ArgumentParser) -> Configuration:
    """Read the flags of a command that describes a training run.

    Args:
        name: The recipe, of `recipe_named`.
        words: What follows the command.
        made: The command's parser with the flags of its own; those of training are added to it.

    Raises:
        UserError: A flag or value that is wrong, or a preset that needs what was not given.
    """
    recipe = find_recipe(name) if name else None
    title = _said_early("preset", words)
    published = None if title is None or name is None else preset(name, title)
    _add_flags(made, recipe, published)
    given = parse(made, words)
    fields = {key: getattr(given, key) for key in inspect.signature(Settings).parameters}
    arguments = {key: getattr(given, key) for key in (inspect.signature(recipe).parameters if recipe else {})}
    changes = _changes(given.set)
    if published is not None:
        usual = _defaults() | dict(published.settings)
        chosen = {key: item for key, item in fields.items() if item != usual[key]}
        arguments, of_preset = apply(published, arguments, chosen)
        fields |= of_preset
        changes = changes_of(published, chosen) | changes
    return Configuration(recipe, arguments, fields, changes, given)


def recipe_named(words: Sequence[str]) -> str | None:
    """The recipe that the flags name, or the YAML file among them: it decides which flags there are."""
    return _said_early("recipe", words)


def _add_flags(made: ArgumentParser, recipe: Recipe | None, published: Preset | None) -> None:
    made.add_argument("--config", action="config", help="YAML file with any of these settings")
    made.add_argument("--recipe", type=str, help="the recipe, if it is not the first word")
    made.add_argument("--preset", type=str, default=None, help="a published setting; instar explain RECIPE lists them")
    made.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change any part of the method")
    made.add_class_arguments(Settings, skip={"drops"})
    drops = "of the piecewise schedule: ((0.5, 0.1), (0.75, 0.01)) is a tenth from half of the run on, then a hundredth"
    made.add_argument("--drops", type=expression, default=_defaults()["drops"], help=drops)
    if published is not None:
        made.set_defaults(dict(published.settings))
    if recipe is not None:
        group = made.add_argument_group(f"{recipe.__name__} (what is not given is the data set's or recipe's default)")
        for key, parameter in inspect.signature(recipe).parameters.items():
            group.add_argument(f"--{key}", type=expression, default=None, help=f"recipe default: {parameter.default!r}")


def _defaults() -> dict[str, Any]:
    return {entry.name: entry.default for entry in dataclasses.fields(Settings)}


def _said_early(what: str, words: Sequence[str]) -> str | None:
    """A setting that must be known before the words can be parsed, from its flag or from the YAML file."""
    found: str | None = None
    for position, word in enumerate(words):
        flag, equals, rest = word.partition("=")
        following = rest if equals else (words[position + 1] if position + 1 < len(words) else "")
        if flag == "--config" and found is None:
            found = _from_yaml(what, Path(following))
        if flag == f"--{what}":
            return following
    return found


def _from_yaml(what: str, path: Path) -> str | None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"the configuration {path} must be a mapping of names to values")
    found = content.get(what)
    if found is not None and not isinstance(found, str):
        raise UserError(f"{what} in the configuration {path} must be a name; got {found!r}")
    return found


def _changes(given: Any) -> dict[str, Any]:
    """Changes of the method: a list of them from the command line; one, several or a mapping from a YAML file."""
    if isinstance(given, dict):
        return {str(path): read_value(item) for path, item in given.items()}
    return dict(_change(text) for text in ([given] if isinstance(given, str) else given or ()))


def _change(text: Any) -> tuple[str, Any]:
    path, equals, item = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals or not path:
        raise UserError(f"--set takes PATH=VALUE, for example attack.eps=4/255; got {text!r}")
    return path.strip(), read_value(item)
