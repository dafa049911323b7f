"""By what the best checkpoint of a run is chosen: accuracy on training images that no weight saw."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from instar.attacks import PGD, FoldingError, fold
from instar.data import SelectionSplit, batches, require_selection
from instar.data.indexed import as_float
from instar.method import Method
from instar.parallel import ALONE, Group
from instar.randomness import generator
from instar.schedules import Progress
from instar.sharding import is_sharded
from instar.signals import Margin

SELECTION_STEPS = 10
"""Steps of the margin PGD by which the best checkpoint is chosen."""


def selection_accuracy(
    method: Method,
    model: nn.Module,
    split: SelectionSplit,
    *,
    seed: int,
    device: torch.device,
    group: Group = ALONE,
) -> tuple[float, float]:
    """Clean accuracy, and accuracy under margin PGD-10 in the method's threat model, on held-out training images.

    The margin loss is used because methods that reweight instances flatten the logits, which misleads cross-entropy.

    Args:
        method: Its attack's ball is used; a method without one is measured without attack.
        model: The weights to measure; its modes are left as found.
        split: Images held out of the training set. A test split is refused.
        seed: Seed of the attack's start; the same images get the same start in every epoch.
        device: Where to compute.
        group: Processes that measure together, each its share; they get the same result.

    Returns:
        Clean and robust accuracy in [0, 1]; an image is robust if no iterate of the attack is misclassified.

    Raises:
        UserError: `split` is not a selection split.
    """
    split = require_selection(split)
    ball = getattr(method.at(Progress(epoch=1, epochs=1)).attack, "ball", None)
    attack = None
    if ball is not None:
        attack = PGD(ball, Margin(), steps=SELECTION_STEPS, step_size=ball.radius / 4)
    images = as_float(split.images.fetch(split.indices[:4])).to(device)
    frozen: nn.Module = model
    if not is_sharded(model):
        with contextlib.suppress(FoldingError):  # the model itself is attacked then
            frozen = fold(model, images)
    right = safe = 0
    usual: dict[str, Any] = {"shuffle": False, "drop_last": False, "device": device}
    stream = batches(split, batch_size=500, epoch=0, seed=seed, group=ALONE if is_sharded(model) else group, **usual)
    was_training = model.training
    model.eval()
    for number, batch in enumerate(stream):
        counts = True
        if is_sharded(model):  # every process makes every pass; a batch too small for all is everybody's, counted once
            counts = len(batch) >= group.size or group.leads
            batch = batch.share(group) if len(batch) >= group.size else batch
        with torch.no_grad():
            clean = model(batch.x).argmax(1) == batch.y
        right += int(clean.sum()) if counts else 0
        if attack is None:
            safe += int(clean.sum()) if counts else 0
            continue
        draws = generator(seed, step=number, purpose="selection", device=device)
        found = attack(frozen, batch, generator=draws)
        with torch.no_grad():
            final = model(found.x).argmax(1) == batch.y
        safe += int((clean & final & (found.kappa == found.inspected)).sum()) if counts else 0
    model.train(was_training)
    right, safe = group.total(torch.tensor([right, safe])).tolist()
    return right / len(split), safe / len(split)
