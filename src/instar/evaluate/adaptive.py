"""Attacks that look for what the usual ones miss, and the cheap tests that say whether gradients can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from instar.attacks import PGD, MultiTargeted, OutputDiversified, Restarts, Square, Transfer, Uniform, Zero
from instar.attacks.transfer import STATE, fingerprint
from instar.errors import UserError
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.diagnosis import FallingLoss, VanishingGradient
from instar.evaluate.entries import ONCE_WRONG, Entry, Suite, descent, fgsm, margin_pgd, pgd, spread
from instar.evaluate.mechanism import Mechanism
from instar.expression import number
from instar.signals import CrossEntropy, Margin, Scaled
from instar.threat import Ball, Linf

IMAGES = 200
SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
"""The factors on the logits, as published for the logit-scaling attack and its wider sweep."""
MULTIPLES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0, 8.0)
"""The radii of the sweep in units of the threat model's; eight times 8/255 are the 64/255 that leave nothing."""


def sanity(ball: Ball, *, steps: int = 20, queries: int = 1000) -> Suite:
    """Whether gradients can be trusted here: cheap tests that must all pass, at a quarter of AutoAttack's cost.

    FGSM, PGD-20 and ten times as many steps, margin PGD-100, random noise, scaled logits, a short Square, radii from 0
    to eight times the threat model's and the whole box, the share of zero gradients, and whether the loss rises along
    an attack.

    Cost: about 2,300 forward passes an image that withstands everything, on the first 200 images unless told otherwise.

    Args:
        ball: The threat model.
        steps: Steps of PGD; the others follow from it (five and ten times as many).
        queries: Queries of Square.

    Returns:
        The suite.

    Source: Carlini et al. 2019; Tramèr et al. 2020; Athalye et al. 2018.
    """
    entries = (
        *_basic(ball, steps=steps),
        *(_scaled(ball, alpha, steps=steps, restarts=1) for alpha in (0.1, 10.0, 1000.0)),
        Entry("square", f"Square, {queries} queries", Square(ball, queries=queries)),
        *sweep(ball, steps=steps),
        *diagnoses(ball, steps=steps),
    )
    return Suite("sanity", entries, images=IMAGES)


def adaptive(
    ball: Ball,
    *,
    surrogates: Sequence[str | Path] = (),
    steps: int = 100,
    short: int = 20,
    restarts: int = 5,
    queries: int = 20_000,
    searches: int = 3,
    plus: bool = False,
) -> Suite:
    """The least that a method needs which reweights instances or scales logits, where AutoAttack may be beaten too.

    Everything of `sanity`, and: AutoAttack standard; PGD on α·z for eight α from 0.1 to 1000; the margins of nine
    target classes in turn; starts diversified in the outputs; Square with 20,000 queries three times; transfer from
    the surrogates, if there are any. Of a run whose checkpoints are averaged, the online weights are evaluated too, and
    averaged and online weights attacked through one another. If anything here beats AutoAttack by more than 0.5 points,
    AutoAttack's number may not be quoted.

    Cost: about 82,000 forward passes an image of ten classes that withstands everything, 60,000 of them Square's
    (which need no gradients and are cheaper), on the first 200 images unless told otherwise.

    Args:
        ball: The threat model.
        surrogates: Runs, ``.safetensors`` files with cards, or ``checkpoints/state.safetensors`` of a run (its online
            weights). Independent models of the same architecture are best.
        steps: Steps of the attacks that are meant to be strong; AutoAttack's gradient attacks too.
        short: Steps of those that are compared with them, as in `sanity`.
        restarts: Restarts of each scale and of the diversified starts.
        queries: Queries of Square in each search; AutoAttack's Square has 5,000 at most.
        searches: Restarts of Square.
        plus: Whether AutoAttack plus is run as well.

    Returns:
        The suite.

    Raises:
        UserError: A surrogate that is not there.

    Source: the attacks of Hitaj et al. 2021, Gowal et al. 2019, Tashiro et al. 2020 and Andriushchenko et al. 2020.
    """
    extra = (Entry("autoattack_plus", "AutoAttack plus", AutoAttack(ball, version="plus")),) if plus else ()
    diversified = Restarts(OutputDiversified(descent(ball, Margin(), steps)), restarts)
    targeted = MultiTargeted(descent(ball, Margin(), steps))
    entries = (
        *_basic(ball, steps=short),
        *(_scaled(ball, alpha, steps=steps, restarts=restarts) for alpha in SCALES),
        Entry("multi_targeted", f"MultiTargeted-{steps}", targeted, role="gradient"),
        Entry("diversified", f"ODI margin PGD-{steps}, {restarts} restarts", diversified, role="gradient"),
        Entry("autoattack", "AutoAttack", AutoAttack(ball, steps=steps, queries=min(queries, 5000))),
        *extra,
        Entry("square", f"Square, {searches} × {queries} queries", Square(ball, queries=queries, restarts=searches)),
        *transfers(ball, surrogates, steps=short),
        *sweep(ball, steps=short),
        *diagnoses(ball, steps=short),
    )
    return Suite("adaptive", entries, images=IMAGES, twin_steps=short)


def _basic(ball: Ball, *, steps: int) -> tuple[Entry, ...]:
    """Noise, one step, some steps, ten times as many, and another loss."""
    noise = Restarts(PGD(spread(ball, ball.radius), steps=0, step_size=0.0, start=Uniform()), 10)
    return (
        Entry("noise", "random noise, best of 10", noise, role="noise"),
        fgsm(ball),
        pgd(ball, steps=steps),
        replace(pgd(ball, steps=10 * steps), role="many steps"),
        margin_pgd(ball, steps=5 * steps),
    )


def _scaled(ball: Ball, alpha: float, *, steps: int, restarts: int) -> Entry:
    attack = descent(ball, Scaled(CrossEntropy(), alpha), steps)
    word = f"{alpha:g}".replace(".", "_")
    title = f"PGD-{steps} on {alpha:g}·z" + (f", {restarts} restarts" if restarts > 1 else "")
    return Entry(f"scaled_{word}", title, attack if restarts == 1 else Restarts(attack, restarts), role="scaled")


def sweep(ball: Ball, *, steps: int = 20) -> tuple[Entry, ...]:
    """Margin PGD from the clean image at radii from 0 to eight times the threat model's, and in the whole box.

    Nothing random, so that only gradients can break an image: noise of the size of the box would break any.

    Args:
        ball: The threat model.
        steps: Steps at each radius.

    Returns:
        One entry a radius, in rising order; those beyond the threat model do not count in the worst case.
    """
    most = 1.0 if isinstance(ball, Linf) else math.inf  # a radius beyond the box is the box
    radii = dict.fromkeys(ball.radius if m == 1 else _readable(m * ball.radius) for m in MULTIPLES)
    found = []
    for radius in (radius for radius in radii if radius < most):
        word = number(radius).replace("/", "_").replace(".", "_").replace("-", "_") if radius else "0"
        attack = _straight(replace(ball, eps=radius), steps)
        title = f"margin PGD-{steps} at {ball.norm} {number(radius) if radius else 0}"
        found.append(Entry(f"eps_{word}", title, attack, counts=radius <= ball.radius, role="sweep"))
    box = _straight(Linf(1.0), steps)
    title = f"margin PGD-{steps} in the whole box"
    return (*found, Entry("eps_box", title, box, counts=ball == Linf(1.0), role="unbounded"))


def _readable(radius: float) -> float:
    """A radius without the rounding of a product: 0.3 and not 0.30000000000000004; fractions of 255 as they are."""
    return radius if "/" in number(radius) else float(f"{radius:.10g}")


def _straight(ball: Ball, steps: int) -> PGD:
    step = ball.radius / 4
    return PGD(spread(ball, step), Margin(), steps=steps, step_size=step, start=Zero(), stop=ONCE_WRONG)


def transfers(ball: Ball, surrogates: Sequence[str | Path], *, steps: int = 20) -> tuple[Entry, ...]:
    """Cross-entropy PGD on each surrogate, judged on the model.

    Args:
        ball: The threat model.
        surrogates: Runs or files of weights.
        steps: Steps on the surrogate.

    Returns:
        One entry a surrogate.

    Raises:
        UserError: A surrogate that is not there.
    """
    if isinstance(surrogates, (str, Path)):
        raise UserError(f"surrogates must be a list of runs or files; got {str(surrogates)!r}")
    found = []
    for place, source in enumerate(surrogates, start=1):
        path = Path(source).expanduser()
        # Without a stop: an image that has just crossed the surrogate's boundary seldom crosses another one.
        attack = replace(descent(ball, CrossEntropy(), steps), stop=None)
        crafted = Transfer(str(path.resolve()), attack, fingerprint(path)[:16])
        online = path.name == STATE
        name = path.parent.parent.name if online else path.name if path.is_dir() else f"{path.parent.name}/{path.stem}"
        title = f"transfer from {name}" + (" (online weights)" if online else "")
        found.append(Entry(f"transfer_{place}", title, crafted, role="transfer"))
    return tuple(found)


def with_surrogates(suite: str, *, surrogates: Sequence[str | Path]) -> str | Callable[[Ball], Suite]:
    """A suite by its name, with surrogates to transfer from.

    Args:
        suite: The name.
        surrogates: Runs or files of weights.

    Returns:
        What `evaluate` takes as its suite.

    Raises:
        UserError: Surrogates for a suite that transfers nothing, or one that is not there.
    """
    if suite != "adaptive":
        if surrogates:
            raise UserError(f"surrogates are for the suite adaptive; the suite is {suite}")
        return suite
    for source in surrogates:
        fingerprint(source)  # missing ones are told now, not after the first attacks
    return partial(adaptive, surrogates=tuple(surrogates)) if surrogates else suite


def with_twin(suite: Suite, twin: Path | None, ball: Ball) -> Suite:
    """A suite with an attack made on a run's other weights: the online ones of an average, or the average of those.

    Is the model that attacks were made for the one that is deployed?

    Args:
        suite: The attacks.
        twin: The file of the other weights, or None.
        ball: The threat model.

    Returns:
        The suite, with the transfer behind its others.
    """
    if not suite.twin_steps or twin is None or not twin.is_file():
        return suite
    (made,) = transfers(ball, (twin,), steps=suite.twin_steps)
    word = "online" if twin.name == STATE else "average"
    title = made.title if word == "online" else f"transfer from {twin.parent.parent.name} (averaged weights)"
    entry = replace(made, name=f"transfer_{word}", title=title)
    place = next((k for k, other in enumerate(suite.entries) if other.kind == "sweep"), len(suite.entries))
    return replace(suite, entries=(*suite.entries[:place], entry, *suite.entries[place:]))


def diagnoses(ball: Ball, *, steps: int = 20) -> tuple[Entry, ...]:
    """What gradients do: zero ones for either loss, losses that do not rise along an attack, margins and difficulty.

    Args:
        ball: The threat model.
        steps: Steps along which the loss is watched.

    Returns:
        Entries whose columns are no accuracies.
    """
    watched = replace(descent(ball, CrossEntropy(), steps), stop=None)
    pairs = (("ce", "cross-entropy", CrossEntropy()), ("margin", "margin", Margin()))
    zero = tuple(
        Entry(
            f"zero_gradient_{word}",
            f"no gradient of {title}",
            VanishingGradient(ball, objective),
            counts=False,
            role="zero gradient",
        )
        for word, title, objective in pairs
    )
    # Of the budget of training, whose criteria it measures.
    told = Mechanism(PGD(spread(ball, ball.radius / 4), steps=min(10, steps), step_size=ball.radius / 4))
    return (
        *zero,
        Entry("falling_loss", "loss rises", FallingLoss(watched), counts=False, role="falling loss"),
        Entry("mechanism", "margins and difficulty", told, counts=False, everyone=True, role="mechanism"),
    )
