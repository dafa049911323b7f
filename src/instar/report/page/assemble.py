"""From run folders to what a page shows."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

import instar
from instar.data import Images, load
from instar.errors import UserError
from instar.evaluate.record import Record
from instar.report.contact import ranked
from instar.report.curves import few, instance_curves, learning_curves
from instar.report.distributions import survival_counts, unevenness_by_epoch
from instar.report.geometry import survival
from instar.report.page.evaluations import evaluation_view
from instar.report.page.examples import Examples, attacked
from instar.report.page.galleries import SHOWN, classes_view, test_gallery, training_gallery
from instar.report.page.instances import Table, evaluation_table, training_table
from instar.report.page.numbers import Numbers
from instar.report.page.summary import lead, preferred, protocol_line, run_view, shared_protocols
from instar.report.page.views import AnalysisView, Page, Picture, picture, slug
from instar.report.pictures import evaluation_groups
from instar.report.ridges import unevenness
from instar.report.stored import StoredRun, UnavailableError, names, read_all
from instar.report.style import colours
from instar.report.wording import minus, minuses, significant

if TYPE_CHECKING:
    from instar.analyse import Found  # not at run time: analyses draw with this package

Note = Callable[[str], None]
_FEW = 2
"""More runs than that are shown side by side, and not each by its own pictures as well."""
_NAMED = 20
"""The matrix of an analysis names so many classes."""
_SMALL = 500
"""Tables of a comparison with more rows stay with the results of `instar analyse`."""


@dataclass(eq=False)
class _Member:
    """One run of the page, with what was read or made for it."""

    run: StoredRun
    name: str
    colour: str
    root: str | Path | None
    records: list[Record] = field(default_factory=list)
    examples: Examples | None = None
    speaks: str = "best"

    @property
    def key(self) -> str:
        return slug(self.name)

    @property
    def data(self) -> tuple[str, ...]:
        """What runs on the same images share."""
        found = self.run.config["data"]
        return tuple(str(found.get(field)) for field in ("name", "path", "size", "train_images"))

    def images(self, split: str) -> Images:
        """The images of a split.

        Raises:
            UnavailableError: They are not here.
        """
        return self._training if split == "train" else self._test

    @cached_property
    def _training(self) -> Images:
        return self._load("train")

    @cached_property
    def _test(self) -> Images:
        return self._load("test")

    def _load(self, split: str) -> Images:
        data, training = self.run.config["data"], self.run.config["training"]
        if data["name"] == "custom":
            raise UnavailableError(f"the data of {self.run.folder} were given in Python, so its images cannot be shown")
        where = training.get("root") if self.root is None else self.root
        try:
            found = load(data.get("path") or data["name"], split=split, root=where, size=training.get("size"))
        except UserError as error:
            raise UnavailableError(str(error)) from None
        known = data.get("classes") or ()
        if known and tuple(known) != tuple(found.classes):
            raise UnavailableError(
                f"{self.run.folder} was trained on other classes than those of {found.info.title} here: is it another "
                "data set?"
            )
        return found

    @property
    def record(self) -> Record | None:
        """The record that speaks for the run: on the data that it was trained on."""
        return preferred([record for record in self.records if self.owns(record)], checkpoint=self.speaks)

    def owns(self, record: Record) -> bool:
        """Whether an evaluation is of images of the data set that the run was trained on."""
        own = {self.run.config["data"]["name"]}
        with contextlib.suppress(UserError):
            own.add(self.images("test").info.name)
        return record.protocol["data"]["name"] in own

    @property
    def checkpoint(self) -> str:
        """The checkpoint that examples are made of: that of the number which is quoted, else the best one."""
        wanted = self.speaks
        if self.record is not None and self.record.checkpoint in ("best", "last"):
            wanted = self.record.checkpoint
        kept = [name for name in ("best", "last") if (self.run.folder / "checkpoints" / f"{name}.safetensors").exists()]
        best = self.run.best
        same = best is not None and int(best["epoch"]) == int(self.run.log[-1]["epoch"])
        # Where the best epoch is the last, either file holds the weights.
        return kept[0] if same and kept and wanted not in kept else wanted

    @property
    def classes(self) -> list[str]:
        """Names of the classes; numbers where none are known."""
        if known := self.run.config["data"].get("classes"):
            return [str(name) for name in known]
        try:
            return list(self.images("train").classes)
        except UserError:
            most = max((int(record.protocol["model"]["classes"]) for record in self.records), default=0)
            return [f"class {k}" for k in range(most)]


class _Making:
    """A page while it is made: what cannot be shown becomes a line on it, and damage is remembered."""

    def __init__(self, title: str) -> None:
        self.page = Page(title)
        self.failed: list[UserError] = []

    def attempt(self, what: str, make: Callable[[], Any]) -> Any:
        """The result, or None and a line on the page."""
        try:
            return make()
        except UnavailableError as reason:
            self._leave_out(what, reason)
        except UserError as error:
            self.failed.append(error)
            self._leave_out(what, error)
        return None

    def _leave_out(self, what: str, reason: UserError) -> None:
        line = f"No {what}: {reason}"
        if line not in self.page.missing:
            self.page.missing.append(line)


def build(
    runs: Sequence[str | Path | StoredRun],
    *,
    root: str | Path | None = None,
    examples: int = 200,
    note: Note = lambda line: None,
) -> tuple[Page, list[UserError]]:
    """Collect everything that a page about some runs shows.

    Args:
        runs: Run folders; seven at most, because colours must tell them apart.
        root: Folder that data sets lie in; None takes each run's, else the default one.
        examples: How many test images are attacked for galleries and confusions; 0 leaves both out.
        note: Called with a line where something takes a while.

    Returns:
        The page, and the damage that was found on the way: it costs its own part of the page only.

    Raises:
        UserError: A folder holds no run, there are too many, or there is nothing to show yet.
    """
    if examples < 0:
        raise UserError(f"examples must be at least 0; got {examples}")
    stored = few(read_all(runs))
    for number, run in enumerate(stored):
        if run.folder.resolve() in [other.folder.resolve() for other in stored[:number]]:
            raise UserError(f"{run.folder} is named twice")
    named = _distinct(names(stored))
    called = colours(names(stored))  # as its figures colour them
    members = [_Member(run, name, tone, root) for run, name, tone in zip(stored, named, called, strict=True)]
    making = _Making(_title(members))
    page = making.page
    _read_records(members, making)
    if not any(run.log or run.tables for run in stored) and not any(member.records for member in members):
        raise UserError(f"{stored[0].folder} has no finished epoch yet: there is nothing to show")
    page.runs = [run_view(m.run, m.name, m.colour, m.records, checkpoint=m.speaks) for m in members]
    if len(members) > 1:
        found = [(m.name, preferred(m.records, checkpoint=m.speaks)) for m in members]
        spoken = [(name, record) for name, record in found if record is not None]
        page.lead = lead(spoken)
        page.protocol = shared_protocols(spoken)
    _training_pictures(members, making)
    _evaluations(members, making)
    _analyses(members, making)
    if examples:
        for member in members:
            _galleries(member, making, count=examples, note=note)
    for number, group in enumerate(_by_data(members)):
        _of_data(group, making, number=number)
    if len(members) == 1:
        _say_once(page)
    page.made = (
        f"Made by Instar {instar.__version__} on {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC from "
        + ", ".join(str(member.run.folder) for member in members)
    )
    return page, making.failed


def _say_once(page: Page) -> None:
    """Leave out what an analysis of the only run shows again, and on more images."""
    shown = {made.key: view.key for view in page.analyses for made in view.pictures}
    if any(key.startswith("analysis-run-reweighting-kappa") for key in shown):
        page.training = [made for made in page.training if made.key != "survival"]
    pairs = next((view for key, view in shown.items() if re.fullmatch(r"analysis-\w+-pairs-confusion", key)), "")
    if pairs and all(len(each.classes) <= _NAMED for view in page.classes for each in view.confusions):
        page.classes = [replace(view, confusions=[], elsewhere=pairs) for view in page.classes]


def _distinct(found: list[str]) -> list[str]:
    """Names that differ, also as places in a page."""
    taken: dict[str, int] = {}
    made = []
    for name in found:
        taken[slug(name)] = taken.get(slug(name), 0) + 1
        made.append(name if taken[slug(name)] == 1 else f"{name} ({taken[slug(name)]})")
    return made


def _title(members: Sequence[_Member]) -> str:
    called = [member.name for member in members]
    told = called[0] if len(called) == 1 else ", ".join(called[:-1]) + f" and {called[-1]}"
    return f"{told} on {' and '.join(dict.fromkeys(member.run.data for member in members))}"


def _read_records(members: Sequence[_Member], making: _Making) -> None:
    for member in members:
        groups, damaged = evaluation_groups([member.run])
        for path, error in damaged:
            making.attempt(f"evaluation {path.stem}", partial(_raise, error))
        for record in (record for group in groups.values() for _, record in group):
            try:
                protocol_line(record)
                _ = record.protocol["data"]["name"], record.instances["index"], record.instances["label"]
            except (KeyError, TypeError, AttributeError) as error:
                wrong = UserError(f"the evaluation record {record.path} lacks {error}: is it of another version?")
                making.attempt(f"evaluation by {record.suite}", partial(_raise, wrong))
            else:
                member.records.append(record)
    # Best or last for all: a run must not look better for having been evaluated at its best.
    common = [{record.checkpoint for record in member.records} for member in members if member.records]
    for checkpoint in ("last", "best"):
        if common and all(checkpoint in found for found in common):
            for member in members:
                member.speaks = checkpoint


def _raise(error: UserError) -> None:
    raise error


def _training_pictures(members: Sequence[_Member], making: _Making) -> None:
    logged = [member for member in members if member.run.log]
    plan: list[tuple[str, str, Callable[[], Figure], Callable[[], Numbers]]] = []
    if logged:
        draw = partial(learning_curves, [member.run for member in logged], tones=[member.colour for member in logged])
        plan.append(("learning curves", "learning-curves", draw, partial(_log_numbers, logged)))
    recorded = [member for member in members if member.run.tables] or list(members)
    if len(members) > 1:
        draw = partial(instance_curves, [m.run for m in recorded], tones=[m.colour for m in recorded])
        plan.append(("instances by epoch", "instances", draw, partial(_instance_numbers, recorded)))
    for member in members if len(members) <= _FEW else ():
        after = f"-{member.key}" if len(members) > 1 else ""
        plan.append(
            (
                f"survival of {member.name}",
                f"survival{after}",
                partial(survival, member.run),
                partial(_survival_numbers, member, f"survival{after}"),
            )
        )
        plan.append(
            (
                f"unevenness of {member.name}",
                f"unevenness{after}",
                partial(unevenness, member.run),
                partial(_uneven_numbers, member, f"unevenness{after}"),
            )
        )
    for what, key, drawn, count in plan:
        made = making.attempt(what, partial(_counted, drawn, count, key))
        if made is not None:
            making.page.training.append(made)


def _counted(draw: Callable[[], Figure], count: Callable[[], Numbers], key: str) -> Picture:
    return picture(draw(), key=key, numbers=[count()])


def _log_numbers(members: Sequence[_Member]) -> Numbers:
    lines = [(member.name, line) for member in members for line in member.run.log]
    fields = list(dict.fromkeys(name for _, line in lines for name, item in line.items() if _is_number(item)))
    columns: dict[str, Any] = {"run": [name for name, _ in lines]}
    columns |= {name: [line.get(name) for _, line in lines] for name in fields}
    return Numbers("learning-curves", columns)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _survival_numbers(member: _Member, name: str) -> Numbers:
    found = survival_counts(member.run)
    epochs, width = found.counts.shape
    return Numbers(
        name,
        {
            "epoch": np.repeat(found.epochs, width),
            "kappa": np.tile(np.arange(width), epochs),
            "images": found.counts.ravel(),
            "share": found.shares.ravel(),
        },
    )


def _uneven_numbers(member: _Member, name: str) -> Numbers:
    found = unevenness_by_epoch(member.run)
    fields = {"images": found.n, "median": found.median, "mean": found.mean, "top_tenth_share": found.top_share}
    return Numbers(name, {"epoch": found.epochs, **fields})


def _instance_numbers(members: Sequence[_Member]) -> Numbers:
    parts = []
    for member in members:
        counted, uneven = survival_counts(member.run), unevenness_by_epoch(member.run)
        shares = (counted.guarded, counted.attackable, uneven.top_share)
        parts += [
            (member.name, *row) for row in zip(counted.epochs.tolist(), *(s.tolist() for s in shares), strict=True)
        ]
    heads = ("run", "epoch", "guarded", "attackable", "top_tenth_share")
    return Numbers("instances", dict(zip(heads, map(list, zip(*parts, strict=True)), strict=True)))


def _evaluations(members: Sequence[_Member], making: _Making) -> None:
    groups, _ = evaluation_groups([member.run for member in members], least=1)
    # Pictures and tables call runs by the same names as the rest of the page.
    called = dict(zip(names([member.run for member in members]), members, strict=True))
    colours = {member.name: member.colour for member in members}
    kept = {record.path for member in members for record in member.records}
    for key, found in groups.items():
        shown = [(called[name].name, record) for name, record in found if record.path in kept]
        if shown:
            making.page.evaluations.append(evaluation_view(slug(key), shown, colours))


def _analyses(members: Sequence[_Member], making: _Making) -> None:
    from instar.analyse import ANALYSES, read  # not above: analyses draw with this package

    found: list[tuple[_Member, Found]] = []
    for member in members:
        for path in sorted((member.run.folder / "analyses").glob("*.json")):
            one = making.attempt(f"analysis {path.stem}", partial(read, path))
            if one is not None:
                found.append((member, one))
    order = {name: number for number, name in enumerate(ANALYSES)}
    for name in sorted(dict.fromkeys(one.name for _, one in found), key=lambda name: order.get(name, len(order))):
        mine = sorted(((m, one) for m, one in found if one.name == name), key=lambda pair: _rank(pair[1], members))
        together = _chosen(mine) if len(members) > 1 else []
        view = making.attempt(f"{name} side by side", partial(_together, name, together)) if together else None
        if view is not None:
            making.page.analyses.append(view)
            continue
        for place, (member, one) in enumerate(mine):
            view = making.attempt(f"analysis {one.stem}", partial(_analysis, one, member, several=len(members) > 1))
            if view is not None:
                label = _label(one, [other for _, other in mine])
                making.page.analyses.append(replace(view, label=label, folded=len(members) == 1 and place > 0))


def _rank(found: Found, members: Sequence[_Member]) -> tuple[bool, bool, bool]:
    """The result that says most about a run comes first: of the quoted checkpoint, on the usual images, of it alone."""
    wanted = members[0].checkpoint if len(members) == 1 else found.checkpoint
    return found.compares, found.checkpoint not in ("run", wanted), found.protocol.get("split") != _usual(found.name)


def _usual(name: str) -> str | None:
    """The split that an analysis is made on if no other is asked for."""
    from instar.analyse import ANALYSES

    return next(iter(ANALYSES[name].splits), None) if name in ANALYSES else None


def _label(found: Found, mine: Sequence[Found]) -> str:
    """Whose result it is, and on which images where there are results on others, too."""
    label = str(found.protocol.get("label", found.checkpoint))
    splits = {other.protocol.get("split") for other in mine if not other.compares}
    if found.compares or len(splits) == 1 or not found.protocol.get("split"):
        return label
    return f"{label}, {found.protocol['split']} images"


def _chosen(mine: Sequence[tuple[_Member, Found]]) -> list[tuple[_Member, Found]]:
    """Results that can stand side by side: of one checkpoint that as many runs as possible have, two at least."""
    alone = [(member, one) for member, one in mine if not one.compares]
    counts = {
        checkpoint: len({member.key for member, one in alone if one.checkpoint == checkpoint})
        for checkpoint in ("run", "best", "last")
    }
    checkpoint = max(counts, key=lambda name: counts[name])
    return [(member, one) for member, one in alone if one.checkpoint == checkpoint] if counts[checkpoint] > 1 else []


def _together(name: str, mine: Sequence[tuple[_Member, Found]]) -> AnalysisView | None:
    """One analysis of several runs side by side, with the finding and the numbers of each."""
    from instar.analyse import ANALYSES

    compare = ANALYSES[name].compare if name in ANALYSES else None
    if compare is None:
        return None
    try:
        made = compare([replace(one, protocol={**one.protocol, "colour": member.colour}) for member, one in mine])
    except (UserError, KeyError, IndexError, TypeError, ValueError) as reason:  # each is shown by itself instead
        raise UnavailableError(
            str(reason) if isinstance(reason, UserError) else f"what is stored cannot be compared ({reason!r})"
        ) from None
    key = slug(f"analysis {name}")
    view = _view(made, key)
    usual = _usual(name)
    shown = [(member, one) for member, one in mine if one.protocol.get("split", usual) == usual]
    fields = list(dict.fromkeys(field for _, one in shown for field in one.figures))
    table = {"run": [member.name for member, _ in shown]}
    table |= {field: [one.figures.get(field, float("nan")) for _, one in shown] for field in fields}  # type: ignore[misc]
    told, several = view.summary, len({one.protocol.get("split", usual) for _, one in mine}) > 1
    for member, one in sorted(shown, key=lambda pair: -len(pair[1].label)):  # the checkpoint is said once, above
        told = told.replace(f"{one.label}, {usual}", member.name).replace(one.label, member.name)
    checkpoint = mine[0][1].checkpoint
    labels = [f"{one.label}, {one.protocol.get('split', usual)}" if several else one.label for _, one in mine]
    return replace(
        view,
        label="side by side" + (f", {checkpoint} checkpoint" if checkpoint in ("best", "last") else ""),
        summary=told,
        heads=[(member.name, member.colour) for member, _ in shown],
        rows=[(f.replace("_", " "), [_number(one.figures.get(f, float("nan"))) for _, one in shown]) for f in fields],
        singles=[(m.name, m.colour, label, one.summary) for (m, one), label in zip(mine, labels, strict=True)],
        figures=[],
        protocol=[(f, t) for f, t in view.protocol if f not in ("members", "key", "seconds", "label", "checkpoint")],
        tables=[Numbers(f"{key}-figures", table), *(table for table in view.tables if len(table) <= _SMALL)],
    )


def _analysis(found: Found, member: _Member, *, several: bool) -> AnalysisView:
    stem = found.path.stem if found.path is not None else found.stem
    return _view(found, slug(f"analysis {stem} {member.key}" if several else f"analysis {stem}"))


def _view(found: Found, key: str) -> AnalysisView:
    tables = [Numbers(f"{key}-{slug(name)}", dict(table)) for name, table in found.tables.items()]
    note, pictures = "", []
    try:
        pictures = [
            picture(figure, key=f"{key}-{slug(name)}", title=name.replace("_", " "))
            for name, figure in found.draw().items()
        ]
    except UserError as reason:
        note = f"No pictures: {reason}"
    except (KeyError, IndexError, TypeError, ValueError) as error:
        note = (
            f"No pictures: what is stored cannot be drawn ({type(error).__name__}: {error}); is it of another version?"
        )
    label = str(found.protocol.get("label", found.checkpoint))
    told = [(str(name), _said(item)) for name, item in found.protocol.items() if item is not None]
    figures = [(name.replace("_", " "), _number(item)) for name, item in found.figures.items()]
    return AnalysisView(key, found.title, label, minuses(found.summary), figures, pictures, tables, told, note)


def _said(item: Any) -> str:
    return ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)


def _number(item: float) -> str:
    """A number of any size for a table.

    Example:
        >>> _number(49000.0), _number(0.3951), _number(123.456), _number(-0.125), _number(float("nan"))
        ('49,000', '0.40', '123.5', '−0.12', '–')
    """
    if not np.isfinite(item):
        return "–"
    if item == round(item):
        return minus(f"{item:,.0f}")
    return minus(f"{item:,.1f}" if abs(item) >= 10 else significant(item))


def _galleries(member: _Member, making: _Making, *, count: int, note: Note) -> None:
    """Attack test images and the hardest and easiest training images, and show both ends."""
    many = f"galleries of {member.name}"

    def test() -> Any:
        images = member.images("test")
        positions = _positions(member.record, len(images), count)
        note(f"attacking {len(positions)} test images of {member.name} for its gallery (--examples 0 leaves this out)")
        what = f"{len(positions):,} test images"
        member.examples = attacked(member.run, images, positions, checkpoint=member.checkpoint, what=what)
        return test_gallery(member.name, member.examples, member.classes)

    def training() -> Any:
        if not member.run.tables:
            return None
        images, rows = member.images("train"), member.run.instances(member.run.tables[-1])
        kappa, loss = rows["kappa"].astype(np.int64), rows["loss"].astype(np.float64)
        shown = min(SHOWN, len(kappa) // 2)
        if not shown or int(rows["position"].max()) >= len(images):
            raise UnavailableError(f"{images.info.title} here is not what {member.run.folder} was trained on")
        picked = np.concatenate([ranked(kappa, loss)[:shown], ranked(-kappa, -loss)[:shown]])
        made = attacked(
            member.run,
            images,
            rows["position"][picked],
            checkpoint=member.checkpoint,
            what=f"{2 * shown} training images",
        )
        return training_gallery(member.name, member.run, made, member.classes, kappa=kappa[picked], loss=loss[picked])

    for make in (test, training):
        view = making.attempt(many, make)
        if view is not None:
            making.page.galleries.append(view)


def _positions(record: Record | None, total: int, count: int) -> np.ndarray:
    """Images of the evaluation, so that its verdicts are about them too, else of all.

    They are evenly spread, because a data set may be sorted by class.
    """
    chosen = np.arange(total)
    if record is not None and int(record.instances["index"].max(initial=-1)) < total:
        chosen = record.instances["index"].astype(np.int64)
    count = min(count, len(chosen))
    return chosen[np.arange(count) * len(chosen) // max(count, 1)]


def _by_data(members: Sequence[_Member]) -> Iterator[list[_Member]]:
    for data in dict.fromkeys(member.data for member in members):
        yield [member for member in members if member.data == data]


def _of_data(group: list[_Member], making: _Making, *, number: int) -> None:
    """Classes and instance tables of the runs on one data set."""
    page, first = making.page, group[0]
    training = making.attempt("thumbnails", lambda: first.images("train"))
    key = "classes" if number == 0 else f"classes-{number + 1}"
    view = making.attempt(
        f"classes of {first.run.data}",
        lambda: classes_view(
            [(member.name, member.colour, member.run, member.record, member.examples) for member in group],
            first.classes,
            training,
            title=first.run.data,
            key=key,
        ),
    )
    if view is not None:
        page.classes.append(view)
    tables: list[Table] = []
    with_tables = [member for member in group if member.run.tables]
    if with_tables:
        made = making.attempt(
            "table of training images",
            lambda: training_table(
                [member.run for member in with_tables],
                [member.name for member in with_tables],
                _fitting(training, with_tables),
                key=f"training-{number}",
                title=f"Training images of {first.run.data}",
            ),
        )
        tables += [] if made is None else [made]
    tables += _evaluated(group, making, number)
    page.tables += tables


def _fitting(images: Images | None, members: Sequence[_Member]) -> Images | None:
    """The images, if every row of the tables has one."""
    if images is None:
        return None
    highest = max(int(member.run.instances(member.run.tables[-1])["position"].max()) for member in members)
    return images if highest < len(images) else None


def _evaluated(group: list[_Member], making: _Making, number: int) -> list[Table]:
    """A table for each set of images that runs of the group were evaluated on."""
    images = making.attempt("thumbnails of test images", lambda: group[0].images("test"))
    found: dict[str, list[tuple[str, Record]]] = {}
    for member in group:
        for record in member.records:
            about = (
                f"{record.protocol['images_sha256']} {record.suite} {record.protocol['norm']} {record.protocol['eps']}"
            )
            found.setdefault(about, []).append((member.name, record))
    made = []
    for place, members in enumerate(found.values()):
        record = members[0][1]
        own = group[0].owns(record)
        fits = own and images is not None and int(record.instances["index"].max(initial=-1)) < len(images)
        count = int(record.instances["label"].max(initial=0)) + 1
        shown = partial(
            evaluation_table,
            members,
            group[0].classes if own else [f"class {k}" for k in range(count)],
            images if fits else None,
            key=f"evaluated-{number}-{place}",
            title=f"Evaluated images, suite {record.suite}, {record.protocol['norm']} {record.protocol['eps']}",
        )
        table = making.attempt("table of evaluated images", shown)
        made += [] if table is None else [table]
    return made
