"""Wide residual networks, with the key names of TRADES and RobustBench."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from instar.errors import UserError, unknown
from instar.models.classifier import Classifier, build_activation
from instar.models.heads import build_head
from instar.models.precision import FloatStemConv2d

PADDINGS = ("symmetric", "same")


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and activation, with a residual connection.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        dropout: Probability of the dropout between the convolutions.
        activation: Name of the activation.
        padding: ``"symmetric"``, or ``"same"`` for the padding of TensorFlow and JAX, which at stride 2 adds pixels at
            the right and bottom only.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        stride: int = 1,
        dropout: float = 0.0,
        activation: str = "relu",
        padding: str = "symmetric",
    ) -> None:
        super().__init__()
        uneven = padding == "same" and stride == 2
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if uneven else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=0 if uneven else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.projects = in_channels != channels
        if self.projects:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.activation = build_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        activated = self.activation(self.bn1(x))
        out = self.activation(self.bn2(self.conv1(self.pad(activated))))
        out = self.conv2(self.dropout(out))
        # In place: under autocast the sum stays bfloat16 although the stem hands on float32 (torch.fx would record
        # `+=` out of place).
        return out.add_(self.convShortcut(activated) if self.projects else x)


class WideStage(nn.Module):
    """Blocks of the same width, the first one with the stride; in a state dict they are ``layer.0``, ``layer.1``, ...

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[WideBlock]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The blocks one after the other."""
        return self.layer(x)


class WideResNet(Classifier):
    """A WRN-depth-factor: a stem of 16 channels, then three stages of 1, 2 and 4 times ``width`` channels.

    Args:
        depth: Number of convolutions, 6n + 4: 10, 16, 22, 28, 34, 40, 70, ...
        factor: Widening factor; the first stage has ``16 * factor`` channels.
        classes: Number of classes K.
        channels: Channels of the images.
        image_size: Height and width in pixels; accepted for uniformity, any size works.
        width: Channels of the first stage, instead of ``16 * factor``.
        mean: Normalisation means in [0, 1]; None is 0.
        std: Normalisation standard deviations; None is 1.
        dropout: Probability of the dropout in every block, in [0, 1); 0, as the published robust nets. Drawn from
            torch's default generator.
        padding: ``"symmetric"`` (TRADES), or ``"same"`` as in DeepMind's nets (Gowal 2020, Rebuffi 2021, Wang 2023 on
            RobustBench).
        activation: ``"relu"``, ``"silu"``, ``"softplus"`` or ``"gelu"``.
        head: ``"linear"`` or ``"cosine"``.
        scale: Logit scale of a cosine head.
        head_bias: Whether the head has a bias.

    Raises:
        UserError: If the depth is not 6n + 4 or a name is unknown.

    Source:
        Zagoruyko and Komodakis 2016, arXiv 1605.07146; TRADES, ``models/wideresnet.py``. Initialisation as there:
        convolutions N(0, 2 / (k * k * out)), bias of the head 0.
    Deviations:
        TRADES' unused ``sub_block1`` does not exist; its keys are dropped when such a file is loaded, logits are
        equal. Adaptive instead of 8x8 average pooling: equal at 32x32. Buffers ``normalize.mean`` and
        ``normalize.std``.

    Example:
        >>> import torch
        >>> WideResNet(10, 1, classes=10)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    head_name: ClassVar[str] = "fc"

    block1: nn.Module
    block2: nn.Module
    block3: nn.Module

    def __init__(
        self,
        depth: int,
        factor: int,
        *,
        classes: int,
        channels: int = 3,
        image_size: int = 32,
        width: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dropout: float = 0.0,
        padding: str = "symmetric",
        activation: str = "relu",
        head: str = "linear",
        scale: float = 8.0,
        head_bias: bool = True,
    ) -> None:
        super().__init__(channels=channels, mean=mean, std=std)
        if depth < 10 or (depth - 4) % 6:
            below = max(10, depth - (depth - 4) % 6)
            raise UserError(
                f"depth of a wide ResNet must be 6n + 4, at least 10; got {depth}. Did you mean {below} or {below + 6}?"
            )
        if not 1 <= factor <= 64:
            raise UserError(f"widening factor of a wide ResNet must be from 1 to 64; got {factor}")
        if padding not in PADDINGS:
            raise unknown("padding", padding, PADDINGS)
        self.padding = padding
        width = width or 16 * factor
        self.conv1 = FloatStemConv2d(channels, 16, 3, padding=1, bias=False)
        before = 16
        for stage in range(3):
            after = width * 2**stage
            blocks = []
            for number in range((depth - 4) // 6):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(
                    WideBlock(before, after, stride=stride, dropout=dropout, activation=activation, padding=padding)
                )
                before = after
            self.add_module(f"block{stage + 1}", WideStage(blocks))
        self.bn1 = nn.BatchNorm2d(before)
        self.activation = build_activation(activation)
        self.fc = build_head(head, before, classes, scale=scale, bias=head_bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
        if self.fc.bias is not None:
            nn.init.zeros_(self.fc.bias)

    def features(self, x: Tensor) -> Tensor:
        """The features (B, 4 * width) of images (B, C, H, W) in [0, 1]."""
        out = self.conv1(self.normalize(x))
        out = self.block3(self.block2(self.block1(out)))
        out = self.activation(self.bn1(out))
        return functional.adaptive_avg_pool2d(out, 1).flatten(1)
