"""What sharing a batch costs: one process with two threads against two processes with one thread each.

    torchrun --standalone --nproc-per-node 2 benchmarks/processes.py

Both are timed in the same program, in turns, so that whatever else the machine does slows down both: while one process
works with two threads the other one waits. Printed are medians over rounds, and how far the rounds are apart; and the
processor time of all processes together over that of one process with one thread, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import distributed

from instar import Batch, gairat
from instar.instances import InstanceTable, everybody
from instar.method import Method
from instar.models import create
from instar.models.batch_norm import normalised_by
from instar.parallel import ALONE, Group, launched
from instar.randomness import generator
from instar.step import training_step


def stepping(method: Method, batch: Batch, group: Group, *, width: int) -> Callable[[int], None]:
    """A function that makes the step with the given number, on this process's share of the batch."""
    channels, size = batch.x.shape[1], batch.x.shape[2]
    model = create("resnet18", classes=10, channels=channels, image_size=size, width=width, seed=0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    share = batch.share(group)

    def step(number: int) -> None:
        draws = generator(0, step=number, purpose="attack")
        with normalised_by(model, "sync", group):
            training_step(model, method, share, optimizer, generator=draws)

    return step


def table_time(size: int, share: Batch, repeats: int) -> float:
    """Seconds that reading and writing the instance table takes in a step, the exchange of rows included."""
    table = InstanceTable(size)
    assert share.index is not None
    rows = {"index": share.index, "seen": share.y, "kappa": share.y, "loss": torch.rand(len(share)), "correct": share.y}
    began = time.perf_counter()
    for _ in range(repeats):
        table.rows(share.index)
        found = everybody(share.part, rows)
        table.write(found["index"], {name: row for name, row in found.items() if name != "index"})
    return (time.perf_counter() - began) / repeats


def main(words: Sequence[str] | None = None) -> None:
    """Time both in turns, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps of the attack")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(words)
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(given.batch_size, 3, 32, 32, generator=draws)
    y = torch.randint(10, (given.batch_size,), generator=draws)
    batch = Batch(x, y, index=torch.arange(given.batch_size))
    method = gairat(steps=given.steps, burn_in=0, shift=-1.0)
    alone, together, exchange, work, shared_work = [], [], [], [], []
    with launched(torch.device("cpu")) as group:
        one, all_of_us = (stepping(method, batch, who, width=given.width) for who in (ALONE, group))
        for number in range(given.rounds + 1):  # the first round warms up
            if group.leads:
                torch.set_num_threads(group.size)
                began = time.perf_counter()
                one(number)
                alone.append(time.perf_counter() - began)
            torch.set_num_threads(1)
            if group.leads:
                worked = time.process_time()
                one(number)
                work.append(time.process_time() - worked)
            distributed.barrier()
            began, worked = time.perf_counter(), time.process_time()
            all_of_us(number)
            together.append(time.perf_counter() - began)
            shared_work.append(float(group.total(torch.tensor(time.process_time() - worked, dtype=torch.float64))))
            exchange.append(table_time(50_000, batch.share(group), 20))
            distributed.barrier()
        if group.leads:
            ratios = [b / a for a, b in zip(alone[1:], together[1:], strict=True)]
            found = {
                "one process, seconds a step": statistics.median(alone[1:]),
                f"{group.size} processes, seconds a step": statistics.median(together[1:]),
                "ratio, median of rounds": statistics.median(ratios),
                "ratio, smallest and largest": [min(ratios), max(ratios)],
                "processor time, ratio": statistics.median(
                    b / a for a, b in zip(work[1:], shared_work[1:], strict=True)
                ),
                "instance table, share of a step": statistics.median(exchange[1:]) / statistics.median(together[1:]),
                "load of the machine": os.getloadavg()[0],
            }
            print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
