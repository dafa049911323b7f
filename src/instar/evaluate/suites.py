"""Which attacks make a number: suites are tuples of named attacks, built from a ball."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from instar.errors import UserError, unknown
from instar.evaluate.adaptive import adaptive, sanity
from instar.evaluate.beyond import cifar10_c, cifar100_c, corruptions, eps_sweep, multinorm
from instar.evaluate.black_box import black_box
from instar.evaluate.entries import ONCE_WRONG, Entry, Suite, apgd, auto_attack, fgsm, margin_pgd, pgd
from instar.threat import Ball

__all__ = [
    "ONCE_WRONG",
    "SUITES",
    "Entry",
    "Suite",
    "apgd",
    "auto_attack",
    "build",
    "development",
    "fgsm",
    "margin_pgd",
    "pgd",
    "quick",
    "robustbench",
    "standard",
]


def quick(ball: Ball) -> Suite:
    """Minutes, for use while working: PGD-10 and margin PGD-20. Not a number to publish.

    Cost: 62 forward passes an image that withstands both. Its verdict sees flat and saturated logits, and nothing else.
    """
    return Suite("quick", (pgd(ball, steps=10), margin_pgd(ball, steps=20)))


def development(ball: Ball) -> Suite:
    """For comparing many methods: PGD-20, margin PGD-100, and the two stages of AutoAttack that decide it.

    In nine public logs of healthy models the other two stages changed robust accuracy by at most 0.02 points; models
    that mask gradients are another matter. Publish numbers of `standard`.

    Cost: about 2,200 forward passes an image of ten classes that withstands them all.
    """
    return Suite("development", (pgd(ball, steps=20), margin_pgd(ball, steps=100), apgd(ball)))


def standard(ball: Ball) -> Suite:
    """What a result is reported with: FGSM, PGD-20, margin PGD-100 and AutoAttack standard.

    Cost: about 10,000 forward passes an image of ten classes that withstands them all, half of them Square's.
    """
    return Suite("standard", (fgsm(ball), pgd(ball, steps=20), margin_pgd(ball, steps=100), auto_attack(ball)))


def robustbench(ball: Ball) -> Suite:
    """RobustBench's evaluation and nothing besides: AutoAttack standard on all test images.

    The leaderboards are CIFAR-10 and CIFAR-100 in Linf 8/255 and L2 0.5 (all 10,000 images) and ImageNet in Linf 4/255
    (5,000 images: give ``n=5000``). `instar.evaluate.robustbench` writes the entry and says where an evaluation departs
    from that.

    Cost: about 10,000 forward passes an image of ten classes that withstands it.
    """
    return Suite("robustbench", (auto_attack(ball),))


SUITES: dict[str, Callable[[Ball], Suite]] = {
    "quick": quick,
    "development": development,
    "standard": standard,
    "sanity": sanity,
    "adaptive": adaptive,
    "robustbench": robustbench,
    "black_box": black_box,
    "corruptions": corruptions,
    "cifar10_c": cifar10_c,
    "cifar100_c": cifar100_c,
    "multinorm": multinorm,
    "eps_sweep": eps_sweep,
}


def build(suite: str | Callable[..., Suite], ball: Ball, *, shape: tuple[int, int, int] | None = None) -> Suite:
    """A suite for a ball.

    Args:
        suite: Name of one of `SUITES`, or a function of yours that makes one.
        ball: The threat model.
        shape: Shape (C, H, W) of the images, for suites whose radii depend on it: those with an argument of this name.

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
    make: Callable[..., Suite] = suite
    takes_shape = shape is not None and "shape" in inspect.signature(suite).parameters
    made = make(ball, shape=shape) if takes_shape else make(ball)
    if not isinstance(made, Suite):
        raise UserError(f"a suite must be a function of a ball that returns a Suite; it returned {type(made).__name__}")
    return made
