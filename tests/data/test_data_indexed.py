"""Images keep their identity and their values, whatever they come from; what a model cannot mean is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import official_files as files
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from instar.data.catalogue import CATALOGUE
from instar.data.indexed import (
    FolderImages,
    Images,
    ResidentImages,
    as_float,
    check_values,
    from_dataset,
    generic_info,
    labels_of,
)
from instar.errors import UserError

INFO = generic_info("mine", classes=("a", "b"), shape=(3, 8, 8), train_size=6)
PIXELS = torch.from_numpy(files.random_images(6, shape=(3, 8, 8)))
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


class Listed(Dataset[Any]):
    """A map-style dataset over a list of items, with whatever attributes are given."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.asked = 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: int) -> Any:
        self.asked += 1
        return self.items[position]


def test_uint8_becomes_float_exactly_by_division_by_255() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_float(every), torch.arange(256, dtype=torch.float32) / 255)
    half = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert torch.equal(as_float(half), half.float())


def test_resident_images_are_fetched_in_the_order_that_was_asked_for() -> None:
    images = ResidentImages(PIXELS, LABELS, INFO)
    order = torch.tensor([5, 0, 3, 3])
    assert torch.equal(images.fetch(order), PIXELS[order])
    assert images.fetch(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (PIXELS[:, :1], LABELS, r"images must be \(N, C, H, W\) = \(N, 3, 8, 8\); got \(6, 1, 8, 8\)"),
        (PIXELS, LABELS[:5], "labels must be 6 integers, one for each image; got"),
        (PIXELS, LABELS.float(), "got .* of torch.float32"),
        (PIXELS, LABELS + 1, r"labels must be in 0\.\.1 for 2 classes; got 2 at position 1 \(3 such labels\)"),
        (PIXELS, LABELS - 1, "got -1 at position 0"),
        (PIXELS.float(), LABELS, r"images must lie in \[0, 1\]; got values from 0 to 255\. Divide by 255"),
        (PIXELS.float() / 127.5 - 1, LABELS, "got values from -1 to 1. Are they normalised"),
        (torch.full((6, 3, 8, 8), float("nan")), LABELS, "there are NaN among them"),
        (PIXELS.int(), LABELS, "must be uint8 in 0..255 or floating point"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(
    images: torch.Tensor, labels: torch.Tensor, expected: str
) -> None:
    with pytest.raises(UserError, match=expected) as error:
        ResidentImages(images, labels, INFO)
    assert "\n" not in str(error.value)


def test_one_nan_among_good_values_is_found() -> None:
    values = torch.rand(2, 3, 8, 8)
    values[1, 2, 3, 4] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        check_values(values, what="mine")
    check_values(torch.zeros(0, 3, 8, 8), what="none at all")


def test_decoded_images_can_be_held_in_memory(tmp_path: Any) -> None:
    paths = tuple(files.picture(tmp_path / f"{number}.png", (number, 0, 0), size=(8, 8)) for number in range(6))
    lazy = FolderImages(paths, LABELS, INFO, "train", workers=2)
    held = ResidentImages.of(lazy, chunk=4)
    assert torch.equal(held.images, lazy.fetch(torch.arange(6)))
    assert held.images[:, 0, 0, 0].tolist() == list(range(6))
    assert (held.split, held.info) == ("train", INFO)
    assert ResidentImages.of(held) is held


def test_folder_images_need_as_many_labels_as_files_and_rgb() -> None:
    with pytest.raises(UserError, match="1 files need as many labels; got 6"):
        FolderImages((files.Path("a.png"),), LABELS, INFO)
    with pytest.raises(UserError, match="read as RGB"):
        FolderImages((), LABELS[:0], CATALOGUE["digits"])


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(lambda pixels: pixels, id="uint8 tensor"),
        pytest.param(lambda pixels: pixels.float() / 255, id="float tensor"),
        pytest.param(lambda pixels: pixels.permute(1, 2, 0).numpy(), id="array"),
        pytest.param(lambda pixels: Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), id="PIL picture"),
    ],
)
def test_any_torch_dataset_gives_the_same_pixels(item: Any) -> None:
    dataset = Listed([(item(pixels), int(label)) for pixels, label in zip(PIXELS, LABELS, strict=True)])
    images = from_dataset(dataset, classes=["cat", "dog"])
    assert isinstance(images, Images)
    order = torch.tensor([4, 1, 1])
    assert torch.equal(as_float(images.fetch(order)), as_float(PIXELS[order]))
    assert torch.equal(images.labels, LABELS)
    assert images.classes == ("cat", "dog")


def test_grayscale_pictures_become_one_channel() -> None:
    dataset = Listed([(Image.new("L", (10, 6), 51), 0), (Image.new("L", (10, 6), 0), 1)])
    images = from_dataset(dataset)
    assert images.shape == (1, 6, 10)
    assert images.classes == ("class 0", "class 1")
    assert images.fetch(torch.tensor([0])).unique().tolist() == [51]


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "1"])
def test_pictures_of_any_mode_become_rgb(mode: str) -> None:
    white = Image.new("RGB", (6, 6), (255, 255, 255)).convert(mode)
    images = from_dataset(Listed([(white, 0), (white, 1)]))
    assert images.shape == (3, 6, 6)
    assert images.fetch(torch.tensor([1])).unique().tolist() == [255]


def test_pictures_with_deeper_values_than_a_byte_are_refused() -> None:
    with pytest.raises(UserError, match="item 0: "):
        from_dataset(Listed([(Image.new("I;16", (6, 6), 9), 0)]))
    with pytest.raises(UserError, match="item 0: "):
        from_dataset(Listed([(Image.new("I", (6, 6), 9), 0)]))


@pytest.mark.parametrize("attribute", ["targets", "labels"])
def test_labels_are_taken_from_the_datasets_own_list_without_decoding(attribute: str) -> None:
    dataset = Listed([(PIXELS[0], 1)] * 3, **{attribute: [1, 1, 1]})
    assert labels_of(dataset).tolist() == [1, 1, 1]
    assert dataset.asked == 0


def test_a_target_transform_is_respected() -> None:
    dataset = Listed([(PIXELS[0], 1), (PIXELS[1], 0)], targets=[7, 7], target_transform=lambda label: label - 6)
    assert labels_of(dataset).tolist() == [1, 0]


def test_subsets_and_tensor_datasets_keep_positions_and_labels_together() -> None:
    whole = TensorDataset(PIXELS, LABELS)
    part = Subset(whole, [4, 3, 5])
    assert labels_of(part).tolist() == [1, 0, 0]
    assert torch.equal(from_dataset(part).fetch(torch.tensor([1])), PIXELS[3:4])


def test_a_dataset_that_shuffles_itself_is_caught() -> None:
    dataset = Listed([(PIXELS[0], 0), (PIXELS[1], 1)])
    images = from_dataset(dataset)
    dataset.items.reverse()
    with pytest.raises(UserError, match="item 0: its label changed from 0 to 1"):
        images.fetch(torch.tensor([0]))


class _Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield PIXELS[0], 0


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (_Endless(), r"must have len\(dataset\) and dataset\[i\]; got _Endless"),
        (Listed([]), "the dataset is empty"),
        (Listed([PIXELS[0]]), r"must be a pair \(image, label\); got Tensor"),
        (Listed([(PIXELS[0], 1, 2)]), "got tuple of 3"),
        (Listed([("cat.png", 1)]), "expected a PIL picture, an array or a tensor; got str"),
        (Listed([(PIXELS[0], 0.5)]), r"must be integers \(N,\); got torch.float32"),
        (Listed([(PIXELS[0], -1)]), r"labels must be in 0\.\.1"),
        (Listed([(PIXELS[0].float(), 1)]), r"item 0: images must lie in \[0, 1\]; got values from"),
        (Listed([(PIXELS, 1)]), r"expected one image \(C, H, W\)"),
    ],
)
def test_a_dataset_that_cannot_be_used_says_why(dataset: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        from_dataset(dataset)
    assert "\n" not in str(error.value)


def test_a_later_image_of_another_shape_or_range_is_named() -> None:
    images = from_dataset(Listed([(PIXELS[0], 0), (PIXELS[0, :, :4], 1), (PIXELS[0].float() - 9, 1)]))
    with pytest.raises(UserError, match=r"item 1: every image must have the shape of the first, \(3, 8, 8\)"):
        images.fetch(torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"item 2: images must lie in \[0, 1\]"):
        images.fetch(torch.tensor([2]))


def test_labels_beyond_the_given_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"labels must be in 0\.\.1 for 2 classes; got 5"):
        from_dataset(TensorDataset(PIXELS, torch.tensor([0, 1, 5, 0, 0, 0])), classes=["a", "b"])


def test_info_of_a_grayscale_dataset_has_no_photographs_augmentation() -> None:
    info = from_dataset(TensorDataset(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))).info
    assert (info.flip, info.padding, info.mean, info.std) == (False, 0, (0.5,), (0.25,))
    assert replace(info, name="other").shape == (1, 8, 8)


def test_arrays_are_not_shared_with_a_dataset_that_reuses_its_buffer() -> None:
    buffer = np.zeros((4, 4, 3), np.uint8)

    class Reusing(Listed):
        def __getitem__(self, position: int) -> Any:
            buffer[:] = position
            return buffer, position

    images = from_dataset(Reusing([None, None]), classes=["a", "b"])
    assert images.fetch(torch.tensor([0, 1]))[:, 0, 0, 0].tolist() == [0, 1]
