import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from instar.errors import UserError
from instar.evaluate import mcnemar, wilson


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
