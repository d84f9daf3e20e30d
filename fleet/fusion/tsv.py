"""TSV-M: keep each task vector's leading singular triplets, and make their directions orthogonal between the tasks.

Source: Gargiulo et al., "Task singular vectors: reducing task interference in model merging", arXiv 2412.00081, alg. 1.
Each of T task vectors keeps its k = min(d_out, d_in)/T leading triplets. With U = [U_1 … U_T], V likewise, and U⊥ the
matrix with orthonormal columns nearest to U (Procrustes: PQᵀ for U = PDQᵀ),

    fused = λ U⊥ diag(w_1Σ_1, …, w_TΣ_T) V⊥ᵀ.

Where tasks share a direction, D has zeros, for which PQᵀ would have arbitrary directions; so it is taken over the
non-zero part of D alone (`fleet.fusion.matrix`). T counts all models of the variant. k is at least 1; where T is small,
it may be more than a LoRA has, which then keeps all its triplets. A single model keeps its task vector. Default: λ = 1,
equal weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from fleet.fusion.matrix import MatrixFusion, count_above, support
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta, LowRank


class Tsv(MatrixFusion):
    """Parameters of TSV-M."""

    method: Literal["tsv"]

    def product(self, deltas: Mapping[str, Delta], weights: Mapping[str, float], place: Place) -> LowRank:
        import torch

        from fleet.algebra.delta import LowRank

        k = max(min(next(iter(deltas.values())).shape) // len(weights), 1)
        triplets = {name: support(delta, self.tolerance).head(k) for name, delta in deltas.items()}
        left, right = (
            _nearest_orthonormal(torch.cat(sides, dim=1), self.tolerance)
            for sides in ([t.left for t in triplets.values()], [t.right for t in triplets.values()])
        )
        values = torch.cat([t.values * weights[name] for name, t in triplets.items()])
        return LowRank(left * values, right.T)


def _nearest_orthonormal(columns: torch.Tensor, tolerance: float) -> torch.Tensor:
    """PQᵀ for columns = PDQᵀ, over the part of D that isn't rounding; of the shape of `columns`."""
    from fleet.algebra import linalg
    from fleet.algebra.products import product

    left, values, right = linalg.svd(columns)
    rank = count_above(values, tolerance)
    return product(left[:, :rank], right[:rank])
