"""Whether a run fits: onto the disk and into memory, looked at before it starts, and said in one line if it did not."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from instar.config import Settings
from instar.errors import UserError
from instar.instances import COLUMNS
from instar.method import Method
from instar.runs import onward

CONTAINER = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Where the two versions of control groups say how much memory a container may take, and how much it has taken."""

STATES = 3
"""States on the disk at a time: the newest one, the one before it, and the one that is being written."""


def memory_free(device: torch.device) -> int | None:
    """Bytes that can still be taken: of the device, or of the machine within the limit of its container.

    Returns:
        The number, or None where the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = _memory_information()
    if known is None:
        return _by_system_configuration()
    free = known["MemAvailable"]
    for limit, used in CONTAINER:
        try:
            most = int(Path("/sys/fs/cgroup", limit).read_text())
            free = min(free, max(most - int(Path("/sys/fs/cgroup", used).read_text()), 0))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return free


def _memory_information() -> dict[str, int] | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    except (OSError, ValueError, IndexError):
        return None
    return known if "MemAvailable" in known else None


def _by_system_configuration() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def disk_free(folder: Path) -> int | None:
    """Bytes free where a folder is, or would be.

    Example:
        >>> disk_free(Path("/")) > 0
        True
    """
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            try:
                return shutil.disk_usage(place).free
            except OSError:
                return None
    return None


def gibibytes(count: float) -> str:
    """A size as people say it.

    Example:
        >>> gibibytes(3 * 2**29), gibibytes(5e6)
        ('1.5 GiB', '5 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Sizes:
    """What a run holds and writes, in bytes.

    Attributes:
        weights: The network.
        trained: Those of its parameters that are trained.
        optimizer: What the optimiser keeps of them.
        average: The averaged network.
        table: The instance table.
        spare: Copies of all that a step changes, which are in memory alone: of runs that skip bad steps.
        kept: Weights of single epochs that lie on the disk at a time.
        epochs: Epochs of the run, each of which leaves an instance table.
    """

    weights: int
    trained: int
    optimizer: int
    average: int
    table: int
    kept: int
    epochs: int
    spare: int = 0

    def of_each(self, processes: int) -> Sizes:
        """What each process holds of a network in shards.

        Example:
            >>> Sizes(8, 8, 8, 0, 5, 0, 1).of_each(2)
            Sizes(weights=4, trained=4, optimizer=4, average=0, table=5, kept=0, epochs=1, spare=0)
        """
        divided = ("weights", "trained", "optimizer", "average", "spare")
        return replace(self, **{name: -(-getattr(self, name) // processes) for name in divided})

    @property
    def state(self) -> int:
        """One saved state."""
        return self.weights + self.optimizer + self.average + self.table

    @property
    def least(self) -> int:
        """What must fit onto the disk for the first epoch to end: a state, best and last."""
        return self.state + 2 * self.weights

    @property
    def most(self) -> int:
        """What may lie on the disk at a time: tables are compressed, by how much nobody knows beforehand."""
        return STATES * self.state + (3 + self.kept) * self.weights + self.epochs * self.table


def sizes(network: nn.Module, method: Method, settings: Settings, *, rows: int) -> Sizes:
    """What a run will hold and write.

    Args:
        network: Its network.
        method: Its method.
        settings: `optimizer`, `momentum`, `on_nan`, `epochs` and the keep rules are read.
        rows: Rows of the instance table.

    Example:
        >>> from instar import pgd_at
        >>> found = sizes(nn.Linear(250, 1000, bias=False), pgd_at(), Settings(epochs=2), rows=1000)
        >>> found.weights, found.optimizer, found.average, found.table
        (1000000, 1000000, 0, 11000)
    """
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    copies = 2 if settings.optimizer == "adamw" else int(settings.momentum > 0)
    row = sum(kind.itemsize for kind in COLUMNS.values()) + 4 * len(method.remember)
    kept = settings.epochs // settings.keep_every if settings.keep_every else 0
    average = weights if method.average is not None else 0
    return Sizes(
        weights=weights,
        trained=trained,
        optimizer=copies * trained,
        average=average,
        table=row * rows,
        kept=min(kept, settings.keep_newest or kept),
        epochs=settings.epochs,
        spare=weights + copies * trained + average if settings.on_nan == "skip" else 0,
    )


def check_disk(needed: Sizes, out: Path, *, resume: bool, note: Callable[[str], None]) -> None:
    """Refuse a run whose first epoch cannot be written, and say it where space may run out later.

    Args:
        needed: What the run writes.
        out: Its folder, which need not be there yet.
        resume: Whether it has written already; then nothing is refused, for it waits for space where it must.
        note: Called with a line if space may run out.

    Raises:
        UserError: There is certainly too little space.
    """
    free = disk_free(out)
    if free is None:
        return
    if resume:
        if free < needed.state + 2 * needed.weights:
            note(f"only {gibibytes(free)} are free in {out}, and a save writes {gibibytes(needed.state)}: make room")
        return
    if free < needed.least:
        raise UserError(
            f"{out} has room for {gibibytes(free)}, and the first epoch alone writes {gibibytes(needed.least)} of "
            "weights and state: make room, or give another --out"
        )
    if free < needed.most:
        note(f"{out} has room for {gibibytes(free)}, and the run may need {gibibytes(needed.most)} in the end")


def check_memory(needed: Sizes, device: torch.device) -> None:
    """Refuse a run whose gradients, optimiser, average and table alone do not fit beside the network.

    How much the passes through the network take is left out: it depends on everything, and `instar doctor` measures it.

    Args:
        needed: What the run holds.
        device: Where the network lies already.

    Raises:
        UserError: They certainly do not fit.
    """
    free = memory_free(device)
    if free is None:
        return
    if device.type == "cpu":
        free += (_memory_information() or {}).get("SwapFree", 0)
    wanted = needed.trained + needed.optimizer + needed.average + needed.table + needed.spare
    if wanted > free:
        copies = ", the copies that on_nan=skip keeps" if needed.spare else ""
        raise UserError(
            f"{gibibytes(free)} of memory are free on {device}, and gradients, optimiser, average{copies} and instance "
            f"table alone take {gibibytes(wanted)}: take a smaller model or width"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too small: Python's, a GPU's, or that of PyTorch on the CPU.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes do not fit"))
        (True, False)
        >>> try:
        ...     torch.empty(2**60)
        ... except RuntimeError as error:
        ...     is_out_of_memory(error)
        True
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in said or "you tried to allocate" in said)


@contextlib.contextmanager
def within_memory(out: Path, settings: Settings) -> Iterator[None]:
    """Says in one line what to lower when training has run out of memory.

    Args:
        out: Folder of the run.
        settings: `batch_size`, `accumulate` and `precision` are read.

    Raises:
        UserError: In the place of an error of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        pieces = 2 * settings.accumulate
        there = (out / "run.json").is_file()
        then = onward(out, f"--accumulate {pieces}") if there else "nothing began"
        other = "" if settings.precision == "bf16" else ", --precision bf16"
        raise UserError(
            f"out of memory: --accumulate {pieces} treats a batch in pieces and takes about half (a smaller "
            f"--batch_size than {settings.batch_size}{other} or a smaller --width begin another run). Nothing that "
            f"was saved is lost; {then}"
        ) from error
