"""``instar explain RECIPE``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from instar.config import find_recipe
from instar.errors import UserError
from instar.methods import RECIPES, Recipe
from instar.passes import passes


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
    """Text about a recipe: idea, equation, arguments, source, cost and the equal constructor expression.

    Raises:
        UserError: No such recipe.

    Example:
        >>> print(explanation("trades").splitlines()[0])
        trades: TRADES: clean cross-entropy, plus how far the attack can move the prediction.
    """
    recipe: Recipe = find_recipe(name)
    text = inspect.getdoc(recipe) or "(no docstring)"
    kept = [block for block in text.split("\n\n") if not block.startswith(("Returns:", "Raises:", "Example:"))]
    head = [f"{recipe.__name__}: {kept[0]}", *kept[1:]]
    try:
        method = recipe()
    except UserError as lacking:
        return "\n\n".join([*head, f"Cost and value depend on its arguments: {lacking}"])
    counted = passes(method)
    return "\n\n".join(
        [
            *head,
            "Cost of a step, in passes of the batch:\n"
            f"    {counted.forward} forward, {counted.backward_input} backward to the input, "
            f"{counted.backward_full} full backward; {counted.units} forward units (full backward = 2)",
            f"The same as a value (--set changes any part of it):\n    {method!r}",
        ]
    )
