from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, t

from evals.rates import Rate, clopper_pearson, mean_bounds

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.floats(0.5, 0.999)


def test_clopper_pearson_known_numbers() -> None:
    assert clopper_pearson(0, 400, 0.95).high == pytest.approx(0.00746, abs=5e-6)
    assert clopper_pearson(0, 10, 0.95).high == pytest.approx(1 - 0.05 ** (1 / 10))
    assert clopper_pearson(10, 10, 0.95) == (pytest.approx(0.05 ** (1 / 10)), 1.0)
    assert clopper_pearson(0, 0, 0.95) == (0.0, 1.0)


@given(counts, confidences)
def test_clopper_pearson_equals_scipys_two_sided_test(count: tuple[int, int], confidence: float) -> None:
    k, n = count
    expected = binomtest(k, n).proportion_ci(2 * confidence - 1, method="exact")
    assert clopper_pearson(k, n, confidence) == (
        pytest.approx(expected.low, abs=1e-9),
        pytest.approx(expected.high, abs=1e-9),
    )


@given(counts, st.floats(0.55, 0.999))
def test_clopper_pearson_contains_the_rate_and_is_monotone(count: tuple[int, int], confidence: float) -> None:
    k, n = count
    low, high = clopper_pearson(k, n, confidence)
    assert 0.0 <= low <= k / n <= high <= 1.0
    wider = clopper_pearson(k, n, confidence + (1 - confidence) / 2)
    assert wider.low <= low and high <= wider.high
    if k < n:
        more = clopper_pearson(k + 1, n, confidence)
        assert low <= more.low and high <= more.high


@pytest.mark.parametrize(("k", "n", "confidence"), [(-1, 3, 0.9), (4, 3, 0.9), (1, 3, 1.0)])
def test_clopper_pearson_out_of_range_raises(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError):
        clopper_pearson(k, n, confidence)


def test_rate_binary_counts_and_leaves_unscored_out() -> None:
    rate = Rate.of([1, 0, None, 1.0, None], confidence=0.9, higher_is_better=False)
    assert (rate.numerator, rate.denominator, rate.unscored, rate.binary) == (2, 3, 2, True)
    assert rate.value == pytest.approx(2 / 3)
    assert (rate.low, rate.high) == clopper_pearson(2, 3, 0.95)
    assert rate.metrics("harm")["harm_unscored"] == 2


def test_rate_nothing_scored_has_no_value_and_widest_bounds() -> None:
    rate = Rate.of([None, None])
    assert (rate.value, rate.low, rate.high, rate.unscored) == (None, 0.0, 1.0, 2)
    assert "harm" not in rate.metrics("harm")


def test_rate_non_binary_is_a_mean_with_students_t() -> None:
    scores = [0.0, 0.5, 1.0, 0.25]
    rate = Rate.of(scores, confidence=0.95)
    mean = sum(scores) / 4
    sd = math.sqrt(sum((s - mean) ** 2 for s in scores) / 3)
    low, high = t.interval(0.95, 3, loc=mean, scale=sd / 2)
    assert (rate.value, rate.low, rate.high) == pytest.approx((mean, low, high))
    assert not rate.binary


def test_rate_single_non_binary_score_has_no_bounds() -> None:
    rate = Rate.of([0.5])
    assert (rate.value, rate.low, rate.high) == (0.5, None, None)


def test_rate_nan_score_raises() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Rate.of([1.0, math.nan])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), confidences)
def test_mean_bounds_contain_the_mean(scores: Sequence[float], confidence: float) -> None:
    bounds = mean_bounds(scores, confidence)
    assert bounds is not None
    mean, slack = math.fsum(scores) / len(scores), 1e-9 * max(map(abs, scores))
    assert bounds.low - slack <= mean <= bounds.high + slack
