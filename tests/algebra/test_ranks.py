from __future__ import annotations

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fleet.algebra.ranks import RankSearch

MAX_PASSES = 5
SEEDS = st.integers(0, 2**31)
MAGNITUDES = (
    st.floats(-(2.0**126), 2.0**126, width=32)
    | st.integers(-20, 20).map(lambda n: n / 4)
    | st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1e-30, 1.0, 1.0000001, -1e30, 3e38])
)


def normal(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def sorted_out(values: torch.Tensor, rank: int) -> float:
    """The same by sorting."""
    return float(values.abs().sort(descending=True).values[rank - 1])


def searched(runs: Sequence[torch.Tensor], rank: int, sample: torch.Tensor | None = None) -> tuple[float, int]:
    """What a search over these runs finds, and its passes."""
    search = RankSearch(rank, sum(run.numel() for run in runs), sample)
    for passes in range(1, MAX_PASSES + 1):
        assert math.isnan(search.value)
        for run in runs:
            search.window.add(run)
        if search.finish_pass():
            return search.value, passes
    raise AssertionError(f"no value after {MAX_PASSES} passes")


# -- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "expected"), [(1, 4.0), (2, 3.0), (3, 2.0), (4, 0.5), (5, 0.0)])
def test_rank_of_five_numbers_by_hand(rank: int, expected: float) -> None:
    values = torch.tensor([3.0, -4.0, 0.5, -0.0, 2.0])
    assert searched([values], rank)[0] == expected
    assert searched([values], rank, values)[0] == expected
    assert searched([values[:2], values[2:2], values[2:]], rank, values[:1])[0] == expected


def test_rank_of_many_equal_numbers_is_theirs_in_one_pass_with_a_sample() -> None:
    values = torch.full((5000,), -0.25)
    assert searched([values], 2500, values[:100]) == (0.25, 1)
    for rank in (1, 2500, 5000):
        assert searched([values], rank, values[:100])[0] == searched([values], rank)[0] == 0.25


def test_rank_of_zeros_is_zero() -> None:
    for values in (torch.zeros(3000), -torch.zeros(3000)):
        found, _ = searched([values], 1)
        assert (found, math.copysign(1.0, found)) == (0.0, 1.0)
        assert searched([values], 3000, values) == (0.0, 1)


def test_rank_of_one_number_is_its_magnitude() -> None:
    for value in (0.0, -1e-45, 1.5, -3.4028234663852886e38):
        values = torch.tensor([value])
        assert searched([values], 1)[0] == searched([values], 1, values)[0] == float(values.abs())


def test_rank_tells_neighbouring_numbers_apart() -> None:
    patterns = torch.arange(70_001, dtype=torch.int32) + 0x3F7F_FF00
    values = patterns.view(torch.float32)
    for rank in (1, 2, 255, 256, 257, 35_000, 70_001):
        assert searched([values], rank)[0] == float(values[-rank])
        assert searched([values], rank, values[::7])[0] == float(values[-rank])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9, 1.0])
def test_rank_over_a_huge_range_is_exact(share: float) -> None:
    exponents = torch.linspace(-30.0, 30.0, 20_001, dtype=torch.float64)
    values = (10.0**exponents).float() * torch.sign(normal(0, 20_001))
    rank = max(round(share * 20_001), 1)
    for sample in (None, values[::5], values[:100], values[-100:]):
        assert searched([*values.split(777)], rank, sample)[0] == sorted_out(values, rank)


# -- any numbers, any cuts, any sample -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.lists(MAGNITUDES, min_size=1, max_size=60), st.sampled_from(["none", "all", "few", "other", "empty"]), st.data()
)
def test_rank_is_exact_whatever_the_runs_and_the_sample(numbers: list[float], kind: str, data: st.DataObject) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    rank = data.draw(st.integers(1, len(numbers)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(numbers)), max_size=4)))
    runs = [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(numbers)], strict=True)]
    others = data.draw(st.lists(MAGNITUDES, min_size=1, max_size=5)) if kind == "other" else []
    samples = {
        "none": None,
        "all": values,
        "few": values[:: data.draw(st.integers(1, 5))],
        "other": torch.tensor(others, dtype=torch.float32),
        "empty": values[:0],
    }
    assert searched(runs, rank, samples[kind])[0] == sorted_out(values, rank)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 5000), st.floats(0.0, 1.0), st.sampled_from([1e-20, 0.5, 1.0, 2.0, 1e20]), st.booleans())
def test_rank_with_a_misleading_sample_is_exact(
    seed: int, count: int, share: float, factor: float, quantised: bool
) -> None:
    """Too high, too low, or only in its spread: it costs passes, no more."""
    values = normal(seed, count)
    values = (values * 4.0).round() / 4.0 if quantised else values
    rank = min(max(round(share * count), 1), count)
    sample = normal(seed + 1, 500) * factor
    found, passes = searched([*values.split(1024)], rank, sample)
    assert found == sorted_out(values, rank)
    assert passes <= 3
    assert searched([values], rank, torch.full((500,), factor))[0] == found


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 5000), st.integers(1, 5000))
def test_rank_ignores_signs_and_order(seed: int, count: int, rank: int) -> None:
    values, rank = normal(seed, count), min(rank, count)
    expected = searched([values], rank)[0]
    for other in (-values, values.abs(), values.flip(0), values[torch.randperm(count)]):
        assert searched([other], rank)[0] == searched([other], rank, other[::3])[0] == expected


def test_rank_of_values_that_are_not_in_one_piece_is_exact() -> None:
    """Rows, and columns that lie apart in memory."""
    values = normal(3, 6000).view(60, 100)
    for part in (values, values.T, values[:, ::3], values[::2]):
        assert searched([part], 17)[0] == sorted_out(part.flatten(), 17)
        assert searched([part], 17, part[:, 0])[0] == sorted_out(part.flatten(), 17)


# -- passes ----------------------------------------------------------------------------------------------------------


def test_rank_without_a_sample_takes_two_passes() -> None:
    """One finds the bin, the other the value in it."""
    assert searched([normal(0, 10_000)], 2000)[1] == 2


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_rank_with_a_fair_sample_of_continuous_numbers_takes_one_pass(share: float) -> None:
    values = normal(0, 1 << 20)
    rank = round(share * values.numel())
    found, passes = searched([*values.split(1 << 16)], rank, values[::4])
    assert (found, passes) == (sorted_out(values, rank), 1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_rank_with_a_fair_sample_takes_at_most_two_passes(seed: int, share: float) -> None:
    values = normal(seed, 200_000)
    rank = max(round(share * values.numel()), 1)
    found, passes = searched([*values.split(1 << 16)], rank, values[::13])
    assert found == sorted_out(values, rank)
    assert passes <= 2


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_rank_with_a_fair_sample_of_quantised_numbers_takes_one_pass(share: float) -> None:
    """Differences of weights in bfloat16 are multiples of a last place: a window may be one value."""
    values = normal(1, 100_000).round().clamp(-1.0, 1.0) / 4.0 + 0.5
    rank = round(share * values.numel())
    found, passes = searched([values], rank, values[::3])
    assert found == sorted_out(values, rank) in (0.25, 0.5, 0.75)
    assert passes == 1


# -- over workers ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.lists(st.integers(0, 2000), min_size=1, max_size=4), st.floats(0.0, 1.0), st.sampled_from([0, 1, 300]))
def test_rank_of_several_workers_counts_added_up_is_the_wholes(
    seed: int, sizes: list[int], share: float, sampled: int
) -> None:
    """Each has a search of its own with the same window, and all go on from the sum of their counts."""
    sizes = [*sizes, 1]
    values = normal(seed, sum(sizes))
    rank = min(max(round(share * values.numel()), 1), values.numel())
    sample = normal(seed + 1, sampled) if sampled else None
    searches = [RankSearch(rank, values.numel(), sample) for _ in sizes]
    for _ in range(MAX_PASSES):
        for search, part in zip(searches, values.split(sizes), strict=True):
            search.window.add(part)
        total = torch.stack([search.window.counts for search in searches]).sum(dim=0)
        for search in searches:
            search.window.counts.copy_(total)
        done = {search.finish_pass() for search in searches}
        assert len(done) == 1
        if done == {True}:
            break
    assert {search.value for search in searches} == {sorted_out(values, rank)}
    assert searched([values], rank, sample)[0] == searches[0].value
