"""``instar analyse RUN [RUN ...]``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from instar.analyse import ANALYSES, Found, Missing, analyse
from instar.analyse.target import Tick
from instar.cli.arguments import divided, expression, parse, parser, radius, width_of
from instar.errors import UserError, unknown
from instar.evaluate.progress import spoken

DESCRIPTION = """Make the papers' diagnoses of your own models, as far as the files allow; results go to RUN/analyses.

RUN is a run's folder, or a file of weights with its card; several are also put side by side. A long analysis that is
interrupted goes on where it stopped when the command is given again. instar report shows what was found.

analyses:
"""
_EVERY = 60.0


def run(words: Sequence[str]) -> int:
    """Analyse and print what was found.

    Returns:
        0, or 1 if an analysis failed; one that lacks what it needs has not failed.

    Raises:
        UserError: A mistake in the arguments, or a path that is nothing to analyse.
    """
    listed = "\n".join(f"  {one.name:<14} {one.title}. Cost: {one.cost}" for one in ANALYSES.values())
    made = parser("analyse", DESCRIPTION + listed)
    made.usage = "instar analyse RUN [RUN ...] [flags]"
    made.add_argument("--only", type=str, default=None, help="names with commas between; default: all")
    made.add_argument("--n", type=expression, default=1000, help="images of each split, or all")
    made.add_argument("--split", type=str, default=None, help="train, test or both; default: what each analysis is for")
    made.add_argument(
        "--checkpoint", type=str, default="both", help="of a run: both, best, last, epoch_NNN, or kept: every epoch_NNN"
    )
    made.add_argument("--data", type=str, default=None, help="data set; a run and a card know their own")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in")
    made.add_argument("--model", type=str, default=None, help="network of a foreign state dict")
    made.add_argument("--width", type=int, default=None, help="channels of that network's first stage")
    made.add_argument("--normalize", type=str, default="identity", help="of a foreign state dict: identity or dataset")
    made.add_argument("--norm", type=str, default=None, help="Linf, L2 or L1; default: what the model was trained for")
    made.add_argument("--eps", type=radius, default=None, help="radius, as 8/255; default: as trained")
    made.add_argument("--seed", type=int, default=0, help="of all that is random")
    made.add_argument("--batch_size", type=int, default=None, help="images in one forward pass")
    made.add_argument("--device", type=str, default="auto", help="cpu, cuda or auto")
    made.add_argument("--out", type=str, default=None, help="folder of the results; default: RUN/analyses")
    how = "of one analysis, as vulnerability.attack='PGD(Linf(8/255), steps=50)'; may be given several times"
    made.add_argument("--set", type=str, action="append", default=None, help=how)
    sources, flags = divided(made, words)
    given = parse(made, flags)
    if not sources:
        raise UserError("analyse what? instar analyse RUN [RUN ...], with folders that instar train --out has written")
    console = Console(soft_wrap=True)
    begun = time.monotonic()
    with _progress(console) as (tick, show):
        done = analyse(
            sources,
            only=None if given.only is None else [name.strip() for name in given.only.split(",") if name.strip()],
            split=given.split,
            checkpoint=given.checkpoint,
            data=given.data,
            root=given.root,
            model=given.model,
            model_arguments=width_of(given),
            normalize=given.normalize,
            n=_count(given.n),
            norm=given.norm,
            eps=given.eps,
            seed=given.seed,
            batch_size=given.batch_size,
            device=given.device,
            out=given.out,
            settings=_settings(given.set or ()),
            tick=tick,
            heard=show,
        )
    found = [one for one in done if isinstance(one, Found)]
    places = dict.fromkeys(_nearest(one.path.parent) for one in found if one.path is not None)
    for place in places:
        print(place)
    failed = sum(isinstance(one, Missing) and one.failed for one in done)
    told = f"{len(found)} results in {spoken(time.monotonic() - begun)}"
    print(told + (f"; {failed} failed" if failed else ""))
    return 1 if failed else 0


def _count(n: Any) -> int | None:
    if n in ("all", None):
        return None
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise UserError(f"--n must be a number of images, or all; got {n}")
    return n


def _settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``analysis.name=value`` as nested dictionaries."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        path, equals, value = word.partition("=")
        name, dot, setting = path.strip().partition(".")
        if not equals or not dot:
            raise UserError(f"--set takes analysis.setting=value, for example pairs.attack='...'; got {word!r}")
        if name not in ANALYSES:
            raise unknown("analysis", name, ANALYSES)
        found.setdefault(name, {})[setting] = expression(value)
    return found


def _nearest(path: Path) -> Path:
    """The path as a user would type it from here."""
    with contextlib.suppress(ValueError):
        return path.resolve().relative_to(Path.cwd())
    return path


def _line(one: Found | Missing) -> str:
    if isinstance(one, Missing):
        how = "failed" if one.failed else "not done"
        return f"{one.name} ({one.label}) {how}: {' '.join(one.reason.split())}"
    seconds = float(one.protocol.get("seconds") or 0.0)
    took = f" [{spoken(seconds)}]" if seconds >= 1 else ""
    return f"{one.name} ({one.label}): {one.summary}{took}"


class _Pace:
    """A line with the time left, from the speed since the piece of work began."""

    def __init__(self) -> None:
        self._what, self._begun, self._first = "", 0.0, 0

    def __call__(self, what: str, done: int, total: int) -> str:
        now = time.monotonic()
        if what != self._what or done < self._first:
            self._what, self._begun, self._first = what, now, done
        moved = done - self._first
        left = f", {spoken((now - self._begun) * (total - done) / moved)} left" if moved and done < total else ""
        return f"{what} {done:,}/{total:,}{left}"


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[tuple[Tick, Any]]:
    """How far the work is: a live bar on a terminal, a line a minute elsewhere; and the results as they come."""
    pace = _Pace()
    if not console.is_terminal:
        wrote = time.monotonic()

        def lines(what: str, done: int, total: int) -> None:
            nonlocal wrote
            text = pace(what, done, total)
            if time.monotonic() - wrote >= _EVERY:
                wrote = time.monotonic()
                print(f"  {text}", flush=True)

        yield lines, lambda one: print(_line(one), flush=True)
        return
    bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
    task = bar.add_task("")
    with bar:
        yield (
            lambda what, done, total: bar.update(
                task, total=total, completed=done, description=pace(what, done, total)
            ),
            lambda one: console.print(_line(one), highlight=False, markup=False),
        )
