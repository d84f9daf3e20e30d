from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fleet.algebra import spectral
from fleet.algebra.delta import Dense, LowRank, zero
from fleet.algebra.products import product
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import Triplets, leading_directions, low_rank_triplets, squared_singular_values, truncated

SIZES = st.integers(1, 20)
RANKS = st.integers(1, 8)
SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(seed: int, d_out: int, d_in: int, rank: int, scale: float = 1.0) -> LowRank:
    g = seeded(seed)
    b = torch.randn(d_out, rank, generator=g, dtype=torch.float64) * scale
    return LowRank(b, torch.randn(rank, d_in, generator=g, dtype=torch.float64))


def decaying(seed: int, d_out: int, d_in: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A matrix with σ_i = 1/i and random singular vectors."""
    g = seeded(seed)
    side = min(d_out, d_in)
    left, right = (torch.linalg.qr(torch.randn(n, side, generator=g, dtype=dtype)).Q for n in (d_out, d_in))
    return left / torch.arange(1, side + 1, dtype=dtype) @ right.T


def best_of_rank(w: torch.Tensor, k: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :k] * s[:k] @ vh[:k]


def assert_orthonormal(columns: torch.Tensor, atol: float = 1e-10) -> None:
    eye = torch.eye(columns.shape[1], dtype=columns.dtype)
    torch.testing.assert_close(columns.T @ columns, eye, rtol=0.0, atol=atol)


# -- recompression ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(SIZES, SIZES, RANKS, st.integers(0, 8), st.floats(1e-3, 1e3), SEEDS)
def test_truncated_lora_loses_its_tail_and_is_the_nearest(
    d_out: int, d_in: int, rank: int, k: int, scale: float, seed: int
) -> None:
    delta = low_rank(seed, d_out, d_in, rank, scale)
    w = delta.dense()
    kept, lost = truncated(delta, k, seeded(0))
    size = float(w.norm())
    if rank <= k:
        assert kept is delta
        assert lost == 0.0
        return
    assert isinstance(kept, LowRank) and kept.rank == min(k, d_out, d_in) and kept.b.dtype == delta.b.dtype
    tail = float(torch.linalg.svdvals(w)[k:].norm())
    assert lost == pytest.approx(tail, rel=1e-9, abs=1e-12 * size)
    assert lost == pytest.approx(float((w - kept.dense()).norm()), rel=1e-9, abs=1e-12 * size)
    # No matrix of this rank is closer, and with the singular values apart only one is as close.
    assert lost == pytest.approx(float((w - best_of_rank(w, k)).norm()), rel=1e-9, abs=1e-12 * size)


def test_truncated_by_hand_keeps_the_largest_directions() -> None:
    delta = LowRank(torch.diag(torch.tensor([4.0, 3.0, 12.0])), torch.eye(3, 5))
    kept, lost = truncated(delta, 1, seeded(0))
    assert lost == pytest.approx(5.0)
    expected = torch.zeros(3, 5)
    expected[2, 2] = 12.0
    torch.testing.assert_close(kept.dense(), expected)
    torch.testing.assert_close(kept.b.norm(), kept.a.norm())


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, RANKS, st.integers(1, 8), SEEDS)
def test_truncated_twice_changes_nothing(d_out: int, d_in: int, rank: int, k: int, seed: int) -> None:
    for delta in (low_rank(seed, d_out, d_in, rank), Dense(low_rank(seed, d_out, d_in, rank).dense())):
        once, _ = truncated(delta, k, seeded(0))
        again, lost = truncated(once, k, seeded(0))
        assert again is once
        assert lost == 0.0
        padded, lost = truncated(once.plus(zero((d_out, d_in), 3)), k, seeded(0))
        torch.testing.assert_close(padded.dense(), once.dense())
        assert lost == pytest.approx(0.0, abs=1e-12 * max(delta.norm(), 1.0))


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES, st.integers(0, 8), SEEDS)
def test_truncated_dense_equals_the_svd_of_the_product(d_out: int, d_in: int, k: int, seed: int) -> None:
    w = decaying(seed, d_out, d_in)
    kept, lost = truncated(Dense(w), k, seeded(0))
    assert kept.rank == min(k, d_out, d_in)
    torch.testing.assert_close(kept.dense(), best_of_rank(w, k), rtol=1e-9, atol=1e-12)
    assert lost == pytest.approx(float(torch.linalg.svdvals(w)[k:].norm()), rel=1e-9, abs=1e-12)


def test_truncated_dense_above_the_exact_side_reports_the_measured_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "EXACT_SIDE", 32)
    w = decaying(0, 96, 64)
    kept, lost = truncated(Dense(w), 4, seeded(0))
    assert lost == pytest.approx(float((w - kept.dense()).norm()), rel=1e-12)
    tail = float(torch.linalg.svdvals(w)[4:].norm())
    assert tail <= lost < 1.001 * tail


# -- triplets --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, RANKS, SEEDS)
def test_low_rank_triplets_equal_the_svd_of_the_product(d_out: int, d_in: int, rank: int, seed: int) -> None:
    delta = low_rank(seed, d_out, d_in, rank)
    w, found = delta.dense(), low_rank_triplets(delta)
    values = torch.linalg.svdvals(w)
    count = min(d_out, d_in, rank)
    assert found.values.shape == (count,)
    torch.testing.assert_close(found.values, values[:count], rtol=1e-9, atol=1e-12 * float(values[0]))
    torch.testing.assert_close(found.left * found.values @ found.right.T, w)
    assert_orthonormal(found.left)
    assert_orthonormal(found.right)


def test_triplets_head_and_low_rank_share_the_spectrum_evenly() -> None:
    found = Triplets(torch.eye(3), torch.tensor([9.0, 4.0, 1.0]), torch.eye(4, 3)).head(2)
    lora = found.low_rank()
    torch.testing.assert_close(lora.dense(), torch.diag(torch.tensor([9.0, 4.0, 0.0, 0.0]))[:3])
    torch.testing.assert_close(lora.b.norm(dim=0), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(lora.a.norm(dim=1), torch.tensor([3.0, 2.0]))


def of_values(generator: torch.Generator, values: torch.Tensor, shape: tuple[int, int]) -> Triplets:
    """Triplets with these σ, (n,), in random directions."""
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=generator)).Q for n in shape)
    return Triplets(left, values, right * (1 - 2 * (torch.arange(len(values)) % 2)))  # LAPACK's Q has signs of its own


def dense_of(triplets: Triplets) -> torch.Tensor:
    return triplets.left * triplets.values @ triplets.right.T


LARGE = [(192, 576), (576, 192), (300, 300)]
"""Where a Krylov space of 8 + 8 columns, 7 times, is smaller than the matrix."""


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_leading_directions_of_a_falling_spectrum_equal_the_svd(shape: tuple[int, int], power: float) -> None:
    """σ_i = i^−power."""
    truth = of_values(seeded(1), torch.arange(1, 193) ** -power, shape)
    v = RowBlocks.of(dense_of(truth))
    found = leading_directions(v, 8, seeded(2))
    torch.testing.assert_close(found.values, truth.values[:8], rtol=1e-4, atol=1e-6)
    for mine, theirs in ((found.left, truth.left), (found.right, truth.right)):
        assert mine.shape == (theirs.shape[0], 8)
        assert_orthonormal(mine, atol=1e-5)
        assert float((mine * theirs[:, :8]).sum(dim=0).abs().min()) > 0.9999
    # The pairs belong together, signs and all.
    torch.testing.assert_close(v.transposed_times(found.left), found.right * found.values, rtol=0.0, atol=1e-5)
    again = leading_directions(v, 8, seeded(2))
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_leading_directions_of_noise_are_nearly_as_leading(shape: tuple[int, int]) -> None:
    """The worst there is: singular values without gaps. What is asked is energy along the directions, V's or a ΔW's."""
    v, delta = (torch.randn(shape, generator=seeded(seed)) for seed in (3, 4))
    exact_left, values, _ = torch.linalg.svd(v, full_matrices=False)
    delta = delta / delta.norm() + 3.0 * v / v.norm()
    found = leading_directions(RowBlocks.of(v), 8, seeded(0))
    torch.testing.assert_close(found.values, values[:8], rtol=0.01, atol=0.0)
    mine, theirs = (float((left.T @ delta).square().sum()) for left in (found.left, exact_left[:, :8]))
    assert mine == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("rank", [0, 3, 20])
@pytest.mark.parametrize("zeros", [0, 100], ids=["everywhere", "in some rows"])
def test_leading_directions_of_a_matrix_of_low_rank_are_its_own_and_orthonormal(rank: int, zeros: int) -> None:
    """As V is where alignment trained a LoRA: after a block there is nothing new."""
    truth = of_values(seeded(1), torch.arange(rank, 0, -1).float(), (300 - zeros, 200))
    v = torch.cat((dense_of(truth), torch.zeros(zeros, 200)))
    found = leading_directions(RowBlocks.of(v), 8, seeded(0))
    assert_orthonormal(found.left, atol=1e-5)
    assert_orthonormal(found.right, atol=1e-5)
    expected = torch.cat((truth.values, torch.zeros(8)))[:8]
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dense_of(found), best_of_rank(v, 8), rtol=0.0, atol=1e-4)


def test_columns_that_a_block_adds_are_orthonormal_to_the_space_though_most_of_it_is_rounding() -> None:
    """Of nine columns, three have something new; what is left of the others is rounding, which counts or doesn't."""
    space = torch.linalg.qr(torch.randn(200, 40, generator=seeded(0))).Q
    for seed in range(4):
        new = torch.linalg.qr(torch.randn(200, 3, generator=seeded(seed))).Q
        block = torch.cat((product(space[:, :6], torch.randn(6, 6, generator=seeded(9))), new), dim=1)
        found = spectral._new_columns(block[:, torch.randperm(9, generator=seeded(8))], space.T.contiguous())
        found = found[:, found.norm(dim=0) > 1e-3]
        space = torch.cat((space, found), dim=1)
        assert 3 <= found.shape[1] <= 9
        assert_orthonormal(space, atol=1e-5)
        torch.testing.assert_close(product(space, product(space.T, new)), new, rtol=0.0, atol=1e-5)


def test_leading_directions_of_streamed_blocks_equal_those_in_memory() -> None:
    v = decaying(5, 190, 170)

    def blocks() -> Iterator[torch.Tensor]:
        yield from (part.clone() for part in v.split([1, 140, 49]))

    streamed = RowBlocks((190, 170), v.dtype, blocks)
    for k in (5, 20):  # iterated, and an SVD
        one, many = (leading_directions(x, k, seeded(7)) for x in (RowBlocks.of(v), streamed))
        torch.testing.assert_close(one.values, many.values)
        torch.testing.assert_close(dense_of(one), dense_of(many), rtol=0.0, atol=1e-8)  # a pair may change its signs


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 20), SEEDS)
def test_leading_directions_are_as_many_as_there_are(d_out: int, d_in: int, k: int, seed: int) -> None:
    v = decaying(seed, d_out, d_in)
    found = leading_directions(RowBlocks.of(v), k, seeded(0))
    count = min(k, d_out, d_in)
    assert (found.left.shape, found.values.shape, found.right.shape) == ((d_out, count), (count,), (d_in, count))
    torch.testing.assert_close(dense_of(found), best_of_rank(v, count))


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (20, 20)], ids=str)
def test_squared_singular_values_are_all_of_the_smaller_side(shape: tuple[int, int]) -> None:
    v = decaying(6, *shape)
    found = squared_singular_values(RowBlocks.of(v))
    torch.testing.assert_close(found, torch.linalg.svdvals(v).square().flip(0))
