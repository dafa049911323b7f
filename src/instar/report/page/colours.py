"""Colours for a dark page from those for a light one, so that a figure is drawn once and looks right on both."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

_HEX = re.compile(r"#([0-9a-fA-F]{6})\b")
_LIGHT = (0.0, 0.27, 0.54, 0.79, 0.90, 0.945, 1.0)
_DARK = (0.96, 0.92, 0.74, 0.47, 0.36, 0.30, 0.215)
"""Lightness on paper and on a dark page of ink, grey text, edges, grid and paper; between them it is interpolated."""
_GREY, _VIVID = 0.03, 0.09
"""Chroma up to which a colour is treated as a grey, and from which on as a colour."""
_LIGHT_COLOUR = (0.0, 0.62, 0.76, 0.82, 0.90, 1.0)
_DARK_COLOUR = (0.68, 0.68, 0.74, 0.58, 0.42, 0.28)
"""The same for colours: lines and bars become readable, and tints, which are pale on paper, become dark."""

# Björn Ottosson's OKLab: linear sRGB to cone responses, and their cube roots to lightness and two opponent axes.
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_AXES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def darkened(colour: str) -> str:
    """What a colour of the light page becomes on the dark one: greys change places, hues stay and become readable.

    Args:
        colour: ``#RRGGBB``.

    Returns:
        ``#rrggbb``.

    Example:
        >>> darkened("#FFFFFF"), darkened("#22262B"), darkened("#0072B2")
        ('#191919', '#e0e5ec', '#45a0e3')
    """
    (dark,) = darkened_pixels(np.array([_coded(colour)]))
    return "#" + "".join(f"{part:02x}" for part in dark)


def darkened_pixels(colours: np.ndarray) -> np.ndarray:
    """The same for many colours.

    Args:
        colours: sRGB (n, 3), uint8.

    Returns:
        (n, 3), uint8.
    """
    lab = np.cbrt(_linear(colours) @ _CONES.T) @ _AXES.T
    lightness, a, b = lab.T
    vivid = np.clip((np.hypot(a, b) - _GREY) / (_VIVID - _GREY), 0, 1)
    as_grey = np.interp(lightness, _LIGHT, _DARK)
    as_colour = np.interp(lightness, _LIGHT_COLOUR, _DARK_COLOUR)
    dark = np.stack([(1 - vivid) * as_grey + vivid * as_colour, a, b], axis=1)
    linear = np.clip((dark @ np.linalg.inv(_AXES).T) ** 3 @ np.linalg.inv(_CONES).T, 0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * coded).astype(np.uint8)


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, from 1 to 21.

    Example:
        >>> round(contrast("#000000", "#ffffff"), 1)
        21.0

    Source: WCAG 2.2, relative luminance.
    """
    low, high = sorted(float(_linear(_coded(colour)) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def themed(text: str) -> str:
    """Hex colours in a style or attribute as CSS variables, which fall back to the colour itself.

    Example:
        >>> themed("stroke: #0072B2; fill: none")
        'stroke: var(--k0072b2,#0072b2); fill: none'
    """
    return _HEX.sub(lambda found: f"var(--k{found[1].lower()},#{found[1].lower()})", text)


def used(texts: Iterable[str]) -> list[str]:
    """The distinct colours that `themed` made variables of, as ``rrggbb``, in order."""
    return sorted({found for text in texts for found in re.findall(r"var\(--k([0-9a-f]{6}),", text)})


def dark_rules(colours: Iterable[str]) -> str:
    """Declarations of the variables of `colours` (``rrggbb``) for the dark page.

    Example:
        >>> dark_rules(["ffffff"])
        '--kffffff:#191919'
    """
    return ";".join(f"--k{colour}:{darkened('#' + colour)}" for colour in colours)


def _coded(colour: str) -> np.ndarray:
    return np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)], dtype=np.uint8)


def _linear(colours: np.ndarray) -> np.ndarray:
    share = colours / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
