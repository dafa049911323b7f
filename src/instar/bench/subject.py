"""What is timed: a training step of a method, as ``instar train`` makes it or in the style of the published codes."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from instar.attacks import PGD, Captured, Folded, FoldingError, accelerated, fold
from instar.bench.official import Budget, official
from instar.config import (
    Settings,
    build_method,
    build_network,
    choose_acceleration,
    choose_precision,
    find_recipe,
)
from instar.data import DatasetInfo, Images, ResidentImages, TrainSplit, augmentation, batches, info, load
from instar.devices import choose_device
from instar.errors import UserError, unknown
from instar.evidence import Batch
from instar.expression import parse
from instar.instances import InstanceTable
from instar.method import Method
from instar.models import load_foreign
from instar.randomness import generator
from instar.schedules import Progress
from instar.step import training_step

SWITCHES = {
    "fold": "the copy with BatchNorm folded into the convolutions, on which eval-mode attacks run",
    "bf16": "bfloat16 behind the first convolution",
    "channels_last": "NHWC order in memory",
    "input_gradients": "leaving out the weight gradients in the attack",
    "shared_logits": "clean logits computed once for all attack steps",
    "compaction": "leaving out the instances that have stopped, in attacks that stop early",
    "compile": "compiling the passes of the attack (with --accelerate compile or both)",
    "graphs": "capturing the attack as CUDA graphs (with --accelerate graphs, both or auto)",
}
"""Each can be left out of our steps, to see what it gives."""

RANDOM_ROWS = 2048
HELD = 4
"""Batches that the steps go through in turn."""
LR = 0.01
REHEARSALS = 2
"""Steps after which everything is compiled and captured."""


@dataclass(frozen=True)
class Case:
    """One row of the table, in values that another process can be told.

    Attributes:
        recipe: Its recipe's name.
        method: Its expression, ``repr(method)``; schedules included.
        style: ``"instar"``, or ``"official"`` for the baseline.
        without: Names of `SWITCHES` that are left out.
        model: Name of a network.
        width: Channels of its first stage, or None.
        data: ``"random"``, or the name of a data set.
        root: Folder of the data sets.
        init: Weights to begin from, or None.
        batch_size: Instances in a step.
        precision: ``"auto"``, ``"bf16"`` or ``"float32"``; the official style is float32.
        accelerate: ``"none"``, ``"compile"``, ``"graphs"``, ``"both"`` or ``"auto"``, as of `Settings`; the official
            style has none.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        at: Where in the run the schedules stand, in [0, 1].
        seed: Seed of weights, images and attacks.
    """

    recipe: str
    method: str
    style: str = "instar"
    without: tuple[str, ...] = ()
    model: str = "resnet18"
    width: int | None = None
    data: str = "random"
    root: str | None = None
    init: str | None = None
    batch_size: int = 128
    precision: str = "auto"
    accelerate: str = "none"
    device: str = "auto"
    at: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """How tables call it."""
        if self.style == "official":
            return f"{self.recipe}, official style"
        return ", ".join([self.recipe, *(f"without {name}" for name in self.without)])

    def to_json(self) -> dict[str, Any]:
        """Its fields, as JSON holds them."""
        return dataclasses.asdict(self)

    @property
    def acceleration(self) -> str:
        """What is done to the attack, without what is left out: ``none``, ``compile``, ``graphs`` or ``both``.

        Raises:
            UserError: It cannot be done here.
        """
        ways = {"none": set(), "compile": {"compile"}, "graphs": {"graphs"}, "both": {"compile", "graphs"}}
        if self.accelerate not in (*ways, "auto"):
            raise unknown("accelerate", self.accelerate, [*ways, "auto"])
        left = ways[choose_acceleration(self.accelerate, choose_device(self.device))] - set(self.without)
        return next(how for how, parts in ways.items() if parts == left)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Case:
        """The case of `to_json`."""
        return cls(**{**told, "without": tuple(told["without"])})


@dataclass(frozen=True)
class Subject:
    """A case, made ready.

    Attributes:
        step: Makes one update; its argument is the number of the step.
        plain: The same update without compiled or captured parts, of which operations can be counted.
        device: Where.
        precision: Of the convolutions.
        method: With its schedules resolved.
        notes: What a reader should know, such as that the model cannot be folded.
    """

    step: Callable[[int], None]
    plain: Callable[[int], None]
    device: torch.device
    precision: torch.dtype
    method: Method
    notes: list[str] = field(default_factory=list)

    def rehearse(self) -> None:
        """Make steps until whatever is compiled or captured is, so that no clock sees it; nothing where nothing is."""
        if self.step is not self.plain:
            for number in range(REHEARSALS):
                self.step(number)


def known_data(data: str, root: str | None) -> DatasetInfo:
    """What is known about a data set; random images are of CIFAR-10's shape."""
    return info("cifar10" if data == "random" else data, root)


def cases_of(
    methods: Mapping[str, Method | None],
    *,
    without: tuple[str, ...] = (),
    baseline: bool = False,
    common: Mapping[str, Any],
) -> list[Case]:
    """The rows of a table: each method, then itself without each switch, then its baseline where there is one.

    Args:
        methods: Names of recipes, and the methods that are meant if not the recipe's default on the data.
        without: Names of `SWITCHES`, each of which gives a further row for every method.
        baseline: Whether to add the official style of each recipe that has one.
        common: Further fields of `Case`.

    Raises:
        UserError: An unknown recipe or switch.
    """
    from instar.bench.official import OFFICIAL

    for switch in without:
        if switch not in SWITCHES:
            raise unknown("switch", switch, SWITCHES)
    known = known_data(common.get("data", "random"), common.get("root"))
    usual = Settings(ema=0.0)
    found = []
    for name, given in methods.items():
        method = given or build_method(find_recipe(name), {}, info=known, settings=usual)
        case = Case(recipe=name, method=repr(method), **common)
        found.append(case)
        found += [replace(case, without=(switch,)) for switch in without if _matters(switch, method, case)]
        if baseline and name in OFFICIAL:
            found.append(replace(case, style="official", precision="float32", accelerate="none"))
    return found


def _matters(switch: str, method: Method, case: Case) -> bool:
    """Whether a method uses what a switch turns off; otherwise the row would only repeat the first."""
    attack = method.attack
    if switch == "compaction":
        return getattr(attack, "stop", None) is not None
    eager = case.acceleration == "none"  # what is compiled or captured is the folded copy alone
    if switch == "shared_logits":
        return "clean" in attack.needs and eager
    if switch in ("fold", "input_gradients"):
        return getattr(attack, "mode", None) == "eval" and eager
    if switch in ("compile", "graphs"):
        used = getattr(attack, "mode", None) == "eval" and case.acceleration in (switch, "both")
        return used and (switch == "compile" or getattr(attack, "stop", None) is None)
    return switch != "bf16" or case.precision != "float32"


def prepare(case: Case) -> Subject:
    """Everything that a step of a case needs: network, optimiser, images in memory.

    Raises:
        UserError: A name or value that cannot be.
    """
    device = choose_device(case.device)
    images = images_of(case)
    method = _method(case)
    left_out = set(case.without)
    plain = case.style == "official"
    precision = torch.float32 if plain or "bf16" in left_out else choose_precision(case.precision, device)
    channels_last = not plain and "channels_last" not in left_out
    network = _network(case, images, method).to(device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    nesterov = not plain
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    network.train()
    held = _held(case, images, device)
    if plain:
        attack = method.attack
        if not isinstance(attack, PGD) or attack.ball.norm != "Linf":
            raise UserError(f"the official style of {case.recipe} is for PGD in Linf; got {attack!r}")
        steps, step_size = attack.numbers()
        budget, single = Budget(attack.ball.radius, step_size, steps), official(case.recipe)

        def update(number: int) -> None:
            single(network, optimizer, *held[number % len(held)], budget)

        return Subject(update, update, device, precision, method)
    notes: list[str] = []
    if "compaction" in left_out and isinstance(method.attack, PGD):
        method = replace(method, attack=replace(method.attack, compact=False))
    half = None if precision == torch.float32 else precision
    stand_in = None
    if "fold" not in left_out and getattr(method.attack, "mode", None) == "eval":
        try:
            stand_in = fold(network, held[0][0][:4], dtype=half, channels_last=channels_last)
        except FoldingError as error:
            notes.append(f"{case.model} cannot be folded ({error}): the attack runs on the model itself")
    table = InstanceTable(len(images), remembered=tuple(name for name, _ in method.remember), device=device)
    step = eager = _OurStep(case, method, network, optimizer, stand_in, table, held, precision, device)
    if stand_in is not None and case.acceleration != "none":
        faster = accelerated(copy.deepcopy(stand_in), case.acceleration, device, notes.append)
        step = _OurStep(case, method, network, optimizer, faster, table, held, precision, device)
    return Subject(step, eager, device, precision, method, notes)


def _method(case: Case) -> Method:
    if ":" in case.recipe:
        find_recipe(case.recipe)  # imports the user's signals, which the expression names
    method = parse(case.method)
    if not isinstance(method, Method):
        raise UserError(f"a case needs the expression of a Method; got {case.method!r}")
    if not 0 <= case.at <= 1:
        raise UserError(f"at must be a share of the run in [0, 1]; got {case.at}")
    return method.at(Progress(epoch=round(1000 * case.at), epochs=1000))


@functools.lru_cache(maxsize=2)
def _loaded(data: str, root: str | None) -> Images:
    return load(data, split="train", root=root)


def images_of(case: Case) -> Images:
    """The training images of a case, in memory where the data set fits."""
    if case.data != "random":
        return _loaded(case.data, case.root)
    known = known_data("random", None)
    draws = torch.Generator().manual_seed(case.seed)
    rows = max(RANDOM_ROWS, case.batch_size)
    images = torch.randint(256, (rows, *known.shape), generator=draws, dtype=torch.uint8)
    return ResidentImages(images, torch.randint(10, (rows,), generator=draws), known)


def _network(case: Case, images: Images, method: Method) -> nn.Module:
    network = build_network(method, images, model=case.model, width=case.width, seed=case.seed)
    if case.init:
        load_foreign(case.init, network, new_head=True)
    return network


def _held(case: Case, images: Images, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Some batches of the first epoch, on the device."""
    split = TrainSplit(images)
    if case.batch_size > len(split):
        raise UserError(f"batch_size must be at most the {len(split)} training images; got {case.batch_size}")
    stream = batches(
        split,
        batch_size=case.batch_size,
        epoch=0,
        seed=case.seed,
        shuffle=True,
        drop_last=True,
        augment=augmentation("standard", images.info),
        device=device,
        limit=HELD,
    )
    return [(batch.x, batch.y) for batch in stream]


class _OurStep:
    """What ``instar train`` does in a step, but for the weights' average, which the official codes have not either."""

    def __init__(
        self,
        case: Case,
        method: Method,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        stand_in: Folded | Captured | None,
        table: InstanceTable,
        held: list[tuple[Tensor, Tensor]],
        precision: torch.dtype,
        device: torch.device,
    ) -> None:
        self.case, self.method, self.network, self.optimizer = case, method, network, optimizer
        self.stand_in, self.table, self.held = stand_in, table, held
        self.precision, self.device = precision, device

    def __call__(self, number: int) -> None:
        x, y = self.held[number % len(self.held)]
        index = (torch.arange(len(y), device=y.device) + number * len(y)) % len(self.table)
        if self.stand_in is not None:
            self.stand_in.refresh(self.network)
        half = self.precision != torch.float32
        with torch.autocast(self.device.type, dtype=self.precision if half else torch.bfloat16, enabled=half):
            computed, remembered = training_step(
                self.network,
                self.method,
                Batch(x, y, index, memory=self.table.rows(index), shared=self.table.shared),
                self.optimizer,
                generator=generator(self.case.seed, step=number, purpose="attack", device=self.device),
                attacked=self._attacked(x),
            )
        logits = computed.evidence.adv if computed.evidence.adv is not None else computed.evidence.clean
        correct = torch.zeros_like(y, dtype=torch.bool) if logits is None else logits.argmax(1) == y
        known = {"kappa": computed.adversary.kappa, "loss": computed.loss, "correct": correct}
        self.table.write(index, {**remembered, "seen": torch.zeros_like(y), **known})

    def _attacked(self, x: Tensor) -> nn.Module | None:
        """What the attack runs on, which wastes what the case leaves out."""
        attacked: nn.Module | None = self.stand_in
        if "input_gradients" in self.case.without:
            attacked = _EveryGradient(attacked if attacked is not None else self.network)
        if "shared_logits" in self.case.without:
            attacked = _Recomputing(attacked if attacked is not None else self.network, x)
        return attacked


class _EveryGradient(nn.Module):
    """A network whose backward passes compute the weight gradients too, and throw them away."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The logits; where a gradient is wanted, with a backward pass that does all the work."""
        if not x.requires_grad:
            logits: Tensor = self.network(x)
            return logits
        found: Tensor = _Whole.apply(x, self.network)
        return found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, network: nn.Module) -> Tensor:
        ctx.at = x.detach().requires_grad_()
        ctx.weights = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
        with torch.enable_grad():
            ctx.logits = functional_call(network, ctx.weights, (ctx.at,))
        logits: Tensor = ctx.logits.detach()
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.autograd.grad(ctx.logits, [ctx.at, *ctx.weights.values()], upstream, allow_unused=True)
        return found[0], None


class _Recomputing(nn.Module):
    """A network that computes the clean logits again at every attack step, as TRADES' published code does."""

    def __init__(self, network: nn.Module, clean: Tensor) -> None:
        super().__init__()
        self.network, self.clean = network, clean

    def forward(self, x: Tensor) -> Tensor:
        """The logits of `x`."""
        if x.requires_grad:
            with torch.no_grad():
                self.network(self.clean)
        logits: Tensor = self.network(x)
        return logits
