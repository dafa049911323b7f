"""What the machine can do, and what a step asks of it: matrix multiplications a second, and operations counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from instar.bench.clocks import wait

SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
"""Rows and columns of the square matrices that are multiplied."""
REPEATS = 5
LONGEST = 2.0
"""Seconds after which no larger matrix is tried."""


def matmul_rate(
    dtype: torch.dtype, device: torch.device, *, sizes: tuple[int, ...] | None = None, clock: str = "wall"
) -> tuple[float, dict[int, float]]:
    """The floating-point operations a second of a product of matrices, which convolutions are measured by.

    Args:
        dtype: Of the matrices. On a GPU, float32 is computed in whatever ``torch.set_float32_matmul_precision`` says.
        device: Where.
        sizes: Rows and columns that are tried; None takes usual ones.
        clock: One of `instar.bench.CLOCKS`.

    Returns:
        The best rate over sizes, and each size's: 2 n³ operations over the median time.

    Example:
        >>> best, each = matmul_rate(torch.float32, torch.device("cpu"), sizes=(64, 128))
        >>> best == max(each.values()), sorted(each)
        (True, [64, 128])
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    found: dict[int, float] = {}
    for size in sizes or SIZES.get(device.type, SIZES["cpu"]):
        one = torch.ones(size, size, dtype=dtype, device=device)
        out = one @ one
        spent = []
        for _ in range(REPEATS):
            wait(device)
            begun = now()
            torch.mm(one, one, out=out)
            wait(device)
            spent.append(now() - begun)
        found[size] = 2 * size**3 / max(statistics.median(spent), 1e-9)
        if sum(spent) > LONGEST:
            break
    return max(found.values()), found


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and convolutions in a piece of work, forward and backward.

    They are counted while it runs, by the shapes that it meets; a multiplication and an addition are two.

    Example:
        >>> operations(lambda: torch.ones(2, 3) @ torch.ones(3, 4))
        48
    """
    with _Counting() as counter:
        work()
    return counter.total


class _Counting(TorchDispatchMode):
    """Adds up PyTorch's own formulas. Its ``FlopCounterMode`` also follows modules, which attacks in a step upset."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out
