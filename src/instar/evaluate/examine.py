"""Running one attack on one shard."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instar.arrays import Arrays
from instar.attacks import PGD, Attack
from instar.evaluate import compaction
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.judging import Verdict, judged
from instar.evaluate.mechanism import Mechanism
from instar.evaluate.shards import MEASURED, Keep, Outcome, Shard, keep_nothing, measured_in
from instar.evaluate.subject import Subject
from instar.evidence import Batch
from instar.randomness import generator, key


def examine(
    attack: Attack | AutoAttack,
    subject: Subject,
    shard: Shard,
    *,
    seed: int,
    batch_size: int,
    search: nn.Module | None = None,
    everyone: bool = False,
    stored: Arrays | None = None,
    save: Callable[[Arrays], None] = lambda arrays: None,
    keep: Keep = keep_nothing,
    tick: Callable[[float, int], None] = lambda fraction, robust: None,
) -> Outcome:
    """Attack every point of a shard whose clean prediction is right.

    Args:
        attack: What to run.
        subject: The model.
        shard: The points.
        seed: Seed of random starts.
        batch_size: Points attacked at a time.
        search: A faster copy of lower precision to search with (see `instar.evaluate.precision`), or None.
        everyone: Whether points whose clean prediction is wrong are attacked too; AutoAttack never does.
        stored: What `save` was last given, to go on from there; None begins.
        save: Called with all that is needed to go on, after every batch of AutoAttack and at the end of others.
        keep: Called with the examples that broke points, before `save`.
        tick: Called after every batch with the share of the work done and the points standing.

    Returns:
        The outcome.

    Raises:
        UserError: The model returns NaN, infinity or another shape on an attacked image.
    """
    if isinstance(attack, AutoAttack):
        return attack.examine(
            subject,
            shard,
            seed=seed,
            batch_size=batch_size,
            search=search,
            stored=stored,
            save=save,
            keep=keep,
            tick=tick,
        )
    none = np.full(len(shard), -1, np.int8)
    if stored is not None:
        return Outcome(
            stored["robust"].astype(bool),
            none,
            seconds=float(stored["seconds"]),
            reused=True,
            margin=stored["margin"],
            measured=measured_in(stored),
        )
    begun = time.perf_counter()
    robust, margin = np.zeros(len(shard), dtype=bool), np.full(len(shard), np.nan, np.float32)
    standing = (torch.ones_like(shard.correct) if everyone else shard.correct).nonzero().flatten()
    batches = standing.split(batch_size) if len(standing) else ()  # nothing, split, is one batch of nothing
    measured: dict[str, np.ndarray] = {}
    for done, rows in enumerate(batches, start=1):
        place, purpose = int(shard.index[rows[0]]), f"evaluate {attack!r}"
        draws = generator(seed, step=place, purpose=purpose, device=subject.device)
        batch = Batch(shard.x[rows], shard.y[rows], index=shard.index[rows.cpu()])
        with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
            # A model that draws numbers itself draws the same ones again after a kill and in another process.
            torch.manual_seed(key(seed, step=place, purpose=purpose))
            if isinstance(attack, Mechanism):
                found, verdict, unbroken, columns = _measured(attack, subject, batch, draws)
            else:
                found, verdict, unbroken = attacked(attack, subject, batch, draws, search=search)
                columns = {}
        at = rows.cpu().numpy()
        for name, column in columns.items():
            measured.setdefault(name, np.full(len(shard), np.nan, np.float32))[at] = column.cpu().numpy()
        stands = verdict.right & unbroken
        robust[at] = stands.cpu().numpy()
        # An attack that goes on after a misclassified iterate may end at an image that is classified correctly.
        margin[at] = torch.where(stands, verdict.margin, verdict.margin.clamp_max(0.0)).cpu().numpy()
        if bool((~verdict.right).any()):
            keep(0, done, at[~verdict.right.cpu().numpy()], found[~verdict.right])
        tick(done / len(batches), int(robust.sum()))
    seconds = time.perf_counter() - begun
    further = {f"{MEASURED}{name}": column for name, column in measured.items()}
    save({"robust": robust.astype(np.uint8), "margin": margin, "seconds": np.array(seconds), **further})
    return Outcome(robust, none, seconds=seconds, margin=margin, measured=measured)


def withstands(attack: Attack, subject: Subject, batch: Batch, draws: torch.Generator | None) -> Tensor:
    """Which points no iterate of an attack breaks, as a boolean (B,); see `attacked`."""
    _, verdict, unbroken = attacked(attack, subject, batch, draws)
    return verdict.right & unbroken


@torch.no_grad()
def attacked(
    attack: Attack, subject: Subject, batch: Batch, draws: torch.Generator | None, *, search: nn.Module | None = None
) -> tuple[Tensor, Verdict, Tensor]:
    """Attack a batch on the fastest copy of a model, and judge it on the model itself.

    Where the copy saw a misclassified iterate that the model itself does not confirm (their logits differ by rounding),
    the point is attacked again on the next slower copy, and at last on the model itself: every broken point is broken
    on the model that is evaluated.

    Args:
        attack: What to run.
        subject: The model and its stand-in.
        batch: The points.
        draws: Source of the random start.
        search: A copy of lower precision, to begin with.

    Returns:
        The final images (B, C, H, W), what the model says of them, and whether every inspected iterate was classified
        correctly (B,). A point is robust if the model is right and no iterate was misclassified.

    Raises:
        UserError: The model returns NaN, infinity or another shape on an attacked image.
    """
    slower = [subject.stand_in, subject.model] if subject.folded else [subject.model]
    first, *others = slower if search is None else [search, *slower]
    found, verdict, unbroken = _attempt(attack, first, subject, batch, draws)
    for model in others:
        doubtful = verdict.right & ~unbroken
        if not bool(doubtful.any()):
            break
        places = None if batch.index is None else batch.index[doubtful.cpu()]
        part = Batch(batch.x[doubtful], batch.y[doubtful], index=places)
        again, their_verdict, unbroken[doubtful] = _attempt(attack, model, subject, part, draws)
        found = found.clone()  # it may be the clean images themselves, where an attack moves nothing
        found[doubtful] = again
        verdict = verdict.replaced(doubtful, their_verdict)
    return found, verdict, unbroken


def _measured(
    attack: Mechanism, subject: Subject, batch: Batch, draws: torch.Generator | None
) -> tuple[Tensor, Verdict, Tensor, dict[str, Tensor]]:
    """As `attacked`, with what the model itself says of both ends; nothing stops, so nothing has to be confirmed."""
    found = attack(subject.stand_in, batch, generator=draws)
    columns = attack.measure(subject.model, batch, found)
    return found.x, judged(subject, found.x, batch.y), found.kappa == found.inspected, columns


def _attempt(
    attack: Attack, model: nn.Module, subject: Subject, batch: Batch, draws: torch.Generator | None
) -> tuple[Tensor, Verdict, Tensor]:
    found = compaction.run(attack, model, batch, draws)
    return found.x, judged(subject, found.x, batch.y), found.kappa == found.inspected


def budget(attack: Attack | AutoAttack, classes: int) -> dict[str, Any]:
    """What an attack may spend on a point, as a record holds it.

    Args:
        attack: The attack.
        classes: Number of classes K.

    Returns:
        Steps, restarts and about how many forward passes (a backward to the input counts as one) a surviving point
        costs; what the attack says of itself if it has a method ``budget``; empty for others.

    Example:
        >>> from instar.threat import Linf
        >>> budget(PGD(Linf(8/255), steps=20), 10)
        {'steps': 20, 'restarts': 1, 'forwards': 41}
    """
    if isinstance(attack, PGD) and isinstance(attack.steps, int):
        return {"steps": attack.steps, "restarts": 1, "forwards": 2 * attack.steps + 1}
    told = getattr(attack, "budget", None)
    return dict(told(classes)) if callable(told) else {}
