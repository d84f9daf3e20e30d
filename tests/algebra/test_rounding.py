"""Edits as a file's dtype holds them."""

from __future__ import annotations

import pytest
import torch

from fleet.algebra.rounding import NORM_TOLERANCE, rounded, stored_with_norm


def small_edit(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 weights between 1 and 2, whose steps are 1/128, and an edit of a few such steps times `scale`."""
    generator = torch.Generator().manual_seed(0)
    weights = (1.0 + torch.rand(64, 64, generator=generator)).bfloat16().float()
    return weights, scale * torch.randn(64, 64, generator=generator) / 128


def test_rounded_drops_less_than_half_a_step() -> None:
    weights = torch.tensor([1.0, 1.0 + 1 / 300, 1.0 + 1 / 200])
    assert torch.equal(rounded(weights, torch.bfloat16), torch.tensor([1.0, 1.0, 1.0 + 1 / 128]))
    assert torch.equal(rounded(weights, torch.float32), weights)


def test_stored_edit_has_the_norm_asked_for_where_plain_rounding_misses_it() -> None:
    for scale in (0.3, 1.0, 3.0):
        weights, edit = small_edit(scale)
        asked = float(edit.double().norm())
        plain = float((rounded(weights + edit, torch.bfloat16) - weights).double().norm())
        stored = stored_with_norm(weights, edit, asked, torch.bfloat16, torch.Generator())
        assert torch.equal(stored, rounded(stored, torch.bfloat16))
        assert abs(float((stored - weights).double().norm()) / asked - 1.0) <= 5 * NORM_TOLERANCE
        assert scale == 3.0 or abs(plain / asked - 1.0) > 0.01


def test_stored_edit_of_float32_is_the_edit() -> None:
    weights, edit = small_edit(1.0)
    found = stored_with_norm(weights, edit, float(edit.double().norm()), torch.float32, torch.Generator())
    assert torch.equal(found, weights + edit)


def test_stored_edit_without_a_direction_changes_nothing() -> None:
    weights, edit = small_edit(0.0)
    assert torch.equal(stored_with_norm(weights, edit, 1.0, torch.bfloat16, torch.Generator()), weights)


def test_stored_norm_is_met_where_scaling_moves_all_entries_at_once() -> None:
    """Each entry moves by one step or by none: of one factor for all, the norm is that of none or of 4096 steps."""
    weights = torch.ones(64, 64)
    for size in (1.0, 0.3):  # in steps: without a search all entries move, or none
        edit = torch.full((64, 64), size / 128)
        found = stored_with_norm(weights, edit, 32 / 128, torch.bfloat16, torch.Generator().manual_seed(0))
        moved = (found - weights) * 128
        assert set(moved.unique().tolist()) == {0.0, 1.0}
        assert float(moved.sum()) == pytest.approx(32**2, rel=0.1), "the square of the norm, in steps"
