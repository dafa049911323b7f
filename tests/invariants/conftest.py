"""What invariants of several methods are shown on: a smooth network in float64, and images around its boundaries."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import instar as I

SIZE, CLASSES = 8, 4


class Network(nn.Module):
    """Two convolutions, BatchNorm and a linear layer, smooth and in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        hidden = F.softplus(self.second(F.softplus(self.norm(self.first(x)))))
        return F.avg_pool2d(hidden, 3).flatten(1)


@pytest.fixture
def images() -> Tensor:
    """Eight images of 6×6 pixels."""
    return torch.rand(SIZE, 1, 6, 6, dtype=torch.float64)


@pytest.fixture
def model(images: Tensor) -> Network:
    """A network whose boundaries run through the middle of the images, and whose logits have a spread of 1.5."""
    made = Network().eval()
    with torch.no_grad():
        logits = made(images)
        made.head.bias.sub_(logits.mean(0))
        for parameter in made.head.parameters():
            parameter.mul_(1.5 / logits.std(0).mean())
    return made.train()


@pytest.fixture
def batch(model: Network, images: Tensor) -> I.Batch:
    """The images with what the network takes them for, but for the first."""
    y = copy.deepcopy(model).eval()(images).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    return I.Batch(images, y)
