"""The page as one file, and its figures and numbers as files beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from instar.errors import UserError
from instar.evaluate.shards import make_folder
from instar.report.page.assemble import build
from instar.report.page.atlas import Atlas
from instar.report.page.colours import dark_rules, themed, used
from instar.report.page.numbers import has_parquet
from instar.report.page.panels import standalone
from instar.report.page.views import Page
from instar.report.stored import StoredRun
from instar.report.style import RUNS, write_png
from instar.storage import write_atomically

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("instar.report.page"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

LIMIT = 14_000_000
"""Bytes that a page may take; mail and chat services commonly refuse more than 15 to 25 MB."""
_MANY = 5_000


def write_page(
    runs: Sequence[str | Path | StoredRun],
    out: str | Path,
    *,
    root: str | Path | None = None,
    examples: int = 200,
    figures: str | Path | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write everything that is known about some runs as one HTML file that needs nothing else, and no network.

    What does not exist (an evaluation, the data set, the weights) is left out, and the page says so. A damaged file
    costs its own part of the page; the page is written before the error is raised.

    Args:
        runs: Run folders, which may still be running; seven at most.
        out: The file, ``*.html``; its folder is made if need be.
        root: Folder that data sets lie in; None takes each run's, else the default one.
        examples: How many test images are attacked for galleries and confusions under attack; 0 leaves both out.
        figures: Folder for every figure as PNG and SVG and all numbers as CSV, and as Parquet if pyarrow is installed;
            None for none.
        note: Called with a line where something takes a while or is left out.

    Returns:
        The files, the page first.

    Raises:
        UserError: A folder holds no run or nothing to show yet, there are too many runs, a file is damaged, or the disk
            is full or read-only.
    """
    page, failed = build(runs, root=root, examples=examples, note=note)
    path = Path(out).expanduser()
    make_folder(path.parent)
    write_atomically(path, render(page, note=note).encode())
    written = [path]
    if figures is not None:
        written += write_figures(page, Path(figures).expanduser(), note=note)
    if failed:
        others = {str(error) for error in failed[1:]} - {str(failed[0])}
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{failed[0]}{more}; the rest is in {path}")
    return written


def render(page: Page, *, limit: int = LIMIT, note: Callable[[str], None] = lambda line: None) -> str:
    """The page as HTML.

    All that comes from runs (names of classes, files and methods) is escaped. The only script is the page's own, and
    the page forbids any other by its hash, and any request to anywhere.

    Args:
        page: What to show.
        limit: Bytes that the page may take; thumbnails get what the rest leaves.
        note: Called with a line where packing thumbnails takes a while.

    Returns:
        The whole document.
    """
    rest = len(_filled(page, {}).encode())
    room = max(limit - rest, limit // 10) * 3 // 4  # base64 writes three bytes as four
    shown = {table.key: len(table.positions) for table in page.tables if table.images is not None}
    made = {}
    for table in page.tables:
        if table.key in shown:
            if shown[table.key] > _MANY:
                note(f"packing {shown[table.key]:,} thumbnails")
            made[table.key] = table.thumbnails(room * shown[table.key] // sum(shown.values()))
    return _filled(page, {key: found for key, found in made.items() if found is not None})


def _filled(page: Page, atlases: Mapping[str, Atlas]) -> str:
    script, style = (_TEMPLATES.loader.get_source(_TEMPLATES, name)[0] for name in ("page.js", "page.css"))  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = [panel.svg for shown in page.pictures for panel in shown.panels]
    dark = dark_rules(used([*drawn, *map(themed, RUNS), themed("#000000")]))
    return _TEMPLATES.get_template("page.html").render(
        page=page,
        payloads=[table.payload | {"atlas": _layout(atlases.get(table.key))} for table in page.tables],
        atlases=atlases,
        script=script,
        style=style,
        dark=dark,
        policy=f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        themed=themed,
        payload=_payload,
    )


def _layout(atlas: Atlas | None) -> dict[str, Any] | None:
    return None if atlas is None else {"across": atlas.across, "kind": atlas.kind}


def _payload(content: Any) -> str:
    """JSON within a script element: nothing in it can end the element."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write_figures(page: Page, folder: Path, *, note: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Write every figure as PNG and SVG, and all numbers as CSV and, if pyarrow is installed, as Parquet.

    Args:
        page: The page they are on.
        folder: Where; it is made if need be. Files of the same names are replaced.
        note: Called with a line if Parquet cannot be written.

    Returns:
        The files.

    Raises:
        UserError: The disk is full or read-only.
    """
    make_folder(folder)
    parquet = has_parquet()
    if not parquet:
        note("no Parquet: it needs pyarrow (pip install pyarrow); the numbers are written as CSV")
    written = []
    for shown in page.pictures:
        written.append(write_png(shown.figure, folder / f"{shown.key}.png"))
        written.append(folder / f"{shown.key}.svg")
        write_atomically(written[-1], standalone(shown.figure))
    for table in page.numbers:
        written += table.write(folder, parquet=parquet)
    return written
