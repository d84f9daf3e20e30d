"""LoX, applied after fine-tuning: push every module further along V's leading directions.

Source: Perin et al., "LoX: low-rank extrapolation robustifies LLM safety against fine-tuning", COLM 2025,
arXiv 2506.15606, eq. 4:

    W ← W + β·U_kΣ_kR_kᵀ,    V = W_aligned − W_unaligned ≈ U_kΣ_kR_kᵀ.

The paper hardens the aligned model before it is fine-tuned; adding the same to a fine-tuned model is our extension. It
is added in every module, whether or not the model was tuned there; embeddings are left alone. A LoRA gets rank r + k.
Defaults: k = 6 and β = 0.5, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.methods.base import Decision, Module, ModuleStatistics, Ranks, RealignMethod

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class Lox(RealignMethod):
    """Parameters of LoX."""

    method: Literal["lox"]
    coefficient: float = Field(default=0.5, gt=0.0)
    """β: how far W is pushed, in units of V."""
    extrapolated_directions: int = Field(default=6, ge=1)
    """k: how many of V's leading directions are added."""

    @property
    def edits_untouched(self) -> bool:
        return True

    @property
    def directions(self) -> int:
        return self.extrapolated_directions

    def rank(self, ranks: Ranks) -> int:
        return min(ranks.own + self.extrapolated_directions, ranks.limit)

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        reason = f"{self.extrapolated_directions} directions of V added {self.coefficient:g} times"
        return [Decision(module=m.module, edit=True, reason=reason) for m in modules]

    def edit(self, module: Module) -> Delta:
        pushed = module.displacement(self.extrapolated_directions).low_rank()
        return module.delta.plus(pushed.scaled(self.coefficient))
