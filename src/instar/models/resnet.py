"""Post-activation residual networks for small images, with the key names of TRADES, RobustBench and pytorch-cifar."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from instar.errors import unknown
from instar.models.classifier import Classifier, build_activation
from instar.models.heads import build_head
from instar.models.precision import FloatStemConv2d

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
STEMS = ("cifar", "imagenet")
IMAGENET_STEM_FROM = 96  # pixels: below it, a stride of 4 before the first block leaves too little to look at


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        activation: Name of the activation.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, activation: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.activation = build_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # In place, as published: under autocast the sum stays bfloat16 although the stem hands on float32. Not `+=`,
        # which torch.fx would record as a sum out of place.
        out = out.add_(self.shortcut(x))
        return self.activation(out)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with a residual connection; the output has 4 times ``channels``.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the 3x3 convolution.
        stride: Stride of the 3x3 convolution.
        activation: Name of the activation.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, activation: str = "relu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = _shortcut(in_channels, 4 * channels, stride)
        self.activation = build_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 4 * channels, H / stride, W / stride)."""
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.activation(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out.add_(self.shortcut(x))
        return self.activation(out)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNet(Classifier):
    """A post-activation residual network with four stages of 1, 2, 4 and 8 times ``width`` channels.

    Args:
        depth: 18, 34 (basic blocks) or 50 (bottlenecks).
        classes: Number of classes K.
        channels: Channels of the images.
        image_size: Height and width in pixels; it only chooses the default stem, any size works.
        width: Channels of the first stage; 64 is the published one.
        mean: Normalisation means in [0, 1]; None is 0.
        std: Normalisation standard deviations; None is 1.
        stem: ``"cifar"`` (3x3, stride 1) or ``"imagenet"`` (7x7, stride 2, then max pooling); None chooses
            ``"imagenet"`` from 96 pixels on.
        activation: ``"relu"``, ``"silu"``, ``"softplus"`` or ``"gelu"``.
        head: ``"linear"`` or ``"cosine"``.
        scale: Logit scale of a cosine head.
        head_bias: Whether the head has a bias.

    Raises:
        UserError: If a name is unknown.

    Source:
        He et al. 2015, arXiv 1512.03385; layout and key names of pytorch-cifar, as used by TRADES, GAIRAT and
        RobustBench.
        Initialisation: PyTorch's default (Kaiming uniform), as theirs.
    Deviations:
        Adaptive instead of 4x4 average pooling: equal at 32x32, and other sizes work. Buffers ``normalize.mean`` and
        ``normalize.std``.

    Example:
        >>> import torch
        >>> ResNet(18, classes=10, width=4)(torch.rand(2, 3, 32, 32)).shape
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
        stem: str | None = None,
        activation: str = "relu",
        head: str = "linear",
        scale: float = 8.0,
        head_bias: bool = True,
    ) -> None:
        super().__init__(channels=channels, mean=mean, std=std)
        if depth not in DEPTHS:
            raise unknown("depth of ResNet", depth, map(str, DEPTHS))
        stem = stem or ("imagenet" if image_size >= IMAGENET_STEM_FROM else "cifar")
        if stem not in STEMS:
            raise unknown("stem", stem, STEMS)
        self.pool: nn.Module
        if stem == "cifar":
            self.conv1 = FloatStemConv2d(channels, width, 3, padding=1, bias=False)
            self.pool = nn.Identity()
        else:
            self.conv1 = FloatStemConv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.activation = build_activation(activation)
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if depth >= 50 else BasicBlock
        counts = DEPTHS[depth]
        before = width
        for stage, count in enumerate(counts):
            inner = width * 2**stage
            blocks = []
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(block(before, inner, stride=stride, activation=activation))
                before = inner * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = build_head(head, before, classes, scale=scale, bias=head_bias)

    def features(self, x: Tensor) -> Tensor:
        """The features (B, 8 * width), 4 times as many for ResNet-50, of images (B, C, H, W) in [0, 1]."""
        out = self.pool(self.activation(self.bn1(self.conv1(self.normalize(x)))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return functional.adaptive_avg_pool2d(out, 1).flatten(1)
