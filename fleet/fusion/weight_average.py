"""Weight averaging: θ = θ_aligned + Σ_t (w_t / Σw) τ_t, the mean of the models' weights.

Source: Wortsman et al., "Model soups", arXiv 2203.05482, eq. 1 (uniform soup). Default: equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fleet.core.errors import ManifestError
from fleet.fusion.base import FusionMethod
from fleet.fusion.place import Place


class WeightAverage(FusionMethod):
    """Parameters of weight averaging."""

    method: Literal["weight_average"]

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """w_t / Σw for each model.

        Raises:
            ManifestError: the weights for this tensor add up to zero or less.
        """
        weights = super().coefficients(models, place)
        total = sum(weights.values())
        if total <= 0.0:
            raise ManifestError(
                f"weight_average: the weights add up to {total:g} for {place.tensor}; more than 0 is needed"
            )
        return {m: weight / total for m, weight in weights.items()}
