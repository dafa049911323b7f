"""What the model under examination itself says of attacked images: the verdict that counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instar.errors import UserError
from instar.evaluate.subject import Subject
from instar.signals.losses import lead


@dataclass(frozen=True)
class Verdict:
    """What a model says of images.

    Attributes:
        right: Whether it predicts the label (B,), boolean.
        margin: z_y − max_{j≠y} z_j in logits (B,), float32; below 0 for a wrong prediction.
    """

    right: Tensor
    margin: Tensor

    def replaced(self, rows: Tensor, other: Verdict) -> Verdict:
        """This verdict with that of some rows, given by a mask (B,), taken from another one."""
        right, margin = self.right.clone(), self.margin.clone()
        right[rows], margin[rows] = other.right, other.margin
        return Verdict(right, margin)


@torch.no_grad()
def judged(subject: Subject, images: Tensor, y: Tensor) -> Verdict:
    """The verdict of the model itself, not of a stand-in.

    Args:
        subject: The model.
        images: Attacked images (B, C, H, W).
        y: Labels (B,).

    Returns:
        The verdict.

    Raises:
        UserError: The model returns something else than logits (B, K), or NaN or infinity on finite images.
    """
    logits = subject.model(images)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (len(images), subject.classes):
        raise UserError(
            f"the model must return logits of shape {(len(images), subject.classes)} for {len(images)} attacked "
            f"images; got {shape}. Clean images gave the right shape, so its output depends on what it sees"
        )
    known = torch.isfinite(images).flatten(1).all(1)
    if not bool((torch.isfinite(logits).all(1) | ~known).all()):
        raise UserError(
            "the model returns NaN or infinity on attacked images: its gradients are broken, so no attack can judge it"
        )
    logits = logits.float()
    return Verdict(logits.max(dim=1)[1] == y, -lead(logits, y))
