"""Weights from elsewhere, loaded into a model of ours or of the user's."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from instar.errors import UserError
from instar.models.files import card_of, read_card, read_own
from instar.models.layouts import translated
from instar.models.normalize import Normalize, statistics
from instar.models.reading import read_state
from instar.models.registry import origin
from instar.models.states import compare, copy_into, head_path, other_architecture, some, tensors_of, unwrapped


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
        dropped: Keys that are known to be without effect, such as TRADES' ``sub_block1``, and those that stand beside
            the network under a prefix of their own, such as a loss's weights in a file of Lightning.

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
            f"{len(keys)} {name} ({some(keys)})"
            for name in ("missing", "unexpected", "mismatched", "dropped")
            if (keys := getattr(self, name))
        ]
        return f"{self.path}: {', '.join(parts)}"


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
        >>> from instar.models import create
        >>> net = create("resnet18", classes=10, width=4, seed=1)
        >>> published = {"module." + key: value for key, value in net.state_dict().items() if "normalize" not in key}
        >>> file = Path(tempfile.mkdtemp()) / "published.pt"
        >>> torch.save({"state_dict": published, "epoch": 100}, file)
        >>> load_foreign(file, create("resnet18", classes=10, width=4)).normalization
        'identity'
    """
    path = Path(path)
    model = unwrapped(model)
    target = tensors_of(model)
    wanted = _wanted_normalization(normalize, model)
    state, dropped = translated(_read(path, entry), model, path)
    fresh: set[str] = set()  # keys of the model that keep their values
    head = head_path(model)
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
    differences = compare(state, {key: value for key, value in target.items() if key not in fresh or key in state})
    fitting = {key: value for key, value in state.items() if key in target and key not in differences.mismatched}
    learned = {key for key in fitting if not key.startswith("normalize.") and not key.endswith("num_batches_tracked")}
    if (strict and differences.any()) or not learned:
        raise other_architecture(path, model, differences)
    copy_into(fitting, model)
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


def _read(path: Path, entry: str | None) -> dict[str, Tensor]:
    """The tensors of any file; one with a card of ours must be the one that its card means."""
    if entry is None and path.is_file() and _has_sha(card_of(path)):
        return read_own(path, read_card(path))
    return read_state(path, entry)


def _has_sha(card: Path) -> bool:
    """Whether a JSON file is a card of ours, and not, say, the config that Hugging Face puts beside weights."""
    try:
        content = json.loads(card.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "sha256" in content


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
