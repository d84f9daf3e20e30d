"""Model stock: the mean of the task vectors, shrunk the more, the wider the angle between them.

Source: Jang, Yun and Han, "Model stock: all we need is just a few fine-tuned models", arXiv 2403.19522. With θ the
angle between the task vectors of N models in this tensor,

    fused = t · (1/N) Σ_t τ_t,   t = N cos θ / (1 + (N − 1) cos θ).

The paper has one angle; here cos θ is the mean over pairs, as in mergekit. A task vector that is zero has no angle, and
counts only in the mean. With fewer than two others, t = 1: a single model keeps its task vector. The paper's geometry
doesn't cover a negative cos θ; then t = 0. Default: equal weights; others weight the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fleet.fusion.gram import GramFusion, cosines, lengths

if TYPE_CHECKING:
    import torch


class ModelStock(GramFusion):
    """Parameters of model stock."""

    method: Literal["model_stock"]

    def mix(self, gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        norms = lengths(gram)
        used = (norms > 0.0) & (shares > 0.0)
        count = int(used.sum())
        if count < 2:
            return shares
        pairs = cosines(gram, norms, used)
        cosine = (pairs.sum() - pairs.trace()) / (count * (count - 1))
        return shares * (count * cosine / (1.0 + (count - 1) * cosine) if cosine > 0.0 else 0.0)
