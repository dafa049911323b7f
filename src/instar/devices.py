"""Devices: which one is used, made ready for long work, and in words."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re

import torch

from instar.errors import UserError, first_line


def choose_device(name: str | torch.device) -> torch.device:
    """The device a name stands for; on a CPU, `keep_freed_memory` as well.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for a GPU if there is one.

    Raises:
        UserError: PyTorch knows no such device, or cannot use it here.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(name)!r} cannot be used here: {why_unusable(error)}") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def numbered_device(name: str | torch.device, *, share: int | None = None) -> torch.device:
    """The device a name stands for, with its number, so that ``"cuda"`` and ``"cuda:0"`` give equal devices.

    Args:
        name: As in `choose_device`.
        share: This process's number among those of the machine that share its GPUs; each takes one of its own where
            `name` does not say which.

    Raises:
        UserError: As `choose_device`.
    """
    if str(name) in ("auto", "cuda") and share is not None and torch.cuda.device_count():
        name = f"cuda:{share % torch.cuda.device_count()}"  # before anything touches the first GPU
    return torch.empty(0, device=choose_device(name)).device


KEPT = 2**30
"""Bytes of freed memory that a process keeps at most."""
LARGEST = 32 * 2**20
"""Bytes of the largest block that is kept; glibc takes no larger number."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep up to `KEPT` bytes of freed memory for the next tensors, as GPUs' allocators do.

    glibc gives blocks of some MiB back to the system as soon as they are free, and a step's activations come back one
    page fault after the other: a tenth of the time of an attack's pass. A user who set glibc's own variables
    (``MALLOC_...``, ``GLIBC_TUNABLES``) is left alone; so is any other C library.

    Returns:
        Whether it was done.

    Source:
        mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))


def why_unusable(error: BaseException) -> str:
    """Why PyTorch cannot use a device, in a line; of a name that it does not know, which ones to try.

    Example:
        >>> try:
        ...     torch.device("gpu")
        ... except RuntimeError as error:
        ...     why_unusable(error)
        'expected auto, cpu, cuda, or cuda:1 for the second GPU'
    """
    said = first_line(error)
    return re.sub(r"^Expected one of cpu,.*", "expected auto, cpu, cuda, or cuda:1 for the second GPU", said)


def device_name(device: torch.device) -> str:
    """The device as records, run descriptions and the doctor call it.

    Example:
        >>> device_name(torch.device("cpu")).startswith("cpu (")
        True
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
