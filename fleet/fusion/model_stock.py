"""Model stock: the mean of the task vectors, shrunk the more, the wider the angle between them.

Source: Jang, Yun and Han, "Model stock: all we need is just a few fine-tuned models", arXiv 2403.19522. With θ the
angle between the task vectors of N models in this tensor,

    fused = t · (1/N) Σ_t τ_t,   t = N cos θ / (1 + (N − 1) cos θ).

The paper has one angle; here cos θ is the mean over pairs, as in mergekit. A task vector that is zero has no angle, and
counts only in the mean. With fewer than two others, t = 1: a single model keeps its task vector. The paper's geometry
doesn't cover a negative cos θ; then t = 0. Default: equal weights; others weight the mean.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.fusion.gram import GramFusion, cosines, lengths

if TYPE_CHECKING:
    import torch


class ModelStock(GramFusion):
    """Parameters of model stock."""

    method: Literal["model_stock"]
    filter_wise: bool = Field(default=False, exclude_if=operator.not_)
    """Whether each row of a matrix, the weights of one output, has an angle and a t of its own; else each tensor."""

    @property
    def by_row(self) -> bool:
        return self.filter_wise

    def mix(self, gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        import torch

        used = (lengths(gram) > 0.0) & (shares > 0.0)
        count = used.sum(dim=-1)
        pairs = cosines(gram, used)
        total = pairs.sum(dim=(-2, -1)) - pairs.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        cosine = total / (count * (count - 1)).clamp(min=1)
        # A negative mean has no shrinking; where it is taken for zero, it is zero in the denominator too, which then
        # has no pole.
        aligned = cosine.clamp(min=0.0)
        t = torch.where(count < 2, 1.0, count * aligned / (1.0 + (count - 1) * aligned))
        return t.unsqueeze(-1) * shares
