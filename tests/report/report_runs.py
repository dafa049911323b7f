"""Real runs for reports, on pictures made for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from instar.evaluate import evaluate
from instar.train import train

HOSTILE = (
    '"><img src=x onerror=alert(1)>',
    "<script>alert(2)<",
    "a & 'b' $x^2$",
    "</style>".replace("/", "\N{DIVISION SLASH}"),
)
"""Names of class folders that would do harm if they were not escaped, or break a formula or a table."""


def train_on(place: Path, classes: Sequence[str], *, seed: int = 0, recipe: str = "pgd_at") -> Path:
    """A run in ``place/<recipe>`` on pictures in ``place/pictures``: a colour for each class, and noise."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 6)):
        for number, name in enumerate(classes):
            folder = place / "pictures" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                colour = np.array([60 * number, 200 - 50 * number, 40 + 20 * number])
                noise = draws.normal(0, 25, size=(16, 16, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
    run = place / recipe
    train(
        recipe, out=run, data=str(place / "pictures"), size=16, model="small_cnn", width=4, epochs=2, batch_size=8,
        seed=seed, selection=4, device="cpu", arguments={"steps": 2},
    )  # fmt: skip
    evaluate(run, suite="quick", device="cpu")
    return run
