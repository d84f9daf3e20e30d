"""How one module's task vector stands to the safety displacement V = W_aligned − W_unaligned, exactly and cheaply.

With ΔW = BA, M = VᵀB (d_in × r), N = VM (d_out × r) and the r × r Grams G_X = XᵀX (G_A = AAᵀ), every inner product that
ρ, gain and lift need is ⟨G_X, G_A⟩ (`methods.md` §8.1). Two skinny products, 4·d_out·d_in·r flops, replace the
d_out × d_out operator C = VVᵀ/‖V‖ of the papers. Products are float32; Grams are float64, because they square the
condition number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fleet.algebra.delta import Delta, Dense, LowRank

UNDEFINED_NORM = 1e-12
"""Below this Frobenius norm a matrix has no direction in float32 worth comparing, and its statistics are undefined."""

DENSE_COLUMNS = 1024
"""A dense ΔW is taken this many columns at a time, so that VᵀΔW and VVᵀΔW never stand whole."""


class DeltaStatistics(NamedTuple):
    """See `fleet.methods.base.ModuleStatistics`, whose fields these are."""

    delta_norm: float
    safety_norm: float
    rho: float | None
    lift: float | None
    gain: float | None
    cosine: float | None


def delta_statistics(safety_direction: torch.Tensor, delta: Delta) -> DeltaStatistics:
    """Statistics of ΔW against V.

    Args:
        safety_direction: V, (d_out, d_in), float32 (or float64 for tests).
        delta: ΔW of the same shape; B and A of the same dtype as V.

    Returns:
        None for rho, lift, gain and cosine where ‖ΔW‖ or ‖V‖ is below `UNDEFINED_NORM`.
    """
    inner = (
        _low_rank_inner(safety_direction, delta)
        if isinstance(delta, LowRank)
        else _dense_inner(safety_direction, delta)
    )
    safety_norm = float(torch.linalg.vector_norm(safety_direction, dtype=torch.float64))
    delta_norm = max(inner.dd, 0.0) ** 0.5
    if delta_norm < UNDEFINED_NORM or safety_norm < UNDEFINED_NORM:
        return DeltaStatistics(delta_norm, safety_norm, None, None, None, None)
    gain = (inner.nn / inner.dd) ** 0.5 / safety_norm
    lift = safety_direction.shape[0] * inner.mm / (safety_norm**2 * inner.dd)
    cosine = inner.vd / (safety_norm * delta_norm)
    # VVᵀΔW = 0 means that ΔW is orthogonal to all of V: an angle of 90 degrees, not an undefined one.
    rho = inner.mm / (inner.nn * inner.dd) ** 0.5 if inner.nn > 0.0 else 0.0
    return DeltaStatistics(delta_norm, safety_norm, min(rho, 1.0), lift, gain, cosine)


class _Inner(NamedTuple):
    """dd = ‖ΔW‖², mm = ‖VᵀΔW‖², nn = ‖VVᵀΔW‖², vd = ⟨V, ΔW⟩."""

    dd: float
    mm: float
    nn: float
    vd: float


def _low_rank_inner(v: torch.Tensor, delta: LowRank) -> _Inner:
    b, a = delta.b, delta.a
    m = v.T @ b
    n = v @ m
    a64, b64, m64, n64 = (x.double() for x in (a, b, m, n))
    gram_a = a64 @ a64.T
    dd, mm, nn = (float((x.T @ x * gram_a).sum()) for x in (b64, m64, n64))
    return _Inner(dd, mm, nn, float((m64 * a64.T).sum()))


def _dense_inner(v: torch.Tensor, delta: Dense) -> _Inner:
    dd = mm = nn = vd = 0.0
    for start in range(0, delta.value.shape[1], DENSE_COLUMNS):
        block = delta.value[:, start : start + DENSE_COLUMNS]
        m = v.T @ block
        n = v @ m
        dd, mm, nn = (
            total + float(x.double().square().sum()) for total, x in zip((dd, mm, nn), (block, m, n), strict=True)
        )
        vd += float((v[:, start : start + DENSE_COLUMNS].double() * block.double()).sum())
    return _Inner(dd, mm, nn, vd)
