"""Measuring robustness honestly: attacks in suites, per-instance verdicts, and a record of all they depend on.

Example:
    >>> import torch
    >>> from instar.evaluate import evaluate, table
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    >>> records = evaluate(net, data=(torch.rand(20, 1, 2, 2), torch.arange(20) % 2), suite="quick", eps="0.05")
    >>> print(table.markdown(records).splitlines()[0])
    | accuracy, % | module |
"""

from instar.evaluate import robustbench, table
from instar.evaluate.adaptive import adaptive, sanity
from instar.evaluate.autoattack import AutoAttack, Stage
from instar.evaluate.evaluation import evaluate
from instar.evaluate.examples import Examples, read_examples
from instar.evaluate.given import attacks_of
from instar.evaluate.intervals import Paired, mcnemar, wilson
from instar.evaluate.progress import Pace, Progress
from instar.evaluate.record import Record, Score, read
from instar.evaluate.sanity import CHECKS, Finding
from instar.evaluate.suites import SUITES, Entry, Suite, auto_attack, fgsm, margin_pgd, pgd, quick, standard
from instar.evaluate.team import Team
from instar.evaluate.verdict import Verdict, conclude

__all__ = [
    "CHECKS",
    "SUITES",
    "AutoAttack",
    "Entry",
    "Examples",
    "Finding",
    "Pace",
    "Paired",
    "Progress",
    "Record",
    "Score",
    "Stage",
    "Suite",
    "Team",
    "Verdict",
    "adaptive",
    "attacks_of",
    "auto_attack",
    "conclude",
    "evaluate",
    "fgsm",
    "margin_pgd",
    "mcnemar",
    "pgd",
    "quick",
    "read",
    "read_examples",
    "robustbench",
    "sanity",
    "standard",
    "table",
    "wilson",
]
