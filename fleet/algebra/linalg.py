"""torch's decompositions, with the types that torch.linalg lacks, of operands aligned in memory.

The last bits of LAPACK's results depend on a matrix's address, as those of a product do: see `fleet.algebra.products`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fleet.algebra.products import aligned

_linalg: Any = torch.linalg


class Svd(NamedTuple):
    """X = left · diag(values) · right of a matrix (m, n), k = min(m, n)."""

    left: torch.Tensor
    """(m, k), orthonormal columns."""
    values: torch.Tensor
    """(k,), in falling order."""
    right: torch.Tensor
    """(k, n), orthonormal rows."""


class Qr(NamedTuple):
    """X = q · r of a matrix (m, n), k = min(m, n)."""

    q: torch.Tensor
    """(m, k), orthonormal columns."""
    r: torch.Tensor
    """(k, n), upper triangular."""


class Eigen(NamedTuple):
    """X = vectors · diag(values) · vectorsᵀ of a symmetric matrix (n, n)."""

    values: torch.Tensor
    """(n,), in rising order."""
    vectors: torch.Tensor
    """(n, n), orthonormal columns."""


def svd(matrix: torch.Tensor) -> Svd:
    """The thin singular value decomposition, in the matrix's dtype."""
    return Svd(*_linalg.svd(aligned(matrix), full_matrices=False))


def qr(matrix: torch.Tensor) -> Qr:
    """The thin QR decomposition, in the matrix's dtype."""
    return Qr(*_linalg.qr(aligned(matrix)))


def eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
    """The eigenvalues of a symmetric matrix (n, n), in rising order: (n,)."""
    return _linalg.eigvalsh(aligned(matrix))


def eigen(matrix: torch.Tensor) -> Eigen:
    """The eigenvalues of a symmetric matrix (n, n) and their vectors, in its dtype."""
    return Eigen(*_linalg.eigh(aligned(matrix)))


def norm(tensor: torch.Tensor) -> float:
    """√Σ x² over all entries, added up in float64."""
    return float(_linalg.vector_norm(tensor, dtype=torch.float64))


def matrix_norms(matrices: torch.Tensor) -> torch.Tensor:
    """Frobenius norms of matrices (…, m, n): (…), in their dtype."""
    return _linalg.matrix_norm(matrices)


def cholesky(matrices: torch.Tensor) -> torch.Tensor | None:
    """The lower Cholesky factors of symmetric matrices (…, n, n); None if one isn't positive definite."""
    factor, failed = _linalg.cholesky_ex(aligned(matrices))
    return None if bool(failed.any()) else factor
