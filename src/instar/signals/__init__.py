"""What a training step can look at and add up: losses, weights, difficulties and stop rules, all of one kind."""

from instar.signals.algebra import Constant, Negated, Product, Signal, Sum
from instar.signals.curvature import GaussNewtonCurvature, HessianCurvature, LastLayerCurvature
from instar.signals.difficulty import (
    Below,
    Correct,
    Exceeds,
    LossGap,
    Patience,
    ProbabilityGap,
    Referenced,
    SurvivedSteps,
)
from instar.signals.losses import KL, CrossEntropy, LogitShift, Margin
from instar.signals.objectives import Scaled, TargetedMargin
from instar.signals.weights import GeometryWeight, RankWeight, mean_one

__all__ = [
    "KL",
    "Below",
    "Constant",
    "Correct",
    "CrossEntropy",
    "Exceeds",
    "GaussNewtonCurvature",
    "GeometryWeight",
    "HessianCurvature",
    "LastLayerCurvature",
    "LogitShift",
    "LossGap",
    "Margin",
    "Negated",
    "Patience",
    "ProbabilityGap",
    "Product",
    "RankWeight",
    "Referenced",
    "Scaled",
    "Signal",
    "Sum",
    "SurvivedSteps",
    "TargetedMargin",
    "mean_one",
]
