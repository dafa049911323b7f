"""Comparisons as tables: for the terminal, for Markdown and for LaTeX, all from the same cells."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from instar.compare.comparison import Comparison, Difference, Estimate, as_dictionary

MOST_CLASSES = 12
"""Data sets with more classes show only the worst one in tables; JSON holds all."""
FIRST = 40
"""Positions of images that a table lists; JSON holds all."""


@dataclass(frozen=True)
class Sheet:
    """One table, not yet in any format.

    Attributes:
        title: What it shows.
        heading: First row.
        rows: The others.
        bold: Which cells stand out.
    """

    title: str
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()


def sheets(comparison: Comparison) -> list[Sheet]:
    """The tables: accuracies with the difference, classes, images won and lost.

    Args:
        comparison: What to show.

    Returns:
        Three tables.
    """
    return [_accuracies(comparison), _classes(comparison), _won_and_lost(comparison)]


def _accuracies(comparison: Comparison) -> Sheet:
    first = comparison.arms[0].name
    against = {item.arm: item for item in comparison.headline if item.reference == first}
    bold = set()
    rows = []
    for row, arm in enumerate(comparison.arms):
        cells = [arm.name if len(arm.seeds) == 1 else f"{arm.name} ({len(arm.seeds)} seeds)"]
        for column in comparison.columns:
            cells.append(_cell(arm.scores[column.name], interval=column.name == comparison.column))
            level = comparison.leaders[column.name]
            if level[row] and not all(level):  # a column in which nobody stands out has nothing to mark
                bold.add((row, len(cells) - 1))
        item = against.get(arm.name)
        cells += ["–", "–"] if item is None else [_gap(item), _p(item.p_holm)]
        rows.append(tuple(cells))
    titles = [f"{c.title} (95 %)" if c.name == comparison.column else c.title for c in comparison.columns]
    heading = ("accuracy, %", *titles, f"Δ {comparison.title} (95 %)", "p")
    return Sheet("Accuracy", heading, tuple(rows), frozenset(bold))


def _classes(comparison: Comparison) -> Sheet:
    filled = [
        label for label in range(len(comparison.classes)) if any(_has(arm.classes, label) for arm in comparison.arms)
    ]
    shown = filled if len(filled) <= MOST_CLASSES else []
    rows = []
    for arm in comparison.arms:
        worst = f"{comparison.classes[arm.worst_class]} {_cell(arm.worst, interval=True)}"
        values = [arm.classes[label] if _has(arm.classes, label) else None for label in shown]
        rows.append((arm.name, worst, *("–" if value is None else _percent(value.value) for value in values)))
    heading = ("accuracy, %", "worst class (95 %)", *(comparison.classes[label] for label in shown))
    return Sheet(f"Classes, {comparison.title}", heading, tuple(rows))


def _has(classes: Sequence[Estimate | None], label: int) -> bool:
    return label < len(classes) and classes[label] is not None


def _won_and_lost(comparison: Comparison) -> Sheet:
    rows = tuple(
        (
            f"{item.arm} against {item.reference}",
            str(len(item.won)),
            str(len(item.lost)),
            str(item.both),
            str(item.neither),
            _gap(item),
            _p(item.p),
            _p(item.p_holm),
        )
        for item in comparison.headline
    )
    heading = ("images", "won", "lost", "both right", "both wrong", "Δ (95 %)", "p", "p, Holm")
    return Sheet(f"Image by image, {comparison.title}", heading, rows)


def _cell(estimate: Estimate, *, interval: bool) -> str:
    text = _percent(estimate.value)
    if estimate.deviation is not None:
        text += f" ± {_percent(estimate.deviation)}"
    return f"{text} ({_percent(estimate.low)}–{_percent(estimate.high)})" if interval else text


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference of shares in percentage points, with a sign, and a minus that is one.

    Example:
        >>> signed(0.1234), signed(-0.05), signed(-0.0001)
        ('+12.3', '−5.0', '0.0')
    """
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _gap(item: Difference) -> str:
    return f"{signed(item.value)} ({signed(item.low)} to {signed(item.high)})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def caption(comparison: Comparison, *, bold: bool = True) -> list[str]:
    """What must be known beside the numbers.

    Args:
        comparison: What is shown.
        bold: Whether the format can show bold cells, so that their meaning must be said.

    Returns:
        Sentences.
    """
    protocol, first = comparison.protocol, comparison.arms[0].name
    checkpoints = dict.fromkeys(arm.checkpoint for arm in comparison.arms)
    which = f"checkpoint {next(iter(checkpoints))}" if len(checkpoints) == 1 else "different checkpoints"
    lines = [f"{protocol['threat']}, {protocol['images']} (n = {comparison.count}), {which}."]
    single = all(len(arm.seeds) == 1 for arm in comparison.arms)
    binary = comparison.headline[0].p_exact is not None
    tests = "Tango's interval and McNemar's mid-p test" if binary else "Student's interval and test"
    reference = [item for item in comparison.headline if item.reference == first]
    others = len(comparison.headline)
    holm = f", corrected after Holm for {others} comparisons" if others > 1 else ""
    if reference:
        lines.append(f"Δ: minus {first}, in points, on the same images; {tests}{holm}.")
    if not single:
        spread = "± standard deviation over seeds of training; intervals and tests of such rows cover images and seeds"
        alone = [arm.name for arm in comparison.arms if len(arm.seeds) == 1]
        lines.append(f"{spread}." if not alone else f"{spread}; of {', '.join(alone)} there is one seed.")
    elif single:
        lines.append("One run each: intervals and p-values cover the choice of test images, not the seed of training.")
    if bold and _accuracies(comparison).bold:
        lines.append("Bold: the best of a column, and all that it is not significantly better than (p ≥ 0.05).")
    lines.append("The interval of the worst class is over all classes at once.")
    lines += [f"{note}." for note in comparison.notes]
    lines += [f"{arm.name}, {text}." for arm in comparison.arms for text in arm.suspicions]
    return lines


def render(comparison: Comparison, *, bold: bool = True) -> Group:
    """Tables for the terminal, to be printed by a rich console.

    Args:
        comparison: What to show.
        bold: Whether the terminal can show bold cells.
    """
    parts: list[Table | Text] = []
    for sheet in sheets(comparison):
        table = Table(title=sheet.title, title_justify="left")
        table.add_column(sheet.heading[0])
        for name in sheet.heading[1:]:
            table.add_column(name, justify="right")
        for row, cells in enumerate(sheet.rows):
            texts = [Text(cell, style="bold" if (row, place) in sheet.bold else "") for place, cell in enumerate(cells)]
            table.add_row(*texts)
        parts.append(table)
    parts += [Text(line) for line in [*caption(comparison, bold=bold), *_listed(comparison)]]
    return Group(*parts)


def _listed(comparison: Comparison) -> list[str]:
    """The first of the images won and lost, by official position."""
    lines = []
    for item in comparison.headline:
        for what, images in (("won", item.won), ("lost", item.lost)):
            if images:
                more = f" and {len(images) - FIRST} more" if len(images) > FIRST else ""
                shown = ", ".join(map(str, images[:FIRST]))
                lines.append(f"{item.arm} {what} against {item.reference}: images {shown}{more}.")
    return lines


def plain(comparison: Comparison, *, width: int = 1000) -> str:
    """The same as text without colours.

    Args:
        comparison: What to show.
        width: Characters in a line.

    Returns:
        Lines of text, ending in a line break.
    """
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(render(comparison, bold=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def markdown(comparison: Comparison) -> str:
    """The tables in Markdown, the captions as a list below them.

    Args:
        comparison: What to show.
    """
    lines = []
    for sheet in sheets(comparison):
        lines += [f"| {' | '.join(map(_escaped, sheet.heading))} |", f"| --- |{' ---: |' * (len(sheet.heading) - 1)}"]
        for row, cells in enumerate(sheet.rows):
            texts = [_escaped(cell) for cell in cells]
            texts = [f"**{text}**" if (row, place) in sheet.bold else text for place, text in enumerate(texts)]
            lines.append(f"| {' | '.join(texts)} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {line}" for line in caption(comparison))]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "−": r"$-$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "Δ": r"$\Delta$",
    "κ": r"$\kappa$",
    "α": r"$\alpha$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "–": "--",
    "∞": r"$\infty$",
}


_INDICES = {"inf": r"\infty", "2": "2", "1": "1"}


def tex(text: str) -> str:
    r"""Text as LaTeX shows it.

    Example:
        >>> print(tex("pgd_at under Linf: 30 % ± 1"))
        pgd\_at under $\ell_\infty$: 30 \% $\pm$ 1
    """
    shown = "".join(_TEX.get(letter, letter) for letter in text)
    return re.sub(r"\bL(inf|2|1)\b", lambda found: rf"$\ell_{_INDICES[found.group(1)]}$", shown)


def latex(comparison: Comparison) -> str:
    """The tables of accuracies and of classes in LaTeX, each in an environment of its own, for ``booktabs``.

    Args:
        comparison: What to show.
    """
    accuracies, classes, won = sheets(comparison)
    said = caption(comparison)
    parts = [
        "% Needs \\usepackage{booktabs}; wide tables fit with \\resizebox or \\small.",
        _tabular(accuracies, " ".join(said), "robustness"),
        _tabular(classes, f"{said[0]} {comparison.title}, by class.", "classes"),
        _tabular(won, f"{said[0]} {comparison.title}, image by image.", "images"),
    ]
    return "\n".join(parts)


def _tabular(sheet: Sheet, said: str, label: str) -> str:
    def line(cells: Sequence[str], change: Callable[[int, str], str] = lambda place, text: text) -> str:
        return " & ".join(change(place, tex(cell)) for place, cell in enumerate(cells)) + r" \\"

    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        f"  \\caption{{{tex(said)}}}",
        f"  \\label{{tab:{label}}}",
        f"  \\begin{{tabular}}{{l{'r' * (len(sheet.heading) - 1)}}}",
        r"    \toprule",
        f"    {line(sheet.heading)}",
        r"    \midrule",
    ]
    for row, cells in enumerate(sheet.rows):

        def marked(place: int, text: str, row: int = row) -> str:
            return rf"\textbf{{{text}}}" if (row, place) in sheet.bold else text

        lines.append(f"    {line(cells, marked)}")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def as_json(comparison: Comparison) -> str:
    """Everything as JSON, ending in a line break.

    Args:
        comparison: What to write.
    """
    return json.dumps(as_dictionary(comparison), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
