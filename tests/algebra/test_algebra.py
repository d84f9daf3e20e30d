from __future__ import annotations

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
from fleet.algebra.spectral import Triplets
from fleet.algebra.statistics import (
    DeltaStatistics,
    Displacement,
    delta_statistics,
    probe_triples,
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


def triples_of(v: torch.Tensor, seed: int) -> torch.Tensor:
    return probe_triples(RowBlocks.of(v), float(v.norm()), seeded(seed))


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank(generator: torch.Generator, d_out: int, d_in: int, rank: int, scale: float = 1.0) -> LowRank:
    return LowRank(normal(generator, d_out, rank) * scale, normal(generator, rank, d_in))


def whole_basis(v: torch.Tensor) -> Triplets:
    left, values, right = torch.linalg.svd(v, full_matrices=False)
    return Triplets(left, values, right.T)


def own_part(v: torch.Tensor, probes: bool = True, basis: bool = True) -> Displacement:
    triples = triples_of(v, 0) if probes and float(v.norm()) > 0.0 else None
    return Displacement(float(v.norm()), triples, whole_basis(v) if basis else None)


def measured(v: torch.Tensor, delta: Delta, own: Displacement | None = None) -> DeltaStatistics:
    return delta_statistics(RowBlocks.of(v), own or own_part(v), {"m": delta}, True)["m"]


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
    together = delta_statistics(RowBlocks.of(v), own, deltas, True)
    assert set(together) == set(deltas)
    for name, delta in deltas.items():
        alone = delta_statistics(RowBlocks.of(v), own, {name: delta}, True)[name]
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
    without_null = {"rho_null": 0.0, "rho_null_sd": 0.0}  # the dense route takes A's spectrum to be flat
    assert flat(dense._replace(**without_null)) == pytest.approx(
        flat(found._replace(**without_null)), rel=1e-9, abs=1e-12
    )


@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, RANKS, st.lists(st.integers(1, 23), max_size=4), SEEDS)
def test_row_blocks_one_and_many_agree(d_out: int, d_in: int, rank: int, cuts: list[int], seed: int) -> None:
    g = seeded(seed)
    v, delta, other = normal(g, d_out, d_in), low_rank(g, d_out, d_in, rank), Dense(normal(g, d_out, d_in))
    many = in_blocks(v, cuts)
    assert torch.equal(many.dense(), v)
    torch.testing.assert_close(many.times(delta.a.T), v @ delta.a.T)
    torch.testing.assert_close(many.transposed_times(delta.b), v.T @ delta.b)
    torch.testing.assert_close(probe_triples(many, float(v.norm()), seeded(0)), triples_of(v, 0))
    deltas: dict[str, Delta] = {"lora": delta, "full": other}
    own = own_part(v)
    one_block, blocks = (delta_statistics(x, own, deltas, True) for x in (RowBlocks.of(v), many))
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
    found = delta_statistics(RowBlocks.of(v), own_part(v), {"m": delta}, True)["m"]
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
def test_statistics_without_probes_leave_rho_out_and_keep_the_rest(kind: type) -> None:
    g = seeded(3)
    v, lora = normal(g, 6, 9), low_rank(g, 6, 9, 2)
    delta: Delta = lora if kind is LowRank else Dense(lora.dense())
    full = measured(v, delta)
    found = delta_statistics(RowBlocks.of(v), own_part(v, basis=False), {"m": delta}, False)["m"]
    assert (found.rho, found.rho_null, found.rho_null_sd, found.gain, found.energies) == (None,) * 5
    assert (found.delta_norm, found.lift, found.cosine) == (full.delta_norm, full.lift, full.cosine)
    no_directions = measured(v, delta, own_part(v, basis=False))
    assert no_directions == full._replace(energies=None)


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


@pytest.mark.parametrize("make_v", [normal, spiked])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("row_scales", [(1.0,) * 8, (10.0, 1.0, 1.0, 1.0)], ids=["rank 8", "rank 4, one row rules"])
def test_rho_null_equals_monte_carlo_over_random_b(
    make_v: Any, shape: tuple[int, int], row_scales: tuple[float, ...]
) -> None:
    g = seeded(7)
    v = make_v(g, *shape)
    a = torch.tensor(row_scales, dtype=torch.float64)[:, None] * normal(g, len(row_scales), shape[1])
    rho = over_random_b(v, a, 600)["rho"]
    weights = torch.linalg.eigvalsh(a @ a.T)
    nulls = torch.tensor([rho_null(triples_of(v, s), weights) for s in range(100, 112)])
    sd, effective_rank = float(rho.std()), float(weights.sum() ** 2 / weights.square().sum())
    # Each of the 12 nulls has a pool of 64 probes, whose mean is off by its own error, and 256 draws from it.
    standard_error = sd * ((effective_rank / 64 + 1 / 256) / 12 + 1 / 600) ** 0.5
    assert float(nulls[:, 0].mean()) == pytest.approx(float(rho.mean()), abs=4 * standard_error)
    assert float(nulls[:, 1].mean()) == pytest.approx(sd, rel=0.2)


@pytest.mark.parametrize("make_v", [normal, spiked])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rho_null_of_a_large_rank_is_the_formula(make_v: Any, shape: tuple[int, int]) -> None:
    v = make_v(seeded(7), *shape)
    probes = torch.cat([triples_of(v, s) for s in range(100, 140)])
    mean, sd = rho_null(probes, torch.ones(4096))
    assert mean == pytest.approx(float(v.norm() ** 2 / (shape[0] ** 0.5 * (v @ v.T).norm())), rel=0.02)
    assert sd < 0.02 * mean


def test_rho_null_of_equal_singular_values_is_one() -> None:
    probes = triples_of(3.0 * torch.eye(5, dtype=torch.float64), 1)
    torch.testing.assert_close(probes[:, 1:] / probes[:, :1], torch.tensor([[9.0, 81.0]]).double().expand(64, 2))
    assert rho_null(probes, torch.tensor([2.0, 1.0])) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))


def test_rho_null_in_the_survey_has_the_models_own_a() -> None:
    g = seeded(2)
    v, b = spiked(g, 48, 48), normal(g, 48, 6)
    even, uneven = normal(g, 6, 48), torch.zeros(6, 48, dtype=torch.float64)
    uneven[0] = normal(g, 48)
    found = [measured(v, LowRank(b, a)).rho_null_sd for a in (even, uneven)]
    expected = [float(over_random_b(v, a, 600)["rho"].std()) for a in (even, uneven)]
    assert expected[1] > 1.5 * expected[0]
    assert found == pytest.approx(expected, rel=0.2)


def test_rho_null_of_a_dense_delta_has_its_participation_ratio() -> None:
    g = seeded(4)
    v, b = normal(g, 64, 64), normal(g, 64, 6)
    a = torch.linalg.qr(normal(g, 64, 6)).Q.T  # equal eigenvalues, which the dense route takes for granted
    dense, lora = (measured(v, d) for d in (Dense(b @ a), LowRank(b, a)))
    assert dense.rho_null == pytest.approx(lora.rho_null, rel=0.02)
    assert dense.rho_null_sd == pytest.approx(lora.rho_null_sd, rel=0.25)


@pytest.mark.parametrize("make_v", [normal, spiked])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lift_of_a_random_b_is_one_on_average(make_v: Any, shape: tuple[int, int]) -> None:
    g = seeded(5)
    v, a = make_v(g, *shape), normal(g, 2, shape[1])
    draws = 400
    b = normal(g, draws, shape[0], 2)
    own = own_part(v, probes=False, basis=False)
    found = delta_statistics(RowBlocks.of(v), own, {str(i): LowRank(b[i], a) for i in range(draws)}, False)
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
