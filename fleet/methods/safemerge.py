"""SafeMERGE: in the modules that drifted, average the task vector with a safety adapter's.

Source: Djuhera et al., "SafeMERGE", arXiv 2503.17239, §3. With V = W_aligned − W_unaligned and C = VVᵀ/‖V‖,

    ρ = cos(ΔW, CΔW);    ρ < τ:  ΔW ← αΔW + (1 − α)ΔW_safety;    otherwise ΔW stays.

ρ is scale-free, so C is never built: two skinny products and r×r Grams give it exactly (`fleet.algebra.statistics`).
The average is the equation's, in product space: a rank-(r + r_safety) LoRA by concatenation. The published code
averages PEFT's factors with √-weights instead, which adds cross terms the equation doesn't have.

Defaults: τ = 0.7 and α = 0.8, the paper's. A module whose ρ is undefined (ΔW = 0 or V = 0) is kept, and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fleet.methods.base import Decision, ModuleStatistics, RealignMethod

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class SafeMerge(RealignMethod):
    """Parameters of SafeMERGE."""

    method: Literal["safemerge"]
    threshold: float = Field(default=0.7, ge=0.0)
    """τ: modules whose statistic is below are merged. 0 merges none; above 1 merges all (for ρ)."""
    alpha: float = Field(default=0.8, ge=0.0, le=1.0)
    """α: the task vector's share in a merged module; the safety adapter has the rest."""
    statistic: Literal["rho", "lift"] = "rho"
    """What is compared with τ: the paper's ρ, or lift, whose value under no alignment is 1 whatever the shape."""

    needs_safety_adapter: ClassVar[bool] = True

    def decide(self, statistics: ModuleStatistics) -> Decision:
        value = getattr(statistics, self.statistic)
        if value is None:
            return Decision(module=statistics.module, edit=False, reason=f"{self.statistic} undefined: kept")
        edit = value < self.threshold
        relation = "<" if edit else "≥"
        return Decision(
            module=statistics.module, edit=edit, reason=f"{self.statistic} {value:.4f} {relation} {self.threshold:g}"
        )

    def edit(self, delta: Delta, safety: Delta | None) -> Delta:
        kept = delta.scaled(self.alpha)
        return kept if safety is None else kept.plus(safety.scaled(1.0 - self.alpha))
