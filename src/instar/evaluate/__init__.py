"""Measuring robustness honestly: attacks in suites, per-instance verdicts, and a record of all they depend on.

Example:
    >>> import torch
    >>> from instar.evaluate import evaluate, table
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> records = evaluate(net, data=(torch.rand(20, 1, 2, 2), torch.arange(20) % 2), suite="quick", eps="0.05")
    >>> print(table.markdown(records).splitlines()[0])
    | accuracy, % | module |
"""

from instar.evaluate import table
from instar.evaluate.autoattack import AutoAttack, Stage
from instar.evaluate.evaluation import evaluate
from instar.evaluate.intervals import Paired, mcnemar, wilson
from instar.evaluate.progress import Pace, Progress
from instar.evaluate.record import Record, Score, read
from instar.evaluate.sanity import Finding
from instar.evaluate.suites import SUITES, Entry, Suite, auto_attack, fgsm, margin_pgd, pgd, quick, standard

__all__ = [
    "SUITES",
    "AutoAttack",
    "Entry",
    "Finding",
    "Pace",
    "Paired",
    "Progress",
    "Record",
    "Score",
    "Stage",
    "Suite",
    "auto_attack",
    "evaluate",
    "fgsm",
    "margin_pgd",
    "mcnemar",
    "pgd",
    "quick",
    "read",
    "standard",
    "table",
    "wilson",
]
