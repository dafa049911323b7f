"""The norm of a gradient, and a limit on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from instar.errors import UserError


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all the tensors together, on their device; sharded ones count with all of their shards.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    norm = torch.nn.utils.get_total_norm(list(tensors))
    whole = getattr(norm, "full_tensor", None)
    return norm if whole is None else whole()


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The 2-norm of the gradients of all parameters of an optimiser; nothing waits for the device.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norm(torch.optim.SGD([weight], lr=0.1))
        tensor(5.)
    """
    return total_norm(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float) -> torch.utils.hooks.RemovableHandle:
    """From now on the gradient is scaled down to a norm of at most `limit` before each step of an optimiser.

    g ← g · min(1, limit / (‖g‖ + 10⁻⁶)), with the norm over all parameters and, of several processes, over the gradient
    of the global batch. What a weight perturbation adds for its weight decay is part of g; the decay that the optimiser
    adds by itself is not.

    Args:
        optimizer: Of any step, those of Free-AT included.
        limit: Largest 2-norm, above 0.

    Returns:
        A handle, whose ``remove()`` ends it.

    Raises:
        UserError: `limit` is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = clip_gradients(optimizer, 1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])

    Source: Pascanu et al. 2013.
    """
    if not limit > 0:
        raise UserError(f"clip_grad must be the largest norm of a gradient, above 0, for example 1; got {limit}")

    def clip(stepping: torch.optim.Optimizer, arguments: Any, options: Any) -> None:
        parameters = [p for group in stepping.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, limit)

    return optimizer.register_step_pre_hook(clip)
