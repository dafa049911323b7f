"""What a training step costs: forward and backward passes of the network, counted while a step runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from instar.evidence import Batch
from instar.method import Method
from instar.models.heads import Cosine
from instar.step import training_loss, training_step


@dataclass(frozen=True)
class Passes:
    """Passes of the whole batch through the network in one training step.

    Attributes:
        forward: Forward passes.
        backward_input: Backward passes that compute gradients of the input only (the attack's).
        backward_full: Backward passes that compute gradients of the weights.
        double_backward: Backward passes to the weights through a gradient of the input, and through the forward pass
            that it came from.
    """

    forward: int
    backward_input: int
    backward_full: int
    double_backward: int = 0

    @property
    def units(self) -> int:
        """Cost in forward passes, where an input-only backward counts 1, a full one 2, and a double one 4."""
        return self.forward + self.backward_input + 2 * self.backward_full + 4 * self.double_backward

    @property
    def line(self) -> str:
        """All of it in words, with what a pass counts where that is more than one.

        Example:
            >>> Passes(forward=4, backward_input=3, backward_full=1, double_backward=1).line
            '4 forward, 3 backward to the input, 1 full backward (× 2), 1 double backward (× 4): 13 forward units'
        """
        kinds = [
            f"{self.forward} forward",
            f"{self.backward_input} backward to the input",
            f"{self.backward_full} full backward (× 2)",
            f"{self.double_backward} double backward (× 4)" if self.double_backward else "",
        ]
        return f"{', '.join(filter(None, kinds))}: {self.units} forward units"


class _Counter(nn.Module):
    """A network of one layer that counts how often it is passed."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.forwards = self.to_input = self.to_weights = self.through = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        features, weight = x.flatten(1) * 1.0, self.head.weight * 1.0
        logits: Tensor = functional_call(self.head, {"weight": weight}, (features,))
        if logits.requires_grad:
            self._watch(features, weight)
        return logits

    def _watch(self, features: Tensor, weight: Tensor) -> None:
        """Count the backward passes of one forward pass by how far they go."""
        seen = {"input": False, "bent": False, "weights": False}

        def at_input(gradient: Tensor) -> None:
            if seen["weights"] or seen["bent"]:
                return  # the same pass goes to the weights, or goes through an input gradient that was counted
            seen.update(input=True, bent=gradient.requires_grad)  # bent: somebody will differentiate through it
            self.to_input += 1

        def at_weights(_: Tensor) -> None:
            seen["weights"] = True
            if seen["bent"]:
                self.through += 1
                return
            self.to_weights += 1
            self.to_input -= seen["input"]  # one pass to both, as in Free-AT

        if features.requires_grad:
            features.register_hook(at_input)
        if weight.requires_grad:
            weight.register_hook(at_weights)


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
        (Passes(forward=11, backward_input=10, backward_full=1, double_backward=0), 23)
        >>> passes(trades()).units
        27
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(4, 3) if method.requires is None else Cosine(4, 3, scale=method.requires.scale)
        model = _Counter(head)
        batch = Batch(torch.rand(8, 1, 2, 2), torch.arange(8) % 3)
        if method.step is not None:
            training_step(model, method, batch, torch.optim.SGD(model.parameters(), lr=0.0))
        else:
            loss = training_loss(model, method, batch).loss
            if loss.requires_grad:
                loss.mean().backward()
    return Passes(model.forwards, model.to_input, model.to_weights, model.through)
