"""Products whose bits follow from the operands' values and shapes alone."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import fleet
from fleet.algebra import products, spectral
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.products import PANEL, Side, aligned, beside, dot, product, row_ranges
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import leading_directions, squared_singular_values
from fleet.algebra.statistics import Asked, Displacement, delta_statistics

SEEDS = st.integers(0, 2**31 - 1)
OFFSETS = st.sampled_from([0, 1, 2, 3, 4, 8, 15, 16])
"""Numbers that memory begins after, counted from a multiple of 64 bytes."""


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(tensor: torch.Tensor, offset: int, padding: int = 0) -> torch.Tensor:
    """The same matrix elsewhere: so many numbers after an aligned address, with so many between its rows."""
    rows, columns = tensor.shape
    memory = torch.empty(offset + rows * (columns + padding), dtype=tensor.dtype)
    view = memory[offset:].view(rows, columns + padding)[:, :columns]
    return view.copy_(tensor)


def test_aligned_copies_only_what_lies_otherwise() -> None:
    matrix = normal(0, 4, 6)
    assert aligned(matrix) is matrix
    for view in (matrix[1:], matrix.T, matrix[:, :3], normal(1, 17)[1:].view(4, 4), normal(2, 2, 9)[:, :1]):
        found = aligned(view)
        assert found.data_ptr() % 64 == 0 and found.is_contiguous() and torch.equal(found, view)


@settings(deadline=None, max_examples=80)
@given(SEEDS, st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), OFFSETS, OFFSETS, st.integers(0, 5))
def test_product_has_the_same_bits_wherever_operands_lie(
    seed: int, m: int, k: int, n: int, at_left: int, at_right: int, padding: int
) -> None:
    for dtype in (torch.float32, torch.float64):
        left, right = normal(seed, m, k).to(dtype), normal(seed + 1, k, n).to(dtype)
        elsewhere = placed(left, at_left, padding), placed(right.T, at_right, padding).T
        assert torch.equal(product(left, right), product(*elsewhere))
        assert torch.equal(dot(left, left), dot(elsewhere[0], elsewhere[0]))


def test_product_is_differentiable_through_a_copy() -> None:
    left = normal(0, 3, 4).T.requires_grad_()
    product(left, torch.ones(3, 2)).sum().backward()
    assert left.grad is not None and left.grad.tolist() == [[2.0] * 3] * 4


def test_row_ranges_follow_from_the_shape_in_multiples_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "BLOCK_ENTRIES", 1000)
    assert row_ranges(70, 25) == [(0, 32), (32, 64), (64, 70)]
    assert row_ranges(3, 400) == [(0, 2), (2, 3)], "rows so long that sixteen don't fit"
    assert row_ranges(2, 5000) == [(0, 1), (1, 2)]
    assert row_ranges(0, 5) == row_ranges(0, 0) == []


@pytest.mark.parametrize("columnwise", [True, False], ids=["at once", "panel by panel"])
@pytest.mark.parametrize("side", ["left", "right"])
@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 90), st.integers(1, 90), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_beside_others_a_models_columns_have_the_bits_they_have_alone(
    side: Side, columnwise: bool, seed: int, m: int, k: int, widths: Sequence[int]
) -> None:
    matrix = normal(seed, *((m, k) if side == "left" else (k, m)))
    columns = normal(seed + 1, k, sum(widths))
    with pytest.MonkeyPatch.context() as patch:
        if not columnwise:
            patch.setattr(products, "_is_columnwise", lambda *_: False)
        together = beside(side, matrix, columns, widths).split(list(widths), dim=1)
        for found, own in zip(together, columns.split(list(widths), dim=1), strict=True):
            assert torch.equal(found, beside(side, matrix, own, [own.shape[1]]))
            expected = (matrix if side == "left" else matrix.T).double() @ own.double()
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_product_whose_columns_differ_by_where_they_stand_is_made_panel_by_panel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a kernel would that adds up in another order at its edge: here by the last bit, beyond the first panel."""
    honest = products._multiplied

    def uneven(side: Side, matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        found = honest(side, matrix, columns).clone()
        found[:, PANEL:] *= 1.0 + 2.0**-22
        return found

    monkeypatch.setattr(products, "_multiplied", uneven)
    products._is_columnwise.cache_clear()
    matrix, columns = normal(0, 30, 20), normal(1, 20, 50)
    found = beside("left", matrix, columns, [20, 30])
    products._is_columnwise.cache_clear()
    for start, stop in ((0, 16), (16, 20), (20, 36), (36, 50)):
        panel = torch.nn.functional.pad(columns[:, start:stop], (0, PANEL - stop + start))
        assert torch.equal(found[:, start:stop], product(matrix, panel)[:, : stop - start])


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 60), st.integers(1, 60), st.lists(st.integers(1, 20), min_size=2, max_size=5), OFFSETS)
def test_statistics_are_the_same_bits_alone_and_beside_others_and_wherever_v_lies(
    seed: int, d_out: int, d_in: int, ranks: Sequence[int], offset: int
) -> None:
    v = normal(seed, d_out, d_in)
    deltas: dict[str, Delta] = {
        f"m{i}": LowRank(normal(seed + 2 * i, d_out, r), normal(seed + 2 * i + 1, r, d_in)) for i, r in enumerate(ranks)
    }
    deltas["full"] = Dense(normal(seed + 99, d_out, d_in))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "BLOCK_ENTRIES", 700)
        norm = float(v.double().norm())
        spectrum = squared_singular_values(RowBlocks.of(v))
        for _ in range(3):
            assert torch.equal(squared_singular_values(RowBlocks.of(placed(v, offset))), spectrum)
        own, moved = (Displacement(RowBlocks.of(x), lambda: norm, spectrum) for x in (v, placed(v, offset)))
        everything, little = Asked(True, True, True), Asked(True)
        together = delta_statistics(moved, deltas, dict.fromkeys(deltas, everything))
        for name, delta in deltas.items():
            assert delta_statistics(own, {name: delta}, {name: everything})[name] == together[name]
            without = delta_statistics(own, {name: delta}, {name: little})[name]
            assert (without.lift, without.cosine) == (together[name].lift, together[name].cosine)


@settings(deadline=None, max_examples=10)
@given(SEEDS, st.integers(40, 90), st.integers(40, 90), OFFSETS)
def test_leading_directions_have_the_same_bits_wherever_v_lies(seed: int, d_out: int, d_in: int, offset: int) -> None:
    v = normal(seed, d_out, d_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "BLOCK_ENTRIES", 700)
        patch.setattr(spectral, "KRYLOV_OVERSAMPLING", 2)  # so that matrices of this size are iterated
        here, there = (
            leading_directions(RowBlocks.of(x), 2, torch.Generator().manual_seed(0)) for x in (v, placed(v, offset))
        )
    assert all(torch.equal(x, y) for x, y in zip(here, there, strict=True))


@pytest.mark.parametrize("room", ["algebra", "fusion", "methods", "work", "checkpoint"])
def test_every_product_goes_through_the_one_module(room: str) -> None:
    """No `@`, and none of torch's products by name: their bits follow addresses and shapes."""
    assert fleet.__file__ is not None
    root = Path(fleet.__file__).parent / room
    files = [root] if root.is_file() else [f for f in root.rglob("*.py") if f.name != "products.py"]
    named = {"matmul", "mm", "bmm", "mv", "addmm", "addmm_", "einsum", "inner", "vdot", "tensordot"}
    found: list[str] = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            is_torch = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name)
            if (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)) or (
                is_torch and called.value.id == "torch" and called.attr in {*named, "dot"}
            ):
                found.append(f"{file.name}:{node.lineno}")
    assert not found
