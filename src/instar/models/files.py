"""Weights in and out: our own as safetensors with a JSON card, other people's as they saved them; no file runs code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from instar.errors import UserError
from instar.models.normalize import Normalize, statistics
from instar.models.registry import Origin, create, origin
from instar.models.wide_resnet import WideResNet
from instar.storage import flush_folder, write_beside

# Where training codes put their weights, most telling name first; averaged weights before raw ones, as their authors
# evaluate those.
WRAPPINGS = (
    "state_dict",
    "model_state_dict",
    "rmodel",
    "model",
    "net",
    "ema_state_dict",
    "model_ema",
    "ema",
    "weights",
    "params",
    "network",
    "module",
)
HEAD_NAMES = ("linear", "fc", "logits", "classifier", "head", "head.fc", "classifier.fc3", "last_linear", "output")
NORMALIZATION_NAMES = {
    "mean": "mean",
    "mu": "mean",
    "new_mean": "mean",
    "std": "std",
    "sigma": "std",
    "new_std": "std",
}
MOST_PREFIXES = 6
LARGEST_CARD = 10_000_000  # bytes


@dataclass(frozen=True)
class LoadReport:
    """What became of every entry when foreign weights were loaded; ``str(report)`` is one line for people.

    Args:
        path: The file.
        loaded: Number of tensors copied into the model.
        normalization: ``"file"``, ``"identity"``, ``"keep"``, ``"given"``, or ``"none"`` for a model without a
            normalisation layer.
        new_head: Whether the head kept its new weights, because the file has another number of classes.
        missing: Keys of the model that the file lacks (only without ``strict``).
        unexpected: Keys of the file that the model lacks (only without ``strict``).
        mismatched: Keys whose shapes differ (only without ``strict``).
        dropped: Keys that are known to be without effect, such as TRADES' ``sub_block1``.

    Example:
        >>> print(LoadReport(path="a.pt", loaded=122, normalization="identity"))
        a.pt: 122 tensors loaded, normalization identity
    """

    path: str
    loaded: int
    normalization: str
    new_head: bool = False
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    dropped: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded", f"normalization {self.normalization}"]
        if self.new_head:
            parts.append("new head (another number of classes)")
        parts += [
            f"{len(keys)} {name} ({_some(keys)})"
            for name in ("missing", "unexpected", "mismatched", "dropped")
            if (keys := getattr(self, name))
        ]
        return f"{self.path}: {', '.join(parts)}"


def save(model: nn.Module, path: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Writes the weights as safetensors and beside them, under the same stem, a JSON card that says what they are.

    Both files appear whole or not at all: each is written under another name in the same folder, flushed to the disk
    and renamed.

    Args:
        model: The network; ``torch.compile``, ``DataParallel`` and ``AveragedModel`` wrappers are taken off.
        path: File to write, ending in ``.safetensors``; its folder is made if need be.
        card: What to record besides, for example ``dataset``; values JSON can hold. Filled in where absent:
            ``architecture`` and ``arguments`` of a model made by :func:`instar.models.registry.create`, ``classes``
            (their number), ``mean``, ``std``, ``instar`` (the version). ``sha256`` is always that of the weights file.

    Raises:
        UserError: If the suffix differs, the card cannot be JSON, or the disk is full or read-only.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> save(create("small_cnn", classes=10, width=4), folder / "best.safetensors", {"dataset": "digits"})
        >>> sorted(file.name for file in folder.iterdir())
        ['best.json', 'best.safetensors']
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"weights are saved as .safetensors; got {path.name!r}")
    model = _plain(model)
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in _state(model).items()
    }
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    full = {**_known(model), **card, "sha256": hashlib.sha256(weights).hexdigest()}
    try:
        text = json.dumps(full, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"the card of {path.name} must hold values that JSON knows: {error}") from None
    pending: list[tuple[Path, Path]] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Both are on the disk before either is renamed, so that weights and card of two different saves cannot meet
        # unless the machine stops between two renames; the sha256 tells even then.
        for target, content in ((path, weights), (path.with_suffix(".json"), text.encode())):
            pending.append((write_beside(target, content), target))
        for temporary, target in pending:
            os.replace(temporary, target)
        flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Is the disk full or read-only?") from error
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card beside a weights file.

    Args:
        path: The ``.safetensors`` file or its ``.json`` card.

    Returns:
        The card's entries; ``architecture`` and ``arguments`` have the right types if present.

    Raises:
        UserError: If there is no card or it is not one.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "last.safetensors"
        >>> save(create("small_cnn", classes=10, width=4), file, {"dataset": "digits"})
        >>> read_card(file)["dataset"]
        'digits'
    """
    weights = Path(path).with_suffix(".safetensors")
    card_path = weights.with_suffix(".json")
    try:
        text = _read(card_path, limit=LARGEST_CARD).decode()
        card = json.loads(text)
    except FileNotFoundError:
        if not weights.is_file():
            raise UserError(f"no weights at {weights}{_neighbours(weights)}") from None
        raise UserError(
            f"{weights} has no card {card_path.name} beside it, so its architecture is unknown; "
            "copy the card too, or name the model and use load_foreign"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{card_path} is not a card: {_line(error)}") from None
    sound = (
        isinstance(card, dict)
        and isinstance(card.get("architecture", ""), str)
        and isinstance(card.get("arguments", {}), dict)
        and isinstance(card.get("sha256"), str)
    )
    if not sound:
        raise UserError(
            f"{card_path} is not a card: it needs a sha256, and architecture and arguments of the right type"
        )
    return card


def load(path: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """A network as it was saved, in eval mode, built from the card alone.

    Nothing in either file can run code: tensors are safetensors, the architecture must be one of this package or of
    timm, and timm is never asked for pretrained weights. For an architecture of your own (``module:function``) pass
    the model.

    Args:
        path: The ``.safetensors`` file or its ``.json`` card.
        model: A network to load into, instead of making the one the card names. It is unchanged if anything is wrong.

    Returns:
        The network in eval mode, on the CPU if made here; torch's random generators are as before.

    Raises:
        UserError: If a file is missing, damaged or altered, or its architecture is not that of ``model``.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "best.safetensors"
        >>> net = create("small_cnn", classes=10, width=4)
        >>> save(net, file, {})
        >>> torch.equal(load(file).conv1.weight, net.conv1.weight)
        True
    """
    weights = Path(path).with_suffix(".safetensors") if Path(path).suffix == ".json" else Path(path)
    card = read_card(weights)
    state = _read_own(weights, card)
    architecture = card.get("architecture")
    if model is None:
        model = _rebuild(weights, card)
    else:
        model = _plain(model)
        made = origin(model)
        if made is not None and architecture is not None and made.architecture != architecture:
            raise UserError(
                f"{weights} holds {architecture}, the model is {made.architecture}; take the same model as in training"
            )
    differences = _compare(state, _state(model))
    if differences.any():
        raise _other_architecture(weights, model, differences)
    _copy(state, model)
    return model.eval()


def load_foreign(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    strict: bool = True,
    new_head: bool = False,
    normalize: str | tuple[Sequence[float], Sequence[float]] = "identity",
    entry: str | None = None,
) -> LoadReport:
    """Loads weights from any training code, or from a file of ours, into a model; nothing in the file can run code.

    Reads ``torch.save`` files through ``weights_only`` and safetensors. Finds the state dict in the usual wrappings
    (``state_dict``, ``model_state_dict``, ``net``, ...), strips prefixes (``module.``, ``model.``, ``_orig_mod.``,
    ``0.``/``1.`` of ``Sequential(normalize, net)``, any other shared one), and translates head names, the
    normalisation buffers of RobustBench, Rice et al. and Madry et al., and the layout of DeepMind's wide ResNets.

    Args:
        path: The file.
        model: The network to fill, in place; its mode is left as it is, and nothing changes if an error is raised.
        strict: Whether every key must match; False loads what fits and reports the rest.
        new_head: Whether a head for another number of classes is skipped, for fine-tuning: the model keeps its new
            one. With equal numbers the file's head is loaded.
        normalize: What to do when the file has no normalisation buffers but the model has: ``"identity"`` (mean 0, std
            1: TRADES-style nets see plain [0, 1]), ``"keep"`` the model's, or a pair ``(mean, std)``, one number a
            channel. Buffers in the file are always used.
        entry: Name of the entry that holds the state dict, when the usual choice is not wanted
            (``"unaveraged_model_state_dict"``).

    Returns:
        What was loaded, dropped and, without ``strict``, left out.

    Raises:
        UserError: If the file is missing, damaged, would run code, or belongs to another architecture.

    Example:
        >>> import tempfile
        >>> net = create("resnet18", classes=10, width=4, seed=1)
        >>> published = {"module." + key: value for key, value in net.state_dict().items() if "normalize" not in key}
        >>> file = Path(tempfile.mkdtemp()) / "published.pt"
        >>> torch.save({"state_dict": published, "epoch": 100}, file)
        >>> load_foreign(file, create("resnet18", classes=10, width=4)).normalization
        'identity'
    """
    path = Path(path)
    model = _plain(model)
    target = _state(model)
    wanted = _wanted_normalization(normalize, model)
    state, dropped = _translate(_read_any(path, entry), model, path)
    fresh: set[str] = set()  # keys of the model that keep their values
    head = _head_path(model)
    has_normalize = isinstance(getattr(model, "normalize", None), Normalize)
    source = "none"
    if has_normalize:
        source = "file" if {"normalize.mean", "normalize.std"} <= state.keys() else wanted[0]
        for name, values in zip(("mean", "std"), wanted[1], strict=True):
            if source != "file":
                state[f"normalize.{name}"] = values
    # Old files lack counters, and files of linear heads the logit scale of a cosine head.
    fresh |= {key for key in target if key.endswith("num_batches_tracked")} - state.keys()
    fresh |= {f"{head}.scale"} & (target.keys() - state.keys())
    skipped = False
    if head and f"{head}.weight" in state and f"{head}.weight" in target:
        ours, theirs = target[f"{head}.weight"].shape, state[f"{head}.weight"].shape
        if len(ours) == len(theirs) == 2 and ours[1] == theirs[1] and ours[0] != theirs[0]:
            if not new_head:
                raise UserError(
                    f"{path} has {theirs[0]} classes, the model {ours[0]}; give the model {theirs[0]} classes, "
                    "or keep only the backbone with new_head=True"
                )
            skipped = True
            for key in [key for key in state if key.startswith(f"{head}.")]:
                del state[key]
            fresh |= {key for key in target if key.startswith(f"{head}.")}
    differences = _compare(state, {key: value for key, value in target.items() if key not in fresh or key in state})
    fitting = {key: value for key, value in state.items() if key in target and key not in differences.mismatched}
    learned = {key for key in fitting if not key.startswith("normalize.") and not key.endswith("num_batches_tracked")}
    if (strict and differences.any()) or not learned:
        raise _other_architecture(path, model, differences)
    _copy(fitting, model)
    made = origin(model)
    if has_normalize and made is not None:
        layer: Normalize = model.normalize  # type: ignore[assignment]
        now = {"mean": layer.mean.flatten().tolist(), "std": layer.std.flatten().tolist()}
        model._instar_origin = replace(made, arguments={**made.arguments, **now})  # type: ignore[assignment]
    return LoadReport(
        path=str(path),
        loaded=len(fitting) - (2 if has_normalize and source != "file" else 0),
        normalization=source,
        new_head=skipped,
        missing=differences.missing,
        unexpected=differences.unexpected,
        mismatched=tuple(differences.mismatched),
        dropped=dropped,
    )


@dataclass(frozen=True)
class _Differences:
    """How a state dict differs from a model's; ``mismatched`` maps keys to (shape in the file, shape in the model)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def any(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)


def _compare(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> _Differences:
    shapes = {
        key: (tuple(state[key].shape), tuple(value.shape))
        for key, value in target.items()
        if key in state and state[key].shape != value.shape
    }
    return _Differences(
        missing=tuple(key for key in target if key not in state),
        unexpected=tuple(key for key in state if key not in target),
        mismatched=shapes,
    )


def _other_architecture(path: Path, model: nn.Module, differences: _Differences) -> UserError:
    made = origin(model)
    name = made.architecture if made else type(model).__name__
    parts = []
    if differences.missing:
        parts.append(f"{len(differences.missing)} keys missing in the file ({_some(differences.missing)})")
    if differences.unexpected:
        parts.append(f"{len(differences.unexpected)} unknown to the model ({_some(differences.unexpected)})")
    if differences.mismatched:
        key, (theirs, ours) = next(iter(differences.mismatched.items()))
        parts.append(
            f"{len(differences.mismatched)} of another shape ({key} {theirs} in the file, {ours} in the model)"
        )
    return UserError(f"{path} does not fit {name}: {'; '.join(parts)}. Is it another architecture or width?")


def _rebuild(weights: Path, card: Mapping[str, Any]) -> nn.Module:
    architecture = card.get("architecture")
    if architecture is None or "arguments" not in card:
        raise UserError(f"the card of {weights} names no architecture; pass the model to load into")
    if ":" in architecture:
        # Importing a name found in a file would let the file choose code to run.
        raise UserError(
            f"{weights} was trained with your own code {architecture!r}; make that model and pass it, "
            "because no file may choose code to run"
        )
    arguments = {key: value for key, value in card["arguments"].items() if key != "pretrained"}
    try:
        return create(architecture, **{**arguments, "seed": 0})
    except (UserError, TypeError) as error:
        raise UserError(f"the card of {weights} cannot be rebuilt: {_line(error)}") from error


def _read_own(weights: Path, card: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        content = _read(weights)
    except FileNotFoundError:
        raise UserError(f"no weights at {weights}{_neighbours(weights)}") from None
    state = _tensors(weights, content)
    if hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise UserError(
            f"{weights} does not belong to its card: the sha256 differs. Was one of them replaced, or a copy cut short?"
        )
    return state


def _read_any(path: Path, entry: str | None) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the length of a JSON header, then the header
            card_path = path.with_suffix(".json")
            if path.suffix == ".safetensors" and card_path.is_file() and _has_sha(card_path):
                return _read_own(path, read_card(path))
            return _tensors(path, _read(path))
    except FileNotFoundError:
        raise UserError(f"no weights at {path}{_neighbours(path)}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return _unwrap(_unpickle(path), path, entry)


def _has_sha(card_path: Path) -> bool:
    """Whether a JSON file is a card of ours, and not, say, the config that Hugging Face puts beside weights."""
    try:
        card = json.loads(_read(card_path, limit=LARGEST_CARD))
    except (ValueError, UserError):
        return False
    return isinstance(card, dict) and "sha256" in card


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or cut short ({_line(error)}); copy or download it again") from None


def _unpickle(path: Path) -> Any:
    # Found in many published files (accuracies, parsed options); none of them can run code.
    harmless: list[Any] = [
        Namespace,
        numpy.dtype,
        numpy.ndarray,
        type(numpy.dtype("float32")),
        type(numpy.dtype("float64")),
    ]
    harmless += [type(numpy.dtype("int64")), type(numpy.dtype("bool")), *_numpy_constructors()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) (?:was |is |')?([\w.]*\w)", str(error))
        if found:
            raise UserError(
                f"{path} holds a Python object ({found[1]}) and opening it could run code, so it was refused; "
                "if you trust it, save its state_dict() elsewhere and load that"
            ) from None
        raise UserError(f"{path} is no file of torch.save, or damaged; copy or download it again") from None
    except Exception as error:  # damaged archives fail in many ways, all of which mean the same here
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program, which could run code, so it was refused; export its state_dict()"
            ) from None
        raise UserError(f"{path} is no file of torch.save, or damaged ({_line(error)[:120]})") from None


def _numpy_constructors() -> list[Any]:
    """What rebuilds numpy scalars and arrays, under the module names of numpy 1 and of numpy 2."""
    core = numpy._core.multiarray if hasattr(numpy, "_core") else numpy.core.multiarray  # type: ignore[attr-defined]
    return [
        (function, f"{module}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for function in (getattr(core, name),)
        for module in ("numpy.core", "numpy._core")
    ]


def _unwrap(content: Any, path: Path, entry: str | None) -> dict[str, Tensor]:
    if entry is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(entry), Mapping):
            raise UserError(f"{path} has no entry {entry!r} with weights; it has {_entries(content)}")
        content = content[entry]
    for _ in range(MOST_PREFIXES):
        if not isinstance(content, Mapping):
            break
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((content[name] for name in WRAPPINGS if isinstance(content.get(name), Mapping)), None)
        if inner is not None:
            content = inner
        elif tensors:
            return tensors
        else:
            break
    raise UserError(
        f"{path} holds no state dict under a usual name; it has {_entries(content)}. Pass entry= if it is one of these"
    )


def _translate(state: dict[str, Tensor], model: nn.Module, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict under the names of the model, and the keys that were dropped because they have no effect."""
    target = _state(model)
    channels = target["normalize.mean"].numel() if isinstance(getattr(model, "normalize", None), Normalize) else None
    dropped = [key for key in state if "attacker" in key.split(".")]  # the robustness library saves its network twice
    state = {key: value for key, value in state.items() if key not in dropped}
    candidates = []
    for _ in range(MOST_PREFIXES):
        candidates.append(_rename(state, model, path, target, channels))
        peeled = _peel(state, channels)
        if peeled is None:
            break
        state = peeled
    # max keeps the first of equals: the least peeled one
    best = max(candidates, key=lambda candidate: len(candidate.keys() & target.keys()))
    unused = [key for key in best if key not in target and key.startswith("sub_block1.")]
    return {key: value for key, value in best.items() if key not in unused}, (*dropped, *unused)


def _rename(
    state: Mapping[str, Tensor], model: nn.Module, path: Path, target: Mapping[str, Tensor], channels: int | None
) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        name = _normalization_name(key, value, channels)
        renamed[f"normalize.{name}" if name else key] = (
            value.reshape(target[f"normalize.{name}"].shape) if name else value
        )
    if "init_conv.weight" in renamed and isinstance(model, WideResNet):
        if model.padding != "same":
            raise UserError(
                f"{path} has the layout of DeepMind's wide ResNets, which pad at one side only; "
                "create the model with padding='same' (and mostly activation='silu')"
            )
        renamed = {_from_deepmind(key): value for key, value in renamed.items()}
    plain = [key for key in renamed if not key.startswith("normalize.")]
    if plain and not any(key in target for key in plain) and any(f"net.{key}" in target for key in plain):
        renamed = {key if key.startswith("normalize.") else f"net.{key}": value for key, value in renamed.items()}
    head = _head_path(model)
    inside = "net." if head and head.startswith("net.") else ""
    if head and f"{head}.weight" not in renamed:
        found = [
            name
            for name in HEAD_NAMES
            if f"{inside}{name}.weight" in renamed and f"{inside}{name}.weight" not in target
        ]
        found = [name for name in found if renamed[f"{inside}{name}.weight"].ndim == 2]
        if len(found) == 1:
            for part in ("weight", "bias", "scale"):
                if f"{inside}{found[0]}.{part}" in renamed:
                    renamed[f"{head}.{part}"] = renamed.pop(f"{inside}{found[0]}.{part}")
    return renamed


def _normalization_name(key: str, value: Tensor, channels: int | None) -> str | None:
    """``"mean"`` or ``"std"`` if this entry is a buffer of a normalisation layer at the outermost levels."""
    if channels is None or value.numel() != channels or key.count(".") > 3:
        return None
    return NORMALIZATION_NAMES.get(key.rpartition(".")[2])


def _peel(state: Mapping[str, Tensor], channels: int | None) -> dict[str, Tensor] | None:
    """The state dict without the first part of its names, if all but the normalisation share it; otherwise None."""
    buffers = {key for key, value in state.items() if _normalization_name(key, value, channels)}
    first = {key.partition(".")[0] if "." in key else None for key in state if key not in buffers}
    if len(first) != 1 or None in first:
        return None
    prefix = f"{first.pop()}."
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _from_deepmind(key: str) -> str:
    """A key of DeepMind's nets (``layer.1.block.0.conv_0.weight``) in TRADES' form: ``block2.layer.0.conv1.weight``."""
    if match := re.fullmatch(r"layer\.(\d+)\.block\.(\d+)\.(\w+)\.(\w+)", key):
        stage, number, layer, part = match.groups()
        inner = {
            "batchnorm_0": "bn1",
            "conv_0": "conv1",
            "batchnorm_1": "bn2",
            "conv_1": "conv2",
            "shortcut": "convShortcut",
        }
        return f"block{int(stage) + 1}.layer.{number}.{inner.get(layer, layer)}.{part}"
    first, dot, rest = key.partition(".")
    return {"init_conv": "conv1", "batchnorm": "bn1", "logits": "fc"}.get(first, first) + dot + rest


def _head_path(model: nn.Module) -> str | None:
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module):
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def _wanted_normalization(
    normalize: str | tuple[Sequence[float], Sequence[float]], model: nn.Module
) -> tuple[str, tuple[Tensor, Tensor]]:
    layer = getattr(model, "normalize", None)
    if not isinstance(layer, Normalize):
        layer = Normalize(channels=1)
    if normalize == "keep":
        return "keep", (layer.mean.detach().clone(), layer.std.detach().clone())
    if normalize == "identity":
        return "identity", (torch.zeros_like(layer.mean), torch.ones_like(layer.std))
    if isinstance(normalize, str) or len(normalize) != 2:
        raise UserError(f"normalize must be 'identity', 'keep' or a pair (mean, std); got {normalize!r}")
    mean, std = statistics(normalize[0], normalize[1], layer.mean.numel())
    return "given", (torch.tensor(mean).view_as(layer.mean), torch.tensor(std).view_as(layer.std))


def _plain(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch."""
    while True:
        compiled = getattr(model, "_orig_mod", None)  # the class itself would take seconds to import
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel | torch.optim.swa_utils.AveragedModel
        ):
            model = model.module
        else:
            return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"weights are tensors only; {type(model).__name__} also keeps {_some(others)} in its state dict"
        )
    return state


def _known(model: nn.Module) -> dict[str, Any]:
    """What a card can say of a model without being told."""
    import instar  # here, because the package imports this module

    known: dict[str, Any] = {"instar": getattr(instar, "__version__", "unknown")}
    made: Origin | None = origin(model)
    if made is not None:
        arguments = dict(made.arguments)
        known |= {"architecture": made.architecture, "arguments": arguments, "classes": arguments.get("classes")}
    layer = getattr(model, "normalize", None)
    if isinstance(layer, Normalize):
        known |= {"mean": layer.mean.flatten().tolist(), "std": layer.std.flatten().tolist()}
    return known


def _copy(state: Mapping[str, Tensor], model: nn.Module) -> None:
    target = _state(model)
    with torch.no_grad():
        for key, value in state.items():
            target[key].copy_(value)


def _read(path: Path, *, limit: int | None = None) -> bytes:
    try:
        if limit is not None and path.stat().st_size > limit:
            raise UserError(f"{path} is too large for a card")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".pt", ".pth", ".ckpt"))
    return f"; {folder} has {_some(found)}" if found else f"; {folder} has no weights"


def _entries(content: Any) -> str:
    return _some([str(key) for key in content]) if isinstance(content, Mapping) else f"a {type(content).__name__}"


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
