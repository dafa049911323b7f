"""Seeing why: the papers' analyses of a model or a run, as stored results that can be drawn again.

Example:
    >>> import torch
    >>> from instar.analyse import analyse
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> pairs = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
    >>> (found,) = analyse(net, data=pairs, eps=0.1, only=["vulnerability"], split="test")
    >>> 0 <= found.figures["gini"] <= 1
    True

`instar.analyse.analysis` says what an analysis is, and how to add one: a module here, and a line in ``_MODULES``.
"""

import importlib

from instar.analyse.analysis import ANALYSES, COMPARED, FOLDER, Analysis, Found, read, register, stored
from instar.analyse.perform import Missing, analyse
from instar.analyse.target import Portion, Target, open_files, open_targets

# In the order in which they run: what reads the results of another comes after it.
_MODULES: tuple[str, ...] = (
    "vulnerability", "pairs", "geometry", "reweighting", "capacity", "curvature", "landscape", "overfitting",
    "agreement",
)  # fmt: skip
for _name in _MODULES:
    importlib.import_module(f"instar.analyse.{_name}")  # registers itself

__all__ = [
    "ANALYSES",
    "COMPARED",
    "FOLDER",
    "Analysis",
    "Found",
    "Missing",
    "Portion",
    "Target",
    "analyse",
    "open_files",
    "open_targets",
    "read",
    "register",
    "stored",
]
