"""Matrix products whose bits don't depend on the worker that computes them, or on what else it computes.

Weights are made with such products, and a step that is done again, on another worker or together with other models, has
to write the same bytes. A BLAS promises less: the order in which a kernel adds up follows the operands' addresses,
strides and shapes, and the number of threads (MKL gives the same bits for the same shapes, 64-byte aligned, on one kind
of processor with one number of threads: "Obtaining numerically reproducible results"). So here

    address, strides   operands lie row by row from a multiple of 64 bytes on, or are copied (`aligned`)
    shapes             follow from a tensor's own shape: rows come in the blocks of `row_ranges`, however many are read
                       at once; a model's columns have the same products beside other models' as alone (`beside`)
    threads            one, which `fleet.work.tensor_worker` sets

torch's sums, norms and elementwise operators depend on the threads alone; `torch.dot` is a BLAS's. Between kinds of
processors bits differ; `fleet.methods.base` says by how much for statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

import torch

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector of any processor here. torch allocates at multiples of it."""

PANEL = 16
"""A model's columns are multiplied in panels of this many, the last one padded with zeros: for fewer columns a BLAS has
other kernels."""

BLOCK_ENTRIES = 8 << 20
"""Entries in a block of rows, enough for its products to run at full speed."""

_ROWS = 16
"""Blocks have a multiple of this many rows, so that each begins aligned in the memory of the whole."""

_TRIED_ROWS = 64
"""Numbers that have to agree before a column counts as the same wherever it stands: in a few, another order of adding
up may give the same bits."""

Side: TypeAlias = Literal["left", "right"]
"""Whether a matrix stands left of the columns it is multiplied with, X @ C, or right of them, (Cᵀ @ X)ᵀ."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it lies row by row from a multiple of `ALIGNMENT` bytes on, else a copy that does."""
    if tensor.data_ptr() % ALIGNMENT == 0 and tensor.stride() == _row_by_row(tensor.shape):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def _row_by_row(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor, those of axes of length 1 too, by which torch chooses a BLAS's routine."""
    return torch.empty(shape, device="meta").stride()


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, of any shapes that can be multiplied. Differentiable."""
    return aligned(left) @ aligned(right)


def dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Σ left · right over all entries, both of one shape: a scalar of their dtype."""
    return torch.dot(aligned(left).view(-1), aligned(right).view(-1))


def row_ranges(rows: int, columns: int) -> list[tuple[int, int]]:
    """The blocks of rows, [start, stop), in which a matrix is multiplied: they follow from its shape alone."""
    step = max(BLOCK_ENTRIES // max(columns, 1), 1)
    step = step // _ROWS * _ROWS or step
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def beside(side: Side, matrix: torch.Tensor, columns: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Products of a matrix with several models' columns at once, with the same bits as for each model alone.

    Alone, a model's columns are multiplied in panels of `PANEL`. One product of all columns takes half the time, and
    has the same bits if the kernel adds up in the same order wherever a column stands. Whether it does is tried out
    once for each shape; if not, the panels are multiplied one by one.

    Args:
        matrix: (m, k), or on the right (k, m).
        columns: (k, Σ widths).
        widths: how many columns each model has.

    Returns:
        (m, Σ widths).
    """
    count = columns.shape[1]
    width = -(-count // PANEL) * PANEL
    if _is_columnwise(side, (matrix.shape[0], matrix.shape[1]), width, matrix.dtype):
        return _multiplied(side, matrix, _filled(columns, width))[:, :count]
    return torch.cat(
        [
            _multiplied(side, matrix, _filled(panel, PANEL))[:, : panel.shape[1]]
            for own in torch.split(columns, list(widths), dim=1)
            for panel in torch.split(own, PANEL, dim=1)
        ],
        dim=1,
    )


def _multiplied(side: Side, matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    # On the right, (Cᵀ X)ᵀ: the tall X stays in its own row order, twice as fast as Xᵀ @ C where C is narrow.
    return product(matrix, columns) if side == "left" else product(columns.T, matrix).T


def _filled(columns: torch.Tensor, width: int) -> torch.Tensor:
    """The columns, padded with zeros to a width."""
    return torch.nn.functional.pad(columns, (0, width - columns.shape[1]))


@lru_cache(maxsize=1024)
def _is_columnwise(side: Side, shape: tuple[int, int], width: int, dtype: torch.dtype) -> bool:
    """Whether a column has the same bits wherever it stands in a product of this width, and in a panel.

    All places are tried at once, with a matrix of equal columns.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=dtype)
    rows = shape[0 if side == "left" else 1]
    for _ in range(max(_TRIED_ROWS // max(rows, 1), 1)):
        column = torch.randn(shape[1 if side == "left" else 0], 1, generator=generator, dtype=dtype)
        first = _multiplied(side, matrix, column.expand(-1, PANEL))[:, :1]
        if any(bool((_multiplied(side, matrix, column.expand(-1, n)) != first).any()) for n in {PANEL, width}):
            return False
    return True
