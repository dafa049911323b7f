"""``instar report RUN [RUN ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from instar.cli.arguments import divided, parse, parser
from instar.errors import UserError
from instar.evaluate.shards import make_folder
from instar.report import compare_pictures, read, write_pictures
from instar.report.page import write_page

DESCRIPTION = """Show what is known about runs, from their files; a run may still be going on.

Without --out, each run gets its pictures (RUN/pictures) and one HTML page with everything (RUN/report.html); several
runs are also put side by side, into the folder comparison beside the first one. --out page.html writes that page alone,
for all runs together; --out FOLDER writes the pictures alone, a folder for each of several runs."""


def run(words: Sequence[str]) -> int:
    """Write pages and pictures and print where they lie.

    Raises:
        UserError: No run is named, a folder holds none, or a file is damaged.
    """
    made = parser("report", DESCRIPTION)
    made.usage = (
        "instar report RUN [RUN ...] [--out PAGE.html | --out FOLDER] [--root FOLDER] [--examples N] [--figures FOLDER]"
    )
    made.add_argument("--out", type=str, default=None, help="the page (*.html), or a folder for pictures")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in (default: the run's)")
    made.add_argument(
        "--examples", type=int, default=200, help="test images to attack for the page's galleries; 0 leaves them out"
    )
    made.add_argument(
        "--figures",
        type=str,
        default=None,
        help="folder for the page's figures as PNG and SVG, its numbers as CSV and Parquet",
    )
    folders, flags = divided(made, words)
    given = parse(made, flags)
    if given.examples < 0:
        raise UserError(f"--examples must be a number of test images, 0 for none; got {given.examples}")
    if not folders:
        raise UserError("which run? instar report RUN [RUN ...], with folders that instar train --out has written")
    runs = [read(folder) for folder in folders]  # before any is drawn: a wrong name is said at once
    out = None if given.out is None else Path(given.out)
    page = out if out is not None and out.suffix.lower() in (".html", ".htm") else None
    if page is None and out is not None and given.figures is not None:
        raise UserError("--figures belongs to a page: give --out page.html, or no --out")
    if out is not None:
        make_folder(out if page is None else out.parent)  # before minutes of work, not after
    if page is None:
        taken: set[str] = set()
        for number, stored in enumerate(runs, start=1):
            name = stored.folder.resolve().name
            name = f"{name}-{number}" if name in taken else name
            taken.add(name)
            into = out / name if out is not None and len(runs) > 1 else out
            _show(write_pictures(stored, out=into, root=given.root))
        beside = runs[0].folder.resolve().parent / "comparison" if out is None else out
        if len(runs) > 1:
            _show(compare_pictures(runs, beside))
        if out is None:
            page = (beside if len(runs) > 1 else runs[0].folder) / "report.html"
    if page is not None:
        _show(write_page(runs, page, root=given.root, examples=given.examples, figures=given.figures, note=_note))
    return 0


def _show(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path, flush=True)


def _note(line: str) -> None:
    print(f"instar: note: {line}", file=sys.stderr, flush=True)
