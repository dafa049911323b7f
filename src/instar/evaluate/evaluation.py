"""The evaluation itself: shards, attacks, records."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import instar
from instar.data.catalogue import CATALOGUE
from instar.data.splits import Split
from instar.errors import UserError
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.clean import Clean
from instar.evaluate.conditions import BATCH_SIZE, SHARD_SIZE, Conditions
from instar.evaluate.examine import examine
from instar.evaluate.progress import Progress, silent
from instar.evaluate.record import Record
from instar.evaluate.recording import recorded, version
from instar.evaluate.shards import Arrays, Outcome, Shard, Store, fetch, make_folder
from instar.evaluate.subject import Subject, examined, one_line
from instar.evaluate.suites import Entry, Suite, build
from instar.evaluate.targets import Case, Normalization, Wishes, resolve
from instar.threat import Ball


def evaluate(
    target: str | Path | nn.Module,
    *,
    data: Any = None,
    root: str | Path | None = None,
    size: int | None = None,
    model: str | nn.Module | None = None,
    model_arguments: dict[str, Any] | None = None,
    suite: str | Callable[[Ball], Suite] = "standard",
    n: int | None = None,
    checkpoint: str = "both",
    norm: str | None = None,
    eps: float | str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    shard_size: int | None = None,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    progress: Progress | None = None,
    normalize: Normalization = "identity",
) -> list[Record]:
    """Measure how robust a model is, and write down what the number depends on.

    Finished parts are kept below ``<out>/shards`` under the hash of everything they depend on: the same evaluation
    again computes nothing, a killed one goes on at the last batch of AutoAttack or the last shard of other attacks,
    and a larger suite repeats no attack that was run.

    Args:
        target: A run folder (its best and last checkpoint), a weights file of ours (``.safetensors`` with its card) or
            of anybody's training code, or a module that returns logits for images in [0, 1].
        data: Name of a data set or path of an image folder (its official test split is used), images, a split, a torch
            Dataset, or a pair of tensors (x, y). None takes what the run or card names.
        root: Folder that data sets lie in; None is the default one.
        size: Height and width for pictures that are decoded on the fly; None takes the run's.
        model: The network that foreign weights belong to, by name or as a module.
        model_arguments: Further arguments of a network given by name, for example ``{"width": 16}``.
        suite: ``"standard"``, ``"quick"``, or a function from a ball to a `Suite`.
        n: The first n images only, or n at even distances where images are sorted by class; None takes all.
        checkpoint: Of a run: ``"best"``, ``"last"``, or ``"both"``.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``; None takes the run's, else the data set's usual one.
        eps: Radius in the unit of inputs in [0, 1], a number or ``"8/255"``; None as for `norm`.
        seed: Seed of random starts and of AutoAttack.
        batch_size: Images attacked at a time; None is 250, as in AutoAttack's reference.
        shard_size: Images between two saves; None is 500. AutoAttack's random numbers depend on it.
        device: Where to run; ``"auto"`` takes a GPU if there is one.
        out: Folder for records. None is ``evaluations`` in the run folder or beside the weights file; for a module,
            nothing is written then.
        progress: Called as the work proceeds.
        normalize: For foreign weights without normalisation buffers: ``"identity"`` (the network sees [0, 1]),
            ``"dataset"`` (the data set's mean and standard deviation) or a pair (mean, std).

    Returns:
        One record for each checkpoint.

    Raises:
        UserError: Anything about target, data, model or attack that the caller can mend, in one line.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> pairs = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
        >>> (record,) = evaluate(net, data=pairs, suite="quick", eps=0.05)
        >>> list(record.scores)
        ['clean', 'pgd_10', 'margin_pgd_20', 'worst_case']
        >>> record.scores["worst_case"].correct <= record.scores["clean"].correct
        True
    """
    conditions = Conditions(
        seed=seed,
        batch_size=BATCH_SIZE if batch_size is None else batch_size,
        shard_size=SHARD_SIZE if shard_size is None else shard_size,
    )
    place = _device(device)
    wishes = Wishes(
        data=data,
        root=root,
        size=size,
        model=model,
        model_arguments=model_arguments,
        checkpoint=checkpoint,
        norm=norm,
        eps=eps,
        normalize=normalize,
        out=out,
    )
    report = silent if progress is None else progress
    cases = resolve(target, wishes)
    for folder in {case.folder for case in cases if case.folder is not None}:
        make_folder(folder)  # before hours of work, not after
    return [_judge(case, build(suite, case.ball), n, conditions, place, report) for case in cases]


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # An empty tensor gives a device its number: "cuda" and "cuda:0" must compare equal.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(name)!r} cannot be used here: {one_line(error)}") from None


def _some(split: Split, n: int) -> Split:
    """The first n images, or n at even distances where the official order is one of classes."""
    by_class = len(split) > n and len(split.labels.unique()) > 1 and bool((split.labels.diff() >= 0).all())
    return split.spread(n) if by_class else split.first(n)


def _judge(
    case: Case, suite: Suite, n: int | None, conditions: Conditions, device: torch.device, report: Progress
) -> Record:
    """Evaluate one case."""
    split = case.split if n is None else _some(case.split, n)
    if len(split) == 0:
        raise UserError(f"there is nothing to evaluate on: {split.images.info.title} has no such images")
    _check_labels(case, split.labels)
    case = Case(**{**case.__dict__, "split": split})
    store = Store(None if case.folder is None else case.folder / "shards")
    first, *_ = fetch(split, start=0, stop=min(len(split), conditions.batch_size), device=device)
    with examined(case.model, first, device=device) as subject:
        _check_classes(case, subject)
        clean = Clean.measure(case, subject, conditions, report)
        identity = _identity(case, subject, conditions)
        outcomes = {
            entry.name: _attack(entry, case, subject, clean, conditions, store, identity, report)
            for entry in suite.entries
        }
        record = recorded(case, suite, subject, clean, outcomes, conditions, identity)
    return record if case.folder is None else record.write(case.folder)


def _check_labels(case: Case, labels: torch.Tensor) -> None:
    count = len(case.split.classes)
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise UserError(
            f"labels of {case.split.images.info.title} must be in 0..{count - 1}; got {int(labels.min())}.."
            f"{int(labels.max())}"
        )


def _check_classes(case: Case, subject: Subject) -> None:
    wanted = len(case.split.classes)
    # Data given without class names are known by their largest label only, so more outputs than that are no mistake.
    named = case.split.images.info.name in CATALOGUE
    if subject.classes < wanted or (named and subject.classes != wanted):
        raise UserError(
            f"the model has {subject.classes} outputs, but {case.split.images.info.title} has {wanted} classes. Is it "
            "made for another data set?"
        )


def _attack(
    entry: Entry,
    case: Case,
    subject: Subject,
    clean: Clean,
    conditions: Conditions,
    store: Store,
    identity: dict[str, Any],
    report: Progress,
) -> Outcome:
    """Run one attack on all shards, taking over what is stored."""
    total = len(case.split)
    found: list[Outcome] = []
    report(entry.name, 0, total, 0)
    for shard in clean.shards(case, subject.device):
        before = sum(int(outcome.robust.sum()) for outcome in found)
        key = store.key(type(entry.attack).__name__.lower(), shard.number, _depends(entry, shard, identity))

        def save(arrays: Arrays, key: str = key, shard: Shard = shard) -> None:
            store.put(key, {**arrays, "probe": shard.probe})

        def tick(fraction: float, robust: int, shard: Shard = shard, before: int = before) -> None:
            report(entry.name, shard.start + int(fraction * len(shard)), total, before + robust)

        try:
            outcome = examine(
                entry.attack,
                subject,
                shard,
                seed=conditions.seed,
                batch_size=conditions.batch_size,
                everyone=entry.everyone,
                stored=_known(store.get(key), shard),
                save=save,
                tick=tick,
            )
        except UserError:
            raise
        except torch.OutOfMemoryError:
            raise UserError(
                f"{entry.title} needs more memory than there is for {conditions.batch_size} images at a time; give a "
                "smaller batch_size"
            ) from None
        except Exception as error:  # foreign models fail in any way, also midway; what was computed is kept
            kept = "" if store.folder is None else f"; what was finished is kept in {store.folder}"
            raise UserError(
                f"{entry.title} stopped at images {shard.start} to {shard.start + len(shard) - 1}: "
                f"{type(error).__name__}: {one_line(error)}{kept}"
            ) from error
        found.append(outcome)
        report(entry.name, shard.start + len(shard), total, before + int(outcome.robust.sum()))
    return Outcome(
        robust=np.concatenate([outcome.robust for outcome in found]),
        broken_by=np.concatenate([outcome.broken_by for outcome in found]),
        stages=found[0].stages,
        flags=tuple(sorted({flag for outcome in found for flag in outcome.flags})),
        seconds=sum(outcome.seconds for outcome in found),
        reused=all(outcome.reused for outcome in found),
    )


def _depends(entry: Entry, shard: Shard, identity: dict[str, Any]) -> dict[str, Any]:
    """Everything that an attack's verdicts on a shard depend on."""
    reference = {"pyautoattack": version("pyautoattack")} if isinstance(entry.attack, AutoAttack) else {}
    scope = {"everyone": True} if entry.everyone else {}
    return {**identity, **reference, **scope, "attack": repr(entry.attack), "images": shard.digest}


def _known(stored: Arrays | None, shard: Shard) -> Arrays | None:
    """What is stored, if it belongs to this model: equal weights do not make equal models (a changed logit scale)."""
    if stored is None or stored.get("probe") is None or stored["probe"].shape != shard.probe.shape:
        return None
    size = float(np.abs(shard.probe).max())
    return stored if np.allclose(stored["probe"], shard.probe, rtol=1e-3, atol=1e-4 * size) else None


def _identity(case: Case, subject: Subject, conditions: Conditions) -> dict[str, Any]:
    """What all the verdicts of an evaluation depend on besides images and attack."""
    # Addresses of functions differ from process to process.
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(subject.model))
    return {
        "weights": case.weights,
        "structure": hashlib.sha256(f"{type(subject.model).__qualname__} {structure}".encode()).hexdigest(),
        "seed": conditions.seed,
        "batch_size": conditions.batch_size,
        "shard_size": conditions.shard_size,
        "precision": "float32",
        "folded": subject.folded,
        "device": subject.device.type,
        "torch": torch.__version__,
        "instar": instar.__version__,
    }
