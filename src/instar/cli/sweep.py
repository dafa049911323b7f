"""``instar sweep``."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from jsonargparse import Namespace

from instar.cli import train
from instar.cli.arguments import parse, parser
from instar.config import Settings
from instar.errors import UserError, unknown
from instar.evaluate import SUITES
from instar.evaluate.suites import build
from instar.expression import parse as parse_expression
from instar.models.registry import canonical
from instar.schedules import Progress
from instar.storage import read_text
from instar.sweep import grid, local, slurm, table
from instar.sweep.plan import Configuration, Evaluation, Member, plan
from instar.sweep.state import look, status
from instar.sweep.work import evaluate_words, locked, train_words
from instar.threat import Linf

DESCRIPTION = """Train many runs, evaluate each, and write one table: methods × seeds × any setting.

  instar sweep --recipes gairat,trades --seeds 0,1,2 --eps 4/255,8/255 --data digits --suite quick --out SWEEP
  instar sweep sweep.yaml --out SWEEP

Every flag of `instar train` may be given, with several values separated by commas. A method is RECIPE, RECIPE@PRESET or
file.py:function, with arguments of its own in brackets: "trades(beta=3)". Begun again, the same command does what is
missing or was interrupted, and nothing else."""

JUDGING = ("norm", "eps", "seed", "batch_size", "shard_size", "precision", "processes", "device")
"""Flags of ``instar evaluate`` that a sweep passes on, as --evaluate.NAME."""

SCHEDULERS = ("local", "slurm")


def run(words: Sequence[str]) -> int:
    """Plan, check, run, and write the table.

    Raises:
        UserError: A mistake in the arguments, told before anything is started.
    """
    own, flags, changes, judging = _sorted(words)
    made = _parser()
    given = parse(made, own)
    if not given.sweep and not flags:
        raise UserError("sweep what? instar sweep --recipes gairat,trades --seeds 0,1,2 ... or instar sweep FILE.yaml")
    if given.sweep:
        _fill(given, own, flags, changes, judging, Path(given.sweep))
    if not given.out:
        raise UserError("a sweep needs a folder: --out runs/sweep")
    if given.scheduler not in SCHEDULERS:
        raise unknown("scheduler", given.scheduler, SCHEDULERS)
    for name in ("jobs", "threads"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"{name} must be at least 1; got {getattr(given, name)}")
    parameters = _slurm(given)
    out = Path(given.out)
    evaluation = _evaluation(given, judging)
    members = plan(grid.choices(flags, changes), out=out, configure=configuration, evaluation=evaluation)
    if given.dry_run:
        _show_plan(members)
        return 0
    with _stopped_by(signal.SIGTERM) as received:
        try:
            _work(given, members, out, parameters)
        except KeyboardInterrupt:
            number = received[0] if received else signal.SIGINT
            table.write(members, out)
            again = shlex.join(["instar", "sweep", *words])
            print(f"{signal.Signals(number).name}: everything is saved; go on with: {again}", flush=True)
            return 128 + number
    return _close(members, out, left=given.detach)


def _work(given: Namespace, members: Sequence[Member], out: Path, parameters: Mapping[str, Any]) -> None:
    missing = [member for member in members if not _complete(member)]
    done = len(members) - len(missing)
    print(f"{len(members)} run{'s' if len(members) != 1 else ''}, {done} complete → {out}", flush=True)

    def report(member: Member, what: str) -> None:
        if what == "ended":
            table.write(members, out)
            what = _status(member)
        left = sum(not _complete(one) for one in members)
        print(f"{member.name}: {what}; {left} left", flush=True)

    table.write(members, out)
    if not missing:
        return
    if given.scheduler == "local":
        local.work_through(missing, jobs=given.jobs or 1, threads=given.threads, report=report)
        return
    folder = out / "logs" / "submitit"
    jobs = slurm.submit(missing, folder=folder, parameters=parameters, jobs=given.jobs, threads=given.threads)
    print(f"handed over as {', '.join(str(job.job_id) for job in jobs)}", flush=True)
    if not given.detach:
        slurm.watch(missing, jobs, report=report)


def _close(members: Sequence[Member], out: Path, *, left: bool) -> int:
    found = table.write(members, out)
    print(table.markdown(found), end="")
    print(f"\n{out / 'results.md'}, results.csv, results.json")
    missing = [member for member in members if not _complete(member)]
    if missing and left:
        print("the same command, later, writes the table anew; it hands over again what is not complete by then")
        return 0
    if missing:
        print(f"{len(missing)} of {len(members)} runs are not complete; the same command tries them again")
    return 1 if missing else 0


def _complete(member: Member) -> bool:
    try:
        return look(member).complete
    except UserError:
        return False


def _status(member: Member) -> str:
    try:
        return status(member, look(member), running=locked(member.log))
    except UserError as error:
        return f"failed: {error}"


def configuration(words: Sequence[str]) -> Configuration:
    """What ``instar train WORDS`` would run, found out by its own parser.

    Args:
        words: Flags of ``instar train``.

    Returns:
        The method and the training settings, complete.

    Raises:
        UserError: An unknown flag, or a value that is refused, now or in a later epoch.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        train.run([*words, "--print_config"])
    first, _, rest = text.getvalue().partition("\n")
    content: dict[str, Any] = yaml.safe_load(rest)
    expression = first.removeprefix("# ")
    settings = {name: content[name] for name in inspect.signature(Settings).parameters}
    method = parse_expression(expression)
    for epoch in range(settings["epochs"]):
        method.at(Progress(epoch=epoch, epochs=settings["epochs"]))
    if settings["model"] is not None:
        canonical(settings["model"])
    return Configuration(expression, settings)


def _parser() -> Any:
    made = parser("sweep", DESCRIPTION)
    made.add_argument("--sweep", type=str, default=None, help="YAML file of the sweep, if it is not the first word")
    made.add_argument("--out", type=str, default=None, help="folder of the sweep, with a folder for every run")
    made.add_argument("--recipes", type=str, default=None, help="methods, separated by commas")
    made.add_argument("--seeds", type=str, default=None, help="seeds, separated by commas (default: 0)")
    made.add_argument("--set", type=str, default=None, help="PATH=VALUE,VALUE: change any part of the methods")
    made.add_argument("--suite", type=str, default=None, help=f"evaluate each run: one of {', '.join(SUITES)}")
    made.add_argument("--n", type=int, default=None, help="test images of the evaluation (default: the suite's)")
    made.add_argument("--checkpoint", type=str, default="best", help="evaluated checkpoint: best, last or both")
    others = f"further flags of the evaluation: {', '.join(JUDGING)}"
    made.add_argument("--evaluate", type=str, default=None, metavar="NAME=VALUE,...", help=others)
    made.add_argument("--scheduler", type=str, default="local", help="local (this machine) or slurm (through submitit)")
    made.add_argument("--jobs", type=int, default=None, help="runs at a time (default: 1; on SLURM: no limit)")
    made.add_argument("--threads", type=int, default=None, help="CPU threads of a run (default: the cores shared)")
    about = "parameters of submitit: slurm_partition=gpu,gpus_per_node=1,cpus_per_task=8,timeout_min=1440"
    made.add_argument("--slurm", type=str, default=None, metavar="NAME=VALUE,...", help=about)
    made.add_argument("--detach", action="store_true", help="hand the jobs over to SLURM and return")
    made.add_argument("--dry_run", action="store_true", help="check everything, print the commands, and stop")
    return made


OWN = ("sweep", "out", "suite", "n", "checkpoint", "scheduler", "jobs", "threads", "slurm", "detach", "dry_run")
ALONE = ("detach", "dry_run")


def _sorted(words: Sequence[str]) -> tuple[list[str], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Flags of the sweep itself, flags of training, changes of the method, flags of the evaluation."""
    own: list[str] = []
    flags: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    judging: dict[str, Any] = {}
    waiting = list(words)
    if waiting and not waiting[0].startswith("-"):
        own += ["--sweep", waiting.pop(0)]
    while waiting:
        word = waiting.pop(0)
        if word in ("-h", "--help"):
            own.append(word)
            continue
        if not word.startswith("--"):
            raise UserError(f"expected a flag; got {word!r}. Several values are separated by commas, without blanks")
        name, equals, item = word[2:].partition("=")
        name = name.replace("-", "_")
        if name in ALONE and not equals:
            own.append(f"--{name}")
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"--{name} needs a value")
            item = waiting.pop(0)
        _put(name, item, own, flags, changes, judging)
    return own, flags, changes, judging


def _put(
    name: str, item: Any, own: list[str], flags: dict[str, Any], changes: dict[str, Any], judging: dict[str, Any]
) -> None:
    """Sort one setting to where it belongs."""
    if name in OWN:
        own += [f"--{name}", str(item)]
    elif name == "set":
        path, value = _pair(name, str(item))
        changes[path] = value
    elif name == "evaluate":
        judging |= _pairs(name, str(item))
    elif name.startswith("evaluate."):
        judging[name.removeprefix("evaluate.")] = item
    elif name in flags:
        raise UserError(f"--{name} is given twice: several values are separated by commas")
    else:
        flags[name] = item


def _pair(name: str, text: str) -> tuple[str, str]:
    path, equals, item = text.partition("=")
    if not equals or not path.strip() or not item.strip():
        raise UserError(f"--{name} takes NAME=VALUE; got {text!r}")
    return path.strip(), item.strip()


def _pairs(name: str, text: str) -> dict[str, str]:
    return dict(_pair(name, part) for part in grid.listed(text))


def _fill(
    given: Namespace,
    own: Sequence[str],
    flags: dict[str, Any],
    changes: dict[str, Any],
    judging: dict[str, Any],
    path: Path,
) -> None:
    """What a YAML file says, where the words do not say otherwise."""
    try:
        content = yaml.safe_load(read_text(path, what="sweep"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the sweep {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"the sweep {path} must be a mapping of names to values")
    typed = {word[2:] for word in own if word.startswith("--")}
    said = {grid.SEVERAL.get(name, name) for name in flags}
    more: list[str] = []
    for raw, item in content.items():
        name = raw.replace("-", "_")
        mapping = item if isinstance(item, dict) else None
        if name == "set":
            listed = item if isinstance(item, list) else [item]
            found = mapping or dict(_pair(name, str(part)) for part in listed)
            changes |= {key: value for key, value in found.items() if key not in changes}
        elif name == "evaluate":
            found = mapping or _pairs(name, str(item))
            for key, value in found.items():
                if key in ("suite", "n", "checkpoint"):
                    more += [] if key in typed else [f"--{key}", str(value)]
                else:
                    judging.setdefault(key, value)
        elif name == "slurm" and mapping is not None:
            if "slurm" not in typed:
                more += ["--slurm", ",".join(f"{key}={value}" for key, value in mapping.items())]
        elif mapping is not None:
            raise UserError(f"the sweep {path}: {raw} must be a value or a list of values")
        elif name in ALONE:
            more += [f"--{name}"] if item is True else []
        elif name in OWN and name != "sweep":
            more += [] if name in typed else [f"--{name}", str(item)]
        elif grid.SEVERAL.get(name, name) not in said:
            flags[name] = item
    filled = parse(_parser(), [*own, *more])
    for name in OWN:
        setattr(given, name, getattr(filled, name))


def _evaluation(given: Namespace, judging: Mapping[str, Any]) -> Evaluation | None:
    if given.suite is None:
        if given.n is not None or judging:
            raise UserError("an evaluation needs a suite: --suite quick")
        return None
    for name in judging:
        if name not in JUDGING:
            raise unknown("flag of the evaluation", name, JUDGING)
    suite = build(given.suite, Linf(8 / 255))
    if given.checkpoint not in ("best", "last", "both"):
        raise unknown("checkpoint", given.checkpoint, ("best", "last", "both"))
    settings = {**({"n": given.n} if given.n is not None else {}), **judging}
    for name in ("n", "seed", "batch_size", "shard_size", "processes"):
        if name in settings and not re.fullmatch(r"\d+" if name == "seed" else r"0*[1-9]\d*", str(settings[name])):
            raise UserError(f"{name} of the evaluation must be a positive whole number; got {settings[name]}")
    if str(settings.get("precision", "float32")) not in ("float32", "bf16"):
        raise unknown("precision", settings["precision"], ("float32", "bf16"))
    return Evaluation(given.suite, given.checkpoint, settings, whole=suite.images is None)


def _slurm(given: Namespace) -> dict[str, Any]:
    """Parameters of submitit, numbers as numbers."""
    if given.scheduler != "slurm":
        if given.slurm or given.detach:
            raise UserError("--slurm and --detach belong to --scheduler slurm")
        return {}
    found: dict[str, Any] = _pairs("slurm", given.slurm) if given.slurm else {}
    return {name: int(item) if re.fullmatch(r"-?\d+", item) else item for name, item in found.items()}


def _show_plan(members: Sequence[Member]) -> None:
    for member in members:
        state = look(member)
        print(f"# {member.name}: {status(member, state, running=locked(member.log))}")
        if not state.trained:
            print(shlex.join(["instar", *train_words(member)]))
        if not state.complete and member.evaluation is not None:
            print(shlex.join(["instar", *evaluate_words(member)]))


@contextlib.contextmanager
def _stopped_by(number: signal.Signals) -> Iterator[list[int]]:
    """A signal that ends the sweep as Ctrl-C does; the list says whether it came."""
    received: list[int] = []

    def interrupt(found: int, frame: FrameType | None) -> None:
        received.append(found)
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield received
    finally:
        signal.signal(number, before)
