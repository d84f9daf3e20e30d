from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evals.calibration import Calibration
from evals.rates import Interval, clopper_pearson
from fleet.core.errors import InputError

FAIR = Calibration(positives=100, true_positives=90, negatives=200, true_negatives=190)

counts = st.builds(
    lambda positives, negatives, hits, passes: Calibration(
        positives=positives,
        true_positives=round(hits * positives),
        negatives=negatives,
        true_negatives=round(passes * negatives),
    ),
    st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip


def test_calibration_counts_rows_and_leaves_the_unscored_out() -> None:
    rows = [(True, True), (True, True), (False, True), (False, False), (None, True), (True, False), (False, False)]
    calibration = Calibration.of(rows)
    expected = Calibration(positives=3, true_positives=2, negatives=3, true_negatives=2, unscored=1)
    assert calibration == expected
    assert (calibration.sensitivity, calibration.specificity) == (2 / 3, 2 / 3)


def test_rate_rogan_gladen_by_hand() -> None:
    """(0.2 + 0.95 - 1) / (0.9 + 0.95 - 1) = 0.15 / 0.85; fewer than the false alarms is 0, more than the hits 1."""
    assert FAIR.rate(0.2) == pytest.approx(0.15 / 0.85)
    assert FAIR.rate(0.05) == pytest.approx(0.0)
    assert FAIR.rate(0.01) == 0.0
    assert FAIR.rate(0.9) == pytest.approx(1.0)
    assert FAIR.rate(0.99) == 1.0


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([(True, True), (False, True)], "no judged row is truly negative"),
        ([(True, False), (None, True)], "no judged row is truly positive"),
        # 1/3 and 2/3 add up to exactly 1, which floating point need not find.
        ([(True, True), *[(False, True)] * 2, (True, False), *[(False, False)] * 2], "add up to at most 1"),
        ([(False, True), (True, False)], "add up to at most 1"),
    ],
)
def test_calibration_that_tells_nothing_is_refused(rows: list[tuple[bool | None, bool]], why: str) -> None:
    with pytest.raises(InputError, match=why):
        Calibration.of(rows)


def test_calibration_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="judged rightly"):
        Calibration(positives=3, true_positives=4, negatives=1, true_negatives=1)


def test_bounds_of_a_judge_known_exactly_are_clopper_pearsons_corrected() -> None:
    """With a million labels of each kind only the share judged harmful is uncertain."""
    known = Calibration(positives=10**6, true_positives=900_000, negatives=10**6, true_negatives=950_000)
    low, high = known.bounds(40, 40, 200, 0.95)
    apparent = clopper_pearson(40, 200, 0.95)
    assert low == pytest.approx((apparent.low + 0.95 - 1) / 0.85, abs=2e-4)
    assert high == pytest.approx((apparent.high + 0.95 - 1) / 0.85, abs=2e-4)


def test_bounds_meld_what_random_draws_do() -> None:
    """The quantile of the rates that come out where the counts' beta distributions are drawn from."""
    rng = np.random.default_rng(6)
    share, hits, passes = (rng.beta(a, b, 200_000) for a, b in ((31, 270), (90, 11), (191, 10)))
    drawn = np.quantile((share + passes - 1) / (hits + passes - 1), 0.95)
    assert FAIR.bounds(0, 30, 300, 0.95).high == pytest.approx(drawn, abs=1e-3)
    share, hits, passes = (rng.beta(a, b, 200_000) for a, b in ((60, 241), (91, 10), (190, 11)))
    drawn = np.quantile((share + passes - 1) / (hits + passes - 1), 0.05)
    assert FAIR.bounds(60, 300, 300, 0.95).low == pytest.approx(drawn, abs=1e-3)


def test_bounds_of_few_labels_say_nothing() -> None:
    few = Calibration(positives=2, true_positives=2, negatives=2, true_negatives=2)
    assert few.bounds(20, 30, 100, 0.95) == (0.0, 1.0)
    assert few.difference_bounds(Interval(-0.1, 0.1), 0.95) == (-1.0, 1.0)


@settings(max_examples=50, deadline=None)
@given(counts, st.integers(0, 40), st.floats(0.01, 0.99), st.floats(0.6, 0.99))
def test_bounds_contain_the_estimate_and_agree_with_the_confidence_of_a_limit(
    calibration: Calibration, ones: int, limit: float, confidence: float
) -> None:
    if not calibration.tells:
        return
    low, high = calibration.bounds(ones, ones, 40, confidence)
    assert low - 1e-6 <= calibration.rate(ones / 40) <= high + 1e-6
    if abs(high - limit) > 1e-5:
        assert (calibration.confidence_at_most(ones, 40, limit) >= confidence) == (high <= limit)
    if abs(low - limit) > 1e-5:
        assert (calibration.confidence_above(ones, 40, limit) >= confidence) == (low > limit)


@given(counts, st.floats(-1, 1), st.floats(0, 0.5), st.floats(0.55, 0.99))
def test_difference_bounds_widen_and_agree_with_the_margins_before_correction(
    calibration: Calibration, apparent: float, margin: float, confidence: float
) -> None:
    if not calibration.tells:
        return
    bounds = calibration.difference_bounds(Interval(apparent, apparent), confidence)
    gain = calibration.sensitivity + calibration.specificity - 1
    assert bounds.low - 1e-9 <= max(-1, min(1, apparent / gain)) <= bounds.high + 1e-9
    limits = calibration.apparent_margins(margin, confidence)
    if abs(bounds.high - margin) > 1e-9:
        assert (apparent <= limits.low) == (bounds.high <= margin)
    if abs(bounds.low - margin) > 1e-9:
        assert (apparent > limits.high) == (bounds.low > margin)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "hits", "passes"), [(0.05, 0.9, 0.97), (0.0, 0.8, 0.99), (0.1, 1.0, 0.95)])
def test_simulated_bounds_hold_with_their_confidence(rate: float, hits: float, passes: float) -> None:
    """10,000 times: 300 completions judged, the judge calibrated on 30 harmful and 40 harmless rows."""
    number = 10_000
    shares = (rate * hits + (1 - rate) * (1 - passes), hits, passes)
    drawn, times = np.unique(
        np.random.default_rng(4).binomial((300, 30, 40), shares, (number, 3)), axis=0, return_counts=True
    )
    above = below = 0
    for (ones, right, passed), count in zip(drawn.tolist(), times.tolist(), strict=True):
        judge = Calibration(positives=30, true_positives=right, negatives=40, true_negatives=passed)
        # The rate is past a bound if the bound has at least this confidence at the rate already.
        above += count * (judge.confidence_at_most(ones, 300, rate) >= 0.95)
        below += count * (judge.confidence_above(ones, 300, rate) >= 0.95)
    slack = 3 * (0.05 * 0.95 * number) ** 0.5
    assert max(above, below) <= 0.05 * number + slack
