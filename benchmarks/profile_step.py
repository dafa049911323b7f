"""Where the time of a training step goes: convolutions and matrix products, BatchNorm, copies, the rest.

    python benchmarks/profile_step.py --recipe pgd_at --width 64 --out docs/results/speed

The step is the one that ``instar bench`` times. On a GPU the times are those of its kernels, and what the step takes
beyond their sum is time in which the GPU waits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from instar.bench.clocks import wait
from instar.bench.subject import cases_of, prepare
from instar.storage import write_atomically

KINDS = (
    ("backward passes of convolutions", ("convolution_backward",)),
    ("convolutions and products", ("conv", "gemm", "mm", "linear", "xmma", "cutlass", "cudnn")),
    ("BatchNorm", ("batch_norm", "bn_")),
    ("copies and casts", ("copy", "::to", "cast", "memcpy", "contiguous", "clone")),
    ("optimiser and average", ("foreach", "sgd", "lerp", "multi_tensor")),
)
"""Kinds of work, and what the names of their kernels contain; the first that fits counts."""


def kind_of(name: str) -> str:
    """The kind of work that a kernel or operator does, by its name."""
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), "the rest")


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    """Profile a step, print the shares and write them; returns seconds by kind."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--recipe", default="pgd_at")
    asked.add_argument("--data", default="random")
    asked.add_argument("--model", default="resnet18")
    asked.add_argument("--width", type=int, default=None)
    asked.add_argument("--batch-size", type=int, default=128)
    asked.add_argument("--precision", default="auto")
    asked.add_argument("--device", default="auto")
    asked.add_argument("--steps", type=int, default=2)
    asked.add_argument("--out", type=Path, default=None)
    given = asked.parse_args(words)
    common = {name: getattr(given, name) for name in ("data", "model", "width", "batch_size", "precision", "device")}
    (case,) = cases_of({given.recipe: None}, common=common)
    subject = prepare(case)
    device = subject.device
    subject.step(0)
    wait(device)
    begun = time.perf_counter()
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for number in range(given.steps):
            subject.step(number + 1)
        wait(device)
    whole = (time.perf_counter() - begun) / given.steps
    found: dict[str, float] = {}
    names: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds = spent / 1e6 / given.steps
        found[kind_of(event.key)] = found.get(kind_of(event.key), 0.0) + seconds
        names[event.key] = names.get(event.key, 0.0) + seconds
    total = sum(found.values())
    longest = dict(sorted(names.items(), key=lambda pair: -pair[1])[:15])
    for kind, seconds in sorted(found.items(), key=lambda pair: -pair[1]):
        print(f"{seconds / total:6.1%}  {seconds:9.4f} s  {kind}")
    for name, seconds in longest.items():
        print(f"          {seconds:9.4f} s  {name}")
    print(f"a step took {whole:.4f} s under the profiler, of which {total:.4f} s were seen")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        record = {
            "what": f"{case.name}, {case.model} of width {case.width}, batch {case.batch_size}, {device}",
            "torch": torch.__version__,
            "seconds_by_kind": found,
            "seconds_by_name": longest,
            "step": whole,
        }
        target = given.out / f"profile_{case.recipe}_w{case.width}.json"
        write_atomically(target, (json.dumps(record, indent=2) + "\n").encode())
    return found


if __name__ == "__main__":
    main()
