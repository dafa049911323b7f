"""The head of the page: each run's result with its protocol, its verdict, and what a reader must know."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instar.compare.render import signed
from instar.evaluate.intervals import wilson
from instar.evaluate.record import Record, Score
from instar.methods import RECIPES
from instar.report.page.views import Card, RunView, Verdict, slug
from instar.report.stored import StoredRun
from instar.report.wording import grouped, minuses, percent

_WIDE = 0.1
"""A 95 % interval wider than this is worth a warning: it cannot tell most methods apart."""


def preferred(records: Sequence[Record], *, checkpoint: str = "best") -> Record | None:
    """The record that speaks for a run: with AutoAttack, of the given checkpoint, of the most images; in this order."""

    def rank(record: Record) -> tuple[bool, bool, int]:
        return "autoattack" in record.scores, record.checkpoint == checkpoint, record.n

    return max(records, key=rank, default=None)


def strongest(record: Record) -> str:
    """The column whose number is to be quoted: AutoAttack's, else the worst case of the suite."""
    return "autoattack" if "autoattack" in record.scores else "worst_case"


def run_view(run: StoredRun, name: str, colour: str, records: Sequence[Record], *, checkpoint: str) -> RunView:
    """What is said about a run before any picture.

    Args:
        run: The run.
        name: What it is called on the page.
        colour: ``#RRGGBB``.
        records: All of its evaluations.
        checkpoint: Which one's number is quoted if there are several: ``"best"`` or ``"last"``.

    Returns:
        The view.
    """
    record = preferred(records, checkpoint=checkpoint)
    idea, equation, label = _explained(str(run.config.get("recipe", "")))
    about = [run.data, run.model, f"trained against {run.threat}" if run.threat else "trained without attack"]
    about += [f"{len(run.log)} of {run.epochs} epochs", f"seed {run.seed}"]
    cards = _held_out(run) if record is None else _cards(record)
    return RunView(
        name=name,
        key=slug(name),
        colour=colour,
        headline=_headline(run, name, record),
        about=" · ".join(about),
        verdict=_verdict(record),
        cards=cards,
        warnings=[*([label] if label else []), *_warnings(run, records, record)],
        idea=idea,
        equation=equation,
        expression=str(run.config.get("method", "")),
        settings=_settings(run.config),
        beside="" if record is None else _beside(record, records),
        protocol=protocol_line(record) if record is not None else cards[0].protocol if cards else "",
    )


def _beside(record: Record, records: Sequence[Record]) -> str:
    """What the other checkpoint keeps of the same images under the same attack."""
    column = strongest(record)
    same = [
        other
        for other in records
        if other.checkpoint != record.checkpoint
        and other.suite == record.suite
        and column in other.scores
        and all(other.protocol[field] == record.protocol[field] for field in ("norm", "eps", "images_sha256"))
    ]
    if not same:
        return ""
    score, word = same[0].scores[column], same[0].verdict.word
    doubt = f", a number that is {word}" if word in ("suspect", "overestimated") else ""
    return f"Its {same[0].checkpoint} checkpoint keeps {percent(score.accuracy)} of them ({interval(score)}){doubt}."


def protocol_line(record: Record) -> str:
    """What a number of a record depends on, short enough to stand below it."""
    protocol = record.protocol
    rule = (protocol.get("checkpoint") or {}).get("rule", record.checkpoint)
    return (
        f"{protocol['norm']} {protocol['eps']}, {grouped(protocol['images'])}, {record.checkpoint} checkpoint "
        f"({rule}), seed {protocol['seed']}, {protocol['precision']}, BatchNorm {protocol['bn_mode']}"
    )


def shared_protocols(members: Sequence[tuple[str, Record]]) -> list[str]:
    """The protocol of each record by the names it holds for, said once where several share it."""
    told: dict[str, list[str]] = {}
    for name, record in members:
        told.setdefault(protocol_line(record), []).append(name)
    several = len({name for name, _ in members}) > 1
    return [f"{', '.join(dict.fromkeys(whose))}: {line}." if several else f"{line}." for line, whose in told.items()]


def lead(members: Sequence[tuple[str, Record]]) -> str:
    """What the main numbers of several runs come to: the highest, what is clearly below it, and what misleads.

    Args:
        members: Names, and the record that speaks for each run.

    Returns:
        Some sentences; empty where the numbers cannot stand beside one another.
    """
    alike = {(strongest(r), r.protocol["norm"], r.protocol["eps"], r.protocol["images_sha256"]) for _, r in members}
    if len(members) < 2 or len(alike) > 1:
        return ""
    column = strongest(members[0][1])
    attack = members[0][1].scores[column].title if column == "autoattack" else "all attacks of the suite"
    ranked = sorted(members, key=lambda member: -member[1].scores[column].accuracy)
    (best, record), (worst, last) = ranked[0], ranked[-1]
    score = record.scores[column]
    floor = score.interval[0]
    below = [name for name, other in ranked[1:] if other.scores[column].interval[1] < floor]
    level = [name for name, other in ranked[1:] if other.scores[column].interval[1] >= floor]
    told = f"{best} keeps most under {attack}, {percent(score.accuracy)} of {score.count:,} test images"
    told += f", {worst} fewest, {percent(last.scores[column].accuracy)}."
    if level:
        told += f" By their intervals, {_and(level)} cannot be told from {best}"
        told += f"; {_and(below)} {'lies' if len(below) == 1 else 'lie'} clearly below." if below else "."
    wrong = [name for name, other in ranked if other.verdict.word in ("suspect", "overestimated")]
    if wrong:
        told += f" Weaker attacks overstate {_and(wrong)}: read the reasons below."
    return told


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def interval(score: Score) -> str:
    """Wilson's interval as text in percent."""
    low, high = score.interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _headline(run: StoredRun, name: str, record: Record | None) -> str:
    if record is None:
        best = run.best
        if best is None:
            return f"{name} has not finished an epoch yet."
        return (
            f"{name} keeps {percent(best['selection_robust'])} of {run.held_out:,} held-out training images under "
            f"{run.config['selection'].get('rule', 'its selection attack')}. It was not evaluated yet."
        )
    column = strongest(record)
    attack = record.scores[column].title if column != "worst_case" else f"all attacks of the suite {record.suite}"
    score = record.scores[column]
    return (
        f"{name} keeps {percent(score.accuracy)} of {score.count:,} test images under {attack}, "
        f"{record.protocol['norm']} {record.protocol['eps']}."
    )


def _verdict(record: Record | None) -> Verdict:
    if record is None:
        return Verdict("not evaluated", "instar evaluate measures robustness on test images and checks the number")
    found = record.verdict
    everything = found.made + len(found.missing)
    sound = found.word == "sound"
    if sound and found.made:
        scope = f"{found.made} of {everything} checks made, and none speaks against the number"
    else:
        scope = f"{found.made} of {everything} checks made"
    return Verdict(
        found.note if sound and found.note else found.word,
        scope,
        tuple(map(minuses, found.reasons)),
        found.missing,
        tone="" if found.note or found.word == "untested" else "good" if sound else "hard",
    )


def _cards(record: Record) -> list[Card]:
    protocol = protocol_line(record)
    column = strongest(record)
    shown = [("clean", "Clean accuracy", "")]
    title = record.scores[column].title if column != "worst_case" else f"worst case, suite {record.suite}"
    shown.append((column, f"Under {title}", "hard"))
    attacks = record.protocol.get("attacks") or {}
    made = []
    for name, heading, tone in shown:
        score = record.scores[name]
        low, high = score.interval
        budget = (attacks.get(name) or {}).get("expression", "")
        told = f"{budget}; {protocol}" if budget else protocol
        value, span = percent(score.accuracy), f"95 %: {interval(score)}"
        made.append(Card(heading, value, span, score.accuracy, low, high, told, tone, budget))
    gaps = ("pgd_minus_autoattack", "pgd_minus_margin")
    gap = next((f for check in gaps for f in record.findings if f.check == check), None)
    if gap is not None:
        reach = 1.96 * (gap.error or 0.0)
        whose = "AutoAttack" if gap.check == gaps[0] else "margin PGD"
        told = f"paired on the same images; {protocol}"
        span = f"95 %: {signed(gap.value - reach)} to {signed(gap.value + reach)} points"
        tone = "" if gap.verdict == "normal" else "hard"
        heading = f"PGD overstates {whose} by" if gap.value > 0 else f"PGD minus {whose}"
        points = f"{signed(gap.value).removeprefix('+')} points"
        made.append(Card(heading, points, span, None, 0.0, 0.0, told, tone, "paired on the same images"))
    return made


def _held_out(run: StoredRun) -> list[Card]:
    best, n = run.best, run.held_out
    if best is None:
        return []
    rule = run.config["selection"].get("rule", "selection attack")
    made = []
    for key, title, tone in (("selection_clean", "Clean, held out", ""), ("selection_robust", f"Under {rule}", "hard")):
        low, high = wilson(round(best[key] * n), n)
        told = f"{n:,} held-out training images, epoch {int(best['epoch']) + 1}, the best by this number"
        if run.threat:
            told = f"{run.threat}, {told}"
        span = f"95 %: {100 * low:.1f}–{100 * high:.1f}"
        made.append(Card(title, percent(best[key]), span, best[key], low, high, told, tone))
    return made


def _warnings(run: StoredRun, records: Sequence[Record], record: Record | None) -> list[str]:
    found = []
    if len(run.log) < run.epochs:
        found.append(f"The run is not finished: {len(run.log)} of {run.epochs} epochs.")
    if (run.config.get("git") or {}).get("clean") is False:
        found.append("It was trained from a checkout with changes that no commit holds.")
    if record is None:
        found.append(
            "There is no evaluation. Held-out accuracy chose the checkpoint, so it is optimistic, and margin PGD-10 is "
            "a weak attack."
        )
        return found
    if "autoattack" not in record.scores:
        found.append("AutoAttack was not run: the number can only fall.")
    score = record.scores[strongest(record)]
    low, high = score.interval
    if high - low > _WIDE:
        found.append(
            f"{score.count:,} images leave an interval of {100 * (high - low):.0f} points: smaller differences say "
            "nothing."
        )
    seen = {item.checkpoint for item in records}
    if lacking := [name for name in ("best", "last") if name not in seen]:
        found.append(
            f"The {lacking[0]} checkpoint was not evaluated: overfitting between best and last is not visible."
        )
    return found


def _explained(recipe: str) -> tuple[str, str, str]:
    """One sentence, the equation, and a label for reconstructions, from the recipe's own documentation."""
    if recipe not in RECIPES:
        return "", "", ""
    text = inspect.getdoc(RECIPES[recipe]) or ""
    idea = text.split("\n\n")[0].replace("\n", " ")
    found = re.search(r"^Equation:[ \t]*\n?((?:(?:[ \t]+.*)?\n)+)", text + "\n", re.MULTILINE)
    equation = inspect.cleandoc(found[1]) if found else ""
    rebuilt = re.search(r"^Deviations:\s+a reconstruction", text, re.MULTILINE)
    label = "A reconstruction: parts of this method are not public and are ours." if rebuilt else ""
    return idea, equation, label


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The whole configuration as names and texts, without what is unset or said elsewhere."""
    found: list[tuple[str, str]] = []

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), item)
        elif value is not None and prefix not in ("method", "recipe"):
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            found.append((prefix, text))

    add("", config)
    return found
