"""Thumbnails of thousands of images as a few pictures, small enough to lie inside of a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, features
from torch.nn import functional as F

from instar.data import Images
from instar.data.indexed import as_float

ACROSS = 50
"""Tiles in a row and rows of a sheet. A page opens a sheet when it first shows a tile of it."""
_QUALITIES = (82, 70, 55, 40, 28, 20)
_SIZES = ((4_000, 64, 82), (12_000, 48, 55))
"""Up to so many images the tiles may be so large, and of this quality at most; beyond, 32 pixels and 20.

At the 40 pixels that a row has room for, and at the 96 that it shows under the pointer, CIFAR-10's images of quality 20
and 28 look the same, and take 120 and 160 bytes each."""


@dataclass(frozen=True)
class Atlas:
    """Tiles in the order of the images, row by row, sheet by sheet.

    Attributes:
        tile: Width and height of a tile in pixels, a multiple of 16, so that blocks of a codec hold one image each.
        across: Tiles in a row, and rows in a sheet.
        kind: Media type of the sheets.
        sheets: The encoded pictures.
    """

    tile: int
    across: int
    kind: str
    sheets: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of all sheets."""
        return sum(map(len, self.sheets))

    @property
    def encoded(self) -> list[str]:
        """The sheets in base64."""
        return [base64.b64encode(sheet).decode() for sheet in self.sheets]


def atlas(images: Images, positions: np.ndarray, *, budget: int) -> Atlas:
    """Thumbnails of some images.

    Small images are enlarged by whole factors and padded, large ones reduced by averaging. Quality, which begins the
    lower the more images there are, falls in steps until all sheets fit, then the size of tiles.

    Args:
        images: Where they come from.
        positions: Which ones (n,).
        budget: Most bytes of all sheets together; missed only by tiles of 16 pixels in the lowest quality.

    Returns:
        The atlas.
    """
    n, (_, height, width) = len(positions), images.shape
    most, finest = next(((size, quality) for count, size, quality in _SIZES if n <= count), (32, _QUALITIES[-1]))
    tile = min(most, max(16, 16 * math.ceil(max(height, width) / 16)))
    kind = "webp" if features.check("webp") else "jpeg"
    chunks = np.array_split(positions, range(ACROSS**2, n, ACROSS**2)) if n else []
    while True:
        first = _sheet(images, chunks[0], tile) if chunks else None
        for quality in (quality for quality in _QUALITIES if quality <= finest):
            last = tile == 16 and quality == _QUALITIES[-1]
            # The first sheet tells how large all will be; where it misleads, the next quality is tried.
            hopeless = first is not None and len(_encoded(first, kind, quality)) * n > budget * len(chunks[0])
            sheets = None if hopeless and not last else _sheets(images, chunks, tile, kind, quality, budget)
            if sheets is not None:
                return Atlas(tile, ACROSS, f"image/{kind}", tuple(sheets))
            if last:
                everything = _sheets(images, chunks, tile, kind, quality, None)
                assert everything is not None
                return Atlas(tile, ACROSS, f"image/{kind}", tuple(everything))
        tile = max(16, tile // 32 * 16)


def _sheets(
    images: Images, chunks: Sequence[np.ndarray], tile: int, kind: str, quality: int, budget: int | None
) -> list[bytes] | None:
    """All sheets; None as soon as they take more than the budget."""
    made: list[bytes] = []
    for chunk in chunks:
        made.append(_encoded(_sheet(images, chunk, tile), kind, quality))
        if budget is not None and sum(map(len, made)) > budget:
            return None
    return made


def thumbnails(images: Images, positions: np.ndarray, tile: int) -> np.ndarray:
    """Some images as squares (n, tile, tile, 3), uint8; grey ones in three equal channels."""
    x = as_float(images.fetch(torch.from_numpy(np.asarray(positions, dtype=np.int64))))[:, :3]
    x = x.expand(-1, 3, -1, -1) if x.shape[1] < 3 else x
    height, width = x.shape[-2:]
    scale = max(1, tile // max(height, width))
    if scale > 1:
        x = x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    elif max(height, width) > tile:
        ratio = tile / max(height, width)
        x = F.interpolate(x, size=(max(1, round(ratio * height)), max(1, round(ratio * width))), mode="area")
    down, right = tile - x.shape[-2], tile - x.shape[-1]
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
    return (255 * x).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _sheet(images: Images, positions: np.ndarray, tile: int) -> Image.Image:
    rows = math.ceil(len(positions) / ACROSS)
    canvas = np.full((rows * ACROSS, tile, tile, 3), 255, dtype=np.uint8)
    canvas[: len(positions)] = thumbnails(images, positions, tile)
    grid = canvas.reshape(rows, ACROSS, tile, tile, 3).swapaxes(1, 2).reshape(rows * tile, ACROSS * tile, 3)
    return Image.fromarray(grid)


def _encoded(sheet: Image.Image, kind: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options = {"method": 6} if kind == "webp" else {"optimize": True, "subsampling": "4:2:0"}
    sheet.save(buffer, format=kind, quality=quality, **options)
    return buffer.getvalue()


def picture(x: np.ndarray) -> str:
    """One image (H, W, 3), uint8, without loss, as an address that a page can hold: WebP where it can be written."""
    buffer = io.BytesIO()
    if features.check("webp"):
        kind = "webp"
        Image.fromarray(x).save(buffer, format=kind, lossless=True, quality=100, method=6)
    else:
        kind = "png"
        Image.fromarray(x).save(buffer, format=kind, optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
