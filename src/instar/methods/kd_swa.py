"""KD+SWA: distillation from two teachers and averaged weights, against robust overfitting (Chen et al. 2021)."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.attacks import PGD
from instar.errors import UserError
from instar.evidence import Evidence
from instar.expression import value
from instar.method import Method
from instar.models import load
from instar.models.precision import without_autocast
from instar.modes import full
from instar.schedules import Schedule
from instar.signals import CrossEntropy, Signal
from instar.threat import ball
from instar.weightspace import SWA


@value
class Distillation(Signal):
    """T² KL(softmax(t / T) ‖ softmax(z′ / T)): how far the prediction on x′ is from a teacher's t on the same image.

    Attributes:
        teacher: Weights of the teacher, a ``.safetensors`` file beside its card.
        sha256: What the file must hash to, so that a run cannot go on with another teacher. Empty asks for nothing.
        temperature: T > 0.

    Raises:
        UserError: A temperature that is not positive; at the first call, a file that is missing or another one, or a
            teacher of other classes.

    Source: Chen et al. 2021, Eq. 4; Hinton et al. 2015.
    """

    teacher: str
    sha256: str = ""
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check the temperature."""
        if not self.temperature > 0:
            raise UserError(f"temperature of Distillation must be positive; got {self.temperature}")

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits; the images themselves are always there."""
        return frozenset({"adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Loss (B,)."""
        logits, x = evidence.logits("adv"), evidence.x_adv if evidence.x_adv is not None else evidence.x
        network = _teacher(self.teacher, self.sha256, str(x.device))
        with torch.no_grad(), without_autocast(x.device.type):
            taught = full(network(x.detach().float())).to(logits.dtype)
        if taught.shape != logits.shape:
            raise UserError(f"the teacher {self.teacher} knows {taught.shape[1]} classes, the model {logits.shape[1]}")
        target = F.log_softmax(taught / self.temperature, 1)
        student = F.log_softmax(logits / self.temperature, 1)
        return self.temperature**2 * (target.exp() * (target - student)).sum(1)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the teacher {path}: {error.strerror or error}") from None


@functools.lru_cache(maxsize=8)
def _teacher(path: str, sha256: str, device: str) -> nn.Module:
    found = file_hash(path)
    if sha256 and found != sha256:
        raise UserError(f"the teacher {path} is another file than the run began with: sha256 {found[:12]}…")
    return load(path).requires_grad_(False).eval().to(device)


def kd_swa(
    *,
    standard: str | None = None,
    robust: str | None = None,
    standard_weight: float = 0.1,
    robust_weight: float = 0.6,
    temperature: float = 2.0,
    begin: float = 55 / 200,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """KD+SWA: adversarial training that learns from a natural and a robust teacher, with averaged weights.

    Equation:
        min_θ mean_i [ (1 − a − b) CE(f(x′_i), y_i) + a KD(t_standard(x′_i), f(x′_i)) + b KD(t_robust(x′_i), f(x′_i)) ],
        KD(t, z) = T² KL(softmax(t / T) ‖ softmax(z / T)); the mean of the weights over epochs is evaluated

    Args:
        standard: Weights of a naturally trained teacher (``runs/natural-.../checkpoints/last.safetensors``), or None.
        robust: Weights of an adversarially trained teacher, or None.
        standard_weight: a; 0.1 in the paper. Without that teacher it is 0.
        robust_weight: b; 0.6 in the paper. Without that teacher it is 0.
        temperature: T.
        begin: When averaging begins; 55 of 200 epochs.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: Step of the attack.
        steps: Attack steps.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method; the teachers' hashes are part of it. With both weights 0 it is PGD-AT with SWA.

    Raises:
        UserError: No teacher, one that cannot be read, weights outside of [0, 1], or an impossible radius or step.

    Source: Chen et al. 2021; official code for the weights (0.3, 0.1, 0.6) and times.
    Deviations: the attack runs in eval mode; the official code's in train mode.
    """
    if standard is None and robust is None:
        raise UserError(
            "KD+SWA needs a teacher: --standard WEIGHTS, --robust WEIGHTS, or both, each a .safetensors file"
        )
    loss: Signal | None = None
    rest = 1.0
    for path, weight in ((standard, standard_weight), (robust, robust_weight)):
        if path is not None:
            rest -= weight
            term = weight * Distillation(str(path), file_hash(path), temperature)
            loss = term if loss is None else loss + term
    if not (0 <= rest <= 1 and standard_weight >= 0 and robust_weight >= 0) or loss is None:
        raise UserError(f"weights of the teachers must lie in [0, 1] together; got {standard_weight}, {robust_weight}")
    attack = PGD(ball(norm, eps), steps=steps, step_size=step_size)
    return Method(attack, round(rest, 12) * CrossEntropy() + loss, average=SWA(begin))
