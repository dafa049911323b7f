"""Adversarial perturbations of the weights."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from instar.errors import UserError
from instar.expression import value
from instar.schedules import Schedule
from instar.sharding import norms
from instar.signals import Signal

Parameters = Mapping[str, Tensor]


class Perturbation(abc.ABC):
    """From the weights, and the loss as a function of them, to offsets at which the gradient is taken.

    Perturbed weights exist only as ``functional_call(model, weights + offsets)``: nothing has to be restored. Where
    weights lie in shards (`instar.sharding`), so do the parameters and offsets here; lengths are those of `norms`.
    """

    @property
    @abc.abstractmethod
    def active(self) -> bool:
        """Whether it does anything at all; a radius of 0 costs nothing."""

    @property
    @abc.abstractmethod
    def objective(self) -> Signal | None:
        """What the weights ascend; None means the method's own loss."""

    @abc.abstractmethod
    def __call__(self, parameters: Parameters, loss_of: Callable[[Parameters], Tensor]) -> dict[str, Tensor]:
        """The offsets.

        Args:
            parameters: Trainable parameters by name.
            loss_of: The scalar to ascend as a function of the parameters, at a fixed batch and adversary.

        Returns:
            Offsets by name, detached, for the parameters that move.
        """


def _gradients(parameters: Parameters, loss_of: Callable[[Parameters], Tensor]) -> dict[str, Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss_of(leaves), list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def _check_radius(owner: str, name: str, radius: float | Schedule) -> None:
    if not isinstance(radius, Schedule) and not 0 <= radius < math.inf:
        raise UserError(f"{name} of {owner} must be a number of at least 0; got {radius}")


@value
class AWP(Perturbation):
    """Adversarial weight perturbation: one ascent step, as long as `gamma` times each weight tensor.

    v_l = γ ‖w_l‖_F · g_l / ‖g_l‖_F for every tensor with two dimensions or more (convolutions, linear layers), 0 for
    biases and normalisation.

    Attributes:
        gamma: γ, relative length; 5e-3 to 1e-2 in the papers, 0 switches it off. May be a `Schedule`.
        ascend: What the weights ascend; None takes the method's loss.

    Raises:
        UserError: A negative γ.

    Example:
        >>> offsets = AWP(0.1)({"w": torch.tensor([[3.0, 4.0]])}, lambda p: p["w"].sum())
        >>> offsets["w"]
        tensor([[0.3536, 0.3536]])

    Source: Wu et al. 2020, official code.
    """

    gamma: float | Schedule = 5e-3
    ascend: Signal | None = None

    def __post_init__(self) -> None:
        """Check γ."""
        _check_radius("AWP", "gamma", self.gamma)

    @property
    def active(self) -> bool:
        """True for a γ above 0."""
        return isinstance(self.gamma, Schedule) or self.gamma > 0

    @property
    def objective(self) -> Signal | None:
        """`ascend`."""
        return self.ascend

    def __call__(self, parameters: Parameters, loss_of: Callable[[Parameters], Tensor]) -> dict[str, Tensor]:
        """Offsets of the weight tensors; see `Perturbation`."""
        if isinstance(self.gamma, Schedule):
            raise UserError(f"gamma is still the schedule {self.gamma!r}: use method.at(progress) first")
        found = {name: g for name, g in _gradients(parameters, loss_of).items() if g.ndim >= 2}
        lengths = iter(norms([*(parameters[name].detach() for name in found), *found.values()]))
        of_weights = [self.gamma * next(lengths) for _ in found]
        # 1e-20 as in the official code; a zero gradient then gives a zero offset.
        return {
            name: most * g / (next(lengths) + 1e-20) for (name, g), most in zip(found.items(), of_weights, strict=True)
        }


@value
class SAM(Perturbation):
    """Sharpness-aware minimisation: one ascent step of length `rho` over all parameters together.

    v = ρ g / ‖g‖₂

    Attributes:
        rho: ρ, 0.05 in the paper; 0 switches it off. May be a `Schedule`.
        ascend: What the weights ascend; None takes the method's loss.

    Raises:
        UserError: A negative ρ.

    Example:
        >>> SAM(0.5)({"w": torch.tensor([3.0])}, lambda p: 2 * p["w"].sum())["w"]
        tensor([0.5000])

    Source: Foret et al. 2021, Eq. 2 with p = 2.
    """

    rho: float | Schedule = 0.05
    ascend: Signal | None = None

    def __post_init__(self) -> None:
        """Check ρ."""
        _check_radius("SAM", "rho", self.rho)

    @property
    def active(self) -> bool:
        """True for a ρ above 0."""
        return isinstance(self.rho, Schedule) or self.rho > 0

    @property
    def objective(self) -> Signal | None:
        """`ascend`."""
        return self.ascend

    def __call__(self, parameters: Parameters, loss_of: Callable[[Parameters], Tensor]) -> dict[str, Tensor]:
        """Offsets of all parameters; see `Perturbation`."""
        if isinstance(self.rho, Schedule):
            raise UserError(f"rho is still the schedule {self.rho!r}: use method.at(progress) first")
        gradients = _gradients(parameters, loss_of)
        length = torch.linalg.vector_norm(torch.stack(norms(list(gradients.values()))))
        return {name: self.rho * g / (length + 1e-12) for name, g in gradients.items()}
