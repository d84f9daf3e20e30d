"""NuSLERP: SLERP by weights, of whole tensors or of each of their rows or columns.

Source: mergekit's `nuslerp`; it has no paper. With t = w_2/(w_1 + w_2) and Ω the angle between τ_1 and τ_2,

    fused = sin((1 − t)Ω)/sin Ω · τ_1 + sin(tΩ)/sin Ω · τ_2,

for the whole tensor, or for each row or each column by itself. It is linear only where sin² Ω is at most 1e-16, where
the vectors are parallel; where one is zero, Ω is a right angle, as in mergekit. So unlike SLERP, which is linear for
nearly parallel vectors, a vector that is nearly opposite to the other is passed around. mergekit applies this to task
vectors if it is given a base model, else to weights; here it is on task vectors always. Its `nuslerp_row_wise: true`
takes the vectors along the first axis, which are the columns of a Linear's weight (d_out, d_in).
Default: equal weights, whole tensors, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from fleet.core.errors import ManifestError
from fleet.fusion.base import Thresholds
from fleet.fusion.gram import GramFusion, cosines, lengths
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta
    from fleet.algebra.sparsify import Piece

_PARALLEL = 1e-16
"""sin² Ω up to which the interpolation is linear."""


class NuSlerp(GramFusion):
    """Parameters of NuSLERP."""

    method: Literal["nuslerp"]
    vectors: Literal["tensor", "rows", "columns"] = "tensor"
    """What has an angle: each tensor, or each row or column of a matrix (d_out, d_in). A tensor with one axis has one,
    whichever is said; of a stack of matrices, each has its rows or columns."""

    @property
    def by_row(self) -> bool:
        return self.vectors != "tensor"

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """1 − t and t.

        Raises:
            ManifestError: there are not two models, a weight is negative here, or both are zero.
        """
        if len(models) != 2:
            raise ManifestError(
                f"nuslerp fuses two models, not {len(models)} ({', '.join(models)}); "
                "name two in the variant's models, or take multi_slerp"
            )
        return super().coefficients(models, place)

    def fuse(
        self,
        deltas: Mapping[str, Delta],
        weights: Mapping[str, float],
        place: Place,
        piece: Piece,
        thresholds: Thresholds | None = None,
        curvature: Mapping[str, torch.Tensor] | None = None,
    ) -> Delta:
        if self.vectors != "columns" or len(next(iter(deltas.values())).shape) < 2:
            return super().fuse(deltas, weights, place, piece, thresholds)
        turned = {name: delta.transposed() for name, delta in deltas.items()}
        return super().fuse(turned, weights, place, piece, thresholds).transposed()

    def mix(self, gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        import torch

        cosine = cosines(gram, lengths(gram) > 0.0)[..., 0, 1].clamp(-1.0, 1.0)
        parallel = 1.0 - cosine.square() <= _PARALLEL
        # Where it is linear, the other branch has to be finite too, and its gradient.
        angle = torch.arccos(torch.where(parallel, 0.0, cosine)).unsqueeze(-1)
        return torch.where(parallel.unsqueeze(-1), shares, torch.sin(shares * angle) / torch.sin(angle))
