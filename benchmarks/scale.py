"""What the instance table, the order of an epoch, extra images and checkpoints cost at sizes far beyond today's data.

    python benchmarks/scale.py --rows 1000000,5000000,20000000,50000000 --out docs/results/scale

Each measurement runs in a process of its own, so that its peak memory is its own; times are medians over repetitions.
The tables are filled as a run fills them (κ of ten steps, a loss, a bit), because their compressed size depends on it.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import instar
from instar.checkpoint import State, save_state
from instar.data import ExtraImages, ResidentImages, TrainSplit, batches, info
from instar.data.resident import epoch_order
from instar.instances import COLUMNS, InstanceTable, everybody
from instar.models import create
from instar.parallel import Group, Part
from instar.randomness import key

BATCHES = (128, 512, 1024, 4096)
PROCESSES = 64


def timed(work: Callable[[], object], *, turns: int) -> dict[str, float]:
    """Seconds of a call: median, fastest and slowest of some turns, after one that does not count if there are many."""
    if turns > 3:
        work()
    spent = []
    for _ in range(turns):
        begun = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begun)
    return {"median": statistics.median(spent), "low": min(spent), "high": max(spent), "turns": turns}


def peak() -> int:
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def filled(rows: int) -> InstanceTable:
    """A table after an epoch: everybody seen, κ of ten steps, losses, three in ten robust."""
    table, draws = InstanceTable(rows), torch.Generator().manual_seed(0)
    for start in range(0, rows, 1 << 22):  # in pieces, so that the peak is not that of the filling
        index = torch.arange(start, min(start + (1 << 22), rows))
        chance = torch.rand(len(index), generator=draws)
        table.write(
            index,
            {
                "seen": torch.ones_like(index),
                "kappa": (chance * 11).to(torch.int16),
                "loss": -torch.rand(len(index), generator=draws).clamp_min(1e-6).log(),
                "correct": chance < 0.3,
            },
        )
    return table


def table_steps(rows: int) -> dict[str, Any]:
    """Reading and writing the rows of a step, the means of an epoch, and the table's memory."""
    before = peak()
    table = filled(rows)
    draws = torch.Generator().manual_seed(1)
    steps = {}
    for size in BATCHES:
        # Another place every time: an epoch visits rows at random, and a repeated one would lie in the cache.
        places = iter([torch.randint(rows, (size,), generator=draws) for _ in range(202)])
        found = table.rows(next(places))
        reading = timed(lambda places=places: table.rows(next(places)), turns=100)
        writing = timed(lambda places=places, found=found: table.write(next(places), found), turns=99)
        steps[size] = {"read": reading, "write": writing}
    return {
        "bytes": sum(column.nbytes for column in table.columns.values()),
        "peak_added": peak() - before,
        "steps": steps,
        "mean_of_a_column": timed(lambda: table.mean("loss", epoch=1), turns=3),
    }


def table_saved(rows: int) -> dict[str, Any]:
    """The table written at the end of an epoch: compressed for analyses, and plain in the checkpoint."""
    table = filled(rows)
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "epoch_000.npz")
        compressed = timed(lambda: table.save(path), turns=1 if rows > 5_000_000 else 3)
        compressed_peak = peak() - before
        network = nn.Linear(1, 1)
        state = State(network, torch.optim.SGD(network.parameters(), lr=0.1), table)
        plain = timed(lambda: save_state(state, Path(folder, "state.safetensors"), fingerprint="scale"), turns=3)
        return {
            "npz": {"seconds": compressed, "bytes": path.stat().st_size, "peak_added": compressed_peak},
            "state": {
                "seconds": plain,
                "bytes": Path(folder, "state.safetensors").stat().st_size,
                "peak_added": peak() - before,
            },
        }


def small_images(rows: int) -> ResidentImages:
    """So many images of one pixel: what remains is the cost of knowing them."""
    known = replace(info("digits"), shape=(1, 1, 1))
    return ResidentImages(torch.zeros(rows, 1, 1, 1, dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64), known)


def order(rows: int) -> dict[str, Any]:
    """The order of an epoch: drawn whole, and beside it computed for one batch at a time."""
    images = small_images(rows)
    before = peak()
    begun = time.perf_counter()
    split = TrainSplit(images)
    known, known_peak = time.perf_counter() - begun, peak() - before
    drawn = timed(lambda: epoch_order(split, epoch=1, seed=0, shuffle=True), turns=3)
    drawn_peak = peak() - before
    first = {}
    for size in (128, 4096):

        def begin(size: int = size) -> None:
            stream = batches(split, batch_size=size, epoch=1, seed=0, shuffle=True, drop_last=True)
            next(stream)
            stream.close()  # type: ignore[attr-defined]

        first[size] = {"seconds": timed(begin, turns=1), "peak_added": peak() - before}
    keyed = Keyed(rows, key(0, epoch=1, purpose="order"))
    positions = [torch.arange(start, start + 4096) for start in range(0, 20 * 4096, 4096)]
    waiting = iter([*positions, positions[0]])
    return {
        "split_seconds": known,
        "split_peak_added": known_peak,
        "drawn": drawn,
        "drawn_peak_added": drawn_peak,
        "first_batch": first,
        "keyed_batch_of_4096": timed(lambda: keyed(next(waiting)), turns=20),
    }


@dataclass(frozen=True)
class Keyed:
    """A permutation of 0..N−1 that is computed where it is needed: a Feistel network on 2·h bits, walked until inside.

    Four rounds of a keyed 64-bit mixer; positions that fall outside of N are sent through again, which keeps it a
    permutation and takes fewer than four passes on average, since 2^(2h) < 4N.

    Attributes:
        count: N.
        seed: 63 bits.
    """

    count: int
    seed: int

    def __call__(self, positions: Tensor) -> Tensor:
        """Where positions (B,) are sent, (B,)."""
        half = max(1, -(-(self.count - 1).bit_length() // 2))
        result = self._once(positions.numpy().astype(np.uint64), half)
        while len(outside := np.flatnonzero(result >= self.count)):
            result[outside] = self._once(result[outside], half)
        return torch.from_numpy(result.astype(np.int64))

    def _once(self, x: np.ndarray, half: int) -> np.ndarray:
        mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
        left, right = x >> bits, x & mask
        for turn in range(4):
            mixed = right + np.uint64(key(self.seed, step=turn, purpose="round"))
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # the finaliser of SplitMix64
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        return (left << bits) | right


def keyed_is_a_permutation() -> dict[str, Any]:
    """The keyed order sends a million positions to a million different ones, and neighbours far from each other."""
    count = 1_000_003
    found = Keyed(count, key(0, epoch=1, purpose="order"))(torch.arange(count))
    distinct = len(torch.unique(found)) == count and int(found.min()) == 0 and int(found.max()) == count - 1
    apart = (found.diff().abs().double() / count).mean()
    return {"rows": count, "distinct": distinct, "mean_distance_of_neighbours": float(apart), "of_random_ones": 1 / 3}


class Sparse(io.FileIO):
    """A file in which zeros are holes."""

    def write(self, content: Any) -> int:
        """Write, or move on where there is nothing but zeros."""
        part = memoryview(content).cast("B")
        if len(part) >= 1 << 20 and not np.frombuffer(part, np.uint8).any():
            self.seek(len(part), os.SEEK_CUR)
            return len(part)
        return super().write(content)


def extra_images(rows: int) -> dict[str, Any]:
    """Extra images of 32 × 32 mapped from a sparse file: the price of mapping and gathering, without a disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "extra.npz")
        chunk, left = bytes(1 << 24), rows * 3072
        with Sparse(path, "w") as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("image.npy", "w", force_zip64=True) as member:
                head = {"descr": "|u1", "fortran_order": False, "shape": (rows, 32, 32, 3)}
                np.lib.format.write_array_header_1_0(member, head)
                while left:
                    left -= member.write(chunk[: min(left, len(chunk))])
            with archive.open("label.npy", "w") as member:
                np.lib.format.write_array(member, np.zeros(rows, np.int64))
        begun = time.perf_counter()
        extra = ExtraImages.open(path, info=info("cifar10"))
        opened = time.perf_counter() - begun
        draws, before = torch.Generator().manual_seed(2), peak()
        fetched = {}
        for size in (90, 358, 717, 2867):  # seven in ten of the batches
            places = iter([torch.randint(rows, (size,), generator=draws) for _ in range(22)])
            fetched[size] = timed(lambda places=places: extra.fetch(next(places)), turns=20)
        return {
            "file_bytes": path.stat().st_size,
            "disk_bytes": path.stat().st_blocks * 512,
            "open_seconds": opened,
            "fetch": fetched,
            "peak_added": peak() - before,
        }


def file_list(rows: int) -> dict[str, Any]:
    """A folder of pictures is known by one `Path` each."""
    before = peak()
    begun = time.perf_counter()
    files = tuple(Path(f"/data/train/n{place % 1000:08d}/n{place % 1000:08d}_{place}.JPEG") for place in range(rows))
    return {"seconds": time.perf_counter() - begun, "peak_added": peak() - before, "files": len(files)}


def networks(rows: int) -> dict[str, Any]:
    """Bytes of a checkpoint without its table: weights, momentum and average."""
    found = {}
    for name in ("resnet18", "wide_resnet_34_10"):
        network = create(name, classes=10, channels=3, image_size=32, seed=0)
        average = create(name, classes=10, channels=3, image_size=32, seed=0)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = State(network, optimizer, InstanceTable(rows), average)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "state.safetensors")
            spent = timed(lambda state=state, path=path: save_state(state, path, fingerprint="scale"), turns=3)
            size = path.stat().st_size
        count = sum(parameter.numel() for parameter in network.parameters())
        found[name] = {"parameters": count, "bytes": size, "seconds": spent}
    return found


class Counted(Group):
    """A process among many that counts what it would send, and hears nobody."""

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """The rows of the whole batch, all of them its own."""
        SENT.append(rows.nbytes)
        return rows.repeat_interleave(-(-total // len(rows)), 0)[:total]


SENT: list[int] = []


def gathered(rows: int) -> dict[str, Any]:
    """Bytes that each of 64 processes sends and receives a step for the table, counted on the call that does it."""
    found = {}
    for size in BATCHES:
        SENT.clear()
        mine = size // PROCESSES
        part = Part(Counted(rank=0, size=PROCESSES), 0, mine, size)
        index = torch.arange(mine)
        values = {name: torch.zeros(mine, dtype=kind) for name, kind in COLUMNS.items()}
        spent = timed(
            lambda part=part, index=index, values=values: everybody(part, {"index": index, **values}), turns=20
        )
        found[size] = {"sent": SENT[0], "received": SENT[0] * PROCESSES, "packing_seconds": spent}
    return found


WORK: dict[str, Callable[[int], dict[str, Any]]] = {
    "table": table_steps,
    "saved": table_saved,
    "order": order,
}


def alone(work: Callable[..., dict[str, Any]], *arguments: int) -> dict[str, Any]:
    """A measurement in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_quiet, (work, arguments))


def _quiet(work: Callable[..., dict[str, Any]], arguments: tuple[int, ...]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return work(*arguments)


def main() -> None:
    """Measure everything and write ``scale.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000000,5000000,20000000,50000000", help="sizes, separated by commas")
    parser.add_argument("--extra", type=int, default=1_000_000, help="extra images in the mapped file")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "load_average_before": [round(load, 1) for load in os.getloadavg()],
        "versions": {
            "instar": instar.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    begun = time.perf_counter()

    def keep(name: str, entry: dict[str, Any]) -> None:
        found[name] = entry
        found["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
        (given.out / "scale.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{time.perf_counter() - begun:7.1f} s  {name}", flush=True)

    sizes = [int(size) for size in given.rows.split(",")]
    keep("gathered", alone(gathered, 0))
    keep("keyed", keyed_is_a_permutation())
    keep("networks", alone(networks, 50_000))
    keep("extra_images", {"images": given.extra, **alone(extra_images, given.extra)})
    keep("file_list", {"images": 1_000_000, **alone(file_list, 1_000_000)})
    for size in sizes:
        for name, work in WORK.items():
            keep(f"{name}_{size}", {"rows": size, **alone(work, size)})


if __name__ == "__main__":
    main()
