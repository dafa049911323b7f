"""One look for all pictures: colours for colour-blind readers too, a title that says what is seen, sources below."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import instar
from instar.errors import UserError
from instar.storage import write_atomically

P = ParamSpec("P")

INK, GREY, PALE, PAPER = "#22262B", "#69707A", "#D9DDE2", "#FFFFFF"
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of runs: Okabe and Ito 2008, without the yellow, which is too pale for lines on white."""
_OWN = {"PGD-AT": 0, "GAIRAT": 1, "TRADES": 2, "SPAT": 3, "P-SAT": 4, "ISEAT": 5}
"""Places in `RUNS` of the methods that are compared most: they look the same in every picture of every page."""
EASY, HARD = "#0072B2", "#D55E00"
"""What withstands, and what does not."""

WIDTH = 10.0
"""Width of every picture in inches."""
DPI = 150
_AREAS = 160
"""Colours of a drawing that a palette keeps as they are: the most frequent ones."""

_MARGIN = 0.35
# Typed loosely, because the type of rules differs between versions of matplotlib.
_RULES: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": "#B4BAC2",
    "axes.labelcolor": GREY,
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E9ECEF",
    "grid.linewidth": 0.8,
    "xtick.color": "#B4BAC2",
    "ytick.color": "#B4BAC2",
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.8,
    "svg.fonttype": "none",
    # Names of classes, files and runs are shown as they are: a dollar sign in one begins no formula.
    "text.parse_math": False,
}


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator of functions that make a figure: the look applies inside of them and nowhere else."""

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_RULES):
            return function(*args, **kwargs)

    return drawn


class Sheet:
    """A figure with room for a title above and sources below; panels are placed in what lies between.

    Args:
        height: Height of the middle part in inches.
        title: What is seen, in one sentence.
        subtitle: How to read it.
        footer: Sources: data, model, n, seed.
        left: Room for labels left of the panels in inches.
        right: Room right of the panels in inches.
        bottom: Room for the labels of the lowest axes in inches.
    """

    def __init__(
        self,
        height: float,
        *,
        title: str,
        subtitle: str,
        footer: Sequence[str],
        left: float = 0.62,
        right: float = 0.2,
        bottom: float = 0.5,
    ) -> None:
        headline = balanced(title, size=14, weight="bold")
        explained = wrapped(subtitle, size=9.5)
        sources = [line for part in footer for line in wrapped(part, size=7.5)]
        above = 0.3 + 0.25 * len(headline) + 0.19 * len(explained) + 0.42
        below = 0.14 + 0.145 * len(sources) + 0.14
        total = above + height + bottom + below
        self.figure = Figure(figsize=(WIDTH, total))
        FigureCanvasAgg(self.figure)
        self.left, self.right = (_MARGIN + left) / WIDTH, 1 - (_MARGIN + right) / WIDTH
        self.top, self.bottom = 1 - above / total, (below + bottom) / total
        edge = _MARGIN / WIDTH
        self.figure.suptitle(
            "\n".join(headline),
            x=edge,
            y=1 - 0.24 / total,
            ha="left",
            va="top",
            fontsize=14,
            fontweight="bold",
            linespacing=1.25,
        )
        y = 1 - (0.3 + 0.25 * len(headline)) / total
        self.figure.text(
            edge,
            y,
            "\n".join(explained),
            va="top",
            fontsize=9.5,
            color=GREY,
            linespacing=1.4,
            gid="subtitle",
        )
        self.figure.text(
            edge,
            0.14 / total,
            "\n".join(sources),
            va="bottom",
            fontsize=7.5,
            color=GREY,
            linespacing=1.4,
            gid="sources",
            label=" · ".join(part.rstrip(".") for part in footer if part),  # the parts, which the lines do not show
        )

    def grid(self, rows: int, columns: int, **layout: Any) -> Any:
        """Places for panels, as `Figure.add_gridspec` gives them."""
        return self.figure.add_gridspec(
            rows, columns, left=self.left, right=self.right, top=self.top, bottom=self.bottom, **layout
        )


def wrapped(text: str, *, size: float, weight: str = "normal", wide: float = WIDTH - 2 * _MARGIN) -> list[str]:
    """Text in lines that fit, by the widths of the letters.

    Args:
        text: What to write.
        size: Size of the font in points.
        weight: ``"normal"`` or ``"bold"``.
        wide: Room in inches.

    Returns:
        At least one line.

    Example:
        >>> wrapped("ever so many words", size=10, wide=1.0)
        ['ever so', 'many words']
    """
    with matplotlib.rc_context(_RULES):
        font = get_font(findfont(FontProperties(weight=weight)))
    font.set_size(size, 72)
    lines = [""]
    for word in text.split(" "):  # and not at no-break spaces, which join numbers and units
        longer = f"{lines[-1]} {word}".lstrip()
        font.set_text(longer, 0)
        if font.get_width_height()[0] / 64 > 72 * wide and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def balanced(text: str, *, size: float, weight: str) -> list[str]:
    """As few lines as `wrapped` needs, of about equal length, so that no word stands alone in the last one."""
    lines = wrapped(text, size=size, weight=weight)
    wide = WIDTH - 2 * _MARGIN
    for share in (0.55, 0.65, 0.75, 0.85):
        narrow = wrapped(text, size=size, weight=weight, wide=share * wide)
        if len(narrow) == len(lines):
            return narrow
    return lines


def epoch_axis(axes: Axes, count: int, *, label: bool = True) -> None:
    """Epochs from 1 to `count`, with whole numbers as ticks."""
    axes.set_xlim(0.5, count + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    if label:
        axes.set_xlabel("epoch")


def percent_axis(axes: Axes, *, which: str = "y", highest: float = 1.0) -> None:
    """An axis of shares in [0, 1], written in percent, from 0.

    Args:
        axes: Whose axis.
        which: ``"x"`` or ``"y"``.
        highest: Its upper end. Above 1, the rest is room for a legend and has no ticks.
    """
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    whole = [k / 5 for k in range(6)]
    axis.set_major_locator(FixedLocator(whole) if highest > 1 else MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    (axes.set_ylim if which == "y" else axes.set_xlim)(0, highest)


def above(highest: float, rows: int) -> float:
    """Upper end of an axis that leaves room for a legend of some rows above values up to `highest`.

    Example:
        >>> above(0.5, 0) < above(0.5, 3) < 1
        True
    """
    return 1.06 * highest / (1 - 0.065 * rows)


def lighter(colour: str, share: float) -> tuple[float, float, float]:
    """A colour mixed with white; `share` of 1 is white.

    Example:
        >>> lighter("#000000", 0.5)
        (0.5, 0.5, 0.5)
    """
    red, green, blue = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return (red + (1 - red) * share, green + (1 - green) * share, blue + (1 - blue) * share)


def colours(names: Sequence[str]) -> list[str]:
    """A colour for each name: its own for the methods that have one, the first that is left for all others.

    Args:
        names: Names of runs or results; what follows a comma or a bracket (``"SPAT, best"``) is not looked at.

    Returns:
        ``#RRGGBB``, different from one another for up to 7 names.

    Example:
        >>> colours(["MART", "TRADES, best"]) == [RUNS[0], RUNS[2]]
        True
        >>> len(set(colours(["TRADES (best)", "TRADES (last)"])))
        2
    """
    found: dict[int, str] = {}
    for place, name in enumerate(names):
        own = _OWN.get(name.split(",")[0].split(" (")[0].strip())
        if own is not None and RUNS[own] not in found.values():
            found[place] = RUNS[own]
    others = iter([colour for colour in RUNS if colour not in found.values()])
    for place in range(len(names)):
        if place not in found:
            found[place] = next(others, RUNS[place % len(RUNS)])
    return [found[place] for place in range(len(names))]


def headings(figure: Figure) -> tuple[str, str, str]:
    """Title, subtitle and sources of a figure as text, each on one line; empty where it has none.

    Example:
        >>> headings(Sheet(1.0, title="What", subtitle="How to read it.", footer=["Whence"]).figure)
        ('What', 'How to read it.', 'Whence')
    """
    parts = {str(text.get_gid()): text.get_text() for text in figure.texts}
    told = [str(text.get_label()) for text in figure.texts if text.get_gid() == "sources"]
    title, subtitle = (" ".join(text.split("\n")) for text in (figure.get_suptitle(), parts.get("subtitle", "")))
    return title, subtitle, "".join(told)


def png(figure: Figure, *, dpi: int = DPI) -> bytes:
    """The figure as a PNG file, with its title as description for those who cannot see it.

    Drawings are written with a palette of 256 colours, a third of the size, in which areas keep their colours exactly;
    photographs keep all of theirs.
    """
    buffer = io.BytesIO()
    about = {"Software": f"Instar {instar.__version__}", "Description": figure.get_suptitle().replace("\n", " ")}
    with matplotlib.rc_context(_RULES):
        figure.savefig(buffer, format="png", dpi=dpi, metadata=about)
    pictures = [image.get_array() for axes in figure.axes for image in axes.images]
    if any(pixels is not None and pixels.ndim == 3 for pixels in pictures):
        return buffer.getvalue()
    words = PngInfo()
    for name, text in about.items():
        words.add_text(name, text)
    small = io.BytesIO()
    with Image.open(buffer) as drawn:
        flat = _with_palette(np.asarray(drawn.convert("RGB")))
    flat.save(small, format="png", optimize=True, dpi=(dpi, dpi), pnginfo=words)
    return small.getvalue()


def _with_palette(pixels: np.ndarray) -> Image.Image:
    """A drawing (H, W, 3), uint8, in 256 colours: those of areas as they are, those of their edges by the nearest.

    A palette by population alone would give most places to shades of grey at the edges of text, and merge the colours
    of small dots.
    """
    codes = pixels.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    found, place, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.uint8)
    tones = colours.astype(np.float64)
    kept = list(np.argsort(-counts.astype(np.int64), kind="stable")[:_AREAS])
    away = np.full(len(tones), np.inf)
    for number in kept:
        away = np.minimum(away, ((tones - tones[number]) ** 2).sum(1))
    while len(kept) < 256 and away.max() > 0:  # then always the one that is farthest from all that are there
        kept.append(int(away.argmax()))
        away = np.minimum(away, ((tones - tones[kept[-1]]) ** 2).sum(1))
    nearest = ((tones[kept] ** 2).sum(1) - 2 * tones @ tones[kept].T).argmin(1)
    flat = Image.fromarray(nearest.astype(np.uint8)[place.ravel()].reshape(codes.shape))
    flat.putpalette(colours[kept].tobytes())
    return flat


def write_png(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG of 150 dpi, whole or not at all; the folder is made if need be.

    Raises:
        UserError: The disk is full or read-only.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent}: {error.strerror or error}") from None
    write_atomically(path, png(figure))
    return path
