"""RESTA: add a safety vector to every fine-tuned model.

Source: Bhardwaj, Anh and Poria, "Language models are Homer Simpson!", ACL 2024, arXiv 2402.11746, eq. 2 and 3:

    θ ← θ_finetuned + γ·δ_safe,    δ_safe = θ_aligned − θ_harmful,

where θ_harmful is the aligned model made harmful by fine-tuning, so that δ_safe is little more than the ability to
refuse. If θ_harmful is a LoRA on the aligned model, δ_safe = −s_hB_hA_h, and a fine-tuned LoRA stays one, of rank
r + r_h: the sum is in product space, without the cross terms of adding factors. RESTA_d drops entries of the task
vector first (DARE, rate p); a LoRA is recompressed after that.

`vector: displacement` takes V = W_aligned − W_unaligned for δ_safe, cut to its k leading directions. This is a cheap
proxy and not the paper's method: V holds all of instruction tuning, not only refusal.

Defaults: γ = 0.3, within the 0.2 to 0.5 the paper and its users take; p = 0 (RESTA), 0.3 is usual for RESTA_d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.methods.base import Decision, Module, ModuleStatistics, Need, Ranks, RealignMethod

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class Resta(RealignMethod):
    """Parameters of RESTA."""

    method: Literal["resta"]
    gamma: float = Field(default=0.3, gt=0.0)
    """γ: how much of the safety vector is added."""
    drop_rate: float = Field(default=0.0, ge=0.0, lt=1.0)
    """p: the share of the task vector's entries that RESTA_d drops first; 0 is RESTA."""
    vector: Literal["harmful", "displacement"] = "harmful"
    """The safety vector: from `base.harmful`, or the proxy from the unaligned model."""
    vector_directions: int = Field(default=8, ge=1)
    """k: how many of V's leading directions the proxy has."""
    seed: int = 0
    """Seed of the dropped entries."""

    @property
    def edits_untouched(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"harmful"}) if self.vector == "harmful" else frozenset()

    @property
    def directions(self) -> int:
        return self.vector_directions if self.vector == "displacement" else 0

    def rank(self, ranks: Ranks) -> int:
        added = ranks.harmful if self.vector == "harmful" else self.vector_directions
        return min(ranks.own + added, ranks.limit)

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        what = "the safety vector" if self.vector == "harmful" else "V, a proxy for the safety vector,"
        return [Decision(module=m.module, edit=True, reason=f"{what} added {self.gamma:g} times") for m in modules]

    def edit(self, module: Module) -> Delta:
        from fleet.algebra.sparsify import dropped

        delta = module.delta
        if self.drop_rate:
            delta = dropped(delta, self.drop_rate, module.generator(self.seed))
        if self.vector == "displacement":
            return delta.plus(module.displacement(self.vector_directions).low_rank().scaled(self.gamma))
        harmful = module.harmful
        return delta if harmful is None else delta.minus(harmful.scaled(self.gamma))
