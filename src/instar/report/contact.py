"""The hardest and the easiest training images, to be looked at."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from instar.data import Images, load
from instar.data.indexed import as_float
from instar.errors import UserError
from instar.report.stored import StoredRun, UnavailableError, read
from instar.report.style import EASY, GREY, HARD, INK, Sheet, styled
from instar.report.wording import significant, source_line

COLUMNS, ROWS = 10, 2
"""Images in a line, and lines, of each of the two sections."""
_LONGEST_CLASS = 14


@styled
def gallery(run: str | Path | StoredRun, root: str | Path | None = None, *, images: Images | None = None) -> Figure:
    """Contact sheet of the training images that the last stored epoch found hardest and easiest.

    Hardest: smallest κ, and of those the highest loss. Easiest: largest κ, and of those the lowest loss. At ties the
    earlier image comes first.

    Args:
        run: Run folder.
        root: Folder that data sets lie in; None takes the run's, else the default one.
        images: The official training images, for runs on data given in Python; None loads them by name.

    Returns:
        The figure. Each image is an axes labelled ``hardest <position>`` or ``easiest <position>``.

    Raises:
        UserError: No instance table is stored, the data set cannot be read, or it is another one.
    """
    stored = read(run)
    stored.require_tables()
    epoch = stored.tables[-1]
    rows = stored.instances(epoch)
    shown = _training_images(stored, root) if images is None else images
    if len(shown) <= int(rows["position"].max()):
        raise UserError(
            f"{stored.folder} was trained on at least {int(rows['position'].max()) + 1} images; {shown.info.title} has "
            f"{len(shown)}. Is it another data set?"
        )
    n = len(rows["position"])
    count = min(COLUMNS * ROWS, n // 2)
    if count == 0:
        raise UnavailableError(
            f"{stored.folder} was trained on fewer than two images: there is no hardest and no easiest"
        )
    kappa, loss = rows["kappa"].astype(np.int64), rows["loss"].astype(np.float64)
    sections = (("hardest", HARD, ranked(kappa, loss)[:count]), ("easiest", EASY, ranked(-kappa, -loss)[:count]))
    lines = math.ceil(count / COLUMNS)
    sheet = Sheet(
        2 * (0.42 + 1.2 * lines),
        title=f"{stored.title} on {stored.data}: what the network finds hardest and easiest",
        subtitle=f"Training images of epoch {epoch + 1} by κ, the number of attack iterates still classified "
        "correctly, then by loss. Below each: class, κ and loss.",
        footer=[
            source_line([stored]),
            f"n = {n:,} images trained on in epoch {epoch + 1}. κ and loss were measured on augmented views; the "
            "pictures are the originals. The loss is the method's own, its instance weights included.",
        ],
        left=0.0,
        right=0.0,
        bottom=-0.3,  # the captions of the last row reach below its axes already
    )
    figure, inch = sheet.figure, 1 / sheet.figure.get_figheight()
    half = (sheet.top - sheet.bottom) / 2
    for section, (name, colour, picked) in enumerate(sections):
        top = sheet.top - section * half
        heading: dict[str, Any] = {"fontsize": 10.5, "fontweight": "bold", "color": colour, "va": "top"}
        figure.text(sheet.left, top + 0.25 * inch, name.capitalize(), **heading)
        bottom = top - half + 0.62 * inch
        grid = figure.add_gridspec(
            lines, COLUMNS, left=sheet.left, right=sheet.right, top=top, bottom=bottom, wspace=0.12, hspace=0.45
        )
        positions = rows["position"][picked]
        pictures = as_float(shown.fetch(torch.from_numpy(positions)))
        for place, (row, position) in enumerate(zip(picked, positions, strict=True)):
            axes = figure.add_subplot(grid[place], label=f"{name} {position}")
            label = shown.classes[int(shown.labels[int(position)])]
            _tile(axes, pictures[place], label, f"κ {kappa[row]} · {significant(loss[row])}")
    return figure


def _tile(axes: Axes, picture: Tensor, label: str, measured: str) -> None:
    """One image (C, H, W) in [0, 1] with its captions; enlarged without smoothing, to show what the network sees."""
    pixels = picture[:3].permute(1, 2, 0).numpy()
    axes.imshow(pixels, vmin=0, vmax=1, cmap="gray", interpolation="nearest")
    axes.set_axis_off()
    caption: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "top"}
    short = textwrap.shorten(label.replace("_", " "), _LONGEST_CLASS, placeholder="…")
    axes.text(0.5, -0.05, short or label[:_LONGEST_CLASS], fontsize=8, color=INK, gid="class", **caption)
    axes.text(0.5, -0.21, measured, fontsize=7, color=GREY, gid="measured", **caption)


def ranked(kappa: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Rows from the hardest to the easiest: κ ascending, then loss descending, then in order.

    Args:
        kappa: (n,).
        loss: (n,).

    Returns:
        Rows (n,).

    Example:
        >>> ranked(np.array([3, 0, 0, 3]), np.array([0.1, 1.0, 2.0, 0.2])).tolist()
        [2, 1, 3, 0]
    """
    return np.lexsort((-loss, kappa))


def _training_images(run: StoredRun, root: str | Path | None) -> Images:
    training, data = run.config["training"], run.config["data"]
    if data["name"] == "custom":
        raise UnavailableError(
            f"the data of {run.folder} were given in Python: give gallery(..., images=...) the training images"
        )
    where = training.get("root") if root is None else root
    try:
        return load(data.get("path") or data["name"], split="train", root=where, size=training.get("size"))
    except UserError as error:
        raise UnavailableError(str(error)) from None
