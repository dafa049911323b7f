"""Files from elsewhere: nothing that a header announces is believed before it is checked."""

from __future__ import annotations

import gzip
import io
import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from instar.arrays import LARGEST, pack, read_arrays
from instar.data import formats
from instar.errors import UserError
from instar.storage import parse_json, read_json, read_text


def _header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _npz(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def little_memory():
    """At most 2 GiB more than the process has now: an allocation that a header asked for fails at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_arrays_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = {"a": np.arange(6).reshape(2, 3), "text": np.array(["best", ""]), "none": np.zeros((0, 2), np.float32)}
    path = tmp_path / "a.npz"
    path.write_bytes(pack(written))
    found = read_arrays(path, what="table")
    assert set(found) == set(written)
    for name, array in written.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_an_array_that_announces_more_than_it_has_is_refused_before_memory_is_asked_for(
    tmp_path: Path, little_memory: None
) -> None:
    path = _npz(tmp_path / "bomb.npz", {"a.npy": _header((10**13,)) + b"123"})
    with pytest.raises(UserError, match=r"cannot read the table .*bomb.npz: a.npy announces 10,000,000,000,128 bytes"):
        read_arrays(path, what="table")


def test_an_archive_that_unpacks_to_more_than_is_expected_is_refused(tmp_path: Path) -> None:
    zeros = _header((1 << 20,)) + bytes(1 << 20)
    path = _npz(tmp_path / "bomb.npz", {f"{name}.npy": zeros for name in "abcd"})
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="more than 3,000,000 bytes"):
        read_arrays(path, what="table", largest=3_000_000)
    assert len(read_arrays(path, what="table", largest=LARGEST)) == 4


def test_python_objects_in_an_archive_are_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path(tmp_path / "trapped").write_text, ("x",))

    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([Trap()], dtype=object))
    path = tmp_path / "trap.npz"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="Python objects"):
        read_arrays(path, what="table")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("keep", [0, 1, 30, 60, -1])
def test_a_file_that_is_cut_off_gets_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(pack({"a": np.arange(100)})[:keep])
    with pytest.raises(UserError, match=r"^cannot read the table [^\n]*damaged[^\n]*$"):
        read_arrays(path, what="table")


def test_a_folder_or_nothing_in_place_of_a_file_gets_one_line(tmp_path: Path) -> None:
    for read in (read_arrays, read_text, read_json):
        with pytest.raises(UserError, match="there is no such file"):
            read(tmp_path / "none", what="table")
        with pytest.raises(UserError, match="directory"):
            read(tmp_path, what="table")


def test_json_nested_a_hundred_thousand_times_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_text_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}' + " " * 100)
    assert read_json(path, what="card") == {"a": 1}
    with pytest.raises(UserError, match="more than 50 bytes"):
        read_json(path, what="card", largest=50)


def test_an_endless_device_is_read_no_further_than_its_bound() -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("there is no endless device on this system")
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        read_text("/dev/zero", what="card", largest=1000)


def test_a_gzip_bomb_is_refused_at_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST", 100_000)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + bytes(10_000_000)))
    with pytest.raises(UserError, match="expected at most 100,000 bytes"):
        formats.read_idx(path)


def test_a_pickled_array_cannot_ask_for_memory_by_a_number(tmp_path: Path, little_memory: None) -> None:
    class Array:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            from numpy._core.numeric import _frombuffer

            return (_frombuffer, (10**13, np.dtype("u1"), (10**13,), "C"))

    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": Array()}, protocol=2))
    with pytest.raises(UserError, match="numbers of an array are expected as bytes"):
        formats.read_pickle(path)
