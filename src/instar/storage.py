"""Files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from instar.errors import UserError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file that appears whole or not at all: beside its place, flushed to the disk, then renamed.

    Args:
        path: Where the file shall be; its folder must exist.
        content: All of it.

    Raises:
        UserError: If the disk is full or read-only.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_atomically(file, b"whole")
        >>> file.read_text()
        'whole'
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        temporary = write_beside(path, content)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Is the disk full or read-only?") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_beside(path: Path, content: bytes) -> Path:
    """Writes all of `content` under another name in the folder of `path`, flushed to the disk; returns that name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def flush_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, where the system allows it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot; the rename itself has succeeded
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
