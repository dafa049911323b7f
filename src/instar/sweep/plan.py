"""A sweep before it runs: every configuration checked, every run with its folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instar.config import INDIFFERENT
from instar.errors import UserError
from instar.runs import read_run
from instar.sweep.grid import Choice


@dataclass(frozen=True)
class Configuration:
    """What a run will be, with everything that was left open filled in.

    Attributes:
        method: The method's expression.
        training: All training settings, as ``run.json`` holds them.
    """

    method: str
    training: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """How each finished run is judged.

    Attributes:
        suite: Name of the suite.
        checkpoint: ``best``, ``last`` or ``both``.
        settings: Further flags of ``instar evaluate`` by name.
        whole: Whether a suite without ``n`` looks at all test images.
    """

    suite: str
    checkpoint: str
    settings: Mapping[str, Any]
    whole: bool = True

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The checkpoints that are judged."""
        return ("best", "last") if self.checkpoint == "both" else (self.checkpoint,)


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: Its name, which is that of its folder.
        folder: Its folder.
        log: What its commands have printed; locked while they run.
        method: The method as the user wrote it.
        varied: Settings that differ between runs, as written.
        seed: Its seed.
        label: The run in words, without its seed: runs with one label form a row of the grouped table.
        train: Words after ``instar train``, without ``--out`` and ``--resume``.
        evaluation: How it is judged, or None.
        recipe: Name of its recipe.
        configuration: What the run will be.
    """

    name: str
    folder: Path
    log: Path
    method: str
    varied: tuple[tuple[str, str], ...]
    seed: int
    label: str
    train: tuple[str, ...]
    evaluation: Evaluation | None
    recipe: str
    configuration: Configuration


def plan(
    choices: Sequence[Choice],
    *,
    out: Path,
    configure: Callable[[Sequence[str]], Configuration],
    evaluation: Evaluation | None = None,
) -> list[Member]:
    """Check every run of a sweep and find its folder.

    A run is known by its configuration: one that is there already, from an earlier and perhaps smaller sweep into the
    same folder, is found whatever it is called.

    Args:
        choices: The runs.
        out: Folder of the sweep.
        configure: Turns words of ``instar train`` into a configuration, or raises `UserError`.
        evaluation: How each is judged.

    Returns:
        The runs, in order.

    Raises:
        UserError: A configuration that cannot work, two that are the same, or a folder that holds another run.
    """
    checked: dict[tuple[str, ...], Configuration] = {}
    stored = _stored(out)
    members: list[Member] = []
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for choice in choices:
        if choice.words not in checked:
            try:
                checked[choice.words] = configure(choice.words)
            except UserError as error:
                raise UserError(f"{choice.label}: {error}") from None
        shared = checked[choice.words]
        configuration = Configuration(shared.method, {**shared.training, "seed": choice.seed})
        recipe = choice.words[choice.words.index("--recipe") + 1]
        who = f"{choice.label}, seed {choice.seed}"
        key = repr((recipe, configuration.method, sorted(configuration.training.items())))
        if key in taken:
            raise UserError(f"two runs of the sweep are the same: {taken[key]}; and {who}")
        taken[key] = who
        name = _name(choice)
        # Its own name first: where runs differ in nothing but the device, that is what tells them apart.
        order = sorted(stored, key=lambda place, name=name: place.name != name)  # type: ignore[misc]
        free = (place for place in order if place.name not in names)
        there = next((place for place in free if not difference(stored[place], recipe, configuration)), None)
        name = name if there is None else there.name
        if name in names:
            name = f"{name}-{hashlib.sha256(who.encode()).hexdigest()[:6]}"
        names[name] = who
        folder = out / name
        if there is None and folder in stored:
            why = difference(stored[folder], recipe, configuration)
            raise UserError(f"{folder} holds another run: {why}. Choose another --out")
        members.append(
            Member(
                name=name,
                folder=folder,
                log=out / "logs" / f"{name}.log",
                method=choice.method,
                varied=choice.varied,
                seed=choice.seed,
                label=choice.label,
                train=(*choice.words, "--seed", str(choice.seed)),
                evaluation=evaluation,
                recipe=recipe,
                configuration=configuration,
            )
        )
    return members


def _stored(out: Path) -> dict[Path, dict[str, Any]]:
    """The runs that are in the sweep's folder."""
    if not out.is_dir():
        return {}
    return {file.parent: read_run(file.parent) for file in sorted(out.glob("*/run.json"))}


def difference(run: Mapping[str, Any], recipe: str, wanted: Configuration) -> str:
    """In what a stored run differs from a wanted one, in words; empty if in nothing that decides a number."""
    if run.get("recipe") != recipe:
        return f"its recipe is {run.get('recipe')}, not {recipe}"
    if run.get("method") != wanted.method:
        return f"its method is {run.get('method')}, not {wanted.method}"
    training = run.get("training") or {}
    for name, item in wanted.training.items():
        # A setting that an older run does not name had its default then.
        if name not in INDIFFERENT and name in training and training[name] != item:
            return f"its {name} is {training[name]}, not {item}"
    return ""


def _name(choice: Choice) -> str:
    """A name that tells the runs of a sweep apart, and stays the same when it is started again.

    Example:
        >>> _name(Choice("my.py:mine(beta=3)", (("eps", "4/255"),), (), 1))
        'mine-beta_3-eps_4_255-seed1'
    """
    method, bracket, arguments = choice.method.partition("(")
    parts = [method.rpartition(":")[2].replace("@", "-")]
    parts += [arguments.removesuffix(")")] if bracket else []
    parts += [f"{name}_{given}" for name, given in choice.varied]
    clean = [re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts]
    name = "-".join(part for part in clean if part).lstrip(".-")
    if len(name) > 120:
        name = f"{name[:120]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return f"{name}-seed{choice.seed}"
