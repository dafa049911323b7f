"""Runs as jobs of SLURM, through submitit: a job a run, requeued where it was stopped.

submitit was chosen over Ray because the work is whole processes that resume by themselves: SLURM already queues, places
and limits them, and submitit adds two wheels and no daemon, where Ray adds a cluster of its own, with ports and an
object store that nothing here would use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instar.errors import UserError
from instar.sweep.plan import Member
from instar.sweep.work import GRACE, Task, environment_of, finish

MINUTES = 24 * 60
"""Limit of a job where none is given; a job that reaches it goes on in another one."""


class Job:
    """What a job does: the work on one run. Asked to end, it saves, and SLURM begins it anew.

    Args:
        member: The run.
        threads: CPU threads of its processes; None leaves that to SLURM's own settings.
    """

    def __init__(self, member: Member, *, threads: int | None = None) -> None:
        self.member = member
        self.threads = threads
        self._task: Task | None = None

    def __call__(self) -> str:
        """Work on the run, if nobody else does; its name."""
        self._task = Task(self.member, environment=environment_of(threads=self.threads), shielded=True)
        finish(self._task)
        return self.member.name

    def checkpoint(self) -> Any:
        """Called before the job is ended, for its time or for a more important job: save, and ask to be begun anew."""
        from submitit.helpers import DelayedSubmission

        if self._task is not None:
            self._task.stop()
            self._task.wait(seconds=GRACE)
        return DelayedSubmission(Job(self.member, threads=self.threads))


def submit(
    members: Sequence[Member],
    *,
    folder: Path,
    parameters: Mapping[str, Any],
    jobs: int | None = None,
    threads: int | None = None,
    cluster: str = "slurm",
) -> list[Any]:
    """Hand runs to SLURM.

    submitit keeps each job as a pickle in `folder` until it runs. They are written here and read by the jobs; whoever
    can write into the folder can run code as the user, as with any script in it.

    Args:
        members: The runs.
        folder: Where submitit keeps its files.
        parameters: Of submitit: ``timeout_min``, ``gpus_per_node``, ``cpus_per_task``, ``mem_gb``, ``slurm_partition``,
            ``slurm_account``, ...
        jobs: How many may run at a time; None leaves it to SLURM.
        threads: CPU threads of each process.
        cluster: ``slurm``, or submitit's own ``local`` and ``debug``, by which this is tested.

    Returns:
        submitit's jobs.

    Raises:
        UserError: submitit or SLURM is not there, or a parameter is unknown to it.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ModuleNotFoundError:
        raise UserError("--scheduler slurm needs submitit: pip install 'instar[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        usual: dict[str, Any] = {"name": "instar", "timeout_min": MINUTES}
        if jobs is not None and cluster == "slurm":
            usual["slurm_array_parallelism"] = jobs
        executor.update_parameters(**{**usual, **parameters})
        with executor.batch():  # one array
            return [executor.submit(Job(member, threads=threads)) for member in members]
    except (RuntimeError, ValueError, NameError, TypeError, AssertionError, OSError, FailedJobError) as error:
        raise UserError(f"the jobs cannot be handed over: {' '.join(str(error).split())}") from None


def watch(members: Sequence[Member], jobs: Sequence[Any], *, report: Callable[[Member, str], None]) -> None:
    """Wait for jobs, telling of each that ends.

    Args:
        members: The runs.
        jobs: Their jobs, in the same order.
        report: Told of a run whose job has ended.

    Raises:
        KeyboardInterrupt: As it came; the jobs are cancelled, which gives them time to save.
    """
    waiting = list(zip(members, jobs, strict=True))
    try:
        while waiting:
            for member, job in list(waiting):
                if job.done():
                    waiting.remove((member, job))
                    report(member, "ended")
            time.sleep(1.0 if waiting else 0.0)
    except KeyboardInterrupt:
        for _, job in waiting:
            job.cancel(check=False)
        raise
