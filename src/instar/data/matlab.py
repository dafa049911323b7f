"""Numeric arrays in MATLAB 5 files, in which SVHN comes.

SciPy reads them too, but its compiled reader trusts the file: some files with a few exchanged bytes end the whole
process by a bus error instead of an exception. What SVHN needs of the format is this page.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_HEADER = 128
_COMPRESSED, _MATRIX = 15, 14
_KINDS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
"""Types in which numbers are stored, by their code."""
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
"""Types that arrays have, by their code; numbers may be stored in a smaller one."""
_COMPLEX = 0x0800


def parse(content: bytes, wanted: tuple[str, ...], *, largest: int) -> dict[str, npt.NDArray[np.generic]]:
    """The wanted variables of a MATLAB 5 file.

    Args:
        content: The file.
        wanted: Names of variables; others are passed over.
        largest: Bytes that a variable may have once unpacked.

    Returns:
        Arrays by name, in the shape that MATLAB shows.

    Raises:
        ValueError: It is no such file, cut off, or a wanted variable is no array of real numbers.

    Source:
        MathWorks, "MAT-File Format", level 5.
    """
    if len(content) < _HEADER or content[126:128] not in (b"IM", b"MI"):
        raise ValueError("it does not begin like a MATLAB 5 file")
    order = "<" if content[126:128] == b"IM" else ">"
    found = {}
    for kind, data in _elements(content[_HEADER:], order):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(data, largest)
            if unpacker.unconsumed_tail or not unpacker.eof:
                raise ValueError(f"a variable is cut off, or has more than {largest:,} bytes")
            kind, data = next(_elements(data, order), (0, b""))
        if kind == _MATRIX:
            name, array = _matrix(data, order, wanted)
            if array is not None:
                found[name] = array
    return found


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and data of one element after the other."""
    place = 0
    while place + 8 <= len(content):
        (first,) = struct.unpack_from(f"{order}I", content, place)
        if first >> 16:  # up to four bytes of data stand in the tag itself
            kind, size, start = first & 0xFFFF, first >> 16, place + 4
            end = place + 8
            if size > 4:
                raise ValueError("an element announces more than it has room for")
        else:
            kind, (size,), start = first, struct.unpack_from(f"{order}I", content, place + 4), place + 8
            # Elements begin at multiples of eight bytes, but for compressed ones.
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(content):
            raise ValueError("it is cut off")
        yield kind, content[start : start + size]
        place = end


def _matrix(data: bytes, order: str, wanted: tuple[str, ...]) -> tuple[str, npt.NDArray[np.generic] | None]:
    """Name and numbers of an array; None for numbers that nobody wants."""
    parts = _elements(data, order)
    (_, flags), (_, sizes), (_, label) = (next(parts, (0, b"")) for _ in range(3))
    name = label.decode("latin1")
    if name not in wanted:
        return name, None
    if len(flags) < 4 or not sizes or len(sizes) % 4:
        raise ValueError(f"the variable {name} has no type or no shape")
    (about,) = struct.unpack_from(f"{order}I", flags)
    shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
    stored, numbers = next(parts, (0, b""))
    if about & 0xFF not in _CLASSES or about & _COMPLEX or stored not in _KINDS:
        raise ValueError(f"the variable {name} is no array of real numbers")
    kind = np.dtype(order + _KINDS[stored])
    if min(shape) < 0 or math.prod(shape) * kind.itemsize != len(numbers):
        raise ValueError(f"the variable {name} has another number of values than its shape {shape} says")
    array = np.frombuffer(numbers, kind).reshape(shape, order="F")
    return name, array.astype(_CLASSES[about & 0xFF], copy=False)
