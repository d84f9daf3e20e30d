"""Leading singular directions, spectra, and LoRA recompression with its certificate.

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
"""A dense ΔW whose smaller side is at most this is cut by a full SVD; others by block power iteration, and the loss
measured."""

OVERSAMPLING = 16
"""Columns of its block beyond the k that are wanted."""

POWER_ITERATIONS = 4

KRYLOV_OVERSAMPLING = 8
"""Columns of a Krylov space's blocks beyond the k directions that are wanted."""

KRYLOV_STEPS = 5
"""Blocks of a Krylov space after its first."""

NEW_SHARE = 0.5
"""A direction of which less than this is left after the space so far was taken out of it is not new."""


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


def leading_directions(matrix: RowBlocks, k: int, generator: torch.Generator) -> Triplets:
    """The k leading singular triplets of a matrix (d_out, d_in), in its dtype; min(d_out, d_in) if k is larger.

    By block Krylov iteration (Musco and Musco, "Randomized block Krylov methods", NeurIPS 2015, alg. 2): of all that
    X(XᵀX)ⁱΩ spans, i = 0 … `KRYLOV_STEPS`, for a Gaussian Ω of k + `KRYLOV_OVERSAMPLING` columns, the best. It takes
    4(`KRYLOV_STEPS` + 1)·d_out·d_in·(k + `KRYLOV_OVERSAMPLING`) flops, a tenth of a full SVD's time at 576 × 576; a
    matrix with no more rows or columns than that space gets the SVD.

    How far from the SVD, for k = 8 and sides from 192 to 1536: where singular values fall, σ_i ∝ 1/√i or faster, values
    and the energy of any ΔW in the k directions agree to 1e-5. In pure noise, where hundreds of singular values lie
    within a few per cent of each other, values agree to 1 %, and the energy of a ΔW to 2 % if it contains V, to 10 % if
    it has nothing to do with it: the directions are then almost as leading as those of the SVD, but others, and chance
    alone makes √(2/(kr)) of that energy.

    Args:
        generator: draws Ω, so that the same seed gives the same triplets.
    """
    k = min(k, *matrix.shape)
    columns = k + KRYLOV_OVERSAMPLING
    if (KRYLOV_STEPS + 1) * columns >= min(matrix.shape):
        return _all_triplets(matrix).head(k)
    rows, images = (torch.empty((KRYLOV_STEPS + 1) * columns, n, dtype=matrix.dtype) for n in matrix.shape)
    image = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
    for start in range(0, rows.shape[0], columns):
        block = _new_columns(matrix.times(image), rows[:start])
        image = matrix.transposed_times(block)
        rows[start : start + columns], images[start : start + columns] = block.T, image.T
    # The singular vectors of the small side, rows · X = images. Its Gram is float64, so squaring loses nothing.
    wide = images.double()
    small = linalg.eigen(product(wide, wide.T)).vectors[:, -k:].flip(1).T.to(matrix.dtype)
    left, right = product(small, rows).T, product(small, images).T
    return Triplets(_orthonormal(left), right.square().sum(dim=0).sqrt(), _orthonormal(right))


def squared_singular_values(matrix: RowBlocks) -> torch.Tensor:
    """All σ² of a matrix (d_out, d_in): (min(d_out, d_in),), float64, in rising order.

    They are the eigenvalues of the smaller Gram matrix in the matrix's own dtype, n × n: 2·d_out·d_in·n flops, and
    about three times n³ for the eigenvalues. Each is exact to the dtype's rounding of the largest.
    """
    return linalg.eigenvalues(gram(matrix)).double().clamp_min(0.0)


def gram(matrix: RowBlocks) -> torch.Tensor:
    """XᵀX or XXᵀ, whichever is smaller, in the matrix's dtype."""
    rows, columns = matrix.shape
    if rows < columns:
        return torch.cat([matrix.times(x.T) for x in matrix.blocks()], dim=1)
    total = torch.zeros(columns, columns, dtype=matrix.dtype)
    for x in matrix.blocks():
        total += product(x.T, x)
    return total


def _new_columns(block: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what a block (n, c) adds to an orthonormal one, the rows of (m, n); columns that add
    nothing are 0.

    What the rows have is taken out again of what is left, which may be mostly rounding. Directions of which little is
    left then are not new: the matrix has no more, as V has none where alignment trained a LoRA.
    """

    def outside(columns: torch.Tensor) -> torch.Tensor:
        return columns - product(product(rows, columns).T, rows).T

    left = outside(linalg.qr(outside(block)).q)
    shares, mixes = linalg.eigen(product(left.T, left))
    scales = torch.where(shares > NEW_SHARE**2, shares.clamp_min(NEW_SHARE**2).rsqrt(), 0.0)
    return product(left, mixes * scales)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Orthogonal columns at unit length; in place of those that vanish, others that are orthogonal to all."""
    found = linalg.qr(columns)
    return found.q * torch.where(found.r.diagonal() < 0.0, -1.0, 1.0)


def _all_triplets(matrix: RowBlocks) -> Triplets:
    left, values, right = linalg.svd(matrix.dense())
    return Triplets(left, values, right.T)


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
    kept = _near_triplets(RowBlocks.of(delta.value), rank, generator).low_rank()
    return kept, delta.minus(kept).norm()


def _near_triplets(matrix: RowBlocks, k: int, generator: torch.Generator) -> Triplets:
    """The k leading singular triplets, or above `EXACT_SIDE` some that lose little more.

    There by block power iteration from a Gaussian start (Halko, Martinsson and Tropp, 2011, alg. 4.4), which holds no
    more than one block. `leading_directions` comes nearer, but would give weights that are stored already other bytes.
    """
    k = min(k, *matrix.shape)
    if min(matrix.shape) <= EXACT_SIDE:
        return _all_triplets(matrix).head(k)
    columns = min(k + OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
    basis = linalg.qr(matrix.times(start)).q
    for _ in range(POWER_ITERATIONS):
        basis = linalg.qr(matrix.times(linalg.qr(matrix.transposed_times(basis)).q)).q
    # The small side: basisᵀ X = (Xᵀ basis)ᵀ.
    right, values, left = linalg.svd(matrix.transposed_times(basis))
    return Triplets(product(basis, left.T), values, right).head(k)
