from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.random_edits import named_generator
from fleet.algebra.sparsify import dropped, ties, trimmed

SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, d_out: int, d_in: int, rank: int = 2) -> LowRank:
    return LowRank(normal(seed, d_out, rank), normal(seed + 1, rank, d_in))


# -- DARE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 0.9])
def test_dropped_entries_are_zero_or_rescaled_in_product_space(drop_rate: float) -> None:
    delta = lora(0, 60, 50)
    found = dropped(delta, drop_rate, named_generator(0, "q_proj")).value
    kept = found != 0.0
    torch.testing.assert_close(found[kept], delta.dense()[kept] / (1.0 - drop_rate))
    # 3000 entries: four standard errors of a share are at most 0.037.
    assert float(kept.float().mean()) == pytest.approx(1.0 - drop_rate, abs=0.037)


def test_dropped_mean_over_seeds_is_the_task_vector() -> None:
    delta, p, seeds = lora(0, 8, 6), 0.4, 2000
    draws = torch.stack([dropped(delta, p, named_generator(s, "m")).value for s in range(seeds)])
    w = delta.dense()
    standard_error = w.abs() * (p / (1 - p) / seeds) ** 0.5
    assert bool(((draws.mean(dim=0) - w).abs() < 5 * standard_error).all())
    torch.testing.assert_close(draws.var(dim=0), w.square() * p / (1 - p), rtol=0.2, atol=0.0)


def test_dropped_same_module_and_seed_same_mask() -> None:
    delta = Dense(torch.ones(16, 16))

    def mask(seed: int, name: str) -> torch.Tensor:
        return dropped(delta, 0.5, named_generator(seed, name)).value

    assert torch.equal(mask(0, "q_proj"), mask(0, "q_proj"))
    assert not torch.equal(mask(0, "q_proj"), mask(0, "k_proj"))
    assert not torch.equal(mask(0, "q_proj"), mask(1, "q_proj"))


# -- TIES ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 1.0), SEEDS)
def test_trimmed_keeps_exactly_the_largest_entries(rows: int, columns: int, density: float, seed: int) -> None:
    # All magnitudes differ, so the count is exact.
    magnitudes = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed)) + 1.0
    value = (magnitudes * torch.sign(normal(seed, rows * columns))).view(rows, columns)
    found = trimmed(Dense(value), density).value
    count = max(round(density * value.numel()), 1)
    expected = set(value.abs().flatten().sort(descending=True).values[:count].tolist())
    kept = found != 0.0
    assert set(found[kept].abs().tolist()) == expected
    assert torch.equal(found[kept], value[kept])


def test_trimmed_ties_at_the_threshold_all_stay() -> None:
    value = torch.tensor([[3.0, -2.0, 1.0], [2.0, 0.5, -2.0]])
    expected = torch.tensor([[3.0, -2.0, 0.0], [2.0, 0.0, -2.0]])
    assert torch.equal(trimmed(Dense(value), 0.34).value, expected)  # two of six, the second of which comes thrice


def test_ties_by_hand() -> None:
    one = torch.tensor([[4.0, -1.0, 3.0], [0.5, -3.0, 2.0]])
    two = torch.tensor([[2.0, 5.0, -4.0], [0.1, 0.2, 6.0]])
    # Trimmed to four of six: one loses 0.5 and -1, two loses 0.1 and 0.2.
    # Weighted sums with 0.75 and 0.25: 3.5, 1.25, 1.25, 0, -2.25, 3.
    expected = torch.tensor([[(3.0 + 0.5) / 1.0, 5.0, 3.0], [0.0, -3.0, (1.5 + 1.5) / 1.0]])
    torch.testing.assert_close(ties((Dense(one), Dense(two)), (0.75, 0.25), 0.66).value, expected)


def test_ties_opposite_entries_of_equal_weight_have_no_sign() -> None:
    found = ties((Dense(torch.tensor([[1.0, 2.0]])), Dense(torch.tensor([[-1.0, 2.0]]))), (0.5, 0.5), 1.0)
    assert torch.equal(found.value, torch.tensor([[0.0, 2.0]]))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 1.0), SEEDS)
def test_ties_of_one_task_vector_is_its_trim(rows: int, columns: int, density: float, seed: int) -> None:
    delta: Delta = lora(seed, rows, columns)
    torch.testing.assert_close(ties((delta,), (0.8,), density).value, trimmed(delta, density).value)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 0.95), SEEDS)
def test_ties_equals_the_algorithm_entry_by_entry(rows: int, columns: int, weight: float, seed: int) -> None:
    pair, weights = (lora(seed, rows, columns), Dense(normal(seed + 2, rows, columns))), (weight, 1.0 - weight)
    found = ties(pair, weights, 0.7).value
    values = [trimmed(d, 0.7).value for d in pair]
    for i in range(rows):
        for j in range(columns):
            entries = [(w, float(v[i, j])) for w, v in zip(weights, values, strict=True)]
            total = sum(w * x for w, x in entries)
            agreeing = [(w, x) for w, x in entries if x * total > 0.0]
            expected = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
