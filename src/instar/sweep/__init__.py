"""Many runs and one table: methods × seeds × any setting, on this machine or on SLURM, begun again where it stopped.

What is done is read from the run folders and from nowhere else, so that a sweep that was killed goes on by the same
command, and a larger one repeats nothing.

Example:
    >>> from instar.sweep import choices
    >>> [choice.label for choice in choices({"recipes": "gairat,trades(beta=3)", "eps": "4/255,8/255"}, {})]
    ['gairat, eps 4/255', 'gairat, eps 8/255', 'trades(beta=3), eps 4/255', 'trades(beta=3), eps 8/255']
"""

from instar.sweep.grid import Choice, choices, listed
from instar.sweep.local import work_through
from instar.sweep.plan import Configuration, Evaluation, Member, plan
from instar.sweep.slurm import submit, watch
from instar.sweep.state import State, look
from instar.sweep.table import groups, markdown, rows, write
from instar.sweep.work import Task, evaluate_words, train_words

__all__ = [
    "Choice",
    "Configuration",
    "Evaluation",
    "Member",
    "State",
    "Task",
    "choices",
    "evaluate_words",
    "groups",
    "listed",
    "look",
    "markdown",
    "plan",
    "rows",
    "submit",
    "train_words",
    "watch",
    "work_through",
    "write",
]
