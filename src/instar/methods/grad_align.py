"""GradAlign: input gradients that point the same way all over the ball (Andriushchenko & Flammarion 2020)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from instar.attacks import PGD, Zero
from instar.errors import UserError
from instar.evidence import UNLABELLED, Evidence
from instar.expression import value
from instar.method import Method
from instar.models.precision import without_autocast
from instar.schedules import Schedule, lowest
from instar.signals import CrossEntropy, Signal
from instar.threat import ball


@value
class GradientMisalignment(Signal):
    """1 − cos(∇_x CE(x), ∇_x CE(x + u)), u a random point of the ball; only the second gradient is differentiated.

    Instances with a zero gradient count 0, and the others so much more that the batch's mean is that over them. It
    costs two forward passes and three backward passes, one of them through a gradient; all are in at least float32.

    Source: Andriushchenko & Flammarion 2020, Eq. 4; official code.
    Deviations: the two forward passes do not update BatchNorm's running statistics.
    """

    couples: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """The model itself, and random numbers."""
        return frozenset({"forward", "generator"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Misalignment (B,) in [0, 2] where all gradients are nonzero."""
        if evidence.ball is None:
            raise UserError("GradientMisalignment looks at the ball of the attack, and this method's attack has none")
        through = torch.is_grad_enabled()
        ball, draws = evidence.ball, evidence.generator
        noise = evidence.part.drawn(lambda images: ball.sample(images, draws), evidence.x)
        with torch.enable_grad(), without_autocast(evidence.x.device.type):
            here = self._gradient(evidence, evidence.x, graph=False)
            there = self._gradient(evidence, evidence.x + noise, graph=through)
        sizes = here.norm(dim=1), there.detach().norm(dim=1)
        kept = (sizes[0] > 0) & (sizes[1] > 0) & (evidence.y != UNLABELLED)
        gap = torch.where(kept, 1 - F.cosine_similarity(here, there, dim=1), torch.zeros_like(sizes[0]))
        return gap * evidence.batchwide(_stretch, kept)

    @staticmethod
    def _gradient(evidence: Evidence, x: Tensor, *, graph: bool) -> Tensor:
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(evidence.forward(x), evidence.y, reduction="sum", ignore_index=UNLABELLED)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=graph)
        return gradient.flatten(1)


def _stretch(kept: Tensor) -> Tensor:
    """The factor (B,) that turns a mean over all instances into one over those that are kept."""
    return (len(kept) / kept.sum().clamp_min(1)).expand(len(kept))


def grad_align(
    *,
    alignment: float | Schedule | None = None,
    eps: float | Schedule = 8 / 255,
    norm: str = "Linf",
) -> Method:
    """GradAlign: FGSM-AT whose input gradients must point the same way all over the ball.

    Equation:
        min_θ mean_i [ CE(f(x_i + ε sign ∇CE(x_i)), y_i) + λ (1 − cos(∇_x CE(x_i), ∇_x CE(x_i + u_i))) ],
        u_i uniform in the ball

    Args:
        alignment: λ; None is the paper's rule 0.02 · 10^(255 ε / 8): 0.2 at 8/255, 2 at 16/255.
        eps: Radius in the unit of inputs in [0, 1].
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. With λ = 0 it is FGSM-AT.

    Raises:
        UserError: A negative λ, an impossible radius or norm, or a schedule of ε without a λ.

    Example:
        >>> grad_align(eps=16/255).loss
        CrossEntropy() + 2.0 * GradientMisalignment()

    Source: Andriushchenko & Flammarion 2020; official code.
    Deviations: see `GradientMisalignment`.
    """
    if alignment is None:
        if isinstance(eps, Schedule):
            raise UserError("the usual alignment follows from eps: give alignment too where eps is a schedule")
        alignment = round(0.02 * 10 ** (255 * eps / 8), 6)
    if not lowest(alignment) >= 0:
        raise UserError(f"alignment of GradAlign (λ) must be at least 0; got {alignment}")
    attack = PGD(ball(norm, eps), steps=1, step_size=eps, start=Zero(), mode="train")
    return Method(attack, CrossEntropy() + alignment * GradientMisalignment(), updates_bn=("adv",))
