"""Iso-C: the sum of the task vectors with all its singular values set to their mean.

Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces", arXiv
2502.04959. With Σ_t w_t τ_t = U diag(σ) Vᵀ of rank r,

    fused = λ σ̄ U Vᵀ,   σ̄ = (1/r) Σ_i σ_i.

The paper's r is min(d_out, d_in). Here it is the numerical rank, without singular values that are rounding: in a sum of
LoRAs, raising those would give weight to directions that no model has (`methods.md` §6). Default: λ = 1; the paper
tunes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from fleet.fusion.base import linear_combination
from fleet.fusion.matrix import MatrixFusion, support
from fleet.fusion.place import Place

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta, LowRank


class Iso(MatrixFusion):
    """Parameters of Iso-C."""

    method: Literal["iso"]

    def product(self, deltas: Mapping[str, Delta], weights: Mapping[str, float], place: Place) -> LowRank:
        import torch

        triplets = support(linear_combination(deltas, weights), self.tolerance)
        return triplets._replace(values=torch.full_like(triplets.values, float(triplets.values.mean()))).low_rank()
