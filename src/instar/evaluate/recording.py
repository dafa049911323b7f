"""From outcomes to a record: scores, the worst case, rows for images, and the protocol."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
from typing import Any

import numpy as np
import torch

import instar
from instar.arrays import Arrays
from instar.devices import device_name
from instar.evaluate import symptoms
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.clean import Clean
from instar.evaluate.conditions import Conditions
from instar.evaluate.examine import budget
from instar.evaluate.finding import SUSPECT, Finding
from instar.evaluate.mechanism import PREFIX
from instar.evaluate.record import Record, Score
from instar.evaluate.sanity import findings
from instar.evaluate.shards import Outcome
from instar.evaluate.subject import Subject
from instar.evaluate.suites import Suite
from instar.evaluate.targets import Case, described
from instar.expression import number
from instar.models import origin


def recorded(
    case: Case,
    suite: Suite,
    subject: Subject,
    clean: Clean,
    outcomes: dict[str, Outcome],
    conditions: Conditions,
    identity: dict[str, Any],
    processes: int = 1,
) -> Record:
    """The record of an evaluation, from what the model said of clean images and what each attack did.

    Args:
        case: Model and images.
        suite: The attacks.
        subject: The model as it was attacked.
        clean: What it said of clean images.
        outcomes: By name of the suite's entries.
        conditions: What every attack was run under.
        identity: What all verdicts depend on besides images and attack.
        processes: How many processes shared the work.

    Returns:
        The record, not yet written.
    """
    count = len(clean.label)
    worst = clean.correct.copy()
    broken_by = np.where(clean.correct, "", "clean").astype("U64")
    margin = clean.margin.astype(np.float32)
    columns: Arrays = {}
    scores = {"clean": Score("clean", int(clean.correct.sum()), count)}
    for entry in suite.entries:
        outcome = outcomes[entry.name]
        scores[entry.name] = Score(entry.title, int(outcome.robust.sum()), count)
        columns[entry.name] = outcome.robust.astype(np.uint8)
        if entry.counts:
            broken_by[worst & ~outcome.robust] = entry.name
            worst &= outcome.robust
            if outcome.margin is not None:
                margin = np.fmin(margin, outcome.margin)  # NaN where the point was not attacked
        if outcome.stages:
            names = np.array([*outcome.stages, ""], dtype="U32")  # −1, for none, picks the last
            columns[f"{entry.name}_by"] = names[outcome.broken_by]
        columns |= {f"{PREFIX}{name}": column for name, column in outcome.measured.items()}
    scores["worst_case"] = Score("worst case", int(worst.sum()), count)
    instances: Arrays = {
        "index": clean.index,
        "label": clean.label,
        "prediction": clean.prediction,
        "clean_margin": clean.margin.astype(np.float32),
        "clean": clean.correct.astype(np.uint8),
        **columns,
        "adv_margin": margin,
        "worst_case": worst.astype(np.uint8),
        "broken_by": broken_by,
    }
    seconds = {"clean": clean.seconds, **{name: outcome.seconds for name, outcome in outcomes.items()}}
    return Record(
        target=case.target,
        suite=suite.name,
        checkpoint=case.name,
        protocol=_protocol(case, suite, subject, clean, conditions, identity),
        scores=scores,
        findings=(
            *_with_randomness(findings(suite.entries, outcomes, correct=clean.correct), clean),
            *symptoms.nothing_left(clean.label, clean.correct, worst),
        ),
        instances=instances,
        run={
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
            "reused": [name for name, outcome in outcomes.items() if outcome.reused],
            "processes": processes,
            "threads": torch.get_num_threads(),
        },
    )


def _with_randomness(found: tuple[Finding, ...], clean: Clean) -> tuple[Finding, ...]:
    """What the checks found, and that the model is random if none of them could say so."""
    if not clean.random or any(finding.check == "randomised" for finding in found):
        return found
    text = "outputs differ from call to call: attacks that do not average over them understate what is possible"
    source = "two passes over the same images; checks of the AutoAttack reference code"
    return (*found, Finding("randomised", SUSPECT, 1.0, None, 0.0, 0.0, text, source))


def _protocol(
    case: Case,
    suite: Suite,
    subject: Subject,
    clean: Clean,
    conditions: Conditions,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the numbers depend on, in values JSON can hold."""
    info = case.split.images.info
    exact = conditions.precision == "float32"
    made = origin(case.model)
    images = hashlib.sha256(" ".join(clean.digests).encode()).hexdigest()
    reference = [entry for entry in suite.entries if entry.name == "autoattack"]
    attacks = {
        entry.name: {
            "title": entry.title,
            "expression": repr(entry.attack),
            "budget": budget(entry.attack, subject.classes),
            **({} if entry.counts else {"counts": False}),
            **({"diagnosis": True} if entry.diagnosis else {}),
        }
        for entry in suite.entries
    }
    known: dict[str, Any] = {
        "norm": case.ball.norm,
        "eps": number(case.ball.radius),
        "eps_value": case.ball.radius,
        "attacks": attacks,
        "robust_if": "the clean prediction is right and no inspected iterate of the attack is misclassified",
        "n": len(clean.label),
        "images": described(case.split),
        "images_sha256": images,
        "data": {"name": info.name, "title": info.title, "shape": list(info.shape), "classes": len(case.split.classes)},
        "seed": conditions.seed,
        "batch_size": conditions.batch_size,
        "shard_size": conditions.shard_size,
        "checkpoint": dict(case.checkpoint),
        "weights_sha256": case.weights,
        "model": {
            "architecture": made.architecture if made else type(case.model).__name__,
            "arguments": dict(made.arguments) if made else None,
            "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
            "classes": subject.classes,
        },
        "training": dict(case.training),
        "bn_mode": "eval",
        "precision": "float32" if exact else "bf16 search, confirmed in float32",
        "folded": subject.folded,
        "reference_autoattack": any(
            exact and isinstance(entry.attack, AutoAttack) and entry.attack.is_reference and subject.classes >= 10
            for entry in reference
        ),
        "versions": {
            "instar": instar.__version__,
            "torch": torch.__version__,
            "pyautoattack": version("pyautoattack"),
            "python": platform.python_version(),
        },
        "device": device_name(subject.device),
    }
    text = repr((sorted(identity.items()), images, known["attacks"], known["norm"], known["eps"]))
    return {**known, "key": hashlib.sha256(text.encode()).hexdigest()}


def version(package: str) -> str:
    """The installed version of a package, or ``"unknown"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
