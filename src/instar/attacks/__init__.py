"""Attacks: from a model and a batch to an `Adversary`."""

from instar.attacks.attack import Attack, NoAttack
from instar.attacks.captured import Captured, CudaGraphs, Recording, accelerated
from instar.attacks.folded import Folded, FoldingError, fold
from instar.attacks.odi import OutputDiversified
from instar.attacks.pgd import PGD
from instar.attacks.several import Several
from instar.attacks.square import Square
from instar.attacks.start import Gaussian, Given, Start, Uniform, Zero
from instar.attacks.transfer import Transfer
from instar.attacks.turns import MultiTargeted, Restarts, in_turn, passes

__all__ = [
    "PGD",
    "Attack",
    "Captured",
    "CudaGraphs",
    "Folded",
    "FoldingError",
    "Gaussian",
    "Given",
    "MultiTargeted",
    "NoAttack",
    "OutputDiversified",
    "Recording",
    "Restarts",
    "Several",
    "Square",
    "Start",
    "Transfer",
    "Uniform",
    "Zero",
    "accelerated",
    "fold",
    "in_turn",
    "passes",
]
