"""Where an attack begins."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from instar.errors import UserError
from instar.expression import value
from instar.threat import Ball


class Start(abc.ABC):
    """The first iterate of an attack."""

    @abc.abstractmethod
    def __call__(self, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
        """First iterate (B, C, H, W) for clean images `x`."""


@value
class Zero(Start):
    """The clean image. KL objectives have no gradient there and need another start."""

    def __call__(self, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
        """A copy of `x`."""
        return x.clone()


@value
class Uniform(Start):
    """A random point of the ball (see `Ball.sample`), cut to [0, 1].

    Attributes:
        scale: Factor on the noise, at least 0. Above 1 it leaves the ball, as N-FGSM means it to.

    Raises:
        UserError: `scale` is negative or not a number.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the factor."""
        if not 0 <= self.scale < math.inf:
            raise UserError(f"scale of Uniform must be a number of at least 0; got {self.scale}")

    def __call__(self, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
        """`x` plus noise from the ball."""
        noise = ball.sample(x, generator)
        return torch.clamp(x + (noise if self.scale == 1 else self.scale * noise), 0.0, 1.0)


@value
class Gaussian(Start):
    """The clean image plus normal noise, not cut to the box before the first step, as TRADES and MART do.

    Attributes:
        std: Standard deviation in the unit of the inputs, positive; 0.001 in the published codes.

    Raises:
        UserError: `std` is not a positive number.
    """

    std: float = 0.001

    def __post_init__(self) -> None:
        """Check the deviation."""
        if not 0 < self.std < math.inf:
            raise UserError(f"std of Gaussian must be a positive number such as 0.001; got {self.std}")

    def __call__(self, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
        """`x` plus noise."""
        return x + self.std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


@value
class Given(Start):
    """The clean image plus exactly this noise, for repeating somebody else's attack. It cannot be written down.

    Attributes:
        noise: Offsets (B, C, H, W) in the unit of the inputs, added as they are.

    Raises:
        UserError: At the call, when the shape is not that of the batch.
    """

    noise: Tensor

    def __call__(self, x: Tensor, ball: Ball, generator: torch.Generator | None) -> Tensor:
        """`x` plus the noise."""
        if self.noise.shape != x.shape:
            raise UserError(f"noise of Given must have the shape {tuple(x.shape)}; got {tuple(self.noise.shape)}")
        return x + self.noise.to(x)

    def __repr__(self) -> str:
        """The shape; a tensor has no expression."""
        return f"Given(<noise {tuple(self.noise.shape)}>)"

    def __eq__(self, other: object) -> bool:
        """Equal noise."""
        return isinstance(other, Given) and torch.equal(self.noise, other.noise)

    def __hash__(self) -> int:
        """By identity of the noise."""
        return id(self.noise)
