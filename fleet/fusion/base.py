"""What a fusion method is: the task vectors of several models, in one tensor, become one.

Like the realign methods, fusion methods import no torch and are written in `Delta`'s operators, so one definition
serves LoRA factors (by exact concatenation), dense weights, and shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class FusionMethod(BaseModel):
    """Parameters every fusion method has; a subclass per file, all listed in `fleet.fusion`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Mapping[str, float] = Field(default_factory=dict)
    """Model name -> its relative weight; 1 for a model that isn't named."""
    output: Literal["auto", "adapter", "model"] = "auto"
    """`adapter` keeps a LoRA fleet a LoRA, `model` writes full weights, `auto` keeps LoRA where every member is one."""

    def weight(self, model: str) -> float:
        return self.weights.get(model, 1.0)

    def coefficients(self, models: Sequence[str]) -> dict[str, float]:
        """λ_t of every model of the variant, by name; over all of them, even those that leave a tensor alone."""
        raise NotImplementedError

    def fuse(self, deltas_M: Sequence[Delta], weights_M: Sequence[float]) -> Delta:
        """One tensor's fused task vector; here the linear one, Σ_t λ_t τ_t, which methods that look at values override.

        Args:
            deltas_M: the M models' task vectors in the manifest's order, each (d_out, d_in) or a tensor's own shape.
                A model that leaves the tensor alone is not in the list.
            weights_M: λ_t of each, from `coefficients`.
        """
        total = deltas_M[0].scaled(weights_M[0])
        for delta, weight in zip(deltas_M[1:], weights_M[1:], strict=True):
            total = total.plus(delta.scaled(weight))  # in the manifest's order, so the rounding never varies
        return total
