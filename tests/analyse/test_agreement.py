"""Agreement: orders that agree, oppose or have nothing to do with each other, and wins counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from instar.analyse import Found, open_files
from instar.analyse.agreement import compare, correlate, measure, overlap
from instar.evaluate.record import Record
from instar.report.stored import UnavailableError

WriteRun = Callable[..., Path]


def run_with_losses(write_run: WriteRun, folder: Path, loss: np.ndarray, *, seed: int = 0) -> Path:
    correct = (loss < np.median(loss)).astype(int)
    kappa = np.argsort(np.argsort(-loss))
    tables = [{"correct": correct, "loss": loss[::-1]}, {"correct": correct, "loss": loss, "kappa": kappa}]
    return write_run(folder, robust=[0.1, 0.2], tables=tables, seed=seed)


def test_measures_are_turned_so_that_higher_is_harder(write_run: WriteRun, tmp_path: Path) -> None:
    loss = np.random.default_rng(0).permutation(40).astype(float)
    found = measure(open_files(run_with_losses(write_run, tmp_path / "run", loss)))
    rows = found.tables["correlations"]
    known = {(a, b): value for a, b, value in zip(rows["a"], rows["b"], rows["spearman"], strict=True)}
    assert known["training loss", "κ, few steps"] == pytest.approx(1.0)  # the loss of the last epoch
    assert known["training loss", "often wrong"] == pytest.approx(stats.spearmanr(loss, loss >= np.median(loss))[0])
    assert "forgotten" not in found.tables["difficulty"]  # nothing was


def test_stored_analyses_join_by_their_official_position(write_run: WriteRun, tmp_path: Path) -> None:
    loss = np.random.default_rng(0).permutation(40).astype(float)
    folder = run_with_losses(write_run, tmp_path / "run", loss)
    place = np.array([30, 4, 17, 9, 22])
    for checkpoint, sign in (("best", -1.0), ("last", 1.0)):
        rows = {"index": place, "vulnerability": sign * loss[place]}
        protocol = {"label": "x", "checkpoint": checkpoint, "split": "train"}
        Found("vulnerability", "", "", {}, {"instances": rows}, protocol).write(folder / "analyses")
    found = measure(open_files(folder))
    rows = found.tables["correlations"]
    row = (rows["a"] == "training loss") & (rows["b"] == "vulnerability")
    assert rows["spearman"][row] == pytest.approx(1.0)  # the last checkpoint is preferred
    assert rows["n"][row] == 5


def test_correlations_are_scipys_over_the_instances_that_have_both() -> None:
    draws = np.random.default_rng(1)
    a, b = draws.integers(0, 5, 50).astype(float), draws.normal(size=50)
    b[7] = np.nan
    found = correlate({"index": np.arange(50), "a": a, "b": b})
    known = np.isfinite(b)
    assert found["spearman"][0] == pytest.approx(stats.spearmanr(a[known], b[known])[0])
    assert found["n"][0] == 49


def test_overlap_of_the_hardest_tenths() -> None:
    values = np.arange(40.0)
    assert overlap(values, values) == pytest.approx(1.0)
    assert overlap(values, -values) == 0.0
    assert overlap(values, np.zeros(40)) == pytest.approx(0.1)
    half = values.copy()
    half[[36, 37]] = -1.0  # two of the four hardest leave, two others take their place
    assert overlap(values, half) == pytest.approx(0.5)


def test_stability_tells_equal_from_opposite_orders(write_run: WriteRun, tmp_path: Path) -> None:
    loss = np.random.default_rng(0).permutation(60).astype(float)
    folders = [
        run_with_losses(write_run, tmp_path / "first", loss, seed=0),
        run_with_losses(write_run, tmp_path / "second", loss**2, seed=1),
        run_with_losses(write_run, tmp_path / "third", 59 - loss, seed=2),
    ]
    compared = compare([measure(open_files(folder)) for folder in folders])
    rows = compared.tables["stability"]
    mine = rows["measure"] == "training loss"
    pairs = {
        (a, b): value for a, b, value in zip(rows["a"][mine], rows["b"][mine], rows["spearman"][mine], strict=True)
    }
    assert pairs == pytest.approx(
        {
            ("PGD-AT, seed 0", "PGD-AT, seed 1"): 1.0,
            ("PGD-AT, seed 0", "PGD-AT, seed 2"): -1.0,
            ("PGD-AT, seed 1", "PGD-AT, seed 2"): -1.0,
        }
    )
    assert rows["overlap"][mine].tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert set(compared.draw()) == {"stability"}


def test_wins_and_losses_are_counted_by_hand(
    write_run: WriteRun, verdicts: Callable[..., Record], tmp_path: Path
) -> None:
    robust = [[1, 1, 1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0, 0, 0]]
    folders = [write_run(tmp_path / str(k), records=[verdicts(row)], seed=k) for k, row in enumerate(robust)]
    compared = compare([measure(open_files(folder)) for folder in folders])
    row = {name: column[0] for name, column in compared.tables["wins"].items()}
    assert (row["both"], row["only_a"], row["only_b"], row["neither"]) == (1, 4, 1, 2)
    assert row["p"] == pytest.approx(2 * stats.binom.cdf(1, 5, 0.5))
    assert row["evaluation"] == "quick-last, Linf 8/255"
    (name,) = (name for name in compared.tables if name.startswith("verdicts"))
    assert compared.tables[name]["wins"].tolist() == [2, 1, 1, 1, 1, 0, 1, 0]
    figure = compared.draw()["wins"]
    widths = {bar.get_gid(): bar.get_width() for bar in figure.axes[0].patches}
    assert widths["only_a: 0"] == pytest.approx(0.5)


def test_evaluations_on_other_images_or_radii_are_not_compared(
    write_run: WriteRun, verdicts: Callable[..., Record], tmp_path: Path
) -> None:
    one = measure(open_files(write_run(tmp_path / "one", records=[verdicts([1, 0, 1])], seed=0)))
    wide = measure(open_files(write_run(tmp_path / "wide", records=[verdicts([1, 0, 1], eps="4/255")], seed=1)))
    elsewhere = [verdicts([1, 0, 1], index=[7, 8, 9])]
    other = measure(open_files(write_run(tmp_path / "other", records=elsewhere, seed=2)))
    for second in (wide, other):
        with pytest.raises(UnavailableError, match="share neither"):
            compare([one, second])


def test_a_run_without_tables_and_evaluations_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="neither instance tables nor evaluations"):
        measure(open_files(write_run(tmp_path / "run")))
