"""The parameters of a learned mask: how it is learned, on what, and how it is applied."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fleet.core.frozen import Frozen
from fleet.core.identity import Json
from fleet.core.uris import Uri


def _warmup_steps(fields: dict[str, Any]) -> int:
    """The default, of the fields before it; `steps` is missing where it can't be used."""
    return min(20, fields.get("steps", 0) // 5)


class MaskTraining(Frozen):
    """How a mask is learned."""

    steps: int = Field(default=320, ge=1)
    """The most updates; the published 320 are one pass over 5,000 pairs."""
    batch_size: int = Field(default=16, ge=1)
    """Preference pairs per update."""
    learning_rate: float = Field(default=5e-3, gt=0.0)
    """Adam's peak learning rate; it falls to zero along a cosine."""
    warmup_steps: int = Field(default_factory=_warmup_steps, ge=0)
    """Updates over which the learning rate rises to its peak: by default 20, but at most a fifth of `steps`, so that
    few updates move the mask too."""
    beta: float = Field(default=0.1, gt=0.0)
    """DPO's β."""
    utility_weight: float = Field(default=0.0, ge=0.0)
    """μ: weight of KL(fine-tuned ‖ masked) on the models' task prompts."""
    sparsity_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the mean of σ(x), a penalty that makes the mask keep less."""
    held_out: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of preferences and task prompts that only evaluate; 0 trains on all of them, for all `steps`."""
    evaluate_every: int = Field(default=20, ge=1)
    """Updates between evaluations of the expected mask on what is held out."""
    patience: int = Field(default=4, ge=1)
    """Training stops after so many evaluations without a better one; the best mask is kept."""
    divergence_max: float | None = Field(default=None, gt=0.0)
    """Only masks whose held-out KL from the fine-tuned model is at most this, in nats per token, can be the best."""
    max_tokens: int = Field(default=1024, ge=8)
    """The most tokens of a prompt and a reply together; of longer ones the end of the reply is cut off."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the model computes in; logits and their gradients are float32."""
    seed: int = 0
    """Seed of the batches and of the mask's draws."""

    @model_validator(mode="after")
    def _evaluates_what_it_limits(self) -> MaskTraining:
        if self.divergence_max is not None and not self.held_out:
            raise ValueError("divergence_max is measured on what is held out; set held_out above 0")
        return self

    @property
    def uses_prompts(self) -> bool:
        return self.utility_weight > 0.0 or self.divergence_max is not None


class MaskSpec(Frozen):
    """Parameters of a learned mask; a method that applies one has them among its own."""

    preferences: Uri | None = None
    """Safety preferences: JSON lines with prompt, chosen and rejected, or `hf://datasets/org/name@commit/split`."""
    mask: Literal["dense", "rank", "rows_and_columns", "factor"] = "dense"
    """What a logit stands for: an entry of ΔW, a singular component, a row or column, or an entry of a LoRA factor."""
    learn_on: Literal["model", "fusion"] = "model"
    """Whether a mask is learned on each model by itself, or on the variant's fusion of all its models."""
    shared: bool = True
    """Whether the models of a fusion share one mask, as published, or have one each."""
    initial_logit: float = 0.0
    """x of every logit before training."""
    temperature: float = Field(default=0.5, gt=0.0)
    """λ of the Concrete distribution."""
    training: MaskTraining = MaskTraining()
    """How the mask is learned."""
    hardening: Literal["threshold", "expected", "sample"] = "expected"
    """How the learned mask is applied: σ(x) ≥ ½, σ(x) itself, or one seeded draw."""
    seed: int = 0
    """Seed of `hardening: sample` and of `arrangement: random`."""
    arrangement: Literal["learned", "random", "magnitude"] = "learned"
    """`random` and `magnitude` are controls: the same mask values in random places, or the largest on the largest
    entries of ΔW."""
    learned_on: str | None = None
    """The model of the catalogue whose mask is applied to every model; by default each has its own."""
    reuse: Uri | None = None
    """The folder of a mask that was learned before; then nothing is trained."""
    independent_adapters: bool = False
    """Allows a factor mask on adapters that did not start from base.safety; it then reverts to zero factors."""

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> MaskSpec:
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
    def reverts_to_safety(self) -> bool:
        """Whether adapters are taken to have started from the safety adapter, so that a factor mask reverts to it."""
        return self.mask == "factor" and not self.independent_adapters

    @property
    def adapters_only(self) -> bool:
        return self.mask in ("rank", "factor")

    def mask_identity(self) -> dict[str, Json]:
        """The parameters that decide the learned logits, without those of how the mask is applied."""
        fields = {"mask", "initial_logit", "temperature", "training", "independent_adapters"}
        return self.model_dump(mode="json", include=fields)
