"""The schema of a run: one set of names for flags, YAML files and Python."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from instar.data import AUGMENTATIONS, DatasetInfo, Images, extra_count
from instar.errors import UserError, first_line, unknown
from instar.expression import assign, express, parse
from instar.method import Method
from instar.methods import RECIPES, Recipe
from instar.models import create
from instar.own_code import own_function
from instar.randomness import key
from instar.schedules import share_of
from instar.signals import CrossEntropy, Signal
from instar.weightspace import EMA

GUARDS = frozenset({"on_nan", "loss_limit", "on_collapse", "probe_every", "deterministic"})
"""Settings of guards: they decide no number while nothing goes wrong, and what they did is in the state."""
INDIFFERENT = GUARDS | frozenset(
    {"root", "device", "accelerate", "accumulate", "shard", "save_every", "save_steps", "keep_every", "keep_newest"},
)
"""Settings that decide no number of a run, only where it is made and what is kept of it: a resume may change them."""


@dataclass(frozen=True)
class Settings:
    """Everything about a training run but the method.

    Attributes:
        data: Name of a data set (``instar data list``), or the path of an image folder.
        root: Folder that data sets lie in; None means the environment's INSTAR_DATA, else a cache folder.
        size: Height and width for pictures that are decoded on the fly; None means the data set's usual size.
        model: Name of a network; None takes ``small_cnn`` for images below 32 pixels, else ``resnet18``.
        width: Channels of the network's first stage; None is the published width.
        stem: First layer of a ResNet: ``cifar`` (3×3), ``imagenet`` (7×7 with stride 2, then pooling), or ``auto``
            (``imagenet`` from 96 pixels on).
        init: Weights to begin from (``.safetensors`` or a foreign checkpoint); None begins from random weights.
        epochs: Passes over the training split.
        batch_size: Instances in a step, of all processes together.
        accumulate: Pieces in which each process treats its share of a batch, one after the other, to save memory.
        batch_norm: Statistics of BatchNorm where several processes train: ``sync`` (of the global batch), ``local`` (of
            each process's share), or, in one process too, ``frozen`` (those of the network that training begins from).
        shard: ``full`` divides every parameter, its gradient, momentum and average among the processes (FSDP2), for
            networks that one GPU does not hold; ``none`` gives all of it to each.
        optimizer: ``sgd`` or ``adamw``.
        nesterov: Whether the momentum of SGD is Nesterov's.
        lr: Highest learning rate; None means 0.2 for SGD with one-cycle, 0.1 for SGD otherwise, 0.001 for AdamW.
        schedule: ``one-cycle`` (rises over the first quarter, then falls to 0 by a cosine), ``cosine``, ``cyclic``
            (a line up to the rate at 40 % of the run and down to 0), ``piecewise`` (see `drops`), or ``constant``.
        drops: Pairs (time, factor) of the piecewise schedule: from that share of the run on (an epoch, if above 1) the
            rate is the highest one times the factor.
        momentum: Momentum of SGD, or β₁ of AdamW.
        weight_decay: Weight decay.
        decay_norm: Whether normalisation and biases decay too, as in the published codes.
        ema: Decay of the averaged weights, which are evaluated and saved; 0 keeps none.
        label_smoothing: Smoothing of the cross-entropies in the loss, in [0, 1).
        augment: ``standard`` (random crop and flip where the data set's usual recipe has them), ``none``,
            ``idbh-weak``, ``idbh-strong``, ``idbh-svhn``, ``cutout``, ``autoaugment``, ``randaugment``,
            ``trivialaugment`` or ``augmix``.
        mix: ``cutmix`` or ``mixup`` blends the images of a batch and makes their labels soft; ``none`` does not.
        extra: File of generated or pseudo-labelled images (``.npz`` of any size) that a part of each batch comes from.
        extra_fraction: Share of extra images in a batch; an epoch keeps its number of steps.
        extra_smoothing: Label smoothing of the extra images alone, in [0, 1).
        selection: Training images held out to choose the best checkpoint by: a number, or a share below 1. None means
            1,000, or a tenth of the training set where that is less.
        patience: Epochs without a better best checkpoint after which the run ends early; 0 trains to the end.
        precision: ``bf16``, ``float32``, or ``auto`` (bf16 where the hardware computes it).
        channels_last: Whether images are laid out as NHWC, which convolutions are faster in.
        fold: Whether eval-mode attacks run on a copy with BatchNorm folded into the convolutions.
        accelerate: What PyTorch may do to eval-mode attacks on that copy: ``compile`` its passes (seconds to minutes at
            the start), capture the whole attack as CUDA ``graphs``, ``both``, or ``none``; ``auto`` takes graphs on a
            GPU. An attack that stops instances is not captured.
        save_every: Seconds between saves of the state within an epoch; one is made at each epoch's end anyway. None
            means 300, or a hundred times what the last save took where that is longer: saving costs 1 % at most.
        save_steps: Optimiser steps of the run between further saves; 0 leaves it to `save_every`.
        keep_every: After every so many epochs the evaluation weights are kept, beside best and last; 0 keeps none.
        keep_newest: How many of these are kept at a time, the newest ones; 0 keeps all.
        clip_grad: Largest 2-norm of a step's gradient, to which a longer one is scaled down; None clips nothing.
        on_nan: What to do about a step whose loss or gradient is not finite, or whose loss explodes: ``stop`` the run
            with its last save intact, ``skip`` the step, or ``rollback`` to the last save and leave its batch out.
        loss_limit: A loss explodes above this many times the median of the last 64 steps (or of guessing, ln K, where
            that is more); ``.inf`` looks for what is not finite alone.
        on_collapse: ``warn`` of catastrophic overfitting, of predictions that collapse onto one class, and of an attack
            that finds nothing, or ``stop`` there.
        probe_every: Steps between further probes for these within an epoch; 0 probes at each epoch's end alone.
        deterministic: Whether PyTorch takes slower algorithms that give the same bits every time.
        seed: Seed of everything random.
        device: ``cpu``, ``cuda``, or ``auto``.

    Raises:
        UserError: A value that is impossible.
    """

    data: str = "digits"
    root: str | None = None
    size: int | None = None
    model: str | None = None
    width: int | None = None
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    init: str | None = None
    epochs: int = 30
    batch_size: int = 128
    accumulate: int = 1
    batch_norm: Literal["sync", "local", "frozen"] = "sync"
    shard: Literal["none", "full"] = "none"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    nesterov: bool = True
    lr: float | None = None
    schedule: Literal["one-cycle", "cosine", "cyclic", "piecewise", "constant"] = "one-cycle"
    drops: tuple[tuple[float, float], ...] = ((0.5, 0.1), (0.75, 0.01))
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norm: bool = True
    ema: float = 0.995
    label_smoothing: float = 0.0
    augment: str = "standard"
    mix: Literal["none", "cutmix", "mixup"] = "none"
    extra: str | None = None
    extra_fraction: float = 0.7
    extra_smoothing: float = 0.0
    selection: float | None = None
    patience: int = 0
    precision: Literal["auto", "bf16", "float32"] = "auto"
    channels_last: bool = True
    fold: bool = True
    accelerate: Literal["none", "compile", "graphs", "both", "auto"] = "none"
    save_every: float | None = None
    save_steps: int = 0
    keep_every: int = 0
    keep_newest: int = 0
    clip_grad: float | None = None
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    loss_limit: float = 20.0
    on_collapse: Literal["warn", "stop"] = "warn"
    probe_every: int = 0
    deterministic: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the numbers and choices."""
        for entry in dataclasses.fields(self):
            if not fits(getattr(self, entry.name), _annotations()[entry.name]):
                wanted = entry.type if isinstance(entry.type, str) else getattr(entry.type, "__name__", "")
                usual = f", such as {entry.default!r}" if isinstance(entry.default, tuple) else ""
                raise UserError(f"{entry.name} must be {wanted}{usual}; got {getattr(self, entry.name)!r}")
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("save_every", "save_steps", "keep_every", "keep_newest"):
            given = getattr(self, name)
            if given is not None and not given >= 0:
                raise UserError(f"{name} must be at least 0; got {given}")
        if self.keep_newest and not self.keep_every:
            raise UserError(f"keep_newest = {self.keep_newest} needs keep_every, for example keep_every = 10")
        for entry in dataclasses.fields(self):
            choices = getattr(_annotations()[entry.name], "__args__", ())
            given = getattr(self, entry.name)
            if isinstance(given, str) and choices and all(isinstance(c, str) for c in choices) and given not in choices:
                raise unknown(entry.name, given, choices)
        if not self.fold and self.accelerate not in ("none", "auto"):
            raise UserError(f"accelerate={self.accelerate} works on the folded copy of the network: leave fold at true")
        if any(drop[0] < 0 for drop in self.drops) or list(self.drops) != sorted(self.drops):
            raise UserError(f"drops must be pairs (time, factor) in ascending order of time; got {self.drops!r}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise UserError(f"lr must be a finite number of at least 0; got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay must be 0 or larger; got {self.weight_decay}")
        if self.clip_grad is not None and not 0 < self.clip_grad < math.inf:
            raise UserError(
                f"clip_grad must be the largest norm of a gradient, above 0, for example 1; got {self.clip_grad}"
            )
        if not self.loss_limit > 1:
            raise UserError(f"loss_limit must be a multiple of the usual loss, above 1; got {self.loss_limit}")
        if self.probe_every < 0:
            raise UserError(f"probe_every must be 0 or a number of steps; got {self.probe_every}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must be in [0, 1); got {self.momentum}")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema must be in [0, 1), for example 0.995, and 0 for none; got {self.ema}")
        for name in ("label_smoothing", "extra_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.augment not in AUGMENTATIONS:
            raise unknown("augment", self.augment, AUGMENTATIONS)
        if self.extra is not None:
            extra_count(self.batch_size, self.extra_fraction)
        for entry in dataclasses.fields(self):
            idle = self.extra is None and entry.name in ("extra_fraction", "extra_smoothing")
            if idle and getattr(self, entry.name) != entry.default:
                raise UserError(
                    f"{entry.name} = {getattr(self, entry.name)} needs extra, the file of images that it is about: "
                    "extra = FILE.npz"
                )
        if self.patience < 0:
            raise UserError(f"patience must be a number of epochs, and 0 for none; got {self.patience}")
        if self.selection is not None and not 0 < self.selection < math.inf:
            raise UserError(f"selection must be a positive number of images or a share below 1; got {self.selection}")

    @property
    def top_lr(self) -> float:
        """The highest learning rate, with the default filled in."""
        if self.lr is not None:
            return self.lr
        return 1e-3 if self.optimizer == "adamw" else 0.2 if self.schedule == "one-cycle" else 0.1

    def held_out(self, count: int) -> int | float:
        """How much of a training set of `count` images is held out for selection."""
        if self.selection is None:
            return min(1000, count // 10)
        return int(self.selection) if self.selection >= 1 else self.selection


_UNIONS = (types.UnionType, typing.Union)


@functools.cache
def _annotations() -> dict[str, Any]:
    return inspect.get_annotations(Settings, eval_str=True)


def fits(given: Any, annotation: Any) -> bool:
    """Whether a value has the type of a field: a YAML file and a caller from Python may bring any."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in _UNIONS else (annotation,)
    return any(_is(given, option) for option in options)


def _is(given: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(given, (int, float)) and not isinstance(given, bool)
    if kind is int:
        return isinstance(given, int) and not isinstance(given, bool)
    if kind is str:
        return isinstance(given, (str, os.PathLike))
    origin = typing.get_origin(kind)
    if origin is Literal:
        return isinstance(given, str)  # a wrong name gets the known ones
    if origin is tuple:
        inner = typing.get_args(kind)
        same = len(inner) == 2 and inner[1] is Ellipsis
        if not isinstance(given, tuple) or not (same or len(given) == len(inner)):
            return False
        return all(_is(part, inner[0] if same else inner[place]) for place, part in enumerate(given))
    return isinstance(given, type(None) if kind is None else origin or kind)


def build_network(
    method: Method, images: Images, *, model: str, width: int | None, seed: int, stem: str = "auto"
) -> nn.Module:
    """The network that training begins with: for these images, with their normalisation and the head a method needs.

    Args:
        method: What shall train it; ``method.requires`` is read.
        images: The data set.
        model: Name of a network, see ``instar.models.create``.
        width: Channels of the first stage of an own network; None is the published width.
        seed: Seed of the run, from which that of the weights is drawn.
        stem: ``cifar``, ``imagenet``, or ``auto`` for what the size of the images suggests.

    Returns:
        Images (B, C, H, W) in [0, 1] → logits (B, K), on the CPU.

    Raises:
        UserError: The network is unknown, or cannot be made so.
    """
    channels, height, _ = images.shape
    required = method.requires
    more: dict[str, Any] = {}
    if required is not None and "/" not in model and ":" not in model:  # Instar's own networks know these
        more = {"head": "cosine", "scale": required.scale, "head_bias": required.bias}
    if stem != "auto":
        more["stem"] = stem
    return create(
        model,
        classes=len(images.classes),
        channels=channels,
        image_size=height,
        width=width,
        mean=images.info.mean,
        std=images.info.std,
        seed=key(seed, purpose="weights"),
        **more,
    )


def learning_rate(settings: Settings, *, update: int, updates: int) -> float:
    """The learning rate of one optimiser step, a pure function of its number.

    Args:
        settings: `schedule`, `lr` and `optimizer` are read.
        update: Number of the step in the run, from 0.
        updates: Steps in the run.

    Returns:
        The rate.

    Example:
        >>> one = Settings(schedule="one-cycle", lr=0.2)
        >>> [round(learning_rate(one, update=u, updates=100), 4) for u in (0, 24, 25, 99)]
        [0.008, 0.2, 0.2, 0.0001]
        >>> steps = Settings(schedule="piecewise", lr=0.1)
        >>> [round(learning_rate(steps, update=u, updates=100), 4) for u in (49, 50, 75)]
        [0.1, 0.01, 0.001]

    Source: one-cycle after Smith 2018; piecewise and cyclic (``triangular``) after Rice et al. 2020.
    """
    top, done = settings.top_lr, update / updates
    if settings.schedule == "constant":
        return top
    if settings.schedule == "piecewise":
        begun = [factor for when, factor in settings.drops if done >= share_of(when, settings.epochs)]
        return top * (begun[-1] if begun else 1.0)
    if settings.schedule == "cyclic":
        return top * min(done / 0.4, (1 - done) / 0.6)
    rise = max(round(0.25 * updates), 1) if settings.schedule == "one-cycle" else 0
    if update < rise:
        return top * (update + 1) / rise
    return top * 0.5 * (1 + math.cos(math.pi * (update - rise) / max(updates - rise, 1)))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision of convolutions: bfloat16 where asked for, or where the hardware computes in it.

    Example:
        >>> choose_precision("float32", torch.device("cpu"))
        torch.float32
    """
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() if device.type == "cpu" else False
    return torch.bfloat16 if native else torch.float32


def choose_acceleration(name: str, device: torch.device) -> str:
    """What is done to attacks in the end: ``none``, ``compile``, ``graphs`` or ``both``.

    Raises:
        UserError: Graphs without a GPU, or compiling where PyTorch cannot.

    Example:
        >>> choose_acceleration("auto", torch.device("cpu"))
        'none'
    """
    if name == "auto":
        return "graphs" if device.type == "cuda" else "none"
    if name in ("graphs", "both") and device.type != "cuda":
        raise UserError(
            f"accelerate={name} captures CUDA graphs, which need a GPU, and this runs on a {device.type} device: take "
            "accelerate=compile, auto or none"
        )
    if name in ("compile", "both"):
        _check_compiler(device)
    return name


@functools.cache
def _check_compiler(device: torch.device) -> None:
    """Compile next to nothing, which fails where anything is missing that compiling needs."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # PyTorch's backends fail in any way they like
        needed = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
        raise UserError(
            f"accelerate=compile does not work here: PyTorch needs {needed} for it ({first_line(error)}). Without it: "
            "accelerate=none"
        ) from None


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or ``file.py:function`` / ``package.module:function`` for one of your own.

    The latter two run the user's code; see `instar.own_code`.

    Raises:
        UserError: No such recipe, file or function, or a file that cannot be run.

    Example:
        >>> find_recipe("gairat").__name__
        'gairat'
    """
    if ":" not in name:
        if name not in RECIPES:
            raise unknown("recipe", name, RECIPES)
        return RECIPES[name]
    recipe: Recipe = own_function(name, what="recipe")
    return recipe


def build_method(
    recipe: Recipe,
    arguments: Mapping[str, Any],
    *,
    info: DatasetInfo,
    settings: Settings,
    changes: Mapping[str, Any] | None = None,
) -> Method:
    """The method that a recipe and its arguments make on a data set.

    The threat model a user leaves open (norm, eps, step size, steps) is the data set's usual one. An eps without a
    step size takes a quarter of it. Then come the weight average and label smoothing of the settings, then `changes`.

    Args:
        recipe: A function that returns a `Method`.
        arguments: The recipe's arguments that were given; None stands for not given.
        info: The data set.
        settings: `ema` and `label_smoothing` are read.
        changes: Dotted paths into the method and their new values, as of ``--set``.

    Returns:
        The method.

    Raises:
        UserError: An unknown argument or path, or a value that is refused.
    """
    accepted = inspect.signature(recipe).parameters
    given = {name: item for name, item in arguments.items() if item is not None}
    for name in given:
        if name not in accepted:
            raise unknown(f"argument of {recipe.__name__}", name, accepted)
    norm = str(given.get("norm", info.norm))
    if norm.lower() != info.norm.lower() and "eps" not in given and "eps" in accepted:
        raise UserError(f"eps is needed with norm {norm}: the usual eps of {info.name} is for {info.norm}")
    usual: dict[str, Any] = {"norm": info.norm, "eps": info.eps, "steps": info.steps, "step_size": info.step_size}
    if isinstance(given.get("eps"), (int, float)):
        usual["step_size"] = given["eps"] / 4
    # A recipe with a step size of None derives it from eps in its own way.
    open_ = {name: item for name, item in usual.items() if name in accepted and accepted[name].default is not None}
    _check_kinds(recipe, given)
    try:
        method = recipe(**open_ | given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{recipe.__name__} does not take these arguments: {error}") from error
    except UserError as error:  # of a part of the method, which has names of its own
        if any(name in str(error) for name in given) or not given:
            raise
        shown = ", ".join(f"{name}={express(item)}" for name, item in given.items())
        raise UserError(f"{recipe.__name__} with {shown}: {error}") from error
    if not isinstance(method, Method):
        raise UserError(f"a recipe must return a Method; {recipe.__name__} returned {type(method).__name__}")
    if settings.ema and method.average is None:
        method = dataclasses.replace(method, average=EMA(settings.ema))
    if settings.label_smoothing:
        method = dataclasses.replace(method, loss=smoothed(method.loss, settings.label_smoothing))
    for path, item in (changes or {}).items():
        method = assign(method, path, item)
    return method


def _check_kinds(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuse an argument of another kind than the recipe's annotations say; a whole number passes for an integer.

    Raises:
        UserError: With the argument, what it must be and what it is.
    """
    try:
        parameters = inspect.signature(recipe, eval_str=True).parameters
    except (NameError, TypeError, AttributeError, SyntaxError):  # annotations of a user's own that cannot be read
        return
    for name, item in given.items():
        kind = parameters[name].annotation
        whole = isinstance(item, float) and item.is_integer()
        try:
            good = kind is inspect.Parameter.empty or fits(item, kind) or (whole and fits(int(item), kind))
        except TypeError:  # an annotation that is no class, such as Any
            continue
        if not good:
            options = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
            names = ["nothing" if one is type(None) else getattr(one, "__name__", str(one)) for one in options]
            raise UserError(f"{name} of {recipe.__name__} must be {' or '.join(names)}; got {item!r}")


def smoothed(loss: Signal, smoothing: float) -> Signal:
    """`loss` with label smoothing in every cross-entropy it adds up.

    Example:
        >>> smoothed(2 * CrossEntropy("clean"), 0.1)
        2 * CrossEntropy('clean', smoothing=0.1)
    """
    if isinstance(loss, CrossEntropy):
        return dataclasses.replace(loss, smoothing=smoothing)
    parts = {
        entry.name: smoothed(getattr(loss, entry.name), smoothing)
        for entry in dataclasses.fields(loss)  # type: ignore[arg-type]
        if isinstance(getattr(loss, entry.name), Signal)
    }
    return dataclasses.replace(loss, **parts) if parts else loss  # type: ignore[type-var]


def read_value(text: Any) -> Any:
    """A value as a user types it: an expression, or a single word. What is not text stays as it is.

    Example:
        >>> read_value("8/255") == 8 / 255, read_value("tanh"), read_value(3)
        (True, 'tanh', 3)
    """
    return parse(text, words=True) if isinstance(text, str) else text


def written(item: Any) -> Any:
    """A value as YAML and JSON hold it: plain numbers and words stay, everything else becomes its expression.

    Example:
        >>> written(8 / 255), written(3), written(float("inf"))
        ('8/255', 3, 'inf')
    """
    if isinstance(item, (bool, int, str, type(None))):
        return item
    text = express(item)
    return item if isinstance(item, float) and text == repr(item) and math.isfinite(item) else text
