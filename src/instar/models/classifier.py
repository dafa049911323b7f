"""What every network of this package is: normalisation, features, head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from instar.errors import unknown
from instar.models.normalize import Normalize

ACTIVATIONS = ("relu", "silu", "softplus", "gelu")


class Classifier(nn.Module):
    """The abstract base of the networks: ``forward(x) = head(features(x))`` with ``normalize`` applied first.

    Args:
        channels: Channels of the images.
        mean: Normalisation means in [0, 1]; None is 0.
        std: Normalisation standard deviations; None is 1.

    Attributes:
        head_name: The published name that the last layer is registered under, so that published weights load.
    """

    head_name: ClassVar[str] = "linear"

    def __init__(self, *, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        self.normalize = Normalize(mean=mean, std=std, channels=channels)

    @property
    def head(self) -> nn.Linear:
        """The last layer, (B, D) -> (B, K)."""
        return self.get_submodule(self.head_name)  # type: ignore[return-value]

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """The features (B, D) of images (B, C, H, W) in [0, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W) in [0, 1]."""
        return self.head(self.features(x))


def build_activation(name: str) -> nn.Module:
    """An activation by name.

    Args:
        name: ``"relu"``, ``"silu"`` (swish), ``"softplus"`` (beta 1) or ``"gelu"``. Smooth ones raise robustness by 1
            to 2 points on wide nets.

    Returns:
        A module without parameters.

    Raises:
        UserError: If ``name`` is unknown.

    Source:
        Gowal et al. 2020, "Uncovering the Limits of Adversarial Training", section 4.4 (silu, gelu, softplus).

    Example:
        >>> build_activation("silu")
        SiLU()
    """
    if name == "relu":
        # In place: every use follows a normalisation or a sum whose backward does not need its own result.
        return nn.ReLU(inplace=True)
    smooth = {"silu": nn.SiLU, "softplus": nn.Softplus, "gelu": nn.GELU}
    if name not in smooth:
        raise unknown("activation", name, ACTIVATIONS)
    return smooth[name]()
