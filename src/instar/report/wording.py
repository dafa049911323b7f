"""Numbers and sources as pictures write them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import numpy as np

from instar.report.stored import StoredRun

_LONGEST_LOSS = 90
_JOIN = "\N{NO-BREAK SPACE}"


def percent(share: float) -> str:
    """A share as text, number and sign joined by a no-break space.

    Example:
        >>> percent(0.4312).split()
        ['43.1', '%']
    """
    return f"{100 * share:.1f}{_JOIN}%"


def count_range(counts: np.ndarray) -> str:
    """One number, or the smallest and largest of several.

    Example:
        >>> count_range(np.array([1280, 1280])), count_range(np.array([4, 8]))
        ('1,280', '4 to 8')
    """
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def significant(value: float) -> str:
    """Two significant digits, and one decimal for numbers from 1.

    Example:
        >>> significant(6.96), significant(0.0543), significant(2.6e-5)
        ('7.0', '0.054', '2.6e-05')
    """
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def minus(text: str) -> str:
    """A written number with a minus that is one, and no minus before a rounded zero.

    Example:
        >>> minus(f"{-0.125:.2f}"), minus(f"{-0.001:.2f}"), minus("2.6e-05"), minus("+0.5")
        ('−0.12', '0.00', '2.6e−05', '+0.5')
    """
    return (text if re.search(r"[1-9]", text) else text.removeprefix("-")).replace("-", "\N{MINUS SIGN}")


def minuses(text: str) -> str:
    """Prose with a minus before its negative numbers.

    Example:
        >>> minuses("PGD-20 minus FGSM is -3.5 points (-4 to -3)")
        'PGD-20 minus FGSM is −3.5 points (−4 to −3)'
    """
    return re.sub(r"(?<=[ (])-(?=\d)", "\N{MINUS SIGN}", text)


def grouped(text: str) -> str:
    """Text in which whole numbers of five digits or more are written in groups of three.

    Example:
        >>> grouped("first 500 of the 10000 test images, eps 0.003137254901960784")
        'first 500 of the 10,000 test images, eps 0.003137254901960784'
    """
    return re.sub(r"(?<![\w.,])\d{5,}(?![\w.,]\d)\b", lambda found: f"{int(found[0]):,}", text)


def power_of_ten(value: float, position: int | None = None) -> str:
    """Tick label of a logarithmic axis: 0.01, 1, 10, and powers where that would be long.

    Example:
        >>> power_of_ten(0.01), power_of_ten(10.0), power_of_ten(1e-5)
        ('0.01', '10', '10⁻⁵')
    """
    if 1e-3 <= value <= 1e4:
        return f"{value:g}"
    return "10" + f"{round(np.log10(value)):d}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def ranking(names: Sequence[str], shares: Sequence[float], *, most: int = 4) -> str:
    """The highest shares with their names.

    Example:
        >>> ranking(["A", "B"], [0.1, 0.2]).split()
        ['B', '20.0', '%,', 'A', '10.0', '%']
    """
    order = sorted(range(len(names)), key=lambda k: -shares[k])
    told = ", ".join(f"{names[k]}{_JOIN}{percent(shares[k])}" for k in order[:most])
    return told + (" …" if len(order) > most else "")


def source_line(runs: Sequence[StoredRun]) -> str:
    """Data, model, threat, n, seed, precision and version; what differs between runs is listed."""
    columns = (
        [run.data for run in runs],
        [run.model for run in runs],
        [run.threat or "no attack" for run in runs],
        [f"{run.config['data']['train_images']:,} training images" for run in runs],
        [f"seed {run.seed}" for run in runs],
        [str(run.config.get("precision", "")) for run in runs],
        [f"Instar {run.config.get('versions', {}).get('instar', '?')}" for run in runs],
    )
    return " · ".join(" / ".join(dict.fromkeys(column)) for column in columns if any(column))


def short_loss(loss: str) -> str:
    """The expression of a loss, cut where it is very long, and not to be broken into lines where it is short."""
    short = textwrap.shorten(loss, _LONGEST_LOSS, placeholder=" …")
    return short if len(short) > _LONGEST_LOSS // 2 else short.replace(" ", _JOIN)


def change_line(run: StoredRun, epochs: int) -> str:
    """What dotted lines in pictures of one run mean; empty if the loss does not change within the first `epochs`."""
    told = "; ".join(
        f"from epoch {epoch + 1} on, the loss is {short_loss(loss)}" for epoch, loss in run.changes if epoch < epochs
    )
    return f" Dotted line: {told}." if told else ""
