"""NearSwap: a model moves towards another, in each entry by at most t.

Source: the card of alchemonaut/QuartetAnemoi-70B-t0.0001 on the Hub, which first used it, and mergekit's `nearswap`; it
has no paper. Entry by entry, with the share min(t/|θ_2 − θ_1|, 1) of θ_2,

    fused = θ_1 + clamp(θ_2 − θ_1, −t, t).

So where the two differ by at most t, it is θ_2's entry. mergekit raises |θ_2 − θ_1| to 1e-6 first, which makes a
difference for smaller t alone. In a variant of one model, θ_1 is the aligned model; in one of two, the first model.
Default: t = 0.0001, that of the model it is known from. The result is a full model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from fleet.core.errors import ManifestError
from fleet.fusion.base import Entries, FusionMethod, Thresholds, pair, refuse_more_than_two
from fleet.fusion.place import Place, Schedule, at

if TYPE_CHECKING:
    import torch


class NearSwap(FusionMethod):
    """Parameters of NearSwap."""

    method: Literal["nearswap"]
    t: Schedule = 1e-4
    """The most that an entry moves, in the weights' own unit; 0 or more."""

    @model_validator(mode="after")
    def _has_no_weights(self) -> NearSwap:
        if self.weights:
            raise ValueError("nearswap has no weights; t says how far the first model moves towards the second")
        return self

    @property
    def is_linear(self) -> bool:
        return False

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """1 for each model.

        Raises:
            ManifestError: there are more than two models, or t is negative here.
        """
        refuse_more_than_two(self.method, models)
        if at(self.t, place) < 0.0:
            raise ManifestError(f"nearswap: t is {at(self.t, place):g} for {place.tensor}; give one of 0 or more")
        return super().coefficients(models, place)

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        first, second = pair(entries)
        t = at(self.t, entries.place)
        return first + (second - first).clamp(-t, t)
