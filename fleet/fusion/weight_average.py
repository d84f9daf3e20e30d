"""Weight averaging: θ = θ_aligned + Σ_t (w_t / Σw) τ_t, the mean of the models' weights.

Source: Wortsman et al., "Model soups", arXiv 2203.05482, eq. 1 (uniform soup). Default: equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fleet.fusion.base import FusionMethod


class WeightAverage(FusionMethod):
    """Parameters of weight averaging."""

    method: Literal["weight_average"]

    def coefficients(self, models: Sequence[str]) -> dict[str, float]:
        total = sum(self.weight(m) for m in models)
        return {m: self.weight(m) / total for m in models}
