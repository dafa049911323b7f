"""Our own files: weights beside a JSON card that says what they are; nothing in either can run code."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from instar.errors import UserError, one_line
from instar.models.normalize import Normalize
from instar.models.reading import absent, parsed, read_bytes
from instar.models.registry import Origin, create, origin
from instar.models.states import compare, copy_into, detached, other_architecture, tensors_of, unwrapped
from instar.storage import WriteError, flush_folder, write_beside

LARGEST_CARD = 10_000_000  # bytes
HUB_WEIGHTS, HUB_CARD = "model.safetensors", "config.json"
"""Names of weights and card in a folder of the Hugging Face hub."""

OTHERS = (".pt", ".onnx")
"""Files of other kinds that have a card; its name is theirs and ``.json``, so that it is nobody else's."""


def save(
    model: nn.Module, path: str | os.PathLike[str], card: Mapping[str, Any], *, card_path: Path | None = None
) -> None:
    """Writes the weights, and beside them, under the same stem, a JSON card that says what they are.

    Both files appear whole or not at all: each is written under another name in the same folder, flushed to the disk
    and renamed.

    Args:
        model: The network; ``torch.compile``, ``DataParallel`` and ``AveragedModel`` wrappers are taken off.
        path: File to write; its folder is made if need be. ``.safetensors``, or ``.pt`` for a dictionary of plain
            tensors as ``torch.load(..., weights_only=True)`` reads it.
        card: What to record besides, for example ``dataset``; values JSON can hold. Filled in where absent:
            ``architecture`` and ``arguments`` of a model made by :func:`instar.models.registry.create`, ``classes``
            (their number), ``mean``, ``std``, ``instar`` (the version). ``sha256`` is always that of the weights file.
        card_path: Where the card goes; None is beside the weights.

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
    if path.suffix not in (".safetensors", ".pt"):
        raise UserError(f"weights are saved as .safetensors, or as .pt for torch.load; got {path.name!r}")
    model = unwrapped(model)
    weights = _packed(detached(model), path.suffix)
    write_with_card(path, weights, {**known(model), **card}, card_path=card_path)


def _packed(state: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return safetensors.torch.save(state, metadata={"format": "pt"})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write_with_card(path: Path, content: bytes, card: Mapping[str, Any], *, card_path: Path | None = None) -> None:
    """Writes a file and the card that names its sha256, both or neither.

    Args:
        path: The file; its folder is made if need be.
        content: All of it.
        card: What is to be known about it; values JSON can hold.
        card_path: Where the card goes; None is beside the file.

    Raises:
        UserError: If the card cannot be JSON, or the disk is full or read-only.
    """
    full = {**card, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        text = json.dumps(full, indent=2, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"the card of {path.name} must hold values that JSON knows: {error}") from None
    pending: list[tuple[Path, Path]] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Both are on the disk before either is renamed, so that weights and card of two different saves cannot meet
        # unless the machine stops between two renames; the sha256 tells even then.
        for target, part in ((path, content), (card_path or own_card(path), text.encode())):
            pending.append((write_beside(target, part), target))
        for temporary, target in pending:
            os.replace(temporary, target)
        flush_folder(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}. Is the disk full or read-only?") from error
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)


def weights_of(path: str | os.PathLike[str]) -> Path:
    """The file that a path means: itself, the one that a card is about, or the weights in a folder of the hub.

    Example:
        >>> print(weights_of("checkpoints/best.json"), weights_of("net.onnx.json"), weights_of("hub/config.json"))
        checkpoints/best.safetensors net.onnx hub/model.safetensors
    """
    path = Path(path)
    if path.is_dir():
        return path / HUB_WEIGHTS
    if path.suffix != ".json":
        return path
    if path.name == HUB_CARD:
        return path.with_name(HUB_WEIGHTS)
    named = path.with_suffix("")
    return named if named.suffix in OTHERS else path.with_suffix(".safetensors")


def card_of(weights: Path) -> Path:
    """Where a file's card is: `own_card`, or ``config.json`` in a folder of the hub."""
    own, hub = own_card(weights), weights.with_name(HUB_CARD)
    return hub if weights.name == HUB_WEIGHTS and not own.is_file() and hub.is_file() else own


def own_card(weights: Path) -> Path:
    """Where a card is written: ``best.json`` for ``best.safetensors``, ``net.pt.json`` for ``net.pt``."""
    if weights.suffix == ".safetensors":
        return weights.with_suffix(".json")
    return weights.with_name(f"{weights.name}.json")


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The card beside a weights file.

    Args:
        path: The weights, their ``.json`` card, or a folder of the hub.

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
    weights = weights_of(path)
    card_path = card_of(weights)
    try:
        text = read_bytes(card_path, limit=LARGEST_CARD).decode()
        card = json.loads(text)
    except FileNotFoundError:
        if not weights.is_file():
            raise absent(weights) from None
        raise UserError(
            f"{weights} has no card {card_path.name} beside it, so its architecture is unknown; "
            "copy the card too, or name the model and use load_foreign"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{card_path} is not a card: {one_line(error)}") from None
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

    Nothing in either file can run code: tensors are safetensors or read by ``weights_only``, the architecture must be
    one of this package or of timm, and timm is never asked for pretrained weights. For an architecture of your own
    (``module:function``) pass the model.

    Args:
        path: The weights (``.safetensors``, or ``.pt`` as `save` writes it), their ``.json`` card, or a folder that
            ``instar export --format hub`` wrote.
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
    weights = weights_of(path)
    card = read_card(weights)
    state = read_own(weights, card)
    architecture = card.get("architecture")
    if model is None:
        model = _rebuild(weights, card)
    else:
        model = unwrapped(model)
        made = origin(model)
        if made is not None and architecture is not None and made.architecture != architecture:
            raise UserError(
                f"{weights} holds {architecture}, the model is {made.architecture}; take the same model as in training"
            )
    differences = compare(state, tensors_of(model))
    if differences.any():
        raise other_architecture(weights, model, differences)
    copy_into(state, model)
    return model.eval()


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
        raise UserError(f"the card of {weights} cannot be rebuilt: {one_line(error)}") from error


def read_own(weights: Path, card: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in a weights file, which must be the one that its card means.

    Raises:
        UserError: It is missing or damaged, or belongs to another card.
    """
    try:
        content = read_bytes(weights)
    except FileNotFoundError:
        raise absent(weights) from None
    if hashlib.sha256(content).hexdigest() != card["sha256"]:
        parsed(weights, content)  # where it is damaged, that is the more telling message
        raise UserError(
            f"{weights} does not belong to its card: the sha256 differs. Was one of them replaced, or a copy cut short?"
        )
    return parsed(weights, content)


def known(model: nn.Module) -> dict[str, Any]:
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
