"""The names that other training codes give to weights, translated into a model's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from instar.errors import UserError
from instar.models.normalize import Normalize
from instar.models.reading import DEEPEST
from instar.models.states import head_path, tensors_of
from instar.models.wide_resnet import WideResNet

HEAD_NAMES = ("linear", "fc", "logits", "classifier", "head", "head.fc", "classifier.fc3", "last_linear", "output")
NORMALIZATION_NAMES = {
    "mean": "mean",
    "mu": "mean",
    "new_mean": "mean",
    "std": "std",
    "sigma": "std",
    "new_std": "std",
}


def translated(state: dict[str, Tensor], model: nn.Module, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A state dict under the names of a model.

    Every way to take off prefixes is tried, and the one under which most names are the model's is taken, the least
    change at a tie.

    Args:
        state: Tensors by name, as a file has them.
        model: Whose names are wanted.
        path: The file, for messages.

    Returns:
        The tensors by the model's names, and the names that were dropped because they have no effect: second copies of
        the network, TRADES' unused block, and what stands beside the network under other prefixes (losses, metrics).

    Raises:
        UserError: DeepMind's layout, for a model with another padding.
    """
    target = tensors_of(model)
    channels = target["normalize.mean"].numel() if isinstance(getattr(model, "normalize", None), Normalize) else None
    copies = [key for key in state if "attacker" in key.split(".")]  # the robustness library saves its network twice
    state = {key: value for key, value in state.items() if key not in copies}
    candidates = [
        (_rename(peeled, model, path, target, channels), beside) for peeled, beside in _peelings(state, channels)
    ]
    # max keeps the first of equals: the least peeled one
    best, beside = max(candidates, key=lambda candidate: len(candidate[0].keys() & target.keys()))
    unused = [key for key in best if key not in target and key.startswith("sub_block1.")]
    return {key: value for key, value in best.items() if key not in unused}, (*copies, *beside, *unused)


def _peelings(state: dict[str, Tensor], channels: int | None) -> Iterator[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """The state dict with none, one, two, ... prefixes taken off, each beside the names that this leaves out."""
    for start, beside in ((state, ()), *_groups(state, channels)):
        peeled: dict[str, Tensor] | None = start
        for _ in range(DEEPEST):
            if peeled is None:
                break
            yield peeled, beside
            peeled = _peel(peeled, channels)


def _groups(state: dict[str, Tensor], channels: int | None) -> Iterator[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """Each group of names by itself, where they do not share their first part.

    Lightning keeps losses, metrics and averages beside the network. A normalisation outside belongs to every group.
    """
    buffers = {key for key, value in state.items() if _normalization_name(key, value, channels)}
    firsts = dict.fromkeys(key.partition(".")[0] for key in state if key not in buffers and "." in key)
    if len(firsts) < 2:
        return
    for first in firsts:
        prefix = f"{first}."
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        shared = {key: state[key] for key in buffers if not key.startswith(prefix)}
        beside = tuple(key for key in state if not key.startswith(prefix) and key not in buffers)
        yield shared | inside, beside


def _peel(state: Mapping[str, Tensor], channels: int | None) -> dict[str, Tensor] | None:
    """The state dict without the first part of its names, if all but the normalisation share it; otherwise None."""
    buffers = {key for key, value in state.items() if _normalization_name(key, value, channels)}
    first = {key.partition(".")[0] if "." in key else None for key in state if key not in buffers}
    if len(first) != 1 or None in first:
        return None
    prefix = f"{first.pop()}."
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _rename(
    state: Mapping[str, Tensor], model: nn.Module, path: Path, target: Mapping[str, Tensor], channels: int | None
) -> dict[str, Tensor]:
    """A state dict whose prefixes are off, with head, shortcuts and normalisation under the model's names."""
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
    if not any(".downsample." in key for key in target):  # torchvision's and timm's name
        renamed = {_with_shortcut(key, target): value for key, value in renamed.items()}
    plain = [key for key in renamed if not key.startswith("normalize.")]
    if plain and not any(key in target for key in plain) and any(f"net.{key}" in target for key in plain):
        renamed = {key if key.startswith("normalize.") else f"net.{key}": value for key, value in renamed.items()}
    head = head_path(model)
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


def _with_shortcut(key: str, target: Mapping[str, Tensor]) -> str:
    other = key.replace(".downsample.", ".shortcut.")
    return other if other in target else key


def _normalization_name(key: str, value: Tensor, channels: int | None) -> str | None:
    """``"mean"`` or ``"std"`` if this entry is a buffer of a normalisation layer at the outermost levels."""
    if channels is None or value.numel() != channels or key.count(".") > 3:
        return None
    return NORMALIZATION_NAMES.get(key.rpartition(".")[2])


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
