"""Eigenvalues of matrices that are too large to be written down, from their products with vectors.

`lanczos` turns a symmetric matrix H (D × D) into a small tridiagonal one. The eigenvalues of that one at the ends of
the spectrum are eigenvalues of H; all of them together, with their weights, are a quadrature rule for the density of
the spectrum. Everything works on B matrices at once, one a row: the weights of a network are one row of P numbers, the
inputs of a batch are B rows of C · H · W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instar.errors import UserError

Product = Callable[[Tensor], Tensor]
"""From vectors (B, D) to H_b v_b (B, D), each H_b symmetric and the same at every call."""

_GONE = 1e-3
"""What is orthogonalised against the basis and keeps less than this share of its length is orthogonalised again."""


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """The matrices H_b seen from m vectors each: Qᵀ H Q = T.

    Attributes:
        diagonal: α (B, m), float64.
        beside: β (B, m), float64: the last one, β_m, is the length of what would come next.
        basis: Q (m, B, D), rows of norm 1 and at right angles; None if it was not wanted.
    """

    diagonal: Tensor
    beside: Tensor
    basis: Tensor | None

    @property
    def steps(self) -> int:
        """m, the number of products that were taken."""
        return int(self.diagonal.shape[1])

    def matrix(self) -> Tensor:
        """T (B, m, m), float64."""
        above = torch.diag_embed(self.beside[:, :-1], offset=1) if self.steps > 1 else 0.0
        below = torch.diag_embed(self.beside[:, :-1], offset=-1) if self.steps > 1 else 0.0
        return torch.diag_embed(self.diagonal) + above + below

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (B, m) of T, ascending, and its eigenvectors (B, m, m) as columns."""
        found = torch.linalg.eigh(self.matrix().cpu())
        return found.eigenvalues, found.eigenvectors


def lanczos(
    product: Product,
    start: Tensor,
    *,
    steps: int,
    generator: torch.Generator | None = None,
    keep: bool = True,
    done: Callable[[Tridiagonal], bool] = lambda found: False,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Tridiagonal:
    """The Lanczos recurrence with full re-orthogonalisation.

    β_j q_{j+1} = H q_j − α_j q_j − β_{j−1} q_{j−1},   α_j = q_jᵀ H q_j

    Without re-orthogonalisation rounding brings found eigenvalues back again and again; here every vector is made
    orthogonal to all before it, twice. Where the recurrence ends early (β_j = 0: the vectors so far span everything
    that the start can reach) it goes on from a random vector at right angles to them, with β_j = 0, so that m = D steps
    find every eigenvalue, multiple ones included. That leaves the density's weights as they are.

    Args:
        product: The matrices.
        start: First vectors (B, D), none zero, of any length; float32 or float64.
        steps: m, at least 1; cut to D. Memory: m · B · D numbers of the type of the start.
        generator: For the vectors after an early end; None takes torch's own.
        keep: Whether the basis is returned. It is held in memory meanwhile either way.
        done: Asked after every step; True ends the recurrence.
        tick: Called after every product with the number taken and m.

    Returns:
        The tridiagonal matrices.

    Raises:
        UserError: Fewer than 1 step, a start that is zero or not finite, or a product that is not finite.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> found = lanczos(lambda v: v @ matrix, torch.ones(1, 3, dtype=torch.float64), steps=3)
        >>> found.ritz()[0]
        tensor([[1., 2., 5.]], dtype=torch.float64)

    Source: Lanczos 1950; Golub & Van Loan, "Matrix Computations", section 10.3 (complete re-orthogonalisation).
    """
    if steps < 1:
        raise UserError(f"steps of lanczos must be at least 1; got {steps}")
    if start.ndim != 2 or not start.shape[1]:
        raise UserError(f"start of lanczos must have shape (B, D) with D of at least 1; got {tuple(start.shape)}")
    steps = min(steps, start.shape[1])
    count, size = start.shape
    basis = start.new_empty(steps, count, size)
    diagonal, beside = (
        start.new_zeros(count, steps, dtype=torch.float64),
        start.new_zeros(count, steps, dtype=torch.float64),
    )
    length = _norm(start)
    if not bool((length.isfinite() & (length > 0)).all()):
        raise UserError("start of lanczos must be finite and not zero in every row")
    basis[0] = start / length[:, None].to(start.dtype)
    largest = torch.zeros_like(length)  # of |α| + β so far: what β is measured against
    found = Tridiagonal(diagonal[:, :0], beside[:, :0], None)
    for j in range(steps):
        image = product(basis[j]).to(start.dtype)
        if not bool(image.isfinite().all()):
            raise UserError("a product with the Hessian is NaN or infinite: is the loss finite at these weights?")
        diagonal[:, j] = _dot(basis[j], image)
        image = _orthogonal(image, basis[: j + 1])
        beside[:, j] = _norm(image)
        largest = torch.maximum(largest, diagonal[:, j].abs() + beside[:, j])
        # What is left is rounding: the products are only that exact, however small their remainder.
        ended = beside[:, j] <= 10 * torch.finfo(start.dtype).eps * largest
        beside[:, j] = torch.where(ended, 0.0, beside[:, j])
        tick(j + 1, steps)
        found = Tridiagonal(diagonal[:, : j + 1], beside[:, : j + 1], basis[: j + 1] if keep else None)
        if j + 1 == steps or done(found):
            break
        if bool(ended.any()):
            fresh = _orthogonal(gaussian(count, size, like=start, generator=generator), basis[: j + 1])
            image = torch.where(ended[:, None], fresh, image)
        basis[j + 1] = image / _norm(image)[:, None].to(start.dtype)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (B,) in float64: rounding of a sum over millions would be seen."""
    return (a.double() * b.double()).sum(1)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)


def _orthogonal(vectors: Tensor, basis: Tensor) -> Tensor:
    """Vectors (B, D) without their parts along the basis (m, B, D); twice is enough (Kahan and Parlett)."""
    for _ in range(2):
        along = torch.einsum("mbd,bd->mb", basis, vectors)
        vectors = vectors - torch.einsum("mb,mbd->bd", along, basis)
    return vectors


def gaussian(count: int, size: int, *, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random directions (count, size), uniform on the sphere up to their length, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.randn(count, size, generator=generator, dtype=like.dtype, device=device).to(like.device)


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues at one end of the spectra, the largest first.

    Attributes:
        values: (B, k), float64.
        residuals: ‖H u − λ u‖ (B, k), float64, and at least the rounding of a product: an eigenvalue of H lies within
            that of each value.
        vectors: u (B, k, D), of norm 1.
        steps: Products that were taken.
    """

    values: Tensor
    residuals: Tensor
    vectors: Tensor
    steps: int


def top_eigenpairs(
    product: Product,
    start: Tensor,
    *,
    top: int = 1,
    steps: int = 60,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Eigenpairs:
    """The algebraically largest eigenvalues, by Lanczos until their residuals are small.

    Args:
        product: The matrices.
        start: First vectors (B, D), usually random.
        top: k, at least 1 and at most D.
        steps: Most products, at least k.
        tolerance: Stop once each of the k residuals is below this share of its row's largest eigenvalue in size. The
            error of an eigenvalue is of the order of the residual's square. 0 takes all steps.
        generator: For random vectors after an early end of the recurrence.
        tick: Called after every product with the number taken and the most.

    Returns:
        The eigenvalues found, with residuals that say how exact they are. Of a multiple eigenvalue a random start sees
        one copy, until the recurrence has ended early.

    Raises:
        UserError: k or the steps do not fit, or `lanczos` refuses.

    Example:
        >>> matrix = torch.diag(torch.tensor([-9.0, 1.0, 2.0, 5.0]))
        >>> top_eigenpairs(lambda v: v @ matrix, torch.ones(1, 4), top=2).values
        tensor([[5., 2.]], dtype=torch.float64)

    Source: as `lanczos`; the residual is β_m times the last entry of T's eigenvector.
    """
    if not 1 <= top <= start.shape[-1]:
        raise UserError(f"top must be at least 1 and at most the size of the matrix, {start.shape[-1]}; got {top}")
    if steps < top:
        raise UserError(f"steps must be at least top, because each eigenvalue needs one; got {steps} for {top}")

    def settled(found: Tridiagonal) -> bool:
        # Checked at every fourth step: the small eigenproblems of many rows cost as much as a product.
        if found.steps < top or (found.steps % 4 and found.steps > 8) or tolerance <= 0:
            return False
        values, vectors = found.ritz()
        residuals = _residuals(found, vectors)[:, -top:]
        return bool((residuals <= tolerance * values.abs().amax(1, keepdim=True)).all())

    found = lanczos(product, start, steps=steps, generator=generator, done=settled, tick=tick)
    return top_of(found, top)


def top_of(found: Tridiagonal, top: int) -> Eigenpairs:
    """The largest eigenvalues that a recurrence of at least `top` steps, kept with its basis, has seen.

    Raises:
        UserError: It has fewer steps, or no basis.
    """
    if found.basis is None or found.steps < top:
        raise UserError(f"{top} eigenpairs need a basis of at least as many vectors; got {found.steps} steps")
    values, small = found.ritz()
    best = small[:, :, -top:].flip(2).to(found.basis)
    vectors = torch.einsum("mbd,bmk->bkd", found.basis, best)
    residuals = _residuals(found, small)[:, -top:].flip(1)
    return Eigenpairs(values[:, -top:].flip(1), residuals, vectors, found.steps)


def rule_of(found: Tridiagonal) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (B, m) and weights (B, m) of the quadrature rules that a recurrence gives (see `spectral_density`)."""
    values, vectors = found.ritz()
    return values.numpy(), vectors[:, 0].square().numpy()


def _residuals(found: Tridiagonal, small: Tensor) -> Tensor:
    """Residuals (B, m) of the Ritz pairs; none is smaller than what the products themselves are rounded by."""
    kind = torch.float64 if found.basis is None else found.basis.dtype
    rounding = torch.finfo(kind).eps * found.ritz()[0].abs().amax(1, keepdim=True)
    return torch.maximum(found.beside[:, -1:].cpu() * small[:, -1, :].abs(), rounding)


@dataclass(frozen=True, eq=False)
class Density:
    """The density of a spectrum as points with weights: for every probe a quadrature rule of m points.

    The mean over the probes of Σ_j w_j f(λ_j) estimates (1 / D) Σ_i f(λ_i(H)) for any f.

    Attributes:
        nodes: λ (r, m), float64.
        weights: w (r, m), float64, each row of sum 1.

    Raises:
        UserError: Arrays of different shapes.

    Source: stochastic Lanczos quadrature, Golub & Welsch 1969; Ghorbani, Krishnan & Xiao 2019.
    """

    nodes: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.nodes.ndim != 2 or self.nodes.shape != self.weights.shape:
            raise UserError(f"nodes and weights must be (r, m); got {self.nodes.shape} and {self.weights.shape}")

    @property
    def probes(self) -> int:
        """r, the number of random vectors."""
        return len(self.nodes)

    def moment(self, order: int) -> float:
        """Estimate of (1 / D) tr Hᵏ; order 1 is the mean eigenvalue, 0 is 1.

        Example:
            >>> Density(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]])).moment(2)
            5.0
        """
        return float((self.weights * self.nodes**order).sum(1).mean())

    def moment_error(self, order: int) -> float:
        """Standard error of `moment` over the probes; NaN for one probe."""
        values = (self.weights * self.nodes**order).sum(1)
        return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")

    def cdf(self, at: np.ndarray | Sequence[float]) -> np.ndarray:
        """Estimated share of eigenvalues that are at most each value of `at` (n,).

        Example:
            >>> Density(np.array([[1.0, 3.0]]), np.array([[0.25, 0.75]])).cdf([0.0, 2.0, 4.0]).tolist()
            [0.0, 0.25, 1.0]
        """
        order = np.argsort(self.nodes, axis=None)
        reached = np.concatenate([[0.0], np.cumsum(self.weights.ravel()[order]) / self.probes])
        return np.asarray(reached[np.searchsorted(self.nodes.ravel()[order], np.asarray(at), side="right")])

    def beyond(self, bound: float) -> float:
        """Estimated share of eigenvalues whose absolute value is above `bound`."""
        return float(self.weights[np.abs(self.nodes) > bound].sum() / self.probes)

    @property
    def negative(self) -> float:
        """Estimated part of the spectrum's mass (Σ|λ|) that is negative, in [0, 1]; NaN if all are 0."""
        mass = self.weights * np.abs(self.nodes)
        return float(mass[self.nodes < 0].sum() / mass.sum()) if mass.sum() > 0 else float("nan")

    def smoothed(self, at: np.ndarray, width: np.ndarray | float) -> np.ndarray:
        """The density (n,) at `at` (n,), every node a Gaussian bell of standard deviation `width`.

        Args:
            at: Where, in the unit of the eigenvalues.
            width: Standard deviation of a bell, one number, or one for each node (r, m).

        Returns:
            Per unit of eigenvalue; its integral is 1.

        Example:
            >>> spectrum = Density(np.array([[0.0]]), np.array([[1.0]]))
            >>> spectrum.smoothed(np.array([0.0, 1.0]), 1.0).round(4).tolist()
            [0.3989, 0.242]
        """
        wide = np.broadcast_to(np.asarray(width, dtype=np.float64), self.nodes.shape).ravel()
        distance = (np.asarray(at, dtype=np.float64)[:, None] - self.nodes.ravel()) / wide
        bells = np.exp(-0.5 * distance**2) / (wide * math.sqrt(2 * math.pi))
        return np.asarray(bells @ self.weights.ravel() / self.probes)


def spectral_density(
    product: Product,
    starts: Tensor,
    *,
    steps: int = 60,
    generator: torch.Generator | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Density:
    """The density of one matrix's eigenvalues by stochastic Lanczos quadrature.

    For a start v the nodes are the eigenvalues of T and the weights the squares of the first entries of its
    eigenvectors. Σ_j w_j λ_jᵏ is exactly vᵀ Hᵏ v / vᵀ v for k up to 2 m − 1; its mean over random v is tr Hᵏ / D.

    Args:
        product: One matrix: it is given (1, D) at a time, so that memory does not grow with the probes.
        starts: Probes (r, D), Gaussian or of random signs; rows at right angles that span everything are exact.
        steps: m, products for each probe; cut to D.
        generator: For random vectors after an early end of the recurrence.
        tick: Called after every product with the number taken and r · m.

    Returns:
        The density.

    Raises:
        UserError: As `lanczos`.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
        >>> found = spectral_density(lambda v: v @ matrix, torch.eye(4, dtype=torch.float64), steps=4)
        >>> round(found.moment(1), 12), round(found.moment(2), 12)
        (3.0, 12.5)

    Source: Golub & Welsch 1969; Ubaru, Chen & Saad 2017; for networks Ghorbani, Krishnan & Xiao 2019.
    """
    if starts.ndim != 2 or not len(starts):
        raise UserError(f"starts must have shape (r, D) with at least one probe; got {tuple(starts.shape)}")
    steps = min(steps, starts.shape[1])
    rules = []
    for number, start in enumerate(starts):

        def told(done: int, total: int, before: int = number * steps) -> None:
            tick(before + done, len(starts) * steps)

        found = lanczos(product, start[None], steps=steps, generator=generator, keep=False, tick=told)
        rules.append(rule_of(found))
    return Density(np.concatenate([nodes for nodes, _ in rules]), np.concatenate([weights for _, weights in rules]))
