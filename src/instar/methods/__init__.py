"""The papers, one file each: a recipe is a function that returns a `Method`.

A new paper is a file here with its docstring, its own signals and its recipe, and one line below.
"""

from collections.abc import Callable

from instar.method import Method
from instar.methods.gairat import gairat
from instar.methods.pgd_at import pgd_at
from instar.methods.trades import trades

Recipe = Callable[..., Method]

RECIPES: dict[str, Recipe] = {recipe.__name__: recipe for recipe in (pgd_at, trades, gairat)}
"""Every recipe by the name that ``instar train`` knows it by."""

__all__ = ["RECIPES", "Recipe", "gairat", "pgd_at", "trades"]
