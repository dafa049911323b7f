"""Differences, intervals and images against what can be counted by hand."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from instar.compare import compare
from instar.evaluate import Record
from instar.evaluate.intervals import holm, tango

Make = Callable[..., Record]


def verdicts(count: int, both: int, first: int, second: int) -> tuple[list[int], list[int]]:
    """So many images that both, only the first, only the second get right; the others neither."""
    rest = count - both - first - second
    a = [1] * both + [1] * first + [0] * second + [0] * rest
    b = [1] * both + [0] * first + [1] * second + [0] * rest
    return a, b


def test_the_table_of_a_published_example_is_reproduced(make: Make) -> None:
    # Fagerland, Lydersen & Laake 2014: 21 children, one both times, one only before, seven only after.
    before, after = verdicts(21, 1, 1, 7)
    index = list(range(100, 121))
    one, other = (
        make({"clean": [1] * 21, "pgd": rows}, target=name, index=index)
        for name, rows in zip("ab", (before, after), strict=True)
    )
    (found,) = [item for item in compare([other, one]).differences if item.column == "pgd"]
    assert found.value == pytest.approx(-6 / 21)
    assert (found.low, found.high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert found.p_exact == pytest.approx(0.0703, abs=5e-5)
    assert found.p == pytest.approx(0.0391, abs=5e-5)
    assert found.won == (101,)
    assert found.lost == tuple(range(102, 109))
    assert (found.both, found.neither) == (1, 12)


def test_all_are_compared_with_the_first_and_p_values_corrected_within_a_column(make: Make) -> None:
    rng = np.random.default_rng(0)
    records = [
        make({"clean": [1] * 300, "pgd": (rng.random(300) < rate).astype(int)}, target=f"runs/{name}")
        for name, rate in zip("abcd", (0.5, 0.35, 0.55, 0.44), strict=True)
    ]
    found = compare(records)
    assert found.column == "worst_case"
    assert [(item.arm, item.reference) for item in found.headline] == [("b", "a"), ("c", "a"), ("d", "a")]
    assert [item.p_holm for item in found.headline] == holm([item.p for item in found.headline])
    for item in found.headline:
        exact = binomtest(len(item.won), len(item.won) + len(item.lost)).pvalue
        assert item.p_exact == pytest.approx(exact, rel=1e-9)
        assert (item.low, item.high) == tango(len(item.won), len(item.lost), 300)
        assert item.value == pytest.approx((len(item.won) - len(item.lost)) / 300)
        assert len(item.won) + len(item.lost) + item.both + item.neither == 300
        first, other = (next(r for r in records if r.target == f"runs/{name}") for name in (item.reference, item.arm))
        expected = np.flatnonzero((other.instances["pgd"] == 1) & (first.instances["pgd"] == 0))
        assert list(item.won) == expected.tolist()
    every = compare(records, against="all")
    assert len(every.headline) == 6
    mirrored = compare(records[::-1]).headline[-1]
    assert (mirrored.value, mirrored.won) == (-found.headline[-1].value, found.headline[-1].lost)


def test_the_worst_case_is_over_the_attacks_that_all_share_and_that_count(make: Make) -> None:
    clean, weak, strong, far = [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 0, 1]
    one = make({"clean": clean, "weak": weak, "strong": strong, "far": far}, target="one", beside=["far"])
    other = make({"clean": clean, "weak": weak, "far": far}, target="other", beside=["far"])
    found = compare([one, other])
    assert [column.name for column in found.columns] == ["clean", "weak", "far", "worst_case"]
    assert [arm.scores["worst_case"].value for arm in found.arms] == [0.6, 0.6]
    assert any("more were run on one" in note for note in found.notes)


def test_attacks_of_one_name_with_other_settings_are_not_compared(make: Make) -> None:
    columns = {"clean": [1, 1], "pgd": [1, 0]}
    other = make(columns, target="other", expressions={"pgd": "pgd(steps=7)"})
    found = compare([make(columns, target="one"), other])
    assert [column.name for column in found.columns] == ["clean"]
    assert found.column == "clean"
    assert "Not compared, because their settings differ: pgd" in found.notes


def test_diagnoses_are_no_accuracies(make: Make) -> None:
    records = [make({"clean": [1, 1], "zero_gradient": [1, 0], "pgd": [1, 1]}, target=name) for name in ("a", "b")]
    for record in records:
        record.protocol["attacks"]["zero_gradient"]["diagnosis"] = True
    assert [column.name for column in compare(records).columns] == ["clean", "pgd", "worst_case"]


def test_classes_and_the_worst_of_them(make: Make) -> None:
    label = [0] * 50 + [1] * 50 + [2] * 100
    right = [1] * 40 + [0] * 10 + [1] * 10 + [0] * 40 + [1] * 50 + [0] * 50
    records = [make({"clean": [1] * 200, "pgd": right}, label=label, target=name) for name in ("a", "b")]
    arm = compare(records).arms[0]
    assert [entry and entry.value for entry in arm.classes] == [0.8, 0.2, 0.5]
    assert [entry and entry.count for entry in arm.classes] == [50, 50, 100]
    assert arm.worst_class == 1
    own = arm.classes[1]
    assert own is not None
    # Over all classes at once, so wider than the class's own.
    assert arm.worst.low < own.low < 0.2 < own.high < arm.worst.high


def test_corruptions_are_one_column_of_shares_with_students_test(make: Make) -> None:
    rng = np.random.default_rng(1)
    records = []
    for name, rate in (("a", 0.7), ("b", 0.5)):
        cells = {f"fog_{level}": (rng.random(80) < rate - 0.05 * level).astype(int) for level in range(1, 6)}
        beside = list(cells)
        records.append(make({"clean": [1] * 80, "pgd": [1] * 80, **cells}, target=name, beside=beside))
    found = compare(records, column="corruptions")
    assert [column.title for column in found.columns] == ["clean", "pgd", "5 corruptions", "worst case"]
    shares = [np.mean([r.instances[f"fog_{level}"] for level in range(1, 6)], axis=0) for r in records]
    test = ttest_1samp(shares[1] - shares[0], 0)
    (item,) = found.headline
    assert item.value == pytest.approx((shares[1] - shares[0]).mean())
    assert item.p == pytest.approx(test.pvalue)
    ends = test.confidence_interval()
    assert (item.low, item.high) == pytest.approx((ends.low, ends.high))
    assert item.p_exact is None


def test_the_union_of_norms_is_each_images_and(make: Make) -> None:
    linf, l2 = [1, 1, 0, 0], [1, 0, 1, 0]
    columns = {"clean": [1] * 4, "apgd_linf": linf, "apgd_l2": l2}
    found = compare([make(columns, target=name, beside=["apgd_l2"]) for name in ("a", "b")])
    scores = found.arms[0].scores
    assert scores["union"].value == 0.25
    assert scores["worst_case"].value == 0.5


def test_only_what_is_significantly_worse_than_the_best_is_not_marked(make: Make) -> None:
    records = [
        make({"clean": [1] * 200, "pgd": [1] * right + [0] * (200 - right)}, target=str(right))
        for right in (120, 118, 60)
    ]
    found = compare(records)
    assert found.leaders["pgd"] == (True, True, False)
    assert found.leaders["clean"] == (True, True, True)
