"""A benchmark as bars: images a second of each case, and the operations that a second of it holds."""

from __future__ import annotations

from collections.abc import Collection

from matplotlib.figure import Figure

from instar.bench.result import Benchmark
from instar.report.style import GREY, INK, PALE, RUNS, Sheet, styled


@styled
def bars(found: Benchmark) -> Figure:
    """Images a second, and the share of the machine's rate of matrix products, one bar a case.

    Args:
        found: The benchmark.

    Returns:
        The figure, with axes ``speed`` and ``share``; bars carry the case's name as their gid.
    """
    rows = list(found.rows)
    fastest = max(rows, key=found.images_a_second)
    best = max((s for row in rows if (s := found.speedup(row)) is not None), key=lambda r: r.median, default=None)
    title = f"{fastest.name} trains on {found.images_a_second(fastest):,.0f} images a second"
    ratios = {row.name: found.against_first(row) for row in rows if row.case.style == "instar"}
    longer = {name: ratio.median for name, ratio in ratios.items() if ratio is not None}
    if longer:
        title = f"A step takes {_span(longer.values())} times as long as one of {rows[0].name}"
    if best is not None:
        title = f"Up to {best.median:.1f} times as fast as the official style"
    sheet = Sheet(
        max(1.2, 0.34 * len(rows) + 0.5),
        title=title,
        subtitle="Left: images a second that a training step takes in. Right: its convolutions and products, as a "
        "share of the rate of plain matrix products in the same precision.",
        footer=[found.what(), found.how()],
        left=2.0,
        right=0.5,
    )
    grid = sheet.grid(1, 2, width_ratios=(2, 1), wspace=0.12)
    places = list(range(len(rows)))[::-1]
    speed = sheet.figure.add_subplot(grid[0], label="speed")
    share = sheet.figure.add_subplot(grid[1], label="share")
    for place, row in zip(places, rows, strict=True):
        colour = PALE if row.case.style == "official" else RUNS[0] if not row.case.without else RUNS[5]
        speed.barh(place, found.images_a_second(row), color=colour, height=0.66, gid=row.name)
        faster, text = found.speedup(row), f" {found.images_a_second(row):,.0f}"
        if faster is not None:
            text += f"   {faster.median:.1f}×"
        elif best is None and row.name in longer:
            text += f"   {longer[row.name]:.2f} × the time"
        speed.text(found.images_a_second(row), place, text, va="center", fontsize=8, color=INK)
        share.barh(place, found.share(row), color=colour, height=0.66, gid=row.name)
        share.text(found.share(row), place, f" {found.share(row):.0%}", va="center", fontsize=8, color=INK)
    speed.set_yticks(places, [row.name for row in rows], color=INK)
    share.set_yticks(places, [""] * len(rows))
    speed.set_xlim(0, 1.4 * max(found.images_a_second(row) for row in rows))
    share.set_xlim(0, 1.2 * max(found.share(row) for row in rows))
    speed.set_xlabel("images a second")
    share.set_xlabel("share of the matmul rate")
    for axes in (speed, share):
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.tick_params(axis="x", labelcolor=GREY)
    share.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return sheet.figure


def _span(ratios: Collection[float]) -> str:
    """The lowest and the highest ratio in two decimals, or the one that there is."""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"
