"""Files of weights as tensors by name, whoever wrote them: nothing in them can run code.

A file is refused before it is unpacked if it is a program, or claims to hold far more than it is large.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from instar.errors import UserError, one_line
from instar.models.states import some

# Where training codes put their weights, most telling name first; averaged weights before raw ones, as their authors
# evaluate those.
WRAPPINGS = (
    "state_dict",
    "model_state_dict",
    "rmodel",
    "model",
    "net",
    "ema_state_dict",
    "model_ema",
    "ema",
    "weights",
    "params",
    "network",
    "module",
)
DEEPEST = 6
"""Most wrappings, and most prefixes, that are taken off one after the other."""

LARGEST_EXPANSION = 4
"""How much larger than its file an archive may claim to be: tensors are stored as they are, not compressed."""

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx")


# Where Lightning keeps the class of its hyperparameters, a dictionary.
LIGHTNING = (
    "pytorch_lightning.utilities.parsing",
    "lightning_fabric.utilities.data",
    "lightning.pytorch.utilities.parsing",
    "lightning.fabric.utilities.data",
)


def read_bytes(path: Path, *, limit: int | None = None) -> bytes:
    """The whole file.

    Args:
        path: The file.
        limit: Most bytes that such a file may have.

    Raises:
        UserError: It is too large or cannot be read.
        FileNotFoundError: It does not exist.
    """
    try:
        if limit is not None and path.stat().st_size > limit:
            raise UserError(f"{path} is too large: {path.stat().st_size:,} bytes, where at most {limit:,} make sense")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def absent(path: Path) -> UserError:
    """The error for weights that do not exist, with the names of those beside."""
    folder = path.parent
    if not folder.is_dir():
        return UserError(f"no weights at {path}; there is no folder {folder}")
    found = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_FILES)
    return UserError(f"no weights at {path}; {folder} has {some(found) if found else 'no weights'}")


def kind(path: Path) -> str:
    """What sort of file this is, by its contents: a program cannot pass for weights under another name.

    Args:
        path: An existing file.

    Returns:
        ``"safetensors"``, ``"torchscript"``, ``"onnx"`` (by its suffix, since such files have no mark) or ``"pickle"``
        (anything else: what `torch.save` writes, or nonsense).

    Raises:
        UserError: It cannot be read.
        FileNotFoundError: It does not exist.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "net.pt"
        >>> torch.save({"weight": torch.zeros(2)}, file)
        >>> kind(file)
        'pickle'
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if start[8:] == b"{":  # the length of a JSON header, then the header
        return "safetensors"
    if path.suffix.lower() == ".onnx":
        return "onnx"
    parts = [Path(entry.filename).parts for entry in _entries_of_archive(path)]
    if any(part[1:2] == ("code",) or part[-1] == "constants.pkl" for part in parts if part):
        return "torchscript"
    return "pickle"


def _entries_of_archive(path: Path) -> list[zipfile.ZipInfo]:
    """The directory of a zip archive; empty for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return []


def read_state(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file of anybody's.

    Args:
        path: The file.
        entry: Name of the entry that holds it, when the usual choice is not wanted.

    Returns:
        Tensors by name, as the file has them.

    Raises:
        UserError: The file is missing, damaged, a program, or would run code; or no state dict is found in it.
    """
    try:
        found = kind(path)
        if found == "safetensors":
            return parsed(path, read_bytes(path))
    except FileNotFoundError:
        raise absent(path) from None
    if found == "torchscript":
        raise UserError(
            f"{path} is a TorchScript program, which could run code, so it was refused; export its state_dict(), or "
            "evaluate it with --trust if you know where it comes from"
        )
    if found == "onnx":
        raise UserError(f"{path} is an ONNX model, which holds no weights to load: evaluate it as it is")
    claimed = sum(entry.file_size for entry in _entries_of_archive(path))
    if claimed > LARGEST_EXPANSION * path.stat().st_size + 1_000_000:
        raise UserError(
            f"{path} claims to unpack to {claimed:,} bytes from {path.stat().st_size:,}: it is damaged, or made to "
            "fill the memory"
        )
    return _state_within(_unpickled(path, path), path, entry)


def parsed(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors in the contents of a safetensors file, or of one that holds nothing but a dictionary of tensors.

    Args:
        path: The file, for messages.
        content: All of it.

    Raises:
        UserError: It is damaged or would run code.
    """
    if content[8:9] != b"{" and content[:2] in (b"PK", b"\x80\x02"):
        return _state_within(_unpickled(io.BytesIO(content), path), path, None)
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or cut short ({one_line(error)}); copy or download it again") from None


def _unpickled(source: Path | io.BytesIO, path: Path) -> Any:
    # Found in many published files (accuracies, parsed options); none of them can run code.
    harmless: list[Any] = [
        Namespace,
        numpy.dtype,
        numpy.ndarray,
        type(numpy.dtype("float32")),
        type(numpy.dtype("float64")),
    ]
    harmless += [type(numpy.dtype("int64")), type(numpy.dtype("bool")), *_numpy_constructors()]
    harmless += [(OrderedDict, f"{module}.AttributeDict") for module in LIGHTNING]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) (?:was |is |')?([\w.]*\w)", str(error))
        if found:
            raise UserError(
                f"{path} holds a Python object ({found[1]}) and opening it could run code, so it was refused; "
                "if you trust it, save its state_dict() elsewhere and load that"
            ) from None
        raise UserError(f"{path} is no file of torch.save, or damaged; copy or download it again") from None
    except Exception as error:  # damaged archives fail in many ways, all of which mean the same here
        why = one_line(error)[:120]
        why = f" ({why})" if " " in why else "; copy or download it again"  # some say but the byte that they met
        raise UserError(f"{path} is no file of torch.save, or damaged{why}") from None


def _numpy_constructors() -> list[Any]:
    """What rebuilds numpy scalars and arrays, under the module names of numpy 1 and of numpy 2."""
    core = numpy._core.multiarray if hasattr(numpy, "_core") else numpy.core.multiarray  # type: ignore[attr-defined]
    return [
        (function, f"{module}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for function in (getattr(core, name),)
        for module in ("numpy.core", "numpy._core")
    ]


def _state_within(content: Any, path: Path, entry: str | None) -> dict[str, Tensor]:
    """The state dict inside the wrappings of training codes."""
    if entry is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(entry), Mapping):
            raise UserError(f"{path} has no entry {entry!r} with weights; it has {_listed(content)}")
        content = content[entry]
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            break
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((content[name] for name in WRAPPINGS if isinstance(content.get(name), Mapping)), None)
        if inner is not None:
            content = inner
        elif tensors:
            return tensors
        else:
            break
    raise UserError(
        f"{path} holds no state dict under a usual name; it has {_listed(content)}. Pass entry= if it is one of these"
    )


def _listed(content: Any) -> str:
    return some([str(key) for key in content]) if isinstance(content, Mapping) else f"a {type(content).__name__}"
