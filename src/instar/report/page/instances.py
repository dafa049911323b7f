"""Instance tables: a row for every training image, and one for every image of an evaluation, of all runs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instar.data import Images
from instar.evaluate.record import Record
from instar.report.page.atlas import Atlas, atlas
from instar.report.page.columns import Column, counted, measured, named
from instar.report.stored import StoredRun

MOST_ROWS = 100_000
"""A table shows no more rows: beyond, evenly spread ones of the images."""
STATES = ("attackable", "between", "guarded")
_KNOWN = ("position", "seen", "kappa", "loss", "correct")


@dataclass(frozen=True, eq=False)
class Table:
    """One instance table.

    Attributes:
        key: Its name in the page.
        title: Its heading.
        note: How to read it.
        positions: Official positions (n,) of the rows.
        columns: The packed columns.
        images: Where thumbnails come from, or None.
        total: Images there are; more than rows if the table is a sample.
    """

    key: str
    title: str
    note: str
    positions: np.ndarray
    columns: list[Column]
    images: Images | None
    total: int

    @property
    def size(self) -> int:
        """Bytes that the columns take in a page."""
        return sum(len(column["data"]) for column in self.columns)

    @property
    def payload(self) -> dict[str, Any]:
        """What the page's script reads, without thumbnails."""
        return {"key": self.key, "rows": len(self.positions), "columns": self.columns}

    def thumbnails(self, budget: int) -> Atlas | None:
        """Thumbnails of the rows in `budget` bytes; None without images."""
        return None if self.images is None else atlas(self.images, self.positions, budget=budget)


def training_table(
    runs: Sequence[StoredRun], names: Sequence[str], images: Images | None, *, key: str, title: str
) -> Table:
    """A row for each image that any of the runs was trained on in its last stored epoch.

    Args:
        runs: Runs on the same data, each with instance tables.
        names: What to call them.
        images: The training images, or None.
        key: Name of the table in the page.
        title: Its heading.

    Returns:
        The table: class, and for each run κ, whether the image is guarded or attackable, its loss, in how many stored
        epochs the training attack left it right, and how often it was forgotten (right in one stored epoch and wrong in
        the next).

    Raises:
        UserError: An instance table is damaged.

    Source: forgetting events after Toneva et al. 2019, on adversarial images.
    """
    last = [run.instances(run.tables[-1]) for run in runs]
    everyone = np.unique(np.concatenate([rows["position"] for rows in last]))
    total = len(everyone)
    shown = everyone if total <= MOST_ROWS else everyone[np.arange(MOST_ROWS) * total // MOST_ROWS]
    columns = [counted("#", shown, hint="position in the official training set")]
    if images is not None:
        labels = images.labels.numpy()[shown]
        columns.append(named("class", labels, images.classes))
    for run, name, rows in zip(runs, names, last, strict=True):
        group = name if len(runs) > 1 else ""
        columns += _of_run(run, rows, shown, group)
    note = "Measured while training, on augmented images, by each run's own attack and loss; the last stored epoch."
    if total > len(shown):
        note += f" {len(shown):,} of {total:,} images, evenly spread."
    return Table(key, title, note, shown, columns, images, total)


def _of_run(run: StoredRun, rows: dict[str, np.ndarray], shown: np.ndarray, group: str) -> list[Column]:
    kappa = _placed(rows["kappa"].astype(np.int64), rows["position"], shown, -1)
    known = kappa >= 0
    steps = run.attack_steps(run.tables[-1]) or int(kappa.max(initial=0))
    state = np.where(kappa <= 0, 0, np.where(kappa >= steps, 2, 1))
    right, forgotten, epochs = _history(run, shown)
    columns = [
        counted("κ", kappa, group=group, hint="attack iterates still classified correctly"),
        named("under attack", np.where(known, state, -1), STATES, group=group, hint="κ = 0, between, κ = K"),
        measured("loss", _placed(rows["loss"].astype(np.float64), rows["position"], shown, np.nan), group=group),
        counted(
            f"right of {epochs}", right, group=group, hint=f"of {epochs} stored epochs, those that ended right attacked"
        ),
        counted("forgotten", forgotten, group=group, hint="right in one stored epoch, wrong in the next"),
    ]
    for name, column in rows.items():
        if name not in _KNOWN and column.ndim == 1 and np.issubdtype(column.dtype, np.number):
            placed = _placed(column.astype(np.float64), rows["position"], shown, np.nan)
            columns.append(measured(name, placed, group=group, hint="remembered by the method"))
    return columns


def _placed(values: np.ndarray, position: np.ndarray, shown: np.ndarray, missing: float) -> np.ndarray:
    """Values by position as a column for the rows that are shown; `position` ascends."""
    at = np.searchsorted(position, shown).clip(max=len(position) - 1)
    return np.where(position[at] == shown, values[at], missing).astype(values.dtype)


def _history(run: StoredRun, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Over the stored epochs: how often right, how often forgotten, and how many epochs; one table at a time."""
    right, forgotten = np.zeros(len(shown), np.int64), np.zeros(len(shown), np.int64)
    before = np.zeros(len(shown), dtype=bool)
    for epoch in run.tables:
        rows = run.instances(epoch)
        if "correct" not in rows:
            return np.full(len(shown), -1), np.full(len(shown), -1), 0
        now = _placed(rows["correct"].astype(np.int64), rows["position"], shown, -1)
        right += now == 1
        forgotten += before & (now == 0)
        before = np.where(now >= 0, now == 1, before)
    return right, forgotten, len(run.tables)


def evaluation_table(
    records: Sequence[tuple[str, Record]], classes: Sequence[str], images: Images | None, *, key: str, title: str
) -> Table:
    """A row for each image of an evaluation.

    Args:
        records: Run names and records of one suite and threat model on the same images.
        classes: Names of the classes.
        images: The test images, or None.
        key: Name of the table in the page.
        title: Its heading.

    Returns:
        The table: class, and for each record the clean prediction, the clean margin, and what broke the image.
    """
    first = records[0][1].instances
    shown = first["index"].astype(np.int64)
    columns = [
        counted("#", shown, hint="position in the official test set"),
        named("class", first["label"].astype(np.int64), classes),
    ]
    alone = len({name for name, _ in records}) == 1
    for name, record in records:
        rows = record.instances
        group = "" if len(records) == 1 else record.checkpoint if alone else f"{name} ({record.checkpoint})"
        broken = [str(word) for word in rows["broken_by"]]
        told = {"": "nothing", "clean": "wrong already"}
        told |= {
            column: record.scores[column].title for column in broken if column in record.scores and column != "clean"
        }
        words = [told.get(word, word) for word in broken]
        kinds = sorted(set(words), key=lambda word: (word != "nothing", word))
        columns += [
            named("prediction", rows["prediction"].astype(np.int64), classes, group=group, hint="on the clean image"),
            measured(
                "margin", rows["clean_margin"], group=group, hint="logit of the class minus the best other, clean"
            ),
            named("broken by", np.array([kinds.index(word) for word in words]), kinds, group=group),
        ]
    note = "Measured by the evaluation above: what first broke each image, and the margin of the clean prediction."
    return Table(key, title, note, shown, columns, images, len(shown))
