"""``instar data list | get | check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from instar.cli.arguments import parse, parser, pointed
from instar.data import default_root, info, load, names
from instar.data.check import check, contact_sheet
from instar.data.get import get
from instar.errors import UserError, unknown
from instar.expression import number

USAGE = """\
usage: instar data list
       instar data get NAME [--root FOLDER] [--via auto|npm|torchvision]
       instar data check NAME [--root FOLDER] [--size PIXELS] [--sheet FILE.png]

Data sets lie in --root, else in the folder that INSTAR_DATA names, else in a cache folder. NAME of `check` may be the
path of an image folder."""


def run(words: Sequence[str]) -> int:
    """List, download or check data sets.

    Raises:
        UserError: A mistake in the arguments, or data that are missing or damaged.
    """
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    actions = {"list": _list, "get": _get, "check": _check}
    if words[0] not in actions:
        raise unknown("action of instar data", words[0], actions)
    return actions[words[0]](list(words[1:]))


def _list(words: list[str]) -> int:
    if words:
        raise UserError(f"instar data list takes no arguments; got {' '.join(words)}")
    print(f"{'name':<15} {'images':>15}  {'shape':<12} {'classes':>7}  threat model")
    for name in names():
        known = info(name)
        shape = "×".join(map(str, known.shape))
        threat = f"{known.norm} {number(known.eps)}, PGD-{known.steps} with steps of {number(known.step_size)}"
        count = f"{known.train_size:,}+{known.test_size:,}"
        print(f"{name:<15} {count:>15}  {shape:<12} {len(known.classes):>7}  {threat}")
    print(f"\nany folder of images works too, by its path. Data sets lie in {default_root()}")
    return 0


def _parsed(action: str, made: ArgumentParser, words: list[str]) -> Namespace:
    given = parse(made, pointed(made, words, "--name"))
    if not given.name:
        raise UserError(f"which data set? instar data {action} NAME, with one of {', '.join(names())}")
    return given


def _get(words: list[str]) -> int:
    made = parser("data get", "Download a data set, checked and complete.")
    made.add_argument("--name", type=str, default=None, help="the data set, if no word stands for it")
    made.add_argument("--root", type=str, default=None, help="folder to put it into (default: INSTAR_DATA, or a cache)")
    made.add_argument("--via", type=str, default="auto", help="npm, torchvision, or auto: what is there")
    made.add_argument("--size", type=int, default=None, help="height and width of decoded pictures")
    given = _parsed("get", made, words)
    print(f"{given.name} lies in {get(given.name, given.root, via=given.via, size=given.size)}")
    return 0


def _check(words: list[str]) -> int:
    made = parser("data check", "Count, compare checksums and statistics, and draw a contact sheet.")
    made.add_argument("--name", type=str, default=None, help="data set or image folder, if no word stands for it")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in")
    made.add_argument("--size", type=int, default=None, help="height and width of decoded pictures")
    made.add_argument("--sheet", type=str, default=None, help="file of the contact sheet (default: NAME.png)")
    given = _parsed("check", made, words)
    report = check(given.name, given.root, size=given.size)
    print(f"{report.info.title} ({report.form}) in {report.place}")
    for part in report.splits:
        counts = ", ".join(f"{name} {count:,}" for name, count in zip(report.info.classes, part.per_class, strict=True))
        mean, std = (", ".join(f"{number:.4f}" for number in numbers) for numbers in (part.mean, part.std))
        print(f"  {part.split}: {part.count:,} images; mean {mean}; std {std}\n    {counts}")
    for line in (*(f"note: {note}" for note in report.notes), *(f"PROBLEM: {problem}" for problem in report.problems)):
        print(f"  {line}")
    sheet = Path(given.sheet or f"{Path(given.name).name}.png")
    try:
        contact_sheet(load(given.name, root=given.root, size=given.size), sheet)
        print(f"  contact sheet: {sheet}")
    except UserError as error:
        if report.ok:
            raise
        print(f"  no contact sheet: {error}")
    print("all is well" if report.ok else "something is wrong")
    return 0 if report.ok else 1
