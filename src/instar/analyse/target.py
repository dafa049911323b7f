"""What is analysed: a model with its images, or a run as its files tell it; and long work in portions that resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import instar
from instar.analyse.analysis import FOLDER, Found, stored
from instar.arrays import Arrays
from instar.data import TestSplit, TrainSplit, hold_out, load
from instar.data.splits import Split
from instar.devices import device_name, numbered_device
from instar.errors import UserError, unknown
from instar.evaluate.conditions import BATCH_SIZE, SHARD_SIZE
from instar.evaluate.evaluation import check_classes, check_images, check_labels, some_of
from instar.evaluate.shards import Store, fetch
from instar.evaluate.subject import Subject, examined
from instar.evaluate.targets import Case, Normalization, Wishes, described, resolve
from instar.expression import number
from instar.models import origin
from instar.randomness import generator
from instar.report.stored import StoredRun, UnavailableError
from instar.report.stored import read as read_run
from instar.runs import CHECKPOINTS, KEPT
from instar.threat import Ball

SPLITS = ("train", "test")

Tick = Callable[[str, int, int], None]
"""Called as work proceeds: with what is being done, how many images are done, and how many there are."""


def silent(what: str, done: int, total: int) -> None:
    """A `Tick` that nobody hears."""


@dataclass(frozen=True)
class Portion:
    """Consecutive images of a split.

    Attributes:
        x: Images (B, C, H, W), float32 in [0, 1], on the device.
        y: Labels (B,), on the device.
        index: Official positions (B,), on the CPU.
        generator: Source of random numbers that belongs to the seed and to the first image of the portion.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    generator: torch.Generator


@dataclass(frozen=True, eq=False)
class Target:
    """One model on some images, or one run as its files tell it.

    Attributes:
        label: Model and checkpoint in words, for example ``"GAIRAT, best"``.
        checkpoint: ``"best"``, ``"last"``, the stem of a weights file, or ``"run"`` for the files of a run.
        run: The run, or None for weights without one.
        case: Model, images, threat model and what is known of the weights; None for the files of a run.
        which: ``"train"`` (images that were trained on) or ``"test"``, if there is a model.
        images: Which images these are, in words.
        device: Where to compute.
        seed: Seed of all that is random.
        batch_size: Images in one forward pass.
        shard_size: Images between two saves.
        folder: Where results lie, or None to write nothing.
        tick: Called as the work proceeds.
    """

    label: str
    checkpoint: str
    run: StoredRun | None = None
    case: Case | None = None
    which: str = "test"
    images: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    batch_size: int = BATCH_SIZE
    shard_size: int = SHARD_SIZE
    folder: Path | None = None
    tick: Tick = silent

    @property
    def model_case(self) -> Case:
        """The case.

        Raises:
            UnavailableError: There is no model.
        """
        if self.case is None:
            raise UnavailableError(f"{self.label} has no model here, only files")
        return self.case

    @property
    def split(self) -> Split:
        """The images that are looked at."""
        return self.model_case.split

    @property
    def ball(self) -> Ball:
        """The threat model: the one that was trained against, unless another was asked for."""
        return self.model_case.ball

    def require_run(self) -> StoredRun:
        """The run.

        Raises:
            UnavailableError: There is none, only weights.
        """
        if self.run is None:
            raise UnavailableError(f"{self.label} is a weights file: its training left no log and no instance tables")
        return self.run

    def found(self, name: str) -> list[Found]:
        """Results of another analysis for this run (or weights), which were stored before; none if there are none."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return [one for one in stored(self.folder) if one.name == name and not one.compares]

    @contextlib.contextmanager
    def examined(self) -> Iterator[Subject]:
        """The model as attacks see it: frozen, in float32 and eval mode, with a faster stand-in; left as it was found.

        Yields:
            The subject.

        Raises:
            UserError: The model does not fit the images.
            UnavailableError: It gives no gradients.
        """
        split = self.split
        check_images(self.model_case)
        first, *_ = fetch(split, start=0, stop=min(len(split), self.batch_size), device=self.device)
        with examined(self.model_case.model, first, device=self.device) as subject:
            check_classes(self.model_case, subject)
            if subject.black_box:
                raise UnavailableError(f"{self.label} gives no gradients, which this analysis needs")
            yield subject

    def portions(self, start: int = 0, stop: int | None = None) -> Iterator[Portion]:
        """The images from `start` to `stop` of the split, in batches."""
        stop = len(self.split) if stop is None else stop
        for begin in range(start, stop, self.batch_size):
            x, y, index, _ = fetch(self.split, start=begin, stop=min(begin + self.batch_size, stop), device=self.device)
            draws = generator(self.seed, step=int(index[0]), purpose="analyse", device=self.device)
            yield Portion(x, y, index, draws)

    @cached_property
    def store(self) -> Store:
        """Where finished parts of long analyses are kept, so that an interrupted one goes on."""
        return Store(None if self.folder is None else self.folder / "parts")

    def piecewise(
        self,
        name: str,
        subject: Subject,
        depends: Mapping[str, Any],
        compute: Callable[[Portion], Mapping[str, Tensor]],
    ) -> tuple[Arrays, float]:
        """Compute numbers for every image, portion by portion, and keep what is finished.

        Args:
            name: What is computed, for file names and progress.
            subject: The model, as `examined` gives it.
            depends: All that the numbers depend on beside model, images, seed and batches; values that JSON can hold.
            compute: From a batch to its numbers, name → (B, ...).

        Returns:
            The numbers for all images, name → (n, ...), with ``index`` and ``label`` (n,), and the seconds it took over
            all attempts.
        """
        total, seconds = len(self.split), 0.0
        pieces: list[Arrays] = []
        self.tick(name, 0, total)
        for start in range(0, total, self.shard_size):
            stop = min(start + self.shard_size, total)
            x, y, index, digest = fetch(self.split, start=start, stop=stop, device=self.device)
            probe = subject.model(x[:8]).cpu().numpy()
            key = self.store.key(name, start, {**self.identity(subject), **depends, "images": digest})
            piece = self.store.get(key)
            if piece is None or not _close(piece.get("probe"), probe):
                begun = time.perf_counter()
                parts: list[Mapping[str, Tensor]] = []
                for rows in torch.arange(stop - start).split(self.batch_size):
                    place = int(index[rows[0]])
                    draws = generator(self.seed, step=place, purpose=f"analyse {name}", device=self.device)
                    chosen = rows.to(self.device)
                    parts.append(compute(Portion(x[chosen], y[chosen], index[rows], draws)))
                    self.tick(name, start + int(rows[-1]) + 1, total)
                piece = {column: torch.cat([part[column] for part in parts]).cpu().numpy() for column in parts[0]}
                piece |= {"index": index.numpy(), "label": y.cpu().numpy(), "probe": probe}
                piece["seconds"] = np.array(time.perf_counter() - begun)
                self.store.put(key, piece)
            self.tick(name, stop, total)
            seconds += float(piece.pop("seconds"))
            del piece["probe"]
            pieces.append(piece)
        return {column: np.concatenate([piece[column] for piece in pieces]) for column in pieces[0]}, seconds

    def identity(self, subject: Subject) -> dict[str, Any]:
        """What all numbers about a model depend on besides images and attack."""
        # Addresses of functions differ from process to process.
        structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(subject.model))
        return {
            "weights": self.model_case.weights,
            "structure": hashlib.sha256(f"{type(subject.model).__qualname__} {structure}".encode()).hexdigest(),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "shard_size": self.shard_size,
            "folded": subject.folded,
            "device": subject.device.type,
            "torch": torch.__version__,
            "instar": instar.__version__,
        }

    def protocol(self, **more: Any) -> dict[str, Any]:
        """What numbers depend on, as a result holds it.

        Args:
            **more: What the analysis adds, for example ``attack``, ``n`` and ``seconds``.

        Returns:
            Values that JSON can hold, with a ``key`` that differs when anything does that numbers depend on.
        """
        known: dict[str, Any] = {"label": self.label, "checkpoint": self.checkpoint, "seed": self.seed}
        known["target"] = str(self.run.folder) if self.run is not None else None
        if self.run is not None:
            known |= {"method": self.run.title, "epochs": self.run.epochs, "training_seed": self.run.seed}
            known |= {"train_images": self.run.config["data"].get("train_images")}
            known |= {"model": self.run.model, "threat": self.run.threat}
            known |= {"data": {"name": self.run.config["data"]["name"], "title": self.run.data}}
        case = self.case
        if case is not None:
            made, info = origin(case.model), case.split.images.info
            known |= {
                "target": case.target,
                "split": self.which,
                "images": self.images,
                "n": len(case.split),
                "data": {"name": info.name, "title": info.title, "classes": list(case.split.classes)},
                "norm": case.ball.norm,
                "eps": number(case.ball.radius),
                "weights_sha256": case.weights,
                "epoch": case.checkpoint.get("epoch"),
                "rule": case.checkpoint.get("rule"),
                "model": {
                    "architecture": made.architecture if made else type(case.model).__name__,
                    "width": made.arguments.get("width") if made else None,
                    "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
                },
                "training": str(case.training.get("method")),
                "bn_mode": "eval",
                "precision": "float32",
            }
        known |= more
        numbers = {name: value for name, value in known.items() if name not in ("seconds", "target", "label")}
        known["key"] = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
        known["device"] = device_name(self.device)
        known["threads"] = torch.get_num_threads()
        known["versions"] = {
            "instar": instar.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        return known


def open_targets(
    source: str | Path | torch.nn.Module,
    *,
    which: str = "test",
    checkpoint: str = "both",
    data: Any = None,
    root: str | Path | None = None,
    model: str | torch.nn.Module | None = None,
    model_arguments: Mapping[str, Any] | None = None,
    normalize: Normalization = "identity",
    n: int | None = 1000,
    norm: str | None = None,
    eps: float | str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    tick: Tick | None = None,
) -> list[Target]:
    """The models that a run folder or weights stand for, each with its images.

    Args:
        source: A run folder (its best and last checkpoint), a weights file with its card, or a module (with `data`).
        which: ``"test"`` (the official test images) or ``"train"`` (those that the run was trained on; those it held
            out for choosing checkpoints are left out).
        checkpoint: Of a run: ``"best"``, ``"last"``, ``"both"``, ``"epoch_009"`` and the like, or ``"kept"`` for every
            epoch that was kept.
        data: Name of a data set, images, a split or a pair of tensors, as `instar.evaluate.evaluate` takes it; None
            takes what the run or card names.
        root: Folder that data sets lie in; None is the default one.
        model: The network that foreign weights belong to, by name or as a module.
        model_arguments: Further arguments of a network given by name, for example ``{"width": 16}``.
        normalize: Of foreign weights, as for `instar.evaluate.evaluate`.
        n: So many images: the first in official order, or at even distances where they are sorted by class; None is
            all.
        norm: Threat model; None takes the one that was trained against.
        eps: Its radius, a number or ``"8/255"``; None as for `norm`.
        seed: Of all that is random.
        batch_size: Images in one forward pass; None is 250.
        device: Where to compute; ``"auto"`` takes a GPU if there is one.
        out: Folder for results. None is ``analyses`` in the run folder or beside the weights; for a module, nothing is
            written then.
        tick: Called as the work proceeds.

    Returns:
        One target for each checkpoint that there is.

    Raises:
        UserError: Something is missing, does not exist, or does not fit.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> pairs = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
        >>> (target,) = open_targets(net, data=pairs, eps=0.1)
        >>> len(target.split), target.ball, target.label
        (20, Linf(0.1), 'Sequential')
    """
    if which not in SPLITS:
        raise unknown("split", which, SPLITS)
    place = numbered_device(device)
    run, where = _run_of(source)
    wishes = Wishes(
        data=data,
        root=root,
        model=model,
        model_arguments=model_arguments,
        checkpoint=checkpoint,
        norm=norm,
        eps=eps,
        normalize=normalize,
    )
    if run is not None and root is None:
        wishes = replace(wishes, root=run.config["training"].get("root"))
    if out is not None:
        where = Path(out)
    targets = []
    trained: Split | None = None
    for case in resolve(source, wishes):
        split = case.split
        if which == "train":
            split = trained = trained or _trained_on(case, run, wishes)
        elif isinstance(split, TrainSplit):
            raise UserError("the images given as data are training images; say so with which='train'")
        every = split
        split = split if n is None else some_of(split, n)
        if len(split) == 0:
            raise UserError(f"there is nothing to analyse: {split.images.info.title} has no such images")
        check_labels(case, split.labels)
        targets.append(
            Target(
                label=f"{run.title}, {_epoch_or(case.name)}" if run is not None else _called(case),
                checkpoint=case.name,
                run=run,
                case=replace(case, split=split),
                which=which,
                images=_trained_words(split, every) if which == "train" else described(split),
                device=place,
                seed=seed,
                batch_size=BATCH_SIZE if batch_size is None else batch_size,
                folder=where,
                tick=tick or silent,
            )
        )
    return targets


def open_files(source: str | Path, *, seed: int = 0, out: str | Path | None = None, tick: Tick | None = None) -> Target:
    """A run as its files tell it, without its model and images.

    Args:
        source: The run folder, or a weights file.
        seed: Of all that is random.
        out: Folder for results; None as for `open_targets`.
        tick: Called as the work proceeds.

    Returns:
        The target, whose checkpoint is ``"run"``.

    Raises:
        UserError: The folder holds no run, or a file is damaged.
    """
    run, where = _run_of(source)
    if run is None:
        raise UnavailableError(f"{source} is a weights file: its training left no log and no instance tables")
    place = where if out is None else Path(out)
    return Target(label=run.title, checkpoint="run", run=run, folder=place, seed=seed, tick=tick or silent)


def _epoch_or(name: str) -> str:
    """A checkpoint in words: epochs count from 1 in words, from 0 in names of files."""
    kept = KEPT.fullmatch(name)
    return name if kept is None else f"epoch {int(kept[1]) + 1}"


def _called(case: Case) -> str:
    """A name for weights without a run: that of their folder too where the file's own says only which checkpoint."""
    path = Path(case.target)
    return f"{path.parent.name}, {path.stem}" if path.stem in CHECKPOINTS else path.stem


def _run_of(source: Any) -> tuple[StoredRun | None, Path | None]:
    """The run that a path belongs to, if any, and where results go."""
    if isinstance(source, torch.nn.Module):
        return None, None
    path = Path(source).expanduser()
    if path.is_dir():
        return read_run(path), path / FOLDER
    if not path.exists():
        raise UserError(f"there is no run folder or weights file {path}")
    above = path.parent.parent
    if path.parent.name == "checkpoints" and (above / "run.json").is_file():
        return read_run(above), above / FOLDER
    return None, path.parent / FOLDER


def _trained_on(case: Case, run: StoredRun | None, wishes: Wishes) -> TrainSplit:
    """The images that weights were fitted to, without those by which the checkpoint was chosen."""
    if wishes.data is not None and not isinstance(wishes.data, (str, Path)):
        if isinstance(case.split, TrainSplit):
            return case.split
        if isinstance(case.split, TestSplit) and getattr(case.split.images, "split", None) != "test":
            return TrainSplit(case.split.images, case.split.indices)
        raise UserError("the images given as data are test images; leave which='train' away")
    info = case.split.images.info
    known: Mapping[str, Any] = run.config["data"] if run is not None else {"name": info.name, "size": info.shape[1]}
    name = wishes.data or known.get("path") or known["name"]
    images = load(name, split="train", root=wishes.root, size=known.get("size"))
    chosen = run.config["selection"] if run is not None and wishes.data is None else None
    if chosen is None:
        return TrainSplit(images)
    return hold_out(images, selection=int(chosen["n"]), seed=int(chosen.get("seed", 0)))[0]


def _trained_words(split: Split, every: Split) -> str:
    """Which of the images that were trained on, in words."""
    title, count, total = every.images.info.title, len(split), len(every)
    if count == total:
        return f"all {total:,} training images of {title}" + _but_held_out(every)
    which = "first" if torch.equal(split.indices, every.indices[:count]) else "evenly spread"
    return f"{which} {count:,} of the {total:,} training images of {title}" + _but_held_out(every)


def _but_held_out(every: Split) -> str:
    left = len(every.images) - len(every)
    return f" (without {left:,} held out)" if left else ""


def _close(stored: np.ndarray | None, probe: np.ndarray) -> bool:
    """Whether stored numbers belong to this model: equal weights do not make equal models (a changed logit scale)."""
    if stored is None or stored.shape != probe.shape:
        return False
    return bool(np.allclose(stored, probe, rtol=1e-3, atol=1e-4 * float(np.abs(probe).max())))
