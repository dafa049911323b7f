"""What collapse is: definitions and thresholds, for the guard in training, the analysis and the evaluation alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLLAPSE = 0.5
"""Catastrophic overfitting: held-out robust accuracy falls below this share of its best so far ..."""
LEARNED = 0.1
"""... which was at least this high ..."""
GAP = 0.25
"""Accuracy under one step above that under several, from which on a network is robust against one step only. PGD-AT and
TRADES show 0.04 to 0.06."""
FOUND = 0.01
"""An attack that raises the mean cross-entropy by less than this share, and breaks no image, finds nothing."""


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong, for a user.

    Attributes:
        name: ``"catastrophic overfitting"``, ``"single step"``, ``"majority class"`` or ``"idle attack"``.
        text: One line: the figure, its threshold, what it means and what to do next.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Sight:
    """What a probe of the fixed held-out images saw. Accuracies and shares in [0, 1].

    Attributes:
        clean: Accuracy without attack.
        single: Accuracy under FGSM.
        several: Accuracy under a few steps of PGD.
        largest: Share of the images that are taken for the class that is predicted most.
        usual: Share of that class in the labels.
        broken: Images that the method's own attack breaks.
        rise: By which factor its own attack raises the mean cross-entropy; 1 is not at all.
        most: Share of the most frequent label.
        count: Images.
    """

    clean: float
    single: float
    several: float
    largest: float
    usual: float
    broken: float
    rise: float
    most: float
    count: float


def catastrophic(
    train: Sequence[float] | np.ndarray, held_out: Sequence[float] | np.ndarray, *, count: int = 0
) -> int | None:
    """The first time of catastrophic overfitting, if there is one.

    Held-out robust accuracy falls below half of its best so far, which was at least 10 %, while robust accuracy under
    the weak attack that is trained with is no lower than it was at that best: the model has learned the attack, not the
    images. A run that merely diverges loses both.

    Args:
        train: Accuracy under the weak attack by epoch or probe (E,): on the training batches, or under FGSM.
        held_out: Accuracy on held-out images under a stronger attack (E,).
        count: Number of held-out images: a fall within three standard errors is chance. 0 takes every fall for real.

    Returns:
        The position, or None.

    Example:
        >>> catastrophic([0.3, 0.4, 0.9], [0.3, 0.35, 0.02])
        2
        >>> catastrophic([0.3, 0.4, 0.1], [0.3, 0.35, 0.1]) is None
        True
        >>> catastrophic([0.2, 0.2], [0.14, 0.06]), catastrophic([0.2, 0.2], [0.14, 0.06], count=64)
        (1, None)

    Source: Wong et al. 2020 describe it; they stop where PGD-5 accuracy falls by 20 points, which a model below that
        never does.
    """
    for epoch in range(1, len(held_out)):
        best = int(np.argmax(held_out[:epoch]))
        high, low = float(held_out[best]), float(held_out[epoch])
        chance = 3 * math.sqrt((high * (1 - high) + low * (1 - low)) / count) if count else 0.0
        collapsed = high >= LEARNED and low < COLLAPSE * high and high - low > chance
        if collapsed and train[epoch] >= train[best]:
            return epoch
    return None


def single_step_only(single: float, several: float) -> bool:
    """Whether a network withstands one step and not several: what catastrophic overfitting leaves behind.

    Args:
        single: Accuracy under FGSM.
        several: Accuracy under PGD.

    Example:
        >>> single_step_only(0.80, 0.01), single_step_only(0.52, 0.47)
        (True, False)
    """
    return single - several > GAP and several < COLLAPSE * single


def majority(usual: float) -> float:
    """Share of predictions for one class from which on they have collapsed onto it: halfway from its share to all.

    Example:
        >>> majority(0.1), majority(0.5)
        (0.55, 0.75)
    """
    return (1 + usual) / 2


def judge(sights: Sequence[Sight], *, resting: bool = True) -> list[Alarm]:
    """What the last of several probes has to alarm about.

    Args:
        sights: The probes of a run in order.
        resting: Whether the attack is the one that it will be at the end: before that, as in a curriculum, a network
            that withstands little is meant to be so, and only the majority class is judged. `sights` begin where the
            attack came to rest.

    Returns:
        The alarms, mostly none.

    Example:
        >>> usual = Sight(0.8, 0.5, 0.45, 0.12, 0.1, broken=9, rise=2.0, most=0.1, count=256)
        >>> fallen = Sight(0.8, 0.78, 0.01, 0.12, 0.1, broken=9, rise=2.0, most=0.1, count=256)
        >>> judge([usual]), [alarm.name for alarm in judge([usual, fallen])]
        ([], ['catastrophic overfitting'])
    """
    found = []
    last = sights[-1]
    single, several = [sight.single for sight in sights], [sight.several for sight in sights]
    best = max(several)
    figures = f"PGD accuracy on held-out images is {last.several:.1%}, FGSM accuracy {last.single:.1%}"
    cure = "use an attack of several steps (pgd_at), N-FGSM or GradAlign, a smaller eps, or stop earlier"
    # Against the best so far, from which it may have fallen long ago.
    peak = several.index(best)
    fallen = catastrophic([single[peak], last.single], [best, last.several], count=int(last.count)) is not None
    if resting and fallen:
        text = (
            f"catastrophic overfitting: {figures}, below half of its best, {best:.1%}: the network withstands the "
            f"attack that it is trained with and no other. Checkpoint best is from before; {cure}"
        )
        found.append(Alarm("catastrophic overfitting", text))
    elif resting and single_step_only(last.single, last.several):
        text = (
            f"robust against one step only: {figures}, more than {100 * GAP:.0f} points apart, as after catastrophic "
            f"overfitting; {cure}"
        )
        found.append(Alarm("single step", text))
    if len(sights) > 1 and all(sight.largest >= majority(sight.usual) for sight in sights[-2:]):
        text = (
            f"majority class: {last.largest:.1%} of the held-out images are taken for one class, which {last.usual:.1%}"
            f" are of (threshold {majority(last.usual):.0%}): the network predicts without looking. Lower --lr, let "
            "eps rise over the first epochs, or check the labels (instar data check)"
        )
        found.append(Alarm("majority class", text))
    if resting and last.clean >= last.most + LEARNED and last.broken == 0 and last.rise < 1 + FOUND:
        text = (
            f"the attack finds nothing: it breaks no held-out image and raises their mean cross-entropy by "
            f"{last.rise - 1:.2%} (threshold {FOUND:.0%}). Check eps (8/255 is usual for Linf, not 8 or 0.0001), "
            "step_size and steps, and whether the model passes gradients to its input"
        )
        found.append(Alarm("idle attack", text))
    return found
