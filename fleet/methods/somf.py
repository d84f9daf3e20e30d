"""SOMF: a mask over the task vector, learned on safety preferences, says which of its entries stay.

Source: Yi, Zheng, Wang, Wang and He, "A safety realignment framework via subspace-oriented model fusion for large
language models", arXiv 2405.09055. With δ_t = θ_t − θ_aligned,

    θ(m) = θ_aligned + F({m ⊙ δ_t / mean(m)}),        min over the mask's logits of L_DPO(θ(m); θ_aligned),

where F is the identity (`learn_on: model`) or the variant's own fusion of all its models (`learn_on: fusion`). The mask
is learned in a step of its own (`fleet.masks`); this file has the method's parameters, and applies the mask.

Where we differ from the released code (`methods.md` §1.3): the reference is the frozen aligned model itself, not a
freshly masked one; TIES' gradient reaches every model; a hardened mask is applied to every model; logits are float32.

Defaults: initial logit 0, temperature 0.5, β 0.1, batches of 16 pairs, Adam at 5e-3 with a cosine, the published ones;
product space instead of factors. A mask is applied as `expected`, σ(x) itself: the evaluations measure that, and it is
the mean of `sample`, the published way. `threshold` treats x = 0.1 like x = 5, so it exaggerates a mask whose logits
hardly moved. The published objective has no term for the tasks and none for sparsity; both exist here, with weight 0 by
default.

`arrangement` makes the control: the same mask values, in random places or on the largest entries of the task vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fleet.core.identity import Json
from fleet.methods.base import Decision, Module, ModuleStatistics, Need, Ranks, RealignMethod
from fleet.methods.mask_spec import MaskSpec

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class Somf(MaskSpec, RealignMethod):
    """Parameters of SOMF."""

    method: Literal["somf"]

    @property
    def mask_spec(self) -> MaskSpec:
        return self

    @property
    def needs(self) -> frozenset[Need]:
        asked: tuple[Need, ...] = ("mask",)
        return frozenset((*asked, "safety")) if self.reverts_to_safety else frozenset(asked)

    @property
    def pairs_factors(self) -> bool:
        return self.reverts_to_safety

    @property
    def uses_fusion(self) -> bool:
        return self.learn_on == "fusion"

    def identity(self) -> dict[str, Json]:
        # The addresses of preferences and masks decide nothing: their content is an input of the step. How the mask was
        # trained is part of that content.
        return self.model_dump(mode="json", exclude={"preferences", "reuse", "training"})

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        reason = f"{self.mask} mask, {self.hardening}"
        return [Decision(module=m.module, edit=True, reason=reason) for m in modules]

    def rank(self, ranks: Ranks) -> int:
        return ranks.limit if self.mask == "dense" else ranks.own

    def edit(self, module: Module) -> Delta:
        return module.masked()

    def edit_rest(self, module: Module) -> Delta:
        return module.masked()
