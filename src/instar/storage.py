"""Files that appear whole or not at all, whatever happens while they are written, and text read within bounds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from instar.errors import UserError

LARGEST_TEXT = 256 * 2**20
"""Bytes that a text file of ours may have; a log of a million epochs has fewer."""


class Readable(Protocol):
    """Whatever can be read in portions: a file, or one that is unpacked on the way."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most `size` of them; none at the end."""


def read_bounded(file: Readable, largest: int) -> bytes:
    """The rest of a file, or its first ``largest + 1`` bytes, by which a caller sees that it is too large.

    Read in portions: asked for so many bytes at once, Python would set aside memory for all of them beforehand.
    """
    parts, left = [], largest + 1
    while left and (part := file.read(min(left, 1 << 24))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_text(path: str | os.PathLike[str], *, what: str, largest: int = LARGEST_TEXT) -> str:
    """The text of a file in UTF-8.

    Args:
        path: The file.
        what: What to call it in an error, for example ``"evaluation record"``.
        largest: Bytes that it may have.

    Returns:
        Its text.

    Raises:
        UserError: It is missing, too large, no plain file, or no text.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = read_bounded(file, largest)
        if len(content) > largest:
            raise UserError(f"cannot read the {what} {path}: it has more than {largest:,} bytes")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"cannot read the {what} {path}: there is no such file") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the {what} {path}: it is no text in UTF-8 ({error.reason})") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: It is damaged, nested too deeply, or has numbers too long to be meant.

    Example:
        >>> parse_json('{"eps": "8/255"}')
        {'eps': '8/255'}
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike[str], *, what: str, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """A JSON object in a file.

    Args:
        path: The file.
        what: What to call it in an error.
        largest: Bytes that it may have.

    Returns:
        The object.

    Raises:
        UserError: It is missing, too large, damaged, or no object.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "card.json"
        >>> write_atomically(file, b"[1]")
        >>> read_json(file, what="card")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        instar.errors.UserError: cannot read the card ...card.json: expected a JSON object; got list
    """
    text = read_text(path, what=what, largest=largest)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"cannot read the {what} {path}: expected a JSON object; got {type(found).__name__}")
    return found


class WriteError(UserError):
    """A file could not be written: the disk is full, read-only, or gone. What was there before is still there."""


Content = bytes | Callable[[BinaryIO], object]
"""All of a file, or what writes it, for arrays that need not stand in memory twice."""


def write_atomically(
    path: str | os.PathLike[str], content: Content, *, previous: str | os.PathLike[str] | None = None
) -> None:
    """Writes a file that appears whole or not at all: beside its place, flushed to the disk, then renamed.

    Args:
        path: Where the file shall be; its folder must exist.
        content: All of it, or a function that writes it into the open file.
        previous: Name in the same folder under which the file that was there before is kept; None keeps it not.

    Raises:
        WriteError: The disk is full or read-only.

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
        if previous is not None and path.exists():
            _name_also(path, Path(previous))
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}. Is the disk full or read-only?") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _name_also(path: Path, other: Path) -> None:
    """Put a file under a second name, in the place of whatever had it; the first name stays where links are known."""
    link = _beside(other)
    try:
        os.link(path, link)
    except OSError:  # a file system without links: for a moment, the file has its second name alone
        os.replace(path, other)
        return
    os.replace(link, other)
    link.unlink(missing_ok=True)  # a rename between two names of one file leaves both


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def remove_unfinished(folder: Path, *, of: str | None = None) -> None:
    """Remove what writers that were killed left behind in a folder that nobody writes into now.

    Args:
        folder: The folder.
        of: Name of the file that was not finished; None is any.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / ".state.safetensors.4711ab.tmp").write_bytes(b"half of a st")
        >>> _ = (folder / "thesis.tmp").write_bytes(b"not ours")
        >>> remove_unfinished(folder)
        >>> [file.name for file in folder.iterdir()]
        ['thesis.tmp']
    """
    name = r".+" if of is None else re.escape(of)
    for file in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.{name}\.[0-9a-f]+\.tmp", file.name) and file.is_file():
            file.unlink(missing_ok=True)


def write_beside(path: Path, content: Content) -> Path:
    """Writes all of `content` under another name in the folder of `path`, flushed to the disk; returns that name.

    The name is drawn: threads share a process's number, and so may processes of two machines on one disk.
    """
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
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
