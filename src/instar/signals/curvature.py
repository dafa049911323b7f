"""H-SAT's difficulties: the largest eigenvalue of the loss's Hessian in the weights, by three estimators.

The paper's own approximations are not public; all three are reconstructions, and each is normalised to ψ = min(1, ·),
so that the bound 1 is never exceeded and gives plain adversarial training.

The two relative ones begin an attack near ψ = 1 where the clean image is as curved as its adversaries; lower bounds
train on random starts alone (seen on digits: hardly a step was taken at a bound of 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from instar.curvature import gauss_newton_curvature, hessian_eigenvalue, softmax_curvature
from instar.errors import UserError
from instar.evidence import UNLABELLED, Evidence
from instar.expression import value
from instar.signals.algebra import Signal
from instar.signals.difficulty import Referenced


@value
class LastLayerCurvature(Signal):
    """ψ = 2 μ(p), μ(p) the largest eigenvalue of diag p − p pᵀ: the curvature in the last layer, but for its features.

    The Hessian of the cross-entropy in weight and bias of a linear last layer has the largest eigenvalue
    (‖h‖² + 1) μ(p) with features h; ψ leaves the first factor out and lies in [0, 1]. It is not monotone along an
    attack: it falls again once an instance is confidently misclassified.

    Source: a reconstruction of H-SAT (Sitawarin et al. 2021); `instar.curvature`.
    """

    largest: ClassVar[float] = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """Adversarial logits."""
        return frozenset({"adv"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Curvature (B,) in [0, 1], without gradient."""
        logits = evidence.logits("adv")
        return (2 * softmax_curvature(logits.detach())).clamp_max(1.0).to(logits.dtype)


@value
class GaussNewtonCurvature(Referenced):
    """ψ_i = min(1, λ_i / Λ): each instance's Gauss-Newton curvature, over the largest mean Λ along the full attack.

    λ_i is the largest eigenvalue of Jᵀ (diag p − p pᵀ) J, J the logits' derivative in the weights. It costs a backward
    pass for each class, instance by instance.

    Attributes:
        of: Beginning of the names of the parameters that count, ``"linear"`` or ``"head"`` for the last layer; empty
            takes all.
        every: Steps between two measurements of Λ.
        memory: Share that Λ keeps of itself at each, in [0, 1).

    Raises:
        UserError: Fewer than one step, or a memory outside of [0, 1).

    Source: a reconstruction of H-SAT (Sitawarin et al. 2021).
    """

    of: str = ""
    every: int = 100
    memory: float = 0.9

    largest: ClassVar[float] = 1.0
    couples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_reference("GaussNewtonCurvature", self.every, self.memory)

    @property
    def needs(self) -> frozenset[str]:
        """The weights."""
        return frozenset({"adv", "params"})

    def measure(self, evidence: Evidence) -> Tensor:
        """Curvatures (B,) of the instances."""
        parameters = {name: p for name, p in _weights(evidence).items() if name.startswith(self.of)}
        if not parameters:
            raise UserError(f"the model has no parameter whose name begins with {self.of!r}")
        assert evidence.x_adv is not None
        return gauss_newton_curvature(lambda p, x: evidence.forward(x, p), parameters, evidence.x_adv)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Relative curvature (B,) in [0, 1], without gradient."""
        return _relative(self.measure(evidence), evidence, "gauss_newton")

    def due(self, shared: MutableMapping[str, Tensor]) -> bool:
        """Every so many steps."""
        return _due(shared, "gauss_newton", self.every)

    def refer(self, measured: Sequence[Tensor], shared: MutableMapping[str, Tensor]) -> None:
        """Take the largest of the batch's means into Λ."""
        _refer(shared, "gauss_newton", torch.stack([m.mean() for m in measured]).max(), self.memory)


@value
class HessianCurvature(Referenced):
    """ψ = min(1, ρ / Λ), one number for the batch: the Hessian's top eigenvalue over that under the full attack.

    ρ is the Rayleigh quotient of the Hessian of the batch's mean cross-entropy in all weights, after `iterations` power
    iterations from where the last call ended; the eigenvalue of largest magnitude, with its sign. Λ is the largest one
    along attacks that nothing stopped, as a running mean.

    Attributes:
        iterations: Power iterations a call, at least 1; one is enough behind a warm start.
        cold: Iterations of the very first call.
        every: Steps between two measurements of Λ.
        memory: Share that Λ keeps of itself at each, in [0, 1).

    Raises:
        UserError: Fewer than one iteration or step, or a memory outside of [0, 1).

    Source: a reconstruction of H-SAT (Sitawarin et al. 2021).
    """

    iterations: int = 1
    cold: int = 10
    every: int = 100
    memory: float = 0.9

    largest: ClassVar[float] = 1.0
    couples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        _check_reference("HessianCurvature", self.every, self.memory)
        if self.iterations < 1 or self.cold < 1:
            raise UserError(f"HessianCurvature needs at least 1 iteration; got {min(self.iterations, self.cold)}")

    @property
    def needs(self) -> frozenset[str]:
        """The weights."""
        return frozenset({"adv", "params"})

    def measure(self, evidence: Evidence) -> Tensor:
        """The batch's curvature, one number."""
        parameters, shared = _weights(evidence), evidence.shared
        names = {name: f"h_sat.vector.{name}" for name in parameters}
        # A parameter that the loss does not depend on has no part in the vector.
        start = {name: shared[key] for name, key in names.items() if key in shared} or None
        warm = start is not None
        # Without a warm start the direction has a seed of its own: the attack's numbers stay as they are.
        draws = None if warm else torch.Generator(device=evidence.x.device).manual_seed(0)

        part = evidence.part
        if part.piece:
            raise UserError("HessianCurvature is one number for the whole batch, not for pieces: set accumulate=1")

        def loss_of(weights: Mapping[str, Tensor]) -> Tensor:
            if part.whole:
                return F.cross_entropy(evidence.forward(evidence.x_adv, weights), evidence.y, ignore_index=UNLABELLED)
            logits = evidence.forward(evidence.x_adv, part.group.same(weights))
            summed = F.cross_entropy(logits, evidence.y, ignore_index=UNLABELLED, reduction="sum")
            return summed / part.group.total((evidence.y != UNLABELLED).sum())

        found, vector = hessian_eigenvalue(
            loss_of, parameters, start=start, iterations=self.iterations if warm else self.cold, generator=draws
        )
        shared.update({names[name]: v for name, v in vector.items()})
        return torch.as_tensor(found, device=evidence.x.device)

    def __call__(self, evidence: Evidence) -> Tensor:
        """Relative curvature (B,), the same for all, at most 1."""
        return _relative(self.measure(evidence).expand(len(evidence.y)), evidence, "hessian")

    def due(self, shared: MutableMapping[str, Tensor]) -> bool:
        """Every so many steps."""
        return _due(shared, "hessian", self.every)

    def refer(self, measured: Sequence[Tensor], shared: MutableMapping[str, Tensor]) -> None:
        """Take the largest of the batch's values into Λ."""
        _refer(shared, "hessian", torch.stack(list(measured)).max(), self.memory)


def _check_reference(owner: str, every: int, memory: float) -> None:
    if every < 1 or not 0 <= memory < 1:
        raise UserError(f"{owner} needs every of at least 1 step and a memory in [0, 1); got {every} and {memory}")


def _weights(evidence: Evidence) -> Mapping[str, Tensor]:
    if evidence.params is None:
        raise UserError("a curvature in the weights is a difficulty for stop rules; this Evidence has no weights")
    return evidence.params


def _due(shared: MutableMapping[str, Tensor], name: str, every: int) -> bool:
    age = shared.setdefault(f"h_sat.age.{name}", torch.zeros((), dtype=torch.int64))
    due = int(age) % every == 0
    age += 1
    return due


def _refer(shared: MutableMapping[str, Tensor], name: str, found: Tensor, memory: float) -> None:
    key = f"h_sat.reference.{name}"
    shared[key] = found if key not in shared else memory * shared[key] + (1 - memory) * found


def _relative(found: Tensor, evidence: Evidence, name: str) -> Tensor:
    reference = evidence.shared.get(f"h_sat.reference.{name}")
    if reference is None:
        raise UserError(
            "this curvature is relative to the full attack's, which nobody has measured: use it in a stop rule"
        )
    tiny = torch.finfo(found.dtype).tiny
    return (found / reference.to(found).clamp_min(tiny)).clamp_max(1.0).to(evidence.x.dtype)
