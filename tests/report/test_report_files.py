"""Pictures as files, and what happens when a run's files are missing or damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from instar import UserError
from instar.cli import main
from instar.cli.report import run as report
from instar.evaluate.record import Record
from instar.report import compare_pictures, learning_curves, read, survival, unevenness, write_pictures
from instar.report.pictures import evaluation_plan

COUNTS = {"clean": 160, "pgd_20": 90, "autoattack": 60, "worst_case": 60}
ALWAYS = ["learning_curves.png", "survival.png", "unevenness.png", "gallery.png"]


def test_everything_that_the_files_allow_is_written_as_png_of_150_dpi(run: Path, record: Callable[..., Record]) -> None:
    for checkpoint in ("best", "last"):
        record(checkpoint=checkpoint, counts=COUNTS).write(run / "evaluations")
    written = write_pictures(run)
    assert written == [run / "pictures" / name for name in [*ALWAYS, "evaluation-standard.png"]]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width == 1500  # ten inches
            assert len(picture.convert("L").getcolors()) > 20
            assert picture.text["Description"]


def test_a_run_that_has_just_begun_says_so(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    folder = new_run(tmp_path / "run", robust=[], epochs=5)
    (folder / "log.jsonl").unlink()
    with pytest.raises(UserError, match="no finished epoch yet"):
        write_pictures(folder)
    assert not (folder / "pictures").exists()


def test_a_run_without_instance_tables_keeps_its_curves(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    folder = new_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="no instance table yet") as notes:
        written = write_pictures(folder)
    assert [path.name for path in written] == ["learning_curves.png"]
    assert len(notes) == 3


def test_a_data_set_that_is_not_there_costs_only_the_gallery(tmp_path: Path, new_run: Callable[..., Path]) -> None:
    data = {"name": "mnist", "path": "mnist", "train_images": 3}
    folder = new_run(tmp_path / "run", tables=[{"kappa": [0, 2, 4], "loss": [2, 1, 1]}], data=data)
    with pytest.warns(UserWarning, match=r"no gallery.png: no MNIST below"):
        written = write_pictures(folder, root=tmp_path)
    assert [path.name for path in written] == ALWAYS[:3]


def test_a_damaged_table_is_one_line_and_costs_only_its_own_pictures(run: Path, tmp_path: Path) -> None:
    path = run / "instances" / "epoch_001.npz"
    path.write_bytes(path.read_bytes()[:100])
    for picture in (survival, unevenness):
        with pytest.raises(UserError, match=r"cannot read the instance table .*epoch_001.npz") as error:
            picture(run)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"epoch_001.npz.*; the other pictures are in"):
        write_pictures(run, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gallery.png", "learning_curves.png"]


def test_a_table_under_the_name_of_another_epoch_is_refused(run: Path) -> None:
    (run / "instances" / "epoch_000.npz").rename(run / "instances" / "epoch_004.npz")
    with pytest.raises(UserError, match="no row of its own epoch"):
        survival(run)


def test_missing_and_damaged_run_files_are_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        read(tmp_path / "nowhere")
    log = run / "log.jsonl"
    log.write_text(log.read_text()[:-40])
    with pytest.raises(UserError, match=r"line 4 of .*log.jsonl is damaged"):
        learning_curves(run)
    log.write_text('{"epoch": 0, "lr": 0.1}\n')
    with pytest.raises(UserError, match="must have numbers for train_loss, train_robust"):
        learning_curves(run)
    log.unlink()
    (run / "run.json").write_text('{"recipe": "gairat"}')
    with pytest.raises(UserError, match=r"run.json is not the description of a run"):
        read(run)
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*run.json"):
        read(run)


def test_a_damaged_evaluation_is_one_line_and_the_other_suites_are_drawn(
    run: Path, tmp_path: Path, record: Callable[..., Record]
) -> None:
    record(counts=COUNTS).write(run / "evaluations")
    (run / "evaluations" / "quick-best.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read the evaluation record .*quick-best.json"):
        write_pictures(run, out=tmp_path / "out")
    assert (tmp_path / "out" / "evaluation-standard.png").stat().st_size > 10_000


def test_a_place_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        write_pictures(run, out=tmp_path / "file" / "out")


def test_runs_are_compared_in_the_evaluations_that_they_share(
    tmp_path: Path, new_run: Callable[..., Path], record: Callable[..., Record]
) -> None:
    table = {"kappa": [0, 2, 4], "loss": [2, 1, 1]}
    runs = [new_run(tmp_path / name, recipe=name, tables=[table]) for name in ("gairat", "trades")]
    for folder in runs:
        record(counts=COUNTS).write(folder / "evaluations")
    record(counts=COUNTS, checkpoint="last", eps="4/255").write(runs[0] / "evaluations")
    written = compare_pictures(runs, tmp_path / "out")
    assert [path.name for path in written] == ["learning_curves.png", "instances.png", "evaluation-standard.png"]


def test_of_two_evaluations_of_a_checkpoint_the_newer_one_is_drawn(
    tmp_path: Path, new_run: Callable[..., Path], record: Callable[..., Record]
) -> None:
    folder = new_run(tmp_path / "run")
    record(counts={**COUNTS, "autoattack": 50}, key="older").write(folder / "evaluations")
    record(counts=COUNTS, key="newer").write(folder / "evaluations")
    assert len(list((folder / "evaluations").glob("*.json"))) == 2
    ((name, draw),) = evaluation_plan([read(folder)])
    bars = {str(bar.get_gid()): bar.get_height() for bar in draw().axes[0].patches}
    assert name == "evaluation-standard.png"
    assert bars == {"clean: GAIRAT (best)": 0.8, "pgd_20: GAIRAT (best)": 0.45, "autoattack: GAIRAT (best)": 0.3}


def test_the_command_prints_where_the_pictures_lie(
    tmp_path: Path, new_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"kappa": [0, 2, 4], "loss": [2, 1, 1]}
    runs = [str(new_run(tmp_path / name, recipe=name, tables=[table])) for name in ("gairat", "trades")]
    assert report([runs[0], "--out", str(tmp_path / "out"), runs[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [Path(line).relative_to(tmp_path / "out") for line in lines]
    assert names[:4] == [Path("gairat", name) for name in ALWAYS]
    assert names[4:8] == [Path("trades", name) for name in ALWAYS]
    assert [str(name) for name in names[8:]] == ["learning_curves.png", "instances.png"]
    assert all(Path(line).is_file() for line in lines)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["report"], "which run?"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["report", "nowhere", "--ouf", "x"], "unknown flag 'ouf'. Did you mean 'out'?"),
    ],
)
def test_mistakes_at_the_command_line_are_one_line_and_status_2(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert answer in told
    assert told.count("\n") == 1
