"""CutMix and MixUp: batches whose images and labels are blends of two, drawn from the generator that is handed in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy.special import betaincinv
from torch import Tensor

from instar.errors import UserError
from instar.evidence import UNLABELLED, Batch


@dataclass(frozen=True)
class MixUp:
    """Each image and its soft label blended with those of a partner: x̃ = λx + (1 − λ)x′, t̃ = λt + (1 − λ)t′.

    One λ ~ Beta(α, α) a batch, and a random permutation of the batch for partners, as in the authors' code. Instances
    with a label are permuted among themselves, and those without (`y` = −1) among themselves: the image of an
    unlabelled one never carries part of a label, and no labelled one loses part of its target.

    Args:
        alpha: α, positive; 1 makes λ uniform, small values keep most images nearly whole.

    Raises:
        UserError: alpha is not positive and finite; when called, labels or soft labels that do not fit `classes`.

    Source:
        Zhang et al. (ICLR 2018), "mixup: Beyond Empirical Risk Minimization", section 2. Deviations: partners within
        the labelled and within the unlabelled; none if all have labels.

    Example:
        >>> batch = Batch(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 2]))
        >>> mixed = MixUp(1.0)(batch, 3, torch.Generator().manual_seed(0))
        >>> mixed.target.shape, mixed.target.sum(1).tolist()
        (torch.Size([4, 3]), [1.0, 1.0, 1.0, 1.0])
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no parameter of a Beta distribution."""
        _check_alpha("MixUp", self.alpha)

    def __call__(self, batch: Batch, classes: int, generator: torch.Generator) -> Batch:
        """The batch, mixed.

        Args:
            batch: Images, labels and, if there are any, soft labels.
            classes: Number of classes K, which hard labels do not tell.
            generator: Where the numbers come from.

        Returns:
            The batch with new `x`; `target` (B, K), whose rows sum to 1 (those without a label are 0 everywhere); and
            `y`, the label with the larger share, its own if they are equal. All else belongs to the instance itself.
        """
        own = _share(self.alpha, generator)
        partner = _partners(batch, generator)
        mixed = torch.lerp(batch.x[partner], batch.x, own)  # lerp stays between its ends, a·λ + b·(1 − λ) need not
        return _labelled(replace(batch, x=mixed), classes, partner, own)


@dataclass(frozen=True)
class CutMix:
    """A rectangle of each image replaced by the same rectangle of a partner's, and labels shared by area.

    λ ~ Beta(α, α) is drawn once a batch; the rectangle of ⌊H√(1 − λ)⌋×⌊W√(1 − λ)⌋ pixels around a uniform pixel is
    cut off at the borders, and the partner's share of the soft label is *exactly* the share of pixels that is left of
    it. Partners are drawn as in `MixUp`: labelled with labelled, unlabelled with unlabelled.

    Args:
        alpha: α, positive; 1 in the paper and where CutMix is combined with adversarial training.

    Raises:
        UserError: alpha is not positive and finite; when called, labels or soft labels that do not fit `classes`.

    Source:
        Yun et al. (ICCV 2019), "CutMix", section 3.1 and algorithm A1; with adversarial training: Rebuffi et al.
        (2021). Deviations: as in the authors' code, sides are rounded down to even numbers, and one rectangle serves
        the batch; partners within the labelled and within the unlabelled.

    Example:
        >>> batch = Batch(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 8, 8), torch.tensor([0, 1]))
        >>> mixed = CutMix(1.0)(batch, 2, torch.Generator().manual_seed(1))
        >>> bool((mixed.x.mean((1, 2, 3)) == mixed.target[:, 1]).all())
        True
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no parameter of a Beta distribution."""
        _check_alpha("CutMix", self.alpha)

    def __call__(self, batch: Batch, classes: int, generator: torch.Generator) -> Batch:
        """The batch, mixed; arguments and result as of `MixUp`."""
        height, width = batch.x.shape[-2:]
        side = math.sqrt(1 - _share(self.alpha, generator))
        down, right = torch.rand(2, generator=generator, device=generator.device, dtype=torch.float64).tolist()
        top, bottom = _interval(down, side, height)
        left, rightmost = _interval(right, side, width)
        partner = _partners(batch, generator)
        mixed = batch.x.clone()
        mixed[..., top:bottom, left:rightmost] = batch.x[partner, :, top:bottom, left:rightmost]
        own = 1 - (bottom - top) * (rightmost - left) / (height * width)
        return _labelled(replace(batch, x=mixed), classes, partner, own)


def _check_alpha(kind: str, alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise UserError(f"alpha of {kind} must be positive and finite; got {alpha}. No mixing at all is no {kind}")


def _share(alpha: float, generator: torch.Generator) -> float:
    """λ ~ Beta(α, α), by inversion: torch.distributions cannot draw from a generator."""
    uniform = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    return float(betaincinv(alpha, alpha, uniform.item()))


def _interval(uniform: float, share: float, length: int) -> tuple[int, int]:
    """Begin and end of the rectangle along one side, cut off at the borders."""
    centre, half = int(uniform * length), int(length * share) // 2
    return max(centre - half, 0), min(centre + half, length)


def _partners(batch: Batch, generator: torch.Generator) -> Tensor:
    """Positions (B,): a random permutation that maps labelled to labelled and unlabelled to unlabelled."""
    order = torch.rand(len(batch), generator=generator, device=generator.device, dtype=torch.float64)
    unlabelled = (batch.y == UNLABELLED).double()
    # Both orders list the labelled first and then the unlabelled, once by position and once at random: no size of a
    # group is asked for, for which a GPU would have to be waited for.
    partner = torch.empty_like(batch.y)
    partner[unlabelled.argsort(stable=True)] = (unlabelled + order.to(batch.y.device)).argsort(stable=True)
    return partner


def _labelled(mixed: Batch, classes: int, partner: Tensor, own: float) -> Batch:
    """The mixed images with their labels: `own` is the share of the instance itself, 1 − own that of its partner."""
    target = _targets(mixed, classes)
    return replace(
        mixed,
        target=torch.lerp(target[partner], target, own),
        y=mixed.y if own >= 0.5 else mixed.y[partner],
    )


def _targets(batch: Batch, classes: int) -> Tensor:
    """Soft labels (B, K) before mixing; rows without a label are 0."""
    known = (batch.y != UNLABELLED)[:, None]
    if batch.target is not None:
        if batch.target.shape != (len(batch), classes):
            raise UserError(
                f"soft labels must be ({len(batch)}, {classes}), one row for each image and one column for each class; "
                f"got {tuple(batch.target.shape)}"
            )
        return torch.where(known, batch.target, 0)
    # On a GPU the values are not looked at, which would make it wait; scatter_ itself then fails on a wrong one.
    if batch.y.device.type == "cpu" and len(batch) and not -1 <= int(batch.y.min()) <= int(batch.y.max()) < classes:
        raise UserError(
            f"labels must be in 0..{classes - 1} for {classes} classes, or −1 without a label; got "
            f"{int(batch.y.min())}..{int(batch.y.max())}"
        )
    target = torch.zeros(len(batch), classes, dtype=batch.x.dtype, device=batch.x.device)
    return target.scatter_(1, batch.y.clamp(min=0)[:, None], known.to(target.dtype))
