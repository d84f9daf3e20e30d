"""CSULoRA: attenuate the part of the task vector that lies outside V's leading subspaces.

Source: Danilov et al., "CSULoRA: closest safe update low-rank adaptation", arXiv 2605.30640. With the projectors
P = U_kU_kᵀ and Q = R_kR_kᵀ of V's leading subspaces, ΔW splits into an aligned part PΔWQ, a partially aligned one
(PΔW(I − Q) + (I − P)ΔWQ) and the rest, (I − P)ΔW(I − Q). The closest safe update min ‖X − ΔW‖² + Σ_c λ_c‖X_c‖² is

    X = aligned + partial / (1 + λ_p) + rest / (1 + λ_o).

The paper's abstract ties the penalties to the parts' relative energies; we take λ_c = λ·‖ΔW_c‖²/‖ΔW‖², so a part that
holds more of ΔW is shrunk more. This form is our inference from the abstract: the paper's table of parameters is not
public. A LoRA gets the exact rank 2r: X is PB times one right factor plus (I − P)B times another.
Defaults: k = 8, λ = 4, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.methods.base import Decision, Module, ModuleStatistics, Need, Ranks, RealignMethod

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class CsuLora(RealignMethod):
    """Parameters of CSULoRA."""

    method: Literal["csulora"]
    penalty: float = Field(default=4.0, ge=0.0)
    """λ: 0 leaves ΔW as it is."""
    subspace_directions: int = Field(default=8, ge=1)
    """k: the dimension of V's left and right subspaces."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"displacement"})

    @property
    def directions(self) -> int:
        return self.subspace_directions

    def rank(self, ranks: Ranks) -> int:
        return min(2 * ranks.own, ranks.limit)

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        what = f"what lies outside V's {self.subspace_directions} leading directions shrunk"
        reasons = {True: what, False: "ΔW or V vanishes: kept"}
        edits = {m.module: m.is_defined for m in modules}
        return [Decision(module=name, edit=edit, reason=reasons[edit]) for name, edit in edits.items()]

    def edit(self, module: Module) -> Delta:
        delta, basis = module.delta, module.displacement(self.subspace_directions)
        left, other = delta.onto_left(basis.left), delta.outside_left(basis.left)
        total = delta.norm() ** 2
        aligned = left.weighted_right(basis.right, 1.0, 0.0).norm() ** 2
        rest = other.weighted_right(basis.right, 0.0, 1.0).norm() ** 2
        partial = max(total - aligned - rest, 0.0)
        keep_partial = 1.0 / (1.0 + self.penalty * partial / total)
        keep_rest = 1.0 / (1.0 + self.penalty * rest / total)
        return left.weighted_right(basis.right, 1.0, keep_partial).plus(
            other.weighted_right(basis.right, keep_partial, keep_rest)
        )
