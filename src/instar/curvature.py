"""How sharply the loss bends in the weights: the largest eigenvalue of its Hessian, exact for a layer, or estimated.

H-SAT takes that eigenvalue at an adversarial example for the example's difficulty. Its authors published neither code
nor their approximations, so every function here is a reconstruction. From the cheapest to the dearest:

==========================  ============  ===================================  ====================================
function                    result        matrix                               cost
==========================  ============  ===================================  ====================================
`softmax_curvature`         per instance  Hessian in the logits                a few sums over the classes
`last_layer_curvature`      per instance  Hessian in the last linear layer     the same
`gauss_newton_curvature`    per instance  Gauss-Newton part, any parameters    K backward passes
`hessian_eigenvalue`        per batch     Hessian in any parameters            about 2 backward passes an iteration
==========================  ============  ===================================  ====================================

They are not interchangeable: the eigenvalue of a mean Hessian is at most the mean of the instances' eigenvalues, and
often far below it, so that a bound tuned for one means nothing for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vjp, vmap

from instar.errors import UserError
from instar.models.precision import without_autocast
from instar.modes import full

Parameters = Mapping[str, Tensor]

# Newton's method on the secular equation needed at most 4 steps to 1e-14, on millions of distributions made to be hard
# for it (ties, clusters, 2 to 5000 classes); each further step would square the error.
_NEWTON_STEPS = 8

# What the Jacobians of one chunk may take by default. An accelerator gains from large chunks, a processor does not.
_BYTES_ON_CPU = 2**26
_BYTES_ON_ACCELERATOR = 2**31


def softmax_curvature(logits: Tensor) -> Tensor:
    """Largest eigenvalue of the Hessian of the cross-entropy with respect to the logits, whatever the label.

    μ(p) = λ_max(diag p − p pᵀ) with p = softmax(z), in [0, 1/2]: 0 for a one-hot p, 2 p (1 − p) for two classes,
    1 / K for a uniform p, 1/2 for two equal probabilities that share everything. 2 μ is the normalised difficulty.

    With p_(1) ≥ p_(2) the largest probabilities, μ is the root in [p_(2), p_(1)] of the secular equation
    Σ_k p_k / (p_k − μ) = 0. Written as F(μ) = 1 / Σ_{k≠(1)} p_k / (μ − p_k) + μ / p_(1) − 1 it is increasing and
    concave above p_(2) (its first term is a harmonic mean of affine functions), so that Newton's method rises to the
    root from any lower bound and needs no bracket. It begins at max(2 p_(1) p_(2) / (p_(1) + p_(2)),
    p_(1) (1 − p_(1))), which is exact for two classes.

    Args:
        logits: (B, K), K ≥ 2, floating point. −inf is a probability of 0.

    Returns:
        (B,), in the type of the logits but at least float32, without gradient. It is computed in float64 to about
        1e-14 of itself, also where p is all but one-hot. NaN where a logit is NaN or +inf.

    Raises:
        UserError: Logits of another shape, of less than two classes, or of integers.

    Example:
        >>> softmax_curvature(torch.tensor([[0.0, 0.0], [3.0, 0.0], [900.0, 0.0]]))
        tensor([0.5000, 0.0904, 0.0000])
        >>> softmax_curvature(torch.zeros(1, 10))
        tensor([0.1000])

    Source: Sitawarin et al. 2021 (SAT), H-SAT: a reconstruction, since the paper's own estimator is not public. Secular
    equation: Golub 1973; rational iterations on it: Bunch, Nielsen & Sorensen 1978.
    """
    _check_logits(logits)
    with torch.no_grad(), without_autocast(logits.device.type):
        return _largest_of_softmax(logits).to(full(logits).dtype)


def last_layer_curvature(logits: Tensor, features: Tensor, *, bias: bool = True) -> Tensor:
    """Largest eigenvalue of each instance's cross-entropy Hessian with respect to a linear last layer, whatever y.

    λ_max = (‖h‖² + 1) μ(p) for z = W h + b, because the Hessian is the Kronecker product of diag p − p pᵀ with
    (h, 1)(h, 1)ᵀ. Binary logistic regression with z = (wᵀh, 0) and a weight only for the first class instead has
    ‖h‖² p (1 − p) = ‖h‖² (1 − ψ²) / 4, where ψ is P-SAT's gap: half of what two rows of weights give.

    Args:
        logits: (B, K), K ≥ 2, floating point: what the layer returned.
        features: h (B, D), floating point: what went into the layer.
        bias: Whether the layer has a bias that counts as a parameter; without it the 1 is missing.

    Returns:
        (B,), at least 0, in the wider type of both arguments but at least float32, without gradient.

    Raises:
        UserError: Logits or features of another shape or type, or of different numbers of instances.

    Example:
        >>> last_layer_curvature(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([13.])
        >>> last_layer_curvature(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), bias=False)
        tensor([12.5000])

    Source: Sitawarin et al. 2021 (SAT), H-SAT: a reconstruction, since the paper's own estimator is not public.
    """
    _check_logits(logits)
    if features.ndim != 2 or len(features) != len(logits) or not features.is_floating_point():
        raise UserError(
            f"features must be floating point, of shape ({len(logits)}, D) as there are {len(logits)} rows of logits; "
            f"got {features.dtype} of shape {tuple(features.shape)}"
        )
    with torch.no_grad(), without_autocast(logits.device.type):
        length = features.double().square().sum(1) + (1.0 if bias else 0.0)
        kind = torch.promote_types(full(logits).dtype, full(features).dtype)
        return (length * _largest_of_softmax(logits)).to(kind)


def gauss_newton_curvature(
    function: Callable[[dict[str, Tensor], Tensor], Tensor],
    parameters: Parameters,
    x: Tensor,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Largest eigenvalue of each instance's generalised Gauss-Newton matrix of the cross-entropy, whatever the label.

    λ_max(Jᵀ A J) with J = ∂z/∂θ (K × P) and A = diag p − p pᵀ. With A = L Lᵀ, L = diag √p − p √pᵀ, it is that of the
    K × K matrix (Lᵀ J)(Lᵀ J)ᵀ, whose K rows are vector-Jacobian products. The Hessian is this matrix plus
    Σ_k (p_k − y_k) ∇²z_k; that term vanishes for logits linear in the parameters.

    Args:
        function: From parameters by name and images (b, ...) to logits (b, K), each row from its own image alone:
            ``lambda p, x: functional_call(model, p, (x,))`` with `model` in eval mode. BatchNorm in train mode
            raises torch's error about in-place updates.
        parameters: The parameters that count, by name; float32 or float64. The model's others stay as they are.
        x: Images (B, ...), in the type of the parameters.
        chunk: Instances at once, at least 1. None lets the Jacobians of a chunk take 64 MiB on the CPU, 2 GiB on
            an accelerator (but at least one instance: 4 K P bytes in float32), and the peak stays within a few times
            that. It changes the result only by rounding.

    Returns:
        (B,), at least 0, in the type of the logits but at least float32, without gradient. NaN where a logit or the
        Jacobian is not finite.

    Raises:
        UserError: No parameters, parameters that are not float32 or float64, logits of another shape, or a chunk
            below 1.

    Example:
        >>> head = torch.nn.Linear(2, 2)
        >>> weights = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
        >>> function = lambda p, x: torch.func.functional_call(head, p, (x,))
        >>> gauss_newton_curvature(function, weights, torch.tensor([[3.0, 4.0]]))
        tensor([13.])

    Source: Sitawarin et al. 2021 (SAT), H-SAT: a reconstruction, since the paper's own estimator is not public.
    Gauss-Newton matrix of a convex loss: Schraudolph 2002.
    """
    _check_parameters(parameters)
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk must be at least 1 instance; got {chunk}. None chooses one by memory")
    fixed = {name: p.detach() for name, p in parameters.items()}

    def matrix(image: Tensor, factor: Tensor) -> Tensor:
        """(Lᵀ J)(Lᵀ J)ᵀ of one image: L meets J before the product, or what A removes would drown the rest."""
        pull = vjp(lambda p: function(p, image.unsqueeze(0)).squeeze(0), fixed)[1]
        rows = vmap(pull)(factor.T)[0].values()
        return torch.stack([row.flatten(1) @ row.flatten(1).T for row in rows]).sum(0)

    with torch.no_grad(), without_autocast(x.device.type):
        logits = function(fixed, x)
        _check_logits(logits)
        if len(logits) != len(x):
            raise UserError(f"function must return one row of logits an image: {len(x)} images, {len(logits)} rows")
        if chunk is None:
            one = logits.shape[1] * sum(p.numel() * p.element_size() for p in fixed.values())
            budget = _BYTES_ON_CPU if x.device.type == "cpu" else _BYTES_ON_ACCELERATOR
            chunk = max(1, budget // one)
        factors = _factor_of_softmax(logits).to(logits.dtype)
        # No instances: split gives one empty chunk, which vmap would refuse.
        pairs = zip(torch.split(x, chunk), torch.split(factors, chunk), strict=True) if len(x) else ()
        found = [_largest_of_symmetric(vmap(matrix)(images, factor)) for images, factor in pairs]
        return (torch.cat(found) if found else logits.new_zeros(0)).to(full(logits).dtype)


def hessian_eigenvalue(
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    parameters: Parameters,
    *,
    start: Parameters | None = None,
    iterations: int = 20,
    tolerance: float | None = None,
    shift: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Dominant eigenvalue of the Hessian of a scalar loss with respect to the parameters, by power iteration.

    w = (H + c I) v,  λ = vᵀ H v,  v ← w / ‖w‖, repeated. Without a shift (c = 0) it tends to the eigenvalue of largest
    *magnitude*, with its sign: to a negative one where the Hessian of a network bends down more than up. A shift above
    −(λ_min + λ_max) / 2, such as the magnitude found without one, makes it tend to the algebraically largest. The
    quotient never leaves [λ_min, λ_max], and its error shrinks by |(λ₂ + c) / (λ₁ + c)|² an iteration: few iterations
    from a random start give a lower bound of λ_max rather than its value.

    Args:
        loss_of: The scalar loss as a function of the parameters, at fixed data. Modules belong in eval mode:
            BatchNorm in train mode couples the instances and moves its statistics. It has to be differentiable
            twice; of piecewise linear activations only the Gauss-Newton part and products of layers are seen.
        parameters: The parameters by name; float32 or float64. Those that the loss does not depend on are left out.
        start: Vector to begin with, by name, of any length but 0: what an earlier call returned. None draws a Gaussian
            one.
        iterations: Hessian-vector products, at least 1. 1 suffices for a `start` that is warm.
        tolerance: Stop once λ changes by less than this share of itself between iterations, which waits for the device
            each time; None never stops early.
        shift: c, in the unit of the eigenvalues. λ is that of H, without the shift.
        generator: For the Gaussian start; None takes torch's own. Names are drawn in the order of `parameters`.

    Returns:
        λ, a scalar tensor in the type of the parameters: the signed Rayleigh quotient of the vector that entered the
        last iteration. And v by name, of norm 1 over all names together: the vector that left it, one product ahead of
        λ, so that repeated calls of one iteration advance. Both without gradient; H v = 0 leaves v as it was.

    Raises:
        UserError: No parameters, parameters that are not float32 or float64, less than 1 iteration, a tolerance that is
            not positive, a shift that is not finite, a loss that is no scalar or depends on no parameter, or a `start`
            that is zero, not finite, or does not fit the parameters.

    Example:
        >>> matrix = torch.diag(torch.tensor([2.0, -3.0]))
        >>> def loss_of(p):
        ...     return 0.5 * p["t"] @ matrix @ p["t"]
        >>> at = {"t": torch.zeros(2)}
        >>> hessian_eigenvalue(loss_of, at, iterations=50)[0]
        tensor(-3.)
        >>> value, vector = hessian_eigenvalue(loss_of, at, iterations=50, shift=3.0)
        >>> value, vector["t"].abs()
        (tensor(2.), tensor([1., 0.]))

    Source: Sitawarin et al. 2021 (SAT), H-SAT: a reconstruction, since the paper's own estimator is not public.
    Products by differentiating twice: Pearlmutter 1994.
    """
    _check_parameters(parameters)
    if iterations < 1:
        raise UserError(f"iterations must be at least 1, because 0 give no quotient; got {iterations}")
    if tolerance is not None and not tolerance > 0:
        raise UserError(f"tolerance must be above 0, or None to use all iterations; got {tolerance}")
    if not math.isfinite(shift):
        raise UserError(f"shift must be a finite number; got {shift}")
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with torch.enable_grad(), without_autocast(next(iter(leaves.values())).device.type):
        gradients = _graph_of_gradients(loss_of, leaves)
        used = {name: leaves[name] for name in gradients}
        # A gradient without graph is constant: its rows of the Hessian are zero.
        bent = {name: g for name, g in gradients.items() if g.requires_grad}
        vector = _gaussian(used, generator) if start is None else _from_start(start, leaves, used)
        value, before = torch.zeros(()), math.nan
        for _ in range(iterations):
            product = _hessian_times(vector, bent, used)
            value = _inner(vector, product)
            vector = _unit({name: p + shift * vector[name] for name, p in product.items()}, otherwise=vector)
            if tolerance is not None:
                now = float(value)
                if abs(now - before) < tolerance * abs(now):
                    break
                before = now
    return value, vector


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise UserError(
            f"logits must be floating point, of shape (B, K) with at least two classes; got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )


def _check_parameters(parameters: Parameters) -> None:
    if not parameters:
        raise UserError("parameters must name at least one tensor; got none. Are all of the model's frozen?")
    for name, p in parameters.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"parameters must be float32 or float64, because second derivatives in half precision are noise; got "
                f"{p.dtype} for {name!r}"
            )


def _largest_of_softmax(logits: Tensor) -> Tensor:
    """λ_max(diag p − p pᵀ) (B,) in float64; see `softmax_curvature`."""
    p = logits.double().softmax(1)
    top = p.argmax(1, keepdim=True)
    first, others = p.gather(1, top), p.scatter(1, top, 0.0)
    rest = others.sum(1, keepdim=True)  # not 1 − p_(1), which keeps no digit where p is all but one-hot
    second = others.amax(1, keepdim=True)
    root = torch.maximum(second * (2 * first / (first + second)), first * rest)
    for _ in range(_NEWTON_STEPS):
        terms = others / (root - others)
        total = terms.sum(1, keepdim=True)
        slope = (terms / (root - others)).sum(1, keepdim=True)
        step = (1 - root / first - 1 / total) / (slope / total.square() + 1 / first)
        # Not above p_(2): the largest two are equal up to rounding, and the root lies between them.
        root = torch.where(root > second, torch.minimum(root + step, first), first)
    root = torch.where(rest > 0, root.clamp_max(0.5), torch.zeros_like(root))
    return torch.where(p.isfinite().all(1), root.squeeze(1), float("nan"))


def _factor_of_softmax(logits: Tensor) -> Tensor:
    """L (B, K, K) with L Lᵀ = diag p − p pᵀ, in float64: no root of a matrix has to be computed."""
    p = logits.double().softmax(1)
    root = p.sqrt()
    return torch.diag_embed(root) - p.unsqueeze(2) * root.unsqueeze(1)


def _largest_of_symmetric(matrices: Tensor) -> Tensor:
    """Largest eigenvalue (B,) of positive semi-definite matrices (B, K, K), in float64; NaN where not finite."""
    wide = matrices.double()
    finite = wide.isfinite().flatten(1).all(1)
    # LAPACK raises for the whole batch where one matrix is not finite.
    largest = torch.linalg.eigvalsh(torch.where(finite[:, None, None], wide, 0.0))[:, -1].clamp_min(0.0)
    return torch.where(finite, largest, float("nan"))


def _graph_of_gradients(loss_of: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients that can be differentiated again, by name, for the leaves that the loss depends on."""
    loss = loss_of(dict(leaves))
    if loss.numel() != 1:
        raise UserError(f"loss_of must return a scalar; got shape {tuple(loss.shape)}. Did you mean its mean?")
    gradients: dict[str, Tensor] = {}
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    if not gradients:
        raise UserError(
            f"loss_of must depend on the parameters that it is given ({', '.join(leaves)}); it does not. Does it use "
            f"the model's own weights instead of functional_call, or switch gradients off?"
        )
    return gradients


def _hessian_times(vector: dict[str, Tensor], bent: dict[str, Tensor], used: dict[str, Tensor]) -> dict[str, Tensor]:
    """H v by name, without a graph of its own; the graph of the gradients is kept for the next product."""
    if not bent:
        return {name: torch.zeros_like(v) for name, v in vector.items()}
    found = torch.autograd.grad(
        list(bent.values()),
        list(used.values()),
        grad_outputs=[vector[name] for name in bent],
        retain_graph=True,
        allow_unused=True,
    )
    return {name: torch.zeros_like(used[name]) if p is None else p for name, p in zip(used, found, strict=True)}


def _gaussian(like: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
    """A random direction of norm 1, drawn where the generator lives."""
    drawn = {
        name: torch.randn(
            p.shape, generator=generator, dtype=p.dtype, device=p.device if generator is None else generator.device
        ).to(p.device)
        for name, p in like.items()
    }
    return _unit(drawn, otherwise=drawn)


def _from_start(start: Parameters, leaves: dict[str, Tensor], used: dict[str, Tensor]) -> dict[str, Tensor]:
    """The start at norm 1, in the type and on the device of the parameters."""
    if not used.keys() <= start.keys() <= leaves.keys():
        wrong = sorted((used.keys() - start.keys()) | (start.keys() - leaves.keys()))
        raise UserError(f"start must name the parameters that the loss depends on; missing or unknown: {wrong}")
    for name, p in used.items():
        if start[name].shape != p.shape:
            raise UserError(f"start of {name!r} must have shape {tuple(p.shape)}; got {tuple(start[name].shape)}")
    given = {name: start[name].detach().to(p) for name, p in used.items()}
    largest = float(_largest_entry(given))
    if not 0 < largest < math.inf:
        raise UserError(f"start must be finite and not zero; its largest entry is {largest}. None draws a new one")
    return _unit(given, otherwise=given)


def _inner(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.stack([(v * b[name]).sum() for name, v in a.items()]).sum()


def _largest_entry(vector: dict[str, Tensor]) -> Tensor:
    return torch.stack([v.abs().amax() if v.numel() else v.new_zeros(()) for v in vector.values()]).amax()


def _unit(vector: dict[str, Tensor], *, otherwise: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vector at norm 1, or the other one where it is zero; decided on the device."""
    with torch.no_grad():
        # By the largest entry first: squares of what a saturated network leaves would vanish in float32.
        largest = _largest_entry(vector)
        scaled = {name: v / largest for name, v in vector.items()}
        length = _inner(scaled, scaled).sqrt()
        return {name: torch.where(largest == 0, otherwise[name], (v / length).to(v)) for name, v in scaled.items()}
