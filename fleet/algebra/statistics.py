"""How a module's task vectors stand to the safety displacement V = W_aligned − W_unaligned, exactly and cheaply.

With ΔW = BA, M = VᵀB (d_in × r), N = VM (d_out × r) and the r × r Grams G_X = XᵀX (G_A = AAᵀ), every inner product that
ρ, gain and lift need is ⟨G_X, G_A⟩ (`methods.md` §8.1). Two skinny products, 4·d_out·d_in·r flops, replace the
d_out × d_out operator C = VVᵀ/‖V‖ of the papers; the B factors of a whole catalogue are stacked side by side, so that
V is read once for all of them (§8.8). Products are float32; Grams are float64, because they square the condition
number. N serves ρ and gain alone, and is left out where nobody asks for them: lift needs half the flops.

The null of ρ, its value where ΔW is indifferent to V, depends on V's spectrum, so it is estimated by drawing (§8.2):
Gaussian probes ω through V give triples (‖ω‖², ‖Vᵀω‖², ‖VVᵀω‖²), once per pair of base models. An adapter's null mixes
such triples with the eigenvalues of its own G_A, which is the same as a random B in its place, and costs no product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from fleet.algebra import linalg
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.products import dot, product
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import Triplets

UNDEFINED_NORM = 1e-12
"""Below this Frobenius norm a matrix has no direction in float32 worth comparing, and its statistics are undefined."""

NUM_PROBES = 64
"""Gaussian vectors through V, from which the nulls of ρ are drawn."""

NUM_DRAWS = 256
"""Draws of an adapter's null: random stand-ins for its B, mixed from the probes."""

DENSE_COLUMNS = 1024
"""A dense ΔW is taken this many columns at a time, so that VᵀΔW and VVᵀΔW are never in memory whole."""


@dataclass(frozen=True)
class Displacement:
    """V's own part of one module: what all adapters' statistics use, and no adapter changes."""

    norm: float
    """‖V‖, Frobenius."""
    probes: torch.Tensor | None
    """(`NUM_PROBES`, 3), float64: ‖ω‖², ‖Vᵀω‖², ‖VVᵀω‖² of each probe; None where V vanishes or ρ is not asked for."""
    basis: Triplets | None
    """V's leading singular triplets; None where no directions were asked for."""


class DeltaStatistics(NamedTuple):
    """See `fleet.methods.base.ModuleStatistics`, whose fields these are."""

    delta_norm: float
    safety_norm: float
    rho: float | None
    rho_null: float | None
    rho_null_sd: float | None
    lift: float | None
    gain: float | None
    cosine: float | None
    energies: tuple[float, ...] | None


def delta_statistics(
    v: RowBlocks, displacement: Displacement, deltas: Mapping[str, Delta], rho: bool
) -> dict[str, DeltaStatistics]:
    """Statistics of many models' ΔW in one module; V is read twice for all LoRAs together.

    A model's statistics are the same to the last bit whichever other models are measured with it, and whatever else is
    asked for.

    Args:
        v: V, (d_out, d_in), float32 (or float64 for tests).
        displacement: V's own part.
        deltas: model -> ΔW of the same shape and dtype.
        rho: whether ρ, its null and gain are measured.
    """
    rho = rho and displacement.probes is not None  # no probes: V vanishes, and all statistics are undefined
    names = [name for name, d in deltas.items() if isinstance(d, LowRank)]
    low_rank = [d for d in deltas.values() if isinstance(d, LowRank)]
    found: dict[str, DeltaStatistics] = {}
    if low_rank:
        b = torch.cat([d.b for d in low_rank], dim=1)
        ranks = [d.rank for d in low_rank]
        m, n = _products(v, b, rho, ranks)
        ns = [None] * len(names) if n is None else torch.split(n, ranks, dim=1)
        for name, delta, m_i, n_i in zip(names, low_rank, torch.split(m, ranks, dim=1), ns, strict=True):
            found[name] = _low_rank(v.shape, displacement, delta, m_i, n_i)
    for name, delta in deltas.items():
        if isinstance(delta, Dense):
            found[name] = _dense(v, displacement, delta, rho)
    return found


def projected_factor(v: RowBlocks, norm: float, delta: LowRank) -> torch.Tensor:
    """CB, the B factor of CΔW = (CB)A with C = VVᵀ/‖V‖ and ΔW's own A: (d_out, r).

    Weights are made of it, so it is a product of its own, with the same bits whichever models are measured together.

    Args:
        norm: ‖V‖, above 0.
    """
    return v.times(v.transposed_times(delta.b)) / norm


def probe_triples(v: RowBlocks, norm: float, generator: torch.Generator) -> torch.Tensor:
    """(`NUM_PROBES`, 3), float64: ‖ω‖², ‖Vᵀω‖², ‖VVᵀω‖² of standard normal ω. Takes 4·d_out·d_in·`NUM_PROBES` flops.

    All adapters' nulls share these probes, so an error of their mean would shift all z-scores alike. The expectations
    of the first two columns are known, d_out and ‖V‖²: these columns are scaled to have them as means, and the third by
    its regression on both (control variates).

    Args:
        norm: ‖V‖, above 0.
    """
    omega = torch.randn(v.shape[0], NUM_PROBES, generator=generator, dtype=v.dtype)
    m, n = _products(v, omega, True)
    assert n is not None
    triples = torch.stack([x.double().square().sum(dim=0) for x in (omega, m, n)], dim=1)
    mean = triples.mean(dim=0)
    known = torch.tensor([v.shape[0], norm**2], dtype=torch.float64)
    offset, spread = known / mean[:2] - 1.0, triples / mean - 1.0
    # `least_squares` avoids the default driver, "gelsy", whose pivots torch leaves uninitialised: its bits vary.
    slopes = linalg.least_squares(spread[:, :2], spread[:, 2:])[:, 0]
    return triples * (1.0 + torch.cat((offset, (offset * slopes).sum().reshape(1))))


def rho_null(probes: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of ρ over random B with a fixed A (`methods.md` §8.2).

    A Gaussian B has the same law in every orthonormal basis of the rank space, so ⟨G_X, G_A⟩ = Σ_j λ_j‖x_j‖² with the
    eigenvalues λ of G_A and one independent probe per j.

    Args:
        probes: (P, 3) triples, from `probe_triples`.
        weights: (r,), the eigenvalues λ of G_A.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(probes.shape[0], (NUM_DRAWS, weights.shape[0]), generator=generator)
    dd, mm, nn = (probes[chosen] * weights.double()[:, None]).sum(dim=1).T
    rho = mm / (nn * dd).sqrt()
    return float(rho.mean()), float(rho.std())


def _products(
    v: RowBlocks, b: torch.Tensor, both: bool, widths: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """M = VᵀB and, with `both`, N = VM. For several models' B side by side, `widths` are their ranks."""
    m = v.transposed_times(b, widths)
    return m, v.times(m, widths) if both else None


class _Inner(NamedTuple):
    """dd = ‖ΔW‖², mm = ‖VᵀΔW‖², nn = ‖VVᵀΔW‖² if asked for, vd = ⟨V, ΔW⟩."""

    dd: float
    mm: float
    nn: float | None
    vd: float


def _low_rank(
    shape: tuple[int, int], displacement: Displacement, delta: LowRank, m: torch.Tensor, n: torch.Tensor | None
) -> DeltaStatistics:
    # Factors as rows, (r, ·): that is how `RowBlocks` makes M, and what follows is fastest along contiguous rows.
    a, b, m_rows = delta.a.double(), delta.b.double(), m.T.double()
    gram_a = product(a, a.T)

    def inner(gram_x: torch.Tensor) -> float:
        return float((gram_x * gram_a).sum())

    nn = None
    if n is not None:
        n64 = n.double()
        nn = inner(product(n64.T, n64))
    found = _Inner(inner(product(b.T, b)), inner(product(m_rows, m_rows.T)), nn, float(dot(m_rows, a)))

    def energies(left: torch.Tensor) -> torch.Tensor:
        rows = product(left.T, delta.b).double()
        return (product(rows, gram_a) * rows).sum(dim=1)

    def weights() -> torch.Tensor:
        return linalg.eigenvalues(gram_a).clamp_min(0.0)

    return _statistics(shape, displacement, found, weights, energies)


def _dense(v: RowBlocks, displacement: Displacement, delta: Dense, rho: bool) -> DeltaStatistics:
    dd = mm = vd = 0.0
    nn = 0.0 if rho else None
    for start in range(0, v.shape[1], DENSE_COLUMNS):
        block = delta.value[:, start : start + DENSE_COLUMNS]
        m, n = _products(v, block, rho)
        dd += float(block.double().square().sum())
        mm += float(m.double().square().sum())
        vd += float(m[start : start + block.shape[1]].double().diagonal().sum())  # (Vᵀ ΔW)_jj, this block's columns
        if n is not None and nn is not None:
            nn += float(n.double().square().sum())
    found = _Inner(dd, mm, nn, vd)
    weights = partial(_equal_weights, delta.value)
    return _statistics(v.shape, displacement, found, weights, delta.energies)


def _equal_weights(value: torch.Tensor) -> torch.Tensor:
    """Stand-ins for ΔWᵀΔW's eigenvalues: as many ones as its participation ratio ‖ΔW‖⁴/‖ΔWᵀΔW‖², at most `NUM_PROBES`.

    The denominator is Hutchinson's estimate, E‖ΔWᵀΔWω‖², whose error is far below the null's own spread.
    """
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(value.shape[1], 16, generator=generator).to(value.dtype)
    fourth = product(product(value, omega).T, value).double().square().sum(dim=1).mean()
    squared = value.double().square().sum()
    ratio = float(squared**2 / fourth) if fourth > 0 else 1.0
    return torch.ones(min(max(round(ratio), 1), NUM_PROBES))


def _statistics(
    shape: tuple[int, int],
    displacement: Displacement,
    inner: _Inner,
    weights: Callable[[], torch.Tensor],
    energies_in: Callable[[torch.Tensor], torch.Tensor],
) -> DeltaStatistics:
    """The statistics that follow from the inner products.

    Args:
        weights: gives the eigenvalues for `rho_null`; called only where ρ is measured.
        energies_in: `Delta.energies`, or the same from what is computed already.
    """
    safety_norm, delta_norm = displacement.norm, max(inner.dd, 0.0) ** 0.5
    if delta_norm < UNDEFINED_NORM or safety_norm < UNDEFINED_NORM:
        return DeltaStatistics(delta_norm, safety_norm, None, None, None, None, None, None, None)
    lift = shape[0] * inner.mm / (safety_norm**2 * inner.dd)
    cosine = inner.vd / (safety_norm * delta_norm)
    rho = gain = null = null_sd = energies = None
    if inner.nn is not None and displacement.probes is not None:
        gain = (inner.nn / inner.dd) ** 0.5 / safety_norm
        # VVᵀΔW = 0 means that ΔW is orthogonal to all of V: an angle of 90 degrees, not an undefined one.
        rho = min(inner.mm / (inner.nn * inner.dd) ** 0.5, 1.0) if inner.nn > 0.0 else 0.0
        null, null_sd = rho_null(displacement.probes, weights())
    if displacement.basis is not None:
        energies = tuple(float(share) for share in energies_in(displacement.basis.left) / inner.dd)
    return DeltaStatistics(delta_norm, safety_norm, rho, null, null_sd, lift, gain, cosine, energies)
