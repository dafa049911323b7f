"""Attacks: from a model and a batch to an `Adversary`."""

from instar.attacks.attack import Attack, NoAttack
from instar.attacks.folded import Folded, FoldingError, fold
from instar.attacks.pgd import PGD
from instar.attacks.several import Several
from instar.attacks.start import Gaussian, Given, Start, Uniform, Zero

__all__ = [
    "PGD",
    "Attack",
    "Folded",
    "FoldingError",
    "Gaussian",
    "Given",
    "NoAttack",
    "Several",
    "Start",
    "Uniform",
    "Zero",
    "fold",
]
