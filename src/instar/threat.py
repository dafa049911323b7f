"""Threat models: the balls an attack may move in, with their projections, steepest steps and random starts."""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import torch
from torch import Tensor

from instar.errors import UserError, unknown
from instar.expression import value
from instar.schedules import Schedule


def _per_instance(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) so that it broadcasts over (B, C, H, W)."""
    return values.view(-1, *([1] * (like.ndim - 1)))


@value
class Ball(abc.ABC):
    """All images within `eps` of a clean one in some norm, and within [0, 1].

    Attributes:
        eps: Radius in the unit of the inputs, which lie in [0, 1]; written ``8/255``. May be a `Schedule`.

    Raises:
        UserError: `eps` is negative, not a number, or larger than any two images can be apart where that is certain.
    """

    eps: float | Schedule

    norm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the radius, unless it is a schedule: then its numbers are checked when they are resolved."""
        if isinstance(self.eps, Schedule):
            return
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or math.isnan(self.eps):
            raise UserError(f"eps of {self.norm} must be a number such as 8/255; got {self.eps!r}")
        if self.eps < 0:
            raise UserError(f"eps of {self.norm} must not be negative; got {self.eps:g}")
        if self.norm == "Linf" and self.eps > 1:
            guess = f" Did you mean {self.eps:g}/255?" if self.eps <= 255 else ""
            raise UserError(f"eps of Linf must be in [0, 1] because inputs lie in [0, 1]; got {self.eps:g}.{guess}")

    @property
    def radius(self) -> float:
        """`eps` as a number.

        Raises:
            UserError: `eps` is still a schedule; `method.at(progress)` resolves it.
        """
        if isinstance(self.eps, Schedule):
            raise UserError(f"eps is still the schedule {self.eps!r}: resolve it first with method.at(progress)")
        return float(self.eps)

    @abc.abstractmethod
    def size(self, offset: Tensor) -> Tensor:
        """Norm (B,) of offsets (B, C, H, W)."""

    @abc.abstractmethod
    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The nearest point to `moved` (B, C, H, W) that the ball around `x` and the box [0, 1] allow."""

    @abc.abstractmethod
    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """The direction of norm 1 (B, C, H, W) in which a linear function with this `gradient` grows fastest.

        Args:
            gradient: (B, C, H, W).
            at: Where the step begins (B, C, H, W); only L1 looks at it, to leave out pixels at the box's edge.

        Returns:
            The direction; zero for an instance whose gradient is zero.
        """

    def support(self, gradient: Tensor) -> Tensor:
        """How far a linear function with this `gradient` (B, C, H, W) can rise inside the ball, the box aside (B,).

        It is eps times the dual norm of the gradient.

        Example:
            >>> g = torch.tensor([[[[3.0, -4.0]]]])
            >>> [round(b.support(g).item(), 2) for b in (Linf(0.1), L2(0.1), L1(0.1))]
            [0.7, 0.5, 0.4]
        """
        order = {"Linf": 1, "L2": 2, "L1": math.inf}[self.norm]
        return self.radius * torch.linalg.vector_norm(gradient.flatten(1), order, dim=1)

    @abc.abstractmethod
    def sample(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A random offset (B, C, H, W) inside the ball around 0, not yet cut to the box."""


@value
class Linf(Ball):
    """The ℓ∞ ball: every pixel may move by at most `eps`.

    The projection clamps to [x − eps, x + eps], then to [0, 1]; the steepest step is the gradient's sign; the random
    start is uniform in the ball.

    Attributes:
        eps: Radius in [0, 1], for example ``8/255``.

    Example:
        >>> Linf(8/255)
        Linf(8/255)
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> Linf(0.25).project(x + torch.tensor([0.4, -0.1]), x)
        tensor([[[[0.7500, 0.4000]]]])
    """

    norm: ClassVar[str] = "Linf"

    def size(self, offset: Tensor) -> Tensor:
        """Largest absolute value of each offset (B,)."""
        return offset.flatten(1).abs().amax(1)

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """Clamp to the ball, then to the box."""
        return torch.clamp(torch.minimum(torch.maximum(moved, x - self.radius), x + self.radius), 0.0, 1.0)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """Sign of the gradient."""
        return gradient.sign()

    def sample(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform in [−eps, eps] for every pixel."""
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return noise.mul_(2).sub_(1).mul_(self.radius)


@value
class L2(Ball):
    """The ℓ2 ball: the Euclidean length of the change is at most `eps`.

    The projection is the exact Euclidean one onto the *intersection* of ball and box, which leaves an attack more room
    than the usual shortening followed by clamping. The steepest step is the normalised gradient; the random start has a
    uniform direction and a radius uniform in [0, eps].

    Attributes:
        eps: Radius, for example 0.5 for CIFAR-10.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> L2(0.05).project(x + torch.tensor([0.3, 0.4]), x)
        tensor([[[[0.5300, 0.5400]]]])

    Source: Rice et al. 2020 (start); Madry et al. 2018 (step). The projection solves the dual exactly, by sorting.
    Deviations: Rice et al. and TRADES shorten radially and clamp.
    """

    norm: ClassVar[str] = "L2"

    def size(self, offset: Tensor) -> Tensor:
        """Euclidean length of each offset (B,)."""
        return torch.linalg.vector_norm(offset.flatten(1), dim=1)

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """Nearest point of ball ∩ box.

        The answer is sign(δ) · min(t |δ|, room) with room the distance to the box in the direction of δ, and the
        largest t ≤ 1 whose result is no longer than eps. Its squared length is piecewise quadratic and growing in t,
        with a breakpoint at each pixel's room / |δ|.
        """
        offset = (moved - x).flatten(1)
        room = torch.where(offset >= 0, 1 - x.flatten(1), x.flatten(1)).clamp_min(0)
        size = offset.abs()
        ratio, order = torch.where(size > 0, room / size, torch.full_like(size, torch.inf)).sort(dim=1)
        capped = room.gather(1, order).square().cumsum(1)  # squared length of the pixels up to each breakpoint
        squares = size.gather(1, order).square()
        free = squares.flip(1).cumsum(1).flip(1) - squares  # Σ δ² of the pixels behind it
        reached = capped + ratio.square() * free
        # At a breakpoint of infinity nothing moves and 0 · inf is no number: it is as far as any t ≤ 1 can come.
        count = (torch.where(ratio < 1, reached, torch.full_like(reached, torch.inf)) < self.radius**2).sum(
            1, keepdim=True
        )
        zero = torch.zeros_like(capped[:, :1])
        fixed = torch.cat([zero, capped], dim=1).gather(1, count)
        loose = torch.cat([squares.sum(1, keepdim=True), free], dim=1).gather(1, count)
        scale = ((self.radius**2 - fixed).clamp_min(0) / loose.clamp_min(torch.finfo(x.dtype).tiny)).sqrt().clamp_max(1)
        kept = torch.minimum(scale * size, room)
        return torch.clamp(x + (offset.sign() * kept).view_as(x), 0.0, 1.0)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """Gradient divided by its length; a zero gradient gives no step."""
        length = self.size(gradient)
        safe = torch.where(length > 0, length, torch.ones_like(length))
        return gradient / _per_instance(safe, gradient)

    def sample(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform direction, radius uniform in [0, eps]."""
        direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) * self.radius
        return direction * _per_instance(radius / self.size(direction).clamp_min(1e-12), x)


@value
class L1(Ball):
    """The ℓ1 ball: absolute changes sum to at most `eps`.

    The projection is the exact Euclidean one onto the *intersection* of ball and box. (Projecting onto the ball and
    clamping afterwards leaves most of the budget unused, which is why older ℓ1 attacks are weak.) The steepest step
    puts everything on the pixel with the largest gradient that the box still lets move in that direction; with
    `coordinates` above 1 the step is shared by that many.

    Attributes:
        eps: Radius, for example 12 for CIFAR-10.
        coordinates: How many pixels one step moves; 1 is steepest ascent.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> L1(0.3).project(x + torch.tensor([0.4, 0.1]), x)
        tensor([[[[0.8000, 0.5000]]]])

    Source: Duchi et al. 2008 (ball); Croce & Hein 2021, "Mind the box" (intersection). The solution here sorts the
        breakpoints of the piecewise-linear dual and is exact.
    """

    coordinates: int = 1

    norm: ClassVar[str] = "L1"

    def __post_init__(self) -> None:
        """Check the radius and the number of coordinates."""
        super().__post_init__()
        if self.coordinates < 1:
            raise UserError(f"coordinates of L1 must be at least 1; got {self.coordinates}")

    def size(self, offset: Tensor) -> Tensor:
        """Sum of absolute values of each offset (B,)."""
        return offset.flatten(1).abs().sum(1)

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """Nearest point of ball ∩ box.

        The Lagrangian separates by pixel: the answer is sign(δ) · min(max(|δ| − λ, 0), room) with room the distance
        to the box in the direction of δ, and λ ≥ 0 such that the sum is eps. That sum is piecewise linear and falling
        in λ with breakpoints |δ| and |δ| − room.
        """
        offset = (moved - x).flatten(1)
        room = torch.where(offset >= 0, 1 - x.flatten(1), x.flatten(1)).clamp_min(0)
        size = offset.abs()
        capped = torch.minimum(size, room)
        # Slope of the sum to the right of each breakpoint: at |δ| − room a pixel begins to shrink, at |δ| it is gone.
        points = torch.cat([(size - room).clamp_min(0), size], dim=1)
        change = torch.cat([-torch.ones_like(size), torch.ones_like(size)], dim=1)
        points, order = points.sort(dim=1)
        slope = change.gather(1, order).cumsum(1)
        gaps = points.diff(dim=1, prepend=torch.zeros_like(points[:, :1]))
        previous = torch.cat([torch.zeros_like(slope[:, :1]), slope[:, :-1]], dim=1)
        total = capped.sum(1, keepdim=True) + (gaps * previous).cumsum(1)  # the sum at each breakpoint
        # The last breakpoint at which the sum is still at least eps; λ lies on the segment to its right.
        last = (total >= self.radius).sum(1, keepdim=True).sub(1).clamp_min(0)
        excess = (total.gather(1, last) - self.radius).clamp_min(0)
        at_last = slope.gather(1, last)
        # A slope of zero means that nothing is left to shrink; dividing by −1 then adds nothing (the excess is 0).
        lam = points.gather(1, last) + excess / torch.where(at_last < 0, -at_last, torch.ones_like(at_last))
        lam = torch.where(capped.sum(1, keepdim=True) > self.radius, lam, torch.zeros_like(lam))
        kept = torch.minimum((size - lam).clamp_min(0), room)
        return torch.clamp(x + (offset.sign() * kept).view_as(x), 0.0, 1.0)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """All of the step on the best pixel (or shared by the best `coordinates`) that can still move."""
        flat, here = gradient.flatten(1), at.flatten(1)
        stuck = ((flat > 0) & (here >= 1)) | ((flat < 0) & (here <= 0))
        strength = flat.abs().masked_fill(stuck, 0)
        count = min(self.coordinates, flat.shape[1])
        best, where = strength.topk(count, dim=1)
        share = torch.where(best > 0, torch.full_like(best, 1 / count), torch.zeros_like(best))
        return torch.zeros_like(flat).scatter_(1, where, share * flat.gather(1, where).sign()).view_as(gradient)

    def sample(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Uniform on the sphere of a radius that is uniform in [0, eps]."""
        uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        signs = torch.where(uniform < 0.5, -1.0, 1.0).to(x.dtype)
        # Exponential magnitudes with random signs are Laplace, whose direction is uniform on the ℓ1 sphere.
        size = -torch.log((2 * (uniform - 0.5).abs()).clamp_min(1e-12))
        radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) * self.radius
        return signs * size * _per_instance(radius / size.flatten(1).sum(1), x)


_BALLS: dict[str, type[Ball]] = {"linf": Linf, "inf": Linf, "l2": L2, "2": L2, "l1": L1, "1": L1}


def ball(norm: str | float, eps: float | Schedule) -> Ball:
    """The ball of a norm by its name.

    Args:
        norm: ``"Linf"``, ``"L2"`` or ``"L1"`` in any case; ``"inf"``, 2 and 1 are understood too.
        eps: Radius in the unit of inputs in [0, 1].

    Returns:
        The ball.

    Raises:
        UserError: No such norm, or an impossible radius.

    Example:
        >>> ball("Linf", 8 / 255)
        Linf(8/255)
    """
    text = f"{norm:g}" if isinstance(norm, (int, float)) else str(norm).lower()
    if text not in _BALLS:
        raise unknown("norm", norm, ["Linf", "L2", "L1"])
    return _BALLS[text](eps)
