"""SCE: select the entries in which the models differ most, weight each model by its share of them, elect a sign.

Source: Wan et al., "FuseChat: knowledge fusion of chat models", arXiv 2408.07990. Per tensor:

    select:    the `select` share of entries with the largest variance over the models; the others become zero
    calculate: c_t = Σ_i τ_ti² / Σ_s Σ_i τ_si², over the selected entries
    erase:     entries whose sign is not that of Σ_t w_t τ_t; then the mean of what is left, weighted with w_t c_t

The variance is the population's, over the models that have a task vector in the tensor; those that leave it alone don't
count. Entries at the threshold all stay. An entry whose sum is zero has no sign, and becomes zero. mergekit's
`select_topk` is a share of the entries with a variance over zero, and its zero sums are positive. Defaults are
mergekit's: all entries, equal w. The result is a full model.

Where a mask is learned through the fusion, what is selected and which signs agree is locally constant; the shares c_t
are not, and are differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from fleet.fusion.base import Entries, FusionMethod, Thresholds
from fleet.fusion.place import Place, at
from fleet.fusion.sparse import Share

if TYPE_CHECKING:
    import torch


class Sce(FusionMethod):
    """Parameters of SCE."""

    gradient_revision: ClassVar[int] = 2

    method: Literal["sce"]
    select: Share = 1.0
    """The share of a tensor's entries that are selected."""

    @property
    def is_linear(self) -> bool:
        return False

    def ranks(self, models: Sequence[str], place: Place, size: int) -> Mapping[str, Sequence[int]]:
        select = at(self.select, place)
        return {"variance": (max(round(select * size), 1),)} if select < 1.0 else {}

    def scores(self, entries: Entries) -> Mapping[str, torch.Tensor]:
        """The variance of each entry over the models."""
        from fleet.algebra.sparsify import sum_of

        values_M = [value.detach() for value in entries.values.values()]
        mean = sum_of(values_M) / len(values_M)
        return {"variance": sum_of([(value - mean).square() for value in values_M]) / len(values_M)}

    def terms(self, entries: Entries, thresholds: Thresholds) -> torch.Tensor:
        """Σ_i τ_ti² over the selected entries: (T,) float64. Differentiable."""
        from fleet.algebra.grams import squares

        return squares(self._selected(entries, thresholds))

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        import torch

        from fleet.algebra.sparsify import sum_of

        assert sums is not None
        shares_M = (sums / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)).unbind()
        weights_M = [weights[name] for name in entries.values]
        values_M = [v * w for v, w in zip(self._selected(entries, thresholds), weights_M, strict=True)]
        sign = torch.sign(sum_of([value.detach() for value in values_M]))
        total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
        for value, weight, share in zip(values_M, weights_M, shares_M, strict=True):
            agrees = value.detach() * sign > 0.0
            total = total + torch.where(agrees, value, 0.0) * share
            divisor = divisor + agrees.to(sign.dtype) * (share * abs(weight))
        return total / torch.where(divisor > 0.0, divisor, 1.0)

    def _selected(self, entries: Entries, thresholds: Thresholds) -> list[torch.Tensor]:
        """The models' task vectors, zero where an entry is not selected."""
        values_M = [*entries.values.values()]
        if "variance" not in thresholds:
            return values_M
        (threshold,) = thresholds["variance"]
        selected = self.scores(entries)["variance"].float() >= threshold  # thresholds are float32
        return [value * selected for value in values_M]
