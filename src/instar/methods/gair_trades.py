"""GAIR-TRADES: TRADES with GAIRAT's weights (Zhang et al. 2021)."""

from __future__ import annotations

from instar.attacks import PGD, Gaussian
from instar.errors import unknown
from instar.method import Method
from instar.methods.gairat import check_steps, geometry_weight
from instar.schedules import Schedule
from instar.signals import KL, CrossEntropy
from instar.threat import ball


def gair_trades(
    *,
    beta: float | Schedule = 6.0,
    weighted: str = "ce",
    shift: float | Schedule = -1.0,
    burn_in: float = 0.75,
    weight: str = "tanh",
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule = 2 / 255,
    steps: int | Schedule = 10,
    norm: str = "Linf",
) -> Method:
    """GAIR-TRADES: TRADES that weighs an instance more, the fewer attack steps suffice to fool it.

    Equation:
        min_θ mean_i [ ω̂_i CE(f(x_i), y_i) + β KL(p(x_i) ‖ p(x′_i)) ],   ω̂_i as in GAIRAT, κ counted along the KL attack

    Args:
        beta: β of TRADES.
        weighted: Which term carries the weights: ``"ce"`` (defaults of the official script), ``"kl"`` or ``"both"``.
        shift: λ after the burn-in.
        burn_in: Share of the run with uniform weights; 75 of 100 epochs in the official script.
        weight: ``"tanh"``, ``"sigmoid"``, ``"discrete"`` or ``"constant"``.
        eps: Radius in the unit of inputs in [0, 1]; the official code uses 0.031.
        step_size: Step of the attack; the official code uses 0.007.
        steps: Attack steps, at least 2.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. During the burn-in, and with λ = ∞, it is TRADES.

    Raises:
        UserError: An unknown term, fewer than 2 steps, λ of NaN, or an impossible radius, step or norm.

    Example:
        >>> gair_trades(weighted="kl", burn_in=0).loss
        CrossEntropy('clean') + 6.0 * (GeometryWeight(-1.0) * KL())

    Source: Zhang et al. 2021; a deleted script of the official code for the defaults.
    Deviations: a reconstruction. The official script as committed always weighed the adversarial cross-entropy in both
        terms, by a condition that is always true; its authors say that either term or both may be weighed.
    """
    check_steps(steps)
    if weighted not in ("ce", "kl", "both"):
        raise unknown("term to weigh", weighted, ["ce", "kl", "both"])
    omega = geometry_weight(shift, burn_in, weight)
    accurate = omega * CrossEntropy("clean") if weighted != "kl" else CrossEntropy("clean")
    robust = omega * KL() if weighted != "ce" else KL()
    attack = PGD(ball(norm, eps), KL(), steps=steps, step_size=step_size, start=Gaussian(0.001))
    return Method(attack, accurate + beta * robust)
