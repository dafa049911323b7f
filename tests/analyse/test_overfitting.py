"""Overfitting and dynamics: forgetting by hand, alarms that ring when they should, best against last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instar.analyse import open_files
from instar.analyse.overfitting import catastrophic, compare, curve_figures, dynamics_figures, forgetting, measure
from instar.evaluate.record import Record
from instar.report.stored import UnavailableError
from instar.report.stored import read as read_run

WriteRun = Callable[..., Path]
# Right (1) or wrong (0) under attack, by epoch (rows) and instance (columns); the fourth is not trained on in epoch 2.
HISTORY = [
    {"correct": [1, 0, 1, 0]},
    {"correct": [0, 0, 1, 1]},
    {"correct": [1, 0, 1, 1], "seen": [2, 2, 2, 1]},
    {"correct": [0, 0, 1, 0]},
]


def test_forgetting_is_counted_by_hand(write_run: WriteRun, tmp_path: Path) -> None:
    epochs, rows = forgetting(read_run(write_run(tmp_path / "run", tables=HISTORY)))
    assert rows["index"].tolist() == [0, 1, 2, 3]
    assert rows["forgotten"].tolist() == [2, 0, 0, 1]
    assert rows["learned"].tolist() == [0, -1, 0, 1]
    assert rows["presentations"].tolist() == [4, 4, 4, 3]
    assert rows["correct_share"] == pytest.approx([0.5, 0.0, 1.0, 1 / 3])
    assert epochs["accuracy"] == pytest.approx([0.5, 0.5, 2 / 3, 0.25])
    assert epochs["forgotten_share"][1:] == pytest.approx([0.25, 0.0, 0.5])
    assert epochs["learned_share"][1:] == pytest.approx([0.25, 1 / 3, 0.0])
    assert np.isnan(epochs["forgotten_share"][0])
    figures = dynamics_figures(rows)
    assert figures == pytest.approx(
        {"mean_forgotten": 0.75, "never_learned": 0.25, "never_forgotten": 1 / 3, "forgotten_often": 0.25}
    )


def test_an_instance_that_appears_later_has_no_past(write_run: WriteRun, tmp_path: Path) -> None:
    tables = [{"correct": [1, 0], "seen": [0, -1]}, {"correct": [0, 1]}, {"correct": [1, 0]}]
    _, rows = forgetting(read_run(write_run(tmp_path / "run", robust=[0.1] * 3, tables=tables)))
    assert rows["forgotten"].tolist() == [1, 1]
    assert rows["presentations"].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        ([0.3, 0.4, 0.9, 0.9], [0.3, 0.35, 0.02, 0.0], 2),  # learns the attack: training rises, everything else falls
        ([0.3, 0.4, 0.1], [0.3, 0.35, 0.1], None),  # diverges: both fall
        ([0.3, 0.5, 0.8, 0.95], [0.3, 0.4, 0.35, 0.3], None),  # robust overfitting is slow
        ([0.1, 0.2, 0.3], [0.04, 0.01, 0.02], None),  # never learned anything
        ([0.5], [0.0], None),
    ],
)
def test_the_alarm_rings_for_catastrophic_overfitting_only(
    train: list[float], held_out: list[float], expected: int | None
) -> None:
    assert catastrophic(np.array(train), np.array(held_out)) == expected


def test_best_and_last_come_from_the_log(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", robust=[0.2, 0.5, 0.5, 0.4], training=[0.3, 0.6, 0.7, 0.9], tables=HISTORY)
    found = measure(open_files(folder))
    assert found.figures["best_epoch"] == 1  # the first of equals, as training keeps it
    assert found.figures["drop"] == pytest.approx(0.1)
    assert found.figures["train_rise"] == pytest.approx(0.3)
    assert found.figures["gap_at_last"] == pytest.approx(0.5)
    assert "epoch 2 of 4" in found.summary
    assert "10.0 points lower" in found.summary
    assert "within the noise" not in found.summary
    assert found.tables["epochs"]["forgotten_share"][3] == pytest.approx(0.5)
    few = measure(open_files(write_run(tmp_path / "few", robust=[0.2, 0.5, 0.5, 0.4], held_out=50)))
    assert "within the noise" in few.summary
    assert "instances" not in few.tables


def test_best_minus_last_is_read_from_evaluations(
    write_run: WriteRun, verdicts: Callable[..., Record], tmp_path: Path
) -> None:
    from dataclasses import replace

    records = [replace(verdicts([1, 1, 1, 0]), checkpoint="best"), verdicts([1, 0, 0, 0])]
    found = measure(open_files(write_run(tmp_path / "run", records=records)))
    assert found.figures["best_minus_last_attacked"] == pytest.approx(0.5)
    assert sorted(set(found.tables["evaluations"]["checkpoint"].tolist())) == ["best", "last"]


def test_curves_of_one_epoch_have_no_drop() -> None:
    figures = curve_figures(np.array([0.4]), np.array([0.3]))
    assert (figures["drop"], figures["train_rise"]) == (0.0, 0.0)


def test_runs_stand_side_by_side_and_the_alarm_is_told(write_run: WriteRun, tmp_path: Path) -> None:
    calm = write_run(tmp_path / "calm", robust=[0.2, 0.3, 0.31], seed=0)
    wild = write_run(tmp_path / "wild", robust=[0.2, 0.3, 0.0], training=[0.3, 0.5, 0.9], seed=1)
    founds = [measure(open_files(folder)) for folder in (calm, wild)]
    compared = compare(founds)
    assert compared.figures["largest_drop"] == pytest.approx(0.3)
    labels = compared.tables["members"]["label"].tolist()
    assert labels == ["PGD-AT, seed 0", "PGD-AT, seed 1"]
    assert "Catastrophic overfitting: PGD-AT, seed 1" in compared.summary
    assert np.isnan(compared.tables["members"]["catastrophic_epoch"][0])
    for found in (*founds, compared):
        again: Any = found.draw()
        assert again
    title = founds[1].draw()["curves"].get_suptitle().replace("\n", " ")
    assert "catastrophic overfitting in epoch 3" in title


def test_a_run_without_an_epoch_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "log.jsonl").write_text("")
    with pytest.raises(UnavailableError, match="no finished epoch"):
        measure(open_files(folder))
