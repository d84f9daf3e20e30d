"""The rank that a realigned LoRA is written with, from headers alone: for planning and for the workers."""

from __future__ import annotations

from dataclasses import dataclass

from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, lora_rank
from fleet.checkpoint.modules import canonical_shape
from fleet.methods.base import Ranks, RealignMethod


@dataclass(frozen=True)
class Parts:
    """The models that a realigned model is made of."""

    aligned: FullModel
    model: Model
    safety: Model | None
    harmful: Model | None

    def own_rank(self, tensor: str) -> int:
        """The model's own rank in one module; 0 where it has none."""
        return lora_rank(self.model, tensor.removesuffix(".weight"))

    def edited_rank(self, method: RealignMethod, tensor: str) -> int:
        """The rank that one module is written with after the method's edit."""
        module, limit = tensor.removesuffix(".weight"), min(canonical_shape(self.aligned, tensor))
        own, safety, harmful = (lora_rank(m, module) for m in (self.model, self.safety, self.harmful))
        return method.written_rank(Ranks(own, safety, harmful, limit))
