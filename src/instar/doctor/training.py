"""How long a training run would take here: a few real steps of it, and what follows each epoch."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from instar.attacks import PGD
from instar.config import Settings, build_method, find_recipe
from instar.data import Images, ResidentImages, TrainSplit, batches, load, steps_per_epoch
from instar.data.splits import hold_out
from instar.devices import choose_device
from instar.doctor.machine import peak_memory
from instar.doctor.report import Training
from instar.errors import UserError
from instar.method import Method
from instar.passes import passes
from instar.schedules import Progress
from instar.train import EpochDone, Event, StepDone, _network, train

WARM_UP = 2
"""Steps that are not counted: the first ones allocate memory and choose algorithms."""
FEWEST = 4
SMALL = 16
SELECTED = 256
LOOKED_AT = 64
"""Images by which it is seen how long an attack that may stop early goes on."""
LEARNT = (0.15, 800)
"""Share of the run, and steps at most, in which a network learns 63 % of what makes such attacks longer: from the
iterates that CIFAR-10 runs of P-SAT and digits runs of FAT inspected in each epoch."""
POINTS = 8
"""Epochs that are looked at; those between them are like the nearest one before."""


class _Enough(Exception):  # noqa: N818
    """The probe has seen what it wanted."""


@dataclass
class _Watch:
    """Counts the time of steps and of an epoch's end; ends the run when it has seen enough."""

    device: torch.device
    seconds: float
    begun: float = field(default_factory=time.perf_counter)
    marks: list[float] = field(default_factory=list)
    end: float | None = None

    def __call__(self, event: Event) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if isinstance(event, EpochDone):
            self.end = now - self.marks[-1]
            raise _Enough
        assert isinstance(event, StepDone)
        self.marks.append(now)
        counted = len(self.marks) - 1 - WARM_UP
        if counted >= FEWEST and now - self.marks[WARM_UP] > self.seconds and event.step + 1 < event.steps:
            raise _Enough

    @property
    def step(self) -> float:
        """Mean seconds of a step, the warm-up aside where there are enough."""
        skipped = min(WARM_UP, len(self.marks) - 2)
        return (self.marks[-1] - self.marks[skipped]) / (len(self.marks) - 1 - skipped)


def predict(
    recipe: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
    seconds: float = 20.0,
    **settings: Any,
) -> Training:
    """How long a run would take, from real steps of it in a temporary folder.

    The probe is the training itself: its data, its augmentation, its attack at full length at the point of the schedule
    where a step costs most, its optimiser and its average; then what follows an epoch, on part of the selection images.
    Where a step at the full batch would take too long, two smaller batches are timed and the line through them is
    extended. Other epochs are scaled by the passes through the network that a step makes there.

    An attack that may stop early inspects fewer iterates: how many the untrained network lets it inspect is seen at
    several points of the schedules. A trained one withstands longer, about half of what is left to the full length
    more (measured: FAT 0.18 before and 0.52 after training, P-SAT's bound of 0 alike, its later bounds 1 and 0.9), to
    which the forecast passes over within the first part of the run, see `LEARNT`. Instances that have stopped leave the
    batch; where they cannot, a step goes on as long as its last instance.

    Args:
        recipe: Name of a recipe, or ``file.py:function``.
        arguments: Arguments of the recipe.
        changes: Dotted paths into the method and their values.
        seconds: Time that may be spent on steps, about.
        **settings: Fields of `Settings`: ``data``, ``model``, ``epochs``, ``batch_size``, ...

    Returns:
        The prediction.

    Raises:
        UserError: A setting that cannot work.

    Example:
        >>> made = predict("pgd_at", width=4, epochs=2, batch_size=256, seconds=0.1, arguments={"steps": 1})
        >>> made.steps, made.seconds > 0
        (10, True)
    """
    chosen = Settings(**settings)
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds for the probe must be a number above 0, for example 20; got {seconds}")
    device = choose_device(chosen.device)
    images = load(chosen.data, split="train", root=chosen.root, size=chosen.size)
    method = build_method(
        find_recipe(recipe), dict(arguments or {}), info=images.info, settings=chosen, changes=dict(changes or {})
    )
    split, selection = hold_out(images, selection=chosen.held_out(len(images)), seed=chosen.seed)
    each = steps_per_epoch(split, chosen.batch_size, True)
    units = [_units(method, epoch, chosen.epochs) for epoch in range(chosen.epochs)]
    dearest = max(range(chosen.epochs), key=lambda epoch: units[epoch])
    probed = _at(method, dearest, chosen.epochs)
    stop = getattr(probed.attack, "stop", None)
    full = probed if stop is None else replace(probed, attack=replace(probed.attack, stop=None))  # type: ignore[type-var]
    step, how = _step(full, images, chosen, device, seconds)
    if stop is not None and not _leaves(probed):  # its rule may have passes of its own
        step = max(step, _step(probed, images, chosen, device, seconds)[0])
    end = _epoch_end(probed, images, chosen, device, selected=len(selection))
    average = method.average
    if average is not None and average.batch_norm == "reestimate":
        end += each * step / max(units[dearest], 1)
    longest = sum(units) / units[dearest]
    expected = longest
    if stop is not None:
        fixed = _fixed(full, images, chosen, device, step=step, seconds=seconds) if _leaves(probed) else 0.0
        expected -= (1 - fixed) * sum(_saved(method, units, images, chosen, device, each)) / units[dearest]
    ends = chosen.epochs * end
    return Training(
        recipe=recipe,
        steps=each * chosen.epochs,
        seconds_a_step=expected * step / chosen.epochs,
        seconds_an_epoch_end=end,
        seconds=each * expected * step + ends,
        most=each * longest * step + ends,
        probed=how,
        memory=peak_memory(device),
    )


def _leaves(method: Method) -> bool:
    """Whether instances leave the batch when their attack has stopped."""
    attack = method.attack
    return isinstance(attack, PGD) and attack.stop is not None and attack.may_leave(attack.stop)


def _fixed(
    method: Method, images: Images, settings: Settings, device: torch.device, *, step: float, seconds: float
) -> float:
    """Share of a step's time that a smaller batch would take as well: of small networks, the most."""
    small, wanted = min(SMALL, settings.batch_size), settings.batch_size
    if small == wanted:
        return 1.0
    first, _ = _timed(method, images, settings, device, batch_size=small, seconds=seconds / 10)
    slope = max(step - first, 0.0) / (wanted - small)
    return min(max(first - slope * small, 0.0) / step, 1.0)


def _saved(
    method: Method, units: list[int], images: Images, settings: Settings, device: torch.device, each: int
) -> list[float]:
    """Forward units of a step that early stopping saves in each epoch."""
    epochs = len(units)
    points = sorted({round(k * (epochs - 1) / max(POINTS - 1, 1)) for k in range(POINTS)})
    seen = {epoch: _inspected(_at(method, epoch, epochs), images, settings, device) for epoch in points}
    learning = max(min(LEARNT[0] * each * epochs, LEARNT[1]), 1.0)
    found = []
    for epoch in range(epochs):
        untrained = seen[max(point for point in points if point <= epoch)]
        trained = (untrained + 1) / 2
        # The mean over the epoch of 1 − exp(−update / learning).
        begin, end = epoch * each / learning, (epoch + 1) * each / learning
        learnt = 1 - (math.exp(-begin) - math.exp(-end)) / (end - begin)
        there = untrained + learnt * (trained - untrained)
        attack = _at(method, epoch, epochs).attack
        steps = attack.numbers()[0] if isinstance(attack, PGD) else 0
        found.append(2 * steps * (1 - there))  # a forward and a backward pass for every iterate
    return found


def _inspected(method: Method, images: Images, settings: Settings, device: torch.device) -> float:
    """Share of its iterates that an attack on the untrained network inspects, in passes of whole batches."""
    attack = method.attack
    if not isinstance(attack, PGD) or not attack.numbers()[0]:
        return 1.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network = _network(settings.model, settings, images, method).to(device)
        few = _evenly(images, LOOKED_AT)
        batch = next(
            batches(
                TrainSplit(few), batch_size=len(few), epoch=0, seed=0, shuffle=False, drop_last=False, device=device
            )
        )
        draws = torch.Generator(device=device).manual_seed(settings.seed)
        inspected = attack(network, batch, generator=draws).inspected.float()
    counted = inspected.mean() if _leaves(method) else inspected.max()
    return float(counted) / attack.numbers()[0]


def _at(method: Method, epoch: int, epochs: int) -> Method:
    return method.at(Progress(epoch=epoch, epochs=epochs))


def _units(method: Method, epoch: int, epochs: int) -> int:
    """Forward units of a step in an epoch, its attack at full length."""
    there = _at(method, epoch, epochs)
    if getattr(there.attack, "stop", None) is not None:
        there = replace(there, attack=replace(there.attack, stop=None))  # type: ignore[type-var]
    return passes(there).units


def _step(
    method: Method, images: Images, settings: Settings, device: torch.device, seconds: float
) -> tuple[float, str]:
    """Seconds of a step at the full batch, and how they were found."""
    wanted = settings.batch_size
    small = min(SMALL, wanted)
    first, count = _timed(method, images, settings, device, batch_size=small, seconds=seconds / 10)
    if small == wanted:
        return first, f"{count} steps timed"
    affordable = seconds / (WARM_UP + FEWEST) / (first / small)
    if affordable >= wanted:
        found, count = _timed(method, images, settings, device, batch_size=wanted, seconds=seconds)
        return found, f"{count} steps timed"
    larger = max(2 * small, int(affordable) // 8 * 8)
    if larger >= wanted:
        larger = wanted
    second, count = _timed(method, images, settings, device, batch_size=larger, seconds=seconds)
    slope = max((second - first) / (larger - small), 0.5 * second / larger)
    found = second + slope * (wanted - larger)
    return found, f"extended from batches of {small} and {larger}" if larger < wanted else f"{count} steps timed"


def _timed(
    method: Method, images: Images, settings: Settings, device: torch.device, *, batch_size: int, seconds: float
) -> tuple[float, int]:
    watch = _Watch(device, seconds)
    _probe(method, images, settings, watch, batch_size=batch_size)
    return watch.step, len(watch.marks) - 1


def _epoch_end(method: Method, images: Images, settings: Settings, device: torch.device, *, selected: int) -> float:
    """Seconds between the last step of an epoch and the next epoch, scaled to the run's selection images."""
    probe = min(selected, SELECTED)
    batch = min(SMALL, settings.batch_size)
    few = _evenly(images, probe + (WARM_UP + 1) * batch)
    watch = _Watch(device, seconds=1e9)
    _probe(method, few, settings, watch, batch_size=batch, selection=probe)
    return (watch.end or 0.0) * selected / probe


def _probe(
    method: Method, images: Images, settings: Settings, watch: _Watch, *, batch_size: int, selection: int | None = None
) -> None:
    kept = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}
    model = kept.pop("model")
    kept |= {"epochs": 1, "batch_size": batch_size, "save_every": 1e9, "selection": selection or settings.selection}
    # The weights stay as they are, so that no probe diverges; the method has its average and smoothing already.
    kept |= {"lr": 0.0, "ema": 0.0, "label_smoothing": 0.0}
    del kept["data"]
    # Training seeds the global generators; they are left as found.
    seeded = torch.random.fork_rng(devices=[watch.device] if watch.device.type == "cuda" else [])
    with tempfile.TemporaryDirectory(prefix="instar-doctor-") as folder, seeded:
        try:
            train(method, out=Path(folder) / "probe", data=images, model=model, on_event=watch, **kept)
        except _Enough:
            return


def _evenly(images: Images, count: int) -> Images:
    """Some images at even distances, held in memory."""
    rows = torch.arange(min(count, len(images))) * len(images) // min(count, len(images))
    return ResidentImages(images.fetch(rows).cpu(), images.labels[rows], images.info, getattr(images, "split", None))
