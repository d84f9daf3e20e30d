"""Task vectors of one module, low-rank or dense, behind the same few operators.

A `Delta` is always the product-space update ΔW of one tensor relative to the aligned model, in float32. Sums of LoRA
updates are exact: B_1A_1 + B_2A_2 = [B_1 B_2][A_1; A_2], so no d_out × d_in matrix is built and the result is again a
LoRA (`methods.md` §8.4). Adding factors instead would add cross terms. A projection from the left or the right touches
one factor only, and keeps the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from fleet.algebra import linalg
from fleet.algebra.products import product


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

    def scaled(self, factor: float | torch.Tensor) -> LowRank:
        return LowRank(self.b * factor, self.a)

    def plus(self, other: Delta) -> Delta:
        """ΔW + other, exact; two LoRAs give one of the sum of their ranks."""
        if isinstance(other, LowRank):
            return LowRank(torch.cat((self.b, other.b), dim=1), torch.cat((self.a, other.a), dim=0))
        return other.plus(self)

    def minus(self, other: Delta) -> Delta:
        return self.plus(other.scaled(-1.0))

    def transposed(self) -> LowRank:
        return LowRank(self.a.T, self.b.T)

    def onto_left(self, basis: torch.Tensor) -> LowRank:
        """U Uᵀ ΔW for a basis U (d_out, k) with orthonormal columns."""
        return LowRank(product(basis, product(basis.T, self.b)), self.a)

    def outside_left(self, basis: torch.Tensor) -> LowRank:
        """(I − U Uᵀ) ΔW for a basis U (d_out, k) with orthonormal columns."""
        return LowRank(self.b - product(basis, product(basis.T, self.b)), self.a)

    def weighted_right(self, basis: torch.Tensor, inside: float, outside: float) -> LowRank:
        """ΔW (inside · R Rᵀ + outside · (I − R Rᵀ)) for a basis R (d_in, k) with orthonormal columns."""
        return LowRank(self.b, outside * self.a + product((inside - outside) * product(self.a, basis), basis.T))

    def energies(self, basis: torch.Tensor) -> torch.Tensor:
        """‖u_iᵀ ΔW‖² of every column u_i of a basis (d_out, k): (k,), float64."""
        rows, a = product(basis.T, self.b).double(), self.a.double()
        return (product(rows, product(a, a.T)) * rows).sum(dim=1)

    def norm(self) -> float:
        """‖ΔW‖, Frobenius, from r × r Grams in float64."""
        b, a = self.b.double(), self.a.double()
        return max(float((product(b.T, b) * product(a, a.T)).sum()), 0.0) ** 0.5

    def dense(self) -> torch.Tensor:
        return product(self.b, self.a)


@dataclass(frozen=True)
class Dense:
    """ΔW as a tensor of the base tensor's own shape."""

    value: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def scaled(self, factor: float | torch.Tensor) -> Dense:
        return Dense(self.value * factor)

    def plus(self, other: Delta) -> Dense:
        return Dense(self.value + other.dense())

    def minus(self, other: Delta) -> Dense:
        return Dense(self.value - other.dense())

    def transposed(self) -> Dense:
        """ΔWᵀ; of a stack (…, d_out, d_in), each matrix is transposed."""
        return Dense(self.value.mT)

    def onto_left(self, basis: torch.Tensor) -> Dense:
        """U Uᵀ ΔW for a basis U (d_out, k) with orthonormal columns."""
        return Dense(product(basis, product(basis.T, self.value)))

    def outside_left(self, basis: torch.Tensor) -> Dense:
        """(I − U Uᵀ) ΔW for a basis U (d_out, k) with orthonormal columns."""
        return Dense(self.value - product(basis, product(basis.T, self.value)))

    def weighted_right(self, basis: torch.Tensor, inside: float, outside: float) -> Dense:
        """ΔW (inside · R Rᵀ + outside · (I − R Rᵀ)) for a basis R (d_in, k) with orthonormal columns."""
        return Dense(outside * self.value + product((inside - outside) * product(self.value, basis), basis.T))

    def energies(self, basis: torch.Tensor) -> torch.Tensor:
        """‖u_iᵀ ΔW‖² of every column u_i of a basis (d_out, k): (k,), float64."""
        return product(basis.T, self.value).double().square().sum(dim=1)

    def norm(self) -> float:
        """‖ΔW‖, Frobenius, in float64."""
        return linalg.norm(self.value)

    def dense(self) -> torch.Tensor:
        return self.value


Delta: TypeAlias = LowRank | Dense


def zero(shape: tuple[int, ...], rank: int = 0) -> LowRank:
    """The zero task vector of a module that a model leaves alone: (d_out, d_in), float32, as a LoRA of this rank."""
    return LowRank(torch.zeros(shape[0], rank), torch.zeros(rank, shape[1]))
