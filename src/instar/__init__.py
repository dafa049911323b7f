"""Instar: instance-adaptive adversarial training of image classifiers, and honest measurement of their robustness."""

from instar.attacks import PGD, Folded, Gaussian, Given, NoAttack, Uniform, Zero
from instar.errors import UserError
from instar.evidence import Adversary, Batch, Evidence
from instar.expression import parse, value
from instar.method import Method
from instar.methods import RECIPES, fat, gairat, iseat, mail_at, mail_trades, mart, natural, p_sat, pgd_at, trades
from instar.runs import load
from instar.schedules import Progress, Ramp, Schedule, Steps
from instar.signals import (
    KL,
    Constant,
    Correct,
    CrossEntropy,
    Exceeds,
    GeometryWeight,
    LogitShift,
    LossGap,
    Margin,
    Patience,
    ProbabilityGap,
    RankWeight,
    Signal,
    SurvivedSteps,
)
from instar.step import Loss, training_loss, training_step
from instar.threat import L1, L2, Ball, Linf, ball
from instar.weightspace import AWP, EMA, SAM

__version__ = "0.1.0"

__all__ = [
    "AWP",
    "EMA",
    "KL",
    "L1",
    "L2",
    "PGD",
    "RECIPES",
    "SAM",
    "Adversary",
    "Ball",
    "Batch",
    "Constant",
    "Correct",
    "CrossEntropy",
    "Evidence",
    "Exceeds",
    "Folded",
    "Gaussian",
    "GeometryWeight",
    "Given",
    "Linf",
    "LogitShift",
    "Loss",
    "LossGap",
    "Margin",
    "Method",
    "NoAttack",
    "Patience",
    "ProbabilityGap",
    "Progress",
    "Ramp",
    "RankWeight",
    "Schedule",
    "Signal",
    "Steps",
    "SurvivedSteps",
    "Uniform",
    "UserError",
    "Zero",
    "__version__",
    "ball",
    "fat",
    "gairat",
    "iseat",
    "load",
    "mail_at",
    "mail_trades",
    "mart",
    "natural",
    "p_sat",
    "parse",
    "pgd_at",
    "trades",
    "training_loss",
    "training_step",
    "value",
]
