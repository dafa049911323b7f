"""What can be asked of a model that gives no gradients: random noise, and the Square attack."""

from __future__ import annotations

from typing import Any

from torch import nn

from instar.attacks import PGD, Restarts, Square, Transfer, Uniform
from instar.errors import UserError
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.entries import Entry, Suite, spread
from instar.evaluate.subject import is_black_box
from instar.threat import Ball


def usual_suite(model: nn.Module) -> str:
    """The suite that a model is judged by where the user names none.

    Example:
        >>> usual_suite(nn.Linear(2, 2))
        'standard'
    """
    return "black_box" if is_black_box(model) else "standard"


def takes_gradients(entry: Entry) -> bool:
    """Whether a column certainly needs gradients of the model: a descent on it, or a stage of AutoAttack but Square.

    Example:
        >>> from instar.threat import Linf
        >>> from instar.evaluate.entries import pgd
        >>> takes_gradients(pgd(Linf(8/255), steps=20)), any(map(takes_gradients, black_box(Linf(8/255)).entries))
        (True, False)
    """
    attack: Any = entry.attack
    if isinstance(attack, AutoAttack):
        return any(stage != "square" for stage in attack.names)
    while not isinstance(attack, (PGD, Transfer)) and hasattr(attack, "attack"):
        attack = attack.attack
    return isinstance(attack, PGD) and attack.steps != 0


def check_gradients(model: nn.Module, suite: Suite) -> None:
    """Refuse a suite whose attacks need gradients that a model does not give, before anything is computed.

    Args:
        model: What is to be evaluated.
        suite: By what.

    Raises:
        UserError: With the attacks, and the suite to take instead.
    """
    needing = [entry.title for entry in suite.entries if takes_gradients(entry)]
    if needing and is_black_box(model):
        more = f" and {len(needing) - 3} more" if len(needing) > 3 else ""
        raise UserError(
            f"{', '.join(needing[:3])}{more} of the suite {suite.name} need gradients, and this model gives no "
            "gradients: take --suite black_box (Square and random noise), and expect a weaker attack to find less"
        )


def black_box(ball: Ball, *, draws: int = 100, queries: int = 5000) -> Suite:
    """For models without gradients, such as ONNX files: random noise and Square, which see logits only.

    An attack that sees less finds less: its number is an upper bound, and does not belong beside one by gradient
    attacks.

    Cost: about 5,200 forward passes an image that withstands both, and no backward pass.

    Args:
        ball: The threat model.
        draws: Random points tried for each image.
        queries: Queries of Square; 5,000 as in AutoAttack.

    Returns:
        The suite.

    Source: Andriushchenko et al. 2020 for Square.

    Example:
        >>> from instar.threat import Linf
        >>> [entry.title for entry in black_box(Linf(8/255)).entries]
        ['random noise, best of 100', 'Square, 5000 queries']
    """
    noise = Restarts(PGD(spread(ball, ball.radius), steps=0, step_size=0.0, start=Uniform()), draws)
    return Suite(
        "black_box",
        (
            Entry("noise", f"random noise, best of {draws}", noise, role="noise"),
            Entry("square", f"Square, {queries} queries", Square(ball, queries=queries)),
        ),
    )
