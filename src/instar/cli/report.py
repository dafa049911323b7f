"""``instar report RUN [RUN ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from instar.cli.arguments import parse, parser
from instar.errors import UserError
from instar.report import compare_pictures, read, write_pictures

DESCRIPTION = """Draw pictures of runs from their files; a run may still be going on.

Each run gets learning curves, how many attack steps its training images survive, how unevenly the loss lies on them,
the hardest and easiest of them, and its evaluations: into RUN/pictures, or into --out. Several runs are also drawn side
by side, into the folder comparison beside the first one, or into --out, which then gets a folder for each run too."""


def run(words: Sequence[str]) -> int:
    """Write the pictures and print where they lie.

    Raises:
        UserError: No run is named, a folder holds none, or a file is damaged.
    """
    folders, flags = _split(words)
    made = parser("report", DESCRIPTION)
    made.usage = "instar report RUN [RUN ...] [--out FOLDER] [--root FOLDER]"
    made.add_argument("--out", type=str, default=None, help="folder for the pictures")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in (default: the run's)")
    given = parse(made, flags)
    if not folders:
        raise UserError("which run? instar report RUN [RUN ...], with folders that instar train --out has written")
    runs = [read(folder) for folder in folders]  # before any is drawn: a wrong name is said at once
    out = None if given.out is None else Path(given.out)
    taken: set[str] = set()
    for number, stored in enumerate(runs, start=1):
        name = stored.folder.resolve().name
        name = f"{name}-{number}" if name in taken else name
        taken.add(name)
        into = out / name if out is not None and len(runs) > 1 else out
        _show(write_pictures(stored, out=into, root=given.root))
    if len(runs) > 1:
        _show(compare_pictures(runs, runs[0].folder.resolve().parent / "comparison" if out is None else out))
    return 0


def _show(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path, flush=True)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Run folders, which stand in any place, and flags with their values."""
    folders: list[str] = []
    flags: list[str] = []
    waiting = False
    for word in words:
        if waiting or word.startswith("-"):
            waiting = word in ("--out", "--root") and not waiting
            flags.append(word)
        else:
            folders.append(word)
    return folders, flags
