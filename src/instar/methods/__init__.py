"""The papers, one file each: a recipe is a function that returns a `Method`.

A new paper is a file here with its docstring, its own signals and its recipe, and one line below.
"""

from collections.abc import Callable

from instar.method import Method
from instar.methods.alp import alp
from instar.methods.awp import at_awp, mart_awp, trades_awp
from instar.methods.dynamic_at import dynamic_at
from instar.methods.fat import fat, fat_mart, fat_trades
from instar.methods.free_at import free_at
from instar.methods.gair_fat import gair_fat
from instar.methods.gair_rst import gair_rst
from instar.methods.gair_trades import gair_trades
from instar.methods.gairat import gairat
from instar.methods.grad_align import grad_align
from instar.methods.h_sat import h_sat
from instar.methods.iseat import iseat
from instar.methods.kd_swa import kd_swa
from instar.methods.mail import mail_at, mail_trades
from instar.methods.mart import mart
from instar.methods.natural import natural
from instar.methods.p_sat import fgsm_sat, p_sat
from instar.methods.pgd_at import pgd_at
from instar.methods.sam import at_sam
from instar.methods.single_step import fast_at, fgsm_at, n_fgsm
from instar.methods.spat import spat
from instar.methods.trades import trades

Recipe = Callable[..., Method]

RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        *(natural, pgd_at, trades, mart, alp),
        *(gairat, gair_trades, gair_fat, gair_rst),
        *(spat, p_sat, fgsm_sat, h_sat, dynamic_at, iseat),
        *(fat, fat_trades, fat_mart, mail_at, mail_trades),
        *(at_awp, trades_awp, mart_awp, at_sam, kd_swa),
        *(fgsm_at, fast_at, n_fgsm, grad_align, free_at),
    )
}
"""Every recipe by the name that ``instar train`` knows it by."""

__all__ = [
    "RECIPES",
    "Recipe",
    "alp",
    "at_awp",
    "at_sam",
    "dynamic_at",
    "fast_at",
    "fat",
    "fat_mart",
    "fat_trades",
    "fgsm_at",
    "fgsm_sat",
    "free_at",
    "gair_fat",
    "gair_rst",
    "gair_trades",
    "gairat",
    "grad_align",
    "h_sat",
    "iseat",
    "kd_swa",
    "mail_at",
    "mail_trades",
    "mart",
    "mart_awp",
    "n_fgsm",
    "natural",
    "p_sat",
    "pgd_at",
    "spat",
    "trades",
    "trades_awp",
]
