"""A method of your own in one file: focal adversarial training.

    instar train examples/focal_at.py:focal_at --data digits --focus 1 --out runs/focal
    instar train --resume --trust --out runs/focal    # after a Ctrl-C
    instar evaluate runs/focal
    instar report runs/focal

It weighs an instance by (1 − p_y)^γ of its adversarial image, as the focal loss of Lin et al. 2017 does for natural
ones.
"""

import torch
from torch import Tensor

import instar


@instar.value
class FocalWeight(instar.Signal):
    """(1 − p_y)^focus of the adversarial image, without gradient."""

    focus: float = 2.0
    needs = frozenset({"adv"})

    def __call__(self, evidence: instar.Evidence) -> Tensor:
        """Weights (B,) in [0, 1]."""
        p = torch.softmax(evidence.logits("adv"), 1).gather(1, evidence.y.clamp_min(0)[:, None]).squeeze(1)
        return ((1 - p) ** self.focus).detach()


def focal_at(*, focus: float = 2.0, eps: float = 8 / 255, step_size: float = 2 / 255, steps: int = 10) -> instar.Method:
    """Focal-AT: adversarial training that looks at what the attack has not lost yet.

    Equation:
        min_θ mean_i (1 − p_y(x′_i))^γ CE(f_θ(x′_i), y_i)

    Source: ours, an example.
    """
    attack = instar.PGD(instar.Linf(eps), steps=steps, step_size=step_size)
    return instar.Method(attack, FocalWeight(focus) * instar.CrossEntropy())
