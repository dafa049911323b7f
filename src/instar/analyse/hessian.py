"""Products of a network's Hessians with vectors: in its weights, over many images, and in every single image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from instar.errors import UserError
from instar.modes import forward_mode


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one long vector.

    Attributes:
        shapes: Shape of each tensor by name, in the vector's order.

    Example:
        >>> layout = Layout.of({"w": torch.zeros(2, 3), "b": torch.zeros(2)})
        >>> layout.size, layout.split(torch.arange(8.0))["b"]
        (8, tensor([6., 7.]))
    """

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of tensors in the order of the mapping."""
        return cls({name: tensor.shape for name, tensor in tensors.items()})

    @property
    def size(self) -> int:
        """P, the length of the vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The vector (P,) of the tensors."""
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The tensors of a vector (P,): views of it."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of a model by name, detached, whether they are frozen or not.

    Raises:
        UserError: There are none, or one is not float32 or float64.
    """
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if not found:
        raise UserError("the model has no parameters, so that its loss has no curvature in the weights")
    for name, parameter in found.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"parameters must be float32 or float64, because second derivatives in half precision are noise; got "
                f"{parameter.dtype} for {name!r}"
            )
    return found


class WeightHessian:
    """The Hessian of the mean cross-entropy of fixed images in a network's weights, as products.

    The images do not move: for an adversarial loss they are adversarial examples made beforehand, which are held fixed
    when the loss is differentiated. BatchNorm uses its running statistics, so that instances stay independent and
    the batch size changes the result only by rounding. Piecewise linear activations have no second derivative of their
    own: what is seen is how the loss bends in the logits, and how layers multiply.

    Args:
        model: Images (B, C, H, W) → logits (B, K).
        x: Images (n, C, H, W).
        y: Labels (n,).
        batch_size: Images differentiated at once. If that is all of them, their graph is kept between products, which
            saves a third of the time; else memory does not grow with n.

    Attributes:
        layout: Where each parameter lies in a vector.

    Raises:
        UserError: No parameters, some in half precision, no images, or a batch of less than 1.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
        >>> _ = nn.init.zeros_(net[1].weight)
        >>> hessian = WeightHessian(net, torch.tensor([[3.0, 4.0]]).double(), torch.tensor([0]), batch_size=8)
        >>> hessian(torch.tensor([[3.0, 4.0, -3.0, -4.0]]).double())  # an eigenvector of ‖x‖² / 2
        tensor([[ 37.5000,  50.0000, -37.5000, -50.0000]], dtype=torch.float64)

    Source: Pearlmutter 1994.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 128) -> None:
        if batch_size < 1 or not len(x):
            raise UserError(f"a Hessian needs images, at least 1 at a time; got {len(x)}, {batch_size} at a time")
        self._model, self._x, self._y, self._batch = model, x, y, batch_size
        self._leaves = {name: weight.clone().requires_grad_() for name, weight in weights_of(model).items()}
        self.layout = Layout.of(self._leaves)
        self._kept: dict[str, Tensor] | None = None

    def start(self, generator: torch.Generator | None, *, probes: int = 1) -> Tensor:
        """Random directions (probes, P) in the type and on the device of the weights."""
        like = next(iter(self._leaves.values()))
        device = like.device if generator is None else generator.device
        drawn = torch.randn(probes, self.layout.size, generator=generator, dtype=like.dtype, device=device)
        return drawn.to(like.device)

    def __call__(self, vectors: Tensor) -> Tensor:
        """H v for each row of (B, P)."""
        total = torch.zeros_like(vectors)
        for gradients, share, last in self._gradients():
            # A gradient without graph is constant: its rows of the Hessian are zero.
            bent = {name: g for name, g in gradients.items() if g.requires_grad}
            for row, vector in enumerate(vectors):
                if not bent:
                    continue
                along = self.layout.split(vector)
                product = torch.autograd.grad(
                    list(bent.values()),
                    list(self._leaves.values()),
                    grad_outputs=[along[name] for name in bent],
                    retain_graph=not last or row + 1 < len(vectors),
                    materialize_grads=True,
                )
                total[row] += share * self.layout.join(dict(zip(self._leaves, product, strict=True)))
        return total

    def gradient(self) -> Tensor:
        """The gradient (P,) of the mean loss."""
        total = torch.zeros(self.layout.size, dtype=next(iter(self._leaves.values())).dtype, device=self._x.device)
        for gradients, share, _ in self._gradients():
            total += share * self.layout.join(gradients).detach()
        return total

    def _gradients(self) -> Iterator[tuple[dict[str, Tensor], float, bool]]:
        """Gradients with their graph, batch by batch, the batch's share of the mean, and whether the graph may go."""
        whole = len(self._x) <= self._batch
        if self._kept is not None:
            yield self._kept, 1.0, False
            return
        for x, y in zip(self._x.split(self._batch), self._y.split(self._batch), strict=True):
            with torch.enable_grad(), forward_mode(self._model, "eval"):
                loss = F.cross_entropy(functional_call(self._model, self._leaves, (x,)), y)
                found = torch.autograd.grad(
                    loss, list(self._leaves.values()), create_graph=True, materialize_grads=True
                )
            gradients = dict(zip(self._leaves, found, strict=True))
            if whole:
                self._kept = gradients
            yield gradients, len(x) / len(self._x), not whole


class InputHessian:
    """Each instance's own Hessian of its cross-entropy in its pixels, as products, all instances at once.

    Args:
        model: Images (B, C, H, W) → logits (B, K).
        x: Images (B, C, H, W).
        y: Labels (B,).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
        >>> net[1].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
        >>> hessian = InputHessian(net, torch.zeros(1, 1, 1, 2).double(), torch.tensor([0]))
        >>> hessian(torch.tensor([[1.0, 1.0]]).double())  # 4 p (1 − p) along the first pixel
        tensor([[1., 0.]], dtype=torch.float64)
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self._at = x.detach().clone().requires_grad_()
        with torch.enable_grad(), forward_mode(model, "eval"):
            # Summed: an instance's Hessian must not depend on how many came with it.
            loss = F.cross_entropy(model(self._at), y, reduction="sum")
            (self._gradient,) = torch.autograd.grad(loss, self._at, create_graph=True)

    @property
    def gradient(self) -> Tensor:
        """∇ₓ CE (B, C · H · W), detached."""
        return self._gradient.detach().flatten(1)

    def __call__(self, vectors: Tensor) -> Tensor:
        """H_b v_b for the rows of (B, C · H · W)."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(vectors)
        (found,) = torch.autograd.grad(
            self._gradient, self._at, grad_outputs=vectors.view_as(self._at), retain_graph=True, materialize_grads=True
        )
        return found.flatten(1)
