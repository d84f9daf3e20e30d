from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial, norm, t

from evals.rates import (
    Interval,
    Rate,
    clopper_pearson,
    mcnemar,
    mean_bounds,
    paired_bounds,
    paired_p_value,
    tango_bounds,
)

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


tables = st.integers(1, 80).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


def test_mcnemar_is_the_sign_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(6, 16) == pytest.approx(binomtest(6, 22).pvalue)


@pytest.mark.parametrize(
    ("gains", "losses", "pairs", "confidence", "low", "high"),
    [
        # Soft contact lenses: Tango (1998), section 6.1, which prints the lower limit alone.
        (0, 1, 44, 0.95, -0.096, None),
        # Airway reactivity (Bentur et al., 2009) and consolidation therapy (Cavo et al., 2012), both as in Fagerland,
        # Lydersen & Laake (2014); the second to the digits of the authors' package contingencytables.
        (1, 7, 21, 0.975, -0.517, -0.026),
        (6, 16, 161, 0.975, -0.1240, -0.0054),
    ],
)
def test_tango_bounds_published_numbers(
    gains: int, losses: int, pairs: int, confidence: float, low: float, high: float | None
) -> None:
    bounds = tango_bounds(gains, losses, pairs, confidence)
    digits = 4 if pairs == 161 else 3
    assert round(bounds.low, digits) == low
    assert high is None or round(bounds.high, digits) == high


def test_tango_score_is_mcnemars_at_a_difference_of_none() -> None:
    """The confidence at which the lower bound is 0 is the normal distribution's at (b - c) / sqrt(b + c)."""
    confidence = norm.cdf((16 - 6) / math.sqrt(22))
    assert tango_bounds(16, 6, 161, float(confidence)).low == pytest.approx(0.0, abs=2e-6)


@settings(max_examples=30, deadline=None)
@given(tables, st.floats(0.6, 0.99), st.sampled_from([tango_bounds, paired_bounds]))
def test_paired_bounds_contain_the_difference_mirror_and_widen(
    table: tuple[int, int, int], confidence: float, bound: Callable[[int, int, int, float], Interval]
) -> None:
    gains, losses, pairs = table
    low, high = bound(gains, losses, pairs, confidence)
    assert -1.0 <= low <= (gains - losses) / pairs <= high <= 1.0
    mirrored = bound(losses, gains, pairs, confidence)
    assert (-mirrored.high, -mirrored.low) == (low, high)
    wider = bound(gains, losses, pairs, (1 + confidence) / 2)
    assert wider.low <= low and high <= wider.high


def test_paired_bounds_without_discordant_pairs_by_hand() -> None:
    """Of the tables scored as low, none has a gain: the worst nuisance is none, and (1 - d)^n is the p-value."""
    error = 0.05 * (1 - 0.002)
    assert paired_bounds(0, 0, 120, 0.95).high == pytest.approx(1 - error ** (1 / 120), abs=2e-6)
    assert paired_bounds(0, 0, 0, 0.95) == (-1.0, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(8, 25), st.floats(0.02, 0.3))
def test_paired_p_value_is_no_smaller_than_by_adding_up_tables(
    gains: int, losses: int, pairs: int, difference: float
) -> None:
    """The probability, at the likeliest nuisance, of every table whose Tango score is no higher, added one by one."""

    def score(b: int, c: int) -> float:
        linear = (2 * pairs - b + c) * difference - b - c
        root = math.sqrt(linear**2 + 8 * pairs * c * difference * (1 - difference))
        rate = (root - linear) / (4 * pairs)
        return (b - c - pairs * difference) / math.sqrt(pairs * (2 * rate + difference * (1 - difference)))

    nuisance = losses / pairs
    if 2 * nuisance + difference > 1:
        return
    low = [
        (b, c, pairs - b - c)
        for b in range(pairs + 1)
        for c in range(pairs + 1 - b)
        if score(b, c) <= score(gains, losses) + 1e-9
    ]
    rates = [nuisance + difference, nuisance, 1 - 2 * nuisance - difference]
    added = float(multinomial.pmf(low, pairs, rates).sum())
    p_value = paired_p_value(gains, losses, pairs, difference, 0.05)
    assert added - 1e-3 <= p_value <= 1.0


@pytest.mark.parametrize(("gains", "losses", "pairs"), [(-1, 0, 3), (0, -1, 3), (2, 2, 3)])
def test_paired_bounds_of_no_table_raise(gains: int, losses: int, pairs: int) -> None:
    for bound in (tango_bounds, paired_bounds):
        with pytest.raises(ValueError, match="pairs"):
            bound(gains, losses, pairs, 0.95)
