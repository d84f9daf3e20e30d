"""A matrix given by blocks of its rows: in memory as one block, or streamed again from storage for each product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

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
        """A matrix that is in memory already."""
        return RowBlocks((matrix.shape[0], matrix.shape[1]), matrix.dtype, lambda: iter((matrix,)))

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """X @ right, (rows, k)."""
        return torch.cat([block @ right for block in self.blocks()])

    def transposed_times(self, right: torch.Tensor) -> torch.Tensor:
        """Xᵀ @ right, (columns, k)."""
        total: torch.Tensor | None = None
        start = 0
        for block in self.blocks():
            # (rightᵀ X)ᵀ: the tall factor stays in its own row order, twice as fast as Xᵀ @ right where k is small.
            part = right[start : start + block.shape[0]].T
            total = part @ block if total is None else total.addmm_(part, block)
            start += block.shape[0]
        assert total is not None
        return total.T

    def dense(self) -> torch.Tensor:
        """The whole matrix; the block itself if it is one."""
        whole, rows = torch.empty(0), 0
        for block in self.blocks():
            if block.shape == torch.Size(self.shape):
                return block
            if rows == 0:
                whole = torch.empty(self.shape, dtype=self.dtype)
            whole[rows : rows + block.shape[0]] = block
            rows += block.shape[0]
        return whole
