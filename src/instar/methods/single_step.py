"""Adversarial training with one attack step: FGSM, Fast-AT (Wong et al. 2020), N-FGSM (de Jorge et al. 2022)."""

from __future__ import annotations

from instar.attacks import PGD, Uniform, Zero
from instar.method import Method
from instar.schedules import Scaled, Schedule
from instar.signals import CrossEntropy
from instar.threat import ball


def fgsm_at(*, eps: float | Schedule = 8 / 255, norm: str = "Linf") -> Method:
    """FGSM-AT: adversarial training with one step from the clean image to the edge of the ball.

    Equation:
        min_θ mean_i CE(f_θ(x_i + ε sign ∇CE(x_i)), y_i)

    Args:
        eps: Radius in the unit of inputs in [0, 1].
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. Its attack is N-FGSM's without noise.

    Raises:
        UserError: An impossible radius or norm.

    Example:
        >>> fgsm_at(eps=0.1).attack
        PGD(Linf(0.1), steps=1, step_size=0.1, start=Zero(), mode='train')

    Source: Goodfellow et al. 2015.
    Known criticism: catastrophic overfitting at ε = 8/255: 0 % under PGD while its own attack is withstood.
    """
    attack = PGD(ball(norm, eps), steps=1, step_size=eps, start=Zero(), mode="train")
    return Method(attack, CrossEntropy(), updates_bn=("adv",))


def fast_at(
    *,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule | None = None,
    norm: str = "Linf",
) -> Method:
    """Fast-AT (RS-FGSM): one step of 1.25 ε from a random start, brought back into the ball.

    Equation:
        min_θ mean_i CE(f_θ(Π(x_i + η + α sign ∇CE(x_i + η))), y_i),   η uniform in the ball

    Args:
        eps: Radius in the unit of inputs in [0, 1].
        step_size: α; None is 1.25 ε.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method, a fifth of the cost of PGD-AT.

    Raises:
        UserError: An impossible radius, step or norm.

    Example:
        >>> fast_at(eps=8/255).attack
        PGD(steps=1, step_size=10/255, mode='train')

    Source: Wong et al. 2020; official code (attack in train mode).
    Deviations: the attack computes gradients of the input only.
    Known criticism: catastrophic overfitting with long schedules or large ε.
    """
    step = _multiple(1.25, eps) if step_size is None else step_size
    return Method(PGD(ball(norm, eps), steps=1, step_size=step, mode="train"), CrossEntropy(), updates_bn=("adv",))


def n_fgsm(
    *,
    noise: float = 2.0,
    eps: float | Schedule = 8 / 255,
    step_size: float | Schedule | None = None,
    norm: str = "Linf",
) -> Method:
    """N-FGSM: one step from strong noise, not brought back into the ball.

    Equation:
        min_θ mean_i CE(f_θ(clip(x_i + η + α sign ∇CE(x_i + η))), y_i),   η uniform in the ball of k ε

    Args:
        noise: k, the noise's reach in units of ε; 2 in the paper, 3 for SVHN at 12/255.
        eps: Radius in the unit of inputs in [0, 1].
        step_size: α; None is ε.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.

    Returns:
        The method. Its images may be (k + 1) ε from the clean ones; evaluation is at ε. With k = 0 it is FGSM-AT.

    Raises:
        UserError: A negative k, or an impossible radius, step or norm.

    Example:
        >>> n_fgsm(eps=0.1).attack
        PGD(Linf(0.1), steps=1, step_size=0.1, start=Uniform(2.0), mode='train', project=False)

    Source: de Jorge et al. 2022; official code (attack in train mode).
    Deviations: none known.
    """
    step = eps if step_size is None else step_size
    attack = PGD(ball(norm, eps), steps=1, step_size=step, start=Uniform(float(noise)), mode="train", project=False)
    return Method(attack, CrossEntropy(), updates_bn=("adv",))


def _multiple(factor: float, eps: float | Schedule) -> float | Schedule:
    """A multiple of a radius that may change with training."""
    return Scaled(eps, factor) if isinstance(eps, Schedule) else factor * eps
