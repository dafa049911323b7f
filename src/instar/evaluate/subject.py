"""The model under examination: in eval mode, frozen, in float32, and left as it was found."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from instar.attacks import FoldingError, fold
from instar.errors import UserError, one_line
from instar.modes import forward_mode


@dataclass(frozen=True)
class Subject:
    """A model as attacks see it.

    Attributes:
        model: The model itself, in eval mode, without gradients for its parameters. Its verdicts are the ones that
            count.
        stand_in: A faster copy with the same logits up to rounding, or the model itself if it cannot be traced.
        classes: Number of classes K.
        device: Where it lies.
    """

    model: nn.Module
    stand_in: nn.Module
    classes: int
    device: torch.device

    @property
    def folded(self) -> bool:
        """Whether there is a faster copy."""
        return self.stand_in is not self.model

    @property
    def black_box(self) -> bool:
        """Whether only attacks without gradients can be run."""
        return is_black_box(self.model)


@contextlib.contextmanager
def examined(model: nn.Module, images: Tensor, *, device: torch.device) -> Iterator[Subject]:
    """Prepares a model for attacks and leaves it as it was found, also after an error.

    Modes and ``requires_grad`` are restored. A model that lies on another device or is not in float32 is copied and
    the copy examined, so that the caller's is not moved. Autocast and TF32 are off meanwhile.

    Args:
        model: Images (B, C, H, W) in [0, 1] → logits (B, K).
        images: Some images (B, C, H, W) to try it with, float32 on `device`.
        device: Where to run.

    Yields:
        The subject.

    Raises:
        UserError: The model fails on the images, or returns anything but logits.
    """
    tensors = [*model.parameters(), *model.buffers()]
    elsewhere = any(tensor.device != device for tensor in tensors)
    if elsewhere or any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
        model = copy.deepcopy(model).to(device=device, dtype=torch.float32)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with full_precision(device), forward_mode(model, "eval"):
        try:
            for parameter in learned:
                parameter.requires_grad_(False)
            classes = check_logits(model, images)
            yield Subject(model, _stand_in(model, images), classes, device)
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 that is float32: no autocast, and no TF32, whose 10-bit mantissa GPUs use for convolutions by default.

    Args:
        device: Where the model runs.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            owners: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
            for owner in owners:
                stack.callback(setattr, owner, "allow_tf32", owner.allow_tf32)
                owner.allow_tf32 = False
        yield


@torch.no_grad()
def check_logits(model: nn.Module, images: Tensor) -> int:
    """Refuse a model whose outputs cannot be attacked as logits.

    Args:
        model: The model, in eval mode.
        images: Some images (B, C, H, W) in [0, 1].

    Returns:
        Number of classes K.

    Raises:
        UserError: It fails, returns no tensor (B, K) with K ≥ 2, NaN or infinity, or probabilities.

    Example:
        >>> check_logits(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(2, 1, 2, 2))
        3
    """
    shape = tuple(images.shape)
    try:
        logits = model(images)
    except torch.OutOfMemoryError:
        raise UserError(
            f"there is not enough memory for {shape[0]} images {shape[1:]} at a time; give a smaller batch size "
            "(--batch-size)"
        ) from None
    except UserError:
        raise
    except Exception as error:  # any failure of the model means the same: it cannot be evaluated on these images
        raise UserError(
            f"the model failed on images of shape {shape}: {type(error).__name__}: {one_line(error)}. Is it made for "
            "this data set?"
        ) from error
    if not isinstance(logits, Tensor):
        raise UserError(f"the model must return logits (B, K); got {type(logits).__name__}")
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise UserError(
            f"the model must return logits of shape ({shape[0]}, K) with K of at least 2 for {shape[0]} images; got "
            f"{tuple(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            "the model returns NaN or infinity on clean images: its weights are broken, or training diverged"
        )
    sums = logits.float().sum(1)
    if bool((logits >= 0).all() and (logits <= 1 + 1e-5).all() and ((sums - 1).abs() < 1e-5).all()):
        raise UserError(
            "the model returns probabilities; logits are needed, because a softmax hides gradients from attacks. "
            "Leave out the last softmax"
        )
    return int(logits.shape[1])


def is_black_box(model: nn.Module) -> bool:
    """Whether a model gives no gradients: it, or a part of it, has an attribute ``black_box`` that is true.

    Example:
        >>> is_black_box(nn.Linear(2, 2))
        False
    """
    return any(getattr(module, "black_box", False) is True for module in model.modules())


def _stand_in(model: nn.Module, images: Tensor) -> nn.Module:
    """The folded copy if there is one that gives the same logits, else the model."""
    if is_black_box(model):
        return model
    try:
        return fold(model, images)
    except FoldingError:
        return model
