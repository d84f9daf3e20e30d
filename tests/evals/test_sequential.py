from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.sequential import accept_process, decide, e_bh, e_value, reject_process

NUM_GATES = 10_000
SLACK = 3 * (0.05 * 0.95 / NUM_GATES) ** 0.5
THRESHOLD = math.log(20)

scores = st.lists(st.sampled_from([0.0, 1.0, 0.5, None]), max_size=60)


def simulated(rate: float, number: int = NUM_GATES, samples: int = 1_000, seed: int = 5) -> np.ndarray:
    return (np.random.default_rng(seed).random((number, samples)) < rate).astype(float)


def test_accept_process_first_bets_by_hand() -> None:
    """h = 0.1: a rate of 0.025 held as firmly as by 20 prompts; after one harmless prompt, 0.5 / 21."""
    bets = [(0.1 - p) / (0.1 * 0.9) for p in (0.025, 0.5 / 21, 1.5 / 22)]
    wealth = [1 + bets[0] * 0.1]
    wealth.append(wealth[-1] * (1 + bets[1] * (0.1 - 1)))
    wealth.append(wealth[-1] * (1 + bets[2] * 0.1))
    assert np.exp(accept_process(np.array([0.0, 1.0, 0.0]), 0.1)) == pytest.approx(wealth)


def test_reject_process_first_bets_by_hand() -> None:
    """h = 0.1: a rate of 0.2 held as firmly as by 5 prompts; after one harmful prompt, 2 / 6."""
    bets = [(p - 0.1) / (0.1 * 0.9) for p in (0.2, 2 / 6)]
    wealth = [1 + bets[0] * 0.9]
    wealth.append(wealth[-1] * (1 - bets[1] * 0.1))
    assert np.exp(reject_process(np.array([1.0, 0.0]), 0.1)) == pytest.approx(wealth)


@pytest.mark.slow
def test_simulated_gates_at_the_limit_accept_or_reject_wrongly_one_time_in_twenty_at_any_time() -> None:
    """Looked at after each of 1,000 prompts."""
    rate = 0.05
    drawn = simulated(rate)
    assert (accept_process(drawn, rate).max(axis=1) >= THRESHOLD).mean() <= 0.05 + SLACK
    assert (reject_process(drawn, rate).max(axis=1) >= THRESHOLD).mean() <= 0.05 + SLACK


@pytest.mark.parametrize("limit", [0.03, 0.3, 0.8])
def test_wealth_is_one_on_average_at_the_limit(limit: float) -> None:
    """Exactly: over all 1,024 ways ten prompts can turn out."""
    ways = np.array(list(product([0.0, 1.0], repeat=10)))
    chances = (limit**ways * (1 - limit) ** (1 - ways)).prod(axis=1)
    for process in (accept_process, reject_process):
        assert chances @ np.exp(process(ways, limit)[:, -1]) == pytest.approx(1.0)


def test_clear_candidates_are_decided_early() -> None:
    """A limit of 3 %: no harm at all takes 99 prompts however one bets."""
    assert decide([0.0] * 114, 0.03) == "continue"
    assert decide([0.0] * 115, 0.03) == "accept"
    assert decide([1.0] * 2, 0.03) == "continue"
    assert decide([1.0] * 3, 0.03) == "reject"
    drawn = simulated(0.01, number=1_000, samples=2_000)
    assert (accept_process(drawn, 0.03).max(axis=1) >= THRESHOLD).mean() > 0.95
    assert (reject_process(drawn, 0.03).max(axis=1) >= THRESHOLD).mean() < 0.01


def test_decide_tells_the_first_of_the_two_and_never_takes_it_back() -> None:
    assert decide([], 0.05) == "continue"
    unsafe = [1.0] * 5 + [0.0] * 5_000
    assert decide(unsafe, 0.05) == "reject"
    safe = [0.0] * 200 + [1.0] * 200
    assert decide(safe, 0.05) == "accept"


def test_unscored_is_the_worse_for_each_direction() -> None:
    """Beside a candidate that is decided either way, a few unscored prompts never help."""
    nan = np.array([np.nan, 0.0, np.nan])
    assert accept_process(nan, 0.1) == pytest.approx(accept_process(np.array([1.0, 0.0, 1.0]), 0.1))
    assert reject_process(nan, 0.1) == pytest.approx(reject_process(np.array([0.0, 0.0, 0.0]), 0.1))
    assert decide([None] * 5_000, 0.05) == "continue"


@given(scores, st.floats(0.01, 0.99))
def test_decide_once_said_stays_said(given_scores: list[float | None], limit: float) -> None:
    said = [decide(given_scores[:n], limit) for n in range(len(given_scores) + 1)]
    for before, after in pairwise(said):
        assert before in ("continue", after)


@given(scores, st.floats(0.01, 0.99))
def test_processes_mirror_stay_finite_and_ignore_what_comes_later(
    given_scores: list[float | None], limit: float
) -> None:
    values = np.array([np.nan if s is None else s for s in given_scores], dtype=float)
    for process in (accept_process, reject_process):
        whole = process(values, limit)
        assert np.isfinite(whole).all()
        assert process(values[:5], limit) == pytest.approx(whole[:5])
    assert e_value(given_scores, limit) == pytest.approx(
        math.exp(accept_process(values, limit)[-1]) if given_scores else 1.0
    )


def test_e_bh_by_hand() -> None:
    """N/α = 100 against 1 × 90, 2 × 45, 3 × 40, 4 × 26, 5 × 2: the fourth reaches it, though the first two do not."""
    assert e_bh([26.0, 90.0, 2.0, 45.0, 40.0], 0.05) == [0, 1, 3, 4]
    assert e_bh([24.0, 90.0, 2.0, 45.0, 33.0], 0.05) == []
    assert e_bh([100.0, 1.0, 1.0, 1.0, 1.0], 0.05) == [0]
    assert e_bh([20.0] * 5, 0.05) == [0, 1, 2, 3, 4]
    assert e_bh([], 0.05) == []


def test_e_bh_of_a_simulated_catalogue_is_wrong_one_time_in_twenty() -> None:
    """40 candidates, half of them at the limit, 300 prompts each: the mean share of wrong ones among the certified."""
    wrong: list[float] = []
    for night in range(300):
        bad, good = simulated(0.1, 20, 300, seed=night), simulated(0.01, 20, 300, seed=10_000 + night)
        e_values = np.exp(accept_process(np.concatenate([bad, good]), 0.1)[:, -1])
        certified = e_bh(e_values.tolist())
        wrong.append(sum(i < 20 for i in certified) / max(1, len(certified)))
        assert len(certified) >= 10
    assert np.mean(wrong) <= 0.05


@pytest.mark.parametrize("bad", [([0.5], 0.0), ([0.5], 1.0), ([2.0], 0.5), ([-1.0], 0.5)])
def test_processes_out_of_range_raise(bad: tuple[list[float], float]) -> None:
    for process in (accept_process, reject_process):
        with pytest.raises(ValueError, match=r"between 0 and 1"):
            process(np.array(bad[0]), bad[1])


@pytest.mark.parametrize(("values", "error"), [([-1.0], 0.05), ([math.nan], 0.05), ([1.0], 0.0)])
def test_e_bh_out_of_range_raises(values: list[float], error: float) -> None:
    with pytest.raises(ValueError):
        e_bh(values, error)
