from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.masks.granularity import MASKS, Granularity, Part

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(2, 12)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(seed: int, d_out: int, d_in: int, rank: int) -> LowRank:
    return LowRank(normal(seed, d_out, rank), normal(seed + 1, rank, d_in))


def ones(mask: Granularity, delta: Delta, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full(part.shape, value) for name, part in MASKS[mask].parts(delta).items()}


def drawn(mask: Granularity, delta: Delta, seed: int) -> dict[str, torch.Tensor]:
    parts = MASKS[mask].parts(delta).items()
    return {name: normal(seed + i, *part.shape).abs() for i, (name, part) in enumerate(parts)}


# -- all four --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "parts"),
    [
        ("dense", {"entries": Part((5, 7), True)}),
        ("rows_and_columns", {"rows": Part((5,), True), "columns": Part((7,), False)}),
        ("rank", {"components": Part((3,), False)}),
        ("factor", {"b": Part((5, 3), True), "a": Part((3, 7), False)}),
    ],
)
def test_mask_parts_of_a_lora(mask: Granularity, parts: dict[str, Part]) -> None:
    delta = lora(0, 5, 7, 3)
    assert MASKS[mask].parts(delta) == parts
    sizes = MASKS[mask].sizes(MASKS[mask].prepared(delta))
    assert {name: tuple(size.shape) for name, size in sizes.items()} == {n: p.shape for n, p in parts.items()}


def test_mask_parts_of_a_vector() -> None:
    delta = Dense(normal(0, 5))
    assert MASKS["dense"].parts(delta) == {"entries": Part((5,), True)}
    assert MASKS["rows_and_columns"].parts(delta) == {"rows": Part((5,), True)}
    assert torch.equal(MASKS["rows_and_columns"].sizes(delta)["rows"], delta.value.abs())


@pytest.mark.parametrize("mask", ["dense", "rows_and_columns", "rank", "factor"])
@settings(deadline=None, max_examples=20)
@given(SIZES, SIZES, st.integers(1, 5), SEEDS)
def test_mask_of_ones_leaves_the_task_vector_as_it_was(
    mask: Granularity, d_out: int, d_in: int, rank: int, seed: int
) -> None:
    delta = lora(seed, d_out, d_in, rank)
    prepared = MASKS[mask].prepared(delta)
    for form in (prepared, MASKS[mask].masked(prepared, ones(mask, prepared), None)):
        torch.testing.assert_close(form.dense(), delta.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", ["dense", "rows_and_columns", "rank", "factor"])
def test_mask_of_zeros_is_the_aligned_model(mask: Granularity) -> None:
    prepared = MASKS[mask].prepared(lora(0, 5, 7, 3))
    assert not bool(MASKS[mask].masked(prepared, ones(mask, prepared, 0.0), None).dense().any())


@pytest.mark.parametrize(("mask", "is_lora"), [("dense", False), ("rows_and_columns", True), ("rank", True),
                                               ("factor", True)])  # fmt: skip
def test_mask_that_keeps_a_lora_a_lora(mask: Granularity, is_lora: bool) -> None:
    prepared = MASKS[mask].prepared(lora(0, 5, 7, 3))
    found = MASKS[mask].masked(prepared, drawn(mask, prepared, 1), None)
    assert isinstance(found, LowRank) == is_lora
    assert not isinstance(found, LowRank) or found.rank == 3


@pytest.mark.parametrize("mask", ["dense", "rows_and_columns", "rank", "factor"])
def test_mask_of_some_rows_is_those_rows_of_the_whole(mask: Granularity) -> None:
    whole = MASKS[mask].prepared(lora(0, 6, 7, 3))
    origin = lora(5, 6, 7, 3) if mask == "factor" else None
    factors = drawn(mask, whole, 1)
    rows = slice(2, 5)
    cut = LowRank(whole.b[rows], whole.a) if isinstance(whole, LowRank) else Dense(whole.dense()[rows])
    parts = MASKS[mask].parts(whole)
    own = {name: factors[name][rows] if part.by_row else factors[name] for name, part in parts.items()}
    found = MASKS[mask].masked(cut, own, LowRank(origin.b[rows], origin.a) if origin else None)
    torch.testing.assert_close(found.dense(), MASKS[mask].masked(whole, factors, origin).dense()[rows])


@pytest.mark.parametrize("mask", ["dense", "rows_and_columns", "rank", "factor"])
def test_mask_gradient_reaches_every_part(mask: Granularity) -> None:
    prepared = MASKS[mask].prepared(lora(0, 5, 7, 3))
    factors = {name: value.requires_grad_() for name, value in drawn(mask, prepared, 1).items()}
    MASKS[mask].masked(prepared, factors, None).dense().square().sum().backward()
    for value in factors.values():
        assert value.grad is not None and bool((value.grad != 0.0).all())


# -- by hand ---------------------------------------------------------------------------------------------------------

BY_HAND = LowRank(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]]))
"""ΔW = [[1, 2, 0], [2, 5, -1]]."""


def test_dense_mask_by_hand() -> None:
    entries = torch.tensor([[2.0, 0.0, 1.0], [0.5, 1.0, 3.0]])
    found = MASKS["dense"].masked(BY_HAND, {"entries": entries}, None).dense()
    assert torch.equal(found, torch.tensor([[2.0, 0.0, 0.0], [1.0, 5.0, -3.0]]))


@pytest.mark.parametrize("delta", [BY_HAND, Dense(BY_HAND.dense())])
def test_rows_and_columns_mask_by_hand(delta: Delta) -> None:
    parts = {"rows": torch.tensor([1.0, 2.0]), "columns": torch.tensor([3.0, 0.0, 1.0])}
    found = MASKS["rows_and_columns"].masked(delta, parts, None).dense()
    assert torch.equal(found, torch.tensor([[3.0, 0.0, 0.0], [12.0, 0.0, -2.0]]))


def test_rows_and_columns_mask_of_a_vector_by_hand() -> None:
    found = MASKS["rows_and_columns"].masked(Dense(torch.tensor([3.0, 4.0])), {"rows": torch.tensor([0.0, 2.0])}, None)
    assert torch.equal(found.dense(), torch.tensor([0.0, 8.0]))


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 4), (3, 3, 3)])
def test_rows_and_columns_mask_of_stacked_experts_is_that_of_each(shape: tuple[int, ...]) -> None:
    mask, stack = MASKS["rows_and_columns"], Dense(normal(0, *shape))
    experts, d_out, d_in = shape
    assert mask.parts(stack) == {"rows": Part((experts, d_out), True), "columns": Part((experts, d_in), True)}
    factors, sizes = drawn("rows_and_columns", stack, 1), mask.sizes(stack)
    whole = mask.masked(stack, factors, None).dense()
    for expert in range(experts):
        one = Dense(stack.value[expert])
        mine = {name: value[expert] for name, value in factors.items()}
        assert torch.equal(whole[expert], mask.masked(one, mine, None).dense())
        for name, size in mask.sizes(one).items():
            torch.testing.assert_close(sizes[name][expert], size)


def test_rank_mask_by_hand_keeps_the_components_it_names() -> None:
    """ΔW = 12 e₂e₂ᵀ + 4 e₀e₀ᵀ: the larger component is the first logit's, whatever the factors' order."""
    delta = LowRank(torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 12.0]]), torch.eye(3)[[0, 2]])
    prepared = MASKS["rank"].prepared(delta)
    torch.testing.assert_close(MASKS["rank"].sizes(prepared)["components"], torch.tensor([12.0, 4.0]))
    found = MASKS["rank"].masked(prepared, {"components": torch.tensor([0.5, 2.0])}, None).dense()
    torch.testing.assert_close(found, torch.diag(torch.tensor([8.0, 0.0, 6.0])), rtol=0.0, atol=1e-5)


def test_factor_mask_by_hand() -> None:
    parts = {"b": torch.tensor([[1.0, 1.0], [0.0, 2.0]]), "a": torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 3.0]])}
    found = MASKS["factor"].masked(BY_HAND, parts, None).dense()
    assert torch.equal(found, torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, -6.0]]))


def test_mask_sizes_by_hand() -> None:
    entries, rows = MASKS["dense"].sizes(BY_HAND)["entries"], MASKS["rows_and_columns"].sizes(BY_HAND)
    assert torch.equal(entries, torch.tensor([[1.0, 2.0, 0.0], [2.0, 5.0, 1.0]]))
    torch.testing.assert_close(rows["rows"].square(), torch.tensor([5.0, 30.0]))
    torch.testing.assert_close(rows["columns"].square(), torch.tensor([5.0, 29.0, 1.0]))
    factors = MASKS["factor"].sizes(BY_HAND)
    assert torch.equal(factors["b"], BY_HAND.b) and torch.equal(factors["a"], BY_HAND.a.abs())


# -- gauges ----------------------------------------------------------------------------------------------------------


def other_gauge(delta: LowRank, seed: int) -> LowRank:
    """The same ΔW as (BG, G⁻¹A)."""
    gauge = torch.linalg.qr(normal(seed, delta.rank, delta.rank)).Q @ torch.diag(torch.linspace(0.5, 2.0, delta.rank))
    return LowRank(delta.b @ gauge, torch.linalg.solve(gauge, delta.a))


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 4), SEEDS)
def test_rank_mask_is_the_same_in_every_gauge(d_out: int, d_in: int, rank: int, seed: int) -> None:
    # Singular values are kept apart, so that each component is one direction.
    left, right = (torch.linalg.qr(normal(seed + i, n, rank)).Q for i, n in enumerate((d_out, d_in)))
    one = LowRank(left * torch.arange(rank, 0, -1.0), right.T)
    two = other_gauge(one, seed + 2)
    torch.testing.assert_close(one.dense(), two.dense(), rtol=1e-3, atol=1e-4)
    factors = {"components": normal(seed + 3, rank).abs()}
    mask = MASKS["rank"]
    found = [mask.masked(mask.prepared(d), factors, None).dense() for d in (one, two)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0], (left * torch.arange(rank, 0, -1.0) * factors["components"]) @ right.T,
                               rtol=1e-3, atol=1e-3)  # fmt: skip


def test_rank_mask_prepared_factors_are_orthogonal_in_order_of_size_and_contiguous() -> None:
    prepared = MASKS["rank"].prepared(lora(0, 9, 7, 4))
    assert isinstance(prepared, LowRank)
    assert prepared.b.is_contiguous() and prepared.a.is_contiguous()
    assert prepared.b.dtype == prepared.a.dtype == torch.float32
    torch.testing.assert_close(prepared.a @ prepared.a.T, torch.eye(4), rtol=0.0, atol=1e-5)
    gram = prepared.b.T @ prepared.b
    torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0.0, atol=1e-4)
    assert gram.diag().tolist() == sorted(gram.diag().tolist(), reverse=True)


def test_rank_mask_of_a_lora_wider_than_its_matrix_has_the_matrixs_components() -> None:
    delta = lora(0, 3, 8, 5)
    prepared = MASKS["rank"].prepared(delta)
    assert MASKS["rank"].parts(prepared) == {"components": Part((3,), False)}
    torch.testing.assert_close(prepared.dense(), delta.dense(), rtol=1e-4, atol=1e-4)


def test_factor_mask_is_another_in_another_gauge() -> None:
    """Why it means something only for adapters that started from one pair of factors."""
    one = lora(0, 6, 5, 3)
    two = other_gauge(one, 9)
    factors = drawn("factor", one, 4)
    found = [MASKS["factor"].masked(d, factors, None).dense() for d in (one, two)]
    assert float((found[0] - found[1]).norm()) > 0.1 * float(found[0].norm())


# -- reverting to a safety adapter -----------------------------------------------------------------------------------


def test_factor_mask_reverts_to_its_origin() -> None:
    model, origin = lora(0, 6, 5, 3), lora(7, 6, 5, 3)
    mask = MASKS["factor"]
    assert torch.equal(mask.masked(model, ones("factor", model, 0.0), origin).dense(), origin.dense())
    torch.testing.assert_close(mask.masked(model, ones("factor", model), origin).dense(), model.dense())
    mixed = mask.masked(model, {"b": torch.ones(6, 3), "a": torch.zeros(3, 5)}, origin)
    torch.testing.assert_close(mixed.dense(), model.b @ origin.a)


def test_factor_mask_multiplies_what_moved_from_its_origin() -> None:
    origin = LowRank(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 1.0]]))
    model = LowRank(torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0, 3.0]]))
    parts = {"b": torch.tensor([[2.0], [5.0]]), "a": torch.tensor([[5.0, 0.5]])}
    found = MASKS["factor"].masked(model, parts, origin).dense()
    assert torch.equal(found, torch.tensor([[3.0, 6.0], [1.0, 2.0]]))  # b = (3, 1), a = (1, 2)
