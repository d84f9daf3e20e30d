"""TIES: trim every task vector, elect a sign per entry, add up the entries that agree with it.

Source: Yadav et al., "TIES-merging", arXiv 2306.01708, alg. 1. The published trim is over all tensors of a model at
once (`trim: model`), as SOMF has it; mergekit's is over each tensor (`trim: tensor`). Defaults are SOMF's: the largest
20 % stay, and the agreeing entries are summed and scaled by 0.4; the original averages them, with a scale of 1. The
result is no product of LoRA factors, so it is written as a full model.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from fleet.fusion.base import Thresholds
from fleet.fusion.place import Place
from fleet.fusion.sparse import PerModel, Share, SparseFusion, at_model

if TYPE_CHECKING:
    from fleet.algebra.sparsify import Trim


class Ties(SparseFusion):
    """Parameters of TIES."""

    method: Literal["ties"]
    density: PerModel[Share] = 0.2
    """The share of a task vector's entries that stay: for all models, or by model, 1 for one that isn't named."""
    trim: Literal["tensor", "model"] = "tensor"
    """Whether `density` is a share of each tensor's entries, or of those of all the model's tensors together."""
    consensus: Literal["sum", "mean", "none"] = "sum"
    """`sum` and `mean` elect a sign for each entry, and take the sum of the entries that agree, or their weighted mean;
    `none` adds all entries up."""
    rescale: bool = Field(default=False, exclude_if=operator.not_)
    """Whether what stays of a task vector is scaled to the L1 norm that it had in the tensor."""
    scale: float = 0.4
    """λ, which the merged task vector is multiplied by."""

    @model_validator(mode="after")
    def _whole_models_have_one_density(self) -> Ties:
        given = self.density.values() if isinstance(self.density, Mapping) else (self.density,)
        if self.trim == "model" and not all(isinstance(density, int | float) for density in given):
            raise ValueError("ties: a model trimmed as a whole has one density, not a schedule; or trim each tensor")
        return self

    @model_validator(mode="after")
    def _whole_models_keep_no_norm(self) -> Ties:
        if self.trim == "model" and self.rescale:
            raise ValueError(
                "ties: rescale gives every tensor its norm back, which undoes a trim of whole models; set it to false, "
                "or trim each tensor"
            )
        return self

    @property
    def is_global(self) -> bool:
        return self.trim == "model"

    @property
    def keeps_norm(self) -> bool:
        return self.rescale

    def ranks(self, models: Sequence[str], place: Place, size: int) -> Mapping[str, Sequence[int]]:
        return {m: (max(round(at_model(self.density, m, place, 1.0) * size), 1),) for m in models}

    def cuts(self, models: Sequence[str], place: Place, thresholds: Thresholds) -> list[Trim]:
        from fleet.algebra.sparsify import Trim

        return [Trim(thresholds[name][0]) for name in models]
