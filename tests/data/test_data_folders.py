"""Image folders: the layouts that are understood, in torchvision's order, with a fixed test part if there is none."""

from __future__ import annotations

from pathlib import Path

import official_files as files
import pytest
import torch
from torchvision.datasets import ImageFolder

from instar.data.folders import fixed_test_mask, load_folder
from instar.data.sources import info, load
from instar.errors import UserError

COLOURS = {"ant": (250, 0, 0), "bee": (0, 250, 0), "cat": (0, 0, 250)}


def three_classes(folder: Path, count: int, *, size: tuple[int, int] = (16, 16)) -> None:
    for name, colour in COLOURS.items():
        for number in range(count):
            files.picture(folder / name / f"{number:02}.png", colour, size=size)


@pytest.mark.parametrize("test_folder", ["test", "val", "validation", "valid"])
def test_train_and_test_folders_are_read_in_torchvisions_order(tmp_path: Path, test_folder: str) -> None:
    three_classes(tmp_path / "train", 4)
    three_classes(tmp_path / test_folder, 2)
    files.picture(tmp_path / "train" / "bee" / "deeper" / "99.JPG", (9, 9, 9))
    files.write(tmp_path / "train" / "bee" / "notes.txt", b"no picture")
    files.write(tmp_path / "train" / ".cache" / "x.png", b"hidden")
    images = load_folder(tmp_path, split="train")
    reference = ImageFolder(str(tmp_path / "train"), allow_empty=True)
    shift = len(reference.classes) - 3  # torchvision counts the hidden folder as a class
    assert [str(path) for path in images.files] == [path for path, label in reference.samples if label >= shift]
    assert images.labels.tolist() == [label - shift for _, label in reference.samples if label >= shift]
    assert images.classes == ("ant", "bee", "cat")
    assert (images.info.train_size, images.info.test_size) == (13, 6)
    assert len(load_folder(tmp_path, split="test")) == 6


def test_the_test_folder_wins_over_val_and_an_unlabelled_test_folder_does_not(tmp_path: Path) -> None:
    three_classes(tmp_path / "train", 2)
    three_classes(tmp_path / "val", 3)
    files.picture(tmp_path / "test" / "images" / "1.png", (0, 0, 0))
    assert len(load_folder(tmp_path, split="test")) == 9
    three_classes(tmp_path / "other", 1)
    (tmp_path / "test" / "images" / "1.png").unlink()
    (tmp_path / "test" / "images").rmdir()
    three_classes(tmp_path / "test", 1)
    assert len(load_folder(tmp_path, split="test")) == 3


def test_classes_directly_get_a_fixed_stratified_test_part(tmp_path: Path) -> None:
    three_classes(tmp_path, 10)
    train, test = (load_folder(tmp_path, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (24, 6)
    assert torch.bincount(test.labels).tolist() == [2, 2, 2]
    assert not set(train.files) & set(test.files)
    assert load_folder(tmp_path, split="test").files == test.files
    names = [path.relative_to(tmp_path).as_posix() for path in test.files]
    # the choice is part of every result on such a folder: it may never change
    assert names == ["ant/05.png", "ant/09.png", "bee/01.png", "bee/06.png", "cat/06.png", "cat/09.png"]


def test_each_picture_comes_with_its_own_label_and_colour(tmp_path: Path) -> None:
    three_classes(tmp_path / "train", 3)
    three_classes(tmp_path / "val", 1)
    images = load(tmp_path)
    order = torch.tensor([8, 0, 4, 3, 7])
    fetched = images.fetch(order)
    assert fetched.dtype == torch.uint8
    for image, label in zip(fetched, images.labels[order], strict=True):
        expected = torch.tensor(list(COLOURS.values())[label], dtype=torch.uint8)
        assert torch.equal(image, expected[:, None, None].expand(3, 16, 16))


def test_the_size_is_the_pictures_own_or_128_or_what_is_asked_for(tmp_path: Path) -> None:
    three_classes(tmp_path / "train", 2, size=(20, 12))
    three_classes(tmp_path / "val", 1)
    assert load_folder(tmp_path, split="train").shape == (3, 12, 20)
    assert load_folder(tmp_path, split="test").fetch(torch.tensor([0])).shape == (1, 3, 12, 20)
    assert load_folder(tmp_path, split="train", size=8).shape == (3, 8, 8)
    files.picture(tmp_path / "train" / "ant" / "large.png", (0, 0, 0), size=(30, 30))
    assert load_folder(tmp_path, split="train").shape == (3, 128, 128)
    with pytest.raises(UserError, match="size must be a positive number"):
        load_folder(tmp_path, split="train", size=0)


def test_info_of_a_folder_counts_it(tmp_path: Path) -> None:
    three_classes(tmp_path / "pets" / "train", 2)
    three_classes(tmp_path / "pets" / "val", 1)
    found = info(tmp_path / "pets")
    assert (found.title, found.classes, found.train_size, found.test_size) == ("pets", ("ant", "bee", "cat"), 6, 3)
    assert (found.eps, found.flip) == (8 / 255, True)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda root: None,
            "expected train/ and val/ or test/, or one sub-folder for each of two or more classes; got no",
        ),
        (lambda root: files.picture(root / "ant" / "1.png", 3), "got ant"),
        (lambda root: files.picture(root / "train" / "ant" / "1.png", 3), "train: expected one sub-folder for each"),
        (
            lambda root: three_classes(root / "train", 1),
            "expected test/ or val/ with the 3 classes of train/; got neither",
        ),
        (
            lambda root: (three_classes(root / "train", 1), files.picture(root / "val" / "dog" / "1.png", 3)),
            "got val/ with dog",
        ),
        (
            lambda root: (three_classes(root, 1), (root / "bee" / "00.png").unlink()),
            "bee: expected pictures .*; got none",
        ),
    ],
)
def test_a_folder_of_another_layout_says_what_was_expected(tmp_path: Path, make: object, expected: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=expected) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_the_fixed_choice_does_not_depend_on_the_order_of_the_files() -> None:
    labels = torch.tensor([0, 1] * 10)
    keys = [f"image {number}" for number in range(20)]
    chosen = fixed_test_mask(labels, keys, count=6)
    backwards = fixed_test_mask(labels.flip(0), keys[::-1], count=6).flip(0)
    assert torch.equal(chosen, backwards)
    assert torch.bincount(labels[chosen]).tolist() == [3, 3]
