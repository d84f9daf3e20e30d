"""Each compiled loop against the expression in torch's operators that it stands for: the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fleet.algebra.kernels import count_differences, count_window, drop, elect, keep_at_least, linear
from fleet.algebra.noise import FACTORS, NoiseKey, counters, limit_of, noise_key, uniform
from fleet.algebra.sparsify import Drop, Trim, at_least, elected, kept, merge_bfloat16, sum_of

TILE = 1024
SIZES = st.sampled_from([1, 2, 7, TILE - 1, TILE, TILE + 1, 2 * TILE, 2500])
SEEDS = st.integers(0, 2**31)
WORDS = st.integers(0, 2**32 - 1)
SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 1e-40, 0.25, -0.25, 1.0, -1.0, 1e30, -1e30)
"""Zeros, numbers whose products are none, ties."""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Some normal, and as many special ones, anywhere."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.5, special, torch.randn(shape, generator=generator))


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().view(torch.int32 if values.element_size() == 4 else torch.int16)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the sign of a zero, which no sum that follows shows."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    expected = expected.detach()
    assert torch.equal(torch.where(found == 0.0, 0, bits(found)), torch.where(expected == 0.0, 0, bits(expected)))


# -- keep_at_least ---------------------------------------------------------------------------------------------------


def test_keep_at_least_by_hand() -> None:
    values = np.array([3.0, -2.0, 1.9999999, -0.0, 2.0], np.float32)
    out = np.empty_like(values)
    keep_at_least(values, np.float32(2.0), out)
    assert out.tolist() == [3.0, -2.0, 0.0, 0.0, 2.0]


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES, st.sampled_from([0.0, 1e-45, 0.1, 0.25, 1.0, float("inf")]))
def test_at_least_gives_what_torch_gives(seed: int, count: int, threshold: float) -> None:
    values = numbers(seed, count)
    threshold = float(torch.tensor(threshold))
    found, expected = at_least(values, threshold), at_least(values.clone().requires_grad_(), threshold)
    assert expected.requires_grad
    assert_same_bits(found, expected)
    assert_same_bits(found, torch.where(values.abs() >= threshold, values, torch.zeros(())))


def test_at_least_leaves_its_argument_alone() -> None:
    values = normal(0, 50)
    before = values.clone()
    at_least(values, 1.0)
    assert torch.equal(values, before)


# -- drop ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(WORDS, WORDS, SIZES, st.integers(0, 2**31), st.sampled_from([0.0, 1e-9, 0.2, 0.5, 0.999]))
def test_kept_gives_what_torch_gives(first: int, second: int, count: int, start: int, rate: float) -> None:
    key, values = NoiseKey(first, second), numbers(count, count)
    found, expected = kept(values, key, start, rate), kept(values.clone().requires_grad_(), key, start, rate)
    assert expected.requires_grad
    assert_same_bits(found, expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, (1 << 23) - 1), st.integers(-1, 1))
def test_drop_rate_at_a_draws_own_value_is_not_rounded(draw: int, side: int) -> None:
    """Rates around (draw + ½)/2²³, the float32 that the noise itself would be."""
    rate = (draw + 0.5 + side / 1024) * 2.0**-23
    limit = limit_of(rate)
    noise = torch.tensor([draw - 1, draw, draw + 1], dtype=torch.float64).add(0.5).mul(2.0**-23)
    assert (noise >= rate).tolist() == [word >= limit for word in (draw - 1, draw, draw + 1)]


def test_draw_between_a_rate_and_its_float32_is_dropped_by_torch_too() -> None:
    """The draw at entry 195 is float32(p) itself, which is below p: 0.95 less two last digits of a float64."""
    key, rate = NoiseKey(563930400, 22958086), 0.9499999999999998
    assert float(uniform(key, 195, 1)) < rate == pytest.approx(float(uniform(key, 195, 1)), abs=1e-7)
    values = torch.ones(1)
    assert (
        kept(values, key, 195, rate).tolist() == kept(values.clone().requires_grad_(), key, 195, rate).tolist() == [0]
    )


def test_drop_where_the_counter_wraps_is_torchs() -> None:
    key, values = NoiseKey(2**32 - 100, 7), normal(0, 300)
    out = torch.empty(300)
    drop(values.numpy(), *counters(key, 0), limit_of(0.4), FACTORS, out.numpy())
    assert_same_bits(out, values * (uniform(key, 0, 300) >= 0.4))
    assert_same_bits(kept(values, key, 0, 0.4), out)


@pytest.mark.parametrize("cut", [1, 1023, 1024, 1025])
def test_kept_from_the_middle_is_the_wholes(cut: int) -> None:
    key, values = noise_key(3, "model", "tensor"), normal(0, 3000)
    whole = kept(values, key, 5, 0.3)
    assert_same_bits(torch.cat([kept(values[:cut], key, 5, 0.3), kept(values[cut:], key, 5 + cut, 0.3)]), whole)
    assert 0.62 < float((whole != 0.0).float().mean()) < 0.78


# -- elect -----------------------------------------------------------------------------------------------------------


def test_elect_by_hand() -> None:
    values = np.array([[4.0, -1.0, 2.0, 0.0], [-1.0, -2.0, -2.0, 0.0]], np.float32)
    for mean, expected in ((False, [2.0, -1.5, 0.0, 0.0]), (True, [4.0, -1.5, 0.0, 0.0])):
        out = np.empty(4, np.float32)
        elect(values, np.array([0.5, 0.5], np.float32), mean, out)
        assert out.tolist() == expected


@settings(deadline=None, max_examples=120)
@given(
    SEEDS, st.integers(1, 6), SIZES, st.lists(st.sampled_from([0.0, 1.0, 0.5, -0.7, 0.1, 1e-30]), min_size=6),
    st.sampled_from(["sum", "mean"]), st.booleans(),
)  # fmt: skip
def test_elected_gives_what_torch_gives(
    seed: int, models: int, count: int, weights: Sequence[float], combine: Literal["sum", "mean"], opposed: bool
) -> None:
    values_M = [numbers(seed + m, count) for m in range(models)]
    if opposed and models > 1:
        values_M[1] = -values_M[0]
    expected = elected([v.clone().requires_grad_() for v in values_M], weights[:models], combine)
    assert expected.requires_grad
    assert_same_bits(elected(values_M, weights[:models], combine), expected)


def test_elected_of_products_that_underflow_is_zero() -> None:
    values_M = [torch.full((TILE + 1,), 1e-30), torch.full((TILE + 1,), -1e-30)]
    for combine in ("sum", "mean"):
        assert torch.equal(elected(values_M, [1e-30, 0.0], combine), torch.zeros(TILE + 1))


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 5), st.sampled_from(["sum", "mean"]))
def test_elected_equals_the_algorithm_in_double(seed: int, models: int, combine: Literal["sum", "mean"]) -> None:
    values_M, weights = [normal(seed + m, 1100) for m in range(models)], normal(seed, models).tolist()
    found = elected(values_M, weights, combine)
    weighted = torch.stack([v.double() * w for v, w in zip(values_M, weights, strict=True)])
    total = weighted.sum(dim=0)
    agrees = weighted * total.sign() > 0.0
    expected = (weighted * agrees).sum(dim=0)
    if combine == "mean":
        expected = expected / (agrees * torch.tensor(weights, dtype=torch.float64).abs()[:, None]).sum(dim=0)
    clear = total.abs() > 1e-5
    torch.testing.assert_close(found[clear].double(), expected[clear], rtol=1e-4, atol=1e-6)


# -- shapes and layouts ----------------------------------------------------------------------------------------------


def layouts(seed: int) -> list[torch.Tensor]:
    """Tensors of several shapes, some not in one piece."""
    return [normal(seed, 3, 4), normal(seed, 2, 3, 4), normal(seed, 5), torch.zeros(0, 4)]


@pytest.mark.parametrize("layout", ["as it is", "transposed", "every other", "expanded"])
def test_loops_over_values_not_in_one_piece_give_what_torch_gives(layout: str) -> None:
    """A Conv1D's task vector in canonical orientation is a transposed one."""
    views = {
        "as it is": lambda t: t,
        "transposed": lambda t: t.mT,
        "every other": lambda t: t[:, ::2],
        "expanded": lambda t: t[:, :1].expand(6, 8),
    }
    one, two = (views[layout](normal(seed, 6, 8)) for seed in (0, 1))
    assert_same_bits(at_least(one, 0.5), torch.where(one.abs() >= 0.5, one, 0.0))
    for combine in ("sum", "mean"):
        expected = elected([one.clone().requires_grad_(), two], [0.5, 0.7], combine)
        assert_same_bits(elected([one, two], [0.5, 0.7], combine), expected)


def test_loops_keep_shapes() -> None:
    for value in layouts(0):
        assert_same_bits(at_least(value, 0.5), torch.where(value.abs() >= 0.5, value, 0.0))
        assert elected([value, value], [0.5, 0.5], "sum").shape == value.shape


# -- count_window ----------------------------------------------------------------------------------------------------


def counted(values: torch.Tensor, low: int, high: int, shift: int) -> torch.Tensor:
    """The histogram entry by entry."""
    patterns = [int(p) & 0x7FFFFFFF for p in values.view(torch.int32).tolist()]
    counts = torch.zeros(((high - low - 1) >> shift) + 2, dtype=torch.int64)
    for pattern in patterns:
        if pattern >= high:
            counts[-1] += 1
        elif pattern >= low:
            counts[(pattern - low) >> shift] += 1
    return counts


def test_count_window_by_hand() -> None:
    values = torch.tensor([1, 2, 3, 3, 4, 7, 9, 2**31 - 1], dtype=torch.int32)
    counts = torch.zeros(4, dtype=torch.int64)
    count_window(values.numpy(), 2, 7, 1, counts.numpy())  # bins {2, 3}, {4, 5}, {6}, and above
    assert counts.tolist() == [3, 1, 0, 3]


@settings(deadline=None, max_examples=80)
@given(SEEDS, SIZES, st.data())
def test_count_window_gives_what_counting_gives(seed: int, count: int, data: st.DataObject) -> None:
    values = numbers(seed, count)
    patterns = (values.view(torch.int32) & 0x7FFFFFFF).tolist()
    near = st.sampled_from(patterns).flatmap(lambda p: st.integers(max(p - 3, 0), min(p + 3, 2**31 - 1)))
    low, high = sorted((data.draw(near), data.draw(near | st.just(2**31))))
    high = max(high, low + 1)
    shift = max((high - low).bit_length() - data.draw(st.integers(1, 12)), 0)
    expected = counted(values, low, high, shift)
    counts = torch.zeros_like(expected)
    count_window(values.view(torch.int32).numpy(), low, high, shift, counts.numpy())
    assert torch.equal(counts, expected)
    half = count // 2
    for part in (values[:half], values[half:]):  # and again on top, in two runs
        count_window(part.view(torch.int32).numpy(), low, high, shift, counts.numpy())
    assert torch.equal(counts, 2 * expected)


@pytest.mark.parametrize("count", [1, TILE - 1, TILE, TILE + 1])
def test_count_window_of_one_pattern_counts_it(count: int) -> None:
    values = torch.full((count,), -0.25)
    pattern = int(torch.tensor(0.25).view(torch.int32))
    for low, expected in ((pattern - 1, [0, count]), (pattern, [count, 0]), (pattern + 1, [0, 0])):
        counts = torch.zeros(2, dtype=torch.int64)
        count_window(values.view(torch.int32).numpy(), low, low + 1, 0, counts.numpy())
        assert counts.tolist() == expected


# -- linear ----------------------------------------------------------------------------------------------------------


def fused(raw: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    out = torch.empty(raw.shape[1], dtype=torch.bfloat16)
    linear(
        raw.contiguous().view(torch.uint16).numpy(), np.array(coefficients, np.float32), out.view(torch.uint16).numpy()
    )
    return out


def in_torch(raw: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """One operator after the other, float32."""
    base = raw[0].float()
    terms = [(x.float() - base) * c for x, c in zip(raw[1:], coefficients, strict=True)]
    return (sum_of(terms) + base).bfloat16()


def test_linear_by_hand() -> None:
    raw = torch.tensor([[1.0, 2.0, -4.0], [2.0, 2.0, 0.0], [3.0, 4.0, 4.0]], dtype=torch.bfloat16)
    assert fused(raw, [0.5, 0.25]).tolist() == [2.0, 2.5, 0.0]


def test_linear_rounds_halves_to_even_and_ends_at_infinity() -> None:
    one, next_one = 1.0, 1.0078125
    raw = torch.tensor([[one, next_one, 3.3895313892515355e38], [next_one, 1.015625, -3.3895313892515355e38]])
    found = fused(raw.bfloat16(), [0.5])
    assert found.tolist()[:2] == [1.0, 1.015625]
    assert_same_bits(found, in_torch(raw.bfloat16(), [0.5]))
    assert fused(raw.bfloat16(), [-0.5])[2] == float("inf")


@settings(deadline=None, max_examples=120)
@given(
    SEEDS, st.integers(1, 5), SIZES, st.lists(st.floats(-2.0, 2.0, width=32), min_size=5, max_size=5),
    st.sampled_from(["any", "near", "weights"]),
)  # fmt: skip
def test_linear_gives_what_torch_gives(
    seed: int, models: int, count: int, coefficients: list[float], kind: str
) -> None:
    """Of any finite bit patterns; of those whose exponents are near; of a base and models close to it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (models + 1, count)
    patterns = torch.randint(0, 1 << 16, shape, generator=generator)
    if kind == "near":
        patterns = (patterns & 0x83FF) | 0x3C00
    raw = patterns.to(torch.int32).to(torch.int16).view(torch.bfloat16)
    if kind == "weights":
        base = torch.randn(count, generator=generator)
        raw = (base + torch.randn(shape, generator=generator) * 0.01).bfloat16()
    raw = torch.where(raw.isfinite(), raw, torch.zeros((), dtype=torch.bfloat16))
    found, expected = fused(raw, coefficients[:models]), in_torch(raw, coefficients[:models])
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert_same_bits(found[numbers], expected[numbers])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 0xFFFF), min_size=3, max_size=3), st.floats(-2.0, 2.0), st.floats(-2.0, 2.0))
def test_linear_of_drawn_bit_patterns_gives_what_torch_gives(words: list[int], one: float, two: float) -> None:
    raw = torch.tensor(words, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(3, 1)
    if not bool(raw.isfinite().all()):
        return
    found, expected = fused(raw, [one, two]), in_torch(raw, [one, two])
    assert bool(found.isnan()) == bool(expected.isnan())
    if not bool(expected.isnan()):
        assert_same_bits(found, expected)


def test_linear_of_the_base_itself_is_the_base() -> None:
    patterns = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    base = patterns[patterns.isfinite()]
    assert_same_bits(fused(torch.stack([base, base, base]), [0.3, -0.7]), base)


# -- count_differences -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(SEEDS, SIZES, st.integers(-4, 4), st.integers(1, 1 << 22), st.integers(0, 12))
def test_count_differences_gives_what_counting_subtracted_numbers_gives(
    seed: int, count: int, low: int, width: int, shift: int
) -> None:
    """In windows that begin beside the magnitude of one of them."""
    base, value = near(seed, 1, count)
    differences = value.float() - base.float()
    low = max(int(differences[count // 2].abs().view(torch.int32)) + low, 0)
    expected = counted(differences, low, low + width, shift)
    counts = torch.zeros_like(expected)
    value_bits, base_bits = (row.contiguous().view(torch.uint16).numpy() for row in (value, base))
    for _ in range(2):  # and again on top
        count_differences(value_bits, base_bits, low, low + width, shift, counts.numpy())
    assert torch.equal(counts, 2 * expected)


# -- merge -----------------------------------------------------------------------------------------------------------


def near(seed: int, models: int, count: int) -> torch.Tensor:
    """A base and models near it, (1 + models, count) bfloat16; some of their entries are the base's, or zeros."""
    base = numbers(seed, count).clamp(-4.0, 4.0)
    moved = normal(seed + 1, models, count) * 0.02
    values = torch.where(normal(seed + 2, models, count) > 1.0, base, base + moved)
    values = torch.where(normal(seed + 3, models, count) > 1.5, -0.0, values)
    return torch.cat([base[None], values]).bfloat16()


def merged(
    raw: torch.Tensor,
    cuts: Sequence[Trim | Drop],
    weights: Sequence[float],
    consensus: Literal["sum", "mean", "none"],
    scale: float,
    start: int = 0,
) -> torch.Tensor:
    rows = torch.cat([raw, raw[:1]])
    merge_bfloat16(rows, cuts, weights, consensus, scale, start)
    assert_same_bits(rows[:-1], raw)
    return rows[-1]


def test_merge_by_hand() -> None:
    raw = torch.tensor([[1.0, 2.0, -4.0, 0.5], [5.0, 1.0, -2.0, 0.75], [0.0, 0.0, -6.0, 0.5]], dtype=torch.bfloat16)
    cuts = [Trim(1.0), Trim(2.0)]  # of 4, -1, 2, 0.25 and -1, -2, -2, 0
    assert merged(raw, cuts, [0.5, 1.0], "none", 0.5).tolist() == [2.0, 0.75, -4.5, 0.5]
    assert merged(raw, cuts, [0.5, 1.0], "sum", 0.5).tolist() == [2.0, 0.75, -5.0, 0.5]
    assert merged(raw, cuts, [0.5, 1.0], "mean", 0.5).tolist() == [3.0, 1.1640625, -5.0, 0.5]  # 2 - 0.5 · 2.5/1.5
    assert merged(raw, [Drop(NoiseKey(1, 2), 0.0)] * 2, [0.5, 1.0], "none", 2.0).tolist() == [3.0, -3.0, -6.0, 0.75]


CUTS = st.builds(Trim, st.sampled_from([0.0, 0.001, 0.01, 0.0234375, 0.05, 1.0, float("inf")])) | st.builds(
    Drop, st.builds(NoiseKey, WORDS, WORDS), st.sampled_from([0.0, 1e-9, 0.2, 0.5, 0.8, 0.999])
)


@settings(deadline=None, max_examples=200)
@given(
    SEEDS, SIZES, st.lists(st.tuples(CUTS, st.sampled_from([0.0, 1.0, 0.5, -0.7, 0.1, 1e-30])), min_size=1, max_size=9),
    st.sampled_from(["sum", "mean", "none"]), st.sampled_from([1.0, 0.3, 0.4, 2.5]), st.integers(0, 2**31),
)  # fmt: skip
def test_merge_gives_what_torch_gives(
    seed: int,
    count: int,
    models: list[tuple[Trim | Drop, float]],
    consensus: Literal["sum", "mean", "none"],
    scale: float,
    start: int,
) -> None:
    """One operator after the other, none of them compiled here, since gradients are wanted."""
    raw = near(seed, len(models), count)
    cuts, weights = [cut for cut, _ in models], [weight for _, weight in models]
    base = raw[0].float()
    values_M = [cut.of((x.float() - base).requires_grad_(), start) for cut, x in zip(cuts, raw[1:], strict=True)]
    weighted_M = [v * w for v, w in zip(values_M, weights, strict=True)]
    fused = sum_of(weighted_M) if consensus == "none" else elected(values_M, weights, consensus)
    assert fused.requires_grad
    assert_same_bits(merged(raw, cuts, weights, consensus, scale, start), (fused * scale + base).bfloat16())


@pytest.mark.parametrize("cut", [1, TILE - 1, TILE, TILE + 1])
def test_merge_from_the_middle_is_the_wholes(cut: int) -> None:
    raw, cuts = near(0, 2, 3000), [Trim(0.01), Drop(noise_key(3, "model", "tensor"), 0.4)]
    whole = merged(raw, cuts, [1.0, 0.5], "sum", 0.4, 5)
    parts = [merged(raw[:, a:b], cuts, [1.0, 0.5], "sum", 0.4, 5 + a) for a, b in ((0, cut), (cut, 3000))]
    assert_same_bits(torch.cat(parts), whole)
