"""Two runs on one machine give the same bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from instar.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""What cuBLAS reads, once, before its first product; without it sums of products may run in any order."""


@contextlib.contextmanager
def deterministic(wanted: bool = True, *, device: str = "auto") -> Iterator[None]:
    """Within, PyTorch takes algorithms alone that give the same bits every time; behind it, all is as it was before.

    ``torch.use_deterministic_algorithms``, cuDNN's deterministic algorithms without a search for the fastest, no TF32,
    and a fixed workspace for cuBLAS. On the CPU two runs are bitwise equal without it too, as far as is known, provided
    that the number of threads is the same; then it is a promise that is checked: an operation without a deterministic
    algorithm is refused in one line.

    Args:
        wanted: False changes nothing.
        device: Where it will be computed: ``cpu`` needs no cuBLAS.

    Yields:
        Nothing.

    Raises:
        UserError: CUDA has started already without its setting, or some operation has no deterministic algorithm.

    Example:
        >>> with deterministic(device="cpu"):
        ...     torch.are_deterministic_algorithms_enabled()
        True
        >>> torch.are_deterministic_algorithms_enabled()
        False
    """
    if not wanted:
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.allow_tf32,
        matmul.allow_tf32,
    )
    set_here = _fix_workspace(device)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "deterministic" not in text:
            raise
        raise UserError(
            f"--deterministic: something in the model or method has no deterministic algorithm on this device ("
            f"{text.split('. ')[0][:160]}). Exchange it, or train without --deterministic"
        ) from error
    finally:
        torch.use_deterministic_algorithms(found[0], warn_only=found[1])
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = found[2:]
        if set_here:
            os.environ.pop(WORKSPACE, None)


def _fix_workspace(device: str) -> bool:
    """Set cuBLAS's variable where it counts; whether it was set here."""
    if WORKSPACE in os.environ or device.startswith("cpu") or not torch.cuda.is_available():
        return False
    if torch.cuda.is_initialized():
        raise UserError(
            f"--deterministic comes too late: CUDA has started already. Set {WORKSPACE}=:4096:8 before Python starts"
        )
    os.environ[WORKSPACE] = ":4096:8"
    return True
