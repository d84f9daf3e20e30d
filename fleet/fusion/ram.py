"""RAM: an entry that one model alone changed is kept whole, one that several changed is their mean.

Source: Yuan et al., "Behavior knowledge merge in reinforced agentic models", arXiv 2601.13572. After reinforcement
learning task vectors are sparse, and a mean over all models would dilute what one of them learned alone. A model
changed entry j if |τ_tj| > ε; with n_j the number of models that did,

    fused_j = Σ_t 1[|τ_tj| > ε] λ_t^[n_j = 1] τ_tj / max(n_j, 1),   λ_t = 1.

RAM+ raises what a model changed alone by how much of its changes it shares with others, over the entries of a tensor:

    λ_t = 1 + r · min(ρ_t, α),   ρ_t = (entries it shares) / (entries it changed alone).

The paper's ρ_t is over the whole model; over each tensor is mergekit's `ramplus_tl`. Defaults are mergekit's. The
result is a full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from fleet.fusion.base import Entries, FusionMethod, Thresholds

if TYPE_CHECKING:
    import torch


class _Ram(FusionMethod):
    """What RAM and RAM+ have in common."""

    epsilon: float = Field(default=1e-5, ge=0.0)
    """ε: a model changed the entries whose magnitude is above this; in the weights' own unit."""

    @model_validator(mode="after")
    def _has_no_weights(self) -> Self:
        if self.weights:
            raise ValueError("RAM has no weights: models that change an entry have equal shares of it; leave them out")
        return self

    @property
    def is_linear(self) -> bool:
        return False

    def raised(self, sums: torch.Tensor | None) -> Mapping[int, float]:
        """Model, by its place in the entries -> λ_t, where that isn't 1."""
        return {}

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        import torch

        values_M = [*entries.values.values()]
        changed_M, count = self._changed(entries)
        raised = self.raised(sums)
        total = torch.zeros_like(values_M[0])
        for i, (value, changed) in enumerate(zip(values_M, changed_M, strict=True)):
            own = torch.where(count == 1, raised.get(i, 1.0), 1.0 / count.clamp(min=1)).to(value.dtype)
            total = total + torch.where(changed, value * own, 0.0)
        return total

    def _changed(self, entries: Entries) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Which entries each model changed, (n,) bool, and by how many models each was, (n,) int.

        Locally constant in the task vectors, so it has no gradient.
        """
        import torch

        changed_M = [value.detach().abs() > self.epsilon for value in entries.values.values()]
        return changed_M, torch.stack(changed_M).sum(dim=0)


class Ram(_Ram):
    """Parameters of RAM."""

    method: Literal["ram"]


class RamPlusTl(_Ram):
    """Parameters of RAM+ by tensors."""

    method: Literal["ramplus_tl"]
    r: float = Field(default=0.1, ge=0.0)
    """How much of ρ_t an entry that one model changed alone is raised by."""
    alpha: float = Field(default=0.2, ge=0.0)
    """α: the largest ρ_t that counts."""

    def terms(self, entries: Entries, thresholds: Thresholds) -> torch.Tensor:
        """How many of its entries each model shares, and changed alone: (T, 2) float64."""
        import torch

        changed_M, count = self._changed(entries)
        return torch.stack(
            [torch.stack([(c & (count > 1)).sum(), (c & (count == 1)).sum()]) for c in changed_M]
        ).double()

    def raised(self, sums: torch.Tensor | None) -> Mapping[int, float]:
        assert sums is not None
        shared, alone = sums.unbind(dim=1)
        ratios = (shared / alone.clamp(min=1.0)).clamp(max=self.alpha)
        return dict(enumerate(map(float, 1.0 + self.r * ratios)))
