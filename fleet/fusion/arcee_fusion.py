"""Arcee Fusion: a model takes over the entries of another in which the two differ most.

Source: mergekit's `arcee_fusion`; it has no paper. For models θ_1 and θ_2 and entry j of row i, where rows lie along
the last axis in the files,

    importance_ij = |θ_2,ij − θ_1,ij| · KL(softmax(θ_2,i) ‖ softmax(θ_1,i)),
    fused_ij = θ_2,ij where importance_ij ≥ median + k (Q3 − Q1), else θ_1,ij,

with the median and the quartiles of the tensor's importances, not interpolated: the lower of two neighbours. If more
than three quarters of the importances are zero, the threshold is zero too, and all entries are θ_2's. The default,
k = 1.5, is mergekit's. mergekit adds 1e-8 to each probability, which is left out here; of a tensor with more than a
million entries it takes the quartiles of a sample, which are exact here.

In a variant of one model, θ_1 is the aligned model; in one of two, the first model. The result is a full model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from fleet.fusion.base import Entries, FusionMethod, Thresholds, pair, refuse_more_than_two
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch


class ArceeFusion(FusionMethod):
    """Parameters of Arcee Fusion."""

    method: Literal["arcee_fusion"]
    fence: float = Field(default=1.5, ge=0.0)
    """k: how many interquartile ranges over the median an entry's importance has to be."""

    @model_validator(mode="after")
    def _takes_entries_as_they_are(self) -> ArceeFusion:
        if self.weights:
            raise ValueError("arcee_fusion has no weights; fence says how much of the second model is taken")
        if self.max_rank is not None:
            raise ValueError("arcee_fusion compares whole weights, so it makes no adapter; leave max_rank out")
        return self

    @property
    def is_linear(self) -> bool:
        return False

    @property
    def reads_aligned(self) -> bool:
        return True

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """1 for each model.

        Raises:
            ManifestError: there are more than two models.
        """
        refuse_more_than_two(self.method, models)
        return super().coefficients(models, place)

    def ranks(self, models: Sequence[str], place: Place, size: int) -> Mapping[str, Sequence[int]]:
        """The ranks of the first quartile, the median and the third quartile."""
        return {"importance": [size - quarters * (size - 1) // 4 for quarters in (1, 2, 3)]}

    def scores(self, entries: Entries) -> Mapping[str, torch.Tensor]:
        import torch

        assert entries.aligned is not None
        first, second = pair(entries)
        shape = (-1, entries.columns)
        aligned = entries.aligned.double().view(shape)
        # In float64: between two fine-tunes, the divergence is a small difference of sums many times its size.
        log_q, log_p = (torch.log_softmax(aligned + value.double().view(shape), dim=1) for value in (first, second))
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1, keepdim=True).clamp(min=0.0)
        return {"importance": ((second - first).abs().view(shape) * divergence.float()).view(-1)}

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        import torch

        lower, median, upper = thresholds["importance"]
        first, second = pair(entries)
        return torch.where(self.scores(entries)["importance"] >= median + self.fence * (upper - lower), second, first)
