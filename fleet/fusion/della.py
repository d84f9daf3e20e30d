"""DELLA: drop entries of every task vector at random, small ones more often, and rescale what stays by its probability.

Source: Deep, Bhardwaj and Poria, "DELLA-Merging", arXiv 2406.11617 (MagPrune). Within each row of n entries, entry i
with rank r_i by magnitude, 0 the smallest, stays with probability

    p_i = density − ε + 2ε · r_i/(n − 1)

and is divided by p_i, so that the mean stays. ε is defined as in mergekit, whose default is 0.15; the paper's ε is 2ε
here. mergekit rescales to the L1 norm instead of by 1/p_i. A tensor with one axis is one row; entries of equal
magnitude rank in their order; a row of one entry stays with probability `density`. A density of 1 keeps everything,
whatever ε. The mask is drawn for (seed, model, tensor), as DARE's. The default density, 0.7, is ours; the paper tunes
it. After the drop a sign is elected, as in TIES (`consensus: sum`); with `consensus: none` this is mergekit's
`della_linear`. The result is a full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from fleet.fusion.base import Entries, Thresholds
from fleet.fusion.place import Place
from fleet.fusion.sparse import PerModel, Share, SparseFusion, at_model, numbers_of, values_of

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta
    from fleet.algebra.sparsify import Piece

_ROUNDING = 1e-9


class Della(SparseFusion):
    """Parameters of DELLA."""

    gradient_revision: ClassVar[int] = 2

    method: Literal["della"]
    density: PerModel[Share] = 0.7
    """The share of a task vector's entries that stay, on average: for all models, or by model, 1 for one that isn't
    named."""
    epsilon: float = Field(default=0.15, ge=0.0)
    """ε: the smallest entry of a row stays with probability density − ε, the largest with density + ε."""
    rescale: bool = Field(default=True, exclude_if=bool)
    """Whether what stays is divided by its probability, p_i."""
    consensus: Literal["sum", "mean", "none"] = "sum"
    """`sum` and `mean` elect a sign for each entry, and take the sum of the entries that agree, or their weighted mean;
    `none` adds all entries up."""
    seed: int = 0
    """Seed of what is dropped."""

    @model_validator(mode="after")
    def _are_probabilities(self) -> Della:
        schedules = self.density.values() if isinstance(self.density, Mapping) else (self.density,)
        values = [value for schedule in schedules for value in values_of(schedule) if value != 1.0]
        numbers = numbers_of(values)
        if numbers and (min(numbers) - self.epsilon <= _ROUNDING or max(numbers) + self.epsilon > 1.0 + _ROUNDING):
            raise ValueError(
                f"della: density − epsilon has to be over 0 and density + epsilon at most 1, for densities from "
                f"{min(numbers):g} to {max(numbers):g} and an epsilon of {self.epsilon:g}"
            )
        return self

    def fuse(
        self,
        deltas: Mapping[str, Delta],
        weights: Mapping[str, float],
        place: Place,
        piece: Piece,
        thresholds: Thresholds | None = None,
        curvature: Mapping[str, torch.Tensor] | None = None,
    ) -> Delta:
        from fleet.algebra.delta import Dense
        from fleet.algebra.sparsify import WHOLE

        if any(len(delta.shape) != 1 for delta in deltas.values()):
            return super().fuse(deltas, weights, place, piece, thresholds)
        # A tensor with one axis is one row, of which a piece may have a part only; ranks are those of the whole row.
        rows: dict[str, Delta] = {}
        own = slice(piece.start, piece.start + next(iter(deltas.values())).shape[0])
        for name, delta in deltas.items():
            row = piece.gathered(delta.dense())
            row[own] = delta.dense()
            rows[name] = Dense(row)
        return Dense(super().fuse(rows, weights, place, WHOLE).dense()[own])

    def sparse(self, entries: Entries, thresholds: Thresholds) -> list[torch.Tensor]:
        from fleet.algebra.noise import noise_key, uniform

        found: list[torch.Tensor] = []
        for name, value in entries.values.items():
            density = at_model(self.density, name, entries.place, 1.0)
            if density == 1.0:
                found.append(value)
                continue
            key = noise_key(self.seed, name, entries.place.tensor)
            noise = uniform(key, entries.start, value.numel(), value.device)
            probability = self._probabilities(value, density, entries.columns)
            stays = value * (noise < probability)
            found.append(stays / probability if self.rescale else stays)
        return found

    def _probabilities(self, value: torch.Tensor, density: float, columns: int) -> torch.Tensor:
        """p_i of each entry: (n,) float32."""
        import torch

        if columns < 2:
            return torch.full_like(value, density, requires_grad=False)
        order = value.detach().view(-1, columns).abs().argsort(dim=1, stable=True)
        by_rank = torch.linspace(density - self.epsilon, density + self.epsilon, columns, device=value.device)
        return torch.empty_like(order, dtype=torch.float32).scatter_(1, order, by_rank.expand_as(order)).view(-1)
