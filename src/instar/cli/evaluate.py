"""``instar evaluate RUN_OR_WEIGHTS``."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from instar.cli import processes
from instar.cli.arguments import parse, parser, pointed, radius, width_of
from instar.errors import UserError
from instar.evaluate import SUITES, Pace, Record, Team, attacks_of, beyond, evaluate, robustbench, table
from instar.evaluate import Progress as ProgressCallback
from instar.evaluate.adaptive import with_surrogates
from instar.evaluate.corruptions import SEVERITIES
from instar.evaluate.finding import OVERESTIMATED
from instar.evaluate.progress import silent
from instar.evaluate.verdict import EXIT_STATUS

DESCRIPTION = """Measure how robust a model is, and write a record with everything the number depends on.

TARGET is a run's folder, or weights: ours (.safetensors beside their .json card), a state dict from elsewhere, which
needs --model and --data, or an ONNX model, which black-box attacks alone can judge. Killed at any moment, the same
command goes on where it stopped."""


def run(words: Sequence[str]) -> int:
    """Evaluate and print the table.

    Raises:
        UserError: A mistake in the arguments, or a model or data set that cannot be evaluated.
    """
    made = parser("evaluate", DESCRIPTION)
    made.add_argument("--config", action="config", help="YAML file with any of these settings")
    made.add_argument("--target", type=str, help="run or weights, if no word stands for it")
    names = f"one of {', '.join(SUITES)}; default: standard (black_box without gradients), or none with --attack"
    made.add_argument("--suite", type=str, default=None, help=names)
    more = "an attack as an expression, such as \"AutoAttack(Linf(8/255), version='plus')\"; may be given again"
    made.add_argument("--attack", type=str, action="append", default=None, help=more)
    how = "number of test images: the first in official order, or evenly spread if it is sorted by class"
    made.add_argument("--n", type=int, default=None, help=how)
    which = "of a run: both (best and last, the default), best, last, epoch_NNN, kept (every epoch_NNN), online "
    which += "(the weights that were trained, where those are averages) or all (the default of the suite adaptive)"
    made.add_argument("--checkpoint", type=str, default=None, help=which)
    made.add_argument("--data", type=str, default=None, help="data set; a run and a card know their own")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in")
    made.add_argument("--size", type=int, default=None, help="height and width of decoded pictures")
    made.add_argument("--model", type=str, default=None, help="network of a foreign state dict")
    made.add_argument("--width", type=int, default=None, help="channels of that network's first stage")
    layer = "of a foreign state dict: identity, dataset, auto (what fits best) or mean/std"
    made.add_argument("--normalize", type=str, default="identity", help=layer)
    made.add_argument("--norm", type=str, default=None, help="Linf, L2 or L1; default: what the model was trained for")
    made.add_argument("--eps", type=radius, default=None, help="radius, as 8/255; default: as trained")
    made.add_argument("--seed", type=int, default=0, help="seed of random starts and of AutoAttack")
    at_once = "images attacked at a time; default: 250, or what fits into memory"
    made.add_argument("--batch_size", type=int, default=None, help=at_once)
    made.add_argument("--shard_size", type=int, default=None, help="images between two saves; default: 500")
    search = "float32, or bf16: search in bfloat16 and confirm in float32"
    made.add_argument("--precision", type=str, default="float32", help=search)
    made.add_argument("--save_examples", action="store_true", help="also write the adversarial examples, in float32")
    several = "processes that share the work on this machine, or one for each GPU; torchrun does it on several machines"
    made.add_argument("--processes", type=int, default=1, help=several)
    made.add_argument("--device", type=str, default="auto", help="cpu, cuda or auto")
    made.add_argument("--out", type=str, default=None, help="folder of the record; default: RUN/evaluations")
    source = "run or weights that the suite adaptive also makes examples on; may be given again"
    made.add_argument("--surrogate", type=str, action="append", default=None, help=source)
    about = "field=text for RobustBench's entry, such as name='Title of the paper'; may be given again"
    made.add_argument("--about", type=str, action="append", default=None, help=about)
    made.add_argument("--trust", action="store_true", help="run a TorchScript program, which can run any code")
    strict = f"end with status {EXIT_STATUS} if a number is overestimated"
    made.add_argument("--strict", action="store_true", help=strict)
    given = parse(made, pointed(made, words))
    if not given.target:
        raise UserError("evaluate what? instar evaluate RUN_OR_WEIGHTS ...")
    processes.check(given.processes)
    about_model = robustbench.told(given.about or ())
    if about_model and given.suite != "robustbench":
        raise UserError("--about is for --suite robustbench, which alone writes an entry")
    team = Team.from_environment()
    if given.processes > 1 and team.alone:
        return processes.start(["evaluate", *words], processes=given.processes)
    try:
        records = _records(given, team)
    except UserError as error:
        if team.fail(error):
            raise
        return 2  # the process that stopped first has said why
    except KeyboardInterrupt as error:
        if team.fail(error):
            raise
        return 130
    except BaseException as error:
        team.fail(error)
        raise
    team.leave()
    return _show(records, given, about_model) if team.leads else 0


def _records(given: Namespace, team: Team) -> list[Record]:
    """Evaluate; only the first process has records."""
    suite: Any = None
    if given.suite is not None or given.surrogate:
        suite = with_surrogates(given.suite or "standard", surrogates=given.surrogate or ())
    if given.attack:
        suite = attacks_of(given.attack, suite=suite)
    console = Console(soft_wrap=not sys.stdout.isatty())
    with _progress(console) if team.leads else contextlib.nullcontext(silent) as progress:
        return evaluate(
            given.target,
            data=given.data,
            root=given.root,
            size=given.size,
            model=given.model,
            model_arguments=width_of(given),
            suite=suite,
            n=given.n,
            checkpoint=given.checkpoint,
            norm=given.norm,
            eps=given.eps,
            seed=given.seed,
            batch_size=given.batch_size,
            shard_size=given.shard_size,
            device=given.device,
            out=given.out,
            progress=progress,
            normalize=given.normalize,
            trust=given.trust,
            precision=given.precision,
            save_examples=given.save_examples,
            team=team,
        )


def _show(records: list[Record], given: Namespace, about_model: Any) -> int:
    """Print the table, and where the records lie."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    if console.is_terminal:
        console.print(table.render(records))
    else:
        print(table.plain(records), end="")
    for record in records:
        if record.path is not None:
            print(f"{record.checkpoint}: {_nearest(record.path)}")
            if record.suite == "robustbench":
                entry, text = robustbench.write(record, about_model)
                print(f"{record.checkpoint}: {_nearest(entry)}, {_nearest(text)}")
    overestimated = any(record.verdict.word == OVERESTIMATED for record in records)
    return EXIT_STATUS if given.strict and overestimated else 0


def _nearest(path: Path) -> Path:
    """The path as a user would type it from here."""
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path


class _Lines:
    """Progress as plain lines: one when an attack is complete (of corruptions the last severity), and one a minute."""

    def __init__(self) -> None:
        self._pace, self._last = Pace(), ""
        self._wrote = time.monotonic()

    def begin(self, checkpoint: str, titles: Mapping[str, str], plain: Collection[str]) -> None:
        self._pace.begin(checkpoint, titles, plain)

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        line, now = self._pace(attack, done, total, robust), time.monotonic()
        passing = done < total or (beyond.is_cell(attack) and not attack.endswith(f"_{SEVERITIES[-1]}"))
        if line == self._last or (passing and now - self._wrote < 60):
            return
        self._last = line
        self._wrote = now
        print(f"  {line}", flush=True)


class _Bar:
    """Progress as a bar that stays in its line."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._task, self._pace = bar, bar.add_task(""), Pace()

    def begin(self, checkpoint: str, titles: Mapping[str, str], plain: Collection[str]) -> None:
        self._pace.begin(checkpoint, titles, plain)

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        said = self._pace(attack, done, total, robust)
        self._bar.update(self._task, total=total, completed=done, description=said)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[ProgressCallback]:
    if not console.is_terminal:
        yield _Lines()
        return
    bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
    with bar:
        yield _Bar(bar)
