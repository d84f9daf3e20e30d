"""The base of methods that fuse to Σ_t c_t τ_t, where c depends on the task vectors' inner products alone.

Lengths and angles of the task vectors, and so everything in their span, follow from the T×T matrix of ⟨τ_s, τ_t⟩ over
one tensor. For LoRAs it comes from the factors, ⟨B_sA_s, B_tA_t⟩ = tr((B_sᵀB_t)(A_tA_sᵀ)), and their fusion is again a
LoRA (`methods.md` §8.1 and §8.4). All of this is computed in float64: inner products square the condition number.

A mask that is learned through such a fusion moves c, too, so c is differentiated with the task vectors: through the
inner products, summed over all workers that share the tensor, and through `mix`, iterations and all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from fleet.fusion.base import Coefficient, Entries, FusionMethod, Thresholds, linear_combination, shares, weighted_sum
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta
    from fleet.algebra.sparsify import Piece


class GramFusion(FusionMethod):
    """Parameters of the methods that mix whole task vectors by their lengths and angles."""

    gradient_revision: ClassVar[int] = 2

    @property
    def is_linear(self) -> bool:
        return False

    @property
    def keeps_lora(self) -> bool:
        return True

    @property
    def by_row(self) -> bool:
        """Whether the rows of a matrix, (d_out, d_in), are mixed each by its own lengths and angles.

        A tensor of one axis is one row; of a stack of matrices, each has its rows. Whole tensors are needed then.
        """
        return False

    @property
    def is_entrywise(self) -> bool:
        return not self.by_row

    def mix(self, gram: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """c, the coefficients of the task vectors: (T,) float64, finite even if some or all task vectors are zero.

        Differentiable in the inner products, with finite gradients; what it decides by them is locally constant.

        Args:
            gram: ⟨τ_s, τ_t⟩ of all models of the variant, in the manifest's order, (T, T) float64. A model that leaves
                the tensor alone has zeros. A method that may work by rows takes (rows, T, T) and gives (rows, T).
            shares: λ_t, (T,) float64.
        """
        raise NotImplementedError

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """The models' shares, w_t / Σw.

        Raises:
            ManifestError: a weight is negative here, or all are zero.
        """
        return shares(super().coefficients(models, place), place)

    def terms(self, entries: Entries, thresholds: Thresholds) -> torch.Tensor:
        """The Gram matrix of the models that have a task vector here: (T, T) float64."""
        from fleet.algebra.grams import gram

        return gram([*entries.values.values()])

    def combine(
        self, entries: Entries, weights: Mapping[str, float], thresholds: Thresholds, sums: torch.Tensor | None
    ) -> torch.Tensor:
        """Σ_t c_t τ_t, (n,) float32. Differentiable in the task vectors and in the sums."""
        assert sums is not None
        return weighted_sum(entries.values, self._mixed([*entries.values], weights, sums))

    def fuse(
        self,
        deltas: Mapping[str, Delta],
        weights: Mapping[str, float],
        place: Place,
        piece: Piece,
        thresholds: Thresholds | None = None,
        curvature: Mapping[str, torch.Tensor] | None = None,
    ) -> Delta:
        from fleet.algebra.delta import LowRank
        from fleet.algebra.grams import gram_of_factors

        if self.by_row:
            return self._by_row(deltas, weights)
        factors = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}
        if len(factors) < len(deltas):
            return super().fuse(deltas, weights, place, piece, thresholds)
        gram = piece.total(gram_of_factors([*factors.values()]))
        return linear_combination(deltas, self._mixed([*deltas], weights, gram))

    def _by_row(self, deltas: Mapping[str, Delta], weights: Mapping[str, float]) -> Delta:
        from fleet.algebra.delta import Dense, LowRank
        from fleet.algebra.grams import row_grams, row_grams_of_factors

        factors = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}
        if len(factors) == len(deltas):
            mixed = self._mixed([*deltas], weights, row_grams_of_factors([*factors.values()]))
            return linear_combination(factors, mixed)
        shape = next(iter(deltas.values())).shape
        rows = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        values = {name: delta.dense().reshape(rows) for name, delta in deltas.items()}
        mixed = self._mixed([*deltas], weights, row_grams([*values.values()]))
        return Dense(weighted_sum(values, mixed).reshape(shape))

    def _mixed(
        self, present: Sequence[str], weights: Mapping[str, float], gram: torch.Tensor
    ) -> dict[str, Coefficient]:
        """Model -> c_t: numbers, or scalars to differentiate; of Gram matrices of rows, (rows, 1) float32."""
        import torch

        names = [*weights]
        at = torch.tensor([names.index(name) for name in present])
        whole = torch.zeros(*gram.shape[:-2], len(names), len(names), dtype=torch.float64)
        whole[..., at[:, None], at] = gram.cpu()
        mixed = self.mix(whole, torch.tensor([*weights.values()], dtype=torch.float64))
        if self.by_row:
            return dict(zip(names, mixed.float().unsqueeze(-1).unbind(dim=1), strict=True))
        return dict(zip(names, mixed.unbind() if mixed.requires_grad else map(float, mixed), strict=True))


def lengths(gram: torch.Tensor) -> torch.Tensor:
    """‖τ_t‖: (…, T) float64. Where it is zero, so is its gradient, which has no limit there."""
    import torch

    squares = gram.diagonal(dim1=-2, dim2=-1)
    return torch.where(squares > 0.0, torch.where(squares > 0.0, squares, 1.0).sqrt(), 0.0)


def cosines(gram: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """cos of the angles between the task vectors: (…, T, T) float64.

    Args:
        used: (…, T) bool: none of these is zero. The others' cosines are taken for 0.
    """
    import torch

    norms = torch.where(used, lengths(gram), 1.0)
    both = used.unsqueeze(-1) & used.unsqueeze(-2)
    return torch.where(both, gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2)), 0.0)
