"""WiSE-FT: scale every task vector, ΔW ← αΔW: the uniform-scaling control every selective method has to beat.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, eq. 1, with the aligned model as
the zero-shot one. α = 1 is the fine-tuned model, α = 0 the aligned model. Default α = 0.5, the paper's
recommendation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.methods.base import Decision, ModuleStatistics, RealignMethod

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class WiseFt(RealignMethod):
    """Parameters of WiSE-FT. It scales modules; tensors outside modules (norms, embeddings) stay as fine-tuned."""

    method: Literal["wise_ft"]
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """α: the share of the task vector that stays."""

    def decide(self, statistics: ModuleStatistics) -> Decision:
        return Decision(module=statistics.module, edit=True, reason=f"scaled by {self.alpha:g}")

    def edit(self, delta: Delta, safety: Delta | None) -> Delta:
        return delta.scaled(self.alpha)
