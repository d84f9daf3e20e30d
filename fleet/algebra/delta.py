"""Task vectors of one tensor, low-rank or dense, behind the same two operators.

A `Delta` is always the product-space update ΔW of one tensor relative to the aligned model, in float32. Sums of LoRA
updates are exact: B_1A_1 + B_2A_2 = [B_1 B_2][A_1; A_2], so no d_out × d_in matrix is built and the result is again a
LoRA (`methods.md` §8.4). Adding factors instead would add cross terms.

The same code runs on meta tensors, which have shapes and no values: that is how an output is laid out before any weight
is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class LowRank:
    """ΔW = b @ a with b (d_out, rank) and a (rank, d_in); every scaling is folded into b."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.b.shape[0], self.a.shape[1]))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.b * factor, self.a)

    def plus(self, other: Delta) -> Delta:
        if isinstance(other, LowRank):
            return LowRank(torch.cat((self.b, other.b), dim=1), torch.cat((self.a, other.a), dim=0))
        return other.plus(self)

    def dense(self) -> torch.Tensor:
        return self.b @ self.a


@dataclass(frozen=True)
class Dense:
    """ΔW as a tensor of the base tensor's own shape."""

    value: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def scaled(self, factor: float) -> Dense:
        return Dense(self.value * factor)

    def plus(self, other: Delta) -> Dense:
        return Dense(self.value + other.dense())

    def dense(self) -> torch.Tensor:
        return self.value


Delta: TypeAlias = LowRank | Dense
