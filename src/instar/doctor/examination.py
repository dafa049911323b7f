"""One visit to the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instar.devices import numbered_device
from instar.doctor.checks import model_checks
from instar.doctor.estimate import cost, measure, standing
from instar.doctor.machine import machine, machine_checks
from instar.doctor.report import ERROR, WARNING, Check, Cost, Report
from instar.errors import UserError
from instar.evaluate.conditions import BATCH_SIZE
from instar.evaluate.normalization import Normalization, labelled
from instar.evaluate.subject import examined, is_black_box
from instar.evaluate.suites import SUITES, build
from instar.evaluate.targets import Wishes, radius, resolve
from instar.room import gibibytes
from instar.threat import Ball, ball

USUAL_SUITES = ("quick", "development", "standard")
BLACK_BOX_SUITES = ("black_box",)


def examine(
    target: str | Path | nn.Module,
    *,
    data: Any = None,
    root: str | Path | None = None,
    size: int | None = None,
    model: str | nn.Module | None = None,
    model_arguments: dict[str, Any] | None = None,
    checkpoint: str = "best",
    norm: str | None = None,
    eps: float | str | None = None,
    normalize: Normalization = "identity",
    n: int = 64,
    images: int | None = None,
    batch_size: int = BATCH_SIZE,
    suites: Sequence[str] | None = None,
    device: str = "auto",
    trust: bool = False,
) -> Report:
    """Look at a model before it is evaluated: is its number going to mean anything, and what will it cost?

    Input range, normalisation and double normalisation, logits or probabilities, number of classes, train and eval
    mode, determinism, independence of the batch, zero gradients, float32 against float64, bfloat16 and channels_last,
    the unit of eps; then time and memory of suites, from a few timed batches.

    Args:
        target: As of `instar.evaluate.evaluate`; the arguments of the same names too.
        data: See there.
        root: See there.
        size: See there.
        model: See there.
        model_arguments: See there.
        checkpoint: ``"best"``, ``"last"`` or ``"online"`` of a run.
        norm: See there.
        eps: See there. One that makes no sense is an error of the check ``eps``.
        normalize: See there.
        n: Images that are looked at.
        images: Images that suites would be run on; None is all of the split.
        batch_size: Images that would be attacked at a time.
        suites: Whose cost is estimated; None is quick, development and standard, or black_box for a model without
            gradients.
        device: ``cpu``, ``cuda`` or ``auto``.
        trust: Whether a TorchScript program may be run.

    Returns:
        The report.

    Raises:
        UserError: There is no such target, data set or suite, or the weights do not fit the model.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> report = examine(net, data=(torch.rand(40, 1, 2, 2), torch.arange(40) % 2), eps=8, suites=())
        >>> report["eps"].level, report["output"].level
        ('error', 'ok')
    """
    place = numbered_device(device)
    unit: list[Check] = []
    wishes = Wishes(data, root, size, model, model_arguments, checkpoint, norm, eps, normalize, None, trust)
    try:
        (case,) = resolve(target, wishes)
    except UserError as error:
        wrong = eps is not None and _not_a_radius(norm, eps)
        if not wrong:
            raise
        unit = [Check("eps", ERROR, str(error).rstrip("."))]
        (case,) = resolve(target, replace(wishes, eps=0.0, norm=norm or "Linf"))
    info, threat = case.split.images.info, case.ball
    if unit:
        threat = ball(info.norm, info.eps)
    known = machine(place, Path.cwd())
    found = machine_checks(known, place)
    try:
        x, y = labelled(case.split, n)
    except UserError as error:  # values outside of [0, 1], or pictures that cannot be read
        advice = "Take normalisation out of the data and put it into the model"
        problem = Check("input range", ERROR, str(error).rstrip("."), advice)
        return Report(str(case.target), (*found, problem, *unit), machine=known)
    network = case.model
    if any(tensor.device != place for tensor in (*network.parameters(), *network.buffers())):
        network = network.to(place)
    classes = len(case.split.classes)
    looked = model_checks(network, x.to(place), y.to(place), info=info, classes=classes, ball=threat)
    found += [check for check in looked if not (unit and check.name == "eps")] + unit
    costs: tuple[Cost, ...] = ()
    if not any(check.level == ERROR and check.name in ("output", "classes", "gradients") for check in looked):
        named = suites if suites is not None else BLACK_BOX_SUITES if is_black_box(network) else USUAL_SUITES
        if named:
            total = len(case.split) if images is None else min(images, len(case.split))
            costs = _costs(network, x.to(place), y.to(place), named, threat, total, batch_size, place)
            found += _memory(costs, known["memory_free"], batch_size)
    return Report(str(case.target), tuple(found), costs, machine=known)


def examine_machine(device: str = "auto", folder: str | Path = ".") -> Report:
    """Look at the machine only: versions that belong together, device, memory and disk.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.
        folder: Where files would be written.

    Returns:
        The report.

    Example:
        >>> [check.name for check in examine_machine("cpu").checks][:2]
        ['versions', 'device']
    """
    place = numbered_device(device)
    known = machine(place, Path(folder).resolve())
    return Report("this machine", tuple(machine_checks(known, place)), machine=known)


def _not_a_radius(norm: str | None, eps: float | str) -> bool:
    try:
        ball(norm or "Linf", radius(eps))
    except UserError:
        return True
    return False


def _costs(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    names: Sequence[str],
    threat: Ball,
    images: int,
    batch_size: int,
    device: torch.device,
) -> tuple[Cost, ...]:
    built = [build(SUITES.get(name, name), threat) for name in names]
    with examined(network, x[: min(len(x), 8)], device=device) as subject:
        pace = measure(subject, x, y, batch_size=min(batch_size, images))
        clean, robust = standing(subject, x, y, threat)
        return tuple(
            cost(suite, pace, images=images, classes=subject.classes, clean=clean, robust=robust) for suite in built
        )


def _memory(costs: Sequence[Cost], free: int | None, batch_size: int) -> list[Check]:
    if free is None or not costs or costs[0].memory < 0.8 * free:
        return []
    text = f"an attack on {batch_size} images takes about {gibibytes(costs[0].memory)}, and {gibibytes(free)} are free"
    smaller = max(int(batch_size * 0.6 * free / costs[0].memory), 1)
    level = ERROR if costs[0].memory > free else WARNING
    return [Check("memory of attacks", level, text, f"Give --batch-size {smaller}", float(costs[0].memory))]
