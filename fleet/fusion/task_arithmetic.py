"""Task arithmetic: θ = θ_aligned + λ Σ_t w_t τ_t.

Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089, §4. Default λ = 0.3, which SOMF uses
for four tasks; with T unrelated tasks a good λ is between 1/T and 1/√T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fleet.fusion.base import FusionMethod


class TaskArithmetic(FusionMethod):
    """Parameters of task arithmetic."""

    method: Literal["task_arithmetic"]
    scale: float = Field(default=0.3, gt=0.0)
    """λ: the scaling coefficient on the sum of the task vectors."""

    def coefficients(self, models: Sequence[str]) -> dict[str, float]:
        return {m: self.scale * self.weight(m) for m in models}
