"""Where the numbers of a picture come from, as its footer says it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from instar.analyse.analysis import Found
from instar.attacks import PGD, Attack
from instar.evaluate.progress import spoken
from instar.expression import number
from instar.report.wording import grouped


def sources(found: Found, *, measured: bool = True) -> list[str]:
    """Footer lines: model, images, threat model, attack, seed and versions; what differs between members is listed.

    Args:
        found: A result, or one that compares several.
        measured: Whether the picture shows what was measured on the images; otherwise they and the attack stay away.

    Returns:
        Lines of text.

    Example:
        >>> sources(Found("demo", "", "", {}, {}, {"label": "A", "checkpoint": "best", "n": 20, "seed": 0}))
        ['n = 20 · seed 0']
    """
    members = found.protocol.get("members") or [found.protocol]
    columns = [
        [_title(one.get("data")) for one in members],
        [_model(one.get("model")) for one in members],
        [f"{one['norm']} {one['eps']}" if one.get("norm") else one.get("threat") for one in members],
        [_images(one) if measured else None for one in members],
        [f"seed {one['seed']}" if "seed" in one else None for one in members],
        [str(one["precision"]) if one.get("precision") else None for one in members],
        [f"BatchNorm {one['bn_mode']}" if one.get("bn_mode") else None for one in members],
        [f"Instar {one['versions']['instar']}" if one.get("versions") else None for one in members],
    ]
    lines = [" · ".join(" / ".join(dict.fromkeys(filter(None, column))) for column in columns if any(column))]
    attack = found.protocol.get("attack")
    if attack and measured:
        seconds = sum(float(one.get("seconds") or 0.0) for one in members)
        lines.append(f"Attack: {_with_levels(str(attack))}." + (f" It took {spoken(seconds)}." if seconds >= 1 else ""))
    return lines


def in_words(attack: Attack) -> str:
    """An attack with what its expression leaves out because it is the default.

    Example:
        >>> from instar.attacks import PGD
        >>> in_words(PGD())
        'PGD-10 on CrossEntropy() in Linf(8/255), step 2/255, start Uniform()'
        >>> in_words(PGD(steps=20, step_size=8 / 255 / 10)).split(", ")[1]
        'step 0.8/255'
    """
    if not isinstance(attack, PGD) or attack.stop is not None:
        return repr(attack)
    steps, size = attack.numbers()
    moves = f"step {_levels(float(size))}, start {attack.start!r}"
    return f"PGD-{steps} on {attack.objective!r} in {attack.ball!r}, {moves}"


def _with_levels(attack: str) -> str:
    """An attack whose step size older results wrote with all digits of its binary number.

    Example:
        >>> _with_levels("PGD-20, step 0.003137254901960784, start Uniform()")
        'PGD-20, step 0.8/255, start Uniform()'
    """
    return re.sub(r"(?<=step )0\.\d{8,}", lambda found: _levels(float(found[0])), attack)


def _levels(size: float) -> str:
    """A step size as the field writes it, also where a tenth of a pixel level is only nearly one in binary."""
    tenths = round(2550 * size)
    if len(repr(size)) > 8 and "/" not in number(size) and math.isclose(2550 * size, tenths, rel_tol=1e-9):
        return f"{tenths / 10:g}/255"
    return number(size)


def _title(data: Any) -> str | None:
    return str(data.get("title")) if isinstance(data, Mapping) else None


def _model(model: Any) -> str | None:
    if not isinstance(model, Mapping):
        return model if isinstance(model, str) else None
    width = model.get("width")
    return f"{model.get('architecture')}" + (f", width {width}" if width is not None else "")


def _images(protocol: Mapping[str, Any]) -> str | None:
    if protocol.get("images"):
        return grouped(str(protocol["images"]))
    n = protocol.get("n")
    return f"n = {n:,}" if n else None
