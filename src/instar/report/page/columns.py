"""Columns of the instance tables, packed so that 50,000 rows of them take little room in a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

Column = dict[str, Any]


def counted(title: str, values: np.ndarray, *, group: str = "", hint: str = "") -> Column:
    """Whole numbers (n,) of at least 0; −1 is missing.

    Example:
        >>> column = counted("κ", np.array([0, 10, -1]))
        >>> column["bits"], column["none"]
        (8, 255)
    """
    bits = next(bits for bits in (8, 16, 32) if int(values.max(initial=0)) < 2**bits - 1)
    return _column(title, np.where(values < 0, 2**bits - 1, values), bits, kind="number", group=group, hint=hint)


def measured(title: str, values: np.ndarray, *, group: str = "", hint: str = "", digits: int = 3) -> Column:
    """Numbers (n,), rounded to 65,535 levels between the smallest and the largest; what is not finite is missing.

    Example:
        >>> column = measured("loss", np.array([0.0, 1.0, np.nan]))
        >>> column["bits"], column["offset"], round(column["scale"] * 65534, 3)
        (16, 0.0, 1.0)
    """
    known = np.isfinite(values)
    low, high = (float(values[known].min()), float(values[known].max())) if known.any() else (0.0, 0.0)
    scale = (high - low) / 65534 or 1.0
    levels = np.where(known, np.round((np.where(known, values, low) - low) / scale), 65535)
    made = _column(title, levels, 16, kind="number", group=group, hint=hint)
    return {**made, "scale": scale, "offset": low, "digits": digits}


def named(title: str, codes: np.ndarray, words: Sequence[str], *, group: str = "", hint: str = "") -> Column:
    """One word of several for each row: codes (n,) into `words`; −1 is missing."""
    made = counted(title, codes, group=group, hint=hint)
    return {**made, "kind": "word", "words": list(words)}


def _column(title: str, values: np.ndarray, bits: int, *, kind: str, group: str, hint: str) -> Column:
    packed = base64.b64encode(values.astype(f"<u{bits // 8}").tobytes()).decode()
    made = {"title": title, "group": group, "hint": hint, "kind": kind, "bits": bits, "none": 2**bits - 1}
    return {**made, "scale": 1, "offset": 0, "digits": 0, "data": packed}
