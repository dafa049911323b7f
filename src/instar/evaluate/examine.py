"""Running one attack on one shard."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instar.attacks import PGD, Attack
from instar.errors import UserError
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.shards import Arrays, Outcome, Shard
from instar.evaluate.subject import Subject
from instar.evidence import Batch
from instar.randomness import generator


def examine(
    attack: Attack | AutoAttack,
    subject: Subject,
    shard: Shard,
    *,
    seed: int,
    batch_size: int,
    everyone: bool = False,
    stored: Arrays | None = None,
    save: Callable[[Arrays], None] = lambda arrays: None,
    tick: Callable[[float, int], None] = lambda fraction, robust: None,
) -> Outcome:
    """Attack every point of a shard whose clean prediction is right.

    Args:
        attack: What to run.
        subject: The model.
        shard: The points.
        seed: Seed of random starts.
        batch_size: Points attacked at a time.
        everyone: Whether points whose clean prediction is wrong are attacked too; AutoAttack never does.
        stored: What `save` was last given, to go on from there; None begins.
        save: Called with all that is needed to go on, after every batch of AutoAttack and at the end of others.
        tick: Called after every batch with the share of the work done and the points standing.

    Returns:
        The outcome.

    Raises:
        UserError: The model returns NaN or infinity on an attacked image.
    """
    if isinstance(attack, AutoAttack):
        return attack.examine(subject, shard, seed=seed, batch_size=batch_size, stored=stored, save=save, tick=tick)
    none = np.full(len(shard), -1, np.int8)
    if stored is not None:
        return Outcome(stored["robust"].astype(bool), none, seconds=float(stored["seconds"]), reused=True)
    begun = time.perf_counter()
    robust = np.zeros(len(shard), dtype=bool)
    standing = (torch.ones_like(shard.correct) if everyone else shard.correct).nonzero().flatten()
    batches = standing.split(batch_size) if len(standing) else ()  # nothing, split, is one batch of nothing
    for done, rows in enumerate(batches, start=1):
        draws = generator(seed, step=int(shard.index[rows[0]]), purpose=f"evaluate {attack!r}", device=subject.device)
        stands = withstands(attack, subject, Batch(shard.x[rows], shard.y[rows]), draws)
        robust[rows.cpu().numpy()] = stands.cpu().numpy()
        tick(done / len(batches), int(robust.sum()))
    seconds = time.perf_counter() - begun
    save({"robust": robust.astype(np.uint8), "seconds": np.array(seconds)})
    return Outcome(robust, none, seconds=seconds)


@torch.no_grad()
def withstands(attack: Attack, subject: Subject, batch: Batch, draws: torch.Generator | None) -> Tensor:
    """Which points no iterate of an attack breaks.

    The attack runs on the stand-in; the final image is judged by the model itself. Where the stand-in saw a
    misclassified iterate that the model itself does not confirm (their logits differ by rounding), the point is
    attacked again on the model itself, so that every broken point is broken on the model that is evaluated.

    Args:
        attack: What to run.
        subject: The model and its stand-in.
        batch: The points.
        draws: Source of the random start.

    Returns:
        Boolean (B,).

    Raises:
        UserError: The model returns NaN or infinity on an attacked image.
    """
    stands, unbroken = _verdicts(attack, subject.stand_in, subject.model, batch, draws)
    doubtful = stands & ~unbroken
    if subject.folded and bool(doubtful.any()):
        again = Batch(batch.x[doubtful], batch.y[doubtful])
        stands[doubtful], unbroken[doubtful] = _verdicts(attack, subject.model, subject.model, again, draws)
    return stands & unbroken


def _verdicts(
    attack: Attack, attacked: nn.Module, judge: nn.Module, batch: Batch, draws: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Whether the judge gets the final image right, and whether the attacked model got all inspected iterates right."""
    found = attack(attacked, batch, generator=draws)
    logits = judge(found.x)
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            "the model returns NaN or infinity on attacked images: its gradients are broken, so no attack can judge it"
        )
    return logits.argmax(1) == batch.y, found.kappa == found.inspected


def budget(attack: Attack | AutoAttack, classes: int) -> dict[str, Any]:
    """What an attack may spend on a point, as a record holds it.

    Args:
        attack: The attack.
        classes: Number of classes K.

    Returns:
        Steps, restarts and about how many forward passes (a backward to the input counts as one) a surviving point
        costs; empty for attacks of other kinds.

    Example:
        >>> from instar.threat import Linf
        >>> budget(PGD(Linf(8/255), steps=20), 10)
        {'steps': 20, 'restarts': 1, 'forwards': 41}
    """
    if isinstance(attack, AutoAttack):
        return attack.budget(classes)
    if isinstance(attack, PGD) and isinstance(attack.steps, int):
        return {"steps": attack.steps, "restarts": 1, "forwards": 2 * attack.steps + 1}
    return {}
