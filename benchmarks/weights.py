"""Weights as the benchmarks of the evaluator take them: ours by their card, others as a network on a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The weights, how many images, and what a file without a card is taken for."""
    parser.add_argument("targets", nargs="+", help="weights of ours, or state dicts from elsewhere")
    parser.add_argument("--n", type=int, default=500, help="test images")
    parser.add_argument("--data", default="cifar10", help="data set of a state dict from elsewhere")
    parser.add_argument("--model", default="resnet18", help="network of a state dict from elsewhere")


def named(target: str | Path, chosen: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The name of a weights file among others, and what `evaluate` must be told of it."""
    path = Path(target)
    if path.with_suffix(".json").exists():
        return f"{path.parent.name}-{path.stem}", {}
    return path.stem, {"data": chosen.data, "model": chosen.model}
