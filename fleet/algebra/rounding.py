"""What is left of an edit once the weights it was made to are rounded to the dtype of their file."""

from __future__ import annotations

import math

import torch

from fleet.algebra import linalg

NORM_TOLERANCE = 1e-3
"""Up to this share of it, the norm of what is stored counts as the one that was asked for."""

_ATTEMPTS = 8


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values that a file of this dtype holds: float32."""
    return weight.to(dtype).float()


def stored_with_norm(
    before: torch.Tensor, edit: torch.Tensor, norm: float, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """before + c·edit as a file of this dtype holds it, c such that the change has this norm there: float32.

    Rounding drops what is less than half a step of the dtype and enlarges what is more, so an edit has another norm
    once it is stored. c is searched from 1 on, between one that gives too little and one that gives too much. The norm
    may jump from one to the other: if ΔW is a step or two of the dtype, scaling it moves many entries at once. Then
    entries are taken from the two at random, as many of each as give the norm.

    Args:
        before: float32.
        edit: of the norm that is asked for before rounding, or of none.
        generator: draws which entries are taken.
    """
    too_little, too_much = rounded(before, dtype), None
    low, high, factor = 0.0, math.inf, 1.0
    for _ in range(_ATTEMPTS):
        stored = rounded(before + factor * edit, dtype)
        found = linalg.norm(stored - before)
        if abs(found - norm) <= NORM_TOLERANCE * norm:
            return stored
        if found < norm:
            low, too_little = factor, stored
        else:
            high, too_much = factor, stored
        guess = factor * norm / found if found else math.inf
        factor = guess if low < guess < high else 2.0 * factor if math.isinf(high) else (low + high) / 2.0
    if too_much is None:
        return too_little
    little, much = (linalg.norm(stored - before) ** 2 for stored in (too_little, too_much))
    if much <= norm**2 or little >= norm**2:  # rounding alone, without an edit, changes the weights by more
        return too_little
    share = (norm**2 - little) / (much - little)
    return torch.where(torch.rand(before.shape, generator=generator) < share, too_much, too_little)
