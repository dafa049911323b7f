"""Which attacks make a number: suites are tuples of named attacks, built from a ball."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from instar.attacks import PGD, Attack, Uniform, Zero
from instar.errors import UserError, unknown
from instar.evaluate.autoattack import AutoAttack
from instar.signals import CrossEntropy, Exceeds, Margin, Signal
from instar.threat import L1, Ball

ONCE_WRONG = Exceeds(Margin(), 0.0)
"""Stop rule of evaluation: an attack has won as soon as one iterate is misclassified, and keeps that iterate as its
example. A point therefore counts as robust only if no iterate breaks it."""


@dataclass(frozen=True)
class Entry:
    """One column of an evaluation.

    Attributes:
        name: Its name in records: letters, digits and ``_``.
        title: Its name in tables.
        attack: What is run on every point whose clean prediction is right.
        counts: Whether it stays within the threat model, so that the worst case counts it; an attack with a larger
            ball, or a corruption, is a measurement beside it.
        everyone: Whether it is also run on points whose clean prediction is wrong; its score is then the plain
            accuracy on the images it makes, as is usual for corruptions.

    Raises:
        UserError: A name that records cannot hold.
    """

    name: str
    title: str
    attack: Attack | AutoAttack
    counts: bool = True
    everyone: bool = False

    def __post_init__(self) -> None:
        """Check the name."""
        if not self.name.isidentifier() or self.name in RESERVED or self.name.endswith("_by"):
            raise UserError(
                f"a column's name must be a word of letters, digits and _, and none of {', '.join(sorted(RESERVED))}; "
                f"got {self.name!r}"
            )
        if self.everyone and (self.counts or isinstance(self.attack, AutoAttack)):
            raise UserError(f"{self.name} attacks points that were wrong before, so it cannot count in the worst case")


RESERVED = frozenset({"clean", "worst_case", "index", "label", "prediction", "clean_margin"})


@dataclass(frozen=True)
class Suite:
    """Attacks that are run together. Clean accuracy and the worst case over all of them belong to every suite.

    Attributes:
        name: Its name, which also names the record.
        entries: The attacks, in the order in which they are run.

    Raises:
        UserError: Two entries share a name.

    Example:
        >>> from instar.threat import Linf
        >>> [entry.title for entry in quick(Linf(8/255)).entries]
        ['PGD-10', 'margin PGD-20']
    """

    name: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        """Check that names are distinct."""
        names = [entry.name for entry in self.entries]
        if len(set(names)) != len(names):
            raise UserError(f"columns of a suite must have distinct names; got {', '.join(names)}")


def fgsm(ball: Ball) -> Entry:
    """One step of the size of the ball from the clean image, on cross-entropy.

    Source: Goodfellow et al. 2015.
    """
    radius = ball.radius
    attack = PGD(_spread(ball, radius), steps=1, step_size=radius, start=Zero(), stop=ONCE_WRONG)
    return Entry("fgsm", "FGSM", attack)


def pgd(ball: Ball, *, steps: int) -> Entry:
    """Projected gradient descent on cross-entropy from a random point, in steps of a quarter of the radius.

    Args:
        ball: Where the attack may go.
        steps: Number of steps.

    Example:
        >>> from instar.threat import Linf
        >>> pgd(Linf(4/255), steps=20).attack.step_size == 1/255
        True

    Source: Madry et al. 2018; a quarter of the radius is 2/255 for 8/255, as in Rice et al. 2020.
    """
    return Entry(f"pgd_{steps}", f"PGD-{steps}", _descent(ball, CrossEntropy(), steps))


def margin_pgd(ball: Ball, *, steps: int) -> Entry:
    """The same descent on the margin of the best wrong class, which flat or scaled logits do not mislead.

    Known as CW-PGD or CW∞; it is not the original optimisation of Carlini and Wagner.

    Args:
        ball: Where the attack may go.
        steps: Number of steps.
    """
    return Entry(f"margin_pgd_{steps}", f"margin PGD-{steps}", _descent(ball, Margin(), steps))


def auto_attack(ball: Ball) -> Entry:
    """The standard version of AutoAttack."""
    return Entry("autoattack", "AutoAttack", AutoAttack(ball))


def apgd(ball: Ball) -> Entry:
    """The first two stages of AutoAttack, which cost a fifth of it and rarely leave anything to the others."""
    return Entry("apgd", "APGD-CE + APGD-T", AutoAttack(ball, stages=("apgd-ce", "apgd-t")))


def _descent(ball: Ball, objective: Signal, steps: int) -> PGD:
    step = ball.radius / 4
    return PGD(_spread(ball, step), objective, steps=steps, step_size=step, start=Uniform(), stop=ONCE_WRONG)


def _spread(ball: Ball, step_size: float) -> Ball:
    """An L1 ball whose steps fit into pixels, which can move by 1 at most: four pixels for each unit of step size."""
    if isinstance(ball, L1) and ball.coordinates == 1:
        return dataclasses.replace(ball, coordinates=max(1, round(4 * step_size)))
    return ball


def quick(ball: Ball) -> Suite:
    """Minutes, for use while working: PGD-10 and margin PGD-20. Not a number to publish."""
    return Suite("quick", (pgd(ball, steps=10), margin_pgd(ball, steps=20)))


def development(ball: Ball) -> Suite:
    """For comparing many methods: PGD-20, margin PGD-100, and the two stages of AutoAttack that decide it.

    In nine public logs of healthy models the other two stages changed robust accuracy by at most 0.02 points; models
    that mask gradients are another matter. Publish numbers of `standard`.
    """
    return Suite("development", (pgd(ball, steps=20), margin_pgd(ball, steps=100), apgd(ball)))


def standard(ball: Ball) -> Suite:
    """What a result is reported with: FGSM, PGD-20, margin PGD-100 and AutoAttack standard."""
    return Suite("standard", (fgsm(ball), pgd(ball, steps=20), margin_pgd(ball, steps=100), auto_attack(ball)))


SUITES: dict[str, Callable[[Ball], Suite]] = {"quick": quick, "development": development, "standard": standard}


def build(suite: str | Callable[[Ball], Suite], ball: Ball) -> Suite:
    """A suite for a ball.

    Args:
        suite: Name of one of `SUITES`, or a function of yours that makes one.
        ball: The threat model.

    Returns:
        The suite.

    Raises:
        UserError: No such suite, or the function returned something else.

    Example:
        >>> from instar.threat import L2
        >>> build("standard", L2(0.5)).name
        'standard'
    """
    if isinstance(suite, str):
        if suite not in SUITES:
            raise unknown("suite", suite, SUITES)
        suite = SUITES[suite]
    made = suite(ball)
    if not isinstance(made, Suite):
        raise UserError(f"a suite must be a function of a ball that returns a Suite; it returned {type(made).__name__}")
    return made
