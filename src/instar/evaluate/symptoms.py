"""The symptoms of masked gradients, each as a figure with its thresholds, error, meaning and source."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from instar.evaluate.columns import Columns, norm, radius
from instar.evaluate.finding import HIGH, NORMAL, OVERESTIMATED, SUSPECT, Finding, judge, percent, points
from instar.evaluate.intervals import mcnemar, wilson
from instar.guards.collapse import GAP

CARLINI = "Carlini et al. 2019; Athalye et al. 2018"
SQUARE_SUSPECT = 0.002
FAR = 64 / 255
NOTHING_LEFT = "nothing_left"


def judged_share(count: int, total: int, *, suspect: float) -> str:
    """For points that a weak attack breaks and strong ones do not: each is a fact, but one may be luck.

    Args:
        count: Such points.
        total: All points.
        suspect: Largest share that is not suspect.

    Example:
        >>> [judged_share(count, 200, suspect=0.002) for count in (0, 1, 2)]
        ['normal', 'high', 'suspect']
    """
    if count > max(1, suspect * total):
        return SUSPECT
    return HIGH if count else NORMAL


def deviation(share: float, count: int) -> float:
    """Standard error of a share of `count` points."""
    return math.sqrt(max(share * (1 - share), 0.0) / count)


def single_step(columns: Columns) -> Finding | None:
    """(a) An attack of many steps must not be weaker than one of a single step."""
    single, many = columns.most("single step"), columns.most("cross-entropy")
    if single is None or many is None:
        return None
    pair = columns.pair(many, single)
    verdict = judge(pair.difference, normal=0.0, suspect=0.005, error=pair.error)
    stronger = "one step finds more than many, so the gradients are masked" if verdict != NORMAL else "as it should be"
    text = f"{many.title} minus {single.title} is {points(pair.difference, pair.error)}: {stronger}"
    return Finding("iterative_minus_single_step", verdict, pair.difference, pair.error, 0.0, 0.005, text, CARLINI)


def single_step_only(columns: Columns) -> Finding | None:
    """Robust against one step only: what catastrophic overfitting looks like. It says nothing against other numbers."""
    single, many = columns.most("single step"), columns.most("cross-entropy")
    if single is None or many is None:
        return None
    pair = columns.pair(single, many)
    verdict = HIGH if judge(pair.difference, normal=0.12, suspect=GAP, error=pair.error) == SUSPECT else NORMAL
    meaning = {
        NORMAL: "the two do not lie far apart",
        HIGH: "robust against one step only, as after catastrophic overfitting or natural training",
    }[verdict]
    text = f"{single.title} minus {many.title} is {points(pair.difference, pair.error)}: {meaning}"
    source = "Wong et al. 2020 (catastrophic overfitting); PGD-AT and TRADES show 4 to 6 points"
    return Finding("single_step_minus_iterative", verdict, pair.difference, pair.error, 0.12, GAP, text, source)


def black_box(columns: Columns) -> list[Finding]:
    """(b) What sees no gradients must not break what gradients leave standing."""
    white = columns.white
    if white is None:
        return []
    found = []
    for entry in columns.of("black box", "transfer"):
        missed = int((white & ~columns.robust(entry)).sum())
        share = missed / len(white)
        verdict = judged_share(missed, len(white), suspect=SQUARE_SUSPECT)
        meaning = "gradients find what there is" if verdict == NORMAL else "gradients miss what is there"
        error = deviation(share, len(white))
        text = f"{entry.title} breaks {points(share, error)} that attacks with gradients left: {meaning}"
        check = "transfer" if entry.kind == "transfer" else "black_box"
        source = f"{CARLINI}; 0.2 points as in the AutoAttack reference code"
        found.append(Finding(check, verdict, share, error, 0.0, SQUARE_SUSPECT, text, source))
    return found


def monotone(columns: Columns) -> Finding | None:
    """(c) A larger radius must not leave more points standing."""
    rising = sorted(columns.of("sweep"), key=radius)
    if len(rising) < 2:
        return None
    pairs = [(columns.pair(large, small), large, small) for small, large in pairwise(rising)]
    pair, large, small = max(pairs, key=lambda entry: entry[0].difference)
    value = max(pair.difference, 0.0)
    verdict = judge(value, normal=0.005, suspect=0.01, error=pair.error)
    text = "accuracy does not rise with the radius" if value == 0 else ""
    text = text or f"{large.title} leaves {points(value, pair.error)} more standing than {small.title}"
    return Finding("monotone_in_eps", verdict, value, pair.error, 0.005, 0.01, text, CARLINI)


def far(columns: Columns) -> list[Finding]:
    """(d) In the whole box, and at 64/255, nothing may be left: there is room for the image of another class."""
    found = []
    boxes = columns.of("unbounded")
    # The threat model's own radius says nothing here, nor does a radius of another norm.
    distant = [e for e in columns.of("sweep") if not e.counts and norm(e) == "Linf" and radius(e) >= FAR]
    for check, entries in (("whole_box", boxes), ("far_eps", distant[-1:])):
        for entry in entries:
            value = columns.accuracy(entry)
            error = deviation(value, len(columns.robust(entry)))
            verdict = judge(value, normal=0.02, suspect=0.05, error=error)
            if check == "whole_box" and value - 1.96 * error > 0.2:
                verdict = OVERESTIMATED
            meaning = "as it should be" if verdict == NORMAL else "an attack without bounds fails, so gradients mislead"
            text = f"{entry.title} leaves {percent(value)} standing: {meaning}"
            found.append(Finding(check, verdict, value, error, 0.02, 0.05, text, CARLINI))
    return found


def plateau(columns: Columns) -> Finding | None:
    """Robust at twice the radius: of what could fall from ε to 2ε, how much does not.

    What could fall is as much as fell from 0 to ε, or all that is left if that is less.
    """
    rising = sorted(columns.of("sweep"), key=radius)
    inside = [entry for entry in rising if entry.counts]
    if not inside or radius(inside[0]) != 0 or radius(inside[-1]) == 0:
        return None
    own = inside[-1]
    double = [entry for entry in rising if math.isclose(radius(entry), 2 * radius(own))]
    if not double:
        return None
    start, middle, end = (columns.accuracy(entry) for entry in (inside[0], own, double[0]))
    fallible = min(middle, start - middle)
    count = len(columns.robust(own))
    if fallible < 0.05 or fallible * count < 10:
        return None  # too little fell, or is left, to see a shape
    value = min(max(1 - (middle - end) / fallible, -1.0), 1.0)
    error = min(columns.pair(own, double[0]).error / fallible, 1.0)
    verdict = judge(value, normal=0.6, suspect=0.8, error=error)
    meaning = "it goes on falling" if verdict == NORMAL else "a plateau, as masked gradients show it"
    text = (
        f"accuracy is {percent(start)} without attack, {percent(middle)} under {own.title} and {percent(end)} at twice "
        f"the radius: {meaning}"
    )
    return Finding("robust_at_twice_eps", verdict, value, error, 0.6, 0.8, text, CARLINI)


def more_steps(columns: Columns) -> Finding | None:
    """(e) Ten times the steps must not change the number."""
    few, many = columns.most("cross-entropy"), columns.most("many steps")
    if few is None or many is None:
        return None
    pair = columns.pair(few, many)
    value = abs(pair.difference)
    verdict = judge(value, normal=0.005, suspect=0.01, error=pair.error)
    meaning = "converged"
    if verdict != NORMAL:
        meaning = "not converged: quote the longer one" if pair.difference > 0 else "more steps find less"
    text = f"{few.title} minus {many.title} is {points(pair.difference, pair.error)}: {meaning}"
    return Finding("more_steps", verdict, value, pair.error, 0.005, 0.01, text, f"{CARLINI}: less than 0.5 points")


def noise(columns: Columns) -> Finding | None:
    """(f) Noise must be much weaker than an attack: which share of what the attack breaks does noise break."""
    random, attack = columns.most("noise"), columns.most("cross-entropy")
    if random is None or attack is None or columns.correct is None:
        return None
    broken = columns.correct & ~columns.robust(attack)
    by_noise = columns.correct & ~columns.robust(random)
    count = max(int(broken.sum()), int(by_noise.sum()))
    if count < 5:
        return None  # too few to compare shares
    value = min(float(by_noise.sum() / max(int(broken.sum()), 1)), 1.0)
    error = deviation(value, count)
    verdict = judge(value, normal=0.3, suspect=0.5, error=error)
    meaning = "noise is much weaker" if verdict == NORMAL else "the attack does little more than noise"
    text = f"{random.title} breaks {int(by_noise.sum())} points, {attack.title} {int(broken.sum())}: {meaning}"
    return Finding("noise_against_attack", verdict, value, error, 0.3, 0.5, text, CARLINI)


def scale(columns: Columns) -> Finding | None:
    """Multiplying the logits by a constant must change no more than another loss does."""
    scaled = columns.of("scaled")
    base = next((entry for entry in scaled if entry.name == "scaled_1"), columns.most("cross-entropy"))
    if not scaled or base is None:
        return None
    pair = mcnemar(columns.robust(base), columns.robust(base) & columns.all_of(scaled))
    best = min(scaled, key=columns.accuracy)
    verdict = judge(pair.difference, normal=0.03, suspect=0.05, error=pair.error)
    meaning = {
        NORMAL: "the scale of the logits hides little",
        HIGH: "the scale of the logits hides more than usual",
        SUSPECT: "the scale of the logits hides attacks from cross-entropy",
    }[verdict]
    text = f"scaled logits break {points(pair.difference, pair.error)} more, most by {best.title}: {meaning}"
    source = "Hitaj et al. 2021; thresholds of the margin loss, which large scales approach"
    return Finding("logit_scale", verdict, pair.difference, pair.error, 0.03, 0.05, text, source)


def zero_gradients(columns: Columns) -> list[Finding]:
    """Gradients that are exactly zero: no attack can begin there."""
    found = []
    for entry in columns.of("zero gradient"):
        right = columns.correct if columns.correct is not None else np.ones_like(columns.robust(entry))
        total = int(right.sum())
        if not total:
            continue
        value = float((right & ~columns.robust(entry)).sum() / total)
        error = deviation(value, total)
        verdict = judge(value, normal=0.01, suspect=0.05, error=error)
        if value - 1.96 * error > 0.5 and "margin" in entry.name:
            verdict = OVERESTIMATED
        meaning = "attacks can begin" if verdict == NORMAL else "attacks cannot begin there"
        text = f"{percent(value)} of the points have {entry.title}: {meaning}"
        source = f"{CARLINI}; zero-gradient check of the AutoAttack reference code"
        found.append(Finding(entry.name, verdict, value, error, 0.01, 0.05, text, source))
    return found


def falling(columns: Columns) -> Finding | None:
    """(h) The loss must rise along an attack."""
    watched = columns.most("falling loss")
    if watched is None:
        return None
    right = columns.correct if columns.correct is not None else np.ones_like(columns.robust(watched))
    total = int(right.sum())
    if not total:
        return None
    value = float((right & ~columns.robust(watched)).sum() / total)
    error = deviation(value, total)
    verdict = judge(value, normal=0.05, suspect=0.15, error=error)
    meaning = "it rises" if verdict == NORMAL else "gradients do not lead upwards"
    text = f"the loss does not rise along PGD on {percent(value)} of the points: {meaning}"
    return Finding("loss_along_steps", verdict, value, error, 0.05, 0.15, text, f"{CARLINI}, 4.2")


def zero_eps(columns: Columns) -> Finding | None:
    """(i) A ball without size must give back the clean accuracy."""
    none = [entry for entry in columns.of("sweep") if radius(entry) == 0]
    if not none or columns.correct is None:
        return None
    value = float((columns.robust(none[0]) != columns.correct).mean())
    verdict = SUSPECT if value else NORMAL
    meaning = "as it should be" if verdict == NORMAL else "the model answers differently from call to call"
    text = f"with eps 0 {points(value)} differ from the clean predictions: {meaning}"
    return Finding("eps_zero", verdict, value, None, 0.0, 0.0, text, CARLINI)


def nothing_left(label: np.ndarray, correct: np.ndarray, worst: np.ndarray) -> list[Finding]:
    """A model that is no better than chance, or of which nothing withstands: a true number, and nothing to praise.

    Args:
        label: Labels (n,).
        correct: Which clean predictions are right (n,).
        worst: Which points withstood everything (n,).
    """
    count = len(label)
    accuracy, chance = float(correct.mean()), float(np.unique(label, return_counts=True)[1].max()) / count
    source = "no attack is needed"
    if len(np.unique(label)) > 1 and wilson(int(correct.sum()), count)[0] <= chance and accuracy < (1 + chance) / 2:
        text = (
            f"clean accuracy is {percent(accuracy)}, always the same class gives {percent(chance)}, so that there is "
            "nothing to attack: wrong weights, labels, normalisation or images?"
        )
        return [Finding(NOTHING_LEFT, HIGH, accuracy, deviation(accuracy, count), chance, chance, text, source)]
    if not worst.any() and correct.any():
        text = f"no image of {count} withstands, so that nothing is left to overestimate"
        return [Finding(NOTHING_LEFT, HIGH, 0.0, None, 0.0, 0.0, text, source)]
    return []


def headline(columns: Columns) -> Finding | None:
    """Whether the number that would be quoted is beaten by the other attacks of the suite, taken together."""
    quoted = columns.headline
    others = [e for e in columns.entries if e.counts and not e.diagnosis and e is not quoted]
    if quoted is None or not others:
        return None
    mine, rest = columns.robust(quoted), columns.all_of(others)
    pair = mcnemar(mine, mine & rest)
    best = min(others, key=lambda entry: int((mine & columns.robust(entry)).sum()))
    value, lower = pair.difference, pair.difference - 1.96 * pair.error
    if quoted is columns.autoattack:
        normal, suspect, least = 0.002, 0.005, 0.005
        source = "0.5 points over AutoAttack, as in the adaptive suites for reweighted training"
    else:
        normal, suspect, least = 0.045, 0.06, 0.045
        source = "PGD overstates sound models by 3 to 4.5 points on CIFAR-10, Linf 8/255 (public logs)"
    verdict = NORMAL if value <= normal else HIGH
    if value > suspect and lower > least:
        verdict = OVERESTIMATED
    elif value > suspect and int((mine & ~rest).sum()) > 1:
        verdict = HIGH if quoted is not columns.autoattack else SUSPECT
    together = percent(float((mine & rest).mean()))
    quote = f"{quoted.title} says {percent(float(mine.mean()))}, all attacks together {together}"
    meaning = {
        NORMAL: "it stands",
        HIGH: f"mostly by {best.title}, within what is usual or chance",
        SUSPECT: f"mostly by {best.title}; too few points to be sure",
        OVERESTIMATED: f"mostly by {best.title}: {quoted.title} overestimates, quote the worst case",
    }[verdict]
    text = f"{quote}, {points(value, pair.error)} less: {meaning}"
    return Finding("headline", verdict, value, pair.error, normal, suspect, text, source)
