"""First signs that a robust number is too good: attacks that disagree more than they do on sound models.

Each check reads verdicts that a suite has already produced. The full set of sanity tests needs attacks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from instar.attacks import PGD
from instar.evaluate.autoattack import OUTSIDE, AutoAttack
from instar.evaluate.intervals import mcnemar
from instar.evaluate.shards import Outcome
from instar.evaluate.suites import Entry
from instar.signals import CrossEntropy, Margin

NORMAL, HIGH, SUSPECT = "normal", "high", "suspect"
GAP_NORMAL, GAP_SUSPECT = 0.045, 0.06
MARGIN_NORMAL, MARGIN_SUSPECT = 0.03, 0.05
SQUARE_SUSPECT, SINGLE_STEP_SUSPECT = 0.002, 0.005


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        verdict: ``"normal"``, ``"high"`` (between the thresholds) or ``"suspect"``.
        value: The figure it looks at, as an accuracy difference in [−1, 1].
        error: Its standard error on these images, or None where the figure is not a sample's.
        normal: Largest value that sound models show.
        suspect: Value above which the number is suspect.
        text: What it means, in one sentence.
        source: Where the thresholds come from.
    """

    check: str
    verdict: str
    value: float
    error: float | None
    normal: float
    suspect: float
    text: str
    source: str


def judge(value: float, *, normal: float, suspect: float, error: float = 0.0) -> str:
    """``"normal"`` up to `normal`, ``"suspect"`` above `suspect`, ``"high"`` between.

    A sample that could as well come from a sound model is not suspect: for that the lower end of its 95 % interval must
    be above `normal` too.

    Args:
        value: The figure.
        normal: Largest value that sound models show.
        suspect: Value above which it is suspect.
        error: Its standard error.

    Example:
        >>> judge(0.04, normal=0.045, suspect=0.06), judge(0.17, normal=0.045, suspect=0.06)
        ('normal', 'suspect')
        >>> judge(0.07, normal=0.045, suspect=0.06, error=0.018)
        'high'
    """
    if value > suspect and value - 1.96 * error > normal:
        return SUSPECT
    return HIGH if value > normal else NORMAL


def findings(entries: tuple[Entry, ...], outcomes: Mapping[str, Outcome]) -> tuple[Finding, ...]:
    """All checks that the columns of a suite allow.

    Args:
        entries: The suite's entries.
        outcomes: By name of the entry, over all points.

    Returns:
        One finding for each check that could be made.
    """
    chosen = _strongest(entries)
    found = []
    if "cross-entropy" in chosen and "autoattack" in chosen:
        found.append(_gap(chosen["cross-entropy"], chosen["autoattack"], outcomes))
    if "cross-entropy" in chosen and "margin" in chosen:
        found.append(_margin(chosen["cross-entropy"], chosen["margin"], outcomes))
    if "single step" in chosen and "cross-entropy" in chosen:
        found.append(_single_step(chosen["single step"], chosen["cross-entropy"], outcomes))
    if "autoattack" in chosen:
        found += _reference(outcomes[chosen["autoattack"].name])
    return tuple(found)


def _strongest(entries: tuple[Entry, ...]) -> dict[str, Entry]:
    """For each kind of attack the entry with the most steps; the checks compare kinds."""
    chosen: dict[str, Entry] = {}
    steps: dict[str, Any] = {}
    for entry in entries:
        attack = entry.attack
        if isinstance(attack, AutoAttack):
            kind, count = "autoattack", attack.steps
        elif isinstance(attack, PGD) and isinstance(attack.objective, (CrossEntropy, Margin)):
            count = int(attack.steps) if isinstance(attack.steps, int) else 0
            single = isinstance(attack.objective, CrossEntropy) and count == 1
            kind = "single step" if single else "margin" if isinstance(attack.objective, Margin) else "cross-entropy"
        else:
            continue
        if count >= steps.get(kind, 0):
            chosen[kind], steps[kind] = entry, count
    return chosen


def _points(value: float, error: float | None = None) -> str:
    """In percentage points, with the half-width of a 95 % interval."""
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {196 * error:.1f}") + " points"


def _gap(weak: Entry, strong: Entry, outcomes: Mapping[str, Outcome]) -> Finding:
    pair = mcnemar(outcomes[weak.name].robust, outcomes[strong.name].robust)
    verdict = judge(pair.difference, normal=GAP_NORMAL, suspect=GAP_SUSPECT, error=pair.error)
    meaning = {
        NORMAL: "as usual for PGD-AT and TRADES",
        HIGH: "more than the 3 to 4.5 that are usual for PGD-AT and TRADES on CIFAR-10",
        SUSPECT: f"likely overestimated by {weak.title} (usual on CIFAR-10: 3 to 4.5): quote {strong.title}",
    }[verdict]
    text = f"{weak.title} minus {strong.title} is {_points(pair.difference, pair.error)}: {meaning}"
    source = "rule of thumb for CIFAR-10 Linf 8/255, from public logs of healthy models"
    return Finding("pgd_minus_autoattack", verdict, pair.difference, pair.error, GAP_NORMAL, GAP_SUSPECT, text, source)


def _margin(weak: Entry, strong: Entry, outcomes: Mapping[str, Outcome]) -> Finding:
    pair = mcnemar(outcomes[weak.name].robust, outcomes[strong.name].robust)
    verdict = judge(pair.difference, normal=MARGIN_NORMAL, suspect=MARGIN_SUSPECT, error=pair.error)
    meaning = {
        NORMAL: "the two losses agree",
        HIGH: "a margin loss finds more than usual",
        SUSPECT: "the logits mislead cross-entropy (flat or saturated), so its number is likely an overestimate",
    }[verdict]
    text = f"{weak.title} minus {strong.title} is {_points(pair.difference, pair.error)}: {meaning}"
    source = "published PGD-20 and CW numbers: PGD-AT 1.6, TRADES 2.3, MART 4.7 points"
    return Finding(
        "pgd_minus_margin", verdict, pair.difference, pair.error, MARGIN_NORMAL, MARGIN_SUSPECT, text, source
    )


def _single_step(single: Entry, many: Entry, outcomes: Mapping[str, Outcome]) -> Finding:
    pair = mcnemar(outcomes[many.name].robust, outcomes[single.name].robust)
    verdict = judge(pair.difference, normal=0.0, suspect=SINGLE_STEP_SUSPECT)
    stronger = "one step finds more than many, so the gradients are masked" if verdict != NORMAL else "as it should be"
    text = f"{many.title} minus {single.title} is {_points(pair.difference, pair.error)}: {stronger}"
    source = "Athalye et al. 2018; Carlini et al. 2019: iterative attacks must not be weaker"
    return Finding(
        "iterative_minus_single_step", verdict, pair.difference, pair.error, 0.0, SINGLE_STEP_SUSPECT, text, source
    )


MEANINGS = {
    "randomised": "outputs differ from call to call: AutoAttack standard does not average over them",
    "probabilities": "outputs look like probabilities: attacks need logits",
    "zero_gradient": "some points have an input gradient of exactly zero: gradient attacks cannot start there",
    "dynamic": "gradients are computed inside of the model's forward: an adaptive attack is needed",
    OUTSIDE: "the reference returned examples outside of the ball or with NaN: do not trust this number",
}


def _reference(outcome: Outcome) -> list[Finding]:
    """The reference's own flags, as its documentation explains them."""
    source = "checks of the AutoAttack reference code"
    found = [
        Finding(flag, SUSPECT if flag != "zero_gradient" else HIGH, 1.0, None, 0.0, 0.0, MEANINGS[flag], source)
        for flag in outcome.flags
    ]
    if "square" in outcome.stages:
        lost = float(np.mean(outcome.broken_by == outcome.stages.index("square")))
        verdict = judge(lost, normal=SQUARE_SUSPECT, suspect=SQUARE_SUSPECT)
        weaker = "a black-box attack beats the gradients" if verdict == SUSPECT else "gradients find what there is"
        text = f"Square breaks {_points(lost)} that gradient attacks left: {weaker}"
        found.append(Finding("square", verdict, lost, None, SQUARE_SUSPECT, SQUARE_SUSPECT, text, source))
    return found
