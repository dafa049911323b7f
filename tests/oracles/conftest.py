"""The golden network, and the numbers that the official codes produced on it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instar import Batch
from instar.models.heads import Cosine

GOLDEN = Path(__file__).parent / "golden"


class GoldenNetwork(nn.Module):
    """The network of golden/README.md."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.BatchNorm2d(8)
        self.l = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.l(F.avg_pool2d(F.softplus(self.b(self.c(x))), 8).flatten(1))


class GoldenCosineNetwork(GoldenNetwork):
    """The same network with logits 8 z, z the cosines of features and rows of the last layer's weight, without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Cosine(128, 10, scale=8.0, bias=False)
        self.head.weight = self.l.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.avg_pool2d(F.softplus(self.b(self.c(x))), 8).flatten(1))


@dataclass(frozen=True)
class Golden:
    """One file of golden values, with the network and the batch they belong to."""

    network: GoldenNetwork
    batch: Batch
    noise: Tensor
    numbers: dict[str, Tensor]

    def loss_and_gradients_agree(self, loss: Tensor) -> None:
        """Backpropagates the mean of `loss` (B,) and compares everything the file holds about it."""
        mean = loss.mean()
        torch.testing.assert_close(mean.detach(), self.numbers["loss"], rtol=0, atol=1e-10)
        mean.backward()
        for name, parameter in self.network.named_parameters():
            if name == "l.bias" and parameter.grad is None:
                continue  # the cosine network has none
            expected = self.numbers[f"grad.{name}"]
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def _tensors(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Opens a file of golden values by its name."""

    def opened(name: str) -> Golden:
        inputs = _tensors("inputs")
        network = (GoldenCosineNetwork() if name == "spat" else GoldenNetwork()).double()
        numbers = _tensors(name)
        weights = inputs | numbers  # one file has weights of its own
        stored = {k.split(".", 1)[1]: v for k, v in weights.items() if k.startswith(("param", "buffer"))}
        assert not network.load_state_dict(stored, strict=name != "spat").unexpected_keys
        return Golden(network, Batch(inputs["x"], inputs["y"]), inputs["noise"], numbers)

    return opened


class LoopNetwork(nn.Module):
    """Small and smooth, with BatchNorm: 2-channel images of 4×4 pixels to 3 classes, in float64."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 2).flatten(1))


@pytest.fixture
def network(images: Tensor) -> LoopNetwork:
    """A `LoopNetwork` with statistics of its own, whose boundaries run through the middle of `images`."""
    made = LoopNetwork()
    with torch.no_grad():
        made.norm.running_mean.uniform_(-0.3, 0.3)
        made.norm.running_var.uniform_(0.5, 2.0)
        made.head.weight.mul_(4)
        made.head.bias.sub_(made.eval()(images).mean(0) / 3)
    return made.train()


@pytest.fixture
def images() -> Tensor:
    """Nine images in float64, some pixels at the edge of the box."""
    x = torch.rand(9, 2, 4, 4, dtype=torch.float64)
    x[x < 0.05] = 0.0
    x[x > 0.95] = 1.0
    return x


@pytest.fixture
def batch(images: Tensor, network: LoopNetwork) -> Batch:
    """The images with the network's own predictions for labels, but for every third."""
    y = network.eval()(images).argmax(1)
    y[::3] = (y[::3] + 1) % 3
    return Batch(images, y)
