"""Fisher-weighted averaging: each entry is the mean of the models', weighted by how much their tasks depend on it.

Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", arXiv 2111.09832, eq. 2. With F_t the
diagonal of model t's Fisher information, and all operations entry by entry,

    fused = Σ_t λ_t F_t τ_t / Σ_t λ_t F_t,

and the same equation holds for weights instead of task vectors. The sums are over all models of the variant: one that
leaves a tensor alone pulls it towards the aligned model's. An F_t below `floor` is raised to it, so an entry on which
no model depends is the mean with the weights λ_t. The default, 1e-20, corresponds to a gradient of 1e-10, which is
rounding in any model. The paper's code has 1e-6, which for language models can be above most entries. A model whose
Fisher is larger overall counts more, as in the paper; `weights` can even that out. Default: equal λ_t. The result is a
full model.

For a realigned model, its fine-tuned model's Fisher is used: the repair is small, and the task is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.fusion.base import Entries, FusionMethod, Thresholds, shares
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch

    from fleet.checkpoint.curvature import CurvatureKind


class Fisher(FusionMethod):
    """Parameters of Fisher-weighted averaging."""

    method: Literal["fisher"]
    floor: float = Field(default=1e-20, ge=1e-30)
    """Smaller entries of a Fisher are raised to this; in the files' own unit, squared gradients."""

    @property
    def is_linear(self) -> bool:
        return False

    @property
    def curvature(self) -> CurvatureKind:
        return "fisher"

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """λ_t: the models' weights, divided by their sum.

        Raises:
            ManifestError: a weight is negative here, or all are zero.
        """
        return shares(super().coefficients(models, place), place)

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        from fleet.algebra.sparsify import sum_of

        pulls = {name: entries.curvature[name].clamp(min=self.floor) * weight for name, weight in weights.items()}
        total = sum_of([*pulls.values()])
        # The pull is divided before it is multiplied, so that a single model has exactly 1 everywhere.
        return sum_of([value * (pulls[name] / total) for name, value in entries.values.items()])
