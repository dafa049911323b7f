"""How long suites of attacks would take here, and how much memory, from a few timed batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from instar.attacks import PGD
from instar.doctor.report import Cost
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.compaction import compacts
from instar.evaluate.entries import ONCE_WRONG, Entry, Suite
from instar.evaluate.examine import budget, withstands
from instar.evaluate.subject import Subject
from instar.evidence import Batch
from instar.signals import Margin
from instar.threat import Ball

SIZES = (8, 32, 64, 128, 250, 500)
REPEATS = 3
NO_GRADIENT = ("black box", "noise")
FEW_STEPS = 5
"""Steps after which an attack has broken a whole batch of an undefended model."""


@dataclass(frozen=True)
class Pace:
    """Seconds an image takes at the batch size of an evaluation.

    Attributes:
        forward: A forward pass of the model.
        both: A forward and a backward pass to the input on the model, which AutoAttack attacks.
        stand_in: The same on the copy that other attacks run on.
        memory: Bytes of a whole batch, weights and images included.
    """

    forward: float
    both: float
    stand_in: float
    memory: int


def measure(subject: Subject, x: Tensor, y: Tensor, *, batch_size: int, seconds: float = 4.0) -> Pace:
    """Time forward and backward passes, at the batch size if that is affordable, else extrapolated from smaller ones.

    Args:
        subject: The model.
        x: Images (n, C, H, W) on its device; repeated to fill batches.
        y: Labels (n,).
        batch_size: Images that are attacked at a time.
        seconds: Time that may be spent on each kind of pass, about.

    Returns:
        The pace.
    """
    black_box = subject.black_box

    def forward(images: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            subject.model(images)

    def both(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
        def passes(images: Tensor, labels: Tensor) -> None:
            at = images.detach().requires_grad_()
            with torch.enable_grad():
                loss = torch.nn.functional.cross_entropy(model(at), labels, reduction="sum")
                torch.autograd.grad(loss, at, allow_unused=True)

        return passes

    sizes = [*(size for size in SIZES if size < batch_size), batch_size]
    timed = _Timed(subject.device, x, y, sizes, seconds)
    once = timed(forward)
    if black_box:
        return Pace(once, once, once, _weights(subject.model) + 4 * x[0].numel() * batch_size * 4)
    slow = timed(both(subject.model))
    fast = timed(both(subject.stand_in)) if subject.folded else slow
    return Pace(once, slow, fast, memory(subject.model, x, batch_size))


@dataclass(frozen=True)
class _Timed:
    device: torch.device
    x: Tensor
    y: Tensor
    sizes: list[int]
    seconds: float

    def __call__(self, passes: Callable[[Tensor, Tensor], None]) -> float:
        """Seconds an image at the largest size, on the line through the two largest that could be timed."""
        found: list[tuple[int, float]] = []
        spent = 0.0
        for size in self.sizes:
            rows = torch.arange(size, device=self.x.device) % len(self.x)
            images, labels = self.x[rows], self.y[rows]
            once = min(self._once(passes, images, labels) for _ in range(1 if found and spent > 1 else REPEATS))
            found.append((size, once))
            spent += REPEATS * once
            following = [other for other in self.sizes if other > size]
            if not following:
                break
            foreseen = spent + REPEATS * once * following[0] / size
            if foreseen > self.seconds * (1 if len(found) > 1 else 4):  # one size alone says little about another
                break
        last, wanted = found[-1], self.sizes[-1]
        if len(found) == 1 or last[0] == wanted:
            return last[1] / last[0]
        before = found[-2]
        slope = max((last[1] - before[1]) / (last[0] - before[0]), 0.5 * last[1] / last[0])
        return (last[1] + slope * (wanted - last[0])) / wanted

    def _once(self, passes: Callable[[Tensor, Tensor], None], images: Tensor, labels: Tensor) -> float:
        _wait(self.device)
        begun = time.perf_counter()
        passes(images, labels)
        _wait(self.device)
        return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _weights(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def memory(model: nn.Module, x: Tensor, batch_size: int) -> int:
    """Bytes that an attack on a batch holds at once: weights, what the backward pass keeps, and images.

    Args:
        model: The model.
        x: Some images (n, C, H, W).
        batch_size: Images in a batch.

    Returns:
        An estimate from the tensors that autograd keeps for two images.
    """
    few = x[:2].detach().clone().requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(few)
    del logits
    largest = max(kept.values(), default=0)
    each = (sum(kept.values()) + 2 * largest) / len(few) + 8 * x[0].numel() * x.element_size()
    return int(_weights(model) + each * batch_size)


def standing(subject: Subject, x: Tensor, y: Tensor, ball: Ball, *, seed: int = 0) -> tuple[float, float]:
    """Which share of images is classified correctly, and which share withstands margin PGD-10.

    The margin, because most of a suite's time goes to attacks that flat or saturated logits do not mislead.

    Args:
        subject: The model.
        x: Images (n, C, H, W).
        y: Labels (n,).
        ball: The threat model.
        seed: Of the random start.

    Returns:
        Both shares, in [0, 1]; a model without gradients is taken to withstand.
    """
    with torch.no_grad():
        right = subject.model(x).argmax(1) == y
    clean = float(right.float().mean())
    if subject.black_box or not bool(right.any()):
        return clean, clean
    attack = PGD(ball, Margin(), steps=10, step_size=ball.radius / 4, stop=ONCE_WRONG)
    draws = torch.Generator(device=subject.device).manual_seed(seed)
    robust = withstands(attack, subject, Batch(x[right], y[right]), draws)
    return clean, float(robust.sum()) / len(y)


def cost(suite: Suite, pace: Pace, *, images: int, classes: int, clean: float, robust: float) -> Cost:
    """What a suite would take.

    Args:
        suite: The attacks.
        pace: Seconds of passes.
        images: Images it is run on.
        classes: Number of classes K.
        clean: Share classified correctly.
        robust: Share expected to withstand.

    Returns:
        The cost, clean predictions included.
    """
    images = min(images, suite.images or images)
    least = most = expected = images * pace.forward
    for entry in suite.entries:
        alive = images if entry.everyone else images * clean
        for place, part in enumerate(_parts(entry, classes, pace)):
            most += alive * part.full
            least += alive * part.least if place == 0 else 0.0
            standing = images * robust
            if place > 0:
                expected += standing * part.full
            elif _leaves(entry.attack):  # a broken image leaves the batch
                expected += standing * part.full + (alive - standing) * part.least
            else:  # a stopped attack is over when the last image of its batch is broken
                expected += alive * (part.full if standing >= 1 else part.least)
    return Cost(suite.name, images, suite.forwards(classes), least, most, expected, pace.memory)


@dataclass(frozen=True)
class _Part:
    """Seconds an image of one part of an attack: at full length, and if every image is broken at once."""

    full: float
    least: float


def _parts(entry: Entry, classes: int, pace: Pace) -> list[_Part]:
    """The parts of an attack; only the first sees images that were broken."""
    told = budget(entry.attack, classes)
    if isinstance(entry.attack, AutoAttack):
        return [_Part(seconds, seconds) for seconds in (_stage(stage, pace) for stage in told["stages"])]
    forwards = float(told.get("forwards", 0))
    if entry.kind in NO_GRADIENT:
        begun, rest = 0.1 * forwards * pace.forward, 0.9 * forwards * pace.forward  # what breaks, mostly breaks early
        return [_Part(begun, begun), _Part(rest, rest)]
    restarts = max(int(told.get("targets", told.get("restarts", 1))), 1)
    each = forwards * pace.stand_in / 2 / restarts
    stops = getattr(_descent(entry.attack), "stop", None) is not None
    first = _Part(each, min(each, FEW_STEPS * pace.stand_in) if stops else each)
    return [first, _Part((restarts - 1) * each, 0.0)]


def _descent(attack: object) -> object:
    """The attack that restarts, targets and diversified starts repeat."""
    while not isinstance(attack, PGD) and hasattr(attack, "attack"):
        attack = attack.attack
    return attack


def _leaves(attack: object) -> bool:
    """Whether an image leaves the batch once it is broken: looked at by the evaluation, or by the descent itself."""
    one = _descent(attack)
    if not isinstance(one, PGD) or one.stop is None:
        return False
    return compacts(one) if one is attack else one.may_leave(one.stop)


def _stage(stage: Mapping[str, int | str], pace: Pace) -> float:
    steps, queries = int(stage.get("steps", 0)), int(stage.get("queries", 0))
    # FAB asks for one more forward pass a step; untargeted, it differentiates every logit.
    passes = {"fab-t": 1.5, "fab": (2 + int(stage.get("classes", 1))) / 2}.get(str(stage["name"]), 1.0)
    rounds = int(stage.get("restarts", 1)) * int(stage.get("targets", 1)) * max(int(stage.get("samples", 1)), 1)
    return passes * steps * rounds * pace.both + queries * pace.forward
