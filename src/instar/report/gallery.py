"""The hardest and the easiest training images, to be looked at."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from instar.data import Images, load
from instar.data.indexed import as_float
from instar.errors import UserError
from instar.report.figures import source_line
from instar.report.stored import StoredRun, Unavailable, read
from instar.report.style import EASY, GREY, HARD, INK, Sheet, styled

COLUMNS = 10
ROWS = 2


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
    order = ranked(rows["kappa"], rows["loss"])
    count = min(COLUMNS * ROWS, len(order) // 2)
    if count == 0:
        raise Unavailable(f"{stored.folder} was trained on fewer than two images: there is no hardest and no easiest")
    chosen = {"hardest": order[:count], "easiest": order[::-1][:count]}
    lines = -(-count // COLUMNS)
    sheet = Sheet(
        2 * (0.42 + 1.2 * lines),
        title=f"{stored.title} on {stored.data}: what the network finds hardest and easiest",
        subtitle=f"Training images of epoch {epoch + 1} by κ, the number of attack iterates still classified correctly, then by "
        "loss. Below each: class, κ and loss.",
        footer=[
            source_line([stored]),
            f"n = {len(order):,} images trained on in epoch {epoch + 1}. κ and loss were measured on augmented views; the "
            "pictures are the originals. The loss is the method's own, its instance weights included.",
        ],
        left=0.0,
        right=0.0,
        bottom=-0.3,  # the captions of the last row reach below its axes already
    )
    half = (sheet.top - sheet.bottom) / 2
    inch = 1 / sheet.figure.get_figheight()
    for section, (name, colour) in enumerate((("hardest", HARD), ("easiest", EASY))):
        top = sheet.top - section * half
        sheet.figure.text(
            sheet.left, top + 0.25 * inch, name.capitalize(), fontsize=10.5, fontweight="bold", color=colour, va="top"
        )
        grid = sheet.figure.add_gridspec(
            lines,
            COLUMNS,
            left=sheet.left,
            right=sheet.right,
            top=top,
            bottom=top - half + 0.62 * inch,
            wspace=0.12,
            hspace=0.45,
        )
        picked = chosen[name]
        pictures = as_float(shown.fetch(torch.from_numpy(rows["position"][picked])))
        for place, row in enumerate(picked):
            position = int(rows["position"][row])
            axes: Any = sheet.figure.add_subplot(grid[place], label=f"{name} {position}")
            picture = pictures[place].permute(1, 2, 0).numpy()
            grey = picture.shape[2] == 1
            axes.imshow(
                picture[..., 0] if grey else picture[..., :3], cmap="gray" if grey else None, vmin=0, vmax=1,
                interpolation="nearest",
            )  # fmt: skip
            axes.set_axis_off()
            label = shown.classes[int(shown.labels[position])]
            axes.text(
                0.5, -0.05, textwrap.shorten(label.replace("_", " "), 14, placeholder="…"), transform=axes.transAxes,
                ha="center", va="top", fontsize=8, color=INK, gid="class",
            )  # fmt: skip
            axes.text(
                0.5, -0.21, f"κ {int(rows['kappa'][row])} · {_short(float(rows['loss'][row]))}", transform=axes.transAxes, ha="center",
                va="top", fontsize=7, color=GREY, gid="measured",
            )  # fmt: skip
    return sheet.figure


def _short(loss: float) -> str:
    """Two significant digits.

    Example:
        >>> _short(6.96), _short(0.0543), _short(2.6e-5)
        ('7.0', '0.054', '2.6e-05')
    """
    return f"{loss:.1f}" if loss >= 0.95 else f"{loss:.2g}"


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
    return np.lexsort((-loss.astype(np.float64), kappa))


def _training_images(run: StoredRun, root: str | Path | None) -> Images:
    training, data = run.config["training"], run.config["data"]
    if data["name"] == "custom":
        raise Unavailable(f"the data of {run.folder} were given in Python: give gallery(..., images=...) the training images")
    where = training.get("root") if root is None else root
    try:
        return load(data.get("path") or data["name"], split="train", root=where, size=training.get("size"))
    except UserError as error:
        raise Unavailable(str(error)) from None
