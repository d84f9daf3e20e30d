"""Consensus merging: the sum of the task vectors, in the entries that at least k of the models need.

Source: Wang et al., "Localizing task information for improved model merging and compression", arXiv 2405.07813 (TALL
masks and consensus merging). With τ_MTL = Σ_t w_t τ_t,

    m_t = 1[|τ_t| ≥ λ |τ_MTL − τ_t|],   fused = scale · 1[Σ_t m_t ≥ k] · τ_MTL.

Other entries become zero: those that fewer models need, or none. Defaults: k = 2, the paper's; λ = 0.4, which the paper
tunes between 0.2 and 0.6; and task arithmetic's scale, 0.3. In a variant of fewer than k models, all have to need an
entry. The result is a full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.fusion.base import Entries, FusionMethod, Thresholds, weighted_sum

if TYPE_CHECKING:
    import torch


class Consensus(FusionMethod):
    """Parameters of consensus merging."""

    method: Literal["consensus"]
    models_needed: int = Field(default=2, ge=1)
    """k: how many models' masks an entry has to be in."""
    mask_scale: float = Field(default=0.4, gt=0.0)
    """λ: the higher, the fewer entries a model's mask has."""
    scale: float = Field(default=0.3, gt=0.0)
    """Factor on the result."""

    @property
    def divides_by_weights(self) -> bool:
        return False

    @property
    def is_linear(self) -> bool:
        return False

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        import torch

        total = weighted_sum(entries.values, weights)
        votes = torch.zeros_like(total, dtype=torch.int32)
        for value in entries.values.values():
            mine = value.detach()
            votes += mine.abs() >= (total.detach() - mine).abs() * self.mask_scale
        needed = min(self.models_needed, len(weights))
        return total * (votes >= needed) * self.scale
