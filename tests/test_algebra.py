from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fleet.algebra.delta import Dense, LowRank
from fleet.algebra.statistics import delta_statistics

SIZES = st.integers(1, 24)
SEEDS = st.integers(0, 2**31)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(1, 6), st.floats(1e-3, 1e3), SEEDS)
def test_statistics_low_rank_equal_dense_definitions(d_out: int, d_in: int, rank: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    v, b, a = normal(g, d_out, d_in), normal(g, d_out, rank) * scale, normal(g, rank, d_in)
    w = b @ a
    c = v @ v.T / v.norm()
    found = delta_statistics(v, LowRank(b, a))
    assert found.rho == pytest.approx(float(((c @ w) * w).sum() / ((c @ w).norm() * w.norm())), rel=1e-10)
    assert found.gain == pytest.approx(float((c @ w).norm() / w.norm()), rel=1e-10)
    assert found.lift == pytest.approx(
        float(d_out * (v.T @ w).norm() ** 2 / (v.norm() ** 2 * w.norm() ** 2)), rel=1e-10
    )
    assert found.cosine == pytest.approx(float((v * w).sum() / (v.norm() * w.norm())), rel=1e-8, abs=1e-12)
    assert found.delta_norm == pytest.approx(float(w.norm()), rel=1e-10)
    assert found[2:] == pytest.approx(delta_statistics(v, Dense(w))[2:], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("direction", [0, 5])
def test_statistics_rho_of_any_single_direction_is_one_and_lift_tells_them_apart(direction: int) -> None:
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    delta = torch.zeros(6, 6, dtype=torch.float64)
    delta[direction, 3] = 1.0
    found = delta_statistics(torch.diag(sigma), Dense(delta))
    assert found.rho == pytest.approx(1.0)
    assert found.lift == pytest.approx(float(6 * sigma[direction] ** 2 / (sigma**2).sum()))


def test_statistics_vanishing_matrix_undefined() -> None:
    v, zero = torch.ones(3, 2), torch.zeros(3, 2)
    for direction, delta in ((v, zero), (zero, v)):
        found = delta_statistics(direction, Dense(delta))
        assert (found.rho, found.lift, found.gain, found.cosine) == (None, None, None, None)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(-2, 2), SEEDS)
def test_delta_sums_low_rank_and_dense_agree(rank_1: int, rank_2: int, factor: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    one = LowRank(normal(g, 5, rank_1), normal(g, rank_1, 7))
    two = LowRank(normal(g, 5, rank_2), normal(g, rank_2, 7))
    total = one.plus(two.scaled(factor))
    expected = one.dense() + factor * two.dense()
    assert isinstance(total, LowRank)
    assert total.rank == rank_1 + rank_2
    torch.testing.assert_close(total.dense(), expected)
    torch.testing.assert_close(one.plus(Dense(two.dense()).scaled(factor)).dense(), expected)
    torch.testing.assert_close(Dense(one.dense()).plus(two.scaled(factor)).dense(), expected)
