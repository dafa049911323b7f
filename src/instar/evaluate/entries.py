"""Columns of an evaluation: named attacks, and the suites that they make up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from instar.attacks import PGD, Attack, Square, Transfer, Uniform, Zero
from instar.errors import UserError
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.examine import budget
from instar.signals import CrossEntropy, Exceeds, Margin, Signal
from instar.threat import L1, Ball

ONCE_WRONG = Exceeds(Margin(), 0.0)
"""Stop rule of evaluation: an attack has won as soon as one iterate is misclassified, and keeps that iterate as its
example. A point therefore counts as robust only if no iterate breaks it."""

ROLES = frozenset(
    {
        "",
        "autoattack",
        "black box",
        "cross-entropy",
        "falling loss",
        "gradient",
        "margin",
        "mechanism",
        "many steps",
        "noise",
        "other",
        "scaled",
        "single step",
        "sweep",
        "transfer",
        "unbounded",
        "zero gradient",
    }
)
DIAGNOSES = frozenset({"falling loss", "mechanism", "zero gradient"})


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
        role: What the sanity checks take it for, one of `ROLES`; empty leaves it to the attack itself (see `kind`).

    Raises:
        UserError: A name that records cannot hold, or an unknown role.
    """

    name: str
    title: str
    attack: Attack | AutoAttack
    counts: bool = True
    everyone: bool = False
    role: str = ""

    def __post_init__(self) -> None:
        """Check the name and what it is run on."""
        if (
            not self.name.isidentifier()
            or self.name in RESERVED
            or self.name.endswith("_by")
            or self.name.startswith("mechanism_")
        ):
            raise UserError(
                f"a column's name must be a word of letters, digits and _, and none of {', '.join(sorted(RESERVED))} "
                f"or mechanism_...; got {self.name!r}"
            )
        if self.everyone and (self.counts or isinstance(self.attack, AutoAttack)):
            raise UserError(f"{self.name} attacks points that were wrong before, so it cannot count in the worst case")
        if self.role not in ROLES:
            raise UserError(f"role of {self.name} must be one of {', '.join(sorted(ROLES))!r}; got {self.role!r}")

    @property
    def kind(self) -> str:
        """Its role, or what can be told from an attack: AutoAttack, PGD on cross-entropy or margin, black boxes."""
        if self.role:
            return self.role
        if isinstance(self.attack, AutoAttack):
            return "autoattack"
        if isinstance(self.attack, (Square, Transfer)):
            return "black box" if isinstance(self.attack, Square) else "transfer"
        if isinstance(self.attack, PGD) and self.counts and not self.everyone and isinstance(self.attack.steps, int):
            if isinstance(self.attack.objective, CrossEntropy) and self.attack.steps:
                return "single step" if self.attack.steps == 1 else "cross-entropy"
            if isinstance(self.attack.objective, Margin) and self.attack.steps:
                return "margin"
        return "other"

    @property
    def diagnosis(self) -> bool:
        """Whether its column says something about gradients and is no accuracy, so that tables leave it out."""
        return self.kind in DIAGNOSES


RESERVED = frozenset({"clean", "worst_case", "index", "label", "prediction", "clean_margin", "adv_margin"})


@dataclass(frozen=True)
class Suite:
    """Attacks that are run together. Clean accuracy and the worst case over all of them belong to every suite.

    Attributes:
        name: Its name, which also names the record.
        entries: The attacks, in the order in which they are run.
        images: How many images it is run on where the user does not say; None is all of them.
        twin_steps: For runs whose checkpoints are averaged: the online weights are evaluated too where the user does
            not say which, and averaged and online weights are attacked through one another with so many steps. 0 does
            neither.

    Raises:
        UserError: Two entries share a name, or fewer images than one.

    Example:
        >>> from instar.threat import Linf
        >>> suite = Suite("mine", (fgsm(Linf(8/255)), pgd(Linf(8/255), steps=20)))
        >>> [entry.title for entry in suite.entries], suite.forwards(10)
        (['FGSM', 'PGD-20'], 44)
    """

    name: str
    entries: tuple[Entry, ...]
    images: int | None = None
    twin_steps: int = 0

    def __post_init__(self) -> None:
        """Check that names are distinct."""
        names = [entry.name for entry in self.entries]
        if len(set(names)) != len(names):
            raise UserError(f"columns of a suite must have distinct names; got {', '.join(names)}")
        if self.images is not None and self.images < 1:
            raise UserError(f"a suite needs at least one image; got images={self.images}")

    def forwards(self, classes: int) -> int:
        """About how many forward passes an image costs that no attack breaks; the others cost less.

        A backward to the input counts as one. Attacks that cannot tell are left out.

        Args:
            classes: Number of classes K.
        """
        return sum(int(budget(entry.attack, classes).get("forwards", 0)) for entry in self.entries)


def fgsm(ball: Ball) -> Entry:
    """One step of the size of the ball from the clean image, on cross-entropy.

    Source: Goodfellow et al. 2015.
    """
    radius = ball.radius
    attack = PGD(spread(ball, radius), steps=1, step_size=radius, start=Zero(), stop=ONCE_WRONG)
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
    return Entry(f"pgd_{steps}", f"PGD-{steps}", descent(ball, CrossEntropy(), steps))


def margin_pgd(ball: Ball, *, steps: int) -> Entry:
    """The same descent on the margin of the best wrong class, which flat or scaled logits do not mislead.

    Known as CW-PGD or CW∞; it is not the original optimisation of Carlini and Wagner.

    Args:
        ball: Where the attack may go.
        steps: Number of steps.
    """
    return Entry(f"margin_pgd_{steps}", f"margin PGD-{steps}", descent(ball, Margin(), steps))


def auto_attack(ball: Ball) -> Entry:
    """The standard version of AutoAttack."""
    return Entry("autoattack", "AutoAttack", AutoAttack(ball))


def apgd(ball: Ball) -> Entry:
    """The first two stages of AutoAttack, which cost a fifth of it and rarely leave anything to the others."""
    return Entry("apgd", "APGD-CE + APGD-T", AutoAttack(ball, stages=("apgd-ce", "apgd-t")))


def descent(ball: Ball, objective: Signal, steps: int) -> PGD:
    """PGD in steps of a quarter of the radius from a uniform point, over when an iterate is misclassified.

    Args:
        ball: Where the attack may go.
        objective: What it maximises.
        steps: Number of steps.
    """
    step = ball.radius / 4
    return PGD(spread(ball, step), objective, steps=steps, step_size=step, start=Uniform(), stop=ONCE_WRONG)


def spread(ball: Ball, step_size: float) -> Ball:
    """An L1 ball whose steps fit into pixels, which can move by 1 at most: four pixels for each unit of step size."""
    if isinstance(ball, L1) and ball.coordinates == 1:
        return dataclasses.replace(ball, coordinates=max(1, round(4 * step_size)))
    return ball
