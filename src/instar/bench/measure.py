"""The benchmark itself: cases made ready, counted, timed in turns, and written down with the machine."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from instar.bench.child import memory
from instar.bench.clocks import CLOCKS, in_turns, wait
from instar.bench.rates import matmul_rate, operations
from instar.bench.result import Benchmark, Row
from instar.bench.subject import Case, Subject, cases_of, images_of, prepare
from instar.data import TrainSplit, augmentation, batches
from instar.devices import choose_device
from instar.doctor.machine import hardware
from instar.errors import UserError, unknown
from instar.method import Method
from instar.passes import passes

MAIN = ("pgd_at", "trades", "gairat", "mail_at", "spat", "p_sat", "iseat")
"""What is timed where nothing is named."""
LOADER_SECONDS = 1.0


def bench(
    methods: Sequence[str] | Mapping[str, Method | None] = MAIN,
    *,
    without: Sequence[str] = (),
    baseline: bool = False,
    turns: int = 5,
    steps: int = 2,
    clock: str = "wall",
    measure_memory: bool = True,
    out: str | Path | None = None,
    note: Callable[[str], None] = lambda line: None,
    **common: Any,
) -> Benchmark:
    """Time training steps in turns, beside the official style and beside what the machine can do.

    Args:
        methods: Names of recipes, or names and methods; the first one is what the others are compared with.
        without: Names of `instar.bench.SWITCHES`: each gives a further row for every method that uses it.
        baseline: Whether to time the official style of PGD-AT, TRADES and GAIRAT as well.
        turns: How often each case is timed.
        steps: Steps of a case in a turn.
        clock: ``"wall"``, or ``"cpu"`` for the time of the processor, on a busy machine.
        measure_memory: Whether to run each case once more in a process of its own, for its peak memory.
        out: Folder that ``bench.md``, ``bench.json`` and ``bench.png`` are written into; None writes nothing.
        note: Told what goes on, line by line.
        **common: Fields of `instar.bench.Case`: ``data``, ``model``, ``width``, ``batch_size``, ``precision``, ...

    Returns:
        The table.

    Raises:
        UserError: A name or number that cannot be.

    Example:
        >>> small = {"model": "small_cnn", "width": 4, "batch_size": 8, "device": "cpu", "precision": "float32"}
        >>> found = bench(["pgd_at"], baseline=True, turns=2, steps=1, measure_memory=False, **small)
        >>> [row.name for row in found.rows], found["pgd_at"].passes.units
        (['pgd_at', 'pgd_at, official style'], 23)
    """
    if clock not in CLOCKS:
        raise unknown("clock", clock, CLOCKS)
    named = dict.fromkeys(methods) if not isinstance(methods, Mapping) else dict(methods)
    if not named:
        raise UserError("there is no method to time")
    fields = set(Case.__dataclass_fields__) - {"recipe", "method", "style", "without"}
    for name in common:
        if name not in fields:
            raise unknown("setting", name, fields)
    batch_size = common.get("batch_size", 128)
    for name, number in (("batch_size", batch_size), ("turns", turns), ("steps", steps)):
        if number < 1:
            raise UserError(f"{name} must be at least 1; got {number}")
    device = choose_device(common.get("device", "auto"))
    if clock == "cpu" and device.type != "cpu":
        raise UserError(f"clock cpu does not see the work of a {device.type} device: take clock wall")
    cases = cases_of(named, without=tuple(without), baseline=baseline, common=common)
    before = _load()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(cases[0].seed)
        subjects = {case.name: prepare(case) for case in cases}
        note(f"{len(cases)} cases on {device}")
        # One after the other within the same minute; counting makes a step slower, so that it comes before the clock.
        counted = {name: operations(functools.partial(subject.plain, 0)) for name, subject in subjects.items()}
        for subject in subjects.values():
            subject.rehearse()
        notes = [line for subject in subjects.values() for line in subject.notes]
        precisions = sorted({subject.precision for subject in subjects.values()}, key=str)
        rates = {_named(precision): matmul_rate(precision, device, clock=clock)[0] for precision in precisions}
        timed = in_turns(
            {name: subject.step for name, subject in subjects.items()},
            turns=turns,
            count=steps,
            device=device,
            note=note,
        )
        again = {_named(precision): matmul_rate(precision, device, clock=clock)[0] for precision in precisions}
        loader = _loader_rate(cases[0], device, clock)
    rates = {name: max(rate, again[name]) for name, rate in rates.items()}
    rows = [
        _row(case, subjects[case.name], timed[case.name], counted[case.name], measure_memory, notes, note)
        for case in cases
    ]
    kept = hardware(device) | {"load": None if before is None else [before, _load()], "date": time.strftime("%Y-%m-%d")}
    kept["float32_matmul"] = torch.get_float32_matmul_precision()
    found = Benchmark(tuple(rows), clock, steps, rates, loader, kept, tuple(dict.fromkeys(notes)))
    if out is not None:
        found.write(Path(out))
    return found


def _row(
    case: Case,
    subject: Subject,
    turns: Sequence[Any],
    counted: int,
    measure_memory: bool,
    notes: list[str],
    note: Callable[[str], None],
) -> Row:
    peak: int | None = None
    added: int | None = None
    if measure_memory:
        note(f"memory of {case.name}")
        try:
            peak, added = memory(case)
        except UserError as error:  # a signal that only this process knows, or too little memory for two
            notes.append(str(error))
    return Row(
        case=case,
        turns=tuple(turns),
        passes=passes(subject.method) if case.style == "instar" else None,
        operations=counted,
        peak_memory=peak,
        step_memory=added,
        precision=_named(subject.precision),
    )


def _named(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def _load() -> float | None:
    """Processes that wanted a core in the last minute, or None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _loader_rate(case: Case, device: torch.device, clock: str) -> float:
    """Images a second of the loader alone, shuffled and augmented."""
    images = images_of(case)
    split, given = TrainSplit(images), 0
    usual: dict[str, Any] = {"seed": case.seed, "shuffle": True, "drop_last": True, "device": device}
    augment, epoch, begun = augmentation("standard", images.info), 0, 0.0
    now = time.perf_counter if clock == "wall" else time.process_time
    while True:
        for batch in batches(split, batch_size=case.batch_size, epoch=epoch, augment=augment, **usual):
            if begun:
                given += len(batch)
            else:
                begun = now()  # the first batch draws the order and may copy the images to the device
            if given and now() - begun > LOADER_SECONDS:
                wait(device)
                return given / (now() - begun)
        epoch += 1
