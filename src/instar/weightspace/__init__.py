"""Steps and averages in the space of weights."""

from instar.weightspace.average import EMA, SWA, Average
from instar.weightspace.perturb import AWP, SAM, Perturbation

__all__ = ["AWP", "EMA", "SAM", "SWA", "Average", "Perturbation"]
