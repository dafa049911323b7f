"""Free-AT: one gradient for the weights and for the perturbation (Shafahi et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from instar.attacks import PGD, Zero
from instar.errors import UserError
from instar.evidence import Adversary, Batch, Evidence
from instar.expression import value
from instar.method import Method, Step
from instar.models.heads import logit_scale
from instar.modes import forward_mode, full
from instar.schedules import Schedule
from instar.signals import CrossEntropy
from instar.step import Loss, detached, joined, remembered
from instar.threat import ball

PERTURBATION = "free.perturbation"


@value
class Replays(Step):
    """Several updates on one batch, each with one backward pass that gives the gradients of weights *and* input.

    The perturbation is kept from replay to replay and from batch to batch (it belongs to the place in the batch, not to
    the instance); it is in the run's state and survives a resume.

    Attributes:
        count: m, replays of each batch.

    Raises:
        UserError: Fewer than one replay.

    Source: Shafahi et al. 2019, Algorithm 1.
    """

    count: int = 8

    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the count."""
        if self.count < 1:
            raise UserError(f"count of Replays (m) must be at least 1; got {self.count}")

    def check(self, method: Method) -> None:
        """Refuse parts that sharing one gradient leaves no room for; see `Step`."""
        attack = method.attack
        if not isinstance(attack, PGD) or attack.stop is not None or attack.objective != CrossEntropy():
            raise UserError("Replays takes ball and step size of a PGD on CrossEntropy() without a stop rule")
        if (attack.steps, attack.start, attack.mode) != (1, Zero(), "train") or method.updates_bn != ("adv",):
            raise UserError(
                "Replays makes its own forward passes: steps=1, start=Zero(), mode='train', updates_bn=('adv',)"
            )
        if method.loss.needs != {"adv"}:
            raise UserError(f"Replays sees adversarial logits only, for it shares one gradient; got {method.loss!r}")
        if method.perturbation is not None:
            raise UserError("Replays leaves no room for a weight perturbation")

    def __call__(
        self,
        model: nn.Module,
        method: Method,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        **options: Any,
    ) -> tuple[Loss, dict[str, Tensor]]:
        """Make the step; the loss returned is that of the last replay."""
        attack = method.attack
        assert isinstance(attack, PGD)
        _, step_size = attack.numbers()
        pieces = batch.split(options.get("accumulate", 1))
        offsets = _rows_of(pieces, batch)
        kappas = [torch.zeros(len(piece), dtype=torch.int32, device=batch.y.device) for piece in pieces]
        for replay in range(self.count):
            optimizer.zero_grad(set_to_none=True)
            done = []
            for place, piece in enumerate(pieces):
                moved = (piece.x + offsets[place]).clamp(0.0, 1.0).detach().requires_grad_()
                inspected = torch.full_like(kappas[place], replay)
                with forward_mode(model, "train"):
                    evidence = Evidence(
                        x=piece.x,
                        y=piece.y,
                        adv=full(model(moved)),
                        x_adv=moved,
                        kappa=kappas[place],
                        inspected=inspected,
                        budget=self.count,
                        index=piece.index,
                        memory=piece.memory,
                        target=piece.target,
                        labelled=piece.labelled,
                        source=piece.source,
                        ball=attack.ball,
                        scale=logit_scale(model),
                        shared=piece.shared,
                        batchwide=piece.part.batchwide,
                        part=piece.part,
                    )
                    loss = method.loss(evidence)
                    piece.part.mean(loss).backward()
                gradient = moved.grad
                assert gradient is not None
                with torch.no_grad():
                    kappas[place] = kappas[place] + (evidence.logits("adv").argmax(1) == piece.y)
                    stepped = piece.x + offsets[place] + step_size * attack.ball.steepest(gradient, moved)
                    offsets[place] = attack.ball.project(stepped, piece.x) - piece.x
                counts = torch.full_like(kappas[place], self.count)
                found = Adversary(moved.detach(), kappas[place], counts, counts - 1, self.count)
                done.append(detached(Loss(loss, found, evidence)))
            batch.part.group.add_up([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
        batch.shared[PERTURBATION] = batch.part.gather(torch.cat(offsets))
        computed = joined(done, batch)
        return computed, remembered(method, computed)


def _rows_of(pieces: Sequence[Batch], batch: Batch) -> list[Tensor]:
    """The pieces' rows of the perturbation that the last global batch left behind; zeros where there is none."""
    left = batch.shared.get(PERTURBATION)
    if left is None or left.shape != (batch.part.size(batch.y), *batch.x.shape[1:]):
        return [torch.zeros_like(piece.x) for piece in pieces]
    return [piece.part.of(left) for piece in pieces]


def free_at(
    *,
    replays: int = 8,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule | None = None,
    norm: str = "Linf",
) -> Method:
    """Free-AT: every backward pass moves the weights and the perturbation, and each batch is replayed.

    Equation:
        m times on each batch:  θ ← θ − lr ∇_θ CE(f(x + δ), y),   δ ← Π(δ + α sign ∇_x CE(f(x + δ), y))

    An epoch costs m epochs of natural training: divide the epochs of other methods by m.

    Args:
        replays: m; 8 for CIFAR-10, 4 for ImageNet.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: α; None is ε.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method, with a step of its own; parts that mean nothing then are refused.

    Raises:
        UserError: Fewer than one replay, or an impossible radius, step or norm.

    Example:
        >>> free_at(replays=4).step
        Replays(4)

    Source: Shafahi et al. 2019; official code.
    Deviations: δ is kept inside the box [0, 1] around the current images too, and its gradient is taken at the clipped
        image.
    """
    attack = PGD(
        ball(norm, eps), steps=1, step_size=eps if step_size is None else step_size, start=Zero(), mode="train"
    )
    return Method(attack, CrossEntropy(), updates_bn=("adv",), step=Replays(int(replays)))
