"""Extra images: nothing is read that is not drawn, every batch has its exact share, and any step can be repeated."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import official_files as files
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from instar.data import extra as extra_module
from instar.data.augment import Augmentation, Flip, PadCrop
from instar.data.extra import ExtraImages, extra_count, mixed_batches
from instar.data.indexed import FolderImages, Images, ResidentImages, generic_info
from instar.data.resident import epoch_order
from instar.data.splits import SelectionSplit, TrainSplit, hold_out
from instar.errors import UserError
from instar.evidence import Batch

CLASSES = 5
REAL = 103
ROWS = 400
INFO = generic_info("mine", classes=tuple("abcde"), shape=(3, 8, 8), train_size=REAL)
TINY = generic_info("tiny", classes=tuple("abcde"), shape=(1, 4, 4), train_size=REAL)
USUAL = Augmentation((PadCrop(2), Flip()))


def numbered(rows: npt.NDArray[Any], shape: tuple[int, ...] = (8, 8, 3)) -> npt.NDArray[np.uint8]:
    """Images whose first four values, in the order of the file, are the number of their row."""
    images = np.full((len(rows), int(np.prod(shape))), 17, np.uint8)
    images[:, :4] = rows.astype("<u4").view(np.uint8).reshape(-1, 4)
    return images.reshape(len(rows), *shape)


def row_of(images: Tensor, *, channels_last: bool = True) -> list[int]:
    """The numbers that `numbered` wrote, from images (B, C, H, W), uint8 or float in [0, 1]."""
    values = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
    in_file = values.permute(0, 2, 3, 1) if channels_last else values
    content = np.ascontiguousarray(in_file.reshape(len(values), -1)[:, :4].numpy())
    return [int(number) for number in content.view("<u4")[:, 0]]


def label_of(rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return (rows.astype(np.int64) * 7) % CLASSES


def real_images() -> ResidentImages:
    """Real images carry their position in the same way, with 200 in their last value."""
    images = numbered(np.arange(REAL))
    images[:, -1, -1, -1] = 200
    return ResidentImages(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.arange(REAL) % CLASSES, INFO)


def generated(count: int = ROWS, *, unlabelled: bool = False) -> ExtraImages:
    rows = np.arange(count)
    labels = np.where(rows % 4 == 0, -1, label_of(rows)) if unlabelled else label_of(rows)
    return ExtraImages(numbered(rows), labels, INFO)


def mixed(split: TrainSplit | None = None, extra: ExtraImages | None = None, **options: Any) -> list[Batch]:
    options = {"fraction": 0.7, "batch_size": 16, "epoch": 0, "seed": 0} | options
    return list(mixed_batches(split or TrainSplit(real_images()), extra or generated(), **options))


def equal(first: Batch, second: Batch) -> bool:
    for name in ("x", "y", "index", "source", "target", "labelled"):
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return True


def chunked_npz(
    path: Path,
    count: int,
    *,
    shape: tuple[int, ...],
    label: str = "<i8",
    compression: int = zipfile.ZIP_STORED,
    chunk: int = 250_000,
) -> Path:
    """A file of numbered images, written piece by piece, with labels that begin at an odd byte."""

    def array(name: str, kind: str, sizes: tuple[int, ...], part: Callable[[npt.NDArray[Any]], bytes]) -> None:
        with archive.open(name, "w", force_zip64=True) as file:
            header = {"descr": kind, "fortran_order": False, "shape": sizes}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, count, chunk):
                file.write(part(np.arange(start, min(count, start + chunk))))

    with zipfile.ZipFile(path, "w", compression) as archive:
        array("image.npy", "|u1", (count, *shape), lambda rows: numbered(rows, shape).tobytes())
        archive.writestr("x", b"")
        array("label.npy", label, (count,), lambda rows: label_of(rows).astype(label).tobytes())
    return path


def saved(path: Path, *, compressed: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def good(**change: Any) -> dict[str, Any]:
    return {"image": numbered(np.arange(9)), "label": label_of(np.arange(9))} | change


# The file


def test_of_three_million_images_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    count = 3_000_000
    path = chunked_npz(tmp_path / "many.npz", count, shape=(4, 4, 1))
    rows = torch.tensor([count - 1, 0, 1_234_567, 0, count - 1, 250_000])
    tracemalloc.start()
    extra = ExtraImages.open(path, info=TINY)
    opened = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    images, labels = extra.fetch(rows), extra.labels_of(rows)
    fetched = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(extra) == count
    assert isinstance(extra.images, np.memmap)
    assert isinstance(extra.labels, np.memmap)
    assert extra.labels.ctypes.data % 8 != 0  # the case that would copy all labels for one batch
    assert images.shape == (6, 1, 4, 4)
    assert images.dtype == torch.uint8
    assert row_of(images) == rows.tolist()
    assert labels.tolist() == label_of(rows.numpy()).tolist()
    # 72 MB lie in the file; checking labels takes a few masks of a million values
    assert opened < 12e6
    assert fetched < 1e5


def sparse_npz(path: Path, count: int, side: int) -> tuple[Path, int]:
    """An .npz of empty images beyond 4 GiB of which the disk holds next to nothing, written byte by byte."""
    heads = []
    for kind, shape in (("|u1", (count, side, side, 3)), ("|u1", (count,))):
        text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}, }}".ljust(117) + "\n"
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.encode()
        heads.append((head, int(np.prod(shape))))
    directory = b""
    with path.open("wb") as file:
        for name, (head, size) in zip((b"image.npy", b"label.npy"), heads, strict=True):
            begin, total, big = file.tell(), len(head) + size, 0xFFFFFFFF
            fixed = struct.pack("<HHHHHIII", 45, 0, 0, 0, 33, 0, big, big)
            sizes = struct.pack("<HHQQ", 1, 16, total, total)
            file.write(b"PK\3\4" + fixed + struct.pack("<HH", 9, 20) + name + sizes)
            first = file.tell() + len(head)
            file.write(head)
            file.seek(size, os.SEEK_CUR)
            more = struct.pack("<HHQQQ", 1, 24, total, total, begin)
            tail = struct.pack("<HHHHHII", 9, 28, 0, 0, 0, 0, big)
            directory += b"PK\1\2" + struct.pack("<H", 45) + fixed + tail + name + more
            if name == b"image.npy":
                images_at = first
        start = file.tell()
        file.write(directory)
        end = file.tell()
        file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2, 2, len(directory), start))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return path, images_at


def test_a_file_larger_than_memory_is_opened_at_once(tmp_path: Path) -> None:
    count, side = 8_000_000, 64
    path, images_at = sparse_npz(tmp_path / "huge.npz", count, side)
    with path.open("r+b") as file:
        file.seek(images_at + (count - 1) * side * side * 3)
        file.write(numbered(np.array([count - 1])).tobytes()[:4])
    assert path.stat().st_size > 90e9
    assert path.stat().st_blocks * 512 < 1e6
    info = generic_info("large", classes=tuple("abcde"), shape=(3, side, side), train_size=10)
    extra = ExtraImages.open(path, info=info)
    assert row_of(extra.fetch(torch.tensor([count - 1, 5]))) == [count - 1, 0]
    assert extra.labels_of(torch.tensor([count - 1])).tolist() == [0]


@pytest.mark.parametrize("names", [("image", "label"), ("data", "extrapolated_targets"), ("data", "labels")])
@pytest.mark.parametrize("label", [np.uint8, np.int16, np.int64, ">i4"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_name_type_and_order_of_channels_gives_the_same_images(
    tmp_path: Path, names: tuple[str, str], label: Any, channels_last: bool
) -> None:
    rows = np.arange(40)
    shape = (8, 8, 3) if channels_last else (3, 8, 8)
    arrays: dict[str, Any] = {names[0]: numbered(rows, shape), names[1]: label_of(rows).astype(label)}
    path = saved(tmp_path / "a.npz", **arrays)
    extra = ExtraImages.open(path, info=INFO)
    wanted = torch.tensor([39, 3, 3, 17])
    found = extra.fetch(wanted)
    assert found.shape == (4, 3, 8, 8)
    assert found.is_contiguous()
    assert row_of(found, channels_last=channels_last) == wanted.tolist()
    assert extra.labels_of(wanted).dtype == torch.int64
    assert extra.labels_of(wanted).tolist() == label_of(wanted.numpy()).tolist()


def test_pixels_keep_their_place_in_the_image() -> None:
    images = files.random_images(6, shape=(8, 8, 3))
    extra = ExtraImages(images, np.zeros(6, np.int64), INFO)
    order = torch.tensor([4, 0, 5, 4])
    assert torch.equal(extra.fetch(order), torch.from_numpy(images)[order].permute(0, 3, 1, 2))
    planes = ExtraImages(images.transpose(0, 3, 1, 2).copy(), np.zeros(6, np.int64), INFO)
    assert torch.equal(planes.fetch(order), extra.fetch(order))


# Unpacking


def test_a_compressed_file_is_unpacked_once_beside_it_and_mapped(tmp_path: Path) -> None:
    path = chunked_npz(tmp_path / "packed.npz", 5000, shape=(4, 4, 1), compression=zipfile.ZIP_DEFLATED, chunk=999)
    notes: list[str] = []
    first = ExtraImages.open(path, info=TINY, note=notes.append)
    cache = tmp_path / "instar-cache"
    assert isinstance(first.images, np.memmap)
    assert isinstance(first.labels, np.memmap)
    assert len(notes) == 2
    assert all(str(path) in note and "\n" not in note for note in notes)
    assert sorted(each.name for each in cache.glob("*.npy")) == ["packed.npz-image.npy", "packed.npz-label.npy"]
    assert np.load(cache / "packed.npz-image.npy").shape == (5000, 4, 4, 1)
    again = ExtraImages.open(path, info=TINY, note=notes.append)
    assert len(notes) == 2
    for extra in (first, again):
        rows = torch.tensor([4999, 0, 2500])
        assert row_of(extra.fetch(rows)) == rows.tolist()
        assert extra.labels_of(rows).tolist() == label_of(rows.numpy()).tolist()


def test_what_is_stored_is_mapped_where_it_lies_and_leaves_no_cache(tmp_path: Path) -> None:
    ExtraImages.open(saved(tmp_path / "a.npz", **good()), info=INFO, note=pytest.fail)
    assert [each.name for each in tmp_path.iterdir()] == ["a.npz"]


def rst(label: int) -> bytes:
    """Pickles of one and the same size, whatever the label; it is also the number of the first image."""
    return pickle.dumps({"data": numbered(np.arange(9) + label), "labels": np.full(9, label)})


def test_a_file_that_changed_is_unpacked_again_even_if_its_size_is_the_same(tmp_path: Path) -> None:
    path = files.write(tmp_path / "a.pickle", rst(2))
    assert ExtraImages.open(path, info=INFO).labels_of(torch.tensor([1])).item() == 2
    files.write(path, rst(4))
    os.utime(path, ns=(1, 1))  # older: what counts is that it differs
    assert ExtraImages.open(path, info=INFO).labels_of(torch.tensor([1])).item() == 4


def test_an_array_without_its_own_manifest_is_not_vouched_for_by_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, content: bytes) -> None:
        raise KeyboardInterrupt

    path = files.write(tmp_path / "a.pickle", rst(2))
    ExtraImages.open(path, info=INFO)
    before = path.stat().st_mtime_ns
    files.write(path, rst(4))
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(extra_module, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ExtraImages.open(path, info=INFO)
    monkeypatch.undo()
    files.write(path, rst(2))
    os.utime(path, ns=(before, before))
    assert row_of(ExtraImages.open(path, info=INFO).fetch(torch.tensor([0]))) == [2]


@pytest.mark.parametrize("harm", ["no manifest", "cut off", "manifest of nonsense"])
def test_an_incomplete_cache_counts_for_nothing(tmp_path: Path, harm: str) -> None:
    path = saved(tmp_path / "a.npz", compressed=True, **good())
    ExtraImages.open(path, info=INFO)
    array = tmp_path / "instar-cache" / "a.npz-image.npy"
    if harm == "no manifest":
        array.with_suffix(".json").unlink()
    elif harm == "cut off":
        array.write_bytes(array.read_bytes()[:-100])
    else:
        array.with_suffix(".json").write_text("[]")
    notes: list[str] = []
    extra = ExtraImages.open(path, info=INFO, note=notes.append)
    assert len(notes) == 1
    assert row_of(extra.fetch(torch.tensor([8]))) == [8]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_unpacking_leaves_nothing_that_could_be_taken_for_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    path = saved(tmp_path / "a.npz", compressed=True, **good())

    def half(packed: IO[bytes], file: IO[bytes], length: int) -> None:
        file.write(packed.read()[:300])
        raise interruption

    monkeypatch.setattr(shutil, "copyfileobj", half)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        ExtraImages.open(path, info=INFO)
    if isinstance(interruption, OSError):
        assert "No space left on device" in str(caught.value)
    assert list((tmp_path / "instar-cache").iterdir()) == []
    monkeypatch.undo()
    assert row_of(ExtraImages.open(path, info=INFO).fetch(torch.tensor([8]))) == [8]


def test_where_nothing_can_be_written_beside_the_file_the_users_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTAR_DATA", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    path = saved(tmp_path / "data" / "a.npz", compressed=True, **good())
    (tmp_path / "data" / "instar-cache").write_text("a file where a folder should be")
    ExtraImages.open(path, info=INFO)
    assert (tmp_path / "home" / "instar-cache" / "a.npz-image.npy").is_file()
    ExtraImages.open(path, info=INFO, note=pytest.fail)
    notes: list[str] = []
    ExtraImages.open(path, info=INFO, cache=tmp_path / "named", note=notes.append)
    assert all(str(tmp_path / "named") in note for note in notes)
    assert (tmp_path / "named" / "a.npz-label.npy").is_file()


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    path = saved(tmp_path / "a.npz", compressed=True, **good())
    with pytest.raises(UserError, match=r"no folder takes its 0\.0 MB .*free.*Name another folder as cache"):
        ExtraImages.open(path, info=INFO, cache=tmp_path / "cache", note=pytest.fail)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_pickle_of_rst_is_read_once_and_then_mapped(tmp_path: Path) -> None:
    rows = np.arange(60)
    labels = np.where(rows % 3 == 0, -1, label_of(rows))
    content = {"data": numbered(rows), "extrapolated_targets": labels, "prediction_model_epoch": 200}
    path = files.write(tmp_path / "ti.pickle", pickle.dumps(content, protocol=4))
    notes: list[str] = []
    for _ in range(2):
        extra = ExtraImages.open(path, info=INFO, note=notes.append)
        assert isinstance(extra.images, np.memmap)
        assert row_of(extra.fetch(torch.tensor([59, 2]))) == [59, 2]
        assert extra.labels_of(torch.tensor([3, 4])).tolist() == [-1, int(label_of(np.array(4)))]
    assert len(notes) == 2


# Files that are refused


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never run",)


NINE = np.arange(9)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (good(image=np.array([Hostile()] * 9, dtype=object)), "images must be plain numbers; got Python objects"),
        (good(label=np.array([Hostile()] * 9, dtype=object)), "labels must be plain numbers; got Python objects"),
        (good(image=np.zeros((9, 8, 8, 3), np.float32)), r"images must be uint8 in 0\.\.255 .*got float32"),
        (good(image=np.zeros((9, 8, 8, 1), np.uint8)), r"\(N, 8, 8, 3\) or \(N, 3, 8, 8\).*got uint8 \(9, 8, 8, 1\)"),
        (good(image=np.zeros((9, 16, 16, 3), np.uint8)), r"like those of mine; got uint8 \(9, 16, 16, 3\)"),
        (good(image=np.zeros((9, 192), np.uint8)), r"got uint8 \(9, 192\)"),
        (good(image=np.zeros((0, 8, 8, 3), np.uint8), label=NINE[:0]), "there are no images in it"),
        (good(label=label_of(np.arange(8))), r"labels must be 9 integers \(N,\), one for each image; got int64 \(8,\)"),
        (good(label=np.zeros((9, 1), np.int64)), r"got int64 \(9, 1\)"),
        (good(label=np.zeros(9, np.float32)), r"got float32 \(9,\)"),
        (good(label=np.zeros(9, bool)), r"got bool \(9,\)"),
        (good(label=NINE % 6), r"labels must be in 0\.\.4 for the 5 classes of mine, or −1 for none; got 5 at row 5"),
        (good(label=np.where(NINE == 7, -2, 0)), "got -2 at row 7"),
        (good(label=np.where(NINE == 7, 2**63, 0).astype(np.uint64)), "got 9223372036854775808 at row 7"),
        (good(image=np.zeros((3, 8, 8, 9), np.uint8).T), "must be in C order, one image after the other"),
        ({"images": NINE, "label": NINE}, "expected images under the name image or data; got images, label"),
        ({"image": NINE}, "expected labels under the name label or extrapolated_targets or labels; got image"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_that_do_not_fit_are_refused_in_one_line_before_anything_is_unpacked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arrays: Mapping[str, Any],
    expected: str,
    compressed: bool,
) -> None:
    path = saved(tmp_path / "a.npz", compressed=compressed, **arrays)
    with pytest.raises(UserError, match=expected) as caught:
        ExtraImages.open(path, info=INFO)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert capsys.readouterr().out == ""
    if "at row" not in expected:  # values of labels are known only when they are unpacked
        assert not (tmp_path / "instar-cache").exists()


def rewritten(path: Path, name: str, content: bytes, **change: Any) -> Path:
    """An .npz whose member `name` is replaced."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", **change) as archive:
        for member, old in (members | {name: content}).items():
            archive.writestr(member, content if member == name else old)
    return path


def npy(array: npt.NDArray[Any], *, shape: str | None = None) -> bytes:
    begin = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape or array.shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + begin.encode() + array.tobytes()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (npy(numbered(NINE))[:-5], r"image\.npy should have 1,856 bytes for uint8 \(9, 8, 8, 3\); got 1,851"),
        (npy(numbered(NINE)) + b"more", "should have 1,856 bytes .*got 1,860"),
        (npy(numbered(NINE), shape="(9000000000000, 8, 8, 3)"), "should have 1,728,000,000,000,128 bytes"),
        (npy(numbered(NINE), shape="(-9, 8, 8, 3)"), r"should have -1,600 bytes"),
        (npy(numbered(NINE), shape="__import__('os')"), "expected a complete .npz file"),
        (b"no array at all", "expected a complete .npz file"),
        (b"", "expected a complete .npz file"),
    ],
)
def test_arrays_that_contradict_their_own_header_are_refused(
    tmp_path: Path, content: bytes, expected: str, compression: int
) -> None:
    path = rewritten(saved(tmp_path / "a.npz", **good()), "image.npy", content, compression=compression)
    with pytest.raises(UserError, match=expected) as caught:
        ExtraImages.open(path, info=INFO)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "instar-cache").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_off_anywhere_is_refused_and_never_crashes(tmp_path: Path, compressed: bool) -> None:
    rows = np.arange(300)
    arrays = {"image": files.random_images(300, shape=(8, 8, 3)), "label": label_of(rows)}
    whole = saved(tmp_path / "whole.npz", compressed=compressed, **arrays).read_bytes()
    path = tmp_path / "cut.npz"
    for length in [*range(0, 200, 7), *range(200, len(whole), 4001), *range(len(whole) - 150, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            ExtraImages.open(path, info=INFO)
        assert str(caught.value).startswith(f"{path}: expected "), length
        assert "\n" not in str(caught.value)


def test_a_directory_that_promises_more_than_the_file_holds_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", **good(label=np.zeros(100, np.int64)))
    content = bytearray(path.read_bytes().replace(b"(9, 8, 8, 3), }  ", b"(100, 8, 8, 3), }"))
    entry = content.index(b"PK\1\2")
    size = 128 + 100 * 8 * 8 * 3
    assert struct.unpack("<II", content[entry + 20 : entry + 28]) == (128 + 9 * 8 * 8 * 3,) * 2
    content[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"image\.npy should have 19,328 bytes from byte \d+ on; the file is cut off"):
        ExtraImages.open(path, info=INFO)


def test_damage_inside_a_compressed_array_is_found_and_nothing_is_kept(tmp_path: Path) -> None:
    arrays = {"image": files.random_images(3000, shape=(8, 8, 3)), "label": label_of(np.arange(3000))}
    path = saved(tmp_path / "a.npz", compressed=True, **arrays)
    content = bytearray(path.read_bytes())
    content[200_000] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"cannot be unpacked .*Is the file damaged or the disk full\?"):
        ExtraImages.open(path, info=INFO)
    assert list((tmp_path / "instar-cache").iterdir()) == []


def test_an_encrypted_array_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", **good())
    content = bytearray(path.read_bytes())
    for begin, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(begin) + flags] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="encrypted"):
        ExtraImages.open(path, info=INFO)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "begins with nothing"),
        (b"\x93NUMPY", r"expected an \.npz .*begins 93 4e 55 4d"),
        (b"PK and no more", "expected a complete .npz file"),
        (pickle.dumps(Hostile()), "it names builtins.print, which is no part of an array; nothing was run"),
        (pickle.dumps([1]), "expected a pickled dict; got list"),
        (pickle.dumps({"data": [1], "labels": [0]}), "images must be an array; got list"),
        (pickle.dumps({"data": numbered(NINE), "labels": "none"}), "labels must be an array or a list of integers"),
        (pickle.dumps({"data": numbered(NINE), "labels": [2**70] * 9}), "labels must be an array or a list"),
        (pickle.dumps({"data": numbered(NINE), "labels": [0] * 8}), r"labels must be 9 integers .*got int64 \(8,\)"),
        (pickle.dumps({"data": numbered(NINE), "targets": [0] * 9}), "expected labels .*got data, targets"),
        (pickle.dumps({"data": numbered(NINE), "labels": [0] * 9})[:-40], "expected a complete pickle"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, expected: str
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        ExtraImages.open(path, info=INFO)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


# The batches


@pytest.mark.parametrize(
    ("batch_size", "fraction", "expected"),
    [
        (128, 0.7, 90),  # 89.6
        (256, 0.5, 128),
        (1024, 0.7, 717),  # 716.8
        (10, 0.25, 2),  # 2.5: halves to the even number
        (10, 0.35, 4),  # 3.5
        (16, 0.01, 1),
        (16, 0.99, 15),
        (2, 0.5, 1),
    ],
)
def test_every_batch_has_exactly_the_share_that_the_rule_says(batch_size: int, fraction: float, expected: int) -> None:
    assert extra_count(batch_size, fraction) == expected
    split = TrainSplit(ResidentImages(torch.zeros(2100, 3, 8, 8, dtype=torch.uint8), torch.zeros(2100).long(), INFO))
    batches = mixed(split, batch_size=batch_size, fraction=fraction, limit=5)
    assert len(batches) == min(5, 2100 // batch_size)
    for batch in batches:
        assert batch.source is not None
        assert batch.source.tolist() == [0] * (batch_size - expected) + [1] * expected


def test_images_labels_and_index_belong_together_after_shuffling() -> None:
    seen_extra = set()
    for epoch in range(3):
        for batch in mixed(epoch=epoch):
            assert batch.index is not None
            assert batch.source is not None
            assert batch.x.dtype == torch.float32
            assert float(batch.x.max()) <= 1
            assert batch.y.dtype == batch.index.dtype == batch.source.dtype == torch.int64
            assert batch.target is None
            assert batch.labelled is None
            real = batch.source == 0
            marks = (batch.x[:, -1, -1, -1] * 255).round()
            assert torch.equal(marks == 200, real)
            assert row_of(batch.x[real]) == batch.index[real].tolist()
            assert row_of(batch.x[~real]) == (batch.index[~real] - REAL).tolist()
            assert torch.equal(batch.y[real], batch.index[real] % CLASSES)
            assert batch.y[~real].tolist() == label_of(batch.index[~real].numpy() - REAL).tolist()
            seen_extra |= set(batch.index[~real].tolist())
    assert len(seen_extra) > 100
    assert max(seen_extra) < REAL + ROWS


def test_the_real_part_follows_the_order_of_the_epoch_without_repeats() -> None:
    split, selection = hold_out(real_images(), selection=20, seed=1)
    firsts = []
    for epoch in range(30):
        batches = mixed(split, epoch=epoch, fraction=0.3)
        real = torch.cat([batch.index[batch.source == 0] for batch in batches])  # type: ignore[index]
        assert len(batches) == len(split) // 16
        assert torch.equal(real, epoch_order(split, epoch=epoch, seed=0, shuffle=True)[: len(real)])
        assert len(torch.unique(real)) == len(real) == 5 * 11
        assert not torch.isin(real, selection.indices).any()
        firsts.append(real)
    # a share of 70 % a pass: over the epochs every real image comes, and no held-out one
    assert sorted(torch.unique(torch.cat(firsts)).tolist()) == split.indices.tolist()
    still = mixed(split, shuffle=False, fraction=0.3)
    assert torch.cat([batch.index[:11] for batch in still]).tolist() == split.indices[:55].tolist()  # type: ignore[index]


def test_extra_rows_are_drawn_evenly_with_replacement_and_anew_at_every_step_epoch_and_seed() -> None:
    extra = generated(20)
    drawn: list[list[int]] = []
    for epoch, seed in ((0, 0), (1, 0), (0, 1)):
        for batch in mixed(extra=extra, epoch=epoch, seed=seed):
            assert batch.index is not None
            drawn.append((batch.index[batch.source == 1] - REAL).tolist())
    assert len({tuple(rows) for rows in drawn}) == len(drawn)
    assert any(len(set(rows)) < len(rows) for rows in drawn)
    many = [batch.index[5:] - REAL for e in range(120) for batch in mixed(extra=extra, epoch=e)]  # type: ignore[index]
    counts = torch.bincount(torch.cat(many), minlength=20).double()
    expected = counts.sum() / 20
    # chi-square with 19 degrees of freedom: 43.8 is exceeded by chance once in a thousand
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [16] * 6), (False, [16] * 6 + [7])])
def test_an_epoch_counts_real_and_extra_images_together(drop_last: bool, sizes: list[int]) -> None:
    batches = mixed(drop_last=drop_last)
    assert [len(batch) for batch in batches] == sizes
    shares = [int(batch.source.sum()) for batch in batches]  # type: ignore[union-attr]
    assert shares == [extra_count(size, 0.7) for size in sizes]
    real = torch.cat([batch.index[batch.source == 0] for batch in batches])  # type: ignore[index]
    assert len(torch.unique(real)) == len(real)


def test_a_last_batch_of_one_is_a_real_image() -> None:
    assert [batch.source.tolist() for batch in mixed(batch_size=51, fraction=0.5, drop_last=False)][-1] == [0]  # type: ignore[union-attr]


@pytest.mark.parametrize("first_step", [0, 1, 4, 6, 7])
def test_starting_at_a_later_step_gives_exactly_the_remaining_batches(first_step: int) -> None:
    options: dict[str, Any] = {"epoch": 2, "seed": 7, "augment": USUAL, "smoothing": 0.1, "drop_last": False}
    extra = generated(unlabelled=True)
    whole = mixed(extra=extra, **options)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    rest = mixed(extra=extra, **options, first_step=first_step)
    assert torch.equal(before, torch.get_rng_state())
    assert len(whole) == 7
    assert len(rest) == 7 - first_step
    assert all(equal(one, other) for one, other in zip(whole[first_step:], rest, strict=True))
    assert len(mixed(**options, first_step=1, limit=3)) == 2


def test_real_and_extra_images_are_augmented_anew_at_every_step() -> None:
    def still(count: int, kind: str) -> ExtraImages | TrainSplit:
        one = files.random_images(1, shape=(3, 8, 8), seed=3)
        many = np.repeat(one, count, 0)
        if kind == "extra":
            return ExtraImages(many, np.zeros(count, np.int64), INFO)
        return TrainSplit(ResidentImages(torch.from_numpy(many), torch.zeros(count).long(), INFO))

    split, extra = still(64, "real"), still(64, "extra")
    assert isinstance(split, TrainSplit)
    assert isinstance(extra, ExtraImages)
    one, two = mixed(split, extra, fraction=0.5, batch_size=32, augment=USUAL)
    for part in (slice(0, 16), slice(16, 32)):
        assert not torch.equal(one.x[part], two.x[part])
        assert len(torch.unique(one.x[part].flatten(1), dim=0)) > 4


class Lazy:
    """Real images that are decoded when they are asked for."""

    def __init__(self, held: ResidentImages, *, as_floats: bool = False) -> None:
        self.held, self.labels, self.info, self.classes, self.shape = held, held.labels, INFO, INFO.classes, held.shape
        self.as_floats = as_floats
        self.calls = 0

    def __len__(self) -> int:
        return len(self.held)

    def fetch(self, positions: Tensor) -> Tensor:
        self.calls += 1
        found = self.held.fetch(positions)
        return found.float() / 255 if self.as_floats else found


def test_real_images_from_memory_files_or_floats_give_the_same_batches(tmp_path: Path) -> None:
    pixels = real_images().images
    paths = []
    for number in range(REAL):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels[number].permute(1, 2, 0).numpy()).save(paths[-1])
    labels = real_images().labels
    kinds: list[Images] = [
        real_images(),
        ResidentImages(pixels.float() / 255, labels, INFO),
        Lazy(real_images()),
        Lazy(real_images(), as_floats=True),
        FolderImages(tuple(paths), labels, INFO, workers=1),
    ]
    runs = [mixed(TrainSplit(images), augment=USUAL, smoothing=0.1) for images in kinds]
    for run in runs[1:]:
        assert all(equal(one, other) for one, other in zip(runs[0], run, strict=True))


def test_one_batch_is_read_ahead_and_a_consumer_that_stops_early_leaves_no_thread() -> None:
    def prefetching() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("instar-prefetch")]

    lazy = Lazy(real_images())
    iterator = mixed_batches(TrainSplit(lazy), generated(), fraction=0.5, batch_size=8, epoch=0, seed=0)
    assert len(list(islice(iterator, 3))) == 3
    waiting = threading.Event()
    for _ in range(200):
        if lazy.calls == 4:
            break
        waiting.wait(0.01)
    waiting.wait(0.05)
    assert lazy.calls == 4
    assert prefetching()
    iterator.close()  # type: ignore[attr-defined]
    for thread in prefetching():
        thread.join(5)
    assert not prefetching()


def test_real_values_outside_the_unit_interval_are_refused() -> None:
    lazy = Lazy(real_images())
    lazy.fetch = lambda positions: real_images().fetch(positions).float()  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"mine: images must lie in \[0, 1\]"):
        mixed(TrainSplit(lazy))


def test_smoothing_touches_the_extra_part_alone() -> None:
    s = 0.1
    for batch in mixed(smoothing=s):
        assert batch.target is not None
        assert batch.source is not None
        assert batch.target.dtype == torch.float32
        for target, label, source in zip(batch.target.tolist(), batch.y.tolist(), batch.source.tolist(), strict=True):
            expected = [float(k == label) for k in range(CLASSES)]
            if source:
                expected = [(1 - s) * value + s / CLASSES for value in expected]
                assert target == pytest.approx(expected, abs=1e-7)
            else:
                assert target == expected
        # what smoothing of the library's own cross-entropy makes of the extra part
        logits = torch.randn(len(batch), CLASSES, generator=torch.Generator().manual_seed(0))
        extra = batch.source == 1
        own = functional.cross_entropy(logits[extra], batch.y[extra], label_smoothing=s)
        torch.testing.assert_close(functional.cross_entropy(logits[extra], batch.target[extra]), own)


def test_images_without_a_label_are_marked_and_add_nothing_to_a_cross_entropy() -> None:
    extra = generated(unlabelled=True)
    for smoothing in (0.0, 0.1):
        for batch in mixed(extra=extra, smoothing=smoothing):
            assert batch.labelled is not None
            assert batch.index is not None
            assert batch.labelled.dtype == torch.bool
            missing = (batch.source == 1) & ((batch.index - REAL) % 4 == 0)
            assert missing.any()
            assert torch.equal(batch.labelled, ~missing)
            assert torch.equal(batch.y == -1, missing)
            if smoothing:
                assert batch.target is not None
                assert not batch.target[missing].any()
                torch.testing.assert_close(batch.target[~missing].sum(1), torch.ones(int((~missing).sum())))
                logits = torch.randn(len(batch), CLASSES)
                assert not functional.cross_entropy(logits, batch.target, reduction="none")[missing].any()


def test_a_batch_never_shares_memory_with_the_images() -> None:
    images = numbered(np.arange(ROWS))
    extra = ExtraImages(images, label_of(np.arange(ROWS)), INFO)
    first = mixed(extra=extra)
    for batch in first:
        batch.x.zero_()
    assert np.array_equal(images, numbered(np.arange(ROWS)))
    assert all(float(batch.x.sum()) > 0 for batch in mixed(extra=extra))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fraction": 0.0}, "fraction of extra images must be between 0 and 1, both excluded; got 0"),
        ({"fraction": 1.0}, "got 1"),
        ({"fraction": -0.1}, r"got -0\.1"),
        ({"fraction": 70}, r"got 70\. Did you mean 0\.7\?"),
        ({"fraction": float("nan")}, "got nan"),
        ({"batch_size": 1}, "batch_size must be at least 2, a real and an extra image; got 1"),
        ({"smoothing": 1.0}, r"smoothing of extra images must be in \[0, 1\); got 1"),
        ({"smoothing": -0.1}, r"got -0\.1"),
        ({"first_step": 7}, r"first_step must be in 0\.\.6 for an epoch of 6 steps; got 7"),
        ({"first_step": -1}, "got -1"),
        ({"limit": -1}, "limit must be 0 or more steps; got -1"),
        ({"split": SelectionSplit(real_images())}, "extra images are mixed into a TrainSplit; got SelectionSplit"),
        (
            {"extra": ExtraImages(np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, np.int64), TINY)},
            r"must have the shape \(3, 8, 8\) and the 5 classes of mine; got \(1, 4, 4\) and 5",
        ),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(change: dict[str, Any], expected: str) -> None:
    options: dict[str, Any] = {
        "split": TrainSplit(real_images()),
        "extra": generated(),
        "fraction": 0.7,
        "batch_size": 16,
        "epoch": 0,
        "seed": 0,
    }
    with pytest.raises(UserError, match=expected):
        mixed_batches(**options | change)
