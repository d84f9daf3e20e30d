"""KnOTS: TIES in a basis that the task vectors share, instead of entry by entry of the weights.

Source: Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735. With

    [ΔW_1 … ΔW_T] = U Σ [V_1ᵀ … V_Tᵀ],   fused = λ U · TIES(ΣV_1ᵀ, …, ΣV_Tᵀ)

and ΣV_tᵀ = UᵀΔW_t. For LoRAs with [B_1 … B_T] = Q [R_1 … R_T] and A_tᵀ = Q_tT_t, U is Q times the left singular vectors
of the small [R_1T_1ᵀ … R_TT_Tᵀ], and the fusion is a LoRA (`methods.md` §8.5). The official code leaves out singular
values below an absolute bound, which may be all of a small LoRA's; here the bound is relative.
Defaults: nothing is trimmed, as in the official code; agreeing entries are averaged, as in TIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from fleet.fusion.matrix import MatrixFusion, count_above
from fleet.fusion.place import Place, at
from fleet.fusion.sparse import Share

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fleet.algebra.delta import Delta, LowRank


class Knots(MatrixFusion):
    """Parameters of KnOTS."""

    method: Literal["knots"]
    density: Share = 1.0
    """The share of each ΣV_tᵀ's entries that stay."""
    consensus: Literal["sum", "mean"] = "mean"
    """How the entries that agree with the elected sign are combined; the mean is weighted with the models' weights."""

    def product(self, deltas: Mapping[str, Delta], weights: Mapping[str, float], place: Place) -> LowRank:
        from fleet.algebra.delta import Dense, LowRank
        from fleet.algebra.sparsify import elected, trimmed

        basis = _shared_basis([*deltas.values()], self.tolerance)
        density = at(self.density, place)
        parts_M = [trimmed(Dense(_within(basis, delta)), density).value for delta in deltas.values()]
        return LowRank(basis, elected(parts_M, [weights[name] for name in deltas], self.consensus))


def _shared_basis(deltas_M: Sequence[Delta], tolerance: float) -> torch.Tensor:
    """U, without the directions whose singular values are rounding: (d_out, R), float64 for LoRAs."""
    import torch

    from fleet.algebra import linalg
    from fleet.algebra.delta import LowRank
    from fleet.algebra.products import product

    factors_M = [delta for delta in deltas_M if isinstance(delta, LowRank)]
    if not factors_M:
        left, values, _ = linalg.svd(torch.cat([d.dense() for d in deltas_M], dim=1))
        return left[:, : count_above(values, tolerance)]
    outer, inner = linalg.qr(torch.cat([f.b.double() for f in factors_M], dim=1))
    inner_M = torch.split(inner, [f.rank for f in factors_M], dim=1)
    small = torch.cat(
        [product(r, linalg.qr(f.a.double().T).r.T) for r, f in zip(inner_M, factors_M, strict=True)], dim=1
    )
    left, values, _ = linalg.svd(small)
    return product(outer, left[:, : count_above(values, tolerance)])


def _within(basis: torch.Tensor, delta: Delta) -> torch.Tensor:
    """UᵀΔW: (R, d_in), float32."""
    from fleet.algebra.delta import LowRank
    from fleet.algebra.products import product

    if isinstance(delta, LowRank):
        return product(product(basis.T, delta.b.double()), delta.a.double()).float()
    return product(basis.T, delta.value)
