"""The device that a name stands for, and memory that a process keeps instead of asking for it again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from instar.devices import choose_device, numbered_device
from instar.errors import UserError

FAULTS = """
import resource, torch
from instar.devices import choose_device
choose_device("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        activations = [torch.ones(2**20) for _ in range(8)]  # together more than glibc keeps
        del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(**variables: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", FAULTS]
    done = subprocess.run(words, env=kept | variables, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another allocator")
def test_freed_memory_of_tensors_comes_back_without_page_faults() -> None:
    blocks = 80 * 1024  # 80 tensors of 1,024 pages
    assert _faults(MALLOC_MMAP_THRESHOLD_="131072") >= blocks, "who sets the allocator up himself is left alone"
    assert _faults() < blocks / 20


def test_a_device_by_its_name() -> None:
    assert choose_device("cpu") == torch.device("cpu") == numbered_device("cpu", share=1)
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"device '{name}' cannot be used here: "):
            numbered_device(name)


def test_processes_that_share_a_machine_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("instar.devices.choose_device", lambda name: asked.append(name) or torch.device("cpu"))
    for name, share in (("cuda", 3), ("auto", 2), ("cuda:1", 0), ("cuda", None), ("cpu", 1)):
        numbered_device(name, share=share)
    assert asked == ["cuda:1", "cuda:0", "cuda:1", "cuda", "cpu"]
