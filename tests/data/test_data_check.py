"""check and contact_sheet: what is on the disk is counted, measured, compared, and shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import official_files as files
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN

from instar.data import check as check_module
from instar.data.catalogue import CATALOGUE, DatasetInfo
from instar.data.check import check, contact_sheet
from instar.data.checksums import FILES_MD5, array_sums, file_sum
from instar.data.indexed import ResidentImages, generic_info
from instar.errors import UserError


def test_published_checksums_are_those_that_torchvision_uses() -> None:
    for name, made in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        assert dict(FILES_MD5[name]) == dict(made.train_list + made.test_list)
    assert dict(MNIST.resources).items() <= FILES_MD5["mnist"].items()
    assert {SVHN.split_list[split][1]: SVHN.split_list[split][2] for split in ("train", "test")} == FILES_MD5["svhn"]


def test_digits_are_complete_and_the_registered_ones() -> None:
    report = check("digits")
    assert report.ok
    assert [(part.split, part.count, part.verified) for part in report.splits] == [
        ("train", 1437, True),
        ("test", 360, True),
    ]
    assert sum(report.splits[0].per_class) == 1437
    assert report.splits[0].mean == pytest.approx(report.info.mean, abs=1e-4)
    assert report.splits[0].std == pytest.approx(report.info.std, abs=1e-4)


def test_statistics_and_counts_are_exact(small_catalogue: Mapping[str, DatasetInfo], tmp_path: Path) -> None:
    images, labels, test_images, test_labels = files.cifar10_folder(tmp_path, form="binary")
    report = check("cifar10", tmp_path)
    for part, pixels, expected in zip(report.splits, (images, test_images), (labels, test_labels), strict=True):
        values = pixels / 255
        assert part.mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-12)
        assert part.std == pytest.approx(values.std((0, 2, 3)), abs=1e-12)
        assert part.per_class == tuple(np.bincount(expected, minlength=10))
        assert (part.images_sha256, part.labels_sha256) == array_sums(pixels, expected)
    assert (report.form, report.place) == ("binary version", str(tmp_path / "cifar-10-batches-bin"))


def test_other_images_than_the_official_ones_are_problems(
    small_catalogue: Mapping[str, DatasetInfo], tmp_path: Path
) -> None:
    files.cifar10_folder(tmp_path, form="python")
    report = check("cifar10", tmp_path)
    assert not report.ok
    text = "\n".join(report.problems)
    assert "train: pixels or labels are not those of the official CIFAR-10" in text
    assert "train: expected channel means 0.4914, 0.4822, 0.4465; got 0." in text
    assert "data_batch_1: MD5 differs from the published one" in text
    assert report.files["test_batch"] is False


def test_the_registered_sums_are_recognised(
    small_catalogue: Mapping[str, DatasetInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels, test_images, test_labels = files.cifar10_folder(tmp_path, form="npm")
    sums = {("cifar10", "train"): array_sums(images, labels), ("cifar10", "test"): array_sums(test_images, test_labels)}
    monkeypatch.setattr(check_module, "ARRAYS_SHA256", sums)
    report = check("cifar10", tmp_path)
    assert [part.verified for part in report.splits] == [True, True]
    files.json_labels(next(tmp_path.rglob("test_lables.json")), (test_labels + 1) % 10)
    assert [part.verified for part in check("cifar10", tmp_path).splits] == [True, False]


def folder(root: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                colour = (200 * label, number * 20, 100 if part == "val" else 0)
                files.picture(root / part / name / f"{number}.png", colour)
    return root


def test_damaged_pictures_are_all_named_and_the_rest_is_still_measured(tmp_path: Path) -> None:
    root = folder(tmp_path)
    assert check(root).ok
    for name in ("ant/1.png", "bee/0.png"):
        (root / "train" / name).write_bytes(b"no picture")
    report = check(root)
    assert [line.split(": ")[0] for line in report.problems] == ["train", "train"]
    assert "ant/1.png: expected a complete picture" in report.problems[0]
    assert "bee/0.png" in report.problems[1]
    assert all(np.isfinite(report.splits[0].mean))


def test_test_pictures_among_the_training_pictures_are_a_problem(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "val" / "ant" / "copy.png").write_bytes((root / "train" / "ant" / "3.png").read_bytes())
    (root / "train" / "ant" / "copy.png").write_bytes((root / "train" / "ant" / "2.png").read_bytes())
    report = check(root)
    assert report.problems == ("1 test image is also in the training set, pixel by pixel",)
    assert report.notes == ("1 training image is a copy of another one",)


def test_a_missing_data_set_raises_and_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="instar data get cifar10"):
        check("cifar10", tmp_path)


def test_a_file_sum_is_the_algorithms_own(tmp_path: Path) -> None:
    path = files.write(tmp_path / "abc", b"abc")
    assert file_sum(path) == "900150983cd24fb0d6963f7d28e17f72"
    assert file_sum(path, "sha256").startswith("ba7816bf8f01cfea")


def test_a_contact_sheet_shows_each_class_in_its_row(tmp_path: Path) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    labels = torch.tensor([2, 0, 1, 0, 2, 1])
    info = generic_info("mine", classes=("red", "green", "blue"), shape=(3, 4, 4), train_size=6)
    images = ResidentImages(colours[labels][:, :, None, None].expand(-1, -1, 4, 4).contiguous(), labels, info)
    path = contact_sheet(images, tmp_path / "new" / "sheet.png", columns=2, tile=20)
    with Image.open(path) as opened:
        sheet = np.asarray(opened.convert("RGB")).astype(int)
    assert sheet.shape[0] < 300
    rows = []
    for colour in colours.tolist():
        where = np.argwhere((sheet == colour).all(2))
        assert len(where) == 2 * 20 * 20  # both images of the class, enlarged to 20×20
        rows.append((where[:, 0].min(), where[:, 0].max()))
    assert rows[0][1] < rows[1][0]
    assert rows[1][1] < rows[2][0]


def test_of_many_classes_an_even_choice_is_shown(tmp_path: Path) -> None:
    info = generic_info("many", classes=tuple(map(str, range(100))), shape=(1, 4, 4), train_size=100)
    shades = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous() * 2
    images = ResidentImages(shades, torch.arange(100), info)
    with Image.open(contact_sheet(images, tmp_path / "sheet.png", most_classes=5)) as sheet:
        areas = np.bincount(np.asarray(sheet.convert("L")).ravel(), minlength=256)
    assert [label for label in range(100) if areas[2 * label] >= 64 * 64] == [0, 25, 50, 74, 99]
    heights = []
    for most in (1, 5, 10):
        with Image.open(contact_sheet(images, tmp_path / "sheet.png", most_classes=most)) as sheet:
            heights.append(sheet.height)
    assert np.diff(heights).tolist() == [4 * (64 + 4), 5 * (64 + 4)]


def test_a_sheet_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    images = ResidentImages(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), CATALOGUE["digits"])
    files.write(tmp_path / "file", b"")
    with pytest.raises(UserError, match=r"cannot write .*sheet\.png") as error:
        contact_sheet(images, tmp_path / "file" / "sheet.png")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="must be positive"):
        contact_sheet(images, tmp_path / "sheet.png", columns=0)
    assert not list(tmp_path.glob("*.png"))
