"""Galleries and classes: the images that give way first and last, and what each class is taken for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instar.data import Images
from instar.evaluate.intervals import wilson
from instar.evaluate.record import Record
from instar.report.page.atlas import picture
from instar.report.page.examples import Examples, magnified
from instar.report.page.numbers import Numbers
from instar.report.page.summary import shared_protocols, strongest
from instar.report.page.views import (
    Cell,
    ClassDetail,
    ClassesView,
    ClassRow,
    Confusion,
    GalleryView,
    Tile,
    slug,
)
from instar.report.stored import StoredRun
from instar.report.wording import minus, significant

SHOWN = 8
"""Images at each end of a gallery."""
_OF_CLASS = 4
_MOST_CLASSES = 30
"""A page with more classes shows those that are hit hardest, and no matrix."""


def tile(examples: Examples, row: int, classes: Sequence[str], measured: str) -> Tile:
    """One image, its perturbation and its adversarial example as the page shows them."""
    change, factor = magnified(examples, row)
    label = int(examples.label[row])
    before, after = int(examples.clean[0][row]), int(examples.adv[0][row])
    return Tile(
        label=classes[label],
        position=int(examples.position[row]),
        clean=_address(examples.x[row]),
        change=_address(change),
        adversarial=_address(examples.x_adv[row]),
        before=f"{classes[before]} {100 * float(examples.clean[1][row]):.0f}\N{NO-BREAK SPACE}%",
        after=f"{classes[after]} {100 * float(examples.adv[1][row]):.0f}\N{NO-BREAK SPACE}%",
        right_before=before == label,
        right_after=after == label,
        measured=measured if examples.ball.norm == "Linf" else f"{measured} · change × {significant(factor)}",
    )


def test_gallery(name: str, examples: Examples, classes: Sequence[str]) -> GalleryView:
    """The most and the least vulnerable of the attacked test images that are right to begin with.

    A wrong image has nothing to lose: its loss may rise by any amount and the prediction stays wrong.
    """
    order = examples.order
    order = order[(examples.clean[0] == examples.label)[order]]
    count = min(SHOWN, len(order) // 2)
    return GalleryView(
        title=f"{name}: test images",
        protocol=f"{examples.protocol}. Vulnerability: by how much the attack raises the loss, in nats, among "
        f"{len(order):,} of {len(examples.label):,} images that are right before.{_magnification(examples)}",
        parts=[
            ("Most vulnerable", "hard", _tiles(examples, order[:count], classes)),
            ("Least vulnerable", "good", _tiles(examples, order[::-1][:count], classes)),
        ],
    )


def training_gallery(
    name: str, run: StoredRun, examples: Examples, classes: Sequence[str], *, kappa: np.ndarray, loss: np.ndarray
) -> GalleryView:
    """The hardest and the easiest training images, as the instance table of the last epoch ranks them.

    Args:
        name: Name of the run.
        run: The run.
        examples: Adversarial examples of the hardest, then of the easiest images, half of them each.
        classes: Names of the classes.
        kappa: Their κ (n,).
        loss: Their loss (n,).

    Returns:
        The gallery.
    """
    half = len(kappa) // 2
    tiles = [
        tile(examples, row, classes, f"κ {kappa[row]} · loss {significant(float(loss[row]))}")
        for row in range(len(kappa))
    ]
    return GalleryView(
        title=f"{name}: training images",
        protocol=f"Ranked by κ, then by loss, of epoch {run.tables[-1] + 1}, measured while training on augmented "
        f"views. Adversarial examples: {examples.protocol}.{_magnification(examples)}",
        parts=[("Hardest", "hard", tiles[:half]), ("Easiest", "good", tiles[half:])],
    )


def _magnification(examples: Examples) -> str:
    """By how much changes are magnified, where that is the same for all images."""
    if examples.ball.norm != "Linf" or not len(examples.label):
        return ""
    return f" Changes are magnified {magnified(examples, 0)[1]:.0f} times: black and white are ± eps."


def _address(x: Tensor) -> str:
    pixels = x[:3] if x.shape[0] >= 3 else x[:1].expand(3, -1, -1)
    return picture((255 * pixels).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def classes_view(
    runs: Sequence[tuple[str, str, StoredRun, Record | None, Examples | None]],
    classes: Sequence[str],
    images: Images | None,
    *,
    title: str,
    key: str,
) -> ClassesView | None:
    """What happens to each class in runs on one data set.

    Args:
        runs: Name, colour, run, its preferred record, and its attacked test images, of each run.
        classes: Names of the classes.
        images: The training images, whose labels say which class an instance belongs to; or None.
        title: Name of the data set.
        key: Name of the view in the page.

    Returns:
        The view, or None if nothing is known about classes.
    """
    known = [entry for entry in runs if entry[3] is not None or entry[4] is not None]
    if not known:
        return None
    count = len(classes)
    heads: list[tuple[str, str, str]] = []
    columns: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for name, colour, _, record, _ in known:
        if record is None:
            continue
        label = record.instances["label"].astype(np.int64)
        of = np.bincount(label, minlength=count)
        for column in ("clean", strongest(record)):
            right = np.bincount(label, weights=record.instances[column].astype(np.float64), minlength=count)
            heads.append((f"{name} ({record.checkpoint})", record.scores[column].title, colour))
            columns.append((f"{name} ({record.checkpoint})", record.scores[column].title, right.astype(np.int64), of))
    order = _hardest_first(columns, [entry[4] for entry in known], count)
    shown = order[:_MOST_CLASSES]
    training = {name: _training(run, images, count) for name, _, run, _, _ in known}
    rows = [
        ClassRow(
            name=classes[k],
            key=f"{key}-{k}-{slug(classes[k])}",
            cells=[_share(int(right[k]), int(of[k])) for _, _, right, of in columns],
            details=[
                _detail(name, k, classes, record, examples, training[name]) for name, _, _, record, examples in known
            ],
        )
        for k in shown
    ]
    protocol = shared_protocols([(name, record) for name, _, _, record, _ in known if record is not None])
    if len(order) > len(shown):
        protocol.append(f"The {len(shown)} classes that are hit hardest, of {len(order)}.")
    table = {"class": [classes[k] for k in order]}
    for who, what, right, of in columns:
        table[f"{who}: {what}"] = [float(right[k] / of[k]) if of[k] else float("nan") for k in order]  # type: ignore[misc]
    if columns:
        table["images"] = columns[0][3][order].tolist()
    confusions = [_confusion(name, examples, classes, key) for name, _, _, _, examples in known if examples is not None]
    return ClassesView(
        title=title,
        heads=heads,
        rows=rows,
        protocol=protocol,
        confusions=confusions if count <= _MOST_CLASSES else [],
        numbers=Numbers(f"{key}-accuracy", table),
    )


def _hardest_first(
    columns: Sequence[tuple[str, str, np.ndarray, np.ndarray]], attacked: Sequence[Examples | None], count: int
) -> list[int]:
    """Classes by accuracy under attack of the first run that has any."""
    if columns:
        _, _, right, of = columns[1]
        share = np.where(of > 0, right / np.maximum(of, 1), np.inf)
    else:
        found = next(examples for examples in attacked if examples is not None)
        of = np.bincount(found.label, minlength=count)
        right = np.bincount(found.label[found.adv[0] == found.label], minlength=count)
        share = np.where(of > 0, right / np.maximum(of, 1), np.inf)
    return [int(k) for k in np.argsort(share, kind="stable")]


def _share(right: int, of: int) -> Cell:
    if not of:
        return Cell("–")
    low, high = wilson(right, of)
    return Cell(f"{100 * right / of:.0f}", f"{100 * low:.0f}–{100 * high:.0f}", right / of)


def _training(run: StoredRun, images: Images | None, count: int) -> Mapping[str, np.ndarray] | None:
    """Means over the training images of each class in the last stored epoch; None without tables or labels."""
    if images is None or not run.tables:
        return None
    rows = run.instances(run.tables[-1])
    if int(rows["position"].max()) >= len(images):
        return None
    label = images.labels.numpy()[rows["position"]]
    of = np.bincount(label, minlength=count)
    steps = run.attack_steps(run.tables[-1]) or int(rows["kappa"].max())

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(label, weights=values.astype(np.float64), minlength=count) / np.maximum(of, 1)

    return {
        "n": of,
        "attackable": mean(rows["kappa"] == 0),
        "guarded": mean(rows["kappa"] >= steps),
        "kappa": mean(rows["kappa"]),
    }


def _tiles(examples: Examples, rows: Iterable[int], classes: Sequence[str]) -> list[Tile]:
    """Attacked images, each with what the attack added to its loss."""
    return [tile(examples, int(row), classes, f"loss {minus(f'{examples.vulnerability[row]:+.2f}')}") for row in rows]


def _detail(
    name: str,
    k: int,
    classes: Sequence[str],
    record: Record | None,
    examples: Examples | None,
    training: Mapping[str, np.ndarray] | None,
) -> ClassDetail:
    lines: list[tuple[str, str]] = []
    tiles: list[Tile] = []
    if record is not None:
        label, said = record.instances["label"], record.instances["prediction"]
        mine = label == k
        column = strongest(record)
        for term, right in (
            ("Clean", record.instances["clean"]),
            (record.scores[column].title, record.instances[column]),
        ):
            if mine.any():
                low, high = wilson(int(right[mine].sum()), int(mine.sum()))
                text = f"{int(right[mine].sum())} of {int(mine.sum())} right (95 %: {100 * low:.0f}–{100 * high:.0f} %)"
                lines.append((term, text))
        lines.append(("Taken for, clean", _mistakes(said[mine], k, classes)))
        elsewhere = np.bincount(label[(said == k) & ~mine].astype(np.int64), minlength=len(classes))
        lines.append(("Mistaken for it, clean", _listed(elsewhere, classes)))
    if examples is not None:
        mine = examples.label == k
        lines.append(("Taken for, under PGD", _mistakes(examples.adv[0][mine], k, classes)))
        rows = [row for row in examples.order if mine[row] and examples.clean[0][row] == k][:_OF_CLASS]
        tiles = _tiles(examples, rows, classes)
    if training is not None and training["n"][k]:
        lines.append(
            (
                "Training images",
                f"{int(training['n'][k]):,}: {100 * training['attackable'][k]:.0f} % attackable, "
                f"{100 * training['guarded'][k]:.0f} % guarded, mean κ {training['kappa'][k]:.1f}",
            )
        )
    return ClassDetail(name, lines, tiles)


def _mistakes(said: np.ndarray, k: int, classes: Sequence[str]) -> str:
    counts = np.bincount(said.astype(np.int64), minlength=len(classes))
    counts[k] = 0
    return _listed(counts, classes)


def _listed(counts: np.ndarray, classes: Sequence[str]) -> str:
    order = [int(k) for k in np.argsort(-counts, kind="stable")[:4] if counts[k]]
    return ", ".join(f"{classes[k]} {counts[k]}" for k in order) or "nothing"


def _confusion(name: str, examples: Examples, classes: Sequence[str], key: str) -> Confusion:
    counts = examples.confusion(len(classes))
    table: dict[str, Any] = {"true": list(classes)}
    table |= {
        f"predicted {classes[k]}" if classes.count(classes[k]) == 1 else f"predicted {k}": counts[:, k]
        for k in range(len(classes))
    }
    return Confusion(name, classes, counts.tolist(), examples.protocol, Numbers(f"{key}-confusion-{slug(name)}", table))
