"""All pictures that the files of a run allow, as PNG files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from matplotlib.figure import Figure

from instar.errors import UserError
from instar.evaluate.record import Record
from instar.report.bars import evaluation_bars
from instar.report.contact import gallery
from instar.report.curves import instance_curves, learning_curves
from instar.report.geometry import survival
from instar.report.mechanism import MOST, mechanism_figure
from instar.report.ridges import unevenness
from instar.report.stored import StoredRun, UnavailableError, names, read, read_all, read_evaluation
from instar.report.style import write_png

Plan = list[tuple[str, Callable[[], Figure]]]


def write_pictures(
    run_folder: str | Path | StoredRun, *, out: str | Path | None = None, root: str | Path | None = None
) -> list[Path]:
    """Draw everything that a run's files allow: learning curves, survival, unevenness, gallery, evaluations.

    What does not exist yet is left out with a warning (no evaluation is no reason for one). A damaged file costs its
    own pictures only: the others are written before the error is raised.

    Args:
        run_folder: The run; it may still be running.
        out: Folder for the pictures; None is ``pictures`` in the run folder. Pictures of that name are replaced.
        root: Folder that data sets lie in, for the gallery; None takes the run's, else the default one.

    Returns:
        The files: ``learning_curves.png``, ``survival.png``, ``unevenness.png``, ``gallery.png``, and
        ``evaluation-<suite>.png`` and ``mechanism-evaluation-<suite>.png``, as far as they could be made.

    Raises:
        UserError: The folder holds no run or nothing that can be drawn yet, a file is damaged, or the disk is full or
            read-only.
    """
    stored = read(run_folder)
    plan: Plan = [
        ("learning_curves.png", partial(learning_curves, stored)),
        ("survival.png", partial(survival, stored)),
        ("unevenness.png", partial(unevenness, stored)),
        ("gallery.png", partial(gallery, stored, root)),
    ]
    if not stored.log and not stored.tables:
        plan = []
    plan += evaluation_plan([stored])
    if not plan:
        raise UserError(f"{stored.folder} has no finished epoch yet: there is nothing to draw")
    return _draw(plan, stored.folder / "pictures" if out is None else Path(out))


def compare_pictures(runs: Sequence[str | Path | StoredRun], out: str | Path) -> list[Path]:
    """Draw several runs side by side: learning curves, guarded and attackable shares, and evaluations they share.

    Args:
        runs: Run folders, in the order in which they get their colours.
        out: Folder for the pictures. Pictures of that name are replaced.

    Returns:
        The files: ``learning_curves.png``, ``instances.png``, and ``evaluation-<suite>.png`` for every suite that at
        least two runs were evaluated by, in one threat model on the same images.

    Raises:
        UserError: A folder holds no run or no finished epoch, a file is damaged, or the disk is full or read-only.
    """
    stored = read_all(runs)
    plan: Plan = [("learning_curves.png", partial(learning_curves, stored))]
    plan += [("instances.png", partial(instance_curves, stored)), *evaluation_plan(stored)]
    return _draw(plan, Path(out))


def _draw(plan: Iterable[tuple[str, Callable[[], Figure]]], folder: Path) -> list[Path]:
    written: list[Path] = []
    failed: list[UserError] = []
    for name, figure in plan:
        try:
            written.append(write_png(figure(), folder / name))
        except UnavailableError as reason:
            warnings.warn(f"no {name}: {reason}", stacklevel=3)
        except UserError as error:
            failed.append(error)
    if failed:
        others = {str(error) for error in failed[1:]} - {str(failed[0])}
        more = f" (and {len(others)} more)" if others else ""
        kept = f"; the other pictures are in {folder}" if written else ""
        raise UserError(f"{failed[0]}{more}{kept}")
    return written


def evaluation_plan(runs: Sequence[StoredRun]) -> Plan:
    """A picture for each suite and protocol: of one run all of its evaluations, of several those that they share.

    Args:
        runs: The runs.

    Returns:
        File names, and functions that draw; for a damaged record one that raises.
    """
    groups, damaged = evaluation_groups(runs)
    plan: Plan = [(f"evaluation-{path.stem}.png", partial(_fail, error)) for path, error in damaged]
    for name, members in groups.items():
        labels, records = zip(*members, strict=True)
        plan.append((f"{name}.png", partial(evaluation_bars, records, labels=labels)))
        plan += [(f"mechanism-{name}.png", drawn) for drawn in mechanism_plan(members)]
    return plan


def mechanism_plan(members: Sequence[tuple[str, Record]]) -> list[Callable[[], Figure]]:
    """The picture of margins and difficulties of those evaluations that measured them; none where none did.

    Args:
        members: Names of runs and their records.

    Returns:
        At most one function that draws.
    """
    shown = [(name, record) for name, record in members if record.has_mechanism][:MOST]
    labels = [f"{name} ({record.checkpoint})" for name, record in shown]
    return [partial(mechanism_figure, [record for _, record in shown], labels=labels)] if shown else []


def evaluation_groups(
    runs: Sequence[StoredRun], *, least: int | None = None
) -> tuple[dict[str, list[tuple[str, Record]]], list[tuple[Path, UserError]]]:
    """Evaluations that can stand side by side: one suite and threat model, the same images.

    Args:
        runs: The runs.
        least: How many of the runs must share an evaluation; None is two, or one where there is one run.

    Returns:
        Groups of run names and records, by ``evaluation-<suite>`` and what else tells them apart; of two records of a
        checkpoint the newer. And the records that cannot be read, with the reasons.
    """
    damaged: list[tuple[Path, UserError]] = []
    groups: dict[tuple[str, str, str, str, int], list[tuple[str, Record]]] = {}
    for run, name in zip(runs, names(runs), strict=True):
        kept: set[tuple[object, ...]] = set()
        # The shortest name first: a record that gave way to a newer one of the same checkpoint has a longer one.
        for path in sorted((run.folder / "evaluations").glob("*.json"), key=lambda path: (len(path.name), path.name)):
            try:
                record = read_evaluation(path)
                key = _protocol(record)
            except UserError as error:
                damaged.append((path, error))
                continue
            if (key, record.checkpoint) not in kept:
                kept.add((key, record.checkpoint))
                groups.setdefault(key, []).append((name, record))
    wanted = min(2, len(runs)) if least is None else least
    shared = {key: members for key, members in groups.items() if len({name for name, _ in members}) >= wanted}
    suites = [suite for suite, *_ in shared]
    named = {}
    for (suite, norm, eps, images, seed), members in shared.items():
        long = f"{suite}-{norm}-{eps}-n{members[0][1].n}-seed{seed}-{images[:6]}".replace("/", "_")
        named[f"evaluation-{suite if suites.count(suite) == 1 else long}"] = members
    return named, damaged


def _protocol(record: Record) -> tuple[str, str, str, str, int]:
    """What evaluations in one picture must share."""
    try:
        protocol = record.protocol
        return record.suite, protocol["norm"], protocol["eps"], protocol["images_sha256"], int(protocol["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the evaluation record {record.path} has no {error} in its protocol: is it damaged?") from None


def _fail(error: UserError) -> NoReturn:
    raise error
