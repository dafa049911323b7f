"""Pre-activation residual networks, with the key names of RobustBench, Rice et al. and AWP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from instar.errors import unknown
from instar.models.classifier import Classifier, build_activation
from instar.models.heads import build_head
from instar.models.precision import FloatStemConv2d

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
SHORTCUTS = ("activated", "input")


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and activation, with a residual connection.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        activation: Name of the activation.
        shortcut_from: What a projecting shortcut sees: the ``"activated"`` input or the ``"input"`` itself.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int = 1,
        activation: str = "relu",
        shortcut_from: str = "activated",
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projects = stride != 1 or in_channels != channels
        self.from_activated = shortcut_from == "activated"
        if self.projects:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False))
        self.activation = build_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        out = self.activation(self.bn1(x))
        residual = self.shortcut(out if self.from_activated else x) if self.projects else x
        out = self.conv2(self.activation(self.bn2(self.conv1(out))))
        # In place: under autocast the sum stays bfloat16 although the stem hands on float32 (torch.fx would record
        # `+=` out of place).
        return out.add_(residual)


class PreActResNet(Classifier):
    """A pre-activation residual network with four stages of 1, 2, 4 and 8 times ``width`` channels.

    Args:
        depth: 18 or 34.
        classes: Number of classes K.
        channels: Channels of the images.
        image_size: Height and width in pixels; accepted for uniformity, any size works.
        width: Channels of the first stage; 64 is the published one.
        mean: Normalisation means in [0, 1]; None is 0.
        std: Normalisation standard deviations; None is 1.
        shortcut: ``"activated"`` as in Rice et al., AWP and RobustBench's ``PreActBlockV2``, or ``"input"`` as in
            RobustBench's ``PreActBlock``. The keys are the same: a file cannot tell, and the wrong choice gives
            chance-level accuracy.
        final_norm: Whether BatchNorm and activation follow the last stage, as in Rice et al. and AWP; published nets
            without it exist (pytorch-cifar, Andriushchenko and Flammarion 2020).
        activation: ``"relu"``, ``"silu"``, ``"softplus"`` or ``"gelu"``.
        head: ``"linear"`` or ``"cosine"``.
        scale: Logit scale of a cosine head.
        head_bias: Whether the head has a bias.

    Raises:
        UserError: If a name is unknown.

    Source:
        He et al. 2016, arXiv 1603.05027; Rice et al. 2020, arXiv 2002.11569, ``preactresnet.py``. Initialisation:
        PyTorch's default, as theirs.
    Deviations:
        Adaptive instead of 4x4 average pooling: equal at 32x32, and other sizes work. Buffers ``normalize.mean`` and
        ``normalize.std``.

    Example:
        >>> import torch
        >>> PreActResNet(18, classes=10, width=4)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        depth: int,
        *,
        classes: int,
        channels: int = 3,
        image_size: int = 32,
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        shortcut: str = "activated",
        final_norm: bool = True,
        activation: str = "relu",
        head: str = "linear",
        scale: float = 8.0,
        head_bias: bool = True,
    ) -> None:
        super().__init__(channels=channels, mean=mean, std=std)
        if depth not in DEPTHS:
            raise unknown("depth of PreActResNet", depth, map(str, DEPTHS))
        if shortcut not in SHORTCUTS:
            raise unknown("shortcut", shortcut, SHORTCUTS)
        self.conv1 = FloatStemConv2d(channels, width, 3, padding=1, bias=False)
        before = width
        for stage, count in enumerate(DEPTHS[depth]):
            after = width * 2**stage
            blocks = []
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(PreActBlock(before, after, stride=stride, activation=activation, shortcut_from=shortcut))
                before = after
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if final_norm:
            self.bn: nn.Module = nn.BatchNorm2d(before)
            self.activation = build_activation(activation)
        else:
            self.bn = nn.Identity()
            self.activation = nn.Identity()
        self.linear = build_head(head, before, classes, scale=scale, bias=head_bias)

    def features(self, x: Tensor) -> Tensor:
        """The features (B, 8 * width) of images (B, C, H, W) in [0, 1]."""
        out = self.conv1(self.normalize(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = self.activation(self.bn(out))
        return functional.adaptive_avg_pool2d(out, 1).flatten(1)
