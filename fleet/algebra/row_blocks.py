"""A matrix given by blocks of its rows: in memory, or streamed again from storage for each product.

The blocks decide the last bits of products, so they are always those of `fleet.algebra.products.row_ranges`, wherever
the matrix is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fleet.algebra.products import aligned, beside, product, row_ranges

Blocks = Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class RowBlocks:
    """A (rows, columns) matrix.

    `blocks` starts over at each call and yields the rows from first to last; a block may be gone when the next comes.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    blocks: Blocks

    @staticmethod
    def of(matrix: torch.Tensor) -> RowBlocks:
        """A matrix that is in memory already; copied if it isn't contiguous and aligned."""
        whole, (rows, columns) = aligned(matrix), matrix.shape
        return RowBlocks(
            (rows, columns), matrix.dtype, lambda: (whole[start:stop] for start, stop in row_ranges(rows, columns))
        )

    def times(self, right: torch.Tensor, widths: Sequence[int] | None = None) -> torch.Tensor:
        """X @ right, (rows, k).

        Args:
            widths: how many columns of `right` each of several models has; the products then have the bits that each
                model's have alone. None for one model's columns.
        """
        return torch.cat(
            [product(x, right) if widths is None else beside("left", x, right, widths) for x in self.blocks()]
        )

    def transposed_times(self, right: torch.Tensor, widths: Sequence[int] | None = None) -> torch.Tensor:
        """Xᵀ @ right, (columns, k), added up over the blocks in order. `widths` as for `times`."""
        total: torch.Tensor | None = None
        start = 0
        for block in self.blocks():
            rows = right[start : start + block.shape[0]]
            part = product(rows.T, block).T if widths is None else beside("right", block, rows, widths)
            total = part if total is None else total.add_(part)
            start += block.shape[0]
        assert total is not None
        return total

    def dense(self) -> torch.Tensor:
        """The whole matrix; if it is a single block, that block itself."""
        whole, rows = torch.empty(0), 0
        for block in self.blocks():
            if block.shape == torch.Size(self.shape):
                return block
            if rows == 0:
                whole = torch.empty(self.shape, dtype=self.dtype)
            whole[rows : rows + block.shape[0]] = block
            rows += block.shape[0]
        return whole
