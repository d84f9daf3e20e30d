from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.random_edits import named_generator
from fleet.algebra.sparsify import Piece, dropped, magnitude_threshold, ties, trimmed
from tests.pieces import in_pieces

SEEDS = st.integers(0, 2**31)
MAGNITUDES = st.floats(0.0, width=32, allow_infinity=True) | st.sampled_from([0.0, 1e-45, 1e-40, 1.0, 1.0000001, 3e38])


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


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.05, 0.95), SEEDS)
def test_ties_sum_equals_the_algorithm_entry_by_entry(rows: int, columns: int, weight: float, seed: int) -> None:
    pair, weights = (lora(seed, rows, columns), Dense(normal(seed + 2, rows, columns))), (weight, 1.0 - weight)
    found = ties(pair, weights, 0.7, "sum").value
    values = [trimmed(d, 0.7).value for d in pair]
    for i in range(rows):
        for j in range(columns):
            entries = [(w, float(v[i, j])) for w, v in zip(weights, values, strict=True)]
            total = sum(w * x for w, x in entries)
            expected = sum(w * x for w, x in entries if x * total > 0.0)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_ties_sum_by_hand() -> None:
    one = torch.tensor([[4.0, -1.0, 3.0], [0.5, -3.0, 2.0]])
    two = torch.tensor([[2.0, 5.0, -4.0], [0.1, 0.2, 6.0]])
    # As above, and nothing is divided by the weights that agree.
    expected = torch.tensor([[3.0 + 0.5, 1.25, 2.25], [0.0, -2.25, 1.5 + 1.5]])
    torch.testing.assert_close(ties((Dense(one), Dense(two)), (0.75, 0.25), 0.66, "sum").value, expected)


# -- the threshold ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.lists(MAGNITUDES, min_size=1, max_size=40), st.data())
def test_magnitude_threshold_is_the_largest_but_so_many(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    magnitude = torch.tensor(values, dtype=torch.float32)
    expected = float(magnitude.sort(descending=True).values[count - 1])
    assert magnitude_threshold(magnitude, count) == expected
    assert magnitude_threshold(magnitude.flip(0).reshape(1, -1), count) == expected


def test_magnitude_threshold_tells_neighbours_apart() -> None:
    """Numbers whose upper 16 bits are the same, and numbers that differ in them by one."""
    one = torch.tensor(1.0)
    values = [one]
    for _ in range(70_000):
        values.append(torch.nextafter(values[-1], torch.tensor(2.0)))
    magnitude = torch.stack(values)
    for count in (1, 2, 4463, 4465, 35_000, 70_001):
        assert magnitude_threshold(magnitude, count) == float(magnitude[-count])


@settings(deadline=None, max_examples=60)
@given(st.lists(MAGNITUDES, min_size=3, max_size=40), st.data())
def test_magnitude_threshold_over_pieces_is_the_wholes(values: list[float], data: st.DataObject) -> None:
    """A piece may be empty, as the last worker's rows of a short tensor are."""
    count, first, second = (data.draw(st.integers(low, len(values))) for low in (1, 0, 0))
    first, second = sorted((first, second))
    magnitude = torch.tensor(values, dtype=torch.float32)
    sizes = (first, second - first, len(values) - second)
    found = in_pieces(sizes, lambda part, piece: magnitude_threshold(magnitude[part], count, piece))
    assert found == [magnitude_threshold(magnitude, count)] * 3


def rows_of(delta: Delta, rows: slice) -> Delta:
    return LowRank(delta.b[rows], delta.a) if isinstance(delta, LowRank) else Dense(delta.value[rows])


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_ties_and_trim_of_pieces_are_the_wholes_rows(density: float) -> None:
    deltas: tuple[Delta, ...] = (lora(0, 9, 7), Dense(normal(5, 9, 7)))
    whole, trim = ties(deltas, (0.7, 0.3), density, "sum").value, trimmed(deltas[0], density).value

    def work(rows: slice, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        own = [rows_of(d, rows) for d in deltas]
        return ties(own, (0.7, 0.3), density, "sum", piece).value, trimmed(own[0], density, piece).value

    found = in_pieces((4, 5, 0), work)
    torch.testing.assert_close(torch.cat([f for f, _ in found]), whole)
    torch.testing.assert_close(torch.cat([t for _, t in found]), trim)


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_ties_gradient_reaches_every_model_where_its_entry_counts(combine: str) -> None:
    """Away from thresholds TIES is linear, so a difference of one small step is the derivative."""
    weights = (0.5, 0.3, 0.2)
    values = [normal(s, 5, 6).double().requires_grad_() for s in range(3)]
    up = normal(9, 5, 6).double()

    def loss(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return (ties([Dense(t) for t in tensors], weights, 0.6, combine).value * up).sum()  # type: ignore[arg-type]

    found = torch.autograd.grad(loss(values), values)
    for model, gradient in enumerate(found):
        assert bool(gradient.any())
        for index in range(30):
            nudge = torch.zeros(30, dtype=torch.float64)
            nudge[index] = 1e-5
            moved = [v.detach() + (nudge.view(5, 6) if i == model else 0.0) for i, v in enumerate(values)]
            slope = float(loss(moved) - loss([v.detach() for v in values])) / 1e-5
            assert float(gradient.flatten()[index]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_ties_sum_gradient_by_hand() -> None:
    one = torch.tensor([2.0, -1.0, 3.0, 0.1], requires_grad=True)
    two = torch.tensor([1.0, 4.0, 0.1, 5.0], requires_grad=True)
    ties((Dense(one), Dense(two)), (0.5, 0.25), 0.75, "sum").value.sum().backward()
    # Trimmed to three of four; the second entries disagree, and the second model's 4 · ¼ wins.
    assert one.grad is not None and two.grad is not None
    assert torch.equal(one.grad, torch.tensor([0.5, 0.0, 0.5, 0.0]))
    assert torch.equal(two.grad, torch.tensor([0.25, 0.25, 0.0, 0.25]))
