"""How much faster is a training step of Instar than the plain one of the published codes?

Baseline, written from the description of the official GAIRAT code: float32, NCHW, ``loss.backward()`` in every attack
step (weight gradients computed and thrown away), BatchNorm recomputed in the eval-mode attack, and a Python loop over
instances that counts κ. Ours: the step that ``instar train`` runs. Both are timed in turns in one process, so that a
machine whose speed drifts does not favour either.

    python benchmarks/training_step.py --width 64 --turns 5 --out docs/results/speed
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar
from instar.attacks import Folded
from instar.models import create

EPS, STEP, K = 8 / 255, 2 / 255, 10


def official_style(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One GAIRAT step as the published code computes it."""
    model.eval()
    kappa = torch.zeros(len(x))
    moved = torch.clamp(x + torch.empty_like(x).uniform_(-EPS, EPS), 0, 1)
    for _ in range(K):
        moved.requires_grad_()
        logits = model(moved)
        predicted = logits.max(1, keepdim=True)[1]
        for i in range(len(x)):
            if predicted[i] == y[i]:
                kappa[i] += 1
        model.zero_grad()
        F.cross_entropy(logits, y).backward()
        assert moved.grad is not None
        moved = torch.min(torch.max(moved.detach() + STEP * moved.grad.sign(), x - EPS), x + EPS).clamp(0, 1)
    model.train()
    optimizer.zero_grad()
    weight = (1 + torch.tanh(-1.0 + 5 * (1 - 2 * kappa / K))) / 2
    weight = weight * len(weight) / weight.sum()
    F.cross_entropy(model(moved), y, reduction="none").mul(weight).mean().backward()
    optimizer.step()


def ours(precision: torch.dtype, *, fold: bool) -> Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], None]:
    """One GAIRAT step of this library."""
    method = instar.gairat(burn_in=0)
    stand_ins: dict[int, Folded] = {}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        half = precision != torch.float32
        stand_in: Folded | None = None
        if fold:
            if id(model) not in stand_ins:
                stand_ins[id(model)] = Folded(model, dtype=precision if half else None)
            stand_in = stand_ins[id(model)]
            stand_in.refresh(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            instar.training_step(model, method, instar.Batch(x, y), optimizer, attacked=stand_in)

    return step


def main() -> None:
    """Time the variants in turns, print a table and write a JSON record."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--width", type=int, default=64)
    asked.add_argument("--batch-size", type=int, default=128)
    asked.add_argument("--turns", type=int, default=5)
    asked.add_argument("--ends", action="store_true", help="only the first and the last variant")
    asked.add_argument("--out", type=Path, default=None)
    given = asked.parse_args()
    torch.manual_seed(0)
    x, y = torch.rand(given.batch_size, 3, 32, 32), torch.randint(0, 10, (given.batch_size,))
    variants = {
        "official style": official_style,
        "float32": ours(torch.float32, fold=False),
        "float32, folded": ours(torch.float32, fold=True),
        "bf16, folded (default)": ours(torch.bfloat16, fold=True),
    }
    if given.ends:
        first, *_, last = variants
        variants = {name: variants[name] for name in (first, last)}
    cases = {}
    for name, step in variants.items():
        model = create("resnet18", classes=10, width=given.width, seed=0)
        if step is not official_style:
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        cases[name] = (step, model, optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(given.turns + 1):  # the first turn warms up and is not counted
        for name, (step, model, optimizer) in cases.items():
            began = time.perf_counter()
            step(model, optimizer, x, y)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    base = seconds["official style"]
    record = {
        "what": f"GAIRAT step, ResNet-18 of width {given.width}, batch {given.batch_size}, PGD-{K}",
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"instar": instar.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "turns": given.turns,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "speedup": {
            name: statistics.median(b / t for b, t in zip(base, times, strict=True)) for name, times in seconds.items()
        },
    }
    print(f"{record['what']}; {record['hardware']}; medians of {given.turns} turns")
    for name, times in seconds.items():
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        print(
            f"  {name:<24} {statistics.median(times):7.3f} s a step   {statistics.median(ratios):5.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        target = given.out / f"training_step_w{given.width}.json"
        target.write_text(json.dumps(record, indent=2) + "\n")
        print(f"written to {target}")


if __name__ == "__main__":
    main()
