"""What one logit of a mask stands for.

| mask | one logit per | a LoRA stays one |
|---|---|---|
| `dense` | entry of ΔW, in product space | no |
| `rows_and_columns` | output row and input column: diag(m_o) ΔW diag(m_i) | yes |
| `rank` | singular component of a LoRA's ΔW: U diag(m σ) Rᵀ | yes |
| `factor` | entry of A and of B, the published one | yes |

One ΔW has many pairs of factors: (B, A) and (BG, G⁻¹A) have the same product. A rank mask doesn't depend on which pair
the adapter holds, because it is defined on the singular components of ΔW. A factor mask does; so it means something
only for adapters that all started from one pair of factors, and those are what it reverts to.

A mask has one or two tensors of logits, its *parts*. Each is rescaled by its own mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, TypeAlias, cast

import torch

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.spectral import low_rank_triplets

Granularity: TypeAlias = Literal["dense", "rank", "rows_and_columns", "factor"]


class Part(NamedTuple):
    """One tensor of logits."""

    shape: tuple[int, ...]
    by_row: bool
    """Whether its first axis is that of ΔW: then workers that share out the rows of ΔW share it out with them."""


class Mask(Protocol):
    """One of the four masks, as functions of one tensor's task vector, ΔW.

    `delta` is ΔW whole, or where it says so some of its rows.
    """

    def parts(self, delta: Delta) -> dict[str, Part]:
        """The parts that mask a whole ΔW, by name."""
        ...

    def prepared(self, delta: Delta) -> Delta:
        """The same ΔW, whole, in the form that the mask is defined on."""
        ...

    def sizes(self, delta: Delta) -> dict[str, torch.Tensor]:
        """Part -> the size of what each logit stands for, in the part's shape: the order of a magnitude mask."""
        ...

    def masked(self, delta: Delta, multipliers: Mapping[str, torch.Tensor], origin: Delta | None) -> Delta:
        """The masked ΔW, differentiable in the multipliers.

        Args:
            delta: as `prepared` gives it; all its rows, or some.
            multipliers: part -> m / mean(m), for the rows that `delta` holds.
            origin: what a factor mask reverts to, in the same rows; None for zero.
        """
        ...


class _DenseMask:
    def parts(self, delta: Delta) -> dict[str, Part]:
        return {"entries": Part(tuple(delta.shape), True)}

    def prepared(self, delta: Delta) -> Delta:
        return delta

    def sizes(self, delta: Delta) -> dict[str, torch.Tensor]:
        return {"entries": delta.dense().abs()}

    def masked(self, delta: Delta, multipliers: Mapping[str, torch.Tensor], origin: Delta | None) -> Delta:
        return Dense(delta.dense() * multipliers["entries"])


class _RowAndColumnMask:
    def parts(self, delta: Delta) -> dict[str, Part]:
        """A vector has rows alone; a stack of experts has rows and columns for each expert."""
        shape = tuple(delta.shape)
        if len(shape) == 1:
            return {"rows": Part(shape, True)}
        return {"rows": Part(shape[:-1], True), "columns": Part((*shape[:-2], shape[-1]), len(shape) > 2)}

    def prepared(self, delta: Delta) -> Delta:
        return delta

    def sizes(self, delta: Delta) -> dict[str, torch.Tensor]:
        value = delta.dense()
        if value.ndim == 1:
            return {"rows": value.abs()}
        return {"rows": _norms(value, -1), "columns": _norms(value, -2)}

    def masked(self, delta: Delta, multipliers: Mapping[str, torch.Tensor], origin: Delta | None) -> Delta:
        rows = multipliers["rows"]
        if isinstance(delta, LowRank):
            return LowRank(delta.b * rows[:, None], delta.a * multipliers["columns"])
        if "columns" not in multipliers:
            return Dense(delta.value * rows)
        return Dense(delta.value * rows.unsqueeze(-1) * multipliers["columns"].unsqueeze(-2))


class _RankMask:
    def parts(self, delta: Delta) -> dict[str, Part]:
        return {"components": Part((_low_rank(delta).rank,), False)}

    def prepared(self, delta: Delta) -> Delta:
        """ΔW = (U σ)(Rᵀ), components in order of size: the same for every pair of factors of ΔW."""
        low_rank = _low_rank(delta)
        triplets = low_rank_triplets(low_rank)
        b, a = triplets.left * triplets.values, triplets.right.T
        return LowRank(b.to(low_rank.b.dtype).contiguous(), a.to(low_rank.a.dtype).contiguous())

    def sizes(self, delta: Delta) -> dict[str, torch.Tensor]:
        return {"components": _norms(_low_rank(delta).b, 0)}

    def masked(self, delta: Delta, multipliers: Mapping[str, torch.Tensor], origin: Delta | None) -> Delta:
        low_rank = _low_rank(delta)
        return LowRank(low_rank.b * multipliers["components"], low_rank.a)


class _FactorMask:
    def parts(self, delta: Delta) -> dict[str, Part]:
        low_rank = _low_rank(delta)
        return {"b": Part(tuple(low_rank.b.shape), True), "a": Part(tuple(low_rank.a.shape), False)}

    def prepared(self, delta: Delta) -> Delta:
        return delta

    def sizes(self, delta: Delta) -> dict[str, torch.Tensor]:
        low_rank = _low_rank(delta)
        return {"b": low_rank.b.abs(), "a": low_rank.a.abs()}

    def masked(self, delta: Delta, multipliers: Mapping[str, torch.Tensor], origin: Delta | None) -> Delta:
        low_rank, b, a = _low_rank(delta), multipliers["b"], multipliers["a"]
        if origin is None:
            return LowRank(low_rank.b * b, low_rank.a * a)
        start = _low_rank(origin)
        return LowRank(start.b + (low_rank.b - start.b) * b, start.a + (low_rank.a - start.a) * a)


MASKS: dict[Granularity, Mask] = {
    "dense": _DenseMask(),
    "rank": _RankMask(),
    "rows_and_columns": _RowAndColumnMask(),
    "factor": _FactorMask(),
}


def _norms(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Euclidean norms along one dimension."""
    return cast("torch.Tensor", value.norm(dim=dim))  # pyright: ignore[reportUnknownMemberType] - torch has no types for it


def _low_rank(delta: Delta) -> LowRank:
    assert isinstance(delta, LowRank), "planning refuses these masks on anything but a LoRA"
    return delta
