"""DARE: drop entries of every task vector at random, rescale what stays by 1/(1 − p), add the task vectors up.

Source: Yu et al., "Language models are super Mario", arXiv 2311.03099, eq. 1 and 2. The mask is on the product, not on
LoRA factors, and is drawn for (seed, model, tensor): it depends neither on the other models nor on how a tensor is
split over workers. Defaults are SOMF's: 20 % are dropped, λ = 0.3, task arithmetic. With `consensus: sum` this is
DARE-TIES, where the drop replaces TIES' trim. mergekit instead rescales to the L1 norm before the drop. The result is a
full model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.fusion.base import Thresholds
from fleet.fusion.place import Place
from fleet.fusion.sparse import DropRate, PerModel, SparseFusion, at_model

if TYPE_CHECKING:
    from fleet.algebra.sparsify import Drop


class Dare(SparseFusion):
    """Parameters of DARE."""

    method: Literal["dare"]
    drop_rate: PerModel[DropRate] = 0.2
    """p: the share of entries dropped; the rest is divided by 1 − p, so that the mean stays. For all models, or by
    model, 0 for one that isn't named."""
    rescale: bool = Field(default=True, exclude_if=bool)
    """Whether what stays is divided by its probability, 1 − p."""
    scale: float = Field(default=0.3, gt=0.0)
    """λ, which the sum is multiplied by."""
    seed: int = 0
    """Seed of what is dropped."""

    def cuts(self, models: Sequence[str], place: Place, thresholds: Thresholds) -> list[Drop]:
        from fleet.algebra.noise import noise_key
        from fleet.algebra.sparsify import Drop

        keys = [noise_key(self.seed, name, place.tensor) for name in models]
        return [
            Drop(key, at_model(self.drop_rate, m, place, 0.0), self.rescale)
            for m, key in zip(models, keys, strict=True)
        ]
