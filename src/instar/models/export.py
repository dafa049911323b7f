"""Trained networks for use elsewhere: plain weights, ONNX, or a folder for the hub, with normalisation inside."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instar.errors import UserError, unknown
from instar.models import onnx
from instar.models.files import (
    HUB_CARD,
    HUB_WEIGHTS,
    known,
    load,
    own_card,
    read_card,
    save,
    weights_of,
    write_with_card,
)
from instar.models.hub import config, readme
from instar.models.registry import create
from instar.runs import check_checkpoint
from instar.storage import write_atomically

FORMATS = {"safetensors": ".safetensors", "state_dict": ".pt", "onnx": ".onnx", "hub": ""}
"""Formats, with the suffix that their files have; the hub's is a folder."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file or folder.
        files: All files, in the order in which they were written.
        note: What was checked, or could not be.
    """

    path: Path
    files: tuple[Path, ...]
    note: str = ""


def export(
    target: str | Path | nn.Module,
    out: str | Path,
    *,
    format: str = "safetensors",
    checkpoint: str = "best",
    model: str | nn.Module | None = None,
    card: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a trained network for use elsewhere; what it does to images and logits goes with it.

    ``instar evaluate`` reads all of them back without further flags, and gives the same numbers.

    Args:
        target: A run's folder, weights of ours with their card, or a network.
        out: The file to write, or the folder for the hub; nothing is overwritten.
        format: ``"safetensors"``: tensors and a JSON card. ``"state_dict"``: a dictionary of plain tensors that
            ``torch.load(..., weights_only=True)`` reads, and a card. ``"onnx"``: the whole computation, for any batch
            size, compared with the network if onnxruntime is installed. ``"hub"``: a folder with ``model.safetensors``,
            ``config.json`` and a model card with the protocol of every recorded number.
        checkpoint: ``"best"`` or ``"last"`` of a run.
        model: For weights of your own code: the network, or its name as ``module:function``.
        card: What to record about a network given as a module, for example ``dataset`` and ``threat``.

    Returns:
        What was written.

    Raises:
        UserError: An unknown format, a target that is no run or weights of ours, a suffix that does not fit, a place
            that is taken or cannot be written, or a network that cannot be written as ONNX.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> done = export(create("small_cnn", classes=10, width=4), folder / "net.pt", format="state_dict")
        >>> [file.name for file in done.files], len(torch.load(done.path, weights_only=True)) > 0
        (['net.pt', 'net.pt.json'], True)
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    out = Path(out).expanduser()
    if FORMATS[format] and out.suffix != FORMATS[format]:
        raise UserError(f"a file of format {format} must end in {FORMATS[format]}; got {out.name!r}")
    wanted = [out / HUB_WEIGHTS, out / HUB_CARD, out / "README.md"] if format == "hub" else [out, own_card(out)]
    for path in (out, *wanted):
        if path.exists() and not (path.is_dir() and format == "hub"):
            raise UserError(f"{path} exists already; choose another --out")
    network, about, records = _source(target, checkpoint, model, card or {})
    about = {key: value for key, value in about.items() if key != "sha256"}
    if format == "onnx":
        return _as_onnx(network, out, about)
    if format == "hub":
        save(network, wanted[0], config({**known(network), **about}), card_path=wanted[1])
        text = readme(out.resolve().name, read_card(out), records)
        write_atomically(wanted[2], text.encode())
    else:
        save(network, out, about)
    return Exported(out, tuple(wanted))


def _source(
    target: str | Path | nn.Module, checkpoint: str, model: str | nn.Module | None, card: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any], list[dict[str, Any]]]:
    """The network, what its card says, and its evaluation records."""
    if isinstance(target, nn.Module):
        return target, card, []
    path = Path(target).expanduser()
    if (path / "run.json").is_file():
        check_checkpoint(checkpoint)
        path = path / "checkpoints" / f"{checkpoint}.safetensors"
    elif not path.exists():
        raise UserError(f"there is no run folder or weights file {path}")
    about = read_card(path)
    if isinstance(model, str):
        model = create(model, **{**about.get("arguments", {}), "seed": 0})
    weights = weights_of(path)
    beside = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    return load(path, model=model), {**about, **card}, _records(beside / "evaluations", about["sha256"])


def _records(folder: Path, weights: str) -> list[dict[str, Any]]:
    """Evaluation records of these weights, in order of their names; what is damaged is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            fits = record["protocol"]["weights_sha256"] == weights and bool(record["results"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if fits:
            found.append(record)
    return found


def _as_onnx(network: nn.Module, out: Path, about: Mapping[str, Any]) -> Exported:
    facts = {**known(network), **about}
    arguments = facts.get("arguments") or {}
    if not {"channels", "image_size"} <= arguments.keys():
        raise UserError("nothing says what images this network takes: make it with instar.models.create")
    shape = (int(arguments["channels"]), int(arguments["image_size"]), int(arguments["image_size"]))
    plain = copy.deepcopy(network).to(device="cpu", dtype=torch.float32).eval()
    content = onnx.exported(plain, shape)
    note = "not compared with the network, because onnxruntime is not installed"
    if onnx.installed("onnxruntime"):
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / "trial.onnx"
            trial.write_bytes(content)
            difference = onnx.largest_difference(trial, plain, shape)
        if not difference <= onnx.TOLERANCE:
            raise UserError(
                f"the ONNX model gives other logits than the network (by {difference:.1e} of the largest, where "
                f"{onnx.TOLERANCE:.0e} is allowed), so it was not written"
            )
        note = f"logits equal the network's to {difference:.0e} of the largest in onnxruntime"
    write_with_card(out, content, {**facts, "format": "onnx"})
    return Exported(out, (out, own_card(out)), note)
