"""What several evaluations have in common: the images, the threat model, and the columns that mean the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from instar.compare.gather import Judged, conditions
from instar.errors import UserError
from instar.evaluate.beyond import NORMS, cells, is_cell

CORRUPTIONS, UNION, WORST = "corruptions", "union", "worst_case"


@dataclass(frozen=True)
class Shared:
    """The common part.

    Attributes:
        index: Official positions of the common images (n,), in rising order.
        label: Their labels (n,).
        titles: Columns in the order of tables, with their titles.
        values: For each target its columns (n,), booleans, or shares in [0, 1] for the mean over corruptions.
        notes: What a reader must know: what was left out, and where the targets differ without harm.
    """

    index: np.ndarray
    label: np.ndarray
    titles: dict[str, str]
    values: tuple[dict[str, np.ndarray], ...]
    notes: tuple[str, ...]


def share(judged: Sequence[Judged], *, common: bool) -> Shared:
    """Find the common part, or say why there is none.

    Args:
        judged: What is compared.
        common: Whether different threat models and sets of images are no hindrance: then only common images are looked
            at, and only columns that are equal in all.

    Returns:
        The common part.

    Raises:
        UserError: The protocols differ and `common` is not set; other data; no common images; labels that disagree.
    """
    _same_data(judged)
    differing = _differences(judged)
    if differing and not common:
        raise UserError(
            f"these evaluations answer different questions: {'; '.join(differing)}. What they share is compared with "
            "--common"
        )
    index, rows = _images(judged)
    label = judged[0].label[rows[0]]
    for other, at in zip(judged[1:], rows[1:], strict=True):
        if not np.array_equal(other.label[at], label):
            raise UserError(f"{judged[0].name} and {other.name} disagree about the labels of the same images")
    titles, values, notes = _columns(judged, rows)
    if differing:
        notes = [f"Only what they share is compared: {'; '.join(differing)}", *notes]
    return Shared(index, label, titles, values, (*notes, *_harmless(judged)))


def _same_data(judged: Sequence[Judged]) -> None:
    """Positions in other data, or in pictures of another size, are other images."""
    seen = [(one.main.protocol["data"]["title"], tuple(one.main.protocol["data"]["shape"])) for one in judged]
    if len(set(seen)) > 1:
        other = next(place for place, found in enumerate(seen) if found != seen[0])
        titles = [f"{judged[place].name} on {seen[place][0]} {seen[place][1]}" for place in (0, other)]
        raise UserError(f"only evaluations on the same data can be compared; got {' and '.join(titles)}")


def _differences(judged: Sequence[Judged]) -> list[str]:
    """In what the questions differ, in words."""
    threats = [f"{one.main.protocol['norm']} {one.main.protocol['eps']}" for one in judged]
    images = [one.main.protocol["images"] for one in judged]
    found = [_who(judged, threats, "threat models")] if len(set(threats)) > 1 else []
    questions = {conditions(one.main)[-1] for one in judged}
    if len(questions) > 1:
        # Two sets may have one description: n chosen images here, n others there.
        found.append(_who(judged, images, "images") if len(set(images)) > 1 else "images at other positions")
    return found


def _who(judged: Sequence[Judged], values: Sequence[str], what: str) -> str:
    """Which target has which value, those with the same one together."""
    groups: dict[str, list[str]] = {}
    for one, value in zip(judged, values, strict=True):
        groups.setdefault(value, []).append(one.name)
    return f"{what}: " + " against ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())


def _images(judged: Sequence[Judged]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Common official positions, and where each target has them."""
    index = judged[0].index
    for other in judged[1:]:
        index = np.intersect1d(index, other.index)
    index = np.sort(index)
    if not len(index):
        raise UserError("these evaluations have no image in common, so they cannot be compared image by image")
    rows = []
    for one in judged:
        order = np.argsort(one.index, kind="stable")
        rows.append(order[np.searchsorted(one.index, index, sorter=order)])
    _same_pixels(judged)
    return index, rows


def _same_pixels(judged: Sequence[Judged]) -> None:
    """Equal positions should be equal images; that can be checked where whole evaluations have the same ones."""
    seen: dict[tuple[bytes, str], tuple[str, str]] = {}
    for one in judged:
        protocol = one.main.protocol
        # The digest is one over shards, so it can be compared for equal shard sizes only.
        key = one.index.tobytes(), str(protocol.get("shard_size"))
        name, digest = seen.setdefault(key, (one.name, protocol["images_sha256"]))
        if digest != protocol["images_sha256"]:
            raise UserError(
                f"{name} and {one.name} were evaluated on different images at the same positions of "
                f"{protocol['data']['title']}. Is it the same version of the data?"
            )


def _columns(
    judged: Sequence[Judged], rows: Sequence[np.ndarray]
) -> tuple[dict[str, str], tuple[dict[str, np.ndarray], ...], list[str]]:
    """Columns that all have and that mean the same in all, and those that follow from them."""
    said = [one.attacks() for one in judged]
    everywhere = [name for name in said[0] if all(name in other for other in said)]
    same = [name for name in everywhere if len({other[name]["expression"] for other in said}) == 1]
    values: tuple[dict[str, np.ndarray], ...] = tuple(
        {name: one.column(name)[at] for name in ("clean", *same)} for one, at in zip(judged, rows, strict=True)
    )
    titles = {"clean": "clean"} | {name: str(said[0][name]["title"]) for name in same if not is_cell(name)}
    notes = []
    apart = [str(said[0][name]["title"]) for name in everywhere if name not in same]
    if apart:
        notes.append(f"Not compared, because their settings differ: {_several(apart)}")

    def derive(name: str, title: str, make: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
        titles[name] = title
        for columns in values:
            columns[name] = make(columns)

    corruptions = [name for name in same if is_cell(name)]
    if corruptions:
        title = "corruptions" if len(corruptions) == len(list(cells())) else f"{len(corruptions)} corruptions"
        derive(CORRUPTIONS, title, lambda columns: np.mean([columns[name] for name in corruptions], axis=0))
    norms = [name for name in (f"apgd_{norm.lower()}" for norm in NORMS) if name in same]
    if len(norms) > 1:
        derive(UNION, "union of norms", lambda columns: np.logical_and.reduce([columns[name] for name in norms]))
    counting = [name for name in same if all(other[name].get("counts", True) for other in said) and not is_cell(name)]
    if counting and len({(one.main.protocol["norm"], one.main.protocol["eps_value"]) for one in judged}) == 1:
        derive(WORST, "worst case", lambda columns: np.logical_and.reduce([columns[n] for n in ("clean", *counting)]))
        more = [
            one.name
            for one, other in zip(judged, said, strict=True)
            if any(name not in counting and item.get("counts", True) for name, item in other.items())
        ]
        if more:
            notes.append(f"The worst case is over the attacks that all share; more were run on {_several(more)}")
    return titles, values, notes


def _harmless(judged: Sequence[Judged]) -> list[str]:
    """Differences that do not forbid a comparison, but that a reader should know."""
    found = []
    for what, key in (("checkpoints", "which"), ("seeds of the attacks", "seed"), ("precision", "precision")):
        protocols = [one.main.protocol for one in judged]
        values = [str(p["checkpoint"].get(key) if key == "which" else p.get(key)) for p in protocols]
        if len(set(values)) > 1:
            found.append(f"They differ in {_who(judged, values, what)}")
    first: dict[str, str] = {}
    for one in judged:
        twin = first.setdefault(one.main.protocol["weights_sha256"], one.name)
        if twin != one.name:
            found.append(f"{one.name} has the same weights as {twin}")
    return found


def _several(names: Sequence[str], *, most: int = 6) -> str:
    shown = ", ".join(dict.fromkeys(names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
