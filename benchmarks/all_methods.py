"""Train every recipe with the same budget, judge each with the same attacks, and write one table.

    python benchmarks/all_methods.py --out runs/all-methods
    python benchmarks/all_methods.py --data digits --width 8 --epochs 2 --n 50 --only pgd_at,spat --out runs/small

Each run is resumed where it stopped and nothing that is finished is done again, so the command can be repeated until
the table is complete. A run that fails has its reason in the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instar.data import info
from instar.errors import UserError
from instar.evaluate import Record, evaluate
from instar.interruption import Interrupted
from instar.methods import RECIPES
from instar.train import train

TEACHER = "pgd_at"
"""Whose best weights teach KD+SWA."""


def main(words: Sequence[str] | None = None) -> Path:
    """Work through the recipes and return the path of the table, which is written anew after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--model", default=None)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", default="development")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, separated by commas")
    given = parser.parse_args(words)
    names = given.only.split(",")
    given.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Record | str] = {}
    for name in sorted(names, key=lambda n: n == "kd_swa"):  # its teacher must be there
        try:
            rows[name] = _judged(name, given)
        except UserError as failed:
            rows[name] = str(failed)
        table = given.out / "table.md"
        table.write_text(_table([(n, rows[n]) for n in names if n in rows], given), encoding="utf-8")
    return table


def _judged(name: str, given: argparse.Namespace) -> Record:
    """The evaluation of the last weights of a recipe, trained if need be."""
    out = given.out / name
    settings: dict[str, Any] = {"model": given.model, "width": given.width, "epochs": given.epochs, "seed": given.seed}
    arguments = {}
    if name == "kd_swa":
        arguments["robust"] = str(given.out / TEACHER / "checkpoints" / "best.safetensors")
    started = (out / "run.json").exists()
    train(name, data=given.data, out=out, resume=started, arguments=arguments, **settings)
    usual = info(given.data)  # natural training knows no threat model
    threat = {"norm": usual.norm, "eps": usual.eps}
    (record,) = evaluate(out, suite=given.suite, n=given.n, checkpoint="last", **threat)
    return record


def _table(rows: Sequence[tuple[str, Record | str]], given: argparse.Namespace) -> str:
    """The table in Markdown, with its protocol."""
    records = [record for _, record in rows if isinstance(record, Record)]
    titles = {name: attack["title"] for record in records for name, attack in record.protocol["attacks"].items()}
    columns = {"clean": "clean", **titles, "worst_case": "worst case"}
    lines = [
        f"Last weights after {given.epochs} epochs on {given.data}, width {given.width}, seed {given.seed}; the first "
        f"{given.n} test images, suite {given.suite}; accuracy in % with 95 % Wilson intervals.",
        "",
        f"| recipe | {' | '.join(columns.values())} | findings |",
        f"| --- |{' ---: |' * len(columns)} --- |",
    ]
    for name, row in rows:
        if isinstance(row, str):
            lines.append(f"| {name} |{' – |' * len(columns)} {row} |")
            continue
        scores = [row.scores[column] for column in columns]
        cells = [f"{100 * s.accuracy:.1f} ({100 * s.interval[0]:.1f}–{100 * s.interval[1]:.1f})" for s in scores]
        findings = "; ".join(f"{f.check}: {f.verdict}" for f in row.findings if f.verdict != "normal")
        lines.append(f"| {name} | {' | '.join(cells)} | {findings or '–'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    try:
        print(main().read_text(encoding="utf-8"))
    except Interrupted as stopped:
        sys.exit(str(stopped))
