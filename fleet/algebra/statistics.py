"""How a module's task vectors stand to the safety displacement V = W_aligned − W_unaligned, exactly and cheaply.

With ΔW = BA, M = VᵀB (d_in × r), N = VM (d_out × r) and the r × r Grams G_X = XᵀX (G_A = AAᵀ), every inner product that
ρ, gain and lift need is ⟨G_X, G_A⟩ (`methods.md` §8.1). Two skinny products, 4·d_out·d_in·r flops, replace the
d_out × d_out operator C = VVᵀ/‖V‖ of the papers; the B factors of a whole catalogue are stacked side by side, so that
V is read once for all of them (§8.8). Products are float32; Grams are float64, because they square the condition
number. N serves ρ and gain alone, and is left out where nobody asks for them: lift needs half the flops.

The null of ρ, its values where ΔW is indifferent to V, depends on V's spectrum and the shape (§8.2). Its mean and
standard deviation follow from V's singular values, which belong to V alone, and from how many directions ΔW has: see
`rho_null`. Nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fleet.algebra import linalg
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.products import dot, product
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import Triplets, gram

UNDEFINED_NORM = 1e-12
"""Below this Frobenius norm a matrix has no direction in float32 worth comparing, and its statistics are undefined."""

NULL_RESOLUTION = 1e-5
"""A null whose standard deviation is below this share of its mean has none: V's singular values are all equal, or
nearly so, ρ is the same for every ΔW, and what remains is rounding."""

DENSE_COLUMNS = 1024
"""A dense ΔW is taken this many columns at a time, so that VᵀΔW and VVᵀΔW are never in memory whole."""


class Asked(NamedTuple):
    """What is measured of one task vector, beside its norm."""

    displacement: bool = False
    """‖V‖, lift and cosine, which take one product with V."""
    rho: bool = False
    """ρ and gain, which take a second one."""
    rho_null: bool = False
    """The mean and the standard deviation of ρ's null, which take V's spectrum."""
    energies: int = 0
    """The energies along this many of V's leading directions, which take these."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `DeltaStatistics` that are measured."""
        groups = (
            (True, ("delta_norm",)),
            (self.displacement, ("safety_norm", "lift", "cosine")),
            (self.rho, ("rho", "gain")),
            (self.rho_null, ("rho_null", "rho_null_sd")),
            (self.energies > 0, ("energies",)),
        )
        return tuple(name for is_asked, names in groups if is_asked for name in names)


@dataclass(frozen=True)
class Displacement:
    """V of one module, with what of it alone serves all models."""

    v: RowBlocks
    """(d_out, d_in), float32 (or float64 for tests)."""
    norm: Callable[[], float]
    """Gives ‖V‖, Frobenius; called after the products, which read V."""
    spectrum: torch.Tensor | None = None
    """(min(d_out, d_in),), float64: σ² of every singular value; None where no null is asked for."""
    basis: Triplets | None = None
    """V's leading singular triplets; None where no directions are asked for."""


class DeltaStatistics(NamedTuple):
    """See `fleet.methods.base.ModuleStatistics`, whose fields these are; None where undefined or not asked for."""

    delta_norm: float
    safety_norm: float | None = None
    rho: float | None = None
    rho_null: float | None = None
    rho_null_sd: float | None = None
    lift: float | None = None
    gain: float | None = None
    cosine: float | None = None
    energies: tuple[float, ...] | None = None


def delta_statistics(
    displacement: Displacement | None, deltas: Mapping[str, Delta], asked: Mapping[str, Asked]
) -> dict[str, DeltaStatistics]:
    """Statistics of many models' ΔW in one module; V is read at most twice for all LoRAs together.

    A model's statistics are the same to the last bit whichever other models are measured with it, and whatever else is
    asked for.

    Args:
        displacement: V; None where nothing of it is asked for.
        deltas: model -> ΔW of V's shape and dtype.
        asked: model -> what of it is measured.
    """
    compared = {n: d for n, d in deltas.items() if asked[n].displacement} if displacement is not None else {}
    found = {n: DeltaStatistics(d.norm()) for n, d in deltas.items() if n not in compared}
    if displacement is None:
        return found
    loras = {n: d for n, d in compared.items() if isinstance(d, LowRank)}
    products = _lora_products(displacement.v, loras, {n for n in loras if asked[n].rho})
    for name, delta in loras.items():
        found[name] = _low_rank(displacement, delta, asked[name], *products[name])
    for name, delta in compared.items():
        if isinstance(delta, Dense):
            found[name] = _dense(displacement, delta, asked[name])
    return found


def projected_factor(v: RowBlocks, norm: float, delta: LowRank) -> torch.Tensor:
    """CB, the B factor of CΔW = (CB)A with C = VVᵀ/‖V‖ and ΔW's own A: (d_out, r).

    Weights are made of it, so it is a product of its own, with the same bits whichever models are measured together.

    Args:
        norm: ‖V‖, above 0.
    """
    return v.times(v.transposed_times(delta.b)) / norm


def rho_null(spectrum: torch.Tensor, rows: int, directions: float) -> tuple[float, float]:
    """Mean and standard deviation of ρ over ΔW = BA with a Gaussian B and a fixed A (`methods.md` §8.2's moments).

    In V's left singular basis ρ = Σ σ_i²z_i / √(Σ σ_i⁴z_i · Σ z_i) with one z_i per row, independent and of one law:
    Σ_j λ_j x_j² of normal x_j and the eigenvalues λ of AAᵀ. If these are equal, as many as A has rows, z_i is gamma
    with shape a = r/2; else it is taken for the gamma of its own mean and variance, r being the participation ratio
    (Σλ)²/Σλ². Then ρ does not depend on Σ z_i (Lukacs, 1955), and with 1/√N = (2/√π) ∫ exp(−y²N) dy over y > 0 and
    1/N = 2 ∫ y exp(−y²N) dy both moments are integrals over one variable of products over i, known in closed form:

        E exp(−y²Σ σ_i⁴z_i) = Π (1 + y²σ_i⁴/a)^(−a),    and its derivatives by σ² for the factor Σ σ_i²z_i.

    They are summed by the trapezoidal rule at y = exp(x − exp(−x)) (Takahasi and Mori, 1974).

    The error, against 10⁴ draws: none that can be told from that of the draws (0.02 standard deviations in the mean,
    1 % in the standard deviation) where the λ are equal, from V of rank 1 to all its σ equal, and from r = 1 on. With
    unequal ones the mean is right to 0.04 standard deviations, and the standard deviation, which comes out too large,
    to 3 % for λ_j ∝ 0.9ʲ and 8 % for λ_j ∝ 0.7ʲ.

    Args:
        spectrum: (n,), float64: σ² of all of V's singular values, not all 0.
        rows: d_out; from n on V has σ = 0.
        directions: r, at least 1.

    Returns:
        The mean, and the standard deviation: 0 where it is below `NULL_RESOLUTION` of the mean.
    """
    s, a = spectrum / spectrum.sum(), directions / 2.0
    beyond = 2.0 + math.log(10.0) * _DIGITS / (2.0 * a + 2.0)  # the integrands fall at least as y^(−2a−2)
    x = torch.arange(_FIRST_NODE, beyond, _NODE_STEP, dtype=torch.float64)
    y = (x - (-x).exp()).exp() / s.square().sum().sqrt()
    weights = y * (1.0 + (-x).exp()) * _NODE_STEP
    shrunk = 1.0 / (1.0 + y.square()[:, None] * (s.square() / a))  # (nodes, n)
    weights *= (a * shrunk.log().sum(dim=1)).exp()
    first = (shrunk * s).sum(dim=1)
    second = first.square() + (shrunk.square() * s.square()).sum(dim=1) / a
    root = math.exp(math.lgamma(a * rows + 0.5) - math.lgamma(a * rows)) / math.sqrt(a)  # E √(Σ z_i)
    mean = 2.0 / math.sqrt(math.pi) * float((weights * first).sum()) / root
    variance = 2.0 * float((weights * y * second).sum()) / rows - mean**2
    return mean, math.sqrt(variance) if variance > (NULL_RESOLUTION * mean) ** 2 else 0.0


_FIRST_NODE, _NODE_STEP, _DIGITS = -3.6, 0.125, 14
"""Of the integrals in `rho_null`: halving the step changes the standard deviation by 1e-9 of itself."""


def _products(v: RowBlocks, b: torch.Tensor, both: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """M = VᵀB and, with `both`, N = VM."""
    m = v.transposed_times(b)
    return m, v.times(m) if both else None


def _lora_products(
    v: RowBlocks, loras: Mapping[str, LowRank], both: Set[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Model -> M = VᵀB and, for those in `both`, N = VM; V is read for all together."""
    if not loras:
        return {}
    m = _side_by_side(v.transposed_times, {name: delta.b for name, delta in loras.items()})
    n = _side_by_side(v.times, {name: m[name] for name in loras if name in both}) if both else {}
    return {name: (m[name], n.get(name)) for name in loras}


def _side_by_side(
    multiply: Callable[[torch.Tensor, Sequence[int]], torch.Tensor], columns: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Every model's columns, multiplied at once."""
    widths = [c.shape[1] for c in columns.values()]
    parts = torch.split(multiply(torch.cat([*columns.values()], dim=1), widths), widths, dim=1)
    return dict(zip(columns, parts, strict=True))


class _Inner(NamedTuple):
    """dd = ‖ΔW‖², mm = ‖VᵀΔW‖², nn = ‖VVᵀΔW‖² if asked for, vd = ⟨V, ΔW⟩."""

    dd: float
    mm: float
    nn: float | None
    vd: float


def _low_rank(
    displacement: Displacement, delta: LowRank, asked: Asked, m: torch.Tensor, n: torch.Tensor | None
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

    return _statistics(displacement, asked, found, lambda: gram_a, energies)


def _dense(displacement: Displacement, delta: Dense, asked: Asked) -> DeltaStatistics:
    dd = mm = vd = 0.0
    nn = 0.0 if asked.rho else None
    v = displacement.v
    for start in range(0, v.shape[1], DENSE_COLUMNS):
        block = delta.value[:, start : start + DENSE_COLUMNS]
        m, n = _products(v, block, asked.rho)
        dd += float(block.double().square().sum())
        mm += float(m.double().square().sum())
        vd += float(m[start : start + block.shape[1]].double().diagonal().sum())  # (Vᵀ ΔW)_jj, this block's columns
        if n is not None and nn is not None:
            nn += float(n.double().square().sum())
    found = _Inner(dd, mm, nn, vd)
    return _statistics(displacement, asked, found, lambda: gram(RowBlocks.of(delta.value)), delta.energies)


def _statistics(
    displacement: Displacement,
    asked: Asked,
    inner: _Inner,
    own_gram: Callable[[], torch.Tensor],
    energies_in: Callable[[torch.Tensor], torch.Tensor],
) -> DeltaStatistics:
    """The statistics that follow from the inner products.

    Args:
        own_gram: gives a Gram matrix with ΔW's own participation ratio, as far as ρ's null depends on it.
        energies_in: `Delta.energies`, or the same from what is computed already.
    """
    rows = displacement.v.shape[0]
    safety_norm, delta_norm = displacement.norm(), max(inner.dd, 0.0) ** 0.5
    if delta_norm < UNDEFINED_NORM or safety_norm < UNDEFINED_NORM:
        return DeltaStatistics(delta_norm, safety_norm)
    rho = gain = null = null_sd = energies = None
    if inner.nn is not None:
        gain = (inner.nn / inner.dd) ** 0.5 / safety_norm
        # VVᵀΔW = 0 means that ΔW is orthogonal to all of V: an angle of 90 degrees, not an undefined one.
        rho = min(inner.mm / (inner.nn * inner.dd) ** 0.5, 1.0) if inner.nn > 0.0 else 0.0
    if asked.rho_null and displacement.spectrum is not None:
        null, null_sd = rho_null(displacement.spectrum, rows, _participation(own_gram()))
    if asked.energies and displacement.basis is not None:
        left = displacement.basis.left[:, : asked.energies]
        energies = tuple(float(share) for share in energies_in(left) / inner.dd)
    return DeltaStatistics(
        delta_norm,
        safety_norm,
        rho=rho,
        rho_null=null,
        rho_null_sd=null_sd,
        lift=rows * inner.mm / (safety_norm**2 * inner.dd),
        gain=gain,
        cosine=inner.vd / (safety_norm * delta_norm),
        energies=energies,
    )


def _participation(gram_x: torch.Tensor) -> float:
    """(Σλ)²/Σλ² of a Gram matrix's eigenvalues λ: how many directions share its energy, from 1 to its size."""
    trace = float(gram_x.diagonal().double().sum())
    return max((trace / linalg.norm(gram_x)) ** 2, 1.0)
