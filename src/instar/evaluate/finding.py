"""One figure against its thresholds, and what it means."""

from __future__ import annotations

from dataclasses import dataclass

NORMAL, HIGH, SUSPECT, OVERESTIMATED = "normal", "high", "suspect", "overestimated"
LEVELS = (NORMAL, HIGH, SUSPECT, OVERESTIMATED)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        verdict: ``"normal"``, ``"high"`` (between the thresholds), ``"suspect"``, or ``"overestimated"`` where the
            number that would be quoted is shown to be too high.
        value: The figure it looks at: a share of the images, or a difference of accuracies, in [−1, 1].
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


def points(value: float, error: float | None = None) -> str:
    """A difference in percentage points, with the half-width of its 95 % interval.

    Example:
        >>> points(0.215, 0.0291), points(0.005)
        ('21.5 ± 5.7 points', '0.5 points')
    """
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {196 * error:.1f}") + " points"


def percent(value: float) -> str:
    """A share in percent.

    Example:
        >>> percent(0.305)
        '30.5 %'
    """
    return f"{100 * value:.1f} %"
