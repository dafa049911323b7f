"""Whether a robust number is to be believed: attacks that disagree, or gradients that fail, more than in sound models.

Each check reads verdicts that a suite has already produced, so that every suite gives as many of them as its attacks
allow: `quick` two, `standard` those that need AutoAttack, `sanity` and `adaptive` all. The letters are those of the
usual list: (a) many steps against one, (b) white box against black box and transfer, (c) monotone in eps, (d) nothing
left without bounds, (e) converged, (f) noise, (g) margin against cross-entropy, (h) the loss rises, (i) eps 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from instar.evaluate import symptoms
from instar.evaluate.autoattack import OUTSIDE
from instar.evaluate.columns import Columns
from instar.evaluate.entries import Entry
from instar.evaluate.finding import HIGH, NORMAL, OVERESTIMATED, SUSPECT, Finding, judge, points
from instar.evaluate.shards import Outcome

__all__ = ["CHECKS", "HIGH", "NORMAL", "OVERESTIMATED", "SUSPECT", "Finding", "findings", "judge"]

GAP_NORMAL, GAP_SUSPECT = 0.045, 0.06
MARGIN_NORMAL, MARGIN_SUSPECT = 0.03, 0.05

CHECKS = {
    "headline": "other attacks against the number that is quoted",
    "pgd_minus_autoattack": "PGD against AutoAttack",
    "pgd_minus_margin": "cross-entropy against margin",
    "iterative_minus_single_step": "many steps against one",
    "black_box": "gradients against Square",
    "transfer": "gradients against transfer",
    "monotone_in_eps": "accuracy falls with eps",
    "whole_box": "nothing left without bounds",
    "robust_at_twice_eps": "no plateau in eps",
    "more_steps": "converged",
    "noise_against_attack": "noise",
    "logit_scale": "scale of the logits",
    "zero_gradient_ce": "zero gradients",
    "loss_along_steps": "the loss rises",
    "eps_zero": "eps 0",
}
"""The checks that a full evaluation makes, and what they compare; `black_box` is AutoAttack's `square` where the suite
has no Square of its own."""


def findings(
    entries: tuple[Entry, ...], outcomes: Mapping[str, Outcome], *, correct: np.ndarray | None = None
) -> tuple[Finding, ...]:
    """All checks that the columns of a suite allow.

    Args:
        entries: The suite's entries.
        outcomes: By name of the entry, over all points.
        correct: Which clean predictions are right (n,); without it, some checks cannot be made.

    Returns:
        One finding for each check that could be made.
    """
    columns = Columns(entries, outcomes, correct)
    autoattack = columns.autoattack
    found = [
        symptoms.headline(columns),
        _gap(columns),
        _margin(columns),
        symptoms.single_step(columns),
        symptoms.single_step_only(columns),
        *symptoms.black_box(columns),
        symptoms.monotone(columns),
        *symptoms.far(columns),
        symptoms.plateau(columns),
        symptoms.more_steps(columns),
        symptoms.noise(columns),
        symptoms.scale(columns),
        *symptoms.zero_gradients(columns),
        symptoms.falling(columns),
        symptoms.zero_eps(columns),
        *(_reference(outcomes[autoattack.name]) if autoattack is not None else ()),
    ]
    return tuple(finding for finding in found if finding is not None)


def _gap(columns: Columns) -> Finding | None:
    weak, strong = columns.most("cross-entropy"), columns.autoattack
    if weak is None or strong is None:
        return None
    pair = columns.pair(weak, strong)
    verdict = judge(pair.difference, normal=GAP_NORMAL, suspect=GAP_SUSPECT, error=pair.error)
    meaning = {
        NORMAL: "as usual for PGD-AT and TRADES",
        HIGH: "more than the 3 to 4.5 that are usual for PGD-AT and TRADES on CIFAR-10",
        SUSPECT: f"likely overestimated by {weak.title} (usual on CIFAR-10: 3 to 4.5): quote {strong.title}",
    }[verdict]
    text = f"{weak.title} minus {strong.title} is {points(pair.difference, pair.error)}: {meaning}"
    source = "rule of thumb for CIFAR-10 Linf 8/255, from public logs of healthy models"
    return Finding("pgd_minus_autoattack", verdict, pair.difference, pair.error, GAP_NORMAL, GAP_SUSPECT, text, source)


def _margin(columns: Columns) -> Finding | None:
    weak, strong = columns.most("cross-entropy"), columns.most("margin")
    if weak is None or strong is None:
        return None
    pair = columns.pair(weak, strong)
    verdict = judge(pair.difference, normal=MARGIN_NORMAL, suspect=MARGIN_SUSPECT, error=pair.error)
    meaning = {
        NORMAL: "the two losses agree",
        HIGH: "a margin loss finds more than usual",
        SUSPECT: "the logits mislead cross-entropy (flat or saturated), so its number is likely an overestimate",
    }[verdict]
    text = f"{weak.title} minus {strong.title} is {points(pair.difference, pair.error)}: {meaning}"
    source = "published PGD-20 and CW numbers: PGD-AT 1.6, TRADES 2.3, MART 4.7 points"
    return Finding(
        "pgd_minus_margin", verdict, pair.difference, pair.error, MARGIN_NORMAL, MARGIN_SUSPECT, text, source
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
        Finding(
            flag,
            SUSPECT if flag != "zero_gradient" else HIGH,
            1.0,
            None,
            0.0,
            0.0,
            MEANINGS.get(flag, f"the reference code warns: {flag}"),
            source,
        )
        for flag in outcome.flags
    ]
    if "square" in outcome.stages:
        broken = outcome.broken_by == outcome.stages.index("square")
        lost = float(np.mean(broken))
        error = symptoms.deviation(lost, len(broken))
        verdict = symptoms.judged_share(int(broken.sum()), len(broken), suspect=symptoms.SQUARE_SUSPECT)
        weaker = "gradients find what there is" if verdict == NORMAL else "a black-box attack beats the gradients"
        text = f"Square breaks {points(lost, error)} that gradient attacks left: {weaker}"
        found.append(Finding("square", verdict, lost, error, 0.0, symptoms.SQUARE_SUSPECT, text, source))
    return found
