"""Training steps in the style of the published codes, written from the descriptions of their algorithms: the baseline.

They do what those codes do and a fast one need not: everything in float32 and NCHW, BatchNorm recomputed in attacks in
eval mode, weight gradients that are computed in the attack and thrown away (PGD-AT, GAIRAT), clean logits computed anew
at each attack step (TRADES), and a Python loop over instances that counts κ (GAIRAT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar.errors import unknown


@dataclass(frozen=True)
class Budget:
    """What an attack in Linf may do.

    Attributes:
        eps: Radius, inputs in [0, 1].
        step_size: Length of a step.
        steps: Number of steps.
    """

    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10


OfficialStep = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor, Budget], None]
"""One update of a model in place, from its optimizer, images (B, C, H, W) in [0, 1], labels (B,) and a budget."""


def pgd_at(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, budget: Budget) -> None:
    """PGD-AT: the attack runs in eval mode, as in the codes that GAIRAT and FAT compare with (Rice et al.: train mode).

    Source: Madry et al. 2018; Rice et al. 2020 for ``loss.backward()`` in each attack step.
    """
    model.eval()
    moved = torch.clamp(x + torch.empty_like(x).uniform_(-budget.eps, budget.eps), 0, 1)
    for _ in range(budget.steps):
        moved.requires_grad_()
        model.zero_grad()
        F.cross_entropy(model(moved), y).backward()
        moved = _step(moved, x, budget)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(moved), y).backward()
    optimizer.step()


def gairat(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, budget: Budget) -> None:
    """GAIRAT behind its burn-in: κ is counted by a loop over instances, in each attack step.

    Source: Zhang et al. 2021, Algorithms 1 and 2, with the weight of equation 6 (λ = −1).
    """
    model.eval()
    kappa = torch.zeros(len(x))
    moved = torch.clamp(x + torch.empty_like(x).uniform_(-budget.eps, budget.eps), 0, 1)
    for _ in range(budget.steps):
        moved.requires_grad_()
        logits = model(moved)
        predicted = logits.max(1)[1]
        for place in range(len(x)):
            if predicted[place] == y[place]:
                kappa[place] += 1
        model.zero_grad()
        F.cross_entropy(logits, y).backward()
        moved = _step(moved, x, budget)
    model.train()
    optimizer.zero_grad()
    weight = (1 + torch.tanh(-1.0 + 5 * (1 - 2 * kappa / max(budget.steps, 1)))) / 2
    weight = (weight * len(weight) / weight.sum()).to(x.device)
    F.cross_entropy(model(moved), y, reduction="none").mul(weight).mean().backward()
    optimizer.step()


def trades(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, budget: Budget) -> None:
    """TRADES, β = 6: clean logits at each attack step, and three forward passes behind the attack.

    Source: Zhang et al. 2019. The attack takes gradients of the input only; its graph includes the clean logits.
    """
    model.eval()
    moved = x + 0.001 * torch.randn_like(x)
    for _ in range(budget.steps):
        moved.requires_grad_()
        moved_log, clean = F.log_softmax(model(moved), 1), F.softmax(model(x), 1)
        (gradient,) = torch.autograd.grad(F.kl_div(moved_log, clean, reduction="sum"), moved)
        moved.grad = gradient
        moved = _step(moved, x, budget)
    model.train()
    optimizer.zero_grad()
    natural = F.cross_entropy(model(x), y)
    moved_log, clean = F.log_softmax(model(moved), 1), F.softmax(model(x), 1)
    (natural + 6.0 * F.kl_div(moved_log, clean, reduction="batchmean")).backward()
    optimizer.step()


def _step(moved: Tensor, x: Tensor, budget: Budget) -> Tensor:
    """A signed step along ``moved.grad``, back into the ball and the box."""
    assert moved.grad is not None
    stepped = moved.detach() + budget.step_size * moved.grad.sign()
    return torch.min(torch.max(stepped, x - budget.eps), x + budget.eps).clamp(0, 1)


OFFICIAL: dict[str, OfficialStep] = {"pgd_at": pgd_at, "trades": trades, "gairat": gairat}
"""The steps that there are, by the name of the recipe that does the same."""


def official(name: str) -> OfficialStep:
    """The official-style step of a recipe.

    Raises:
        UserError: There is none.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> before = net[1].weight.clone()
        >>> official("gairat")(net, optimizer, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), Budget(steps=2))
        >>> bool((net[1].weight != before).any())
        True
    """
    if name not in OFFICIAL:
        raise unknown("official-style step", name, OFFICIAL)
    return OFFICIAL[name]
