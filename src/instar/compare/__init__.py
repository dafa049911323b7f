"""Comparing evaluations image by image: which of two models is more robust, and whether that could be chance.

Example:
    >>> import torch
    >>> from instar.compare import compare
    >>> from instar.evaluate import evaluate
    >>> nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)) for _ in range(2)]
    >>> data = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
    >>> judged = [evaluate(net, data=data, suite="quick", eps="0.05")[0] for net in nets]
    >>> print(compare(judged, names=["one", "other"]).to_markdown().splitlines()[0])
    | accuracy, % | clean | PGD-10 | margin PGD-20 | worst case (95 %) | Δ worst case (95 %) | p |
"""

from instar.compare.comparison import Arm, Column, Comparison, Difference, Estimate, compare
from instar.compare.gather import Judged, gather

__all__ = ["Arm", "Column", "Comparison", "Difference", "Estimate", "Judged", "compare", "gather"]
