"""Model breadcrumbs: leave out every task vector's largest entries, which are outliers, and its smallest.

Source: Davari and Belilovsky, "Model breadcrumbs", arXiv 2312.06795, §3. By magnitude, the largest entries, a share
`outliers`, are left out, and the next, a share `density`, stay; fewer outliers are left out if otherwise too few
entries would stay. At least one entry stays. Entries of equal magnitude go together: those that reach into what is to
stay all stay, from both sides. So of n entries at most round(outliers · n) are left out above, and at least
round(density · n) stay, however many tie; a task vector of differences of bfloat16 has few magnitudes. A zero counts
like any entry, as in the paper. Defaults are mergekit's, 1 % outliers; with `consensus: sum` this is mergekit's
`breadcrumbs_ties`. The result is a full model.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fleet.fusion.base import Entries, Thresholds
from fleet.fusion.place import Place
from fleet.fusion.sparse import PerModel, Share, SparseFusion, at_model

if TYPE_CHECKING:
    import torch


class Breadcrumbs(SparseFusion):
    """Parameters of model breadcrumbs."""

    revision: ClassVar[int] = 2

    method: Literal["breadcrumbs"]
    density: PerModel[Share] = 0.9
    """The share of a task vector's entries that stay: for all models, or by model, 1 for one that isn't named."""
    outliers: float = Field(default=0.01, ge=0.0, lt=1.0)
    """γ: the share of entries, the largest ones, that are left out."""
    rescale: bool = Field(default=False, exclude_if=operator.not_)
    """Whether what stays of a task vector is scaled to the L1 norm that it had in the tensor."""

    @property
    def keeps_norm(self) -> bool:
        return self.rescale

    def ranks(self, models: Sequence[str], place: Place, size: int) -> Mapping[str, Sequence[int]]:
        """The ranks of the smallest entry that stays and of the largest."""
        found: dict[str, tuple[int, int]] = {}
        for name in models:
            count = max(round(at_model(self.density, name, place, 1.0) * size), 1)
            left_out = min(round(self.outliers * size), size - count)
            found[name] = (left_out + count, left_out + 1)
        return found

    def sparse(self, entries: Entries, thresholds: Thresholds) -> list[torch.Tensor]:
        from fleet.algebra.sparsify import between

        return [between(value, *thresholds[name]) for name, value in entries.values.items()]
