"""Safe LoRA: in the modules that drifted, project the task vector onto the alignment subspace.

Source: Hsu et al., "Safe LoRA", NeurIPS 2024, arXiv 2405.16833, eq. 2 to 4. With V = W_aligned − W_unaligned and
C = VVᵀ/‖V‖,

    cos(ΔW, CΔW) ≤ τ:  ΔW ← CΔW = (CB)A;    otherwise ΔW stays.

A LoRA stays one of the same rank, with the same A. C is no projector: its mean eigenvalue is ‖V‖/d_out, so for V of a
usual size it shrinks ΔW to a hundredth or less, which amounts to deleting it (`methods.md` §3.2). A record says so
where the gain ‖CΔW‖/‖ΔW‖ is below 0.05, and `operator` offers what the deletion has to be compared with:

- `projection`: C, the paper's.
- `norm_preserving`: CΔW · ‖ΔW‖/‖CΔW‖, or 0 where CΔW = 0.
- `subspace`: U_kU_kᵀΔW with V's k leading left singular vectors, which is a true projection.
- `delete`: 0.

`select` has the paper's two rules: all modules at or below τ, or the `number` (default 10) lowest. Defaults are the
paper's: ρ, τ = 0.5; `docs/methods.md` says which statistic did better.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fleet.methods.base import (
    PROJECTION_IS_DELETION,
    Decision,
    Gated,
    Module,
    ModuleStatistics,
    Need,
    Ranks,
    around_cut,
    decision,
    lowest,
)

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class SafeLora(Gated):
    """Parameters of Safe LoRA."""

    method: Literal["safe_lora"]
    select: Literal["threshold", "number"] = "threshold"
    """Edit every module at or below τ, or the `number` lowest."""
    number: int = Field(default=10, ge=1)
    """How many modules `select: number` edits."""
    operator: Literal["projection", "norm_preserving", "subspace", "delete"] = "projection"
    """What an edited ΔW becomes; `projection` is the paper's."""
    subspace_directions: int = Field(default=8, ge=1)
    """k of `operator: subspace`: how many of V's leading directions it keeps."""

    paper_threshold: ClassVar[float] = 0.5

    @property
    def needs(self) -> frozenset[Need]:
        asked: tuple[Need, ...] = ("rho", "projection") if self.operator in ("projection", "norm_preserving") else ()
        return super().needs | frozenset(asked)

    @property
    def directions(self) -> int:
        return max(super().directions, self.subspace_directions if self.operator == "subspace" else 0)

    def rank(self, ranks: Ranks) -> int:
        return 0 if self.operator == "delete" else ranks.own

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        values = {m.module: value for m in modules if (value := self.value(m)) is not None}
        if self.select == "number":
            chosen = lowest(values, self.number)
            close = around_cut(values, {m.module: self.rounding(m) for m in modules}, self.number)
        else:
            chosen = frozenset(name for name, value in values.items() if value <= self.tau)
            close = frozenset(m.module for m in modules if self.is_close(m))
        decisions: list[Decision] = []
        for module in modules:
            if module.module not in values:
                decisions.append(self._kept(module))
                continue
            edit = module.module in chosen
            if self.select == "number":
                rule = f"{'among' if edit else 'not among'} the {self.number} lowest"
            else:
                rule = f"{'≤' if edit else '>'} {self.tau:g}"
            reason = f"{self.statistic} {values[module.module]:.4f} {rule}"
            if edit and self._deletes(module):
                reason += f"; gain {module.gain or 0.0:.2g}: the projection is a deletion"
            decisions.append(decision(module.module, edit, reason, module.module in close))
        return decisions

    def warning(self, modules: Sequence[ModuleStatistics], edited: Set[str]) -> str | None:
        found = [super().warning(modules, edited)]
        if deleted := [m.module for m in modules if m.module in edited and self._deletes(m)]:
            found.append(
                f"in {len(deleted)} of {len(edited)} edited modules the projection keeps less than "
                f"{PROJECTION_IS_DELETION:.0%} of ΔW: a deletion; compare with the operators delete and norm_preserving"
            )
        return "; ".join(text for text in found if text) or None

    def _deletes(self, module: ModuleStatistics) -> bool:
        return self.operator == "projection" and (module.gain or 0.0) < PROJECTION_IS_DELETION

    def edit(self, module: Module) -> Delta:
        match self.operator:
            case "projection":
                return module.projected
            case "norm_preserving":
                projected = module.projected
                norm = projected.norm()
                return projected.scaled(module.delta.norm() / norm) if norm > 0.0 else projected
            case "subspace":
                return module.delta.onto_left(module.displacement(self.subspace_directions).left)
            case "delete":
                return module.delta.scaled(0.0)
