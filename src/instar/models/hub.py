"""A folder as the Hugging Face hub holds models: weights, config, and a card that tells what the numbers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def config(card: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``config.json``: our card, and beside it the fields that readers of the hub look for.

    Args:
        card: The card of the weights.

    Returns:
        The card with ``model_type``, ``id2label``, ``label2id``, ``num_channels`` and ``image_size`` as far as known.

    Example:
        >>> config({"arguments": {"channels": 3, "image_size": 32}, "class_names": ["cat", "dog"]})["id2label"]
        {'0': 'cat', '1': 'dog'}
    """
    arguments = card.get("arguments") or {}
    names = card.get("class_names") or [str(number) for number in range(int(arguments.get("classes") or 0))]
    made = {
        "model_type": "instar",
        "num_channels": arguments.get("channels"),
        "image_size": arguments.get("image_size"),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return {**{key: value for key, value in made.items() if value not in (None, {})}, **card}


def readme(name: str, card: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The model card, ``README.md``: what the model is, how to load it, and every number with its protocol.

    Args:
        name: What the model is called.
        card: The card of the weights.
        records: Contents of evaluation records of these weights.

    Returns:
        Markdown with the front matter of the hub.

    Example:
        >>> print(readme("net", {"dataset": "digits"}, []).splitlines()[-1])
        None is recorded. `instar evaluate` measures them; a robust number without its protocol says nothing.
    """
    arguments = card.get("arguments") or {}
    dataset = card.get("dataset")
    front = ["---", "library_name: instar", "pipeline_tag: image-classification"]
    front += ["tags: [adversarial-robustness, adversarial-training, image-classification, pytorch]"]
    front += [f"datasets: [{dataset}]"] if isinstance(dataset, str) and dataset.isidentifier() else []
    known = {
        "architecture": card.get("architecture"),
        "arguments": ", ".join(f"{key}={value}" for key, value in arguments.items() if key not in ("mean", "std")),
        "trained on": dataset,
        "method": card.get("method"),
        "threat model": _threat(card.get("threat")),
        "checkpoint": _checkpoint(card),
        "instar": card.get("instar"),
        "sha256 of the weights": card.get("sha256"),
    }
    lines = [*front, "---", "", f"# {name}", ""]
    lines += ["An image classifier, trained with Instar. It takes images (B, C, H, W) in [0, 1] and returns logits;"]
    lines += ["normalisation and logit scale are inside.", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in known.items() if value not in (None, "")]
    lines += ["", "```python", "from instar.models import load", "", f'model = load("{name}")  # this folder', "```"]
    lines += ["", "## Robustness", ""]
    if not records:
        lines.append(
            "None is recorded. `instar evaluate` measures them; a robust number without its protocol says nothing."
        )
    for record in records:
        lines += _numbers(record)
    return "\n".join(lines).rstrip() + "\n"


def _numbers(record: Mapping[str, Any]) -> list[str]:
    protocol, results = record["protocol"], record["results"]
    lines = [f"### Suite {record['suite']}: {protocol['norm']}, eps {protocol['eps']}", ""]
    lines += ["| accuracy under | % | 95 % interval |", "| --- | --- | --- |"]
    for entry in results.values():
        low, high = 100 * entry["low"], 100 * entry["high"]
        lines.append(f"| {_cell(entry['title'])} | {100 * entry['accuracy']:.2f} | {low:.1f} to {high:.1f} |")
    checkpoint = protocol.get("checkpoint") or {}
    versions = ", ".join(f"{key} {value}" for key, value in (protocol.get("versions") or {}).items())
    said = {
        "images": protocol.get("images"),
        "checkpoint": f"{checkpoint.get('which')}: {checkpoint.get('rule')}",
        "counts as robust if": protocol.get("robust_if"),
        "precision": protocol.get("precision"),
        "BatchNorm": protocol.get("bn_mode"),
        "seed": protocol.get("seed"),
        "batch size": protocol.get("batch_size"),
        "device": protocol.get("device"),
        "versions": versions,
    }
    lines += ["", "Protocol: " + "; ".join(f"{key} {_cell(value)}" for key, value in said.items() if value is not None)]
    for name, attack in (protocol.get("attacks") or {}).items():
        lines.append(f"- {_cell(attack.get('title', name))}: `{attack.get('expression', '')}`")
    lines += [
        f"- **{_cell(finding['verdict'])}**: {_cell(finding['text'])}"
        for finding in record.get("findings") or ()
        if finding.get("verdict") != "normal"
    ]
    return [*lines, ""]


def _threat(threat: Any) -> str | None:
    return f"{threat.get('norm')}, eps {threat.get('eps')}" if isinstance(threat, Mapping) else None


def _checkpoint(card: Mapping[str, Any]) -> str | None:
    selection = card.get("selection")
    if not isinstance(selection, Mapping):
        return card.get("checkpoint")
    rule = f"chosen by {selection.get('rule')} on held-out training images"
    epoch = "" if card.get("epoch") is None else f" (epoch {card['epoch'] + 1})"
    return f"{card.get('checkpoint', '')}{epoch}, {rule if card.get('checkpoint') == 'best' else 'not selected'}"


def _cell(value: Any) -> str:
    """Text that cannot break out of a table."""
    return " ".join(str(value).replace("|", "\\|").split())
