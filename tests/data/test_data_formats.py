"""Readers of the official formats: what is right is read exactly, what is wrong is one clear line, nothing is run."""

from __future__ import annotations

import os
import pickle
import pickletools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import official_files as files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instar.data import formats
from instar.errors import UserError

IMAGES, LABELS = files.random_images(20), files.cycling_labels(20)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_cifar_pickles_of_every_protocol_give_the_images_back(tmp_path: Path, protocol: int) -> None:
    batch = {"data": IMAGES.reshape(20, -1), "labels": LABELS.tolist()}
    path = files.write(tmp_path / "data_batch_1", pickle.dumps(batch, protocol=protocol))
    images, labels = formats.read_cifar_pickle(path, count=20, classes=10)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


def test_a_python_2_pickle_with_byte_keys_and_old_module_names_is_read(tmp_path: Path) -> None:
    path = files.cifar_pickle(tmp_path / "train", IMAGES, LABELS, key="fine_labels")
    assert b"numpy.core.multiarray" in path.read_bytes()
    images, labels = formats.read_cifar_pickle(path, count=20, classes=100, labels_key="fine_labels")
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


def test_a_fortran_ordered_pickled_array_is_read_in_its_order(tmp_path: Path) -> None:
    data = np.asfortranarray(IMAGES.reshape(20, -1))
    path = files.write(tmp_path / "b", pickle.dumps({"data": data, "labels": LABELS.tolist()}, protocol=2))
    np.testing.assert_array_equal(formats.read_cifar_pickle(path, count=20, classes=10)[0], IMAGES)


class _Reduces:
    """Pickles as a call of any function, as an attacker would write it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {marker}",)),
        (eval, ("open('{marker}', 'w')",)),
        (open, ("{marker}", "w")),
        (getattr, (dict, "fromkeys")),
        (np.fromfile, ("{marker}",)),
        (pickle.loads, (b"",)),
    ],
)
def test_a_hostile_pickle_is_refused_and_nothing_runs(
    tmp_path: Path, protocol: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    marker = tmp_path / "marker"
    filled = tuple(each.format(marker=marker) if isinstance(each, str) else each for each in arguments)
    path = files.write(
        tmp_path / "data_batch_1", pickle.dumps({"data": _Reduces(function, *filled)}, protocol=protocol)
    )
    with pytest.raises(UserError, match="which is no part of an array; nothing was run") as error:
        formats.read_pickle(path)
    one_line(error)
    assert not marker.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cnumpy\nndarray.__class__\n.",  # a dotted name that would walk from an allowed one
        b"cnumpy.core.multiarray\nscalar\n.",
        b"c_codecs\ndecode\n.",
        b"c_codecs\nencode\n(Vabc\nVpunycode\ntR.",  # an allowed function with a codec of the attacker's choice
        b"Pposix.system\n.",  # a persistent id
        b"\x82\x01.",  # an entry of the extension registry
        b"cnumpy.core.multiarray\n_reconstruct\n}(Vx\nI1\nu\x86b.",  # BUILD on what a name resolves to
        b"(Ncposix\nsystem\no.",
        b"(Vecho\niposix\nsystem\n.",
    ],
)
def test_every_other_road_to_a_name_is_closed(tmp_path: Path, opcodes: bytes) -> None:
    path = files.write(tmp_path / "data_batch_1", opcodes)
    with pytest.raises(UserError, match="expected a complete pickle of arrays") as error:
        formats.read_pickle(path)
    one_line(error)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    path = files.write(tmp_path / "b", pickle.dumps({"data": np.array([{}, []], dtype=object)}, protocol=2))
    with pytest.raises(UserError, match="arrays of bytes or integers are expected"):
        formats.read_pickle(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_pickle_is_one_clear_line_or_still_the_right_array(data: st.DataObject) -> None:
    whole = pickle.dumps({"data": IMAGES[:2].reshape(2, -1), "labels": [0, 1]}, protocol=2)
    # only the opcodes are worth damaging: a flipped pixel is a valid file
    borders = [place for _, _, place in pickletools.genops(whole) if place is not None]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.sampled_from(borders))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    with tempfile.TemporaryDirectory() as folder:
        path = files.write(Path(folder, "b"), bytes(damaged[:cut]) if data.draw(st.booleans()) else bytes(damaged))
        message = ""
        try:
            images, labels = formats.read_cifar_pickle(path, count=2, classes=10)
        except UserError as error:
            message = str(error)
    assert "\n" not in message
    assert message or (images.shape == (2, 3, 32, 32) and set(labels.tolist()) <= set(range(10)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"data": IMAGES[:19].reshape(19, -1)},
            r"'data' as uint8 of shape \(20, 3072\); got uint8 of shape \(19, 3072\)",
        ),
        ({"data": IMAGES.reshape(20, -1).astype(np.int64)}, "got int64 of shape"),
        ({"data": [1, 2]}, "got list"),
        ({"labels": LABELS[:19].tolist()}, "expected 20 labels under 'labels'; got 19"),
        ({"labels": ["cat"] * 20}, "expected 20 labels under 'labels'; got 0"),
        ({"labels": [10] * 20}, r"labels must be in 0\.\.9 for 10 classes; got 10 at position 0 \(20 such labels\)"),
        ({"labels": [-1] + [0] * 19}, "got -1 at position 0"),
    ],
)
def test_a_cifar_pickle_with_wrong_content_says_what_was_expected(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    batch = {"data": IMAGES.reshape(20, -1), "labels": LABELS.tolist()} | change
    path = files.write(tmp_path / "data_batch_1", pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match=expected) as error:
        formats.read_cifar_pickle(path, count=20, classes=10)
    assert str(path) in one_line(error)


def test_cifar_binaries_give_the_images_back_with_one_and_with_two_labels(tmp_path: Path) -> None:
    path = files.cifar_binary(tmp_path / "test_batch.bin", IMAGES, LABELS)
    images, labels = formats.read_cifar_binary(path, count=20, classes=10)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    fine = files.cycling_labels(20, 100) * 5
    path = files.cifar_binary(tmp_path / "test.bin", IMAGES, fine, coarse=LABELS)
    images, labels = formats.read_cifar_binary(path, count=20, classes=100, label_bytes=2)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, fine)


def test_a_cut_off_cifar_binary_states_both_sizes(tmp_path: Path) -> None:
    path = files.cifar_binary(tmp_path / "test_batch.bin", IMAGES, LABELS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"expected 61,460 bytes \(20 images of 3073\); got 61,459"):
        formats.read_cifar_binary(path, count=20, classes=10)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_give_the_images_back_plain_and_compressed(tmp_path: Path, end: str) -> None:
    images = files.random_images(7, shape=(1, 28, 28))
    first = files.idx(tmp_path / f"train-images-idx3-ubyte{end}", images[:, 0])
    second = files.idx(tmp_path / f"train-labels-idx1-ubyte{end}", np.arange(7, dtype=np.uint8))
    found, labels = formats.read_idx_pair(first, second, count=7)
    np.testing.assert_array_equal(found, images)
    assert labels.tolist() == list(range(7))
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda content: content[:-1], r"expected 5,504 bytes for 7×28×28 values; got 5,503"),
        (lambda content: content + b"\0", "expected 5,504 bytes"),
        (lambda content: content[:10], "expected an IDX header of 16 bytes; got a file of 10"),
        (lambda content: b"", "which begins 00 00 08; got an empty file"),
        (lambda content: b"<html>", "which begins 00 00 08; got 3c 68 74 6d"),
        (lambda content: b"\0\0\x0d" + content[3:], "got 00 00 0d 03"),
    ],
)
def test_a_damaged_idx_file_says_what_was_expected(
    tmp_path: Path, damage: Callable[[bytes], bytes], expected: str
) -> None:
    path = files.idx(tmp_path / "train-images-idx3-ubyte", files.random_images(7, shape=(1, 28, 28))[:, 0])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=expected) as error:
        formats.read_idx(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("cut", [-1, -9, 30, 12])
def test_a_cut_off_gzip_file_is_one_clear_line(tmp_path: Path, cut: int) -> None:
    path = files.idx(tmp_path / "t10k-images-idx3-ubyte.gz", files.random_images(7, shape=(1, 28, 28))[:, 0])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="expected a complete gzip file") as error:
        formats.read_idx(path)
    one_line(error)


def test_idx_images_and_labels_of_another_number_are_refused(tmp_path: Path) -> None:
    images = files.idx(tmp_path / "images", files.random_images(7, shape=(1, 28, 28))[:, 0])
    labels = files.idx(tmp_path / "labels", np.arange(6, dtype=np.uint8))
    with pytest.raises(UserError, match="labels: expected 7 labels"):
        formats.read_idx_pair(images, labels, count=7)
    with pytest.raises(UserError, match=r"images: expected 8 grayscale images; got an array of shape \(7, 28, 28\)"):
        formats.read_idx_pair(images, labels, count=8)


def test_svhn_files_give_the_images_back_and_label_10_is_the_digit_0(tmp_path: Path) -> None:
    path = files.mat(tmp_path / "train_32x32.mat", IMAGES, LABELS)
    images, labels = formats.read_mat(path, count=20)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert images.flags.c_contiguous


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("cut", [0, 60, 200, 5000])
def test_a_cut_off_svhn_file_is_one_clear_line(tmp_path: Path, cut: int) -> None:
    path = files.mat(tmp_path / "train_32x32.mat", IMAGES, LABELS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError) as error:
        formats.read_mat(path, count=20)
    assert str(path) in one_line(error)


def test_an_svhn_file_of_another_size_states_both(tmp_path: Path) -> None:
    path = files.mat(tmp_path / "train_32x32.mat", IMAGES, LABELS)
    with pytest.raises(UserError, match=r"\(32, 32, 3, 21\) and 21 labels; got uint8 \(32, 32, 3, 20\) and 20"):
        formats.read_mat(path, count=21)


def test_row_pictures_give_the_images_back(tmp_path: Path) -> None:
    path = files.row_png(tmp_path / "data_batch_1.png", IMAGES)
    np.testing.assert_array_equal(formats.read_row_png(path, count=20), IMAGES)


def test_damaged_row_pictures_are_one_clear_line(tmp_path: Path) -> None:
    path = files.row_png(tmp_path / "data_batch_1.png", IMAGES)
    with pytest.raises(UserError, match="expected an RGB picture of 1024×21 pixels; got RGB of 1024×20"):
        formats.read_row_png(path, count=21)
    whole = path.read_bytes()
    for cut in (0, 20, 100, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="expected a complete PNG") as error:
            formats.read_row_png(path, count=20)
        one_line(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2", "expected a JSON list of labels"),
        ("[1, 2]", "expected a JSON list of 3 integer labels; got a list of 2"),
        ("[1, 2, true]", "integer labels"),
        ("[1, 2, 3.0]", "integer labels"),
        ('{"a": 1}', "got dict"),
        ("[1, 2, 10]", r"labels must be in 0\.\.9"),
    ],
)
def test_wrong_json_labels_say_what_was_expected(tmp_path: Path, text: str, expected: str) -> None:
    path = files.write(tmp_path / "train_lables.json", text.encode())
    with pytest.raises(UserError, match=expected):
        formats.read_json_labels(path, count=3, classes=10)


@pytest.mark.parametrize(
    "read",
    [
        formats.read_idx,
        formats.read_pickle,
        lambda path: formats.read_cifar_binary(path, count=1, classes=10),
        lambda path: formats.read_mat(path, count=1),
        lambda path: formats.read_row_png(path, count=1),
        lambda path: formats.read_json_labels(path, count=1, classes=10),
        lambda path: formats.read_picture(path, height=8, width=8),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(UserError, match="absent: no such file"):
        read(tmp_path / "absent")


def test_a_picture_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 128, 0)  # the middle third is what a square crop keeps
    formats.Image.fromarray(wide).save(tmp_path / "wide.png")
    read = formats.read_picture(tmp_path / "wide.png", height=20, width=20)
    np.testing.assert_array_equal(read, np.broadcast_to(np.array([255, 128, 0], np.uint8)[:, None, None], (3, 20, 20)))
    assert formats.read_picture(tmp_path / "wide.png", height=10, width=7).shape == (3, 10, 7)


def test_a_picture_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    pixels = files.random_images(1, shape=(3, 9, 11))[0]
    formats.Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(tmp_path / "exact.png")
    np.testing.assert_array_equal(formats.read_picture(tmp_path / "exact.png", height=9, width=11), pixels)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = files.picture(tmp_path / "cat.jpeg", (255, 0, 0), size=(64, 64))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"cat\.jpeg: expected a complete picture"):
        formats.read_picture(path, height=8, width=8)
