"""Small convolutional networks: one for anything from 8x8 digits up, and the published ones for MNIST."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from instar.errors import UserError
from instar.models.classifier import Classifier, build_activation
from instar.models.heads import build_head
from instar.models.precision import FloatStemConv2d


class SmallCNN(Classifier):
    """Four 3x3 convolutions with BatchNorm: minutes of adversarial training on a CPU.

    Channels are w, 2w, 2w and 4w; the second convolution halves the image, the fourth too from 16 pixels on; what
    remains is averaged to 2x2, which keeps where a stroke was.

    Args:
        classes: Number of classes K.
        channels: Channels of the images.
        image_size: Height and width in pixels, at least 4.
        width: Channels w of the first convolution.
        mean: Normalisation means in [0, 1]; None is 0.
        std: Normalisation standard deviations; None is 1.
        activation: ``"relu"``, ``"silu"``, ``"softplus"`` or ``"gelu"``.
        head: ``"linear"`` or ``"cosine"``.
        scale: Logit scale of a cosine head.
        head_bias: Whether the head has a bias.

    Raises:
        UserError: If a name is unknown or the image too small.

    Source:
        Ours; no published counterpart. Initialisation: Kaiming normal for convolutions (He et al. 2015), PyTorch's
        default for the head.
    Deviations: none.

    Example:
        >>> import torch
        >>> SmallCNN(classes=10, channels=1, image_size=8, width=4)(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 3,
        image_size: int = 32,
        width: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        activation: str = "relu",
        head: str = "linear",
        scale: float = 8.0,
        head_bias: bool = True,
    ) -> None:
        super().__init__(channels=channels, mean=mean, std=std)
        _at_least("small_cnn", 4, image_size)
        self.conv1 = FloatStemConv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.conv4 = nn.Conv2d(2 * width, 4 * width, 3, stride=2 if image_size >= 16 else 1, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * width)
        self.activation = build_activation(activation)
        self.linear = build_head(head, 16 * width, classes, scale=scale, bias=head_bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """The features (B, 16 * width) of images (B, C, H, W) in [0, 1]."""
        out = self.activation(self.bn1(self.conv1(self.normalize(x))))
        out = self.activation(self.bn2(self.conv2(out)))
        out = self.activation(self.bn3(self.conv3(out)))
        out = self.activation(self.bn4(self.conv4(out)))
        return functional.adaptive_avg_pool2d(out, 2).flatten(1)


class MnistCNN(Classifier):
    """The four-convolution network without BatchNorm of the MNIST experiments of TRADES.

    Args:
        classes: Number of classes K.
        channels: Channels of the images.
        image_size: Height and width in pixels, at least 16; 28 is the published one.
        width: Channels of the first two convolutions, the other two have twice as many; 32 is the published one.
        mean: Normalisation means in [0, 1]; None is 0, as published.
        std: Normalisation standard deviations; None is 1, as published.
        activation: ``"relu"`` (published), ``"silu"``, ``"softplus"`` or ``"gelu"``.
        dropout: Probability of the dropout in training mode, in [0, 1). Drawn from torch's default generator.
        head: ``"linear"`` or ``"cosine"``.
        scale: Logit scale of a cosine head.
        head_bias: Whether the head has a bias.

    Raises:
        UserError: If a name is unknown or the image too small.

    Source:
        TRADES, ``models/small_cnn.py``; first used by Carlini and Wagner 2017. Initialisation as there: Kaiming normal
        for convolutions with bias 0, PyTorch's default for hidden layers, zero for the last one.
    Deviations:
        A cosine head keeps PyTorch's default initialisation: rows of zeros have no direction.

    Example:
        >>> import torch
        >>> MnistCNN(classes=10, width=4)(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    head_name: ClassVar[str] = "classifier.fc3"

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 1,
        image_size: int = 28,
        width: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        activation: str = "relu",
        dropout: float = 0.5,
        head: str = "linear",
        scale: float = 8.0,
        head_bias: bool = True,
    ) -> None:
        super().__init__(channels=channels, mean=mean, std=std)
        _at_least("mnist_cnn", 16, image_size, instead=" Take small_cnn.")
        side = ((image_size - 4) // 2 - 4) // 2
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=FloatStemConv2d(channels, width, 3),
                relu1=build_activation(activation),
                conv2=nn.Conv2d(width, width, 3),
                relu2=build_activation(activation),
                maxpool1=nn.MaxPool2d(2, 2),
                conv3=nn.Conv2d(width, 2 * width, 3),
                relu3=build_activation(activation),
                conv4=nn.Conv2d(2 * width, 2 * width, 3),
                relu4=build_activation(activation),
                maxpool2=nn.MaxPool2d(2, 2),
            )
        )
        last = build_head(head, 200, classes, scale=scale, bias=head_bias)
        self.classifier = nn.ModuleDict(
            OrderedDict(
                fc1=nn.Linear(2 * width * side * side, 200),
                relu1=build_activation(activation),
                drop=nn.Dropout(dropout),
                fc2=nn.Linear(200, 200),
                relu2=build_activation(activation),
                fc3=last,
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if head == "linear":
            nn.init.zeros_(last.weight)
            if last.bias is not None:
                nn.init.zeros_(last.bias)

    def features(self, x: Tensor) -> Tensor:
        """The features (B, 200), after the second hidden layer, of images (B, C, H, W) in [0, 1]."""
        out = self.feature_extractor(self.normalize(x)).flatten(1)
        layers = self.classifier
        out = layers["drop"](layers["relu1"](layers["fc1"](out)))
        return layers["relu2"](layers["fc2"](out))


class SatCNN(Classifier):
    """The three-convolution network without BatchNorm of the MNIST experiments of SAT.

    Convolutions of 8x8 (stride 2, padding 3), 6x6 (stride 2, padding 3) and 5x5 (stride 1) with w, 2w and 2w channels,
    each followed by the activation, and one linear layer; 2048 features for 28x28 images and w = 64.

    Args:
        classes: Number of classes K.
        channels: Channels of the images.
        image_size: Height and width in pixels, at least 16; 28 is the published one.
        width: Channels w of the first convolution; 64 is the published number.
        mean: Normalisation means in [0, 1]; None is 0, as published.
        std: Normalisation standard deviations; None is 1, as published.
        activation: ``"relu"`` (published), ``"silu"``, ``"softplus"`` or ``"gelu"``.
        head: ``"linear"`` or ``"cosine"``.
        scale: Logit scale of a cosine head.
        head_bias: Whether the head has a bias.

    Raises:
        UserError: If a name is unknown or the image too small.

    Source:
        Sitawarin et al. 2021 (SAT), training code, MNIST; the same network as in Wang et al. 2019 (Dynamic-AT).
        Initialisation: PyTorch's default.
    Deviations: none.

    Example:
        >>> import torch
        >>> net = SatCNN(classes=10)
        >>> net.features(torch.rand(2, 1, 28, 28)).shape, net(torch.rand(2, 1, 28, 28)).shape
        (torch.Size([2, 2048]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 1,
        image_size: int = 28,
        width: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        activation: str = "relu",
        head: str = "linear",
        scale: float = 8.0,
        head_bias: bool = True,
    ) -> None:
        super().__init__(channels=channels, mean=mean, std=std)
        _at_least("sat_cnn", 16, image_size, instead=" Take small_cnn.")
        side = (image_size - 2) // 2 + 1
        side = side // 2 + 1 - 4
        self.conv1 = FloatStemConv2d(channels, width, 8, stride=2, padding=3)
        self.conv2 = nn.Conv2d(width, 2 * width, 6, stride=2, padding=3)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 5)
        self.activation = build_activation(activation)
        self.linear = build_head(head, 2 * width * side * side, classes, scale=scale, bias=head_bias)

    def features(self, x: Tensor) -> Tensor:
        """The features (B, 2048 for 28x28 images) of images (B, C, H, W) in [0, 1]."""
        out = self.activation(self.conv1(self.normalize(x)))
        out = self.activation(self.conv2(out))
        return self.activation(self.conv3(out)).flatten(1)


def _at_least(name: str, least: int, image_size: int, *, instead: str = "") -> None:
    if image_size < least:
        raise UserError(
            f"{name} needs images of at least {least}x{least} pixels; got {image_size}x{image_size}.{instead}"
        )
