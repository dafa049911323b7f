"""One word for an evaluation: sound, suspect, or overestimated; with the reasons, and what was not looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from instar.evaluate.finding import HIGH, OVERESTIMATED, SUSPECT, Finding
from instar.evaluate.sanity import CHECKS
from instar.evaluate.symptoms import NOTHING_LEFT

SOUND, UNTESTED = "sound", "untested"
EXIT_STATUS = 3
"""What ``instar evaluate --strict`` ends with when a number is overestimated."""


@dataclass(frozen=True)
class Verdict:
    """What the findings of an evaluation come to.

    ``overestimated``: the number that would be quoted (AutoAttack's, or PGD's where no AutoAttack was run) is shown to
    be too high, by other attacks of the suite or because attacks cannot work at all. ``suspect``: a symptom of masked
    gradients beyond its threshold and its sampling error. ``sound``: none of the checks that were made objects.
    ``untested``: the suite made none.

    Attributes:
        word: ``"sound"``, ``"suspect"``, ``"overestimated"`` or ``"untested"``.
        reasons: What speaks against the number, worst first; for a sound one, what is higher than usual.
        made: How many of the checks of a full evaluation were made.
        missing: What the others would have compared.
        note: Why there is nothing to be sound: accuracy no better than chance, or nothing that withstands; else empty.
    """

    word: str
    reasons: tuple[str, ...]
    made: int
    missing: tuple[str, ...]
    note: str = ""

    @property
    def line(self) -> str:
        """The verdict as one line of text."""
        scope = f"{self.made} of {self.made + len(self.missing)} checks made"
        if self.word == UNTESTED:
            return f"{UNTESTED}: this suite makes none of the {len(self.missing)} checks"
        if self.word == SOUND:
            said = f"{SOUND}, as far as this suite can tell ({scope})" if not self.note else f"{self.note} ({scope})"
            return said + (f"; higher than usual: {'; '.join(self.reasons)}" if self.reasons else "")
        return f"{self.word} ({scope}): {'; '.join(self.reasons)}"

    @property
    def short(self) -> str:
        """The word and how much was looked at; the reasons are left to the findings, what was not to `missing`."""
        if self.word == UNTESTED:
            return self.line
        word = self.note if self.note and self.word == SOUND else self.word
        return f"{word}, {self.made} of {self.made + len(self.missing)} checks made"

    def to_json(self) -> dict[str, Any]:
        """As a record holds it, for readers without this package; it follows from the findings."""
        told = {"word": self.word, "reasons": list(self.reasons), "checks": self.made, "untested": list(self.missing)}
        return told | ({"note": self.note} if self.note else {})


def conclude(findings: Iterable[Finding]) -> Verdict:
    """The verdict that findings come to.

    Args:
        findings: Of one evaluation.

    Returns:
        The worst of their levels, with the findings of that level and of those below as reasons.

    Example:
        >>> conclude([]).line
        'untested: this suite makes none of the 15 checks'
    """
    everything = list(findings)
    found = [finding for finding in everything if finding.check != NOTHING_LEFT]
    note = next((finding.text for finding in everything if finding.check == NOTHING_LEFT), "")
    checked = {finding.check for finding in found}
    if "square" in checked:  # AutoAttack's own, where the suite has none of its own
        checked.add("black_box")
    missing = tuple(what for check, what in CHECKS.items() if check not in checked)
    levels = {level: [f.text for f in found if f.verdict == level] for level in (OVERESTIMATED, SUSPECT, HIGH)}
    made = len(CHECKS) - len(missing)
    if levels[OVERESTIMATED]:
        return Verdict(OVERESTIMATED, (*levels[OVERESTIMATED], *levels[SUSPECT]), made, missing, note)
    if levels[SUSPECT]:
        return Verdict(SUSPECT, tuple(levels[SUSPECT]), made, missing, note)
    return Verdict(SOUND if found else UNTESTED, tuple(levels[HIGH]), made, missing, note)
