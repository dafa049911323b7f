"""``instar compare A B [C ...]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from instar.cli.arguments import divided, parse, parser
from instar.compare import Comparison, compare
from instar.compare.render import render
from instar.errors import UserError, unknown
from instar.storage import write_atomically

DESCRIPTION = """Compare evaluations image by image, and say what could be chance.

Each of A, B, ... is a run's folder, a folder of records, or a record's .json; NAME=PATH gives it a name in tables. All
are compared with the first. Runs that differ in nothing but the seed become one row, mean ± standard deviation.
Evaluations under different threat models or on different images are refused, unless --common asks for what they
share."""
FORMATS = {"text": ".txt", "md": ".md", "tex": ".tex", "json": ".json"}


def run(words: Sequence[str]) -> int:
    """Compare and print, or write a file.

    Raises:
        UserError: A mistake in the arguments, or evaluations that cannot be compared.
    """
    made = parser("compare", DESCRIPTION)
    made.usage = "instar compare A B [C ...] [--column NAME] [--format text|md|tex|json] [--out FILE] [--common]"
    column = "what differences and classes are about, for example autoattack (default: the worst case)"
    made.add_argument("--column", type=str, default=None, help=column)
    made.add_argument("--common", action="store_true", help="compare what different protocols share")
    made.add_argument("--against", type=str, default="first", help="first, or all: every pair")
    made.add_argument("--suite", type=str, default=None, help="only records of this suite")
    made.add_argument("--checkpoint", type=str, default=None, help="best or last (default: best if all have it)")
    made.add_argument("--format", type=str, default=None, help="text, md, tex or json (default: from --out's ending)")
    made.add_argument("--out", type=str, default=None, help="file to write instead of printing")
    targets, flags = divided(made, words)
    given = parse(made, flags)
    form = _format(given.format, given.out)
    found = compare(
        targets,
        column=given.column,
        common=given.common,
        against=given.against,
        suite=given.suite,
        checkpoint=given.checkpoint,
    )
    if given.out is not None:
        path = Path(given.out).expanduser()
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")
        write_atomically(path, _text(found, form).encode())
        print(path)
    elif form == "text" and sys.stdout.isatty():
        Console().print(render(found))
    else:
        print(_text(found, form), end="")
    return 0


def _format(wish: str | None, out: str | None) -> str:
    """The format that is asked for, or that the file's name means."""
    if wish is None:
        endings = {ending: form for form, ending in FORMATS.items()}
        return "text" if out is None else endings.get(Path(out).suffix.lower(), "text")
    if wish not in FORMATS:
        raise unknown("format", wish, FORMATS)
    return wish


def _text(found: Comparison, form: str) -> str:
    return {"text": found.to_text, "md": found.to_markdown, "tex": found.to_latex, "json": found.to_json}[form]()
