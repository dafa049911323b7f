"""What the page is built of: colours for both themes, panels, packed columns, thumbnails."""

from __future__ import annotations

import base64
import io
import itertools
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.figure import Figure
from PIL import Image

from instar import UserError
from instar.data.catalogue import CATALOGUE
from instar.data.indexed import ResidentImages
from instar.report.page.atlas import ACROSS, atlas, thumbnails
from instar.report.page.atlas import picture as address
from instar.report.page.colours import contrast, dark_rules, darkened, themed, used
from instar.report.page.columns import counted, measured, named
from instar.report.page.numbers import Numbers
from instar.report.page.panels import described, panels
from instar.report.style import GREY, INK, RUNS, Sheet, headings, styled


def levels(column: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(column["data"]), dtype=f"<u{column['bits'] // 8}")


@given(arrays.arrays(np.int64, st.integers(1, 30), elements=st.integers(-1, 2**32 - 2)))
def test_whole_numbers_are_packed_without_loss(values: np.ndarray) -> None:
    column = counted("n", values)
    read = np.where(levels(column) == column["none"], -1, levels(column).astype(np.int64))
    assert read.tolist() == values.tolist()


@given(arrays.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6) | st.just(float("nan"))))
def test_measured_numbers_are_packed_to_a_65534th_of_their_range(values: np.ndarray) -> None:
    column = measured("x", values)
    packed = levels(column)
    assert ((packed == column["none"]) == np.isnan(values)).all()
    known = ~np.isnan(values)
    if known.any():
        read = column["offset"] + column["scale"] * packed[known]
        span = values[known].max() - values[known].min()
        assert np.abs(read - values[known]).max() <= span / 65534 / 2 + 1e-9


def test_words_are_packed_as_codes_and_missing_ones_are_marked() -> None:
    column = named("class", np.array([1, 0, -1]), ["cat", "dog"])
    assert column["kind"] == "word"
    assert levels(column).tolist() == [1, 0, column["none"]]


def test_text_is_readable_and_runs_differ_on_the_dark_page_too() -> None:
    paper = darkened("#FFFFFF")
    assert contrast(darkened(INK), paper) > 10
    assert contrast(darkened(GREY), paper) > 4.5
    assert all(contrast(darkened(run), paper) > 4.5 for run in RUNS)
    assert len({darkened(run) for run in RUNS}) == len(RUNS)


def test_greys_change_places_in_order() -> None:
    dark = [darkened(f"#{level:02x}{level:02x}{level:02x}") for level in range(0, 256, 15)]
    luminance = [contrast(colour, "#000000") for colour in dark]
    assert all(one > other for one, other in itertools.pairwise(luminance))


def test_every_colour_of_a_style_becomes_a_variable_with_a_rule() -> None:
    style = themed("fill: #FF0000; stroke: #00ff00; clip-path: url(#abc)")
    assert style == "fill: var(--kff0000,#ff0000); stroke: var(--k00ff00,#00ff00); clip-path: url(#abc)"
    assert used([style]) == ["00ff00", "ff0000"]
    assert dark_rules(used([style])).count(":") == 2


@styled
def two_panels() -> Figure:
    sheet = Sheet(2.0, title="A <title> & more", subtitle="How to read it.", footer=["Whence.", "n = 3"])
    for place, name in zip(sheet.grid(1, 2, wspace=0.4), ("left", "right"), strict=True):
        axes = sheet.figure.add_subplot(place, label=name)
        axes.plot([1, 2], [3, 4], marker="o", gid=f"{name}: <run>")
        axes.set_title(f"Panel {name} $x_1$")
    return sheet.figure


def test_panels_come_apart_without_the_words_around_them() -> None:
    figure = two_panels()
    found = panels(figure, prefix="p")
    assert len(found) == 2
    assert headings(figure) == ("A <title> & more", "How to read it.", "Whence · n = 3")
    for panel, name in zip(found, ("left", "right"), strict=True):
        words = "".join(ET.fromstring(panel.svg).itertext())
        assert f"Panel {name} $x_1$" in words
        assert "A <title>" not in words
        assert panel.alt == f"Panel {name} $x_1$. {name}: <run>: from 3.0 to 4.0. A <title> & more"
        assert panel.width < 6
    assert all(text.get_visible() for text in figure.texts)
    assert all(axes.get_visible() for axes in figure.axes)


def test_ids_of_panels_are_unique_and_their_style_sheets_are_gone() -> None:
    drawn = [panel.svg for prefix in ("a", "b") for panel in panels(two_panels(), prefix=prefix)]
    ids = [found for svg in drawn for found in re.findall(r'\bid="([^"]+)"', svg)]
    assert ids
    assert len(set(ids)) == len(ids)
    assert not any("<style" in svg or "<metadata" in svg or "DejaVu" in svg for svg in drawn)
    assert all(re.findall(r"#[0-9a-f]{6}", svg) for svg in drawn)
    bare = [re.sub(r"var\(--k[0-9a-f]{6},#[0-9a-f]{6}\)", "", svg) for svg in drawn]
    assert not any(re.search(r"#[0-9a-f]{6}\b", svg) for svg in bare)


def test_overlapping_axes_and_colour_bars_stay_together() -> None:
    figure = Figure(figsize=(8, 3))
    left, right = figure.subplots(1, 2)
    figure.colorbar(left.imshow([[0, 1], [2, 3]]), ax=left)
    right.inset_axes([0.5, 0.5, 0.4, 0.4])
    figure.tight_layout()
    assert len(panels(figure, prefix="p")) == 2


def test_a_figure_with_words_of_its_own_stays_whole() -> None:
    figure = two_panels()
    figure.text(0.5, 0.5, "between")
    (panel,) = panels(figure, prefix="p")
    assert "between" in panel.svg


def test_a_panel_is_described_by_the_ends_of_its_lines_and_the_heights_of_its_bars() -> None:
    axes = Figure().add_subplot()
    axes.set_title("Accuracy")
    axes.plot([1, 2], [0.5, 0.25], gid="TRADES")
    axes.plot([1, 2], [0.5, 0.25], gid="interval TRADES")
    axes.plot([2, 2], [0, 1], gid="mark")
    axes.bar([1], [2.0], gid="clean: SPAT")
    assert described(axes) == "Accuracy. TRADES: from 0.5 to 0.25; clean: SPAT: 2.0."


def pictures(n: int, shape: tuple[int, int, int]) -> ResidentImages:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=draws)
    return of(images)


def of(images: torch.Tensor) -> ResidentImages:
    half = (0.5,) * images.shape[1]
    info = replace(CATALOGUE["cifar10"], shape=tuple(images.shape[1:]), mean=half, std=half)
    return ResidentImages(images, torch.zeros(len(images), dtype=torch.int64), info, "train")


@pytest.mark.parametrize(("shape", "tile"), [((1, 8, 8), 16), ((3, 32, 32), 32), ((1, 28, 28), 32), ((3, 90, 60), 64)])
def test_thumbnails_fill_tiles_of_whole_blocks(shape: tuple[int, int, int], tile: int) -> None:
    made = atlas(pictures(3, shape), np.arange(3), budget=10**6)
    assert made.tile == tile
    (sheet,) = made.sheets
    with Image.open(io.BytesIO(sheet)) as image:
        assert image.size == (ACROSS * tile, tile)


def test_small_images_are_enlarged_by_whole_factors_and_keep_their_pixels() -> None:
    images = pictures(2, (1, 8, 8))
    (tile,) = thumbnails(images, np.array([1]), 16)
    original = images.fetch(torch.tensor([1]))[0, 0].numpy()
    assert (tile[..., 0] == original.repeat(2, 0).repeat(2, 1)).all()
    assert (tile[..., 0] == tile[..., 2]).all()


def test_every_image_has_its_tile_in_order_over_several_sheets() -> None:
    n = ACROSS**2 + 7
    images = torch.zeros(n, 1, 16, 16, dtype=torch.uint8)
    images[ACROSS**2 + 2] = 255
    made = atlas(of(images), np.arange(n), budget=10**6)
    assert len(made.sheets) == 2
    with Image.open(io.BytesIO(made.sheets[1])) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels[8, 2 * 16 + 8] > 240
    assert pixels[8, 16 + 8] < 15


def test_thumbnails_keep_to_their_budget_even_of_noise() -> None:
    images = pictures(400, (3, 32, 32))
    large = atlas(images, np.arange(400), budget=10**7)
    small = atlas(images, np.arange(400), budget=large.size // 3)
    assert small.size <= large.size // 3
    assert small.tile <= large.tile


def test_many_thumbnails_are_coarser_than_few() -> None:
    images = pictures(12_001, (1, 16, 16))
    few, many = (atlas(images, np.arange(n), budget=10**9) for n in (500, 12_001))
    assert many.size / 12_001 < 0.7 * few.size / 500


def test_galleries_keep_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    kind, data = address(pixels).removeprefix("data:image/").split(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == kind.upper()
        assert (np.asarray(image.convert("RGB")) == pixels).all()


def test_no_images_make_an_empty_atlas() -> None:
    assert atlas(pictures(2, (1, 8, 8)), np.arange(0), budget=100).sheets == ()


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(UserError, match="differ in length"):
        Numbers("x", {"a": [1], "b": [1, 2]})


def test_numbers_shown_as_colours_follow_the_theme_and_photographs_do_not() -> None:
    def drawn(values: np.ndarray, **options: Any) -> str:
        figure = Figure(figsize=(3, 3))
        figure.subplots().imshow(values, **options)
        return panels(figure, prefix="p")[0].svg

    ramp = np.linspace(0, 1, 16).reshape(4, 4)
    heat = drawn(ramp, cmap="Blues")
    kinds = re.findall(r'<image [^>]*class="(on-\w+)"', heat)
    assert kinds == ["on-light", "on-dark"]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r"base64,([^\"]+)", heat)
    ]
    light, dark = (image[..., :3].reshape(-1, 3).mean(1) for image in shown)
    lowest = light.argmax()  # the lowest value: nearly white on paper, nearly black on the dark page
    assert light[lowest] > 230
    assert dark[lowest] < 60
    assert "on-dark" not in drawn(ramp, cmap="gray")
    assert "on-dark" not in drawn(np.stack([ramp] * 3, axis=-1))
