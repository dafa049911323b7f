"""Functions of the user's own, named on the command line: the only way in which a name runs code."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from instar.errors import UserError, unknown


def own_function(name: str, *, what: str) -> Callable[..., Any]:
    """The function that a name of the form ``file.py:function`` or ``package.module:function`` stands for.

    The file or module is run, with the rights of whoever gave the name; a file anew each time, so that an edit counts.

    Args:
        name: The name.
        what: What the function is for, in errors: ``"recipe"`` or ``"model"``.

    Returns:
        The function.

    Raises:
        UserError: There is no such file, module or function, or running it fails.

    Example:
        >>> own_function("math:sqrt", what="model")(4.0)
        2.0
    """
    where, _, function = name.rpartition(":")
    module = _file(where, function, what) if where.endswith(".py") else _module(where, name, what)
    found = getattr(module, function, None)
    if not callable(found):
        functions = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
        raise unknown(f"function of {where}", function, functions)
    return found


def _file(where: str, function: str, what: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"there is no file {where} to take the {what} {function!r} from")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{where} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    entered = sys.modules.setdefault(path.stem, module) is module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may fail in any way; the cause stays chained
        if entered:
            del sys.modules[path.stem]
        raise UserError(f"{where} cannot be run for the {what} {function!r}: {_line(error)}") from error
    return module


def _module(where: str, name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except Exception as error:  # a user's module may fail in any way; the cause stays chained
        raise UserError(
            f"cannot import {where!r} for the {what} {name!r}: {_line(error)}. Is its folder on PYTHONPATH?"
        ) from error


def _line(error: Exception) -> str:
    """What went wrong and where, in a line."""
    said = " ".join(str(error).split()) or "no reason given"
    return said if isinstance(error, ImportError) else f"{type(error).__name__}: {said}"
