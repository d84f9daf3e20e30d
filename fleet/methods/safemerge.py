"""SafeMERGE: in the modules that drifted, average the task vector with a safety adapter's.

Source: Djuhera et al., "SafeMERGE", arXiv 2503.17239, §3. With V = W_aligned − W_unaligned and C = VVᵀ/‖V‖,

    ρ = cos(ΔW, CΔW);    ρ < τ:  ΔW ← αΔW + (1 − α)ΔW_safety;    otherwise ΔW stays.

ρ is scale-free, so C is never built: two skinny products and r×r Grams give it exactly (`fleet.algebra.statistics`).
A module whose statistic is undefined (ΔW = 0 or V = 0) is kept, and its reason says so; the published code merges it.

`merge` says how the two are merged:
- `exact`, the paper's equation, in product space: a rank-(r + r_safety) LoRA by concatenation.
- `peft_factor`, what the published code does, bit for bit: PEFT's linear operator, A = Σ√(w_i s_i)A_i and
  B = Σ√(w_i s_i)B_i. It adds cross terms that the equation doesn't have; it serves to reproduce published numbers.
- `dare`: DARE on both task vectors first, in product space, each rescaled by 1/density.
- `ties`: TIES of the two, in product space, with weights α and 1 − α.
The last two work on the entries of ΔW, so a LoRA is recompressed after them; the record says what was lost.

Defaults are the paper's: ρ, τ = 0.7, α = 0.8. ρ is large wherever ΔW lies in one eigenspace of VVᵀ, whichever one, and
its null depends on the shape; `docs/methods.md` says which statistic did better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fleet.methods.base import Gated, Module, Need, Ranks

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class SafeMerge(Gated):
    """Parameters of SafeMERGE."""

    method: Literal["safemerge"]
    alpha: float = Field(default=0.8, ge=0.0, le=1.0)
    """α: the task vector's share in a merged module; the safety adapter has the rest."""
    merge: Literal["exact", "peft_factor", "dare", "ties"] = "exact"
    """How the two are merged; `exact` is the paper's equation."""
    density: float = Field(default=0.5, gt=0.0, le=1.0)
    """The share of entries that `dare` and `ties` keep."""
    seed: int = 0
    """Seed of `dare`'s masks."""

    paper_threshold: ClassVar[float] = 0.7

    @property
    def adapters_only(self) -> bool:
        return self.merge == "peft_factor"

    @property
    def pairs_factors(self) -> bool:
        return self.merge == "peft_factor"

    @property
    def needs(self) -> frozenset[Need]:
        asked: tuple[Need, ...] = ("safety",)
        return super().needs | frozenset(asked)

    def rank(self, ranks: Ranks) -> int:
        return ranks.own if self.merge == "peft_factor" else min(ranks.own + ranks.safety, ranks.limit)

    def edit(self, module: Module) -> Delta:
        from fleet.algebra.factors import factor_average
        from fleet.algebra.sparsify import dropped, ties

        weights = (self.alpha, 1.0 - self.alpha)
        safety = module.safety
        if self.merge == "peft_factor" and safety is not None:
            return factor_average(module.factors, weights)
        if safety is None and self.merge in ("exact", "peft_factor"):
            return module.delta.scaled(self.alpha)
        pair = (module.delta, module.delta.scaled(0.0) if safety is None else safety)
        if self.merge == "ties":
            return ties(pair, weights, self.density)
        if self.merge == "dare":
            generator = module.generator(self.seed)
            pair = tuple(dropped(delta, 1.0 - self.density, generator) for delta in pair)
        return pair[0].scaled(weights[0]).plus(pair[1].scaled(weights[1]))
