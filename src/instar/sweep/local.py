"""Runs on this machine, so many at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch

from instar.sweep.plan import Member
from instar.sweep.work import GRACE, Task, environment_of


def work_through(
    members: Sequence[Member],
    *,
    jobs: int,
    threads: int | None,
    report: Callable[[Member, str], None],
) -> None:
    """Work on runs, `jobs` at a time, until each is complete or has failed.

    A run that another process is at work on, such as one that a killed sweep has left behind, is waited for.

    Args:
        members: The runs, in order.
        jobs: How many at a time.
        threads: CPU threads of each process; None shares the machine's cores, unless OMP_NUM_THREADS is set.
        report: Told of a run when it is begun, ended, and waited for.

    Raises:
        KeyboardInterrupt: As it came; the processes have saved and ended.
    """
    if threads is None and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // jobs)
    gpus = _gpus()
    free, waiting = list(range(jobs)), list(members)
    at_work: dict[int, Task] = {}
    told: set[str] = set()
    try:
        while waiting or at_work:
            held = []
            while waiting and free:
                member, place = waiting.pop(0), free[0]
                gpu = gpus[place % len(gpus)] if gpus else None
                task = Task(member, environment=environment_of(threads=threads, gpu=gpu))
                if not task.begin():
                    held.append(member)
                    if member.name not in told:
                        report(member, "waited for: another process is at work on it")
                    told.add(member.name)
                    continue
                at_work[free.pop(0)] = task
                report(member, "begun")
            waiting = held + waiting
            for place, task in list(at_work.items()):
                if not task.running:
                    del at_work[place]
                    free.append(place)
                    report(task.member, "ended")
            time.sleep(0.2)
    except KeyboardInterrupt:
        _stop(list(at_work.values()))
        raise


def _stop(tasks: Sequence[Task]) -> None:
    """End processes: kindly, and at once if the user asks again."""
    for task in tasks:
        task.stop()
    try:
        for task in tasks:
            task.wait(seconds=GRACE)
    except KeyboardInterrupt:
        for task in tasks:
            task.stop()
            task.wait(seconds=5)


def _gpus() -> list[str]:
    """The GPUs that runs are spread over, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]
