"""Corruptions against closed forms, the libraries that define them, and their own independence of neighbours."""

import colorsys
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor, nn

from instar.errors import UserError
from instar.evaluate import Suite, evaluate
from instar.evaluate.beyond import corruptions
from instar.evaluate.corruptions import SEVERITIES, Corruption, PublishedCorruption
from instar.evaluate.distortions import DISTORTIONS, disc, enlarge, ice_texture, plasma
from instar.evidence import Batch
from instar.expression import parse
from instar.threat import Ball

NAMES = list(DISTORTIONS)
MODEL = nn.Identity()


def corrupted(name: str, severity: int, x: Tensor, *, first: int = 0, seed: int = 0) -> Tensor:
    index = torch.arange(first, first + len(x))
    return Corruption(name, severity, seed)(MODEL, Batch(x, torch.zeros(len(x), dtype=torch.int64), index=index)).x


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Smooth colour pictures (24, 3, 32, 32) in whole levels, with edges, as photographs have."""
    source = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(source.normal(size=(24, 3, 32, 32)), (0, 0, 3, 3))
    smooth += 0.6 * scipy.ndimage.gaussian_filter(source.normal(size=(24, 1, 32, 32)), (0, 0, 2, 2))
    smooth += 0.1 * np.sign(scipy.ndimage.gaussian_filter(source.normal(size=(24, 1, 32, 32)), (0, 0, 4, 4)))
    levels = np.clip(110 + 500 * smooth, 0, 255).astype(np.uint8)
    return torch.from_numpy(levels).float() / 255


def grey(value: int, count: int = 20, channels: int = 3) -> Tensor:
    return torch.full((count, channels, 32, 32), value / 255)


@pytest.mark.parametrize("name", NAMES)
def test_images_stay_images_in_whole_levels_and_depend_on_nothing_but_their_position(
    name: str, pictures: Tensor
) -> None:
    before = pictures.clone()
    for severity in (1, 4):
        whole = corrupted(name, severity, pictures)
        assert whole.shape == pictures.shape
        assert whole.dtype == torch.float32
        assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
        assert torch.equal((whole * 255).round() / 255, whole)
        assert not torch.equal(whole, pictures)
        parts = [corrupted(name, severity, pictures[k : k + 5], first=k) for k in range(0, len(pictures), 5)]
        assert torch.equal(torch.cat(parts), whole)
        order = torch.randperm(len(pictures))
        batch = Batch(pictures[order], torch.zeros(len(order), dtype=torch.int64), index=order)
        assert torch.equal(Corruption(name, severity)(MODEL, batch).x, whole[order])
    assert torch.equal(pictures, before)


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_position_change_what_is_random_and_nothing_else(name: str, pictures: Tensor) -> None:
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    twice = pictures[:1].expand(2, -1, -1, -1)
    found = corrupted(name, 5, twice)
    assert torch.equal(found[0], found[1]) == (name in fixed)
    assert torch.equal(found, corrupted(name, 5, twice, seed=1)) == (name in fixed)
    # Without positions the image itself is the key: equal images get equal noise.
    batch = Batch(twice, torch.zeros(2, dtype=torch.int64))
    unplaced = Corruption(name, 5)(MODEL, batch).x
    assert torch.equal(unplaced[0], unplaced[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64), (2, 20, 33)])
def test_images_of_any_size_and_number_of_channels_are_taken(name: str, shape: tuple[int, int, int]) -> None:
    x = (torch.rand(2, *shape) * 255).round() / 255
    for severity in (1, 5):
        found = corrupted(name, severity, x)
        assert found.shape == x.shape
        assert bool(torch.isfinite(found).all())
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_images_move_further_the_higher_the_severity(name: str, pictures: Tensor) -> None:
    distances = [float((corrupted(name, s, pictures) - pictures).square().mean().sqrt()) for s in SEVERITIES]
    # The published parameters do not grow in one direction for these: glass blurs more and moves less at 3 and 5,
    # elastic moves finer and less far, frost darkens the image while it whitens it, motion gets longer only.
    if name not in {"glass_blur", "elastic_transform", "frost"}:
        assert distances == sorted(distances)
    assert min(distances) > 0.005


@pytest.mark.parametrize(("severity", "sigma"), [(1, 0.04), (2, 0.06), (3, 0.08), (4, 0.09), (5, 0.10)])
def test_gaussian_noise_has_its_standard_deviation(severity: int, sigma: float) -> None:
    difference = corrupted("gaussian_noise", severity, grey(128)) - grey(128)
    # 61,440 values; cutting down to whole levels lowers the mean by half a level and adds 1/12 of a level's square.
    spread = np.sqrt(sigma**2 + 1 / 12 / 255**2)
    assert float(difference.std()) == pytest.approx(spread, rel=0.015)
    assert float(difference.mean()) == pytest.approx(-0.5 / 255, abs=4 * sigma / 248)


@pytest.mark.parametrize(("severity", "photons"), [(1, 500), (3, 100), (5, 50)])
def test_shot_noise_has_the_variance_of_its_rate(severity: int, photons: int) -> None:
    for level in (51, 153):
        difference = corrupted("shot_noise", severity, grey(level)) - grey(level)
        assert float(difference.var()) == pytest.approx(level / 255 / photons, rel=0.06)


@pytest.mark.parametrize(("severity", "share"), [(1, 0.01), (5, 0.07)])
def test_impulse_noise_is_salt_and_pepper_in_equal_shares(severity: int, share: float) -> None:
    found = corrupted("impulse_noise", severity, grey(128, count=40))
    for value in (0.0, 1.0):
        assert float((found == value).float().mean()) == pytest.approx(share / 2, rel=0.15)
    assert float((found == 128 / 255).float().mean()) == pytest.approx(1 - share, rel=0.01)


def test_brightness_raises_the_value_and_keeps_hue_and_saturation(pictures: Tensor) -> None:
    found = corrupted("brightness", 4, pictures[:2])
    rise = 0.2
    for before, after in zip(
        pictures[:2].flatten(2).mT.reshape(-1, 3)[::37], found.flatten(2).mT.reshape(-1, 3)[::37], strict=True
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + rise, 1.0))
        assert after.tolist() == pytest.approx(expected, abs=1.01 / 255)
    assert corrupted("brightness", 1, grey(0, 1)).unique().tolist() == pytest.approx([12 / 255])
    assert corrupted("brightness", 5, grey(100, 1, channels=1)).unique().tolist() == pytest.approx([176 / 255])


@pytest.mark.parametrize(("severity", "kept"), [(1, 0.75), (2, 0.5), (5, 0.15)])
def test_contrast_pulls_each_channel_towards_its_mean(severity: int, kept: float, pictures: Tensor) -> None:
    means = pictures.mean((2, 3), keepdim=True)
    expected = ((pictures - means) * kept + means) * 255
    found = corrupted("contrast", severity, pictures) * 255
    assert bool(((expected - found) > -0.01).all())
    assert bool(((expected - found) < 1).all())


def test_jpeg_and_pixelate_are_what_pillow_makes(pictures: Tensor) -> None:
    for severity, quality, share in ((1, 80, 0.95), (3, 58, 0.85), (5, 40, 0.65)):
        compressed, coarse = (corrupted(name, severity, pictures[:3]) for name in ("jpeg_compression", "pixelate"))
        for place in range(3):
            picture = Image.fromarray((pictures[place] * 255).round().byte().permute(1, 2, 0).numpy())
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=quality)
            expected = np.asarray(Image.open(stream))
            assert np.array_equal((compressed[place] * 255).round().byte().permute(1, 2, 0).numpy(), expected)
            small = picture.resize((int(32 * share), int(32 * share)), Image.Resampling.BOX)
            expected = np.asarray(small.resize((32, 32), Image.Resampling.BOX))
            assert np.array_equal((coarse[place] * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_zoom_blur_is_the_mean_of_enlargements_by_scipy(pictures: Tensor) -> None:
    image = pictures[0].numpy().astype(np.float64)
    total, factors = image.copy(), np.arange(1, 1.16, 0.01)
    for factor in factors:
        kept = int(np.ceil(32 / factor))
        top = (32 - kept) // 2
        grown = scipy.ndimage.zoom(image[:, top : top + kept, top : top + kept], (1, factor, factor), order=1)
        trim = (grown.shape[1] - 32) // 2
        total += grown[:, trim : trim + 32, trim : trim + 32]
    expected = 255 * total / (len(factors) + 1)
    found = 255 * corrupted("zoom_blur", 3, pictures[:1])[0].numpy()
    assert (expected - found).min() > -0.01
    assert (expected - found).max() < 1.01
    for size, factor in ((32, 2.25), (33, 1.07), (8, 1.75)):
        matrix = enlarge(size, factor)
        assert matrix.shape == (size, size)
        assert matrix.sum(1) == pytest.approx(np.ones(size))


def test_defocus_blurs_by_a_disc_and_keeps_what_is_constant() -> None:
    for radius, smooth in ((0.3, 0.4), (1.0, 0.2), (1.5, 0.1)):
        kernel = disc(radius, smooth, half=1)
        assert kernel.sum() == pytest.approx(1, abs=1e-6)
        assert np.allclose(kernel, kernel.T)
        assert np.allclose(kernel, kernel[::-1])
    sharp = disc(1.5, 0.1, half=1)
    assert sharp[1:4, 1:4] == pytest.approx(np.full((3, 3), 1 / 9), abs=1e-6)
    point = torch.zeros(1, 1, 32, 32)
    point[0, 0, 16, 16] = 1
    found = corrupted("defocus_blur", 5, point)[0, 0]
    assert found[15:18, 15:18].unique().tolist() == pytest.approx([28 / 255])
    assert int((found > 0).sum()) == 9
    assert torch.equal(corrupted("defocus_blur", 5, grey(200, 2)), grey(200, 2))


def test_motion_leaves_a_trail_whose_weights_are_a_half_gaussian() -> None:
    point = torch.zeros(30, 1, 32, 32)
    point[:, 0, 16, 16] = 1
    weights = np.exp(-0.5 * np.arange(13) ** 2 / 4)
    weights /= weights.sum()
    shown = np.rint(255 * weights)
    shown = shown[shown > 0].tolist()
    straight = 0
    for image in corrupted("motion_blur", 3, point)[:, 0]:
        rows, columns = (image > 0).nonzero(as_tuple=True)
        # The pixel takes from its right, so that a point leaves a trail to its left, at most 45 degrees steep.
        assert columns.max() == 16
        assert bool(((rows - 16).abs() <= 16 - columns).all())
        values = (255 * image[rows, columns]).round().sort(descending=True).values.tolist()
        assert sum(values) == pytest.approx(255, abs=3)
        # Steeper than that, two of the places round to one pixel, as they do in ImageMagick.
        if len(values) == len(shown):
            straight += 1
            assert values == shown
    assert 10 <= straight < 30


def test_glass_moves_pixels_by_at_most_one_and_leaves_two_margins() -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) * 8 / 255
    found = corrupted("glass_blur", 1, ramp)
    assert torch.equal(found[..., :2], ramp[..., :2])
    assert torch.equal(found[..., :2, :], ramp[..., :2, :])
    moved = ((ramp - found)[..., 2:, 2:] * 255 / 8).round()
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert float(moved.mean()) == pytest.approx(0.5, abs=0.06)


def test_fog_adds_a_cloud_and_keeps_the_highest_value_in_reach() -> None:
    draws = [np.random.default_rng(seed) for seed in range(30)]
    clouds = plasma(32, 2.0, draws)
    assert clouds.shape == (30, 32, 32)
    assert clouds.min((1, 2)).tolist() == [0.0] * 30
    assert clouds.max((1, 2)).tolist() == [1.0] * 30
    rough, smooth = (np.abs(np.diff(plasma(32, decay, draws), axis=2)).mean() for decay in (1.3, 3.0))
    assert rough > 2 * smooth
    # On a grey image g of highest value g: (g + c · cloud) · g / (g + c) spans g² / (g + c) to g.
    found = corrupted("fog", 4, grey(102, 4))
    assert found.amin((1, 2, 3)).tolist() == pytest.approx([0.16 / 1.4] * 4, abs=1.01 / 255)
    assert found.amax((1, 2, 3)).tolist() == pytest.approx([0.4] * 4, abs=1.01 / 255)


def test_frost_is_the_published_mixture_with_a_synthetic_texture() -> None:
    texture = ice_texture(0, 128)
    assert texture.shape == (128, 128)
    assert 0.2 < texture.mean() < 0.7
    assert texture.std() > 0.08
    assert not np.array_equal(texture, ice_texture(1, 128))
    dark = corrupted("frost", 5, grey(0, 4))
    assert float(dark.max()) <= 0.45
    lift = corrupted("frost", 5, grey(100, 4)) - dark
    assert (255 * lift).round().unique().tolist() == [75]


def test_snow_falls_on_both_diagonals_and_whitens() -> None:
    found = corrupted("snow", 4, grey(60, 6))
    # 0.85 x + 0.15 max(x, 1.5 x + 0.5) where no flake falls.
    ground = np.floor(255 * (0.85 * 60 / 255 + 0.15 * (1.5 * 60 / 255 + 0.5)) + 1e-3) / 255
    assert float(found.min()) == pytest.approx(ground, abs=1e-6)
    assert float(found.max()) > 0.8
    flakes = found - found.flip((2, 3))
    assert float(flakes.abs().max()) < 1e-6  # the second fall is the first, turned by half


def test_elastic_moves_what_is_smooth_and_mirrors_at_the_border() -> None:
    assert torch.equal(corrupted("elastic_transform", 5, grey(77, 3)), grey(77, 3))
    rows = torch.arange(32.0).expand(4, 1, 32, 32).mT * 8 / 255
    for severity, affine, far in ((1, 0.08, 0.0), (5, 0.03, 0.1)):
        moved = (corrupted("elastic_transform", severity, rows) - rows)[..., 8:24, 8:24].abs() * 255 / 8
        # Three points move by up to `affine` sides, the rest of the middle not much further.
        assert 0 < float(moved.max()) < 3 * affine * 32 + far * 32 + 1


def published(folder: Path, images: Tensor, labels: Tensor, names: list[str]) -> dict[str, np.ndarray]:
    """Files in the format of CIFAR-10-C: uint8 (5 · N, 32, 32, 3), severity by severity, and labels (5 · N,)."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    held = {}
    for name in names:
        held[name] = source.integers(0, 256, (5 * len(images), 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", held[name])
    np.save(folder / "labels.npy", np.tile(labels.numpy().astype(np.uint8), 5))
    return held


def test_published_files_are_read_by_severity_and_official_position(tmp_path: Path, pictures: Tensor) -> None:
    labels = torch.arange(24) % 10
    held = published(tmp_path / "CIFAR-10-C", pictures, labels, ["fog"])["fog"]
    index = torch.tensor([7, 3, 23])
    for severity in SEVERITIES:
        attack = PublishedCorruption("fog", severity, root=str(tmp_path))
        found = attack(MODEL, Batch(pictures[index], labels[index], index=index)).x
        expected = held[(severity - 1) * 24 + index.numpy()].transpose(0, 3, 1, 2)
        assert torch.equal((found * 255).round().byte(), torch.from_numpy(np.ascontiguousarray(expected)))


def test_files_that_are_missing_damaged_or_of_other_images_are_one_line(tmp_path: Path, pictures: Tensor) -> None:
    labels = torch.arange(24) % 10
    folder = tmp_path / "CIFAR-10-C"
    published(folder, pictures, labels, ["fog", "snow"])
    good = Batch(pictures[:4], labels[:4], index=torch.arange(4))

    def run(name: str, batch: Batch, data: str = "CIFAR-10-C") -> None:
        PublishedCorruption(name, 2, data=data, root=str(tmp_path))(MODEL, batch)

    with pytest.raises(UserError, match=r"there is no .*frost\.npy"):
        run("frost", good)
    with pytest.raises(UserError, match=r"there is no .*CIFAR-100-C"):
        run("fog", good, data="CIFAR-100-C")
    with pytest.raises(UserError, match=r"labels in .* are not those"):
        run("fog", Batch(pictures[:4], labels[:4] + 1, index=torch.arange(4)))
    with pytest.raises(UserError, match=r"24 images of each severity .* image 24 is asked for"):
        run("fog", Batch(pictures[:1], labels[:1], index=torch.tensor([24])))
    with pytest.raises(UserError, match="the batch has none"):
        run("fog", Batch(pictures[:1], labels[:1]))
    with pytest.raises(UserError, match=r"must hold uint8 images \('5·N', 28, 28, 1\)"):
        run("fog", Batch(torch.rand(1, 1, 28, 28), labels[:1], index=torch.tensor([0])))
    (folder / "snow.npy").write_bytes((folder / "snow.npy").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cannot read .*snow\.npy.*download complete"):
        run("snow", good)
    np.save(folder / "snow.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"cannot read .*snow\.npy"):
        run("snow", good)


@pytest.mark.parametrize("attack", [Corruption, PublishedCorruption])
def test_names_and_severities_are_checked_and_written_down(attack: Callable[..., Corruption]) -> None:
    assert parse(repr(attack("frost", 2))) == attack("frost", 2)
    with pytest.raises(UserError, match=r"unknown corruption 'frosty'\. Did you mean 'frost'"):
        attack("frosty", 2)
    for severity in (0, 6, 2.5):
        with pytest.raises(UserError, match="severity"):
            attack("frost", severity)


def test_an_evaluation_gives_each_cell_the_plain_accuracy_on_corrupted_images(
    make_task: Callable[..., tuple[nn.Module, Tensor, Tensor]],
) -> None:
    net, x, y = make_task(3, n=20)
    (record,) = evaluate(net, data=(x, y), suite="corruptions", eps=0.01)
    cells = [name for name in record.scores if name not in ("clean", "worst_case")]
    assert cells == [f"{name}_{severity}" for name in NAMES for severity in SEVERITIES]
    assert record.scores["worst_case"].correct == record.scores["clean"].correct
    assert 0 < np.mean([record.scores[name].accuracy for name in cells]) < 1
    wrong = record.instances["clean"] == 0
    # A corruption may well put right what was wrong: these images are judged too.
    assert any(record.instances[name][wrong].any() for name in cells)

    def random_ones(ball: Ball) -> Suite:
        kept = ("gaussian_noise_5", "fog_5", "snow_5", "elastic_transform_1", "glass_blur_4")
        made = corruptions(ball)
        return replace(made, entries=tuple(entry for entry in made.entries if entry.name in kept))

    (again,) = evaluate(net, data=(x, y), suite=random_ones, eps=0.01, batch_size=3, shard_size=7)
    for name in again.protocol["attacks"]:
        assert np.array_equal(again.instances[name], record.instances[name]), name
