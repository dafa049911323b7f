"""What is refused, what is taken of a folder, and what belongs together."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from instar.compare import compare
from instar.errors import UserError
from instar.evaluate import Record
from instar.evaluate.intervals import seeds_difference

Make = Callable[..., Record]
RunFolder = Callable[..., Path]
COLUMNS = {"clean": [1, 1, 1, 0], "pgd": [1, 0, 1, 0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": "4/255"}, r"threat models: Linf 8/255 \(a\) against Linf 4/255 \(b\)"),
        ({"norm": "L2", "eps": "1/2"}, r"threat models: Linf 8/255 \(a\) against L2 1/2 \(b\)"),
        ({"index": [4, 5, 6, 7]}, r"images: first 4 .* \(a\) against 4 chosen images .* \(b\)"),
    ],
)
def test_other_questions_are_refused_in_one_line_that_names_the_difference(
    make: Make, change: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        compare([make(COLUMNS, target="a"), make(COLUMNS, target="b", **change)])
    assert "--common" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_common_part_is_common_images_and_equal_columns(make: Make) -> None:
    one = make({"clean": [1, 0, 1, 1], "pgd": [1, 0, 0, 1]}, target="a", index=[5, 3, 9, 7], label=[5, 3, 9, 7])
    other = make({"clean": [0, 1, 1], "pgd": [0, 0, 1]}, target="b", index=[9, 5, 1], label=[9, 5, 1])
    found = compare([one, other], common=True)
    assert found.count == 2
    assert [arm.scores["pgd"].value for arm in found.arms] == [0.5, 0.0]
    (item,) = [item for item in found.differences if item.column == "clean"]
    assert (item.won, item.lost, item.both) == ((), (9,), 1)
    assert found.notes[0].startswith("Only what they share is compared: images:")


def test_with_other_threat_models_only_what_does_not_depend_on_them_is_common(make: Make) -> None:
    free = {"fog_1": "Corruption('fog', 1)"}
    columns = {**COLUMNS, "fog_1": [1, 1, 0, 0]}
    one = make(columns, target="a", beside=["fog_1"], expressions=free)
    other = make(columns, target="b", eps="4/255", beside=["fog_1"], expressions=free)
    found = compare([one, other], common=True)
    assert [column.name for column in found.columns] == ["clean", "corruptions"]


def test_what_cannot_be_compared_at_all_is_refused_even_then(make: Make) -> None:
    one = make(COLUMNS, target="a")
    for other, message in (
        (make(COLUMNS, target="b", data="mnist"), "a on Digits .* and b on Mnist"),
        (make(COLUMNS, target="b", index=[7, 8, 9, 10]), "no image in common"),
        (make(COLUMNS, target="b", label=[0, 1, 2, 5]), "disagree about the labels"),
        (make(COLUMNS, target="b", digest="other pixels"), "different images at the same positions"),
    ):
        with pytest.raises(UserError, match=message):
            compare([one, other], common=True)


def test_harmless_differences_are_said(make: Make) -> None:
    one = make(COLUMNS, target="a", checkpoint="best", weights="w")
    other = make(COLUMNS, target="b", checkpoint="last", weights="w")
    notes = compare([one, other]).notes
    assert "They differ in checkpoints: best (a) against last (b)" in notes
    assert "b has the same weights as a" in notes


def test_of_folders_the_checkpoint_is_taken_that_all_have(make: Make, run_folder: RunFolder) -> None:
    both = [make(COLUMNS, checkpoint=name) for name in ("best", "last")]
    a = run_folder("a", *both, recipe="trades")
    b = run_folder("b", both[1], recipe="gairat")
    c = run_folder("c", *both, recipe="mart")
    found = compare([a, b])
    assert [arm.checkpoint for arm in found.arms] == ["last", "last"]
    assert [arm.name for arm in found.arms] == ["trades", "gairat"]
    assert [arm.checkpoint for arm in compare([a, c]).arms] == ["best", "best"]
    assert [arm.checkpoint for arm in compare([a, c], checkpoint="last").arms] == ["last", "last"]
    assert found.classes[3] == "three"  # as the catalogue calls the classes of digits
    best = run_folder("d", both[0], recipe="fat")
    with pytest.raises(UserError, match="a has the checkpoints best and last"):
        compare([a, b, best])


def test_suites_of_one_question_are_merged_and_others_left_aside(make: Make, run_folder: RunFolder) -> None:
    beside = {"clean": COLUMNS["clean"], "fog_1": [1, 0, 0, 0]}
    records = [
        make(COLUMNS, suite="standard"),
        make(beside, suite="corruptions", beside=["fog_1"]),
        make(COLUMNS, suite="standard", eps="4/255"),
        make({"clean": [1, 1], "pgd": [0, 0]}, suite="quick"),
    ]
    folders = []
    for name in ("trades", "mart"):
        folder = run_folder(name, recipe=name)
        for place, record in enumerate(records):
            # Written under names of their own, as `Record.write` keeps records of another protocol.
            replace(record, suite=record.suite if place < 3 else "quick").write(folder / "evaluations" / str(place))
            for file in (folder / "evaluations" / str(place)).iterdir():
                file.rename(folder / "evaluations" / f"{place}-{file.name}")
            (folder / "evaluations" / str(place)).rmdir()
        (folder / "evaluations" / "robustbench.json").write_text('{"clean_acc": "80.0"}')
        folders.append(folder)
    found = compare(folders)
    assert found.count == 4
    assert found.protocol["threat"] in ("Linf 8/255", "Linf 4/255")
    assert compare(folders, suite="quick").count == 2
    only = [folder / "evaluations" / "0-standard-last.json" for folder in folders]
    assert [column.name for column in compare(only).columns] == ["clean", "pgd", "worst_case"]
    for folder in folders:
        for file in (folder / "evaluations").glob("2-*"):
            file.unlink()
    merged = compare(folders)
    assert [column.name for column in merged.columns] == ["clean", "pgd", "corruptions", "worst_case"]
    assert merged.arms[0].scores["corruptions"].value == 0.25


def seeded(make: Make, run_folder: RunFolder, rng: np.random.Generator, recipe: str, rates: list[float]) -> list[Path]:
    folders = []
    for seed, rate in enumerate(rates):
        record = make({"clean": [1] * 100, "pgd": (rng.random(100) < rate).astype(int)}, target=f"{recipe}{seed}")
        folders.append(run_folder(f"{recipe}-seed{seed}", record, seed=seed, recipe=recipe))
    return folders


def test_runs_that_differ_by_the_seed_are_one_row(make: Make, run_folder: RunFolder) -> None:
    rng = np.random.default_rng(0)
    trades = seeded(make, run_folder, rng, "trades", [0.6, 0.62, 0.64])
    mart = seeded(make, run_folder, rng, "mart", [0.4, 0.41])
    found = compare([*trades[:1], *mart, *trades[1:]])
    assert [(arm.name, arm.seeds) for arm in found.arms] == [("trades", (0, 1, 2)), ("mart", (0, 1))]
    values = []
    for folders in (trades, mart):
        one = [np.load(folder / "evaluations" / "mine-last.npz")["pgd"] for folder in folders]
        values.append(np.array(one, float))
    for arm, rows in zip(found.arms, values, strict=True):
        assert arm.scores["pgd"].value == pytest.approx(rows.mean())
        assert arm.scores["pgd"].deviation == pytest.approx(rows.mean(1).std(ddof=1))
    (item,) = found.headline
    expected = seeds_difference(values[1], values[0])
    assert (item.value, item.p) == (pytest.approx(expected.value), pytest.approx(expected.p_value))
    won = np.flatnonzero((values[1].mean(0) > 0.5) & (values[0].mean(0) <= 0.5))
    assert list(item.won) == won.tolist()
    text = found.to_text()
    deviation = 100 * values[0].mean(1).std(ddof=1)
    assert f"{100 * values[0].mean():.1f} ± {deviation:.1f}" in text
    assert "trades (3 seeds)" in text


def test_runs_of_other_settings_or_of_the_same_seed_are_rows_of_their_own(make: Make, run_folder: RunFolder) -> None:
    record = make(COLUMNS)
    short = run_folder("short", record, seed=0, epochs=5)
    long = run_folder("long", record, seed=1, epochs=50)
    again = run_folder("again", record, seed=0, epochs=5)
    elsewhere = run_folder("elsewhere", record, seed=1, epochs=5, device="cuda", root="/data")
    assert [arm.name for arm in compare([short, long, again]).arms] == ["short", "long", "again"]
    with pytest.raises(UserError, match=r"differ in the seed only \(short, elsewhere\)"):
        compare([short, elsewhere])
    assert [arm.seeds for arm in compare([short, elsewhere, long]).arms] == [(0, 1), (1,)]


def test_the_error_over_seeds_has_a_part_of_the_images_and_one_of_the_seeds() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.random((1, 60)) < 0.6).astype(float), (rng.random((1, 60)) < 0.4).astype(float)
    paired = stats.ttest_rel(a[0], b[0])
    single = seeds_difference(a, b)
    assert single.p_value == pytest.approx(paired.pvalue)
    assert single.interval() == pytest.approx((paired.confidence_interval().low, paired.confidence_interval().high))
    # The same verdicts under three seeds: nothing to add. Accuracies that vary over seeds add s² / k.
    same = seeds_difference(np.repeat(a, 3, 0), b)
    assert same.error == pytest.approx(single.error)
    spread = np.array([[1.0] * 60, [0.0] * 60])
    found = seeds_difference(spread, np.full((1, 60), 0.5))
    assert found.error == pytest.approx(np.sqrt(0.5 / 2))
    assert found.freedom == pytest.approx(1.0)


def test_one_target_and_missing_evaluations_are_one_line(make: Make, run_folder: RunFolder, tmp_path: Path) -> None:
    a = run_folder("a", make(COLUMNS))
    empty = run_folder("empty")
    for targets, message in (
        ([a], "at least two"),
        ([a, empty], "empty has no evaluations: instar evaluate"),
        ([a, tmp_path / "nothing"], "there is no run folder"),
    ):
        with pytest.raises(UserError, match=message):
            compare(targets)
    (a / "evaluations" / "mine-last.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot read the evaluation record"):
        compare([a, a])
    with pytest.raises(UserError, match="unknown column in common 'pgd_20'"):
        compare([make(COLUMNS, target="a"), make(COLUMNS, target="b")], column="pgd_20")


def test_names_are_the_shortest_that_differ(make: Make, run_folder: RunFolder) -> None:
    record: Record = make(COLUMNS)
    a, b = run_folder("first", record, seed=0, lr=0.1), run_folder("second", record, seed=0, lr=0.2)
    assert [arm.name for arm in compare([a, b]).arms] == ["first", "second"]
    assert [arm.name for arm in compare([f"PGD-AT={a}", b]).arms] == ["PGD-AT", "pgd_at"]
    assert [arm.name for arm in compare([a, b], names=["x", "y"]).arms] == ["x", "y"]
    with pytest.raises(UserError, match="2 targets need as many names"):
        compare([a, b], names=["x"])
    with pytest.raises(UserError, match="two rows would have the name x"):
        compare([f"x={a}", f"x={b}"])
