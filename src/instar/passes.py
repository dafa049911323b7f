"""What a training step costs: forward and backward passes of the network, counted while a step runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from instar.evidence import Batch
from instar.method import Method
from instar.step import training_loss, training_step


@dataclass(frozen=True)
class Passes:
    """Passes of the whole batch through the network in one training step.

    Attributes:
        forward: Forward passes.
        backward_input: Backward passes that compute gradients of the input only (the attack's).
        backward_full: Backward passes that compute gradients of the weights.
    """

    forward: int
    backward_input: int
    backward_full: int

    @property
    def units(self) -> int:
        """Cost in forward passes, where an input-only backward counts 1 and a full one 2."""
        return self.forward + self.backward_input + 2 * self.backward_full


class _Counter(nn.Module):
    """A network of one layer that counts how often it is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.sharing = False
        self.forwards = self.to_input = self.to_weights = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits: Tensor = self.head(x.flatten(1))
        if logits.requires_grad:
            # A pass whose input needs a gradient while weights do too (Free-AT) is a full one.
            logits.register_hook(self._input if x.requires_grad and not self.sharing else self._weights)
        return logits

    def _input(self, gradient: Tensor) -> None:
        self.to_input += 1

    def _weights(self, gradient: Tensor) -> None:
        self.to_weights += 1


def passes(method: Method) -> Passes:
    """Count the passes of one training step, by running it on a network of one layer.

    Args:
        method: Any method; schedules stand at the end of the run. Attacks that stop early are counted on random data,
            where some instances go all the way.

    Returns:
        The counts.

    Example:
        >>> from instar.methods import pgd_at, trades
        >>> passes(pgd_at()), passes(pgd_at()).units
        (Passes(forward=11, backward_input=10, backward_full=1), 23)
        >>> passes(trades()).units
        27
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Counter()
        batch = Batch(torch.rand(8, 1, 2, 2), torch.arange(8) % 3)
        if method.step is not None:
            model.sharing = True
            training_step(model, method, batch, torch.optim.SGD(model.parameters(), lr=0.0))
        else:
            loss = training_loss(model, method, batch).loss
            if loss.requires_grad:
                loss.mean().backward()
    return Passes(model.forwards, model.to_input, model.to_weights)
