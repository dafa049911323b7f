"""``instar train RECIPE``."""

from __future__ import annotations

import inspect
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from jsonargparse import ArgumentParser

from instar.cli.arguments import parse, parser
from instar.cli.configuration import configured, recipe_named
from instar.cli.display import display
from instar.config import INDIFFERENT, Settings, build_method, written
from instar.data import info
from instar.errors import UserError
from instar.follow import SINKS, following
from instar.methods import RECIPES, Recipe
from instar.parallel import leading
from instar.runs import read_resumable, read_run
from instar.train import Event, Interrupted, Result, resume, train

DESCRIPTION = f"""Train a robust classifier.

RECIPE is one of {", ".join(RECIPES)}, or your own as my_file.py:my_method. `instar explain RECIPE` shows its equations.
Every flag can stand in a YAML file (--config); --print-config writes one."""


_LOG = f"follow the run with {', '.join(SINKS)}; may be given several times"
WHICH = f"which recipe? instar train RECIPE ..., with one of {', '.join(RECIPES)}"


def run(words: Sequence[str]) -> int:
    """Train, resume, or print the configuration.

    Raises:
        UserError: A mistake in the arguments, or a run that cannot work.
    """
    words = list(words)
    if words and not words[0].startswith("-"):
        words[:1] = ["--recipe", words[0]]
    name = recipe_named(words)
    if name is None and "--resume" in words:
        return _resume(words)
    if name is None and not {"-h", "--help"} & set(words):
        raise UserError(WHICH)
    made = configured(name, words, _parser())
    recipe, given = made.recipe, made.given
    arguments, changes = made.arguments, made.changes
    settings = Settings(**made.fields)
    if recipe is None or name is None:
        raise UserError(WHICH)
    if given.print_config:
        print(_yaml(name, recipe, settings, arguments, changes, given.out), end="")
        return 0
    out = given.out or _default_out(name, settings)
    length = f"{settings.epochs} epoch{'s' if settings.epochs != 1 else ''}"
    heading = f"{name} on {settings.data}, {length}, seed {settings.seed} → {out}"
    with (
        display(epochs=settings.epochs, stream=_stage(), heading=heading) as show,
        following(given.log if leading() else [], out=out, note=show.line) as follow,
    ):
        try:
            result = train(
                recipe if ":" not in name else _named(recipe, name),
                out=out,
                resume=given.resume,
                arguments=arguments,
                changes=changes,
                on_event=_both(show, follow),
                note=show.line,
                **made.fields,
            )
        except Interrupted as stopped:
            show.line(str(stopped))
            return 128 + stopped.signal_number
    _summarise(result)
    return 0


def _resume(words: Sequence[str]) -> int:
    """Go on with a run that is named by nothing but its folder."""
    made = parser("train --resume", "Go on with the run in --out, exactly; it knows its own configuration.")
    made.add_argument("--resume", action="store_true")
    made.add_argument("--log", action="append", default=[], metavar="SINK", help=_LOG)
    made.add_argument("--out", type=str, default=None, help="folder of the run")
    made.add_argument("--trust", action="store_true", help="run the code of your own that the run names")
    made.add_argument("--root", type=str, default=None, help="folder that data sets lie in, if it has moved")
    made.add_argument("--device", type=str, default=None, help="cpu, cuda or auto, if it differs")
    made.add_argument("--accelerate", type=str, default=None, help="none, compile, graphs, both or auto, if it differs")
    made.add_argument("--accumulate", type=int, default=None, help="pieces of each process's batch, if it differs")
    made.add_argument("--save_every", type=float, default=None, help="seconds between saves, if they differ")
    made.add_argument("--save_steps", type=int, default=None, help="optimiser steps between saves, if they differ")
    made.add_argument("--keep_every", type=int, default=None, help="epochs whose weights are kept, if they differ")
    made.add_argument("--keep_newest", type=int, default=None, help="how many of them, if they differ")
    made.add_argument("--shard", type=str, default=None, help="none or full, if it differs")
    made.add_argument("--on_nan", type=str, default=None, help="stop, skip or rollback, if it is to change")
    made.add_argument("--loss_limit", type=float, default=None, help="where a loss explodes, if it is to change")
    made.add_argument("--on_collapse", type=str, default=None, help="warn or stop, if it is to change")
    made.add_argument("--probe_every", type=int, default=None, help="steps between further probes, if they differ")
    made.add_argument("--deterministic", type=bool, default=None, help="true or false, if it is to change")
    given = parse(made, words)
    if given.out is None:
        raise UserError("resume which run? instar train --resume --out RUN")
    stored = read_resumable(given.out)
    heading = f"{stored['recipe']} on {stored['data'].get('name')}, resumed → {given.out}"
    with (
        display(epochs=stored["training"]["epochs"], stream=_stage(), heading=heading) as show,
        following(given.log if leading() else [], out=given.out, note=show.line) as follow,
    ):
        try:
            where = {name: getattr(given, name) for name in sorted(INDIFFERENT)}
            result = resume(given.out, on_event=_both(show, follow), note=show.line, trust=given.trust, **where)
        except Interrupted as stopped:
            show.line(str(stopped))
            return 128 + stopped.signal_number
    _summarise(result)
    return 0


def _both(one: Callable[[Event], None], other: Callable[[Event], None]) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        one(event)
        other(event)

    return listen


def _stage() -> TextIO:
    """Where a run is shown: of several processes the first one alone shows it."""
    return sys.stdout if leading() else io.StringIO()


def _summarise(result: Result) -> None:
    if not leading():
        return
    best, held_out = result.best, read_run(result.out)["selection"]["n"]
    print(
        f"best: epoch {best['epoch'] + 1:.0f}, {best['clean']:.1%} clean, {best['robust']:.1%} under margin PGD-10 "
        f"on {held_out} held-out images\nnext: instar evaluate {shlex.quote(str(result.out))}"
    )


def _named(recipe: Recipe, name: str) -> Recipe:
    """A user's recipe keeps its address as its name, so that run.json says where it came from."""
    recipe.__name__ = name
    return recipe


def _parser() -> ArgumentParser:
    made = parser("train", DESCRIPTION)
    made.add_argument("--out", type=str, default=None, help="folder of the run (default: runs/RECIPE-DATA-seedS)")
    made.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly")
    made.add_argument("--log", action="append", default=[], metavar="SINK", help=_LOG)
    made.add_argument("--print_config", action="store_true", help="print the configuration as YAML and stop")
    return made


def _default_out(name: str, settings: Settings) -> str:
    last = name.rpartition(":")[2]
    return str(Path("runs") / f"{last}-{Path(settings.data).name}-seed{settings.seed}")


def _yaml(
    name: str,
    recipe: Recipe,
    settings: Settings,
    arguments: dict[str, Any],
    changes: dict[str, Any],
    out: str | None,
) -> str:
    """The whole configuration; reading it back gives the same run."""
    known = info(settings.data, settings.root)
    method = build_method(recipe, arguments, info=known, settings=settings, changes=changes)
    content: dict[str, Any] = {"recipe": name}
    content |= {key: written(item) for key, item in arguments.items() if item is not None}
    content |= {key: written(getattr(settings, key)) for key in inspect.signature(Settings).parameters}
    if changes:
        content["set"] = [f"{path}={written(item)}" for path, item in changes.items()]
    if out:
        content["out"] = out
    return f"# {method!r}\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
