import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, ttest_1samp

from instar.errors import UserError
from instar.evaluate import Paired, mcnemar, wilson
from instar.evaluate.intervals import holm, mean_of, seeds_difference, tango


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (the score interval).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, count: int, low: float, high: float) -> None:
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_proportion_agrees_with_scipy_and_is_symmetric(counts: tuple[int, int]) -> None:
    successes, count = counts
    low, high = wilson(successes, count)
    assert 0 <= low <= successes / count <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(wilson(count - successes, count), abs=1e-12)
    theirs = binomtest(successes, count).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(pairs: list[tuple[bool, bool]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = mcnemar(first, second)
    discordant = found.only_first + found.only_second
    assert found.difference == pytest.approx(np.mean(first) - np.mean(second))
    expected = binomtest(found.only_first, discordant).pvalue if discordant else 1.0
    assert found.p_value == pytest.approx(expected, abs=1e-12)
    # The standard error of a mean of differences in {-1, 0, 1}.
    differences = np.array(first, float) - np.array(second, float)
    assert found.error == pytest.approx(differences.std() / np.sqrt(len(pairs)), abs=1e-12)


def test_mcnemar_counts_thousands_of_discordant_pairs_without_overflow() -> None:
    verdicts = np.arange(4000) < 2200
    assert 0 < mcnemar(verdicts, ~verdicts).p_value < 1e-9


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(UserError, match="5 of 4"):
        wilson(5, 4)
    with pytest.raises(UserError, match="same instances"):
        mcnemar([1, 0], [1])


@settings(max_examples=30)
@given(
    st.integers(1, 300).flatmap(
        lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(n), st.just(b), st.integers(0, n - b)))
    )
)
def test_tango_ends_where_the_score_statistic_reaches_its_quantile(counts: tuple[int, int, int]) -> None:
    count, b, c = counts
    low, high = tango(b, c, count)
    assert -1 <= low <= (b - c) / count <= high <= 1
    assert low < high
    assert (-high, -low) == pytest.approx(tango(c, b, count), abs=1e-9)
    for end in (low, high):
        if abs(end) < 1 - 1e-6:
            # The likelihood of b, c given the difference, maximised over the share q of c by brute force.
            q = np.linspace(max(0.0, -end), (1 - end) / 2, 50_001)[1:-1]
            likelihood = (
                b * np.log(q + end) + c * np.log(q) + (count - b - c) * np.log(np.maximum(1 - 2 * q - end, 1e-300))
            )
            best = q[likelihood.argmax()]
            score = (b - c - count * end) ** 2 / (count * (2 * best + end * (1 - end)))
            assert score == pytest.approx(1.959964**2, rel=0.02)


def test_tango_gives_the_published_interval_and_the_closed_form_of_full_agreement() -> None:
    # Fagerland, Lydersen & Laake 2014 (21 children); without discordant pairs it has a closed form.
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z = 1.959964**2
    assert tango(0, 0, 50) == pytest.approx((-z / (50 + z), z / (50 + z)), abs=1e-6)
    with pytest.raises(UserError, match="5 and 6 of 10"):
        tango(5, 6, 10)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mid_p_takes_half_of_what_was_seen(b: int, c: int) -> None:
    pair = Paired(200, b, c)
    seen = binom.pmf(min(b, c), b + c, 0.5)
    assert pair.mid_p == pytest.approx(1.0 if b == c else pair.p_value - seen, abs=1e-12)
    assert 0 <= pair.mid_p <= pair.p_value <= 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_exactly_what_the_step_down_procedure_rejects(values: list[float]) -> None:
    corrected = holm(values)
    assert all(before <= after <= 1 for before, after in zip(values, corrected, strict=True))
    assert min(corrected) == min(1.0, len(values) * min(values))
    for level in (0.01, 0.05, 0.3):
        rejected = []
        for rank, p in enumerate(sorted(values)):
            if p * (len(values) - rank) > level:
                break
            rejected.append(p)
        assert sorted(p for p, c in zip(values, corrected, strict=True) if c <= level) == rejected


def test_a_mean_has_students_interval_and_certainty_has_no_width() -> None:
    values = np.random.default_rng(0).random(40)
    expected = ttest_1samp(values, 0.0)
    found = mean_of(values)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval()))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (mean_of([0.5, 0.5]).interval(), mean_of([0.5, 0.5]).p_value, mean_of([0, 0]).p_value) == ((0.5, 0.5), 0, 1)
    with pytest.raises(UserError, match="one for each instance"):
        mean_of([])
    with pytest.raises(UserError, match=r"\(2, 3\) and \(2, 4\)"):
        seeds_difference(np.ones((2, 3)), np.ones((2, 4)))
