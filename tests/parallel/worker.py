"""What one of several processes does in the tests: trains every case that a file lists, and keeps its numbers.

Images, weights and optimiser are float64, so that what is left between process counts is the order of sums. Every case
goes through `instar.train.train`: loader, attack, step, instance table, average, selection and checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.fsdp  # once, for all processes that are forked
from torch import Tensor, nn

import instar.data.resident
import instar.description
import instar.selection
import instar.train
from instar import (
    AWP,
    EMA,
    PGD,
    SAM,
    CrossEntropy,
    Exceeds,
    GeometryWeight,
    LossGap,
    ProbabilityGap,
    RankWeight,
    UserError,
    p_sat,
    pgd_at,
)
from instar.data import ResidentImages, load
from instar.method import Method
from instar.methods import RECIPES
from instar.methods.grad_align import GradientMisalignment
from instar.models.heads import Cosine
from instar.parallel import Group, ProcessLost, launched
from instar.sharding import local
from instar.train import Event, Interrupted, StepDone, train

# 18 = 5 + 5 + 4 + 4: the shares of four processes are not equal.
BATCH, STEPS, SELECTED = 18, 2, 7

ACTING: dict[str, dict[str, Any]] = {
    "trades_awp": {"gamma": 5e-3},
    "iseat": {"smoothness": 0.3},
    "p_sat": {"bound": 0.12},
    "h_sat": {"bound": 0.38},
    "fgsm_sat": {"bound": 0.12},
    "dynamic_at": {"bound": 0.1},
}
"""Numbers with which a method does its part from the first step on, and to some instances of an untrained network."""


class Block(nn.Module):
    """A convolution and a norm."""

    def __init__(self, before: int, after: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        # Smooth, so that a difference in the last digit cannot become a different side of a kink.
        return nn.functional.softplus(self.norm(self.conv(x)))


class Net(nn.Module):
    """Two blocks and a head; the norm is BatchNorm, GroupNorm or none."""

    def __init__(self, norm: str, *, cosine: bool) -> None:
        super().__init__()
        norms = {
            "batch": nn.BatchNorm2d,
            "group": lambda width: nn.GroupNorm(2, width),
            "none": lambda _: nn.Identity(),
        }
        self.blocks = nn.Sequential(*(Block(*channels, norms[norm](channels[1])) for channels in ((1, 4), (4, 6))))
        self.head = Cosine(24, 10, scale=8.0) if cosine else nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x).flatten(1))
        return logits


def network(norm: str, method: Method, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net(norm, cosine=method.requires is not None).double()


@functools.cache
def images() -> ResidentImages:
    digits = load("digits")
    rows = torch.arange(BATCH * STEPS + SELECTED)
    return ResidentImages(digits.fetch(rows), digits.labels[rows], digits.info)


def method_of(case: dict[str, Any]) -> Method:
    """The method of a case; attacks are short, burn-ins are over, and schedules have begun."""
    name, arguments = case["recipe"], case.get("arguments", {})
    if name == "ranks within ranks":  # one whole-batch weight inside another, ascended too, and remembered
        ranks = RankWeight(GeometryWeight(-1.0) * LossGap("clean"))
        loss = ranks * CrossEntropy() + CrossEntropy("clean")
        return replace(pgd_at(steps=3), loss=loss, perturbation=AWP(5e-3), remember=(("rank", ranks),))
    if name == "gradients aligned and ranked":  # draws random numbers in the loss, in the ascent too
        loss = RankWeight(LossGap("clean")) * CrossEntropy() + 0.2 * GradientMisalignment()
        return replace(pgd_at(steps=3), loss=loss, perturbation=SAM(0.05))
    if name == "averaged":
        return replace(RECIPES["trades_awp"](steps=2), average=EMA(0.9, batch_norm="reestimate"))
    if name == "batch statistics in an attack that stops":
        return replace(p_sat(steps=3), attack=PGD(steps=3, mode="train", stop=Exceeds(ProbabilityGap(), -0.05)))
    recipe = RECIPES[name]
    accepted = recipe.__kwdefaults__ or {}
    short: dict[str, Any] = {name: item for name, item in (("steps", 3), ("burn_in", 0)) if name in accepted}
    return recipe(**(short | ACTING.get(name, {}) | arguments))


def train_case(case: dict[str, Any], out: Path, group: Group) -> None:
    """Train one case into `out`; a case that says when is interrupted or killed there."""
    method = method_of(case)
    usual: dict[str, Any] = {
        "epochs": 1,
        "batch_size": BATCH,
        "selection": SELECTED,
        "precision": "float32",
        "lr": 0.05,
    }
    done = 0

    def watch(event: Event) -> None:
        nonlocal done
        done += isinstance(event, StepDone)
        if isinstance(event, StepDone) and done == case.get("interrupt"):
            os.kill(os.getpid(), signal.SIGTERM)
        if isinstance(event, StepDone) and done == case.get("stop launcher"):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(3)  # the others wait for this process, and the launcher has told everybody by then

    with contextlib.suppress(Interrupted), _dying(case, group), _weighed(case, out, group), _counted(case, out, group):
        train(
            method,
            out=out / case.get("out", case["name"]),
            data=images(),
            model=network(case["norm"], method, seed=1 + group.rank),  # the first process's weights count
            group=group,
            on_event=watch,
            resume=case.get("resume", False),
            **usual | {"fold": False} | case.get("settings", {}),
        )


def _each_step(does: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """Has `does` called in the place of every training step, with the step itself as its first argument."""
    return mock.patch.object(instar.train, "training_step", functools.partial(does, instar.train.training_step))


def _dying(case: dict[str, Any], group: Group) -> contextlib.AbstractContextManager[Any]:
    """Kills a process in the middle of a step, at the first attempt; or makes its share of a step's images NaN."""
    left, poisoned = case.get("kill after"), case.get("poison")

    def bad_step(step: Any, model: Any, method: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        if [options["progress"].epoch, options["progress"].step] == poisoned:
            batch = replace(batch, x=batch.x * float("nan"))
        return step(model, method, batch, *arguments, **options)

    def last_step(step: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments, **options)

    last = group.rank == group.size - 1
    if last and poisoned:
        return _each_step(bad_step)
    if left is not None and group.rank == 1 and not group.restarts:
        return _each_step(last_step)
    return contextlib.nullcontext()


def _weighed(case: dict[str, Any], out: Path, group: Group) -> contextlib.AbstractContextManager[Any]:
    """Writes down how many bytes of weights and momentum this process holds between steps."""

    def weighing(step: Any, model: nn.Module, method: Method, batch: Any, optimizer: Any, **options: Any) -> Any:
        done = step(model, method, batch, optimizer, **options)
        held = {
            "weights": [local(p) for p in model.parameters()],
            "gradients": [local(p.grad) for p in model.parameters() if p.grad is not None],
            "momentum": [local(entries["momentum_buffer"]) for entries in optimizer.state.values()],
        }
        # By storage, which tensors may share, and which may hold more than they show.
        stored = {kind: {t.untyped_storage().data_ptr(): t.untyped_storage() for t in ts} for kind, ts in held.items()}
        memory = {kind: sum(storage.nbytes() for storage in one.values()) for kind, one in stored.items()}
        (out / f"{case['name']}.{group.rank}.memory").write_text(json.dumps(memory))
        return done

    return _each_step(weighing) if case.get("weigh") else contextlib.nullcontext()


@contextlib.contextmanager
def _counted(case: dict[str, Any], out: Path, group: Group) -> Iterator[None]:
    """Writes down the messages from the beginning of the first step to that of the second one: kind and bytes."""
    if not case.get("count"):
        yield
        return
    messages, begun = [], []

    def stepping(step: Any, *arguments: Any, **options: Any) -> Any:
        begun.append(len(messages))
        return step(*arguments, **options)

    def counting(kind: str, send: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            tensor = next(
                item for item in reversed(arguments) if isinstance(item, Tensor)
            )  # what is gathered comes last
            messages.append([kind, tensor.numel() * tensor.element_size()])
            return send(*arguments, **options)

        return counted

    kinds = ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")
    sends = {kind: counting(kind, getattr(torch.distributed, kind)) for kind in kinds}
    with _each_step(stepping), mock.patch.multiple(torch.distributed, **sends):
        yield
    (out / f"{case['name']}.{group.rank}.messages").write_text(json.dumps(messages[begun[0] : begun[1]]))


def prepare() -> None:
    """Float64 images, and less of what does not matter here."""
    torch.set_num_threads(1)
    single = instar.data.resident.as_float
    for module in (instar.data.resident, instar.train):
        module.as_float = lambda given: single(given).double()
    instar.description._git_state = lambda: None
    instar.selection.SELECTION_STEPS = 2
    os.fsync = lambda descriptor: None


def main(cases: Path, out: Path) -> int:
    """Train all cases that are for this number of processes; the exit status is 1 if one failed."""
    with launched(torch.device("cpu")) as group:
        for name, case in json.loads(cases.read_text()).items():
            if group.size not in case.get("processes", [1, 2, 4]):
                continue
            folder = out if "out" in case else out / str(group.size)
            try:
                train_case(case | {"name": name}, folder, group)
            except ProcessLost as lost:
                print(f"process {group.rank}: {lost}", file=sys.stderr)
                return 3
            except UserError as error:
                (folder / f"{name}.{group.rank}.error").write_text(str(error))
            except Exception:
                (folder / f"{name}.{group.rank}.traceback").write_text(traceback.format_exc())
                return 1  # the processes are out of step
    return 0


def fork(cases: Path, out: Path, count: int) -> int:
    """Run `main` in so many processes, as ``torchrun`` starts them, without importing torch in each anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                status = main(cases, out)
            finally:
                os._exit(status)
        children.append(child)
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    where = Path(sys.argv[1]), Path(sys.argv[2])
    prepare()
    if "RANK" in os.environ:  # torchrun's
        sys.exit(main(*where))
    sys.exit(sum(fork(*where, int(count)) for count in sys.argv[3:]))
