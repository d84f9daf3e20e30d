from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from fleet.algebra import statistics
from fleet.algebra.delta import Delta, Dense, LowRank, zero
from fleet.algebra.factors import Factors, factor_average
from fleet.algebra.random_edits import named_generator
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import Triplets, squared_singular_values
from fleet.algebra.statistics import (
    Asked,
    DeltaStatistics,
    Displacement,
    delta_statistics,
    projected_factor,
    rho_null,
)
from tests.pico import make_adapter, make_model

SIZES = st.integers(1, 24)
RANKS = st.integers(1, 6)
SEEDS = st.integers(0, 2**31)
SCALES = st.floats(1e-3, 1e3)

SHAPES = {"square": (64, 64), "grouped queries": (24, 96), "tall": (96, 32)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank(generator: torch.Generator, d_out: int, d_in: int, rank: int, scale: float = 1.0) -> LowRank:
    return LowRank(normal(generator, d_out, rank) * scale, normal(generator, rank, d_in))


def whole_basis(v: torch.Tensor) -> Triplets:
    left, values, right = torch.linalg.svd(v, full_matrices=False)
    return Triplets(left, values, right.T)


ALL = Asked(displacement=True, rho=True, rho_null=True, energies=99)


def own_part(v: torch.Tensor, blocks: RowBlocks | None = None) -> Displacement:
    """Everything of V, given in one block or in these."""
    spectrum = torch.linalg.svdvals(v).double().square()
    return Displacement(blocks or RowBlocks.of(v), lambda: float(v.norm()), spectrum, whole_basis(v))


def catalogue_of(own: Displacement | None, deltas: dict[str, Delta], asked: Asked = ALL) -> dict[str, DeltaStatistics]:
    return delta_statistics(own, deltas, dict.fromkeys(deltas, asked))


def measured(v: torch.Tensor, delta: Delta, asked: Asked = ALL) -> DeltaStatistics:
    return catalogue_of(own_part(v), {"m": delta}, asked)["m"]


def dense_definitions(v: torch.Tensor, w: torch.Tensor) -> dict[str, float]:
    """As the papers write them, with the d_out × d_out operator."""
    c = v @ v.T / v.norm()
    return {
        "rho": float(((c @ w) * w).sum() / ((c @ w).norm() * w.norm())),
        "gain": float((c @ w).norm() / w.norm()),
        "lift": float(v.shape[0] * (v.T @ w).norm() ** 2 / (v.norm() ** 2 * w.norm() ** 2)),
        "delta_norm": float(w.norm()),
        "safety_norm": float(v.norm()),
    }


def in_blocks(matrix: torch.Tensor, cuts: list[int]) -> RowBlocks:
    edges = [0, *sorted({c for c in cuts if 0 < c < matrix.shape[0]}), matrix.shape[0]]

    def blocks() -> Iterator[torch.Tensor]:
        for start, stop in pairwise(edges):
            yield matrix[start:stop].clone()

    return RowBlocks((matrix.shape[0], matrix.shape[1]), matrix.dtype, blocks)


def flat(found: DeltaStatistics) -> list[float]:
    assert found.energies is not None
    values = (*found[:-1], *found.energies)
    assert all(value is not None for value in values)
    return [float(value) for value in values if value is not None]


# -- statistics ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(SIZES, SIZES, RANKS, SCALES, SCALES, SEEDS)
def test_statistics_from_grams_equal_dense_definitions(
    d_out: int, d_in: int, rank: int, scale: float, v_scale: float, seed: int
) -> None:
    g = seeded(seed)
    v, delta = normal(g, d_out, d_in) * v_scale, low_rank(g, d_out, d_in, rank, scale)
    w = delta.dense()
    # Products of factors that nearly cancel have fewer digits on either route.
    assume(w.norm() > 0.02 * delta.b.norm() * delta.a.norm() and (v.T @ w).norm() > 0.02 * v.norm() * w.norm())
    found, basis = measured(v, delta), whole_basis(v)
    for name, expected in dense_definitions(v, w).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-10), name
    assert found.cosine == pytest.approx(float((v * w).sum() / (v.norm() * w.norm())), rel=1e-10, abs=1e-13)
    energies = (basis.left.T @ w).square().sum(dim=1) / w.norm() ** 2
    assert found.energies == pytest.approx(energies.tolist(), rel=1e-10, abs=1e-13)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 24), SIZES, RANKS, SEEDS)
def test_statistics_from_energies_equal_those_from_grams(d_out: int, d_in: int, rank: int, seed: int) -> None:
    g = seeded(seed)
    v, delta = normal(g, d_out, d_in), low_rank(g, d_out, d_in, rank)
    w = delta.dense()
    assume(w.norm() > 0.02 * delta.b.norm() * delta.a.norm() and (v.T @ w).norm() > 0.02 * v.norm() * w.norm())
    found = measured(v, delta)
    e, squares = torch.tensor(found.energies, dtype=torch.float64), whole_basis(v).values.square()
    assert found.rho == pytest.approx(float((squares * e).sum() / (squares**2 * e).sum().sqrt()), rel=1e-9)
    assert found.lift == pytest.approx(float(d_out * (squares * e).sum() / squares.sum()), rel=1e-9)
    if d_in >= d_out:
        assert sum(found.energies or ()) == pytest.approx(1.0)


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, st.lists(RANKS, min_size=1, max_size=4), st.booleans(), SEEDS)
def test_statistics_of_a_stacked_catalogue_equal_each_alone(
    d_out: int, d_in: int, ranks: list[int], with_dense: bool, seed: int
) -> None:
    g = seeded(seed)
    v = normal(g, d_out, d_in)
    deltas: dict[str, Delta] = {f"m{i}": low_rank(g, d_out, d_in, rank, 10.0**i) for i, rank in enumerate(ranks)}
    if with_dense:
        deltas = {"full": Dense(normal(g, d_out, d_in)), **deltas}
    own = own_part(v)
    together = catalogue_of(own, deltas)
    assert set(together) == set(deltas)
    for name, delta in deltas.items():
        alone = catalogue_of(own, {name: delta})[name]
        assert flat(together[name]) == pytest.approx(flat(alone), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, RANKS, st.integers(1, 9), SEEDS)
def test_statistics_low_rank_and_dense_routes_agree(d_out: int, d_in: int, rank: int, columns: int, seed: int) -> None:
    g = seeded(seed)
    v, delta = normal(g, d_out, d_in), low_rank(g, d_out, d_in, rank)
    w = delta.dense()
    assume(w.norm() > 0.02 * delta.b.norm() * delta.a.norm() and (v.T @ w).norm() > 0.02 * v.norm() * w.norm())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "DENSE_COLUMNS", columns)  # several column blocks, the last one short
        dense = measured(v, Dense(w))
    found = measured(v, delta)
    null = {"rho_null": 0.0, "rho_null_sd": 0.0}  # the dense route counts the directions of B, too
    assert flat(dense._replace(**null)) == pytest.approx(flat(found._replace(**null)), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, RANKS, st.lists(st.integers(1, 23), max_size=4), SEEDS)
def test_row_blocks_one_and_many_agree(d_out: int, d_in: int, rank: int, cuts: list[int], seed: int) -> None:
    g = seeded(seed)
    v, delta, other = normal(g, d_out, d_in), low_rank(g, d_out, d_in, rank), Dense(normal(g, d_out, d_in))
    many = in_blocks(v, cuts)
    assert torch.equal(many.dense(), v)
    torch.testing.assert_close(many.times(delta.a.T), v @ delta.a.T)
    torch.testing.assert_close(many.transposed_times(delta.b), v.T @ delta.b)
    torch.testing.assert_close(squared_singular_values(many), squared_singular_values(RowBlocks.of(v)))
    deltas: dict[str, Delta] = {"lora": delta, "full": other}
    one_block, blocks = (catalogue_of(own_part(v, x), deltas) for x in (RowBlocks.of(v), many))
    for name in deltas:
        expected = flat(one_block[name])
        assert flat(blocks[name]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", [LowRank, Dense])
@pytest.mark.parametrize("direction", range(4))
def test_statistics_rho_of_any_single_direction_is_one_and_lift_tells_them_apart(kind: type, direction: int) -> None:
    sigma = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    u = torch.zeros(4, 1, dtype=torch.float64)
    u[direction] = 3.0
    row = torch.tensor([[0.0, 5.0, 0.0, 0.0]], dtype=torch.float64)
    found = measured(torch.diag(sigma), LowRank(u, row) if kind is LowRank else Dense(u @ row))
    assert found.rho == pytest.approx(1.0, abs=1e-12)
    assert found.lift == pytest.approx([4 * 64 / 85, 4 * 16 / 85, 4 * 4 / 85, 4 / 85][direction])
    assert found.gain == pytest.approx([64.0, 16.0, 4.0, 1.0][direction] / 85**0.5)
    assert found.energies == pytest.approx([float(i == direction) for i in range(4)], abs=1e-12)


def test_statistics_two_directions_by_hand() -> None:
    v = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    found = measured(v, Dense(torch.eye(2, dtype=torch.float64)))
    # ‖VᵀΔW‖² = 5, ‖VVᵀΔW‖² = 17, ‖ΔW‖² = 2, ‖V‖² = 5, ⟨V, ΔW⟩ = 3
    assert found.rho == pytest.approx(5 / 34**0.5)
    assert found.gain == pytest.approx((17 / 10) ** 0.5)
    assert found.lift == pytest.approx(1.0)
    assert found.cosine == pytest.approx(3 / 10**0.5)
    assert found.energies == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("v", "delta"),
    [
        (torch.ones(3, 2), zero((3, 2))),
        (torch.ones(3, 2), zero((3, 2), rank=2)),
        (torch.ones(3, 2), Dense(torch.zeros(3, 2))),
        (torch.zeros(3, 2), LowRank(torch.ones(3, 1), torch.ones(1, 2))),
        (torch.zeros(3, 2), Dense(torch.ones(3, 2))),
    ],
    ids=["no rank", "zero factors", "zero matrix", "V vanishes", "V vanishes, dense"],
)
def test_statistics_vanishing_matrix_is_undefined(v: torch.Tensor, delta: Delta) -> None:
    found = measured(v, delta)
    assert found[2:] == (None,) * 7
    assert found[:2] == (pytest.approx(delta.norm()), pytest.approx(float(v.norm())))


@pytest.mark.parametrize("kind", [LowRank, Dense])
def test_statistics_orthogonal_to_v_have_no_rho_and_no_gain(kind: type) -> None:
    v, row = torch.zeros(3, 2), torch.ones(1, 2)
    v[0] = 1.0
    column = torch.tensor([[0.0], [1.0], [0.0]])
    found = measured(v, LowRank(column, row) if kind is LowRank else Dense(column @ row))
    assert (found.rho, found.gain, found.lift, found.cosine) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", [LowRank, Dense])
@pytest.mark.parametrize(
    "asked",
    [Asked(), Asked(True), Asked(True, True), Asked(True, True, True), Asked(True, energies=2)],
    ids=["norm", "cosine", "rho", "null", "energies"],
)
def test_statistics_are_those_asked_for_and_no_others(kind: type, asked: Asked) -> None:
    g = seeded(3)
    v, lora = normal(g, 6, 9), low_rank(g, 6, 9, 2)
    delta: Delta = lora if kind is LowRank else Dense(lora.dense())
    everything, found = measured(v, delta)._asdict(), measured(v, delta, asked)._asdict()
    assert {name for name, value in found.items() if value is not None} == set(asked.fields)
    for name in set(asked.fields) - {"energies"}:
        assert found[name] == pytest.approx(everything[name], rel=1e-12)
    if asked.energies:
        assert found["energies"] == pytest.approx(everything["energies"][:2])


def test_statistics_of_models_asked_differently_equal_those_asked_alike() -> None:
    g = seeded(8)
    own = own_part(normal(g, 12, 9))
    deltas: dict[str, Delta] = {name: low_rank(g, 12, 9, 2) for name in "abc"}
    asked = {"a": Asked(), "b": Asked(True), "c": ALL}
    mixed, all_alike = delta_statistics(own, deltas, asked), catalogue_of(own, deltas)
    assert mixed["c"] == all_alike["c"]
    assert mixed["b"] == DeltaStatistics(**{f: getattr(all_alike["b"], f) for f in asked["b"].fields})
    assert catalogue_of(None, deltas, Asked())["a"] == mixed["a"], "without V"


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, RANKS, SEEDS)
def test_projected_factor_times_a_is_the_operator_on_the_product(d_out: int, d_in: int, rank: int, seed: int) -> None:
    g = seeded(seed)
    v, delta = normal(g, d_out, d_in), low_rank(g, d_out, d_in, rank)
    projected = projected_factor(RowBlocks.of(v), float(v.norm()), delta)
    assert projected.shape == delta.b.shape
    torch.testing.assert_close(projected @ delta.a, v @ v.T / v.norm() @ delta.dense())


# -- the null of ρ ---------------------------------------------------------------------------------------------------


def spiked(generator: torch.Generator, d_out: int, d_in: int) -> torch.Tensor:
    """Noise and a few strong directions, as a real V has them."""
    return normal(generator, d_out, d_in) + 4.0 * normal(generator, d_out, 3) @ normal(generator, 3, d_in)


def over_random_b(v: torch.Tensor, a: torch.Tensor, draws: int) -> dict[str, torch.Tensor]:
    """ρ and lift of B·A for `draws` Gaussian B, from the dense definitions."""
    w = normal(seeded(99), draws, v.shape[0], a.shape[0]) @ a
    m = v.T @ w
    dd, mm, nn = (x.square().sum(dim=(1, 2)) for x in (w, m, v @ m))
    return {"rho": mm / (nn * dd).sqrt(), "lift": v.shape[0] * mm / (v.norm() ** 2 * dd)}


def of_spectrum(values: torch.Tensor) -> Any:
    """A V with these σ, (n,), in random directions."""

    def make(generator: torch.Generator, d_out: int, d_in: int) -> torch.Tensor:
        n = min(d_out, d_in)
        left, right = (torch.linalg.qr(normal(generator, d, n)).Q for d in (d_out, d_in))
        return left * values[:n] @ right.T

    return make


SPECTRA = {
    "noise": normal,
    "spiked": spiked,
    "slow": of_spectrum(torch.arange(1, 65).double() ** -0.5),
    "steep": of_spectrum(torch.arange(1, 65).double() ** -1.0),
    "nearly rank 1": of_spectrum(torch.cat((torch.ones(1), torch.full((63,), 1e-3))).double()),
    "rank 4": of_spectrum(torch.cat((torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.zeros(60))).double()),
}


@pytest.mark.slow
@pytest.mark.parametrize("make_v", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rho_null_equals_monte_carlo_over_random_b(make_v: Any, shape: tuple[int, int], rank: int) -> None:
    g = seeded(7)
    v = make_v(g, *shape)
    a = torch.linalg.qr(normal(g, shape[1], rank)).Q.T
    rho = over_random_b(v, a, 1500)["rho"]
    mean, sd = rho_null(squared_singular_values(RowBlocks.of(v)), shape[0], rank)
    assert mean == pytest.approx(float(rho.mean()), abs=0.1 * float(rho.std())), "3.9 standard errors of the draws"
    assert sd == pytest.approx(float(rho.std()), rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("make_v", SPECTRA.values(), ids=SPECTRA)
def test_rho_null_of_an_uneven_a_errs_little(make_v: Any) -> None:
    """λ_j ∝ 0.7ʲ: z_i is no gamma then."""
    g = seeded(7)
    v, scales = make_v(g, 64, 64), 0.7 ** (torch.arange(16).double() / 2)
    a = scales[:, None] * torch.linalg.qr(normal(g, 64, 16)).Q.T
    rho = over_random_b(v, a, 1500)["rho"]
    found = measured(v, LowRank(normal(g, 64, 16), a))
    assert found.rho_null == pytest.approx(float(rho.mean()), abs=0.15 * float(rho.std()))
    assert found.rho_null_sd == pytest.approx(float(rho.std()), rel=0.2)


@pytest.mark.parametrize("make_v", [normal, spiked])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rho_null_of_a_large_rank_is_the_formula(make_v: Any, shape: tuple[int, int]) -> None:
    v = make_v(seeded(7), *shape)
    mean, sd = rho_null(squared_singular_values(RowBlocks.of(v)), shape[0], 1e6)
    assert mean == pytest.approx(float(v.norm() ** 2 / (shape[0] ** 0.5 * (v @ v.T).norm())), rel=1e-5)
    assert sd < 1e-3 * mean


def test_rho_null_of_rank_one_is_that_of_a_beta() -> None:
    """V and ΔW of rank 1: ρ² = x₁²/Σx² is Beta(½, (d − 1)/2), of mean 1/d, and ρ is at √ its gammas' moments."""
    mean, sd = rho_null(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), 4, 1)
    expected = math.exp(math.lgamma(1.0) - math.lgamma(0.5) + math.lgamma(2.0) - math.lgamma(2.5))
    assert mean == pytest.approx(expected, rel=1e-6)
    assert sd**2 == pytest.approx(1 / 4 - expected**2, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 16, 1000])
@pytest.mark.parametrize("size", [5, 64, 512])
def test_rho_null_of_equal_singular_values_is_one_without_spread(rank: int, size: int) -> None:
    spectrum = 9.0 * (1.0 + 1e-7 * normal(seeded(0), size))  # equal as float32 has it
    assert rho_null(spectrum, size, rank) == (pytest.approx(1.0), 0.0)
    found = measured(3.0 * torch.eye(5), LowRank(torch.ones(5, 1), torch.ones(1, 5)))
    assert (found.rho_null, found.rho_null_sd) == (pytest.approx(1.0), 0.0), "of float32 too"


def test_rho_null_in_the_survey_has_the_models_own_a() -> None:
    g = seeded(2)
    v, b = spiked(g, 48, 48), normal(g, 48, 6)
    even, uneven = normal(g, 6, 48), torch.zeros(6, 48, dtype=torch.float64)
    uneven[0] = normal(g, 48)
    found = [measured(v, LowRank(b, a)).rho_null_sd for a in (even, uneven)]
    expected = [float(over_random_b(v, a, 1500)["rho"].std()) for a in (even, uneven)]
    assert expected[1] > 1.5 * expected[0]
    assert found == pytest.approx(expected, rel=0.12)


def test_rho_null_of_a_dense_delta_has_its_participation_ratio() -> None:
    g = seeded(4)
    v = normal(g, 64, 64)
    b, a = torch.linalg.qr(normal(g, 64, 6)).Q, torch.linalg.qr(normal(g, 64, 6)).Q.T  # ΔWᵀΔW has AAᵀ's eigenvalues
    dense, lora = (measured(v, d) for d in (Dense(b @ a), LowRank(b, a)))
    assert (dense.rho_null, dense.rho_null_sd) == pytest.approx((lora.rho_null, lora.rho_null_sd), rel=1e-6)


@pytest.mark.parametrize("make_v", [normal, spiked])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lift_of_a_random_b_is_one_on_average(make_v: Any, shape: tuple[int, int]) -> None:
    g = seeded(5)
    v, a = make_v(g, *shape), normal(g, 2, shape[1])
    draws = 400
    b = normal(g, draws, shape[0], 2)
    found = catalogue_of(own_part(v), {str(i): LowRank(b[i], a) for i in range(draws)}, Asked(True))
    lifts = torch.tensor([m.lift for m in found.values()])
    assert float(lifts.mean()) == pytest.approx(1.0, abs=4 * float(lifts.std()) / draws**0.5)


# -- task vectors ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, RANKS, RANKS, st.floats(-2, 2), SEEDS)
def test_delta_sums_are_exact_on_every_route(
    d_out: int, d_in: int, rank: int, other_rank: int, factor: float, seed: int
) -> None:
    g = seeded(seed)
    one, two = low_rank(g, d_out, d_in, rank), low_rank(g, d_out, d_in, other_rank)
    total = one.plus(two.scaled(factor))
    assert isinstance(total, LowRank) and total.rank == rank + other_rank and total.shape == one.shape
    x, y = one.dense(), two.dense()
    torch.testing.assert_close(total.dense(), x + factor * y)
    for left, right in ((one, Dense(y)), (Dense(x), two), (Dense(x), Dense(y))):
        summed, difference = left.plus(right.scaled(factor)), left.minus(right.scaled(factor))
        assert isinstance(summed, Dense) and isinstance(difference, Dense)
        torch.testing.assert_close(summed.dense(), x + factor * y)
        torch.testing.assert_close(difference.dense(), x - factor * y)
    torch.testing.assert_close(one.minus(two).dense(), x - y)


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, RANKS, st.integers(1, 8), st.floats(-2, 2), st.floats(-2, 2), SEEDS)
def test_delta_projections_equal_dense_projectors(
    d_out: int, d_in: int, rank: int, k: int, inside: float, outside: float, seed: int
) -> None:
    g = seeded(seed)
    delta = low_rank(g, d_out, d_in, rank)
    basis = whole_basis(normal(g, d_out, d_in)).head(k)
    w = delta.dense()
    p, q = basis.left @ basis.left.T, basis.right @ basis.right.T
    for route in (delta, Dense(w)):
        torch.testing.assert_close(route.onto_left(basis.left).dense(), p @ w)
        torch.testing.assert_close(route.outside_left(basis.left).dense(), w - p @ w)
        weighted = route.weighted_right(basis.right, inside, outside)
        assert type(weighted) is type(route)
        torch.testing.assert_close(weighted.dense(), inside * w @ q + outside * (w - w @ q))
        torch.testing.assert_close(route.energies(basis.left), (basis.left.T @ w).square().sum(dim=1))
        assert route.norm() == pytest.approx(float(w.norm()), rel=1e-7)
    assert delta.onto_left(basis.left).rank == delta.outside_left(basis.left).rank == rank


def test_delta_zero_of_no_rank_adds_nothing() -> None:
    delta = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    assert zero((2, 3)).norm() == 0.0
    assert zero((2, 3)).rank == 0
    assert torch.equal(zero((2, 3)).plus(delta).dense(), torch.ones(2, 3))


def test_named_generator_same_module_and_seed_same_draws() -> None:
    def drawn(seed: int, name: str) -> list[float]:
        return torch.randn(3, generator=named_generator(seed, name)).tolist()

    assert drawn(0, "q_proj") == drawn(0, "q_proj")
    assert len({tuple(drawn(*key)) for key in ((0, "q_proj"), (1, "q_proj"), (0, "k_proj"), (1, "0/q_proj"))}) == 4


# -- PEFT's factor average -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pico model with two adapters of rank 4: alpha 6, and rsLoRA with alpha 5; no scale is a power of two."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("peft")
    base = make_model(folder / "base", seed=0)
    make_adapter(folder / "task", base, seed=1, rank=4, alpha=6)
    make_adapter(folder / "safety", base, seed=2, rank=4, alpha=5, use_rslora=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, folder / "task", adapter_name="task")
    peft_model.load_adapter(folder / "safety", adapter_name="safety")
    return peft_model


@pytest.mark.parametrize("weights", [(0.8, 0.2), (0.35, 0.65), (1.0, 0.0)], ids=str)
def test_factor_average_equals_pefts_linear_bit_for_bit(peft_model: Any, weights: tuple[float, float]) -> None:
    name = f"merged {weights[1]}".replace(".", "_")
    peft_model.add_weighted_adapter(["task", "safety"], list(weights), name, combination_type="linear")
    modules = {n: m for n, m in peft_model.named_modules() if hasattr(m, "lora_A") and name in m.lora_A}
    assert len(modules) == 4
    for module in modules.values():
        factors = [
            Factors(module.lora_B[a].weight.data, module.lora_A[a].weight.data, module.scaling[a])
            for a in ("task", "safety")
        ]
        assert [f.scale for f in factors] == [1.5, 2.5]
        merged = factor_average(factors, weights)
        assert torch.equal(merged.a, module.lora_A[name].weight.data)
        assert torch.equal(merged.b, module.lora_B[name].weight.data)


def test_factor_average_differs_from_the_exact_merge_by_the_cross_terms() -> None:
    g = seeded(0)
    one, two = (Factors(normal(g, 6, 3), normal(g, 3, 5), scale) for scale in (1.7, 0.3))
    exact = 0.8 * 1.7 * one.b @ one.a + 0.2 * 0.3 * two.b @ two.a
    cross = (0.8 * 1.7 * 0.2 * 0.3) ** 0.5 * (one.b @ two.a + two.b @ one.a)
    averaged = factor_average((one, two), (0.8, 0.2))
    torch.testing.assert_close(averaged.dense(), exact + cross, rtol=1e-6, atol=1e-6)
    assert cross.norm() > 0.1 * exact.norm()


def test_factor_average_unequal_ranks_or_negative_weight_raises() -> None:
    one, two = (Factors(torch.ones(4, r), torch.ones(r, 4), 1.0) for r in (1, 2))
    with pytest.raises(ValueError, match="different ranks"):
        factor_average((one, two), (0.8, 0.2))
    with pytest.raises(ValueError, match="negative"):
        factor_average((one, one), (1.2, -0.2))
