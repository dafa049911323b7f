"""``instar bench [RECIPE ...]``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

from instar.bench import CLOCKS, MAIN, OFFICIAL, SWITCHES, bench
from instar.cli.arguments import parse, parser
from instar.errors import UserError

DESCRIPTION = f"""How fast training steps are on this machine, in turns; a table, JSON and a picture.

`instar bench [RECIPE ...]` times each recipe (default: {", ".join(MAIN)}) and counts its passes, its memory and its
floating-point operations, beside the rate of plain matrix products in the same run. --baseline times the official style
of {", ".join(OFFICIAL)} as well. --without NAME adds a row for each recipe without one trick:
  {"; ".join(f"{name}: {what}" for name, what in SWITCHES.items())}."""


def run(words: Sequence[str]) -> int:
    """Time, print the table, and write it.

    Raises:
        UserError: A mistake in the arguments.
    """
    words = list(words)
    recipes = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    made = parser("bench", DESCRIPTION)
    made.add_argument("--baseline", action="store_true", help="time the official style as well")
    made.add_argument("--without", action="append", default=[], metavar="NAME", help="a row without one trick; or all")
    made.add_argument("--data", type=str, default="random", help="random images, or a data set (first batches of it)")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in")
    made.add_argument("--model", type=str, default="resnet18", help="network")
    made.add_argument(
        "--width", type=int, default=None, help="channels of its first stage; default: the published ones"
    )
    made.add_argument("--init", type=str, default=None, help="weights to begin from; attacks that stop early care")
    made.add_argument("--batch_size", type=int, default=128, help="instances in a step")
    made.add_argument("--steps", type=int, default=2, help="steps of each case in a turn")
    made.add_argument("--turns", type=int, default=5, help="turns that count; one before them warms up")
    made.add_argument("--precision", type=str, default="auto", help="bf16, float32 or auto")
    made.add_argument("--accelerate", type=str, default="none", help="none, compile, graphs, both or auto, as in train")
    made.add_argument("--at", type=float, default=1.0, help="where in the run schedules stand, from 0 to 1")
    made.add_argument("--clock", type=str, default="wall", help=f"{' or '.join(CLOCKS)}: cpu on a busy machine")
    made.add_argument("--no_memory", action="store_true", help="do not measure memory, which takes a process each")
    made.add_argument("--device", type=str, default="auto", help="cpu, cuda or auto")
    made.add_argument("--seed", type=int, default=0, help="seed of weights, images and attacks")
    made.add_argument("--out", type=str, default=None, help="folder for bench.md, bench.json and bench.png")
    given = parse(made, words[len(recipes) :])
    if given.precision not in ("auto", "bf16", "float32"):
        raise UserError(f"precision must be auto, bf16 or float32; got {given.precision!r}")
    if given.width is not None and given.width < 1:
        raise UserError(f"width must be at least 1; got {given.width}")
    without = list(SWITCHES) if "all" in given.without else given.without
    common = {name: getattr(given, name) for name in ("data", "root", "model", "width", "init", "batch_size")}
    common |= {name: getattr(given, name) for name in ("precision", "accelerate", "at", "device", "seed")}
    found = bench(
        recipes or MAIN,
        without=without,
        baseline=given.baseline,
        turns=given.turns,
        steps=given.steps,
        clock=given.clock,
        measure_memory=not given.no_memory,
        out=given.out,
        note=lambda line: print(line, file=sys.stderr),
        **common,
    )
    print(found.markdown(), end="")
    if given.out is not None:
        print(f"written to {given.out}", file=sys.stderr)
    return 0
