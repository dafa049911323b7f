"""``instar explain RECIPE``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence

from instar.config import find_recipe
from instar.errors import UserError
from instar.methods import RECIPES, Recipe
from instar.passes import passes
from instar.presets import PRESETS, Preset

HEADINGS = ("Equation", "Args", "Returns", "Raises", "Example", "Source", "Deviations", "Known criticism")
_HEADING = re.compile(rf"^({'|'.join(HEADINGS)}):(?:\s|$)")


def run(words: Sequence[str]) -> int:
    """Print what a recipe is; without a name, the list of recipes.

    Raises:
        UserError: No such recipe.
    """
    if not words or words[0] in ("-h", "--help"):
        print("usage: instar explain RECIPE\n\nrecipes:")
        for name, recipe in RECIPES.items():
            print(f"  {name:<12} {(inspect.getdoc(recipe) or '').splitlines()[0]}")
        return 0
    if len(words) > 1:
        raise UserError(f"instar explain takes one recipe; got {' '.join(words)}")
    print(explanation(words[0]))
    return 0


def explanation(name: str) -> str:
    """Text about a recipe: idea, equation, arguments, source, presets, cost and the equal constructor expression.

    Raises:
        UserError: No such recipe.

    Example:
        >>> print(explanation("trades").splitlines()[0])
        trades: TRADES: clean cross-entropy, plus how far the attack can move the prediction.
        >>> print(explanation("h_sat").splitlines()[0])
        RECONSTRUCTION: parts of this method are not public and are ours; see Deviations. Say so with every number.
    """
    recipe: Recipe = find_recipe(name)
    text = inspect.getdoc(recipe) or "(no docstring)"
    kept = [block for block in text.split("\n\n") if not block.startswith(("Returns:", "Raises:", "Example:"))]
    head = [reconstruction(text), f"{recipe.__name__}: {kept[0]}", *kept[1:], _presets(name)]
    head = [block for block in head if block]
    try:
        method = recipe()
    except UserError as lacking:
        return "\n\n".join([*head, f"Cost and value depend on its arguments: {lacking}"])
    return "\n\n".join(
        [
            *head,
            f"Cost of a step, in passes of the batch:\n    {passes(method).line}",
            f"The same as a value (--set changes any part of it):\n    {method!r}",
        ]
    )


def sections(docstring: str) -> dict[str, str]:
    r"""The parts of a docstring by their headings, without them; what stands under none is ``""``.

    A heading is one of `HEADINGS` and a colon at the beginning of a line; its part goes on as long as lines are
    indented.

    Example:
        >>> sections("What it is.\n\nEquation:\n    a = b\n\nIn the limit.\n\nSource: A paper,\n    page 3.")
        {'': 'What it is.\n\nIn the limit.', 'Equation': 'a = b', 'Source': 'A paper,\npage 3.'}
    """
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(docstring).splitlines():
        found = _HEADING.match(line)
        if found:
            current = found[1]
            parts[current] = [line[found.end() :]]
        elif line and not line.startswith(" "):
            current = ""
            parts[current].append(line)
        else:
            parts[current].append(line)
    return {name: _dedented(lines) for name, lines in parts.items()}


def _dedented(lines: Sequence[str]) -> str:
    """One text of a line beside a heading and the lines below it."""
    beside, below = (lines[0], lines[1:]) if lines else ("", ())
    return re.sub(r"\n{3,}", "\n\n", "\n".join([beside, textwrap.dedent("\n".join(below))])).strip()


def reconstruction(docstring: str) -> str:
    """The label of a method that its authors did not publish in full; empty for all others."""
    if not sections(docstring).get("Deviations", "").startswith("a reconstruction"):
        return ""
    return "RECONSTRUCTION: parts of this method are not public and are ours; see Deviations. Say so with every number."


def described(preset: Preset) -> list[tuple[str, str]]:
    """What is to be said about a preset, as pairs of a heading and a text."""
    pairs = [
        ("published", preset.published or "no number known"),
        ("source", preset.source),
        ("unknown or different", preset.unknown),
        ("give", "; ".join(f"--{name}, {what}" for name, what in preset.needs.items())),
    ]
    return [(heading, text) for heading, text in pairs if text]


def _presets(name: str) -> str:
    blocks = [
        "\n".join([f"    {made.name}: {made.title}", *(f"        {head}: {text}" for head, text in described(made))])
        for made in PRESETS.get(name, {}).values()
    ]
    return "\n".join([f"Presets (instar train {name} --preset NAME):", *blocks]) if blocks else ""
