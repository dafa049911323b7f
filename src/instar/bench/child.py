"""The memory of a step, in a process of its own: ``python -m instar.bench.child`` reads a case and writes JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from instar.bench.subject import Case, prepare
from instar.errors import UserError

STEPS = 2
PATIENCE = 900.0
"""Seconds that a child may take."""


def memory(case: Case) -> tuple[int, int]:
    """The most memory of a process that makes some steps, and what the steps added to it, in bytes.

    On a CPU the high-water mark of the process's resident memory, PyTorch included; on a GPU that of PyTorch's
    allocator there.

    Args:
        case: What to run.

    Returns:
        Peak, and peak less what was taken before the first step.

    Raises:
        UserError: The process failed, or took longer than `PATIENCE`.
    """
    command = [sys.executable, "-m", "instar.bench.child"]
    told = json.dumps(case.to_json())
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"the process that measures the memory of {case.name} took over {PATIENCE:.0f} s") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise UserError(f"the process that measures the memory of {case.name} failed: {reason[0]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["peak"]), int(found["added"])


def resident() -> tuple[int, int]:
    """Resident memory of this process in bytes: now, and at most so far; zeros where the system does not say.

    From ``/proc``: the figure of ``getrusage`` is inherited from the parent.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        known = {
            name: int(rest.split()[0]) * 1024
            for name, _, rest in (line.partition(":") for line in lines)
            if name in ("VmRSS", "VmHWM")
        }
        return known["VmRSS"], known["VmHWM"]
    except (OSError, ValueError, KeyError, IndexError):
        return 0, 0


def main() -> None:
    """Make some steps of the case on standard input; write the peak and what the steps added."""
    case = Case.from_json(json.load(sys.stdin))
    subject = prepare(case)
    device = subject.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()[0]
    for number in range(STEPS):
        subject.step(number)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident()[1]
    print(json.dumps({"peak": peak, "added": max(peak - before, 0)}))


if __name__ == "__main__":
    main()
