"""What every comparison of results is made of: a row for each result, their tables stacked, and one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from instar.analyse.analysis import COMPARED, Found, Table
from instar.report.style import colours


def members_of(named: Sequence[Found]) -> Table:
    """A row for each result: ``label``, ``epoch`` (NaN where there is none), and its figures (NaN where it lacks one).

    Args:
        named: Results, with labels that tell them apart.
    """
    names = dict.fromkeys(name for one in named for name in one.figures)
    return {
        "label": np.array([one.label for one in named]),
        "epoch": np.array([float(e) if (e := one.protocol.get("epoch")) is not None else np.nan for one in named]),
        **{name: np.array([one.figures.get(name, np.nan) for one in named]) for name in names},
    }


def stacked(parts: Sequence[Table]) -> Table:
    """Tables with the same columns, one below the other; the column ``member`` says which one a row is from."""
    counts = [len(next(iter(part.values()))) for part in parts]
    rows = {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
    return {"member": np.repeat(np.arange(len(parts)), counts)} | rows


def extremes(values: np.ndarray) -> tuple[int, int]:
    """Positions of the smallest and the largest value: of two, where there are two, even if they are equal.

    Args:
        values: (n,), n at least 1; NaN counts only where there is nothing else.

    Example:
        >>> extremes(np.array([0.4, np.nan, 0.1])), extremes(np.array([0.2, 0.2]))
        ((2, 0), (0, 1))
    """
    order = np.argsort(values, kind="stable")
    known = order[: np.count_nonzero(~np.isnan(values))]
    return int((known if len(known) else order)[0]), int((known if len(known) else order)[-1])


def shown_as(found: Found, chosen: Sequence[int] | None = None) -> tuple[list[str], list[str], str]:
    """How members of a comparison are called and coloured in its pictures.

    Args:
        found: A comparison with a table ``members`` that has the column ``label``. A member whose protocol holds a
            ``colour`` is shown in it: a page gives its runs their colours.
        chosen: Positions of the members that are shown; None is all.

    Returns:
        Labels without what all of them end with, colours (``#RRGGBB``), and what they all end with (``"best"``).

    Example:
        >>> rows = {"members": {"label": np.array(["SPAT, best", "ISEAT, best"])}}
        >>> labels, _, shared = shown_as(Found("demo", "", "", {}, rows, {}))
        >>> labels, shared
        (['SPAT', 'ISEAT'], 'best')
    """
    labels = [str(label) for label in found.tables["members"]["label"]]
    named = found.protocol.get("members") or []
    given = [str(one.get("colour") or "") for one in named] if len(named) == len(labels) else [""] * len(labels)
    places = list(range(len(labels))) if chosen is None else list(chosen)
    labels, given = [labels[k] for k in places], [given[k] for k in places]
    told = colours(labels)
    if all(given) and len(set(given)) == len(given):
        told = given
    shared: list[str] = []
    while len({label.rpartition(", ")[2] for label in labels}) == 1 and all(", " in label for label in labels):
        shorter = [label.rpartition(", ")[0] for label in labels]
        if len(set(shorter)) < len(shorter):
            break
        shared.insert(0, labels[0].rpartition(", ")[2])
        labels = shorter
    return labels, told, ", ".join(shared)


def all_of(shared: str) -> list[str]:
    """A line for the footer that says what labels leave out, if they do.

    Example:
        >>> all_of("best"), all_of("")
        (['All networks: best checkpoint.'], [])
    """
    if not shared:
        return []
    words = [f"{word} checkpoint" if word in ("best", "last") else word for word in shared.split(", ")]
    words = [{"train": "training images", "test": "test images"}.get(word, word) for word in words]
    return [f"All networks: {', '.join(words)}."]


def images_of(named: Sequence[Found]) -> int:
    """The most images that any result is about."""
    return max(int(one.protocol.get("n", 0)) for one in named)


def attacks_of(named: Sequence[Found]) -> str:
    """The attacks that results are about, in words; where all have the same one, that one."""
    return " / ".join(dict.fromkeys(str(one.protocol.get("attack")) for one in named))


def protocol_of(named: Sequence[Found], **more: Any) -> dict[str, Any]:
    """The protocol of a comparison, which holds those of its members; `more` says what it adds."""
    return {
        "label": " · ".join(dict.fromkeys(one.label for one in named)),
        "checkpoint": COMPARED,
        **more,
        "members": [dict(one.protocol) for one in named],
        "seconds": 0.0,
        "key": " ".join(str(one.protocol.get("key")) for one in named),
    }


def most_turned(changes: Table) -> int:
    """The change that shows most: in which most images became more vulnerable, first of those while the loss fell.

    Args:
        changes: The table ``changes`` of a comparison.

    Returns:
        Its row; training images come before test images.
    """
    train = ~np.array([str(label).endswith("test") for label in changes["from_label"]])
    fell = np.asarray(changes["mean_adversarial_loss_change"]) < 0
    return int(np.lexsort((-np.asarray(changes["more_vulnerable_share"]), ~fell, ~train))[0])
