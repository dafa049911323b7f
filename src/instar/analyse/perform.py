"""All analyses that the files allow, one after the other."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from instar.analyse.analysis import ANALYSES, FOLDER, Analysis, Found
from instar.analyse.target import SPLITS, Target, Tick, open_files, open_targets
from instar.config import fits
from instar.devices import choose_device
from instar.errors import UserError, one_line, unknown
from instar.evaluate.targets import Normalization
from instar.report.stored import UnavailableError

Source = str | Path | nn.Module


@dataclass(frozen=True)
class Missing:
    """An analysis that was not done.

    Attributes:
        name: Name of the analysis.
        label: Model and checkpoint in words, or the path.
        reason: Why, in one line.
        failed: Whether something was wrong; otherwise what it needs is only not there.
    """

    name: str
    label: str
    reason: str
    failed: bool = False


Heard = Callable[[Found | Missing], None]


def analyse(
    sources: Source | Sequence[Source],
    *,
    only: Sequence[str] | None = None,
    split: str | None = None,
    checkpoint: str = "both",
    data: Any = None,
    root: str | Path | None = None,
    model: str | nn.Module | None = None,
    model_arguments: Mapping[str, Any] | None = None,
    normalize: Normalization = "identity",
    n: int | None = 1000,
    norm: str | None = None,
    eps: float | str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    tick: Tick | None = None,
    heard: Heard | None = None,
) -> list[Found | Missing]:
    """Run all analyses that are possible with the files that are there.

    Every result is written as soon as it is there, and long analyses keep their finished parts: an interrupted call,
    made again, goes on where it stopped.

    Args:
        sources: Run folders and weights files; of weights that were saved along a training, give several. A module
            needs `data`.
        only: Names of analyses; None is all of them.
        split: ``"train"``, ``"test"`` or ``"both"``; None leaves it to each analysis.
        checkpoint: Of a run: ``"best"``, ``"last"`` or ``"both"``.
        data: As for `instar.analyse.open_targets`.
        root: Folder that data sets lie in; None is the default one.
        model: As for `instar.analyse.open_targets`, with `model_arguments` and `normalize`: for foreign weights.
        model_arguments: See `model`.
        normalize: See `model`.
        n: Images of each split; None is all.
        norm: Threat model; None takes the one that was trained against.
        eps: Its radius; None as for `norm`.
        seed: Of all that is random.
        batch_size: Images in one forward pass; None is 250.
        device: Where to compute; ``"auto"`` takes a GPU if there is one.
        out: Folder for results; with several sources each gets a folder in it. None is ``analyses`` in the run folder
            or beside the weights.
        settings: For analyses by name, further arguments of their `measure`.
        tick: Called as the work proceeds.
        heard: Called with each result, or with why there is none, as soon as that is known.

    Returns:
        Results and what is missing, in the order in which they were found. Comparisons come last: those within a run
        lie with its results, those between runs in ``comparison/analyses`` beside the first run, or in `out`.

    Raises:
        UserError: A wrong name, or a source that cannot be opened.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> pairs = torch.rand(20, 1, 2, 2), torch.arange(20) % 2
        >>> (found,) = analyse(net, data=pairs, eps=0.1, only=["pairs"])
        >>> found.name, found.protocol["n"]
        ('pairs', 20)
    """
    given = [sources] if isinstance(sources, (str, Path, nn.Module)) else list(sources)
    if not given:
        raise UserError("analyse what? Give at least one run folder or weights file")
    wanted = _wanted(only)
    if split not in (None, "both", *SPLITS):
        raise unknown("split", split, ["both", *SPLITS])
    if stray := set(settings or {}) - set(wanted):
        raise unknown("analysis in settings", sorted(stray)[0], wanted)
    for name, named in (settings or {}).items():
        known = dict(list(inspect.signature(wanted[name].measure, eval_str=True).parameters.items())[1:])
        for setting, item in named.items():
            if setting not in known:
                raise unknown(f"setting of {name}", setting, known)
            if not fits(item, wish := known[setting].annotation):
                kind = str(wish if "|" in str(wish) else getattr(wish, "__name__", wish))
                raise UserError(f"{setting} of {name} must be {re.sub(r'[a-z_.]+[.]', '', kind)}; got {item!r}")
    opening = {
        "checkpoint": checkpoint,
        "data": data,
        "root": root,
        "model": model,
        "model_arguments": model_arguments,
        "normalize": normalize,
        "n": n,
        "norm": norm,
        "eps": eps,
        "batch_size": batch_size,
        "device": device,
    }
    session = _Session(wanted, split, seed, opening, settings or {}, tick, heard or (lambda one: None))
    folders = _folders(given, out)
    choose_device(device)
    for name, count in (("n", n), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1; got {count}")
    for source in given:  # before hours of work, not after
        session.check(source)
    for source, folder in zip(given, folders, strict=True):
        session.one(source, folder)
    if len(given) > 1:
        session.together(_between(given, out))
    return session.done


def _wanted(only: Sequence[str] | None) -> dict[str, Analysis]:
    if only is not None and not only:
        raise UserError(f"no analysis is named; there are {', '.join(ANALYSES)}")
    for name in only or ():
        if name not in ANALYSES:
            raise unknown("analysis", name, ANALYSES)
    return {name: analysis for name, analysis in ANALYSES.items() if only is None or name in only}


def _folders(given: Sequence[Source], out: str | Path | None) -> list[Path | None]:
    """Where the results of each source go; None leaves it to the source."""
    if out is None or len(given) == 1:
        return [None if out is None else Path(out)] * len(given)
    folders: list[Path | None] = []
    for number, source in enumerate(given, start=1):
        name = type(source).__name__ if isinstance(source, nn.Module) else Path(source).expanduser().resolve().stem
        place = Path(out) / name
        folders.append(place if place not in folders else place.with_name(f"{name}-{number}"))
    return folders


def _between(given: Sequence[Source], out: str | Path | None) -> Path | None:
    """Where comparisons of several sources go."""
    if out is not None:
        return Path(out)
    first = given[0]
    if isinstance(first, nn.Module):
        return None
    return Path(first).expanduser().resolve().parent / "comparison" / FOLDER


_ASKED = ("checkpoint", "data", "root", "model", "model_arguments", "normalize", "norm", "eps")
"""What decides whether a source can be opened at all."""


@dataclass(frozen=True)
class _Session:
    """One call of `analyse`, with what it has found so far."""

    wanted: Mapping[str, Analysis]
    split: str | None
    seed: int
    opening: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]
    tick: Tick | None
    heard: Heard
    done: list[Found | Missing] = field(default_factory=list)

    def check(self, source: Source) -> None:
        """Refuse a path that is nothing to analyse, and what was asked for where it does not fit the source."""
        if not isinstance(source, nn.Module):
            path = Path(source).expanduser()
            if path.is_dir():
                open_files(path)
            elif not path.exists():
                raise UserError(f"there is no run folder or weights file {path}")
        usual = inspect.signature(open_targets).parameters
        asked = any(self.opening[name] != usual[name].default for name in _ASKED)
        split = next((self._splits(one)[0] for one in self.wanted.values() if one.needs == "model"), None)
        if asked and split is not None:  # what is missing without having been asked for is told with the results
            with contextlib.suppress(UnavailableError):
                self._open(split, source, None)

    def one(self, source: Source, folder: Path | None) -> None:
        """All analyses of one source, then comparisons among its own checkpoints and splits."""
        begun = len(self.done)
        opened: dict[str, list[Target] | UserError] = {}
        for analysis in self.wanted.values():
            for target in self._targets(analysis, source, folder, opened):
                self._measure(analysis, target)
        for analysis in self.wanted.values():
            mine = [one for one in self.done[begun:] if isinstance(one, Found) and one.name == analysis.name]
            if len(mine) > 1:
                where = mine[0].path.parent if mine[0].path is not None else None
                self._compare(analysis, mine, where)

    def together(self, folder: Path | None) -> None:
        """Comparisons of all sources."""
        for analysis in self.wanted.values():
            all_found = [one for one in self.done if isinstance(one, Found) and one.name == analysis.name]
            self._compare(analysis, [one for one in all_found if not one.compares], folder)

    def _targets(
        self, analysis: Analysis, source: Source, folder: Path | None, opened: dict[str, list[Target] | UserError]
    ) -> Iterator[Target]:
        """What an analysis looks at, opened once for all analyses; a reason is told where it cannot be opened."""
        for name in ("files",) if analysis.needs == "records" else self._splits(analysis):
            if name not in opened:
                try:
                    opened[name] = self._open(name, source, folder)
                except UserError as error:
                    opened[name] = error
            found = opened[name]
            if isinstance(found, UserError):
                label = type(source).__name__ if isinstance(source, nn.Module) else str(source)
                self._tell(Missing(analysis.name, label, str(found), not isinstance(found, UnavailableError)))
            else:
                yield from found

    def _splits(self, analysis: Analysis) -> tuple[str, ...]:
        return {None: analysis.splits, "both": SPLITS}.get(self.split) or (str(self.split),)

    def _open(self, name: str, source: Source, folder: Path | None) -> list[Target]:
        if name != "files":
            return open_targets(source, which=name, seed=self.seed, out=folder, tick=self.tick, **self.opening)
        if isinstance(source, nn.Module):
            raise UnavailableError("a module has no files of a run")
        return [open_files(source, seed=self.seed, out=folder, tick=self.tick)]

    def _measure(self, analysis: Analysis, target: Target) -> None:
        try:
            found = analysis.measure(target, **self.settings.get(analysis.name, {}))
            self._tell(found if target.folder is None else found.write(target.folder))
        except UserError as error:
            missing = Missing(analysis.name, target.label, str(error), not isinstance(error, UnavailableError))
            self._tell(missing)
        except torch.OutOfMemoryError:
            many = f"{target.batch_size} images at a time"
            reason = f"it needs more memory than there is for {many}; give a smaller batch_size"
            self._tell(Missing(analysis.name, target.label, reason, failed=True))
        except Exception as error:  # foreign models fail in any way; the other analyses go on, and parts are kept
            reason = f"it stopped with {type(error).__name__}: {one_line(error)}"
            self._tell(Missing(analysis.name, target.label, reason, failed=True))

    def _compare(self, analysis: Analysis, found: Sequence[Found], folder: Path | None) -> None:
        if analysis.compare is None or len(renamed(found)) < 2:
            return  # the best checkpoint is the last
        try:
            made = analysis.compare(found)
        except UserError as error:
            label = ", ".join(dict.fromkeys(one.label for one in found))
            self._tell(Missing(analysis.name, label, str(error), not isinstance(error, UnavailableError)))
            return
        self._tell(made if folder is None else made.write(folder))

    def _tell(self, one: Found | Missing) -> None:
        self.done.append(one)
        self.heard(one)


def renamed(results: Sequence[Found]) -> list[Found]:
    """The results with labels that tell them apart: splits, seeds, then folders are added where they agree.

    The best checkpoint of a run is often its last: equal weights on equal images are one result, which is called
    ``"<method>, best and last"``.

    Args:
        results: Results of several checkpoints, splits or runs.

    Returns:
        The results, in the same order.
    """
    found: list[Found] = []
    for one in results:
        twin = next((k for k, other in enumerate(found) if _same_weights(one, other)), None)
        if twin is None:
            found.append(one)
        elif one.checkpoint not in found[twin].label:
            label = f"{found[twin].label} and {one.checkpoint}"
            found[twin] = replace(found[twin], protocol={**found[twin].protocol, "label": label})
    labels = [one.label for one in found]
    if len({one.protocol.get("split") for one in found}) > 1:
        labels = [f"{label}, {one.protocol.get('split')}" for label, one in zip(labels, found, strict=True)]
    for trait in ("training_seed", "target"):
        if len(set(labels)) == len(labels):
            break
        said = {one.protocol.get(trait) for one in found}
        if len(said) > 1:
            before = "seed " if trait == "training_seed" else ""
            labels = [
                f"{label}, {before}{Path(str(one.protocol.get(trait))).name}"
                for label, one in zip(labels, found, strict=True)
            ]
    return [replace(one, protocol={**one.protocol, "label": label}) for one, label in zip(found, labels, strict=True)]


def _same_weights(one: Found, other: Found) -> bool:
    known = ("weights_sha256", "split", "images", "attack", "norm", "eps", "target")
    return one.protocol.get("weights_sha256") is not None and all(
        one.protocol.get(name) == other.protocol.get(name) for name in known
    )
