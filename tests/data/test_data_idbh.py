"""IDBH and erasing: the paper's distributions, torchvision's operations, one strength for each image."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torchvision.transforms.v2 import RandomErasing as TorchvisionErasing
from torchvision.transforms.v2 import functional as reference

from instar.data.augment import Augmentation, Flip
from instar.data.erasing import Cutout, RandomErasing, blacked
from instar.data.idbh import (
    OPERATIONS,
    SPACES,
    ColorShape,
    CropShift,
    brightened,
    contrasted,
    idbh,
    rotated,
    saturated,
    sharpened,
    sheared,
)
from instar.errors import UserError

DRAWS = 20_000
EVERY = [
    CropShift(0, 3),
    CropShift(4, 4),
    ColorShape("color"),
    ColorShape("shape"),
    RandomErasing(0.5),
    RandomErasing(1.0, area=(0.02, 0.5)),
    Cutout(4),
    idbh("weak", side=16),
    idbh("strong", side=16),
    idbh("svhn", side=16),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int, channels: int = 3, side: int = 16, seed: int = 0) -> torch.Tensor:
    """Smooth pictures with noise, of neither one level nor all, so that every operation has something to do."""
    source = generator(seed)
    base = torch.rand(count, channels, 1, 1, generator=source) * 120 + 40
    ramp = torch.linspace(-30, 30, side)
    noise = torch.randn(count, channels, side, side, generator=source) * 15
    return (base + ramp[:, None] * 0.5 + ramp + noise).clamp(0, 255).to(torch.uint8)


def within_three_sigma(found: float, probability: float, draws: int = DRAWS) -> bool:
    return abs(found - probability) <= 3 * math.sqrt(probability * (1 - probability) / draws)


# What holds for all of them


@pytest.mark.parametrize("transform", EVERY, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_type_and_range_are_kept(transform: Callable[..., torch.Tensor], channels: int) -> None:
    images = pixels(64, channels)
    for given, top in ((images, 255), (images.float() / 255, 1), (images.double() / 255, 1), (images.half() / 255, 1)):
        found = transform(given, generator())
        assert (found.shape, found.dtype, found.device) == (given.shape, given.dtype, given.device)
        assert float(found.min()) >= 0
        assert float(found.max()) <= top
        assert not torch.equal(found, given)
    assert transform(images[:0], generator()).shape == (0, channels, 16, 16)


@pytest.mark.parametrize("transform", EVERY, ids=str)
def test_bytes_and_floats_get_the_same_picture(transform: Callable[..., torch.Tensor]) -> None:
    images = pixels(64)
    found, floats = transform(images, generator(3)), transform(images.float() / 255, generator(3))
    # the grey and the result are both cut off to whole levels, and up to 0.9 of the grey is subtracted or added
    assert float((found.float() - floats * 255).abs().max()) < 1.9 + 1e-3


@pytest.mark.parametrize("transform", EVERY, ids=str)
def test_the_generator_alone_decides_and_other_images_do_not_matter(transform: Callable[..., torch.Tensor]) -> None:
    images = pixels(64)
    before, state = images.clone(), torch.random.get_rng_state()
    first = transform(images, generator(1))
    assert torch.equal(images, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1234)
    assert torch.equal(first, transform(images, generator(1)))
    assert not torch.equal(first, transform(images, generator(2)))
    others = pixels(64, seed=9)
    others[5] = images[5]
    assert torch.equal(transform(others, generator(1))[5], first[5])
    used, untouched = generator(1), generator(1)
    transform(images, used)
    transform(others, untouched)
    assert torch.equal(used.get_state(), untouched.get_state())  # nor does the number of draws depend on images


@pytest.mark.parametrize("transform", EVERY, ids=str)
def test_layout_in_memory_does_not_matter(transform: Callable[..., torch.Tensor]) -> None:
    images = pixels(16).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(transform(images, generator()), transform(images.contiguous(), generator()))


# CropShift


def test_strength_zero_is_the_identity() -> None:
    images = pixels(32)
    assert torch.equal(CropShift(0, 0)(images, generator()), images)


@pytest.mark.parametrize("strength", range(11))
def test_black_rows_and_columns_add_up_to_the_strength(strength: int) -> None:
    found = CropShift(strength, strength)(torch.ones(500, 3, 32, 32, dtype=torch.uint8), generator(strength))
    assert bool((found == found[:, :1]).all())
    rows, columns = (found[:, 0].sum(2) == 0).sum(1), (found[:, 0].sum(1) == 0).sum(1)
    assert bool((rows + columns == strength).all())
    assert set(columns.tolist()) == set(range(strength + 1))


def test_strength_and_its_split_have_the_papers_distribution() -> None:
    found = CropShift(0, 10)(torch.ones(DRAWS, 1, 32, 32, dtype=torch.uint8), generator())[:, 0]
    rows, columns = (found.sum(2) == 0).sum(1), (found.sum(1) == 0).sum(1)
    for strength in range(11):
        drawn = rows + columns == strength
        assert within_three_sigma(float(drawn.double().mean()), 1 / 11)
        for across in range(strength + 1):
            share = float((columns[drawn] == across).double().mean())
            assert abs(share - 1 / (strength + 1)) <= 4 * math.sqrt(0.25 / int(drawn.sum()))
    # the window is pasted where it fits, all places equally likely: the number of black rows above it
    above = (found.sum(2) != 0).int().argmax(1)
    for lost in range(1, 4):
        for place in range(lost + 1):
            share = float((above[rows == lost] == place).double().mean())
            assert abs(share - 1 / (lost + 1)) <= 4 * math.sqrt(0.25 / int((rows == lost).sum()))


def test_each_outcome_is_a_window_moved_and_all_are_as_likely_as_they_should_be() -> None:
    image = (torch.arange(12) + 1).reshape(1, 1, 3, 4).to(torch.uint8)
    strength = 2
    outcomes: dict[tuple[int, ...], float] = {}
    for across in range(strength + 1):
        lost_rows, lost_columns = strength - across, across
        places = (lost_rows + 1) ** 2 * (lost_columns + 1) ** 2
        for top in range(lost_rows + 1):
            for left in range(lost_columns + 1):
                window = image[0, 0, top : top + 3 - lost_rows, left : left + 4 - lost_columns]
                for down in range(lost_rows + 1):
                    for right in range(lost_columns + 1):
                        canvas = torch.zeros(3, 4, dtype=torch.uint8)
                        canvas[down : down + 3 - lost_rows, right : right + 4 - lost_columns] = window
                        key = tuple(canvas.flatten().tolist())
                        outcomes[key] = outcomes.get(key, 0) + 1 / (strength + 1) / places
    found = CropShift(strength, strength)(image.expand(DRAWS, -1, -1, -1), generator(4)).flatten(1)
    counts = dict.fromkeys(outcomes, 0)
    for row in map(tuple, found.tolist()):
        counts[row] += 1  # a KeyError is an outcome that cannot be
    chi_square = sum((counts[key] - DRAWS * p) ** 2 / (DRAWS * p) for key, p in outcomes.items())
    freedom = len(outcomes) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


# ColorShape


@pytest.mark.parametrize("kind", ["color", "shape"])
def test_operations_and_strengths_are_drawn_as_in_the_paper(kind: str) -> None:
    operation, strength, vertical = ColorShape(kind).draw(4 * DRAWS, generator(7))  # type: ignore[arg-type]
    published = {
        "color": (0.125,) * 8,
        "shape": (0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3),
    }[kind]
    shear, degrees = {"color": ((0.05, 0.15), 10), "shape": ((0.05, 0.35), 30)}[kind]
    ends = {"saturation": (0.1, 1.9), "brightness": (0.5, 1.9), "contrast": (0.5, 1.9), "sharpness": (0.1, 1.9)}
    for number, (name, probability) in enumerate(zip(OPERATIONS, published, strict=True)):
        drawn = operation == number
        count = int(drawn.sum())
        assert within_three_sigma(count / (4 * DRAWS), probability, 4 * DRAWS), name
        amount = strength[drawn]
        if name in ("autocontrast", "equalize"):
            assert bool((amount == 1).all())
            continue
        if name in ("shear", "rotation"):
            assert within_three_sigma(float((amount < 0).double().mean()), 0.5, count), name
            assert abs(float(amount.mean())) < 4 * float(amount.std()) / math.sqrt(count)  # either sign is as strong
            amount = amount.abs()
        if name == "rotation":
            assert set(amount.tolist()) == set(range(1, degrees + 1))
            counts = torch.bincount(amount.long(), minlength=degrees + 1)[1:].double()
            expected = count / degrees
            chi_square = float(((counts - expected) ** 2 / expected).sum())
            assert abs(chi_square - (degrees - 1)) < 4 * math.sqrt(2 * (degrees - 1))
            continue
        low, high = ends.get(name, shear)
        assert low <= float(amount.min()) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < float(amount.max()) <= high
        deviation = (high - low) / math.sqrt(12)
        assert abs(float(amount.mean()) - (low + high) / 2) < 4 * deviation / math.sqrt(count), name
        assert abs(float(amount.std()) - deviation) < 0.05 * deviation
    sheared_rows = operation == OPERATIONS.index("shear")
    assert within_three_sigma(float(vertical[sheared_rows].double().mean()), 0.5, int(sheared_rows.sum()))
    # sign and axis do not go together
    both = float((vertical & (strength < 0))[sheared_rows].double().mean())
    assert within_three_sigma(both, 0.25, int(sheared_rows.sum()))


def one_by_one(name: str, image: torch.Tensor, strength: float, vertical: bool) -> torch.Tensor:
    """What torchvision makes of one image."""
    if name == "saturation":
        return reference.adjust_saturation(image, strength)
    if name == "brightness":
        return reference.adjust_brightness(image, strength)
    if name == "contrast":
        return reference.adjust_contrast(image, strength)
    if name == "sharpness":
        return reference.adjust_sharpness(image, strength)
    if name == "autocontrast":
        return reference.autocontrast(image)
    if name == "equalize":
        return reference.equalize(image)
    if name == "rotation":
        return reference.rotate(image, strength, fill=0)
    angle = math.degrees(strength)
    shear = [0.0, angle] if vertical else [angle, 0.0]
    return reference.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, fill=0)


@pytest.mark.parametrize("kind", ["color", "shape"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_image_undergoes_torchvisions_operation_with_its_own_strength(
    kind: str, channels: int, dtype: torch.dtype
) -> None:
    images = pixels(400, channels, side=20)
    images = images if dtype == torch.uint8 else images.to(dtype) / 255
    transform = ColorShape(kind)  # type: ignore[arg-type]
    found = transform(images, generator(11))
    operation, strength, vertical = transform.draw(400, generator(11))
    assert set(operation.tolist()) == set(range(8))
    changed = dict.fromkeys(OPERATIONS, 0)
    for image, result, *drawn in zip(images, found, operation, strength, vertical, strict=True):
        name = OPERATIONS[drawn[0]]
        expected = one_by_one(name, image, float(drawn[1]), bool(drawn[2]))
        changed[name] += not torch.equal(result, image)
        difference = (result.double() - expected.double()).abs()
        level = 1 if dtype == torch.uint8 else 1 / 255
        if name in ("shear", "rotation"):
            # a source coordinate halfway between two pixels may round to either
            assert int((difference > 0).sum()) <= channels
        else:
            assert float(difference.max()) <= level, name
            # off by rounding and not by formula: only where the exact value is a whole level
            assert dtype != torch.uint8 or float((difference > 0).double().mean()) < 0.03, name
    assert all(changed[name] for name in OPERATIONS if channels == 3 or name != "saturation")
    assert channels == 3 or not changed["saturation"]


def test_images_of_any_height_and_width_are_sheared_and_turned_as_in_torchvision() -> None:
    images = pixels(40, side=20)[..., :13]
    angles = torch.linspace(-0.35, 0.35, 40, dtype=torch.float64)
    upright = torch.arange(40) % 2 == 0
    for name, found in (("shear", sheared(images, angles, upright)), ("rotation", rotated(images, angles.rad2deg()))):
        for image, result, angle, vertical in zip(images, found, angles.tolist(), upright.tolist(), strict=True):
            strength = angle if name == "shear" else math.degrees(angle)
            expected = one_by_one(name, image, strength, vertical)
            assert int((result != expected).sum()) <= 3


def test_factors_have_their_closed_forms() -> None:
    images = torch.rand(5, 3, 6, 6, dtype=torch.float64) * 0.4 + 0.2
    one, zero = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for function in (saturated, brightened, contrasted, sharpened):
        assert torch.allclose(function(images, one), images, atol=1e-15)
    grey = (images * torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(1, keepdim=True)
    assert torch.allclose(saturated(images, zero), grey.expand_as(images), atol=1e-15)
    assert torch.allclose(contrasted(images, zero), grey.mean((1, 2, 3), keepdim=True).expand_as(images), atol=1e-15)
    assert not brightened(images, zero).any()
    flat = torch.full((5, 3, 6, 6), 0.3, dtype=torch.float64)
    assert torch.allclose(sharpened(flat, 1.7 * one), flat, atol=1e-15)
    assert torch.equal(sharpened(images[..., :2], zero), images[..., :2])
    assert torch.equal(sharpened(images, zero)[..., 0, :], images[..., 0, :])


# RandomErasing and Cutout


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_the_erasing_rate_is_the_probability(probability: float) -> None:
    found = RandomErasing(probability)(torch.ones(DRAWS, 1, 32, 32, dtype=torch.uint8), generator(2))
    rate = float((found == 0).flatten(1).any(1).double().mean())
    assert within_three_sigma(rate, probability)


def sides(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Height and width of the black rectangle of each image (N, 1, H, W), and the number of black pixels."""
    black = images[:, 0] == 0
    return black.any(2).sum(1), black.any(1).sum(1), black.sum((1, 2))


@pytest.mark.parametrize("area", [(0.02, 0.33), (0.02, 0.5)])
def test_rectangles_are_drawn_as_by_torchvision(area: tuple[float, float]) -> None:
    count = 4000
    found = RandomErasing(1.0, area=area)(torch.ones(count, 1, 32, 32), generator(3))
    theirs = TorchvisionErasing(1.0, scale=area)
    expected = torch.stack([theirs(torch.ones(1, 32, 32)) for _ in range(count)])
    for ours, reference_values in zip(sides(found), sides(expected), strict=True):
        for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
            point = reference_values.double().quantile(quantile)
            share = (ours <= point).double().mean() - (reference_values <= point).double().mean()
            assert abs(float(share)) < 4 * math.sqrt(2 * 0.25 / count)
    tall, wide, black = sides(found)
    assert bool((tall * wide == black).all())  # one full rectangle
    assert bool((tall < 32).all() & (wide < 32).all())
    for rows in (found[:, 0], expected[:, 0]):  # all places are equally likely: the mean centre is the image's
        centre = ((rows == 0).double() * torch.arange(32.0)[:, None]).sum((1, 2)) / (rows == 0).sum((1, 2))
        assert abs(float(centre.mean()) - 15.5) < 0.5


def test_rectangles_that_never_fit_leave_the_image_whole() -> None:
    images = torch.ones(50, 1, 8, 8)
    assert torch.equal(RandomErasing(1.0, area=(1.0, 1.0))(images, generator()), images)


def test_a_rectangle_that_does_not_fit_is_drawn_again() -> None:
    """Half of 8×8 fits with sides below 7.5, so with aspects whose logarithm is within ± ln(7.5² / 32)."""
    draws, misfit = 50_000, 1 - 2 * math.log(7.5**2 / 32) / math.log(3.3 / 0.3)
    found = RandomErasing(1.0, area=(0.5, 0.5))(torch.ones(draws, 1, 8, 8, dtype=torch.uint8), generator())
    whole = float((found != 0).flatten(1).all(1).double().mean())
    assert 0.5 < misfit < 0.6
    assert abs(whole - misfit**10) < 4 * math.sqrt(misfit**10 / draws)


def test_cutout_is_a_square_cut_off_at_the_borders() -> None:
    found = Cutout(6)(torch.ones(DRAWS, 3, 10, 12), generator())
    assert bool((found == found[:, :1]).all())
    outcomes = {}
    for row in range(10):
        for column in range(12):
            image = torch.ones(10, 12)
            image[max(row - 3, 0) : row + 3, max(column - 3, 0) : column + 3] = 0
            key = tuple(image.flatten().tolist())
            outcomes[key] = outcomes.get(key, 0) + 1 / 120
    counts = dict.fromkeys(outcomes, 0)
    for row in map(tuple, found[:, 0].flatten(1).tolist()):
        counts[row] += 1
    chi_square = sum((counts[key] - DRAWS * p) ** 2 / (DRAWS * p) for key, p in outcomes.items())
    assert abs(chi_square - (len(outcomes) - 1)) < 4 * math.sqrt(2 * (len(outcomes) - 1))


@pytest.mark.parametrize("length", [1, 3, 4])
def test_cutout_of_any_length_has_that_side_inside_the_image(length: int) -> None:
    found = Cutout(length)(torch.ones(500, 1, 32, 32), generator())
    tall, wide, black = sides(found)
    assert int(black.max()) == length**2
    assert int(tall.max()) == int(wide.max()) == length
    assert int(tall.min()) == int(wide.min()) == (length + 1) // 2  # as much is left at either border
    assert torch.equal(Cutout(0)(found, generator()), found)


def test_rectangles_may_lie_outside_the_image() -> None:
    images = torch.ones(2, 1, 4, 4)
    edges = torch.tensor([[-3, 9], [-1, 12], [0, 0], [4, 4]])
    assert torch.equal(blacked(images, edges), images)
    assert not blacked(images, edges, outside=True).any()


# Pipelines


def test_the_pipelines_are_the_published_ones() -> None:
    assert idbh("weak") == Augmentation((Flip(0.5), CropShift(0, 10), ColorShape("color"), RandomErasing(0.5)))
    assert idbh("strong") == Augmentation((Flip(0.5), CropShift(0, 10), ColorShape("color"), RandomErasing(1.0)))
    assert idbh("svhn") == Augmentation(
        (Flip(0.5), CropShift(0, 8), ColorShape("shape"), RandomErasing(1.0, area=(0.02, 0.5)))
    )
    assert RandomErasing() == RandomErasing(0.5, area=(0.02, 0.33), aspect=(0.3, 3.3))
    assert idbh("weak", side=64, flip=False).transforms[0] == CropShift(0, 20)
    for space in SPACES.values():
        assert sum(space.probabilities) == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: CropShift(3, 2), "0 ≤ low ≤ high; got 3 and 2"),
        (lambda: CropShift(-1, 2), "0 ≤ low ≤ high; got -1 and 2"),
        (lambda: CropShift(0, 8)(torch.zeros(1, 1, 8, 8), generator()), "corresponds to 2"),
        (lambda: ColorShape("colour"), "unknown kind of ColorShape 'colour'. Did you mean 'color'"),  # type: ignore[arg-type]
        (lambda: ColorShape()(torch.zeros(1, 2, 8, 8), generator()), r"1 or 3 channels; got \(1, 2, 8, 8\)"),
        (lambda: ColorShape()(torch.zeros(1, 3, 8, 8, dtype=torch.int64), generator()), "got torch.int64"),
        (lambda: RandomErasing(1.5), r"must be in \[0, 1\]; got 1.5"),
        (lambda: RandomErasing(area=(0.5, 0.2)), r"got \(0.5, 0.2\)"),
        (lambda: RandomErasing(aspect=(0.0, 2.0)), r"got \(0.0, 2.0\)"),
        (lambda: Cutout(-1), "got -1"),
        (lambda: idbh("medium"), "unknown variant of IDBH 'medium'"),  # type: ignore[arg-type]
        (lambda: idbh("weak", side=0), "at least 1 pixel; got 0"),
    ],
)
def test_impossible_transforms_are_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make()
