"""The base of KnOTS, TSV-M and Iso-C, which work on whole matrices in bases of singular vectors.

Tensors that are no matrices get the mean, λ Σ_t w_t τ_t / T over all T models of the variant, as in the papers of the
last two. LoRAs are fused into a LoRA of at most the sum of their ranks, and no d_out × d_in matrix is built. Singular
values up to a share `tolerance` of the largest are rounding: their directions are arbitrary, so they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fleet.fusion.base import FusionMethod, Thresholds, linear_combination
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta, LowRank
    from fleet.algebra.sparsify import Piece
    from fleet.algebra.spectral import Triplets


class MatrixFusion(FusionMethod):
    """Parameters of the methods that need whole matrices."""

    scale: float = Field(default=1.0, gt=0.0)
    """λ, the factor on the result."""
    tolerance: float = Field(default=1e-5, ge=0.0, lt=1.0)
    """Singular values up to this share of the largest count as zero."""

    @property
    def is_linear(self) -> bool:
        return False

    @property
    def keeps_lora(self) -> bool:
        return True

    @property
    def is_entrywise(self) -> bool:
        return False

    def product(self, deltas: Mapping[str, Delta], weights: Mapping[str, float], place: Place) -> LowRank:
        """The fused task vector of a matrix, before λ, as a product of any rank and dtype.

        Args:
            deltas: model -> its task vector, (d_out, d_in), in the manifest's order; all LoRAs or all dense.
            weights: model -> w_t, of all models of the variant.
        """
        raise NotImplementedError

    def fuse(
        self,
        deltas: Mapping[str, Delta],
        weights: Mapping[str, float],
        place: Place,
        piece: Piece,
        thresholds: Thresholds | None = None,
        curvature: Mapping[str, torch.Tensor] | None = None,
    ) -> Delta:
        """One tensor's fused task vector; `deltas` have to be of the whole tensor."""
        from fleet.algebra.delta import Dense, LowRank

        if len(next(iter(deltas.values())).shape) != 2:
            return linear_combination(deltas, weights).scaled(self.scale / len(weights))
        used = {name: delta for name, delta in deltas.items() if weights[name]} or deltas
        is_lora = all(isinstance(delta, LowRank) for delta in used.values())
        given = used if is_lora else {name: Dense(delta.dense()) for name, delta in used.items()}
        found = self.product(given, weights, place)
        found = LowRank(found.b.float() * self.scale, found.a.float())
        return found if is_lora else Dense(found.dense())


def support(delta: Delta, tolerance: float) -> Triplets:
    """The singular triplets whose values are over `tolerance` times the largest; a LoRA's in float64."""
    from fleet.algebra import linalg
    from fleet.algebra.delta import LowRank
    from fleet.algebra.spectral import Triplets, low_rank_triplets

    if isinstance(delta, LowRank):
        triplets = low_rank_triplets(delta)
    else:
        left, values, right = linalg.svd(delta.value)
        triplets = Triplets(left, values, right.T)
    return triplets.head(count_above(triplets.values, tolerance))


def count_above(values: torch.Tensor, tolerance: float) -> int:
    """How many singular values, given in falling order, are over `tolerance` times the first."""
    return int((values > tolerance * values[:1]).sum())
