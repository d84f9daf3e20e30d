"""SOMF: a mask over the task vector, learned on safety preferences, says which of its entries stay.

Source: Yi, Zheng, Wang, Wang and He, "A safety realignment framework via subspace-oriented model fusion for large
language models", arXiv 2405.09055. With δ_t = θ_t − θ_aligned,

    θ(m) = θ_aligned + F({m ⊙ δ_t / mean(m)}),        min over the mask's logits of L_DPO(θ(m); θ_aligned),

where F is nothing (`learn_on: model`) or the variant's own fusion of all its models (`learn_on: fusion`). The mask is
learned in a step of its own (`fleet.masks`); here is what it is asked for, and how it is applied.

Where we differ from the released code (`methods.md` §1.3): the reference is the frozen aligned model itself, not a
freshly masked one; TIES' gradient reaches every model; a hardened mask is applied to every model; logits are float32.

Defaults: initial logit 0, temperature 0.5, β 0.1, batches of 16 pairs, Adam at 5e-3 with a cosine, the published ones;
product space instead of factors. A mask is applied as `expected`, σ(x) itself, which is what the evaluations measure
and what one `sample`, the published way, is on average. `threshold` takes x = 0.1 for as much as x = 5, so of a mask
that hardly moved it makes far more than was learned. The published objective has no term for the tasks and none for
sparsity: both are here, and off.

`arrangement` makes the control: the same mask values, in random places or on the largest entries of the task vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleet.core.identity import Json
from fleet.core.uris import Uri
from fleet.methods.base import Decision, Module, ModuleStatistics, Need, Ranks, RealignMethod

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class MaskTraining(BaseModel):
    """How a mask is learned."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(default=320, ge=1)
    """Updates at most; the published 320 are one pass over 5,000 pairs."""
    batch_size: int = Field(default=16, ge=1)
    """Preference pairs per update."""
    learning_rate: float = Field(default=5e-3, gt=0.0)
    """Adam's, at its highest; it falls to zero along a cosine."""
    warmup_steps: int = Field(default=20, ge=0)
    beta: float = Field(default=0.1, gt=0.0)
    """DPO's β."""
    utility_weight: float = Field(default=0.0, ge=0.0)
    """μ: weight of KL(fine-tuned ‖ masked) on the models' task prompts."""
    sparsity_weight: float = Field(default=0.0, ge=0.0)
    """Weight of mean σ(x), which presses the mask to keep less."""
    held_out: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of preferences and task prompts that only evaluate; 0 trains on all, to the last step."""
    evaluate_every: int = Field(default=20, ge=1)
    """Updates between evaluations of the expected mask on what is held out."""
    patience: int = Field(default=4, ge=1)
    """Evaluations without a better one before training stops; the best mask is kept."""
    divergence_max: float | None = Field(default=None, gt=0.0)
    """Only masks whose held-out KL from the fine-tuned model is at most this, in nats per token, can be the best."""
    max_tokens: int = Field(default=1024, ge=8)
    """Longest prompt and reply together; longer pairs are cut at the end of the reply."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the model computes in; logits and their gradients are float32."""
    seed: int = 0
    """Of batches and of the mask's draws."""

    @model_validator(mode="after")
    def _evaluates_what_it_limits(self) -> MaskTraining:
        if self.divergence_max is not None and not self.held_out:
            raise ValueError("divergence_max is measured on what is held out; set held_out above 0")
        return self

    @property
    def uses_prompts(self) -> bool:
        return self.utility_weight > 0.0 or self.divergence_max is not None


class Somf(RealignMethod):
    """Parameters of SOMF."""

    method: Literal["somf"]
    preferences: Uri | None = None
    """Safety preferences: JSON lines with prompt, chosen and rejected, or `hf://datasets/org/name@commit/split`."""
    mask: Literal["dense", "rank", "rows_and_columns", "factor"] = "dense"
    """What a logit stands for: an entry of ΔW, a singular component, a row or column, or an entry of a LoRA factor."""
    learn_on: Literal["model", "fusion"] = "model"
    """Whether every model is made safe by itself, or all of them as the variant fuses them."""
    shared: bool = True
    """Whether the models of a fusion share one mask, as published, or have one each."""
    initial_logit: float = 0.0
    temperature: float = Field(default=0.5, gt=0.0)
    """λ of the Concrete distribution."""
    training: MaskTraining = MaskTraining()
    hardening: Literal["threshold", "expected", "sample"] = "expected"
    """How the learned mask is applied: σ(x) ≥ ½, σ(x) itself, or one seeded draw."""
    seed: int = 0
    """Of `sample`, and of a random arrangement."""
    arrangement: Literal["learned", "random", "magnitude"] = "learned"
    """`random` and `magnitude` are controls: the same values, in random places or the largest on the largest."""
    learned_on: str | None = None
    """The model of the catalogue whose mask every model takes; by default each its own."""
    reuse: Uri | None = None
    """The folder of a mask learned before: nothing is trained."""
    independent_adapters: bool = False
    """Allows a factor mask on adapters that did not start from base.safety; it then reverts to zero factors."""

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Somf:
        if (self.preferences is None) == (self.reuse is None):
            raise ValueError("give either preferences to learn a mask from, or reuse, the folder of one")
        if self.learn_on == "fusion" and (self.reuse or self.learned_on):
            raise ValueError("learn_on: fusion learns a mask of its own; leave out reuse and learned_on")
        if self.mask in ("rank", "factor") and (self.reuse or self.learned_on):
            raise ValueError(
                f"a {self.mask} mask means something only for the adapter it was learned on; use dense or "
                "rows_and_columns to carry a mask over"
            )
        if self.mask == "rank" and self.learn_on == "fusion" and self.shared:
            raise ValueError("a rank mask can't be shared: models have components of their own; set shared to false")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        asked: tuple[Need, ...] = ("mask",)
        return frozenset((*asked, "safety")) if self.reverts_to_safety else frozenset(asked)

    @property
    def mask_spec(self) -> Somf:
        return self

    @property
    def reverts_to_safety(self) -> bool:
        """Whether adapters are taken to continue the safety adapter, so that a factor mask reverts to it."""
        return self.mask == "factor" and not self.independent_adapters

    @property
    def adapters_only(self) -> bool:
        return self.mask in ("rank", "factor")

    @property
    def pairs_factors(self) -> bool:
        return self.reverts_to_safety

    @property
    def uses_fusion(self) -> bool:
        return self.learn_on == "fusion"

    def identity(self) -> dict[str, Json]:
        # Where preferences or a mask lie is no part of what is made; their content is an input of the step.
        return self.model_dump(mode="json", exclude={"preferences", "reuse", "training"})

    def mask_identity(self) -> dict[str, Json]:
        """What decides the learned logits; how they are applied afterwards is not in it."""
        fields = {"mask", "initial_logit", "temperature", "training", "independent_adapters"}
        return self.model_dump(mode="json", include=fields)

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        reason = f"{self.mask} mask, {self.hardening}"
        return [Decision(module=m.module, edit=True, reason=reason) for m in modules]

    def rank(self, ranks: Ranks) -> int:
        return ranks.limit if self.mask == "dense" else ranks.own

    def edit(self, module: Module) -> Delta:
        return module.masked()

    def edit_rest(self, module: Module) -> Delta:
        return module.masked()
