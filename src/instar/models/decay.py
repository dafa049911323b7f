"""Which parameters weight decay acts on."""

from __future__ import annotations

from typing import Any

from torch import nn

from instar.errors import UserError


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_norm: bool = True) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with or without weight decay of normalisation parameters and biases.

    Args:
        model: Any network; parameters that need no gradient are left out.
        weight_decay: Coefficient of the decay, 0 or larger; 5e-4 is usual in adversarial training on CIFAR.
        decay_norm: Whether parameters of at most one dimension (scales and shifts of normalisation layers, biases,
            layer scales) and those that a timm model exempts decay too. True is what the official code of TRADES,
            GAIRAT and AWP does.

    Returns:
        One group of everything, or two: what decays, and what does not with ``weight_decay`` 0. Empty groups are left
        out.

    Raises:
        UserError: If ``weight_decay`` is negative.

    Source:
        ``decay_norm=False``: He et al. 2019, "Bag of Tricks for Image Classification", section 3.1; Pang et al. 2021,
        "Bag of Tricks for Adversarial Training", section 3.4, on how much the value of weight decay matters.
    Deviations: none.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(net, 5e-4, decay_norm=False)]
        [(1, 0.0005), (2, 0.0)]
    """
    if not weight_decay >= 0:
        raise UserError(f"weight_decay must be 0 or larger; got {weight_decay!r}. 5e-4 is usual on CIFAR.")
    exempt = _exempt(model) if not decay_norm else set()
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = not decay_norm and (parameter.ndim <= 1 or name in exempt)
            (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _exempt(model: nn.Module) -> set[str]:
    """Full names of what timm models list in ``no_weight_decay()``: class tokens, position embeddings, ..."""
    found = set()
    for path, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            found |= {f"{path}.{name}" if path else name for name in listed()}
    return found
