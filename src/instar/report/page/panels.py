"""Figures as inline SVG: their words become text of the page, their panels flow, their colours follow the theme."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from instar.report.page.colours import darkened_pixels, themed
from instar.report.style import headings
from instar.report.wording import percent, significant

_MOST_PANELS = 6
_MOST_DESCRIBED = 6
_PAD = 0.06
_DECIMALS = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_GREYS = ("gray", "grey", "gray_r", "grey_r", "binary", "binary_r", "Greys", "Greys_r")
# Typed loosely, because the type of rules differs between versions of matplotlib.
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "instar"}
_TITLES = ("subtitle", "sources")
_COLOURED = ("style", "fill", "stroke", "stop-color")


@dataclass(frozen=True)
class Panel:
    """One piece of a figure.

    Attributes:
        svg: Inline SVG without words of the figure's frame.
        width: Natural width in inches.
        height: Natural height in inches.
        alt: What it shows, for those who cannot see it.
        row: Which row of the figure it stands in, from the top.
    """

    svg: str
    width: float
    height: float
    alt: str
    row: int = 0


def panels(figure: Figure, *, prefix: str) -> list[Panel]:
    """The panels of a figure as separate inline SVGs, so that a narrow screen can stack them.

    Title, subtitle and sources are left out: `instar.report.style.headings` gives them as text. Panels that overlap
    stay together, as do those of a figure with words or legends of its own beside its panels.

    Args:
        figure: The figure. It is drawn, and left as it was.
        prefix: Begins every id in the SVG; must be unique on a page.

    Returns:
        At least one panel, in the order of the figure's axes.
    """
    title, *_ = headings(figure)
    if not isinstance(figure.canvas, FigureCanvasAgg):
        FigureCanvasAgg(figure)  # a figure that was made without a window has none that can measure text
    with _without_frame(figure):
        groups, boxes = _groups(figure)
        made = []
        rows = _row_of(boxes)
        for number, (members, box) in enumerate(zip(groups, boxes, strict=True)):
            with _only(figure, members):
                drawn = _svg(figure, box)
            told = [text for axes in members if (text := described(axes))]
            alt = " ".join(dict.fromkeys([*told, title])) or "figure"
            svg = inlined(drawn, prefix=f"{prefix}-{number}-", alt=alt, maps=not any(map(_holds_photographs, members)))
            made.append(Panel(svg, float(box.width), float(box.height), alt, rows[number]))
    return made


def _row_of(boxes: Sequence[Bbox]) -> list[int]:
    """The row of each panel: panels whose middles lie beside one another share one.

    Example:
        >>> _row_of([Bbox([[0, 2], [1, 4]]), Bbox([[0, 0], [1, 1]]), Bbox([[2, 2.5], [3, 4]])])
        [0, 1, 0]
    """
    tops: list[Bbox] = []
    found = [0] * len(boxes)
    for number in sorted(range(len(boxes)), key=lambda k: -float(boxes[k].y1)):
        middle = float(boxes[number].y0 + boxes[number].y1) / 2
        row = next((k for k, other in enumerate(tops) if other.y0 <= middle <= other.y1), len(tops))
        if row == len(tops):
            tops.append(boxes[number])
        found[number] = row
    return found


def standalone(figure: Figure) -> bytes:
    """The whole figure as an SVG file, with its title as description."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(buffer, format="svg", metadata={"Title": headings(figure)[0], "Date": None})
    return buffer.getvalue()


def described(axes: Axes) -> str:
    """The title of a panel and the ends of its named lines or the heights of its named bars.

    Example:
        >>> axes = Figure().add_subplot()
        >>> _ = axes.set_title("Accuracy"), axes.plot([1, 2], [0.5, 0.25], gid="TRADES")
        >>> described(axes)
        'Accuracy. TRADES: from 0.5 to 0.25.'
    """

    def said(value: float) -> str:
        return percent(value) if isinstance(axes.yaxis.get_major_formatter(), PercentFormatter) else significant(value)

    title = axes.get_title(loc="left") or axes.get_title() or axes.get_title(loc="right")
    facts = []
    for line in axes.lines:
        name, heights = line.get_gid(), np.asarray(line.get_ydata(), dtype=float)
        rising = bool((np.diff(np.asarray(line.get_xdata(), dtype=float)) > 0).all())
        if name and len(heights) > 1 and rising and line.get_linestyle() != "None" and "interval" not in str(name):
            facts.append(f"{name}: from {said(float(heights[0]))} to {said(float(heights[-1]))}")
    facts += [f"{bar.get_gid()}: {said(float(bar.get_height()))}" for bar in axes.patches if _is_bar(bar)]  # type: ignore[attr-defined]
    shown = facts[:_MOST_DESCRIBED]
    more = [f"{len(facts) - len(shown)} more"] if len(facts) > len(shown) else []
    return ". ".join(part.rstrip(".") for part in [title, "; ".join(shown + more)] if part) + "." * bool(title or facts)


def _is_bar(patch: object) -> bool:
    gid = getattr(patch, "get_gid", lambda: None)()
    return bool(gid) and ":" in str(gid) and hasattr(patch, "get_height")


@contextlib.contextmanager
def _without_frame(figure: Figure) -> Iterator[None]:
    title = getattr(figure, "_suptitle", None)
    hidden = [text for text in figure.texts if text is title or text.get_gid() in _TITLES]
    hidden = [text for text in hidden if text.get_visible()]
    for text in hidden:
        text.set_visible(False)
    try:
        yield
    finally:
        for text in hidden:
            text.set_visible(True)


@contextlib.contextmanager
def _only(figure: Figure, members: Sequence[Axes]) -> Iterator[None]:
    hidden = [axes for axes in figure.axes if axes not in members and axes.get_visible()]
    for axes in hidden:
        axes.set_visible(False)
    try:
        yield
    finally:
        for axes in hidden:
            axes.set_visible(True)


def _groups(figure: Figure) -> tuple[list[list[Axes]], list[Bbox]]:
    """Axes that must be drawn together, and the place of each group in inches."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # it is Agg's
    inches = figure.dpi_scale_trans.inverted()
    found: list[tuple[list[Axes], Bbox]] = []
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        if box is None or not axes.get_visible():
            continue
        members, place = [axes], box.transformed(inches)
        # A colour bar explains the panel that it stands beside.
        if axes.get_label() == "<colorbar>" and found:
            before, other = found.pop()
            members, place = [*before, axes], Bbox.union([other, place])
        while touching := [entry for entry in found if Bbox.intersection(entry[1], place) is not None]:
            for entry in touching:
                found.remove(entry)
                members, place = [*entry[0], *members], Bbox.union([entry[1], place])
        found.append((members, place))
    loose = any(text.get_visible() for text in figure.texts) or bool(figure.legends) or bool(figure.subfigs)
    if loose or not found or len(found) > _MOST_PANELS:
        tight = figure.get_tightbbox(renderer)
        found = [(list(figure.axes), tight)]
    order = {axes: number for number, axes in enumerate(figure.axes)}
    found.sort(key=lambda entry: min((order[axes] for axes in entry[0]), default=0))
    return [members for members, _ in found], [box.padded(_PAD) for _, box in found]


def _svg(figure: Figure, box: Bbox) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(buffer, format="svg", bbox_inches=box, transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def inlined(drawn: bytes, *, prefix: str, alt: str, maps: bool = True) -> str:
    """SVG that matplotlib wrote, made fit for a page: own ids, the page's fonts, colours as variables, words for alt.

    Args:
        drawn: The SVG file.
        prefix: Begins every id.
        alt: What the picture shows.
        maps: Whether raster images in it are coloured numbers, which need the colours of the theme, and not
            photographs.

    Returns:
        An ``<svg>`` element in which all text is escaped.
    """
    root = ET.fromstring(drawn)
    for parent in list(root.iter()):
        for child in list(parent):
            if _bare(child.tag) in ("metadata", "style", "title"):
                parent.remove(child)
    wanted = {name for element in root.iter() for text in element.attrib.values() for name in _references(text)}
    renamed = {name: f"{prefix}{number}" for number, name in enumerate(sorted(wanted))}
    for element in root.iter():
        element.tag = _bare(element.tag)
        old = dict(element.attrib)
        element.attrib.clear()
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        element.tail = None if not (element.tail or "").strip() else element.tail
        for key, text in old.items():
            name = _bare(key)
            if name == "id":
                if text in renamed:
                    element.set("id", renamed[text])
                continue
            text = re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{renamed[found[1]]})", text)
            if name == "href" and text.startswith("#"):
                text = f"#{renamed[text[1:]]}"
            if name in ("d", "x", "y", "transform", "x1", "x2", "y1", "y2", "width", "height"):
                text = _shortened(" ".join(text.split()))
            if name in _COLOURED:
                text = themed(_own_font(text))
            element.set(name, text)
    if maps:
        _theme_rasters(root)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("role", "img")
    root.set("aria-label", alt)
    # What matplotlib says in a style sheet would hold for the whole page.
    root.set("stroke-linejoin", "round")
    root.set("stroke-linecap", "butt")
    root.set("fill", themed("#000000"))  # which matplotlib leaves out, being the default
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def _shortened(text: str) -> str:
    """Coordinates to two decimals: a hundredth of a point is less than any screen or printer shows.

    Example:
        >>> _shortened("M 36.123456 200.5 L 1.999999 -0.001 z"), _shortened("matrix(0.01234 0 0 1 2 3)")
        ('M 36.12 200.5 L 2 0 z', 'matrix(0.01234 0 0 1 2 3)')
    """
    if "scale" in text or "matrix" in text:
        return text
    return _DECIMALS.sub(lambda found: f"{round(float(found[0]), 2) + 0.0:g}", text)


def _holds_photographs(axes: Axes) -> bool:
    """Whether images in a panel show things, and not numbers as colours."""
    return any(
        getattr(image.get_array(), "ndim", 2) == 3 or image.get_cmap().name in _GREYS  # (H, W, 3), or one channel
        for image in axes.images
    )


def _theme_rasters(root: ET.Element) -> None:
    """Beside every raster image, the same in the colours of the dark page."""
    for parent in list(root.iter()):
        for place, child in reversed(list(enumerate(parent))):
            kind, _, data = child.get("href", "").partition("base64,")
            if child.tag != "image" or kind != "data:image/png;":
                continue
            with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
                pixels = np.asarray(opened.convert("RGBA")).copy()
            colours, which = np.unique(pixels[..., :3].reshape(-1, 3), axis=0, return_inverse=True)
            pixels[..., :3] = darkened_pixels(colours)[which.ravel()].reshape(pixels[..., :3].shape)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="png", optimize=True)
            dark = copy.deepcopy(child)
            dark.set("href", "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
            child.set("class", "on-light")
            dark.set("class", "on-dark")
            dark.attrib.pop("id", None)
            parent.insert(place + 1, dark)


def _bare(name: str) -> str:
    return name.rpartition("}")[2]


def _references(text: str) -> list[str]:
    return re.findall(r"url\(#([^)]+)\)", text) + ([text[1:]] if text.startswith("#") else [])


def _own_font(style: str) -> str:
    """The page's font instead of matplotlib's."""
    style = re.sub(r"(font:[^;]*?[\d.]+px)[^;]*", r"\1 var(--sans,sans-serif)", style)
    return re.sub(r"font-family:[^;]*", "font-family: var(--sans,sans-serif)", style)
