"""Files of plain arrays (``.npz``), read without the right to run code and within bounds.

``numpy.load`` believes what a header says: a file of a kilobyte may announce a terabyte, and a deflated one may become
it. Here the headers are read first, compared with the archive's own sizes, and summed up before anything is unpacked.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from instar.errors import UserError

Arrays = dict[str, np.ndarray]

LARGEST = 16 * 2**30
"""Bytes that the arrays of one file may have together: instance tables of a billion rows are stored otherwise."""
MOST = 10_000
"""Arrays that one file may hold."""


class Head(NamedTuple):
    """The header of an array in the format of NumPy.

    Attributes:
        shape: Shape of the array.
        kind: Its type.
        fortran: Whether it is stored column by column.
        length: Bytes of the header itself.
    """

    shape: tuple[int, ...]
    kind: np.dtype[np.generic]
    fortran: bool
    length: int

    @property
    def size(self) -> int:
        """Bytes of header and numbers together."""
        return self.length + math.prod(self.shape) * self.kind.itemsize


def read_head(file: IO[bytes]) -> Head:
    """The header at the position of a file, which is then at the first number.

    Args:
        file: An open ``.npy`` file or member of an ``.npz``.

    Returns:
        The header.

    Raises:
        ValueError: It is no header of an array, or of a version that plain numbers never need.

    Example:
        >>> buffer = io.BytesIO()
        >>> np.save(buffer, np.zeros((2, 3), np.uint8))
        >>> _ = buffer.seek(0)
        >>> read_head(buffer).shape
        (2, 3)
    """
    start = file.tell()
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # 3.0 is for names of fields, and plain numbers have none
        raise ValueError(f"version {version} of the array format is not expected here")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(file)
    return Head(shape, kind, fortran, file.tell() - start)


def pack(arrays: Mapping[str, npt.NDArray[np.generic]]) -> bytes:
    """A compressed ``.npz`` file as bytes, equal for equal arrays.

    Args:
        arrays: Plain arrays by name.

    Returns:
        The file.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_arrays(path: Path, *, what: str, largest: int = LARGEST) -> Arrays:
    """All arrays of an ``.npz`` file.

    Args:
        path: The file.
        what: What to call it in an error, for example ``"instance table"``.
        largest: Bytes that the arrays may have together.

    Returns:
        The arrays by name.

    Raises:
        UserError: The file is missing, damaged, too large, or holds Python objects, whose reading could run code.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.npz")
        >>> _ = path.write_bytes(pack({"kappa": np.array([3, 1])}))
        >>> read_arrays(path, what="table")["kappa"].tolist()
        [3, 1]
    """
    try:
        # Opened here, so that it is closed whatever the archive does.
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _members(archive, path, largest)
    except FileNotFoundError:
        raise UserError(f"cannot read the {what} {path}: there is no such file") from None
    except UserError as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged archive fails in every way there is; all of them mean the same to the user
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"cannot read the {what} {path}: it is damaged ({detail})") from None


def _members(archive: zipfile.ZipFile, path: Path, largest: int) -> Arrays:
    members = archive.infolist()
    if len(members) > MOST:
        raise UserError(f"it holds {len(members):,} arrays; at most {MOST:,} are expected")
    total = 0
    for member in members:
        with archive.open(member) as file:
            head = read_head(file)
        if head.kind.hasobject:
            raise UserError(f"{member.filename} holds Python objects, which can run code when read")
        if head.size != member.file_size:
            raise UserError(f"{member.filename} announces {head.size:,} bytes and has {member.file_size:,}")
        total += head.size
        if total > largest:
            raise UserError(f"its arrays have more than {largest:,} bytes; that is more than is expected")
    arrays = {}
    for member in members:
        with archive.open(member) as file:
            arrays[member.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays
