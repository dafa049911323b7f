"""The machine: versions that belong together, device, memory and disk."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import instar
from instar.devices import device_name
from instar.doctor.report import ERROR, OK, WARNING, Check
from instar.evaluate.recording import version
from instar.room import disk_free, gibibytes, memory_free

LITTLE_DISK, LITTLE_MEMORY = 2 * 2**30, 2**30


def hardware(device: torch.device) -> dict[str, Any]:
    """The same as `machine` without the folder: what a measurement depends on."""
    known = machine(device, Path.cwd())
    return {name: item for name, item in known.items() if name not in ("folder", "disk_free")}


def machine(device: torch.device, folder: Path) -> dict[str, Any]:
    """Versions and hardware, as JSON can hold them.

    Args:
        device: Where the work would run.
        folder: Where files would be written.

    Returns:
        Versions, device, free memory and disk in bytes.
    """
    return {
        "instar": instar.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "cuda": torch.version.cuda,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "memory_free": memory_free(device),
        "disk_free": disk_free(folder),
        "folder": str(folder),
    }


def machine_checks(known: dict[str, Any], device: torch.device) -> list[Check]:
    """Checks of what `machine` found."""
    found = [_versions(known)]
    unused = device.type == "cpu" and torch.cuda.is_available()
    hidden = device.type == "cpu" and torch.version.cuda is not None and not torch.cuda.is_available()
    text = f"{known['device']}, {known['threads']} of {known['cores']} cores"
    text += ", a CUDA build of torch without a GPU" if hidden else ""
    advice = "A GPU is here: give --device cuda" if unused else ""
    found.append(Check("device", WARNING if unused else OK, text, advice))
    free, disk = known["memory_free"], known["disk_free"]
    if free is not None:
        advice = "Close other programs, or give a smaller --batch-size" if free < LITTLE_MEMORY else ""
        found.append(Check("memory", WARNING if advice else OK, f"{gibibytes(free)} free", advice, float(free)))
    if disk is not None:
        advice = "A long run writes its state again and again: make room" if disk < LITTLE_DISK else ""
        text = f"{gibibytes(disk)} free in {known['folder']}"
        found.append(Check("disk", WARNING if advice else OK, text, advice, float(disk)))
    return found


def _versions(known: dict[str, Any]) -> Check:
    text = f"instar {known['instar']}, Python {known['python']}, torch {known['torch']}"
    text += f", torchvision {known['torchvision']}"
    torch_build, vision_build = (str(known[name]).partition("+")[2] for name in ("torch", "torchvision"))
    if torch_build and vision_build and torch_build != vision_build:
        advice = "Their builds differ: install both from one package index, or torchvision's operators are missing"
        return Check("versions", ERROR, text, advice)
    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        advice = "They were built for different versions: install both from one package index"
        return Check("versions", ERROR, f"{text}; torchvision does not work with this torch ({reason})", advice)
    return Check("versions", OK, text)


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def peak_memory(device: torch.device) -> int:
    """Most bytes taken so far: of the device, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
