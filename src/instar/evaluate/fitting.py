"""How many images fit into memory at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from instar.errors import UserError
from instar.evaluate.conditions import BATCH_SIZE
from instar.evaluate.subject import Subject
from instar.room import memory_free

CAUTION = 2.0
"""On the CPU this many times the estimate must be free: attacks hold copies of images beside what backward passes keep,
and a machine that begins to swap is slower than any batch size is worth."""
COPIES = 12
"""Images of a batch that attacks hold beside the model's own memory: FAB's projections keep the most."""


def fitting(subject: Subject, image: Tensor, *, processes: int = 1) -> int:
    """The number of images that are attacked at a time where the user does not say.

    It is the 250 of AutoAttack's reference, halved until it fits: on a GPU until a forward and a backward pass run, on
    the CPU until an estimate of them takes less than half of what is free.

    Args:
        subject: The model.
        image: One image (1, C, H, W) on its device.
        processes: How many processes share the machine's memory; GPUs are not shared.

    Returns:
        A batch size of at least 1.

    Raises:
        UserError: Not even one image fits.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> fitting(Subject(net, net, 2, torch.device("cpu")), torch.rand(1, 1, 2, 2))
        250
    """
    size = BATCH_SIZE
    while not _fits(subject, image, size, processes):
        if size == 1:
            raise UserError(f"not even one image {tuple(image.shape[1:])} fits into the memory of {subject.device}")
        size //= 2
    return size


def _fits(subject: Subject, image: Tensor, size: int, processes: int) -> bool:
    if subject.device.type == "cuda":
        return _runs(subject, image, size)
    # Looked up here: the doctor examines machines and models, and looks at evaluations to tell what they cost.
    from instar.doctor.estimate import memory

    if subject.black_box:
        return True
    free = memory_free(subject.device)
    return free is None or CAUTION * processes * memory(subject.model, image.expand(2, *image.shape[1:]), size) <= free


def _runs(subject: Subject, image: Tensor, size: int) -> bool:
    """Whether the passes of an attack run, beside the images that it holds."""
    try:
        held = torch.zeros((COPIES, size, *image.shape[1:]), device=image.device)
        at = image.repeat(size, 1, 1, 1).requires_grad_()
        with torch.enable_grad():
            torch.autograd.grad(subject.model(at).sum(), at, allow_unused=True)
        del held, at
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
