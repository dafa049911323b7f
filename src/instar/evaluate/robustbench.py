"""RobustBench: its entry for a model, the text that submits it, and where an evaluation departs from its protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.errors import UserError, unknown
from instar.evaluate.record import Record
from instar.evaluate.shards import make_folder
from instar.storage import write_atomically

BOARDS = {
    ("cifar10", "Linf"): (8 / 255, 10_000),
    ("cifar10", "L2"): (0.5, 10_000),
    ("cifar100", "Linf"): (8 / 255, 10_000),
    ("imagenet", "Linf"): (4 / 255, 5_000),
}
"""The leaderboards of ℓp attacks: radius and number of test images."""
FIELDS = (
    "link",
    "name",
    "authors",
    "additional_data",
    "number_forward_passes",
    "dataset",
    "venue",
    "architecture",
    "eps",
    "clean_acc",
    "reported",
    "autoattack_acc",
    "footnote",
    "external",
    "unreliable",
)
"""The fields of its ``model_info`` files, in their order; the last three are optional there."""
OPTIONAL = frozenset({"footnote", "external", "unreliable"})
TOLD = ("link", "name", "authors", "venue", "additional_data", "reported", "footnote", "external", "architecture")
"""What can be told about a model besides what its record knows."""
MORE = ("model_name", "checkpoint", "license")
"""What the submission needs and the entry does not have: an identifier, an address, a licence."""


@dataclass(frozen=True)
class Claim:
    """A model's entry and what stands in the way of submitting it.

    Attributes:
        info: The fields of ``model_info``; None where nobody said.
        missing: Fields that are still to be filled.
        departures: Where the evaluation is not the leaderboard's.
        text: The submission, in Markdown.
    """

    info: Mapping[str, Any]
    missing: tuple[str, ...]
    departures: tuple[str, ...]
    text: str


def departures(record: Record) -> tuple[str, ...]:
    """Where an evaluation is not the leaderboard's, in sentences; empty if its number may stand there.

    Args:
        record: An evaluation with AutoAttack.

    Returns:
        One sentence each.
    """
    protocol = record.protocol
    data, norm = protocol["data"]["name"], protocol["norm"]
    found = []
    board = BOARDS.get((data, norm))
    if board is None:
        known = ", ".join(f"{name} {kind}" for name, kind in BOARDS)
        found.append(f"there is no leaderboard for {data} in {norm}; there are {known}")
    else:
        eps, images = board
        if abs(protocol["eps_value"] - eps) > 1e-9:
            found.append(f"eps is {protocol['eps']}, the leaderboard's is {_fraction(eps)}")
        if record.n != images:
            found.append(f"{record.n} images were evaluated, the leaderboard takes {images}")
    if "autoattack" not in record.scores:
        found.append("AutoAttack was not run")
    elif not protocol["reference_autoattack"]:
        found.append("AutoAttack was not run in its standard version with its standard budget")
    for finding in record.findings:
        if finding.check in ("randomised", "dynamic", "zero_gradient"):
            found.append(f"models of this kind are not accepted: {finding.text}")
    return tuple(found)


def _fraction(eps: float) -> str:
    levels = round(eps * 255)
    return f"{levels}/255" if abs(levels / 255 - eps) < 1e-12 else f"{eps:g}"


def model_info(record: Record, about: Mapping[str, Any] | None = None) -> Claim:
    """The entry of a model, filled from its record and from what is told about it.

    Args:
        record: An evaluation with AutoAttack.
        about: What a record cannot know: ``link``, ``name`` (the paper's title), ``authors``, ``venue``, ``reported``
            (the paper's own robust accuracy in percent), ``footnote``, ``external``; ``additional_data`` and
            ``architecture`` where the record is to be corrected; ``model_name``, ``checkpoint`` (an address) and
            ``license`` for the submission.

    Returns:
        The entry with all fields, what is missing, what departs from the protocol, and the text.

    Raises:
        UserError: A field that RobustBench does not have.
    """
    told = dict(about or {})
    for field in told:
        if field not in (*TOLD, *MORE):
            raise unknown("field of RobustBench's entries", field, [*TOLD, *MORE])
    scores, protocol = record.scores, record.protocol
    data = (protocol.get("training") or {}).get("data") or {}
    extra = _yes_or_no(told["additional_data"]) if "additional_data" in told else data.get("additional_data")
    autoattack = scores.get("autoattack")
    # Where another attack of the same record found more, the entry says so as RobustBench does for external ones.
    beaten = autoattack is not None and scores["worst_case"].correct < autoattack.correct
    info: dict[str, Any] = dict.fromkeys(FIELDS)
    info |= {
        "additional_data": extra,
        "number_forward_passes": 1,
        "dataset": protocol["data"]["name"],
        "architecture": protocol["model"]["architecture"],
        "eps": protocol["eps"],
        "clean_acc": f"{100 * scores['clean'].accuracy:.2f}",
        "autoattack_acc": None if autoattack is None else f"{100 * autoattack.accuracy:.2f}",
        "external": f"{100 * scores['worst_case'].accuracy:.2f}" if beaten else None,
        "unreliable": record.verdict.word == "overestimated",
    }
    info |= {field: told[field] for field in TOLD if field in told and field != "additional_data"}
    needed = [field for field in FIELDS if info[field] is None and field not in OPTIONAL]
    missing = tuple([*needed, *(field for field in MORE if not told.get(field))])
    found = departures(record)
    return Claim(info, missing, found, _text(record, info, told, missing, found))


def _yes_or_no(said: Any) -> bool:
    """A truth value as it is typed.

    Raises:
        UserError: Neither yes nor no.
    """
    if isinstance(said, bool):
        return said
    words = {"true": True, "yes": True, "false": False, "no": False}
    if str(said).lower() not in words:
        raise UserError(f"additional_data must be true or false; got {said!r}")
    return words[str(said).lower()]


def _text(
    record: Record,
    info: Mapping[str, Any],
    told: Mapping[str, Any],
    missing: Sequence[str],
    found: Sequence[str],
) -> str:
    """The submission: the fields that the leaderboard's issue form asks for, and all that speaks against it."""

    def said(field: str, given: Mapping[str, Any] = info) -> str:
        entry = given.get(field)
        return "TO BE FILLED" if entry is None else str(entry).lower() if isinstance(entry, bool) else str(entry)

    protocol = record.protocol
    robust = info["external"] or info["autoattack_acc"]
    evaluation = (
        f"AutoAttack through pyautoattack {protocol['versions']['pyautoattack']}, {protocol['images']}, seed "
        f"{protocol['seed']}, batches of {protocol['batch_size']} in shards of {protocol['shard_size']}, "
        f"{protocol['precision']}, torch {protocol['versions']['torch']}"
    )
    lines = [
        f"# [New Model] {said('model_name', told)}",
        "",
        "## Paper",
        "",
        f"- Title: {said('name')}",
        f"- URL: {said('link')}",
        f"- Authors: {said('authors')}",
        f"- Venue: {said('venue')}",
        "",
        "## Claim",
        "",
        f"- Architecture: {said('architecture')}",
        f"- Threat model: {protocol['norm']}",
        f"- eps: {said('eps')}",
        f"- Clean accuracy: {said('clean_acc')}",
        f"- Robust accuracy: {'TO BE FILLED' if robust is None else robust}",
        f"- Additional data: {said('additional_data')}",
        f"- Evaluation method: {evaluation}",
        f"- Checkpoint and code: {said('checkpoint', told)}",
        f"- Licence: {said('license', told)}",
        f"- SHA-256 of the weights: {protocol['weights_sha256']}",
        "",
        "## Before submitting",
        "",
        f"- verdict of the sanity checks: {record.verdict.line}",
        *(f"- departs from the protocol: {sentence}" for sentence in found),
        *(f"- to be filled: {field}" for field in missing),
    ]
    return "\n".join(lines) + "\n"


def write(record: Record, about: Mapping[str, Any] | None = None) -> tuple[Path, Path]:
    """Write the entry and the submission into a folder beside the record, named like it.

    The entry is called ``<model_name>.json``, as RobustBench wants it, or ``model_info.json``; it also lists what is
    missing and where the evaluation departs from the protocol. The submission is ``submission.md``.

    Args:
        record: A record that was written.
        about: See `model_info`.

    Returns:
        The two files.

    Raises:
        UserError: The record lies nowhere, a field that RobustBench does not have, a name that cannot be one of a
            file, or the disk is full.
    """
    if record.path is None:
        raise UserError("the record was not written anywhere: give out to evaluate")
    claim = model_info(record, about)
    name = str((about or {}).get("model_name") or "model_info")
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"model_name must be letters, digits, - and _, such as Rice2020Overfitting; got {name!r}")
    content = {**claim.info, "missing": list(claim.missing), "departures": list(claim.departures)}
    # Not beside the records themselves: whoever reads those would take it for one.
    folder = record.path.with_suffix("")
    make_folder(folder)
    entry, text = folder / f"{name}.json", folder / "submission.md"
    write_atomically(entry, f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode())
    write_atomically(text, claim.text.encode())
    return entry, text


def told(words: Sequence[str]) -> dict[str, str]:
    """What was said about a model as ``field=text``, one word each.

    Args:
        words: For example ``["name=Overfitting in deep learning", "venue=ICML 2020"]``.

    Returns:
        The fields.

    Raises:
        UserError: A word without ``=``, or a field that RobustBench does not have.

    Example:
        >>> told(["venue=ICML 2020"])
        {'venue': 'ICML 2020'}
    """
    found = {}
    for word in words:
        field, sign, text = word.partition("=")
        if not sign:
            raise UserError(f"say about a model as field=text, for example venue='ICML 2020'; got {word!r}")
        if field not in (*TOLD, *MORE):
            raise unknown("field of RobustBench's entries", field, [*TOLD, *MORE])
        found[field] = text
    return found
