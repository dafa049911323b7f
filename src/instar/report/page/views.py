"""What the page shows, as plain values: the template knows nothing of runs, records and figures."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from instar.report.page.instances import Table
from instar.report.page.numbers import Numbers
from instar.report.page.panels import Panel, panels
from instar.report.style import headings


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Attributes:
        key: Its name in the page and in files.
        title: What is seen, in one sentence.
        subtitle: How to read it.
        sources: Data, model, n, seed.
        panels: Its pieces.
        numbers: What it was drawn from.
        figure: The figure itself, for files.
    """

    key: str
    title: str
    subtitle: str
    sources: str
    panels: Sequence[Panel]
    numbers: Sequence[Numbers]
    figure: Figure


def picture(figure: Figure, *, key: str, numbers: Sequence[Numbers] = (), title: str = "", note: str = "") -> Picture:
    """A figure as the page shows it.

    Args:
        figure: The figure.
        key: Its name, of letters, digits and ``-``; unique on the page.
        numbers: What it was drawn from.
        title: Its heading, where the figure has none.
        note: What its subtitle would say, where it has none.

    Returns:
        The picture.
    """
    own, subtitle, sources = headings(figure)
    drawn = panels(figure, prefix=key)
    return Picture(key, own or title, subtitle or note, sources, drawn, tuple(numbers), figure)


def slug(text: str) -> str:
    """Letters, digits and single dashes, for names of files and places in a page; never empty.

    Example:
        >>> slug("TRADES, seed 1"), slug("<script>")
        ('trades-seed-1', 'script')
    """
    return re.sub(r"[^a-z0-9]+", "-", html.unescape(text).lower()).strip("-") or "x"


@dataclass(frozen=True)
class Card:
    """One main number.

    Attributes:
        title: What it is.
        value: The number as text.
        interval: Its interval as text, or empty.
        share: Place of the number in [0, 1] for the bar, or None for none.
        low: Lower end of the interval in [0, 1].
        high: Upper end.
        protocol: What the number depends on; never empty.
        tone: ``"good"``, ``"hard"`` or ``""``.
        own: The part of the protocol that holds for this number and not for those beside it.
    """

    title: str
    value: str
    interval: str
    share: float | None
    low: float
    high: float
    protocol: str
    tone: str = ""
    own: str = ""


@dataclass(frozen=True)
class Verdict:
    """What an evaluation's checks come to.

    Attributes:
        word: ``"sound"``, ``"suspect"``, ``"overestimated"``, ``"untested"`` or ``"not evaluated"``; what to say in
            place of ``"sound"`` where nothing is left to be sound.
        scope: How much was looked at, and what that means.
        reasons: What speaks against the number.
        missing: What was not looked at.
        tone: ``"good"``, ``"hard"`` or ``""``.
    """

    word: str
    scope: str
    reasons: Sequence[str] = ()
    missing: Sequence[str] = ()
    tone: str = ""


@dataclass(frozen=True)
class RunView:
    """One run.

    Attributes:
        name: What it is called on this page.
        key: Its name in addresses.
        colour: ``#RRGGBB``.
        headline: The result in one sentence.
        beside: What the other checkpoint keeps, in one sentence; empty if unknown.
        protocol: What all main numbers depend on.
        about: Data, network, threat model, epochs.
        verdict: What is to be thought of the number.
        cards: Main numbers.
        warnings: What a reader must know.
        idea: What the method is, in one sentence; empty if unknown.
        equation: Its equation; empty if unknown.
        expression: The method as a value.
        settings: Everything it was trained with, by name.
    """

    name: str
    key: str
    colour: str
    headline: str
    about: str
    verdict: Verdict
    cards: Sequence[Card]
    warnings: Sequence[str]
    idea: str
    equation: str
    expression: str
    settings: Sequence[tuple[str, str]]
    beside: str = ""
    protocol: str = ""


@dataclass(frozen=True)
class Cell:
    """A number in a table.

    Attributes:
        text: The number.
        interval: Its interval; empty for none.
        share: Place for a bar in [0, 1], or None.
        mark: ``"suspect"``, ``"overestimated"`` or ``""``.
    """

    text: str
    interval: str = ""
    share: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class EvaluationView:
    """Evaluations in one threat model on the same images.

    Attributes:
        key: Its name in the page.
        title: Suite, threat model and images.
        heads: Run, checkpoint and colour of each column.
        rows: Attack and cells.
        caption: The protocol.
        findings: For each record: whose, and verdict and text of each check.
        differences: Rows of the paired comparison: arm, reference, column, difference, interval, p.
        differences_note: What these are.
        differences_grid: The same by run, with all attacks of a run beside one another; empty where runs differ in
            what they were compared by.
        picture: The bars, or None.
        mechanism: Margins and difficulties where they were measured, or None.
        numbers: All of it as a table.
    """

    key: str
    title: str
    heads: Sequence[tuple[str, str, str]]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    caption: Sequence[str]
    findings: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    differences: Sequence[tuple[str, ...]]
    differences_note: str
    picture: Picture | None
    mechanism: Picture | None
    numbers: Numbers
    differences_grid: Sequence[tuple[str, Sequence[tuple[str, ...]]]] = ()


@dataclass(frozen=True)
class AnalysisView:
    """A stored analysis.

    Attributes:
        key: Its name in the page.
        title: What it is about.
        label: Model and checkpoint.
        summary: What was found.
        figures: Single numbers.
        pictures: Its pictures.
        tables: Its tables.
        protocol: What the numbers depend on.
        note: Why pictures are missing; empty if none are.
        heads: Name and colour of each run where several stand side by side.
        rows: Then the name of each single number, and the number of each run.
        singles: Then name, colour, label and finding of each result that went into it.
        folded: Whether its pictures are folded away, because another result of the same analysis stands above.
    """

    key: str
    title: str
    label: str
    summary: str
    figures: Sequence[tuple[str, str]]
    pictures: Sequence[Picture]
    tables: Sequence[Numbers]
    protocol: Sequence[tuple[str, str]]
    note: str = ""
    heads: Sequence[tuple[str, str]] = ()
    rows: Sequence[tuple[str, Sequence[str]]] = ()
    singles: Sequence[tuple[str, str, str, str]] = ()
    folded: bool = False


@dataclass(frozen=True)
class Tile:
    """One image with its adversarial example.

    Attributes:
        label: Its class.
        position: Its official position.
        clean: The image, as an address.
        change: The perturbation, magnified, as an address; empty for none.
        adversarial: The attacked image, as an address.
        before: What the model says of the clean image.
        after: What it says of the attacked one.
        right_before: Whether the former is right.
        right_after: Whether the latter is.
        measured: By how much it is vulnerable.
    """

    label: str
    position: int
    clean: str
    change: str
    adversarial: str
    before: str
    after: str
    right_before: bool
    right_after: bool
    measured: str


@dataclass(frozen=True)
class GalleryView:
    """Images of one run.

    Attributes:
        title: Whose, and which.
        protocol: How the examples were made.
        parts: Heading, tone (``"hard"`` or ``"good"``) and tiles.
    """

    title: str
    protocol: str
    parts: Sequence[tuple[str, str, Sequence[Tile]]]


@dataclass(frozen=True)
class ClassDetail:
    """What one run does to one class.

    Attributes:
        run: Name of the run.
        lines: What is known, as term and text.
        tiles: Its most vulnerable images.
    """

    run: str
    lines: Sequence[tuple[str, str]]
    tiles: Sequence[Tile] = ()


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Attributes:
        name: Its name.
        key: Its name in addresses.
        cells: For each run: clean accuracy, accuracy under attack.
        details: For each run.
    """

    name: str
    key: str
    cells: Sequence[Cell]
    details: Sequence[ClassDetail]


@dataclass(frozen=True)
class Confusion:
    """Predictions under attack for each true class.

    Attributes:
        run: Name of the run.
        classes: Names.
        rows: Counts (K, K): true class, then prediction.
        protocol: How they were made.
        numbers: The counts as a table.
    """

    run: str
    classes: Sequence[str]
    rows: Sequence[Sequence[int]]
    protocol: str
    numbers: Numbers


@dataclass(frozen=True)
class ClassesView:
    """All classes of a data set.

    Attributes:
        title: Which data.
        heads: Run, column and colour for each column.
        rows: The classes, hardest first.
        protocol: What the accuracies depend on.
        confusions: One for each run.
        numbers: The accuracies as a table.
        elsewhere: Key of the analysis that shows the same as the confusions on more images; empty for none.
    """

    title: str
    heads: Sequence[tuple[str, str, str]]
    rows: Sequence[ClassRow]
    protocol: Sequence[str]
    confusions: Sequence[Confusion]
    numbers: Numbers
    elsewhere: str = ""


@dataclass
class Page:
    """Everything on a page, in its order.

    Attributes:
        title: Title of the page.
        runs: The runs.
        lead: What to conclude from all runs together; empty for one.
        protocol: What the main numbers of several runs depend on.
        training: Pictures of training.
        evaluations: Evaluations.
        analyses: Stored analyses.
        galleries: Galleries.
        classes: Classes.
        tables: Instance tables.
        missing: What could not be shown, and why.
        made: When and by what the page was made.
    """

    title: str
    runs: list[RunView] = field(default_factory=list)
    lead: str = ""
    protocol: list[str] = field(default_factory=list)
    training: list[Picture] = field(default_factory=list)
    evaluations: list[EvaluationView] = field(default_factory=list)
    analyses: list[AnalysisView] = field(default_factory=list)
    galleries: list[GalleryView] = field(default_factory=list)
    classes: list[ClassesView] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    made: str = ""

    @property
    def overview(self) -> list[str]:
        """What the main numbers of the runs are: the titles of the run that has most of them."""
        most = max((run.cards for run in self.runs), key=len, default=())
        # The third is a difference of attacks, which a run may also have the other way round.
        return [card.title if place < 2 else "PGD overstates by" for place, card in enumerate(most)]

    @property
    def pictures(self) -> list[Picture]:
        """All figures, in the order of the page."""
        drawn = (made for view in self.evaluations for made in (view.picture, view.mechanism))
        of_evaluations = [made for made in drawn if made is not None]
        return [*self.training, *of_evaluations, *(made for view in self.analyses for made in view.pictures)]

    @property
    def numbers(self) -> list[Numbers]:
        """All tables, in the order of the page."""
        found = [table for made in self.training for table in made.numbers]
        found += [view.numbers for view in self.evaluations]
        found += [table for view in self.evaluations if view.mechanism for table in view.mechanism.numbers]
        found += [table for view in self.analyses for table in view.tables]
        for view in self.classes:
            found += [view.numbers, *(confusion.numbers for confusion in view.confusions)]
        return found
