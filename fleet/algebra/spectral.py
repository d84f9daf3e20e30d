"""Truncated singular value decompositions, and LoRA recompression with its certificate.

A LoRA's singular values are those of a small matrix: with B = Q_B R_B and Aᵀ = Q_A R_A (thin QR), BA = Q_B (R_B R_Aᵀ)
Q_Aᵀ, so no d_out × d_in matrix is built. Cutting it to rank k loses exactly √(Σ_{i>k} σ_i²), and no rank-k matrix is
closer (Eckart and Young, 1936): the residual is a certificate that a record can carry (`methods.md` §8.4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fleet.algebra import linalg
from fleet.algebra.delta import Delta, LowRank
from fleet.algebra.products import product
from fleet.algebra.row_blocks import RowBlocks

EXACT_SIDE = 1024
"""A dense matrix whose smaller side is at most this gets a full SVD; for others block power iteration finds the leading
part."""

OVERSAMPLING = 16
"""Columns of the iterated block beyond the k that are wanted."""

POWER_ITERATIONS = 4


class Triplets(NamedTuple):
    """The k leading singular triplets: left (d_out, k), values (k,) in falling order, right (d_in, k)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def head(self, k: int) -> Triplets:
        return Triplets(self.left[:, :k], self.values[:k], self.right[:, :k])

    def low_rank(self) -> LowRank:
        """U_k Σ_k R_kᵀ, the spectrum shared evenly between the factors."""
        root = self.values.sqrt()
        return LowRank(self.left * root, (self.right * root).T)


def leading_triplets(matrix: RowBlocks, k: int, generator: torch.Generator) -> Triplets:
    """The k leading singular triplets of a matrix (d_out, d_in), in its dtype; min(d_out, d_in) if k is larger.

    Above `EXACT_SIDE`, by block power iteration from a Gaussian start (Halko, Martinsson and Tropp, 2011, alg. 4.4):
    2(2 + 2·`POWER_ITERATIONS`)·d_out·d_in·(k + `OVERSAMPLING`) flops.

    Args:
        generator: draws the start, so that the same seed gives the same triplets.
    """
    k = min(k, *matrix.shape)
    if min(matrix.shape) <= EXACT_SIDE:
        left, values, right = linalg.svd(matrix.dense())
        return Triplets(left, values, right.T).head(k)
    columns = min(k + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
    basis = linalg.qr(matrix.times(start)).q
    for _ in range(POWER_ITERATIONS):
        basis = linalg.qr(matrix.times(linalg.qr(matrix.transposed_times(basis)).q)).q
    # The small side: basisᵀ X = (Xᵀ basis)ᵀ.
    right, values, left = linalg.svd(matrix.transposed_times(basis))
    return Triplets(product(basis, left.T), values, right).head(k)


def low_rank_triplets(delta: LowRank) -> Triplets:
    """All singular triplets of a LoRA's ΔW, in float64, from an r × r SVD."""
    q_b, r_b = linalg.qr(delta.b.double())
    q_a, r_a = linalg.qr(delta.a.double().T)
    left, values, right = linalg.svd(product(r_b, r_a.T))
    return Triplets(product(q_b, left), values, product(q_a, right.T))


def truncated(delta: Delta, rank: int, generator: torch.Generator) -> tuple[LowRank, float]:
    """The nearest ΔW_k of at most this rank k, and what is lost: ‖ΔW − ΔW_k‖, Frobenius.

    A LoRA of that rank or less comes back as it is, and loses nothing. Otherwise a LoRA loses exactly √(Σ_{i>k} σ_i²).
    A dense ΔW's loss is measured; above `EXACT_SIDE` it may be a little more than that.

    Args:
        generator: draws the start of the power iteration.
    """
    if isinstance(delta, LowRank):
        if delta.rank <= rank:
            return delta, 0.0
        triplets = low_rank_triplets(delta)
        lost = float(triplets.values[rank:].square().sum()) ** 0.5
        kept = triplets.head(rank).low_rank()
        return LowRank(kept.b.to(delta.b.dtype), kept.a.to(delta.a.dtype)), lost
    kept = leading_triplets(RowBlocks.of(delta.value), rank, generator).low_rank()
    return kept, delta.minus(kept).norm()
