"""Inner products of whole tensors, in float64: they square the condition number. Differentiable.

Autograd by itself would keep a float64 copy of every tensor until the backward pass. The gradients of inner products
are the tensors themselves, so these functions keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from fleet.algebra.delta import LowRank
from fleet.algebra.products import product

_CHUNK = 1 << 17
"""How many entries of each tensor are in float64 at once."""


def gram(values_M: Sequence[torch.Tensor]) -> torch.Tensor:
    """⟨x_s, x_t⟩ of vectors (n,), floating: (T, T) float64."""
    apply = cast("Callable[..., torch.Tensor]", _Gram.apply)  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
    return apply(*values_M)


def squares(values_M: Sequence[torch.Tensor]) -> torch.Tensor:
    """‖x_t‖² of tensors of any shape, floating: (T,) float64."""
    apply = cast("Callable[..., torch.Tensor]", _Squares.apply)  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
    return apply(*values_M)


def gram_of_factors(factors_M: Sequence[LowRank]) -> torch.Tensor:
    """⟨B_sA_s, B_tA_t⟩ = tr((B_sᵀB_t)(A_tA_sᵀ)): (T, T) float64."""
    b_M = [factors.b.double() for factors in factors_M]
    a_M = [factors.a.double() for factors in factors_M]
    pairs = [
        [(product(b.T, d) * product(a, c.T)).sum() for d, c in zip(b_M, a_M, strict=True)]
        for b, a in zip(b_M, a_M, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in pairs])


def row_grams(values_M: Sequence[torch.Tensor]) -> torch.Tensor:
    """⟨row_s, row_t⟩ in every row of matrices (rows, columns), floating: (rows, T, T) float64."""
    return torch.cat([_row_grams(chunk) for chunk in zip(*(_by_rows(v) for v in values_M), strict=True)])


def row_grams_of_factors(factors_M: Sequence[LowRank]) -> torch.Tensor:
    """The same of B_sA_s and B_tA_t, whose rows are b A: (d_out, T, T) float64."""
    b_M = [factors.b.double() for factors in factors_M]
    a_M = [factors.a.double() for factors in factors_M]
    pairs = [
        [(product(b, product(a, c.T)) * d).sum(dim=1) for d, c in zip(b_M, a_M, strict=True)]
        for b, a in zip(b_M, a_M, strict=True)
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in pairs], dim=-2)


def _by_rows(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Runs of whole rows of about `_CHUNK` entries."""
    return torch.split(value, max(_CHUNK // max(value.shape[1], 1), 1))


def _row_grams(values_M: Sequence[torch.Tensor]) -> torch.Tensor:
    wide_M = [value.double() for value in values_M]
    pairs = [[(x * y).sum(dim=1) for y in wide_M] for x in wide_M]
    return torch.stack([torch.stack(row, dim=-1) for row in pairs], dim=-2)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*values_M)
        chunks = zip(*(torch.split(value, _CHUNK) for value in values_M), strict=True)
        stacks = (torch.stack(chunk).double() for chunk in chunks)
        return torch.stack([product(stack, stack.T) for stack in stacks]).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Σ_t (g_st + g_ts) x_t."""
        values_M: tuple[torch.Tensor, ...] = ctx.saved_tensors
        both = gradients[0] + gradients[0].T
        found: list[torch.Tensor] = []
        for row in both:
            total = torch.zeros_like(values_M[0])
            for value, slope in zip(values_M, row, strict=True):
                total.add_(value * slope)
            found.append(total)
        return tuple(found)


class _Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*values_M)
        return torch.stack([value.double().square().sum() for value in values_M])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values_M: tuple[torch.Tensor, ...] = ctx.saved_tensors
        return tuple(value * (2.0 * slope) for value, slope in zip(values_M, gradients[0], strict=True))
