"""``instar evaluate RUN_OR_WEIGHTS``."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from instar.cli.arguments import expression, parse, parser
from instar.errors import UserError
from instar.evaluate import SUITES, Pace, evaluate, table
from instar.evaluate import Progress as ProgressCallback

DESCRIPTION = """Measure how robust a model is, and write a record with everything the number depends on.

TARGET is a run's folder, or a file of weights: ours (.safetensors beside its .json card), or a state dict from
elsewhere, which needs --model and --data. Killed at any moment, the same command goes on where it stopped."""


def run(words: Sequence[str]) -> int:
    """Evaluate and print the table.

    Raises:
        UserError: A mistake in the arguments, or a model or data set that cannot be evaluated.
    """
    words = list(words)
    if words and not words[0].startswith("-"):
        words[:1] = ["--target", words[0]]
    made = parser("evaluate", DESCRIPTION)
    made.add_argument("--config", action="config", help="YAML file with any of these settings")
    made.add_argument("--target", type=str, help="run or weights, if it is not the first word")
    made.add_argument("--suite", type=str, default="standard", help=f"one of {', '.join(SUITES)}")
    how = "number of test images: the first in official order, or evenly spread if it is sorted by class"
    made.add_argument("--n", type=int, default=None, help=how)
    made.add_argument("--checkpoint", type=str, default="both", help="of a run: both, best or last")
    made.add_argument("--data", type=str, default=None, help="data set; a run and a card know their own")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in")
    made.add_argument("--size", type=int, default=None, help="height and width of decoded pictures")
    made.add_argument("--model", type=str, default=None, help="network of a foreign state dict")
    made.add_argument("--width", type=int, default=None, help="channels of that network's first stage")
    made.add_argument("--normalize", type=str, default="identity", help="of a foreign state dict: identity or dataset")
    made.add_argument("--norm", type=str, default=None, help="Linf, L2 or L1; default: what the model was trained for")
    made.add_argument("--eps", type=expression, default=None, help="radius, as 8/255; default: as trained")
    made.add_argument("--seed", type=int, default=0, help="seed of random starts and of AutoAttack")
    made.add_argument("--batch_size", type=int, default=None, help="images in one forward pass")
    made.add_argument("--device", type=str, default="auto", help="cpu, cuda or auto")
    made.add_argument("--out", type=str, default=None, help="folder of the record; default: RUN/evaluations")
    given = parse(made, words)
    if not given.target:
        raise UserError("evaluate what? instar evaluate RUN_OR_WEIGHTS ...")
    console = Console(soft_wrap=not sys.stdout.isatty())
    with _progress(console) as progress:
        records = evaluate(
            given.target,
            data=given.data,
            root=given.root,
            size=given.size,
            model=given.model,
            model_arguments={"width": given.width} if given.width else None,
            suite=given.suite,
            n=given.n,
            checkpoint=given.checkpoint,
            norm=given.norm,
            eps=given.eps,
            seed=given.seed,
            batch_size=given.batch_size,
            device=given.device,
            out=given.out,
            progress=progress,
            normalize=given.normalize,
        )
    if console.is_terminal:
        console.print(table.render(records))
    else:
        print(table.plain(records), end="")
    for record in records:
        if record.path is not None:
            print(f"{record.checkpoint}: {_nearest(record.path)}")
    return 0


def _nearest(path: Path) -> Path:
    """The path as a user would type it from here."""
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path


class _Lines:
    """Progress as plain lines: one when an attack is complete, and one a minute."""

    def __init__(self) -> None:
        self._pace, self._last = Pace(), ""
        self._wrote = time.monotonic()

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        line, now = self._pace(attack, done, total, robust), time.monotonic()
        if line == self._last or (done < total and now - self._wrote < 60):
            return
        self._last = line
        self._wrote = now
        print(f"  {line}", flush=True)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[ProgressCallback]:
    if not console.is_terminal:
        yield _Lines()
        return
    bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
    task, pace = bar.add_task(""), Pace()

    def show(attack: str, done: int, total: int, robust: int) -> None:
        bar.update(task, total=total, completed=done, description=pace(attack, done, total, robust))

    with bar:
        yield show
