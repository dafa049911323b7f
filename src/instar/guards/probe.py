"""A look at a few fixed held-out images after each epoch: under no attack, one step, several, and the method's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from instar.attacks import PGD, FoldingError, Zero, fold
from instar.data import SelectionSplit, batches, require_selection
from instar.data.indexed import as_float
from instar.errors import UserError
from instar.evidence import Batch
from instar.guards.collapse import Alarm, Sight, judge
from instar.instances import InstanceTable
from instar.method import Method
from instar.modes import full
from instar.parallel import ALONE, Group
from instar.randomness import generator
from instar.schedules import Progress
from instar.signals import CrossEntropy
from instar.threat import Ball

IMAGES = 256
"""Largest number of images in a probe; a twentieth of the training images, but at least 64, is enough."""
OWN = 32
"""Images that the method's own attack is tried on."""
STEPS = 5
"""Steps of the PGD, as in Wong et al. 2020, of half the radius each."""
HISTORY = "guard.sights"
"""The probes since the attack came to rest, a row each, in the run's shared tensors."""
END = Progress(epoch=1, epochs=1)
_FAR = 1e6


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        sight: What it saw.
        alarms: What that means, mostly nothing.
    """

    sight: Sight
    alarms: tuple[Alarm, ...]

    def record(self) -> dict[str, Any]:
        """Fields of the line in ``log.jsonl``."""
        sight = self.sight
        return {
            "probe_fgsm": sight.single,
            "probe_pgd": sight.several,
            "probe_largest_class": sight.largest,
            "alarms": [alarm.name for alarm in self.alarms],
        }


def watch(
    method: Method,
    model: nn.Module,
    split: SelectionSplit,
    *,
    progress: Progress,
    table: InstanceTable,
    seed: int,
    train_images: int,
    group: Group = ALONE,
) -> Probe | None:
    """Probe the network, and judge what was seen together with the probes before, which the table's store keeps.

    Args:
        method: What it is trained with; one without a ball, such as natural training, is not probed.
        model: The trained weights.
        split: Held-out images.
        progress: Where the run stands, which tells whether the attack's schedules have come to rest.
        table: Its rows are shown to the method's own attack, and its shared tensors keep the history.
        seed: The run's.
        train_images: Images of an epoch, of which a probe is to cost a small share.
        group: Processes that probe together.

    Returns:
        What was found; None without a ball, or with fewer images than processes.
    """
    count = min(IMAGES, max(64, train_images // 20))
    sight = probe(method, model, split, table=table, seed=seed, count=count, group=group)
    if sight is None:
        return None
    resting = bool(method.at(progress).attack == method.at(END).attack)
    device = table.columns["seen"].device
    row = torch.tensor([[*dataclasses.astuple(sight), float(resting)]], dtype=torch.float64, device=device)
    kept = table.shared.get(HISTORY, row[:0])
    # Before the attack rests the last probe is enough; from then on its best is what later ones are measured by.
    kept = kept[kept[:, -1] == 1] if resting else kept[-1:]
    table.shared[HISTORY] = torch.cat([kept, row])
    rows = table.shared[HISTORY].tolist()
    names = [entry.name for entry in dataclasses.fields(Sight)]
    sights = [Sight(**dict(zip(names, values, strict=False))) for values in rows]
    return Probe(sight, tuple(judge(sights, resting=resting)))


def probe(
    method: Method,
    model: nn.Module,
    split: SelectionSplit,
    *,
    table: InstanceTable,
    seed: int,
    count: int = IMAGES,
    group: Group = ALONE,
) -> Sight | None:
    """Look at the first held-out images: without attack, under FGSM and PGD-5, and under the method's own attack.

    The threat model and the own attack are those at the end of the run. The network is left as found.

    Args:
        method: What it is trained with.
        model: The trained weights.
        split: Held-out images; a test split is refused.
        table: See `watch`.
        seed: The run's; the same images get the same starts each time.
        count: Images.
        group: Processes that probe together.

    Returns:
        What was seen, the same in all processes; None without a ball of positive radius, or with fewer images than
        processes.

    Raises:
        UserError: `split` is not a selection split.
    """
    split, final = require_selection(split), method.at(END)
    ball: Ball | None = getattr(final.attack, "ball", None)
    if ball is None or ball.radius == 0 or min(count, len(split)) < group.size:
        return None
    device = table.columns["seen"].device
    usual: dict[str, Any] = {"epoch": 0, "seed": seed, "shuffle": False, "drop_last": False, "limit": 1}
    usual |= {"device": device, "group": group}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        attacked: nn.Module = model
        with contextlib.suppress(FoldingError):
            attacked = fold(model, as_float(split.images.fetch(split.indices[:4])).to(device))
        batch = next(batches(split, batch_size=min(count, len(split)), **usual))
        clean, classes = _right(model, batch.x, batch.y)
        single = PGD(ball, CrossEntropy(), steps=1, step_size=ball.radius, start=Zero())
        several = PGD(ball, CrossEntropy(), steps=STEPS, step_size=ball.radius / 2)
        found = [clean]
        for attack in (single, several):
            draws = generator(seed, purpose="probe", device=device)
            found.append(_right(model, attack(attacked, batch, generator=draws).x, batch.y)[0])
        own = next(batches(split, batch_size=max(min(OWN, count, len(split)), group.size), **usual))
        few = _own_attack(final, model, attacked, own, table, seed)
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    counts = torch.stack([right.sum() for right in found]).double()
    summed = group.total(torch.cat([counts, classes.double(), _histogram(batch.y, len(classes)), few]))
    seen, predicted, labels, (before_, behind, broken) = (
        part.tolist() for part in summed.split([3, len(classes), len(classes), 3])
    )
    n = sum(labels)
    top = max(range(len(predicted)), key=predicted.__getitem__)
    return Sight(
        clean=seen[0] / n,
        single=seen[1] / n,
        several=seen[2] / n,
        largest=predicted[top] / n,
        usual=labels[top] / n,
        broken=broken,
        # A cross-entropy of exactly 0 has no gradient, and what stays there was not attacked.
        rise=min(behind / before_, _FAR) if before_ > 0 else (1.0 if behind == 0 else _FAR),
        most=max(labels) / n,
        count=n,
    )


@torch.no_grad()
def _right(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which images are classified correctly (B,), and how many are taken for each class (K,)."""
    logits = full(model(images))
    taken = logits.argmax(1)
    return taken == labels, _histogram(taken, logits.shape[1])


def _histogram(labels: Tensor, classes: int) -> Tensor:
    """How often each class occurs, (K,)."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).sum(0).double()


def _own_attack(
    method: Method, model: nn.Module, attacked: nn.Module, batch: Batch, table: InstanceTable, seed: int
) -> Tensor:
    """Summed cross-entropy before and behind the method's own attack, and how many images it breaks, (3,)."""
    assert batch.index is not None
    shared = {name: t.clone() for name, t in table.shared.items()}  # an attack may count in it
    batch = dataclasses.replace(batch, memory=table.rows(batch.index), shared=shared)
    if method.attack.needs & {"features", "params"} or getattr(method.attack, "mode", "eval") != "eval":
        attacked = model
    try:
        draws = generator(seed, purpose="probe", device=batch.y.device)
        moved = method.attack(attacked, batch, generator=draws).x
    except UserError:  # an attack that fits no other batch, as one from a given start: nothing is known of it
        return torch.tensor([1.0, _FAR, 0.0], dtype=torch.float64, device=batch.y.device)
    numbers = []
    with torch.no_grad():
        logits = [full(model(x)) for x in (batch.x, moved)]
    for z in logits:
        numbers.append(functional.cross_entropy(z, batch.y, reduction="sum").double())
    right = [z.argmax(1) == batch.y for z in logits]
    return torch.stack([*numbers, (right[0] & ~right[1]).sum().double()])


class Lookout:
    """Tells a user what probes alarm about, each kind once in a while that a run goes on, or stops the run there.

    Args:
        policy: ``"warn"`` or ``"stop"``.
        note: Called with a line.
        out: Folder of the run.

    Example:
        >>> lookout = Lookout("warn", print, "runs/first")
        >>> alarm = Alarm("majority class", "majority class: 98.0% ...")
        >>> lookout((alarm,)), lookout((alarm,))
        majority class: 98.0% ...
        (None, None)
    """

    def __init__(self, policy: str, note: Callable[[str], None], out: str | Path) -> None:
        self._policy, self._note, self._out = policy, note, out
        self._told: set[str] = set()

    def __call__(self, alarms: Sequence[Alarm]) -> None:
        """Take the alarms of a probe; what the run has learned so far must be saved already.

        Raises:
            UserError: There is one, and the policy is to stop.
        """
        if alarms and self._policy == "stop":
            texts = ". ".join(alarm.text for alarm in alarms)
            raise UserError(
                f"training stopped: {texts}. All of it is saved: instar train --resume --out {self._out} --on_collapse "
                "warn goes on all the same"
            )
        for alarm in alarms:
            if alarm.name not in self._told:
                self._note(alarm.text)
        self._told = {alarm.name for alarm in alarms}
