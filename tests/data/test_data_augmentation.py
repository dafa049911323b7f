"""Augmentation: exactly torchvision's crops and flips with exactly their probabilities, for the whole batch at once."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import RandomCrop
from torchvision.transforms import functional as reference

from instar.data.augment import Augmentation, Flip, NoAugmentation, PadCrop, shift, standard
from instar.data.catalogue import CATALOGUE
from instar.errors import UserError

DRAWS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(height: int = 5, width: int = 6) -> torch.Tensor:
    """One image in which every pixel is different, and none is the padding's 0."""
    return (torch.arange(2 * height * width) + 1).reshape(1, 2, height, width).to(torch.int16)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared deviations in units of their expectation, as a z-score of the chi-square distribution (normal limit)."""
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize(("mode", "torchvision_mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_offset_gives_torchvisions_crop(mode: str, torchvision_mode: str, dtype: torch.dtype) -> None:
    image, padding = numbered().to(dtype), 3
    height, width = image.shape[-2:]
    padded = reference.pad(image, [padding] * 4, padding_mode=torchvision_mode)
    offsets = torch.cartesian_prod(torch.arange(2 * padding + 1), torch.arange(2 * padding + 1))
    found = shift(image.expand(len(offsets), -1, -1, -1), offsets[:, 0], offsets[:, 1], padding=padding, mode=mode)
    assert found.dtype == dtype
    for crop, (down, right) in zip(found, offsets.tolist(), strict=True):
        assert torch.equal(crop, reference.crop(padded, down, right, height, width)[0])


def test_offsets_are_uniform_and_independent_as_in_torchvision() -> None:
    padding, side = 2, 5
    image = numbered()
    every = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    crops = shift(image.expand(len(every), -1, -1, -1), every[:, 0], every[:, 1], padding=padding).flatten(1)
    found = PadCrop(padding)(image.expand(DRAWS, -1, -1, -1), generator()).flatten(1)
    which = (found[:, None] == crops[None]).all(2)
    assert bool((which.sum(1) == 1).all())  # each result is one of the 25 crops, and no other
    counts = which.sum(0).float()
    # all 25 pairs equally likely: the two offsets are uniform and independent of each other
    assert abs(chi_square(counts, torch.full((25,), DRAWS / 25))) < 4
    # and torchvision's own draws pass the same test on the same scale
    padded = torch.zeros(2, 5 + 2 * padding, 6 + 2 * padding)
    theirs = torch.zeros(25)
    for _ in range(4000):
        down, right, *_ = RandomCrop.get_params(padded, (5, 6))
        theirs[down * side + right] += 1
    assert abs(chi_square(theirs, torch.full((25,), 4000 / 25))) < 4


def test_flips_have_their_probability_and_are_independent_of_crops_and_neighbours() -> None:
    image = numbered()
    padding = 1
    usual = Augmentation((PadCrop(padding), Flip(0.5)))
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    crops = shift(image.expand(9, -1, -1, -1), every[:, 0], every[:, 1], padding=padding)
    outcomes = torch.cat([crops, crops.flip(-1)]).flatten(1)
    found = usual(image.expand(DRAWS, -1, -1, -1), generator(1)).flatten(1)
    which = (found[:, None] == outcomes[None]).all(2)
    assert bool((which.sum(1) == 1).all())
    assert abs(chi_square(which.sum(0).float(), torch.full((18,), DRAWS / 18))) < 4
    flipped = which[:, 9:].any(1).float()
    both = float((flipped[1:] * flipped[:-1]).mean())
    assert abs(both - 0.25) < 4 * math.sqrt(0.25 * 0.75 / DRAWS)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_any_probability_of_a_flip_is_kept(probability: float) -> None:
    image = numbered()
    found = Flip(probability)(image.expand(DRAWS, -1, -1, -1), generator())
    flipped = (found == image.flip(-1)).flatten(1).all(1)
    assert bool((flipped | (found == image).flatten(1).all(1)).all())
    spread = math.sqrt(probability * (1 - probability) / DRAWS)
    assert abs(float(flipped.float().mean()) - probability) <= 4 * spread


def test_each_image_keeps_its_place_and_its_pixels_stay_its_own() -> None:
    images = torch.arange(64).reshape(64, 1, 1, 1).expand(-1, 3, 8, 8).contiguous().to(torch.uint8) + 1
    found = Augmentation((PadCrop(2), Flip()))(images, generator())
    for number, image in enumerate(found, start=1):
        assert set(image.unique().tolist()) <= {0, number}
        assert bool((image == number).any())


def test_the_input_is_left_as_it_was() -> None:
    images = torch.rand(8, 3, 8, 8)
    before = images.clone()
    for transform in (PadCrop(2), PadCrop(2, "reflect"), Flip(1.0), Augmentation((Flip(), PadCrop(1)))):
        transform(images, generator())
        assert torch.equal(images, before)


def test_equal_generators_give_equal_results_for_bytes_and_floats() -> None:
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    usual = Augmentation((PadCrop(2, "reflect"), Flip()))
    first, second = usual(pixels, generator(5)), usual(pixels.float() / 255, generator(5))
    assert torch.equal(first.float() / 255, second)
    assert not torch.equal(first, usual(pixels, generator(6)))


def test_non_contiguous_and_empty_batches_are_fine() -> None:
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    for mode in ("zero", "reflect"):
        crop = PadCrop(2, mode)  # type: ignore[arg-type]
        channels_last = crop(pixels.permute(0, 3, 1, 2), generator())
        assert torch.equal(channels_last, crop(pixels.permute(0, 3, 1, 2).contiguous(), generator()))
        assert crop(torch.zeros(0, 3, 8, 8), generator()).shape == (0, 3, 8, 8)
    assert Flip()(torch.zeros(0, 3, 8, 8), generator()).shape == (0, 3, 8, 8)


def test_no_padding_moves_nothing_and_no_augmentation_draws_nothing() -> None:
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(PadCrop(0)(images, generator()), images)
    source = generator()
    before = source.get_state()
    assert NoAugmentation()(images, source) is images
    assert torch.equal(source.get_state(), before)


def test_the_standard_augmentation_follows_the_catalogue() -> None:
    usual = Augmentation((PadCrop(4), Flip()))
    assert standard(CATALOGUE["cifar10"]) == standard(CATALOGUE["cifar100"]) == usual
    for name in ("digits", "mnist", "svhn"):
        assert standard(CATALOGUE[name]) == NoAugmentation()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: PadCrop(-1), "padding of PadCrop must be 0 or more pixels; got -1"),
        (lambda: PadCrop(1, "edge"), "mode of PadCrop must be 'zero' or 'reflect'; got 'edge'"),  # type: ignore[arg-type]
        (lambda: Flip(1.5), r"probability of Flip must be in \[0, 1\]; got 1.5"),
        (lambda: Augmentation(("flip",)), "transforms must be callables"),  # type: ignore[arg-type]
        (
            lambda: PadCrop(4, "reflect")(torch.zeros(1, 1, 4, 4), generator()),
            "must be smaller than the image 4×4; got 4",
        ),
    ],
)
def test_impossible_augmentations_are_refused(make: object, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make()  # type: ignore[operator]
