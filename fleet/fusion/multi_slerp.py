"""Multi-SLERP: the weighted mean of the task vectors' directions in one tangent space, with the mean of their lengths.

Source: Goddard's note "Multi-SLERP" and mergekit's `multislerp`. The tangent space is at the normalised Σ w_t u_t with
u_t = τ_t/‖τ_t‖, and the result is one step of the Karcher mean from there; `fleet.fusion.karcher` has the equations and
the edge cases. mergekit projects onto the tangent space instead of taking the logarithm; such tangents add up to zero,
so its result is the normalised Σ w_t u_t itself. The two differ by third-order terms of the angles.
Default: equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.fusion.gram import GramFusion
from fleet.fusion.karcher import spherical_mean
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch


class MultiSlerp(GramFusion):
    """Parameters of Multi-SLERP."""

    method: Literal["multi_slerp"]
    normalize_weights: bool = Field(default=True, exclude_if=bool)
    """Whether the length is the weighted mean of the task vectors' lengths; if not, it is the sum Σ w_t ‖τ_t‖. The
    direction is the same."""

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """w_t / Σw, or w_t if they are not normalised.

        Raises:
            ManifestError: a weight is negative here, or all are zero.
        """
        normalized = super().coefficients(models, place)
        return normalized if self.normalize_weights else {m: self.weight(m, place) for m in models}

    def mix(self, gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        return spherical_mean(gram, shares, max_steps=1, tolerance=0.0)
