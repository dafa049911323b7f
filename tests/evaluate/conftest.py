"""Tiny networks and images on which attacks succeed on some points and fail on others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Task = tuple[nn.Module, Tensor, Tensor]


def tiny_net(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, classes),
    )


@pytest.fixture
def make_task() -> Callable[..., Task]:
    """A convolutional net in training mode with settled statistics, images (n, 3, 8, 8), and its predictions as labels,
    the first of which is made wrong. Points lie at all distances from the boundary."""

    def make(classes: int, n: int = 16, seed: int = 0) -> Task:
        torch.manual_seed(seed)
        net = tiny_net(classes)
        x = torch.rand(n, 3, 8, 8)
        for _ in range(30):
            net(x)
        with torch.no_grad():
            net.eval()
            # Without a favourite class, so that decisions are close.
            net[-1].bias -= net(x).mean(0)
            y = net(x).argmax(1)
        y[0] = (y[0] + 1) % classes
        return net.train(), x, y

    return make
