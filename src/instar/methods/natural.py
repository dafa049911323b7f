"""Natural training: no attack."""

from __future__ import annotations

from instar.attacks import NoAttack
from instar.method import Method
from instar.signals import CrossEntropy


def natural() -> Method:
    """Natural training: minimise the cross-entropy of the clean images.

    Equation:
        min_θ mean_i CE(f_θ(x_i), y_i)

    Returns:
        The method.

    Example:
        >>> natural()
        Method(NoAttack(), CrossEntropy('clean'))

    Source: the baseline of every paper here; it has no robustness.
    Deviations: none.
    """
    return Method(NoAttack(), CrossEntropy("clean"))
