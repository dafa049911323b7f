"""Attacks that a user gives as expressions, as a suite."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from instar.attacks import PGD, Attack
from instar.errors import UserError
from instar.evaluate.autoattack import AutoAttack
from instar.evaluate.suites import Entry, Suite, build
from instar.expression import parse
from instar.threat import Ball

NAME = "attacks"
LONGEST = 60
"""Characters of an expression that serves as a title."""


def attacks_of(
    expressions: Sequence[str], *, suite: str | Callable[[Ball], Suite] | None = None
) -> Callable[[Ball], Suite]:
    """A suite of attacks that are written as expressions, by themselves or behind another suite.

    An attack counts in the worst case if the ball that it may reach lies within the threat model; another one is a
    measurement beside it.

    Args:
        expressions: For example ``"AutoAttack(Linf(8/255), version='plus')"``.
        suite: What is run before them; None is nothing.

    Returns:
        A function from a ball to a suite, as `instar.evaluate.evaluate` takes it.

    Raises:
        UserError: An expression cannot be read, or is no attack; at once, before any work.

    Example:
        >>> from instar.threat import Linf
        >>> made = attacks_of(["AutoAttack(Linf(8/255), version='plus')", "PGD(Linf(16/255), steps=50)"])
        >>> [(entry.name, entry.counts) for entry in made(Linf(8/255)).entries]
        [('autoattack_plus', True), ('pgd_50', False)]
    """
    attacks = [_attack(text) for text in expressions]

    def made(ball: Ball) -> Suite:
        before = build(suite, ball) if suite is not None else Suite(NAME, ())
        entries = list(before.entries)
        for attack in attacks:
            entry = _entry(attack, ball)
            taken = {other.name for other in entries}
            names = [entry.name, *(f"{entry.name}_{number}" for number in range(2, len(taken) + 2))]
            entries.append(replace(entry, name=next(name for name in names if name not in taken)))
        return replace(before, name=before.name if suite is None else f"{before.name}-{NAME}", entries=tuple(entries))

    return made


def _attack(text: str) -> Attack | AutoAttack:
    found = parse(text)
    if not isinstance(found, (Attack, AutoAttack)):
        raise UserError(
            f"an attack must be an expression such as \"AutoAttack(Linf(8/255), version='plus')\"; {text[:80]!r} is "
            f"{type(found).__name__}"
        )
    return found


def _entry(attack: Attack | AutoAttack, ball: Ball) -> Entry:
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(attack).__name__).lower()
    if isinstance(attack, AutoAttack):
        plain = attack.version == "standard" and attack.stages is None
        name = "autoattack" if plain else f"autoattack_{attack.version}"
    elif isinstance(attack, PGD):
        name = f"pgd_{attack.numbers()[0]}"
    text = repr(attack)
    title = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return Entry(name, title, attack, counts=_within(attack, ball))


def _within(attack: Attack | AutoAttack, ball: Ball) -> bool:
    """Whether all that an attack can reach lies in the ball."""
    reach = attack.ball if isinstance(attack, AutoAttack) else attack.limit
    return reach is not None and reach.norm == ball.norm and reach.radius <= ball.radius
