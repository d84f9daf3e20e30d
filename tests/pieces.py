"""Workers that share a tensor, as threads: their counts and sums are added up between them, and so are gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from fleet.algebra.sparsify import Piece

_T = TypeVar("_T")


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, add: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.add = add
        return add(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.add(gradients[0]), None


def in_pieces(sizes: Sequence[int], work: Callable[[slice, Piece], _T], columns: int = 1) -> list[_T]:
    """What workers that hold these many rows each compute together.

    Args:
        work: gets a worker's rows and its piece.
        columns: entries of a row.
    """
    barrier, counts = threading.Barrier(len(sizes), timeout=60.0), dict[int, torch.Tensor]()

    def total(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(mine: torch.Tensor) -> torch.Tensor:
            counts[rank] = mine.detach()
            barrier.wait()
            found = torch.stack([counts[i] for i in range(len(sizes))]).sum(dim=0)
            barrier.wait()
            return found

        return lambda mine: _Total.apply(mine, add)  # pyright: ignore[reportUnknownMemberType, reportReturnType] - torch leaves it untyped

    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def piece(rank: int) -> _T:
        rows = slice(starts[rank], starts[rank] + sizes[rank])
        return work(rows, Piece(rows.start * columns, total(rank)))

    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(piece, range(len(sizes))))
