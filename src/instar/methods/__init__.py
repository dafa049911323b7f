"""The papers, one file each: a recipe is a function that returns a `Method`.

A new paper is a file here with its docstring, its own signals and its recipe, and one line below.
"""

from collections.abc import Callable

from instar.method import Method
from instar.methods.fat import fat
from instar.methods.gairat import gairat
from instar.methods.iseat import iseat
from instar.methods.mail import mail_at, mail_trades
from instar.methods.mart import mart
from instar.methods.natural import natural
from instar.methods.p_sat import p_sat
from instar.methods.pgd_at import pgd_at
from instar.methods.trades import trades

Recipe = Callable[..., Method]

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (natural, pgd_at, trades, mart, fat, mail_at, mail_trades, gairat, p_sat, iseat)
}
"""Every recipe by the name that ``instar train`` knows it by."""

__all__ = [
    "RECIPES",
    "Recipe",
    "fat",
    "gairat",
    "iseat",
    "mail_at",
    "mail_trades",
    "mart",
    "natural",
    "p_sat",
    "pgd_at",
    "trades",
]
