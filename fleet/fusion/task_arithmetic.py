"""Task arithmetic: θ = θ_aligned + λ Σ_t w_t τ_t.

Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089, §4. Default λ = 0.3, which SOMF uses
for four tasks; with T unrelated tasks a good λ is between 1/T and 1/√T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fleet.fusion.base import FusionMethod
from fleet.fusion.place import Place, Schedule, at


class TaskArithmetic(FusionMethod):
    """Parameters of task arithmetic."""

    method: Literal["task_arithmetic"]
    scale: Schedule = 0.3
    """λ: the scaling coefficient on the sum of the task vectors."""

    @property
    def divides_by_weights(self) -> bool:
        return False

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        scale = at(self.scale, place)
        return {m: scale * self.weight(m, place) for m in models}
