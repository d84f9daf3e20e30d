"""RegMean: the Linear whose outputs are nearest to each model's own, on that model's inputs.

Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", arXiv 2212.09849, eq. 2 and the
scaling of section 3.3. With G_t = X_tᵀX_t the Gram matrix of a Linear's inputs X_t (n, d_in) under model t, G̃_t the
same with its off-diagonal entries times α, and ΔW_t (d_out, d_in),

    fused = (Σ_t λ_t ΔW_t G̃_t) (Σ_t λ_t G̃_t)^-1,

which for α = 1 minimises Σ_t λ_t ‖X_t Wᵀ − X_t W_tᵀ‖²; the same equation holds for weights instead of task vectors. The
sums are over all models of the variant. Other tensors get the mean with the weights λ_t, and so do a Linear's columns
for inputs that are zero in all X_t. A LoRA's ΔW_t G̃_t is B_t(A_tG̃_t), so LoRAs fuse into one of the sum of their ranks.
Defaults: α = 0.9, the paper's, with which the inverse always exists; equal λ_t.

The inverse is taken in float64, of the sum scaled to a unit diagonal: then no eigenvalue is below 1 − α, whatever the
inputs' sizes. A sum whose smallest eigenvalue may be zero but for rounding is refused (`least_eigenvalue`). A model
with more tokens in its Gram matrix counts more, as in the paper; divide by the number of tokens where that isn't
wanted.

For a realigned model, its fine-tuned model's Gram matrices are used: the repair is small, and the inputs are the same
texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.core.errors import CheckpointError
from fleet.fusion.base import FusionMethod, Thresholds, linear_combination, shares
from fleet.fusion.place import Place

if TYPE_CHECKING:
    import torch

    from fleet.algebra.delta import Delta
    from fleet.algebra.sparsify import Piece
    from fleet.checkpoint.curvature import CurvatureKind

_SUM_ROUNDING = 2.0**-24
"""The unit roundoff of float32, in which Gram matrices are summed unless they are stored in float64."""

_OWN_ROUNDING = 8 * 2.0**-53
"""What float64's own arithmetic may add to an eigenvalue, as a share of the norm. Measured: at most 2.2 roundoffs."""


class RegMean(FusionMethod):
    """Parameters of RegMean."""

    method: Literal["regmean"]
    off_diagonal: float = Field(default=0.9, ge=0.0, le=1.0)
    """α; at 1, Gram matrices of fewer tokens than d_in are singular, and refused."""
    without_gram: Literal["refuse", "mean"] = "refuse"
    """What to do about a Linear for which a model has no Gram matrix: refuse the run, or give the Linear the mean."""

    @property
    def is_linear(self) -> bool:
        return False

    @property
    def keeps_lora(self) -> bool:
        return True

    @property
    def is_entrywise(self) -> bool:
        return False

    @property
    def curvature(self) -> CurvatureKind:
        return "gram"

    @property
    def may_lack_curvature(self) -> bool:
        return self.without_gram == "mean"

    @property
    def without_curvature(self) -> str:
        return '; or set fuse.without_gram to "mean"'

    def coefficients(self, models: Sequence[str], place: Place) -> dict[str, float]:
        """λ_t: the models' weights, divided by their sum.

        Raises:
            ManifestError: a weight is negative here, or all are zero.
        """
        return shares(super().coefficients(models, place), place)

    def fuse(
        self,
        deltas: Mapping[str, Delta],
        weights: Mapping[str, float],
        place: Place,
        piece: Piece,
        thresholds: Thresholds | None = None,
        curvature: Mapping[str, torch.Tensor] | None = None,
    ) -> Delta:
        """One tensor's fused task vector; `deltas` have to be of the whole tensor.

        Raises:
            CheckpointError: the Gram matrices have no inverse.
        """
        import torch

        from fleet.algebra.delta import Dense, LowRank
        from fleet.algebra.products import product

        used = {name: weight for name, weight in weights.items() if weight}
        if not curvature or len(used) == 1:
            return linear_combination(deltas, weights)
        loras = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank)}
        is_lora = len(loras) == len(deltas)
        rows = {n: (loras[n].a if is_lora else d.dense()).double() for n, d in deltas.items() if n in used}
        if not rows:
            return linear_combination(deltas, weights)
        pulled: dict[str, torch.Tensor] = {}
        total, roundoff = torch.zeros((), dtype=torch.float64), 0.0
        for name, weight in used.items():
            stored = curvature[name]
            roundoff = max(roundoff, torch.finfo(stored.dtype).eps / 2.0)
            whole = stored.double()
            gram = whole * (self.off_diagonal * weight)
            diagonal(gram).copy_(diagonal(whole) * weight)
            if name in rows:
                pulled[name] = product(rows[name], gram)
            total = total + gram
        means = [value * used[name] for name, value in rows.items()]
        if is_lora:
            a = _solved(total, torch.cat([*pulled.values()]), torch.cat(means), place, roundoff).float()
            return LowRank(torch.cat([loras[name].b for name in rows], dim=1), a)
        whole_pull, mean = (torch.stack(values).sum(0) for values in ([*pulled.values()], means))
        return Dense(_solved(total, whole_pull, mean, place, roundoff).float())


def diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """A view of the last two axes' diagonal: (…, n)."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def least_eigenvalue(unit: torch.Tensor, roundoff: float) -> torch.Tensor:
    """The bound that a Gram matrix's eigenvalues must exceed, or its inverse is rounding: (…,) float64.

    An eigenvalue changes by at most ‖E‖₂ when the matrix changes by E (Weyl). The matrices are known up to two such E:

    - Each entry was rounded by itself when it was stored, by up to u of its size. Such errors are independent, and the
      norm of a matrix of them is about twice √n times their root mean square: at most 2u‖G‖/√n. The worst case, u‖G‖,
      would refuse every large matrix in bfloat16, well-conditioned or not.
    - Before that the entry was summed over the tokens, in float32 or better (a matrix of fewer tokens than inputs is
      singular). These errors are alike over whole rows, so they get the bound of the worst case, u‖G‖. (Measured, with
      up to 1024 inputs: a fifth of it.)

    ‖G‖ is the Frobenius norm: √n for inputs without correlation, n for inputs that are all the same.

    Args:
        unit: Gram matrices with a unit diagonal, (…, n, n) float64.
        roundoff: u, of the dtype they were stored in.
    """
    from fleet.algebra import linalg

    norm = linalg.matrix_norms(unit)
    stored = 2.0 * roundoff / unit.shape[-1] ** 0.5
    return norm * (stored + min(roundoff, _SUM_ROUNDING) + _OWN_ROUNDING)


def _solved(
    gram: torch.Tensor, pulled: torch.Tensor, mean: torch.Tensor, place: Place, roundoff: float
) -> torch.Tensor:
    """`pulled` gram^-1, (…, rows, d_in) float64, but the columns of `mean` for inputs that were always zero.

    Args:
        gram: Σ_t λ_t G̃_t, (…, d_in, d_in) float64.
        pulled: Σ_t λ_t ΔW_t G̃_t, (…, rows, d_in) float64.
        mean: Σ_t λ_t ΔW_t, of the same shape.
        roundoff: of the coarsest dtype that a Gram matrix was stored in.

    Raises:
        CheckpointError: an eigenvalue of `gram`, scaled to a unit diagonal, is below `least_eigenvalue`.
    """
    import torch

    from fleet.algebra import linalg

    silent = diagonal(gram) == 0.0
    scale = torch.where(silent, 1.0, diagonal(gram)).rsqrt()
    unit = gram * scale[..., :, None] * scale[..., None, :]
    diagonal(unit).fill_(1.0)
    least = least_eigenvalue(unit, roundoff)
    lowered = unit.clone()
    diagonal(lowered).sub_(least[..., None])
    factor = linalg.cholesky(unit)
    if factor is None or linalg.cholesky(lowered) is None:
        raise CheckpointError(
            f"regmean: {place.tensor}: the sum of the models' Gram matrices has no inverse; set fuse.off_diagonal to "
            "0.9, or store Gram matrices of more tokens, in float32"
        )
    found = torch.cholesky_solve((pulled * scale[..., None, :]).mT, factor).mT * scale[..., None, :]
    return torch.where(silent[..., None, :], mean, found)
