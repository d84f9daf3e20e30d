"""The fusion methods beyond task arithmetic, TIES and DARE, against their equations written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pydantic import TypeAdapter, ValidationError

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.noise import noise_key, uniform
from fleet.algebra.sparsify import WHOLE, Piece, thresholds_of
from fleet.core.errors import ManifestError
from fleet.fusion import (
    AnyFusionMethod,
    Breadcrumbs,
    Consensus,
    Della,
    Iso,
    Karcher,
    Knots,
    ModelStock,
    MultiSlerp,
    Ram,
    RamPlusTl,
    Sce,
    Slerp,
    Tsv,
)
from fleet.fusion.base import Entries
from fleet.fusion.gram import GramFusion
from fleet.fusion.place import Place
from tests.pieces import in_pieces

PLACE = Place("model.layers.1.q.weight", 0.5)
GRAM = (MultiSlerp(method="multi_slerp"), Karcher(method="karcher"), ModelStock(method="model_stock"))
SLERP = Slerp(method="slerp")
SPARSE = (
    Della(method="della"),
    Consensus(method="consensus"),
    Sce(method="sce"),
    Sce(method="sce", select=0.4),
)
MATRIX = (Knots(method="knots"), Tsv(method="tsv"), Iso(method="iso"))
RAM = (Ram(method="ram"), RamPlusTl(method="ramplus_tl", epsilon=0.5))
METHODS = (*GRAM, *SPARSE, *MATRIX, *RAM)
LORA = (*GRAM, *MATRIX)

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)
MODELS = st.integers(1, 4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(seed: int, models: int, *shape: int) -> dict[str, Delta]:
    return {f"m{i}": Dense(normal(seed + i, *shape) * (i + 1.0)) for i in range(models)}


def loras(seed: int, models: int, d_out: int, d_in: int) -> dict[str, Delta]:
    return {
        f"m{i}": LowRank(normal(seed + i, d_out, 1 + i % 2), normal(seed + i + 50, 1 + i % 2, d_in))
        for i in range(models)
    }


def of(*values: Sequence[float] | Sequence[Sequence[float]]) -> dict[str, Delta]:
    return {f"m{i}": Dense(torch.tensor(value)) for i, value in enumerate(values)}


def fuse(method: AnyFusionMethod, deltas: Mapping[str, Delta], absent: Sequence[str] = ()) -> Delta:
    return method.fuse(deltas, method.coefficients([*deltas, *absent], PLACE), PLACE, WHOLE)


def fused(method: AnyFusionMethod, deltas: Mapping[str, Delta], absent: Sequence[str] = ()) -> torch.Tensor:
    return fuse(method, deltas, absent).dense()


def doubles(deltas: Mapping[str, Delta]) -> list[torch.Tensor]:
    return [d.b.double() @ d.a.double() if isinstance(d, LowRank) else d.value.double() for d in deltas.values()]


def assert_same(found: torch.Tensor, expected: torch.Tensor, rel: float = 1e-5) -> None:
    """Equal up to this share of the expected norm."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert float((found.double() - expected).norm()) <= rel * float(expected.norm()) + 1e-12


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, SLERP])
def test_methods_are_read_by_their_names(method: AnyFusionMethod) -> None:
    assert TypeAdapter(AnyFusionMethod).validate_json(method.model_dump_json()) == method
    assert not method.is_linear
    assert method.keeps_lora == (method in (*LORA, SLERP))
    assert method.is_entrywise == (method not in MATRIX)


@pytest.mark.parametrize("method", [*METHODS, SLERP])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (5,), (2, 3, 4)])
def test_methods_of_zero_task_vectors_give_exactly_zero(method: AnyFusionMethod, shape: tuple[int, ...]) -> None:
    assert torch.equal(fused(method, {n: Dense(torch.zeros(shape)) for n in "ab"}), torch.zeros(shape))


@pytest.mark.parametrize("method", [*LORA, SLERP])
@pytest.mark.parametrize("rank", [0, 2])
def test_methods_of_zero_loras_give_a_zero_lora(method: AnyFusionMethod, rank: int) -> None:
    found = fuse(method, {n: LowRank(torch.zeros(3, rank), torch.zeros(rank, 4)) for n in "ab"})
    assert isinstance(found, LowRank) and found.rank <= 2 * rank
    assert torch.equal(found.dense(), torch.zeros(3, 4))


@pytest.mark.parametrize("method", [*(m for m in METHODS if m not in SPARSE[2:]), SPARSE[2], SLERP])
@pytest.mark.parametrize("shape", [(5, 4), (6,)])
def test_methods_take_a_model_that_leaves_the_tensor_alone_as_zero(
    method: AnyFusionMethod, shape: tuple[int, ...]
) -> None:
    """Only a selection by variance doesn't know of it."""
    deltas = {"a": Dense(normal(0, *shape))}
    found = fused(method, deltas, absent=["b"])
    assert bool(found.isfinite().all())
    assert_same(found, fused(method, deltas | {"b": Dense(torch.zeros(shape))}).double(), 1e-6)


@pytest.mark.parametrize(
    "method",
    [*GRAM, Consensus(method="consensus", scale=1.0), *SPARSE[2:], MATRIX[0], MATRIX[1]],
)
@pytest.mark.parametrize("deltas", [dense(0, 1, 6, 5), loras(0, 1, 6, 5)])
def test_methods_of_one_model_give_its_task_vector(method: AnyFusionMethod, deltas: dict[str, Delta]) -> None:
    assert_same(fused(method, deltas), doubles(deltas)[0])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LORA), SEEDS, MODELS, SIZES, SIZES)
def test_methods_of_loras_are_those_of_their_products(
    method: AnyFusionMethod, seed: int, models: int, d_out: int, d_in: int
) -> None:
    """Nothing is near a threshold of KnOTS' election, which a mean would jump at: the sum has no jumps."""
    method = Knots(method="knots", consensus="sum") if method.method == "knots" else method
    given_as = loras(seed, models, d_out, d_in)
    found = fuse(method, given_as)
    assert isinstance(found, LowRank)
    assert found.rank <= sum(d.rank for d in given_as.values() if isinstance(d, LowRank))
    products = fuse(method, {n: Dense(d.dense()) for n, d in given_as.items()})
    assert isinstance(products, Dense)
    assert_same(products.value, found.dense().double(), 1e-3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from((*GRAM, *SPARSE, *RAM)), SEEDS, MODELS, st.integers(2, 9), SIZES, st.data())
def test_entrywise_methods_over_runs_of_rows_are_the_whole(
    method: AnyFusionMethod, seed: int, models: int, rows: int, columns: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, rows - 1))
    runs = data.draw(st.permutations([range(cut), range(cut, rows)]))
    deltas = {n: d.dense() for n, d in dense(seed, models, rows, columns).items()}
    weights = method.coefficients([*deltas], PLACE)

    def entries(run: range) -> Entries:
        values = {n: d[run.start : run.stop].reshape(-1) for n, d in deltas.items()}
        return Entries(values, PLACE, run.start * columns, columns)

    ranks = method.ranks([*deltas], PLACE, rows * columns)
    thresholds = thresholds_of(method.scores(entries(range(rows))), ranks) if ranks else {}
    terms = [term for run in runs if (term := method.terms(entries(run), thresholds)) is not None]
    sums = torch.stack(terms).sum(dim=0) if terms else None
    whole = fused(method, {n: Dense(d) for n, d in deltas.items()}).double()
    for run in runs:
        found = method.combine(entries(run), weights, thresholds, sums)
        assert_same(found, whole[run.start : run.stop].reshape(-1), 1e-6 * math.sqrt(rows))


@pytest.mark.parametrize("shape", [(9, 4), (9,)])
@pytest.mark.parametrize(
    "method", [*GRAM, *SPARSE, *RAM, Breadcrumbs(method="breadcrumbs", density=0.5, outliers=0.2, rescale=True)]
)
def test_entrywise_methods_of_pieces_are_the_wholes_rows(method: AnyFusionMethod, shape: tuple[int, ...]) -> None:
    """Of few magnitudes, so that many entries tie; of a vector too, which workers share entry by entry."""
    deltas = {n: Dense(d.dense().round()) for n, d in dense(3, 2, *shape).items()}
    weights = method.coefficients([*deltas], PLACE)

    def work(rows: slice, piece: Piece) -> torch.Tensor:
        return method.fuse({n: Dense(d.value[rows]) for n, d in deltas.items()}, weights, PLACE, piece).dense()

    found = in_pieces((4, 5, 0), work, math.prod(shape[1:]))
    assert_same(torch.cat(found), fused(method, deltas).double(), 1e-6)


@pytest.mark.parametrize("method", [*GRAM, *SPARSE])
def test_entrywise_methods_gradient_flows_into_every_model(method: AnyFusionMethod) -> None:
    one, two = normal(0, 6, 5).requires_grad_(), (normal(0, 6, 5) + normal(1, 6, 5)).requires_grad_()
    fused(method, {"a": Dense(one), "b": Dense(two)}).square().sum().backward()
    for tensor in (one, two):
        assert tensor.grad is not None and bool(tensor.grad.any())


@pytest.mark.parametrize("method", MATRIX)
def test_matrix_methods_of_a_vector_are_the_mean_over_all_models(method: AnyFusionMethod) -> None:
    method = method.model_copy(update={"weights": {"m0": 3.0}, "scale": 2.0})
    assert_same(fused(method, of([2.0, 4.0], [2.0, -6.0]), absent=["c"]), torch.tensor([16.0 / 3, 4.0]).double())


# -- Gram ------------------------------------------------------------------------------------------------------------


def test_gram_terms_by_hand() -> None:
    entries = Entries({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, -1.0])}, PLACE, 0, 2)
    found = GRAM[0].terms(entries, {})
    assert found is not None and found.dtype == torch.float64
    assert found.tolist() == [[5.0, 1.0], [1.0, 10.0]]


@settings(max_examples=20, deadline=None)
@given(SEEDS, MODELS, SIZES, SIZES)
def test_gram_of_pieces_adds_up_for_loras(seed: int, models: int, d_out: int, d_in: int) -> None:
    deltas = loras(seed, models, d_out, d_in)
    products_M = doubles(deltas)
    expected = torch.stack([torch.stack([(x * y).sum() for y in products_M]) for x in products_M])
    found: list[torch.Tensor] = []
    for rows in (slice(0, d_out // 2), slice(d_out // 2, d_out)):
        cut = {n: LowRank(d.b[rows], d.a) for n, d in deltas.items() if isinstance(d, LowRank)}

        def kept(gram: torch.Tensor) -> torch.Tensor:
            found.append(gram)
            return expected

        GRAM[0].fuse(cut, GRAM[0].coefficients([*cut], PLACE), PLACE, Piece(0, kept))
    torch.testing.assert_close(found[0] + found[1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", GRAM)
@pytest.mark.parametrize("weights", [{"m0": -0.5}, {"m0": 0.0, "m1": 0.0}])
def test_gram_weights_that_are_no_shares_are_refused(method: AnyFusionMethod, weights: dict[str, float]) -> None:
    with pytest.raises(ManifestError, match="at least one over 0"):
        method.model_copy(update={"weights": weights}).coefficients(["m0", "m1"], PLACE)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(GRAM), SEEDS, MODELS, SIZES)
def test_gram_fusion_doesnt_depend_on_the_order_of_models(
    method: GramFusion, seed: int, models: int, size: int
) -> None:
    deltas = dense(seed, models, size, size)
    turned = dict(reversed(deltas.items()))
    assert isinstance(method, (MultiSlerp, Karcher, ModelStock))
    assert_same(fused(method, turned), fused(method, deltas).double(), 1e-3)


# -- SLERP -----------------------------------------------------------------------------------------------------------


def test_slerp_by_hand_of_orthogonal_vectors() -> None:
    found = fused(Slerp(method="slerp", t=1.0 / 3.0), of([2.0, 0.0], [0.0, 4.0]))
    # sin 60° of the first, sin 30° of the second.
    torch.testing.assert_close(found, torch.tensor([math.sqrt(3.0), 2.0]))


@pytest.mark.parametrize(("t", "model"), [(0.0, 0), (1.0, 1)])
def test_slerp_ends_are_the_models_in_the_manifests_order(t: float, model: int) -> None:
    deltas = dense(0, 2, 4, 5)
    assert_same(fused(Slerp(method="slerp", t=t), deltas), doubles(deltas)[model])


@pytest.mark.parametrize("second", [[2.0, 0.01], [-2.0, 0.01], [0.0, 0.0]])
def test_slerp_of_nearly_parallel_or_zero_is_a_straight_line(second: list[float]) -> None:
    found = fused(Slerp(method="slerp", t=0.25), of([1.0, 0.0], second))
    torch.testing.assert_close(found, torch.tensor([0.75 + 0.25 * second[0], 0.25 * second[1]]))


def test_slerp_t_follows_the_depth() -> None:
    method = Slerp(method="slerp", t=(0.0, 1.0))
    assert method.coefficients(["a", "b"], Place("q", 0.25)) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize("models", [["a"], ["a", "b", "c"]])
def test_slerp_of_other_than_two_models_is_refused(models: list[str]) -> None:
    with pytest.raises(ManifestError, match="slerp fuses two models"):
        SLERP.coefficients(models, PLACE)


def test_slerp_refuses_weights_and_t_outside_the_models() -> None:
    with pytest.raises(ValidationError, match="no weights"):
        Slerp(method="slerp", weights={"a": 2.0})
    with pytest.raises(ManifestError, match=r"from 0 to 1"):
        Slerp(method="slerp", t=1.5).coefficients(["a", "b"], PLACE)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 9), st.floats(0.0, 1.0))
def test_slerp_is_its_equation(seed: int, size: int, t: float) -> None:
    deltas = dense(seed, 2, size, size)
    one, two = doubles(deltas)
    angle = torch.arccos((one * two).sum() / one.norm() / two.norm())
    expected = (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle)
    assert_same(fused(Slerp(method="slerp", t=t), deltas), expected)


# -- Karcher mean and Multi-SLERP ------------------------------------------------------------------------------------


def spherical(values_M: Sequence[torch.Tensor], shares_M: Sequence[float], steps: int) -> torch.Tensor:
    """The mean direction in the vectors' own space, with the mean length."""
    flat = torch.stack([value.reshape(-1) for value in values_M])
    shares = torch.tensor(shares_M, dtype=torch.float64)
    lengths = flat.norm(dim=1)
    units = flat / lengths[:, None]
    mean = shares @ units
    mean = mean / mean.norm()
    for _ in range(steps):
        tangent = torch.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            across = unit - (unit @ mean) * mean
            if across.norm() > 1e-9:
                tangent += share * torch.atan2(across.norm(), unit @ mean) * across / across.norm()
        if tangent.norm() < 1e-12:
            break
        mean = torch.cos(tangent.norm()) * mean + torch.sin(tangent.norm()) * tangent / tangent.norm()
    return ((shares @ lengths) * mean).view_as(values_M[0])


@pytest.mark.parametrize("method", GRAM[:2])
def test_spherical_mean_by_hand_of_two_orthogonal_vectors(method: AnyFusionMethod) -> None:
    # Halfway between them, and the mean of 2 and 4 long.
    found = fused(method, of([2.0, 0.0], [0.0, 4.0]))
    torch.testing.assert_close(found, torch.full((2,), 3.0 / math.sqrt(2.0)))


@pytest.mark.parametrize("method", GRAM[:2])
def test_spherical_mean_by_hand_counts_a_zero_vector_in_the_length_alone(method: AnyFusionMethod) -> None:
    found = fused(method, of([3.0, 0.0], [0.0, 0.0], [3.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("method", GRAM[:2])
def test_spherical_mean_of_directions_that_cancel_is_the_mean(method: AnyFusionMethod) -> None:
    torch.testing.assert_close(fused(method, of([3.0, 1.5], [-1.0, -0.5])), torch.tensor([1.0, 0.5]))


def test_karcher_of_two_weighted_models_is_their_slerp() -> None:
    """On the arc between two directions, the mean with weights 1 − t and t is at the share t of it."""
    deltas = of([2.0, 0.0, 0.0], [0.6, 1.9, 0.0])
    unit = {n: Dense(d.dense() / d.norm()) for n, d in deltas.items()}
    karcher = Karcher(method="karcher", weights={"m0": 0.7, "m1": 0.3}, max_iter=50, tol=1e-12)
    assert_same(fused(karcher, unit), fused(Slerp(method="slerp", t=0.3), unit).double())


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(2, 8), st.floats(0.1, 5.0))
def test_spherical_means_are_their_equations(seed: int, models: int, size: int, weight: float) -> None:
    deltas = {n: Dense(d.dense() + 1.0) for n, d in dense(seed, models, size, size).items()}
    total = weight + models - 1
    shares = [weight / total] + [1.0 / total] * (models - 1)
    one = MultiSlerp(method="multi_slerp", weights={"m0": weight})
    assert_same(fused(one, deltas), spherical(doubles(deltas), shares, 1))
    many = Karcher(method="karcher", weights={"m0": weight}, max_iter=60, tol=1e-10)
    assert_same(fused(many, deltas), spherical(doubles(deltas), shares, 60))


def test_multi_slerp_of_weights_not_normalised_is_as_long_as_their_sum() -> None:
    """0.5 · 2 + 3 · 4 long, in the direction of the normalised weights."""
    weights = {"m0": 0.5, "m1": 3.0}
    deltas = of([2.0, 0.0], [0.0, 4.0])
    plain = fused(MultiSlerp(method="multi_slerp", weights=weights), deltas)
    found = fused(MultiSlerp(method="multi_slerp", weights=weights, normalize_weights=False), deltas)
    assert float(found.norm()) == pytest.approx(13.0)
    torch.testing.assert_close(found / 13.0, plain / plain.norm())


def test_karcher_stops_at_max_iter_and_at_tol() -> None:
    deltas = of([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 0.9, 0.8])
    few = fused(Karcher(method="karcher", max_iter=1), deltas)
    assert torch.equal(few, fused(GRAM[0], deltas))
    assert not torch.equal(few, fused(GRAM[1], deltas))
    loose = fused(Karcher(method="karcher", tol=2.0), deltas)
    assert_same(loose, spherical(doubles(deltas), [1 / 3] * 3, 0))


# -- model stock -----------------------------------------------------------------------------------------------------


def test_model_stock_by_hand() -> None:
    # cos θ = 0.6, so t = 1.2/1.6.
    found = fused(GRAM[2], of([1.0, 0.0], [3.0, 4.0]))
    torch.testing.assert_close(found, 0.75 * torch.tensor([2.0, 2.0]))


def test_model_stock_of_parallel_models_is_the_mean() -> None:
    torch.testing.assert_close(fused(GRAM[2], of([1.0, 2.0], [2.0, 4.0])), torch.tensor([1.5, 3.0]))


@pytest.mark.parametrize("second", [[0.0, 1.0], [-1.0, 1.0], [-1.0, 0.0]])
def test_model_stock_of_models_that_dont_point_the_same_way_is_zero(second: list[float]) -> None:
    assert torch.equal(fused(GRAM[2], of([1.0, 0.0], second)), torch.zeros(2))


def test_model_stock_of_one_model_and_zeros_is_the_mean() -> None:
    torch.testing.assert_close(fused(GRAM[2], of([4.0, 2.0], [0.0, 0.0])), torch.tensor([2.0, 1.0]))


FILTERS = ModelStock(method="model_stock", filter_wise=True)


def test_model_stock_by_filters_by_hand() -> None:
    # Rows with cos θ of 0.6, 0, 1 and −1, and one that the second model leaves alone.
    one = [[1.0, 0.0], [1.0, 0.0], [1.0, 2.0], [1.0, 1.0], [2.0, 2.0]]
    two = [[3.0, 4.0], [0.0, 5.0], [2.0, 4.0], [-1.0, -1.0], [0.0, 0.0]]
    expected = [[1.5, 1.5], [0.0, 0.0], [1.5, 3.0], [0.0, 0.0], [1.0, 1.0]]
    torch.testing.assert_close(fused(FILTERS, of(one, two)), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(7,), (3, 2, 4)])
def test_model_stock_by_filters_of_a_vector_and_of_a_stack(shape: tuple[int, ...]) -> None:
    """A vector is one filter; a stack of matrices has those of each."""
    deltas = {n: Dense(d.dense() + 1.0) for n, d in dense(2, 3, *shape).items()}
    found = fused(FILTERS, deltas)
    if len(shape) == 1:
        assert_same(found, fused(GRAM[2], deltas).double())
    else:
        for i in range(shape[0]):
            assert_same(found[i], fused(FILTERS, {n: Dense(d.value[i]) for n, d in deltas.items()}).double())


def test_model_stock_by_filters_of_loras_is_that_of_their_products() -> None:
    given_as = loras(4, 3, 6, 5)
    found = fuse(FILTERS, given_as, absent=["c"])
    assert isinstance(found, LowRank)
    products: dict[str, Delta] = {n: Dense(d.dense()) for n, d in given_as.items()}
    assert_same(fused(FILTERS, products, absent=["c"]), found.dense().double(), 1e-5)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 4), st.integers(2, 8))
def test_model_stock_is_its_equation(seed: int, models: int, size: int) -> None:
    deltas = {n: Dense(d.dense() + 1.0) for n, d in dense(seed, models, size, size).items()}
    values_M = doubles(deltas)
    pairs = [(a, b) for i, a in enumerate(values_M) for b in values_M[:i]]
    cosine = sum(float((a * b).sum() / a.norm() / b.norm()) for a, b in pairs) / len(pairs)
    t = max(models * cosine / (1 + (models - 1) * cosine), 0.0) if cosine > 0.0 else 0.0
    assert_same(fused(GRAM[2], deltas), t * torch.stack(values_M).mean(dim=0))


# -- DELLA -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, SIZES, SIZES, st.sampled_from([(0.5, 0.3), (0.85, 0.15), (0.7, 0.0)]))
def test_della_is_its_equation(seed: int, rows: int, columns: int, share: tuple[float, float]) -> None:
    density, epsilon = share
    value = normal(seed, rows, columns)
    method = Della(method="della", density=density, epsilon=epsilon, seed=3, scale=2.0)
    noise = uniform(noise_key(3, "a", PLACE.tensor), 0, rows * columns).view(rows, columns)
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for rank, j in enumerate(sorted(range(columns), key=lambda j: abs(float(value[i, j])))):
            p = density - epsilon + 2 * epsilon * rank / (columns - 1) if columns > 1 else density
            if float(noise[i, j]) < p:
                expected[i, j] = 2.0 * float(value[i, j]) / p
    assert_same(fused(method, {"a": Dense(value)}), expected)


def test_della_keeps_large_entries_likelier_and_the_mean_stays() -> None:
    value = torch.tensor([0.1, -0.2, 0.3, -0.4])
    seeds = 2000
    draws = torch.stack(
        [fused(Della(method="della", density=0.6, epsilon=0.3, seed=s), {"a": Dense(value)}) for s in range(seeds)]
    )
    probabilities = torch.tensor([0.3, 0.5, 0.7, 0.9])
    # Five standard errors of a share over 2000 draws are at most 0.056.
    torch.testing.assert_close((draws != 0.0).float().mean(dim=0), probabilities, atol=0.056, rtol=0.0)
    errors = value.abs() * ((1 - probabilities) / probabilities / seeds).sqrt()
    assert bool(((draws.mean(dim=0) - value).abs() < 5 * errors).all())


def test_della_ranks_a_vector_as_one_row_and_equal_entries_in_their_order() -> None:
    method = Della(method="della", density=0.5, epsilon=0.4)
    value = torch.full((7,), 2.0)
    p = torch.linspace(0.1, 0.9, 7)
    keep = uniform(noise_key(0, "a", PLACE.tensor), 0, 7) < p
    torch.testing.assert_close(fused(method, {"a": Dense(value)}), torch.where(keep, 2.0 / p, 0.0))


def test_della_sums_what_agrees_with_the_elected_sign() -> None:
    method = Della(method="della", density=1.0, epsilon=0.0)
    found = fused(method, of([1.0, 2.0, -3.0], [4.0, -5.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([5.0, -5.0, 0.0]))


def test_della_density_by_model_is_that_of_one_density_and_1_keeps_everything() -> None:
    method = Della(method="della", density={"m0": 0.5, "m1": (0.6, 0.8), "m3": 1.0}, consensus="none", epsilon=0.2)
    deltas = dense(7, 4, 6, 5)
    parts = [
        fused(Della(method="della", density=density, consensus="none", epsilon=0.2), {name: deltas[name]})
        for name, density in (("m0", 0.5), ("m1", 0.7))
    ]
    assert_same(fused(method, deltas), sum([*parts, *doubles(deltas)[2:]], torch.zeros(())).double())


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), ((0.5, 1.0), 0.15), (0.15, 0.15)])
def test_della_refuses_what_is_no_probability(density: float | tuple[float, ...], epsilon: float) -> None:
    with pytest.raises(ValidationError, match="epsilon"):
        Della(method="della", density=density, epsilon=epsilon)


# -- consensus merging -----------------------------------------------------------------------------------------------


def test_consensus_by_hand() -> None:
    method = Consensus(method="consensus", mask_scale=0.5, scale=2.0)
    # Masks |τ| ≥ 0.5 |Σ − τ|: both need the first, one the second, neither is left with the third: 3 − 3.
    found = fused(method, of([1.0, 5.0, 3.0, 0.0], [2.0, 1.0, -3.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([6.0, 0.0, 0.0, 0.0]))


def test_consensus_of_one_is_what_any_model_needs() -> None:
    method = Consensus(method="consensus", mask_scale=0.5, scale=1.0, models_needed=1)
    torch.testing.assert_close(fused(method, of([1.0, 5.0], [2.0, 1.0])), torch.tensor([3.0, 6.0]))


@settings(max_examples=40, deadline=None)
@given(SEEDS, MODELS, SIZES, st.integers(1, 4), st.sampled_from([0.2, 0.4, 1.0]))
def test_consensus_is_its_equation(seed: int, models: int, size: int, needed: int, mask_scale: float) -> None:
    deltas = {n: Dense((d.dense() * 8).round()) for n, d in dense(seed, models, size, size).items()}
    method = Consensus(
        method="consensus", models_needed=needed, mask_scale=mask_scale + 0.01, scale=0.5, weights={"m0": 3.0}
    )
    values_M = doubles(deltas)
    total = sum((v * w for v, w in zip(values_M, [3.0, 1.0, 1.0, 1.0], strict=False)), torch.zeros(()).double())
    votes = sum((v.abs() >= (mask_scale + 0.01) * (total - v).abs()).int() for v in values_M)
    assert_same(fused(method, deltas), 0.5 * total * (votes >= min(needed, models)))


# -- SCE -------------------------------------------------------------------------------------------------------------


def test_sce_by_hand_selects_weights_and_erases() -> None:
    # Variances 1, 25, 0, 9; the half with 25 and 9 stays. Squared sums there 36 + 1 and 16 + 25.
    found = fused(Sce(method="sce", select=0.5), of([3.0, 6.0, 2.0, 1.0], [1.0, -4.0, 2.0, -5.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 6.0, 0.0, -5.0]))


def test_sce_by_hand_averages_with_the_squared_sums() -> None:
    found = fused(SPARSE[2], of([3.0, 1.0], [1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([(30.0 + 5.0) / 15.0, (10.0 + 10.0) / 15.0]))


@settings(max_examples=40, deadline=None)
@given(SEEDS, MODELS, SIZES, SIZES, st.sampled_from([0.1, 0.5, 1.0]))
def test_sce_is_its_equation(seed: int, models: int, rows: int, columns: int, select: float) -> None:
    deltas = dense(seed, models, rows, columns)
    weights = [2.0, 1.0, 1.0, 1.0][:models]
    values = torch.stack(doubles(deltas))
    if models > 1:
        variance = values.var(dim=0, correction=0)
        count = max(round(select * variance.numel()), 1)
        values = values * (variance >= variance.flatten().sort(descending=True).values[count - 1])
    weighted = values * torch.tensor(weights).double().view(-1, 1, 1)
    agrees = torch.sign(weighted) * torch.sign(weighted.sum(dim=0)) > 0
    shares = values.square().sum(dim=(1, 2), keepdim=True)
    divisor = (agrees * shares * torch.tensor(weights).view(-1, 1, 1)).sum(dim=0)
    expected = (agrees * weighted * shares).sum(dim=0) / torch.where(divisor > 0, divisor, 1.0)
    assert_same(fused(Sce(method="sce", select=select, weights={"m0": 2.0}), deltas), expected)


# -- KnOTS -----------------------------------------------------------------------------------------------------------


def test_knots_by_hand_of_task_vectors_with_the_same_rows() -> None:
    # One shared direction, so TIES sees 5·(1, 2) and 5·(3, −4) along it.
    deltas = of([[3.0, 6.0], [4.0, 8.0]], [[9.0, -12.0], [12.0, -16.0]])
    expected = torch.tensor([[3.0 * 2, 3.0 * -4], [4.0 * 2, 4.0 * -4]])
    torch.testing.assert_close(fused(MATRIX[0], deltas), expected, rtol=1e-5, atol=1e-5)


def test_knots_small_task_vectors_are_not_cut() -> None:
    deltas = {n: Dense(d.dense() * 1e-9) for n, d in dense(0, 1, 5, 4).items()}
    assert_same(fused(MATRIX[0], deltas), doubles(deltas)[0])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([dense, loras]),
    SEEDS,
    st.integers(1, 3),
    SIZES,
    SIZES,
    st.sampled_from([0.3, 1.0]),
    st.sampled_from(["sum", "mean"]),
)
def test_knots_is_ties_in_the_shared_basis(
    make: Callable[..., dict[str, Delta]],
    seed: int,
    models: int,
    d_out: int,
    d_in: int,
    density: float,
    consensus: str,
) -> None:
    deltas = make(seed, models, d_out, d_in)
    values_M = doubles(deltas)
    left, values, right = torch.linalg.svd(torch.cat(values_M, dim=1), full_matrices=False)
    rank = int((values > 1e-5 * values[0]).sum())
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    parts = torch.stack((values[:, None] * right).split(d_in, dim=1))
    for t in range(models):
        magnitudes = parts[t].abs()
        count = max(round(density * magnitudes.numel()), 1)
        parts[t] *= magnitudes >= magnitudes.flatten().sort(descending=True).values[count - 1] * (1 - 1e-12)
    agrees = torch.sign(parts) * torch.sign(parts.sum(dim=0)) > 0
    merged = (parts * agrees).sum(dim=0)
    if consensus == "mean":
        merged = merged / agrees.sum(dim=0).clamp(min=1)
    found = fused(Knots.model_validate({"method": "knots", "density": density, "consensus": consensus}), deltas)
    assert_same(found, left @ merged, 1e-4)


# -- TSV-M -----------------------------------------------------------------------------------------------------------


def test_tsv_by_hand_keeps_the_leading_triplets_and_their_weights() -> None:
    deltas = of(
        [[9.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0] * 4],
        [[0.0] * 4, [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 3.0]],
    )
    found = fused(Tsv(method="tsv", weights={"m1": 2.0}), deltas)
    torch.testing.assert_close(found, torch.diag(torch.tensor([9.0, 5.0, 8.0, 6.0])))


@pytest.mark.parametrize("deltas", [dense(0, 1, 8, 6), loras(0, 1, 8, 6)])
def test_tsv_of_the_same_task_vector_twice_invents_no_direction(deltas: dict[str, Delta]) -> None:
    found = fused(MATRIX[1], {"a": deltas["m0"], "b": deltas["m0"]})
    left, values, right = torch.linalg.svd(doubles(deltas)[0], full_matrices=False)
    assert_same(found, (left[:, :3] * values[:3]) @ right[:3])


@settings(max_examples=40, deadline=None)
@given(SEEDS, MODELS, st.integers(4, 9), st.integers(4, 9))
def test_tsv_is_its_equation(seed: int, models: int, d_out: int, d_in: int) -> None:
    deltas = dense(seed, models, d_out, d_in)
    k = min(d_out, d_in) // models
    parts_M = [torch.linalg.svd(value, full_matrices=False) for value in doubles(deltas)]

    def whitened(columns: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(columns.T @ columns)
        return columns @ (vectors / values.sqrt()) @ vectors.T

    left = whitened(torch.cat([u[:, :k] for u, _, _ in parts_M], dim=1))
    right = whitened(torch.cat([v[:k].T for _, _, v in parts_M], dim=1))
    values = torch.cat([s[:k] for _, s, _ in parts_M])
    assert_same(fused(Tsv(method="tsv", scale=0.5), deltas), 0.5 * (left * values) @ right.T, 1e-3)


# -- Iso-C -----------------------------------------------------------------------------------------------------------


def test_iso_by_hand_flattens_the_support_alone() -> None:
    deltas = of([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [[-1.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    torch.testing.assert_close(fused(MATRIX[2], deltas), torch.tensor([[3.0, 0.0, 0.0], [0.0, -3.0, 0.0]]))
    torch.testing.assert_close(fused(MATRIX[2], of([[8.0, 0.0], [0.0, 0.0]])), torch.tensor([[8.0, 0.0], [0.0, 0.0]]))


@settings(max_examples=40, deadline=None)
@given(SEEDS, MODELS, SIZES, SIZES)
def test_iso_is_its_equation(seed: int, models: int, d_out: int, d_in: int) -> None:
    deltas = dense(seed, models, d_out, d_in)
    total = sum(doubles(deltas), torch.zeros(()).double()) + doubles(deltas)[0]
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    found = fused(Iso(method="iso", scale=0.5, weights={"m0": 2.0}), deltas)
    assert_same(found, 0.5 * values.mean() * left @ right, 1e-3)
