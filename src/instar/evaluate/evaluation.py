"""The evaluation itself: shards, attacks, records."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import instar
from instar.data.catalogue import CATALOGUE
from instar.data.splits import Split
from instar.devices import numbered_device
from instar.errors import UserError
from instar.evaluate.adaptive import with_twin
from instar.evaluate.black_box import check_gradients, usual_suite
from instar.evaluate.clean import Clean
from instar.evaluate.conditions import BATCH_SIZE, SHARD_SIZE, Conditions
from instar.evaluate.corruptions import PublishedCorruption
from instar.evaluate.fitting import fitting
from instar.evaluate.precision import searcher
from instar.evaluate.progress import Progress, announce, silent
from instar.evaluate.record import Record
from instar.evaluate.recording import recorded
from instar.evaluate.shards import Store, fetch, make_folder
from instar.evaluate.subject import Subject, examined
from instar.evaluate.suites import Suite, build
from instar.evaluate.targets import Case, Normalization, Wishes, resolve
from instar.evaluate.team import Team
from instar.evaluate.work import TooLargeError, Work
from instar.models import origin
from instar.models.normalize import Normalize
from instar.runs import CHECKPOINTS
from instar.threat import Ball

TRIAL = 32
"""Images that a model is tried with before the batch size is known."""


def evaluate(
    target: str | Path | nn.Module,
    *,
    data: Any = None,
    root: str | Path | None = None,
    size: int | None = None,
    model: str | nn.Module | None = None,
    model_arguments: dict[str, Any] | None = None,
    suite: str | Callable[[Ball], Suite] | None = None,
    n: int | None = None,
    checkpoint: str | None = None,
    norm: str | None = None,
    eps: float | str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    shard_size: int | None = None,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    progress: Progress | None = None,
    normalize: Normalization = "identity",
    trust: bool = False,
    precision: str = "float32",
    save_examples: bool = False,
    team: Team | None = None,
) -> list[Record]:
    """Measure how robust a model is, and write down what the number depends on.

    An attack that fails leaves a record of the ones before it in ``<out>/partial``.

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
        suite: Name of one of `SUITES`, or a function from a ball to a `Suite`. None is ``"standard"``, and for a model
            without gradients ``"black_box"``.
        n: The first n images only, or n at even distances where images are sorted by class; None takes all.
        checkpoint: Of a run: ``"best"``, ``"last"``, ``"both"``; ``"online"``, the weights that the optimiser itself
            trained where best and last hold their average; or ``"all"``. None is ``"both"``, and for the suite
            ``adaptive`` ``"all"``.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``; None takes the run's, else the data set's usual one.
        eps: Radius in the unit of inputs in [0, 1], a number or ``"8/255"``; None as for `norm`.
        seed: Seed of random starts and of AutoAttack.
        batch_size: Images attacked at a time; None is the 250 of AutoAttack's reference, halved until they fit into
            memory. Verdicts depend on it, so it is recorded, and a resumed evaluation keeps it.
        shard_size: Images between two saves; None is 500. AutoAttack's random numbers depend on it.
        device: Where to run; ``"auto"`` takes a GPU if there is one.
        out: Folder for records. None is ``evaluations`` in the run folder or beside the weights file; for a module,
            nothing is written then.
        progress: Called as the work proceeds.
        normalize: For foreign weights without normalisation buffers: ``"identity"`` (the network sees [0, 1]),
            ``"dataset"`` (the data set's mean and standard deviation), ``"auto"`` (what fits some labelled images
            best), a pair (mean, std) or the same as text, ``"0.5/0.5"``.
        trust: Whether a TorchScript program may be run; it can run any code.
        precision: ``"float32"``, or ``"bf16"``: attacks search on a copy in bfloat16 and the model itself confirms
            what they find. About twice as fast, and no longer the reference AutoAttack; the record says so.
        save_examples: Whether to write one adversarial example for every broken point, in float32, to
            ``<suite>-<checkpoint>-examples.safetensors`` (see `instar.evaluate.read_examples`). Attacks that were run
            before without keeping examples are run again.
        team: The processes that share the work, ``Team.from_environment()`` under ``torchrun``; None is this one. The
            record does not depend on their number.

    Returns:
        One record for each checkpoint; in processes other than the first an empty list.

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
        precision=precision,
    )
    team = Team() if team is None else team
    place = numbered_device(device, share=None if team.alone else team.local)
    wishes = Wishes(
        data=data,
        root=root,
        size=size,
        model=model,
        model_arguments=model_arguments,
        checkpoint="both" if checkpoint is None else checkpoint,
        norm=norm,
        eps=eps,
        normalize=normalize,
        out=out,
        trust=trust,
    )
    report = silent if progress is None else progress
    cases = resolve(target, wishes)
    if checkpoint is None and isinstance(target, (str, Path)) and Path(target).expanduser().is_dir():
        wanted = built(suite, cases[0]).twin_steps > 0 and cases[0].name in CHECKPOINTS
        cases = resolve(target, replace(wishes, checkpoint="all")) if wanted else cases
    if save_examples and any(case.folder is None for case in cases):
        raise UserError("give out with save_examples: the examples of a module have no folder of their own")
    for folder in {case.folder for case in cases if case.folder is not None}:
        make_folder(folder)  # before hours of work, not after
    settings = _Settings(n, conditions, batch_size is None, place, report, team, save_examples)
    # The reference seeds the current GPU, which would else be the first one for all processes.
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        judged = [_judge(case, built(suite, case), settings) for case in cases]
    return [record for record in judged if record is not None]


def built(suite: str | Callable[[Ball], Suite] | None, case: Case) -> Suite:
    """The suite that a case is judged by."""
    named = usual_suite(case.model) if suite is None else suite
    made = build(named, case.ball, shape=case.split.images.info.shape)
    _check_published(made, case)
    check_gradients(case.model, made)
    return with_twin(made, case.twin, case.ball)


def _check_published(suite: Suite, case: Case) -> None:
    """Refuse published corruptions of other images than the case has, and of files that are not there.

    Raises:
        UserError: In one line, before anything is computed.
    """
    info = case.split.images.info
    for attack in {e.attack for e in suite.entries if isinstance(e.attack, PublishedCorruption)}:
        assert isinstance(attack, PublishedCorruption)
        wanted = {"CIFAR-10-C": "cifar10", "CIFAR-100-C": "cifar100"}.get(attack.data)
        other = info.name in CATALOGUE and info.name != wanted
        if wanted is not None and (other or info.shape != (3, 32, 32)):
            raise UserError(
                f"the suite {suite.name} is of the test images of {CATALOGUE[wanted].title}; got {info.title}. For "
                "other images the suite corruptions computes the same fifteen"
            )
        if not attack.folder.is_dir():
            raise UserError(
                f"there is no {attack.folder}; unpack the published archive there, or run the suite corruptions, which "
                "computes them"
            )


def some_of(split: Split, n: int) -> Split:
    """The first n images, or n at even distances where the official order is one of classes.

    Args:
        split: Where they come from.
        n: How many; more than there are means all.
    """
    by_class = len(split) > n and len(split.labels.unique()) > 1 and bool((split.labels.diff() >= 0).all())
    return split.spread(n) if by_class else split.first(n)


@dataclass(frozen=True)
class _Settings:
    """What all cases of a call share.

    Attributes:
        n: Number of images, or None for what the suite says.
        conditions: What attacks are run under.
        automatic: Whether the batch size is chosen here.
        device: Where to run.
        report: Hears how far it is.
        team: The processes.
        examples: Whether adversarial examples are kept.
    """

    n: int | None
    conditions: Conditions
    automatic: bool
    device: torch.device
    report: Progress
    team: Team
    examples: bool


def _judge(case: Case, suite: Suite, settings: _Settings) -> Record | None:
    """Evaluate one case; None in all processes but the first."""
    n = suite.images if settings.n is None else settings.n
    split = case.split if n is None else some_of(case.split, n)
    if len(split) == 0:
        raise UserError(f"there is nothing to evaluate on: {split.images.info.title} has no such images")
    check_labels(case, split.labels)
    check_images(case)
    case = Case(**{**case.__dict__, "split": split})
    store = Store(None if case.folder is None else case.folder / "shards")
    conditions = settings.conditions
    trial = min(conditions.batch_size, TRIAL) if settings.automatic else conditions.batch_size
    first, *_ = fetch(split, start=0, stop=min(len(split), trial), device=settings.device)
    with examined(case.model, first, device=settings.device) as subject:
        check_classes(case, subject)
        search = searcher(subject, first, precision=conditions.precision)
        if settings.automatic:
            conditions = replace(conditions, batch_size=_batch_size(case, subject, first[:1], store, settings))
        while True:
            try:
                return _examined(case, suite, subject, search, conditions, store, settings)
            except TooLargeError as error:
                # Only what is chosen here can be chosen again, and only where nobody else has chosen the same.
                if not settings.automatic or not settings.team.alone or conditions.batch_size == 1:
                    raise UserError(str(error)) from None
                conditions = replace(conditions, batch_size=conditions.batch_size // 2)
                _remember(case, subject, store, settings, conditions.batch_size)


def _examined(
    case: Case,
    suite: Suite,
    subject: Subject,
    search: nn.Module | None,
    conditions: Conditions,
    store: Store,
    settings: _Settings,
) -> Record | None:
    """Run a suite on a model that is ready for it."""
    team = settings.team
    name = team.next_evaluation()
    plain = {entry.name for entry in suite.entries if entry.everyone and not entry.diagnosis}
    announce(settings.report, case.name, {entry.name: entry.title for entry in suite.entries}, plain)
    clean = Clean.measure(case, subject, conditions, settings.report if team.leads else silent)
    identity = _identity(case, subject, conditions)
    team.agree(f"{name}/identity", f"{sorted(identity.items())} {clean.digests}", what="model, data or settings")
    work = Work(
        name=name,
        case=case,
        entries=suite.entries,
        subject=subject,
        clean=clean,
        conditions=conditions,
        store=store,
        identity=identity,
        team=team,
        report=settings.report,
        search=search,
        examples=settings.examples,
    )
    try:
        work.do()
        if not team.leads:
            return None
        work.wait()
    except Exception as error:
        if team.leads and case.folder is not None and not isinstance(error, TooLargeError):
            with contextlib.suppress(UserError):  # the first mistake is the one to tell of
                done = work.finished()
                some = replace(suite, entries=tuple(entry for entry in suite.entries if entry.name in done))
                recorded(case, some, subject, clean, done, conditions, identity, team.size).write_partial(
                    case.folder, stopped=str(error)
                )
        raise
    record = recorded(case, suite, subject, clean, work.finished(), conditions, identity, team.size)
    if case.folder is None:
        return record
    if settings.examples:
        work.gather(record.instances["broken_by"]).write(case.folder / f"{suite.name}-{case.name}-examples.safetensors")
    return record.write(case.folder)


def _batch_size(case: Case, subject: Subject, image: torch.Tensor, store: Store, settings: _Settings) -> int:
    """What fits here; a choice made before stands, since verdicts depend on it."""
    known = store.get(_choice(case, subject, settings))
    team = settings.team
    sharing = team.size if settings.device.type == "cpu" else 1
    size = fitting(subject, image, processes=sharing) if known is None else int(known["batch_size"])
    size = team.fewest(f"{team.next_evaluation()}/batch size", size)
    if team.leads and known is None:
        _remember(case, subject, store, settings, size)
    return size


def _choice(case: Case, subject: Subject, settings: _Settings) -> str:
    """The name under which a chosen batch size is kept."""
    identity = _identity(case, subject, replace(settings.conditions, batch_size=1))
    return Store.key("batch_size", 0, identity)


def _remember(case: Case, subject: Subject, store: Store, settings: _Settings, size: int) -> None:
    store.put(_choice(case, subject, settings), {"batch_size": np.array(size)})


def check_labels(case: Case, labels: torch.Tensor) -> None:
    """Refuse labels (n,) beyond the classes of a case's data set.

    Raises:
        UserError: There are some.
    """
    count = len(case.split.classes)
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise UserError(
            f"labels of {case.split.images.info.title} must be in 0..{count - 1}; got {int(labels.min())}.."
            f"{int(labels.max())}"
        )


def check_images(case: Case) -> None:
    """Refuse images that a network of ours was not made for, before it fails on them.

    Raises:
        UserError: It takes other channels, or a registered data set has other classes; with both sides in a line.
    """
    made, info = origin(case.model), case.split.images.info
    told = made.arguments if made is not None else {}
    channels, size, classes = (told.get(name) for name in ("channels", "image_size", "classes"))
    misfit = isinstance(channels, int) and channels != info.shape[0]
    misfit |= isinstance(classes, int) and info.name in CATALOGUE and classes != len(case.split.classes)
    if misfit:
        sides = f" of {size}×{size}" if isinstance(size, int) else ""
        raise UserError(
            f"the network of {case.target} takes {_several(channels, 'channel')}{sides} and knows "
            f"{_several(classes, 'class', 'classes')}; {info.title} has {_several(info.shape[0], 'channel')} of "
            f"{info.shape[1]}×{info.shape[2]} and {len(case.split.classes)} classes. Is it made for this data set?"
        )


def _several(count: object, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def check_classes(case: Case, subject: Subject) -> None:
    """Refuse a model that does not have the outputs which its data set needs.

    Raises:
        UserError: It has fewer, or others than a registered data set has classes.
    """
    wanted = len(case.split.classes)
    channels = {part.mean.shape[1] for part in subject.model.modules() if isinstance(part, Normalize)}
    given = case.split.images.info.shape[0]
    if channels and given not in channels:  # a layer of three means takes images of one channel without a word
        raise UserError(
            f"the model is made for images of {max(channels)} channels, {case.split.images.info.title} has {given}"
        )
    # Data given without class names are known by their largest label only, so more outputs than that are no mistake.
    named = case.split.images.info.name in CATALOGUE
    if subject.classes < wanted or (named and subject.classes != wanted):
        raise UserError(
            f"the model has {subject.classes} outputs, but {case.split.images.info.title} has {wanted} classes. Is it "
            "made for another data set?"
        )


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
        "precision": conditions.precision,
        "folded": subject.folded,
        "device": subject.device.type,
        "torch": torch.__version__,
        "instar": instar.__version__,
    }
