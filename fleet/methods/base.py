"""What a realign method is: pure decisions on survey statistics, and an exact edit of one module's task vector.

This file and the method files import no torch: a method is written in terms of `Delta`'s own operators
(`scaled`, `plus`), so the same few lines serve LoRA factors, dense weights and shapes alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class ModuleStatistics(BaseModel):
    """What the survey measured of one model's task vector ΔW in one module (`methods.md` §8.1's Gram forms).

    A statistic is None where it is undefined: ΔW or V vanishes, so there is no direction to compare.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    rank: int | None
    """LoRA rank; None for a dense task vector."""
    delta_norm: float
    """‖ΔW‖, Frobenius."""
    safety_norm: float
    """‖V‖, Frobenius, of V = W_aligned − W_unaligned."""
    rho: float | None
    """cos(VVᵀΔW, ΔW) in [0, 1]; its value under no alignment depends on the shape."""
    lift: float | None
    """d_out‖VᵀΔW‖² / (‖V‖²‖ΔW‖²); 1 when ΔW is indifferent to V."""
    gain: float | None
    """‖CΔW‖ / ‖ΔW‖ with C = VVᵀ/‖V‖, Safe LoRA's operator."""
    cosine: float | None
    """⟨ΔW, V⟩ / (‖ΔW‖‖V‖)."""


class Decision(BaseModel):
    """Whether a method edits one module, and the reason a reviewer reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    edit: bool
    reason: str


class RealignMethod(BaseModel):
    """Parameters of one realign method; a subclass per file, all listed in `fleet.methods`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_safety_adapter: ClassVar[bool] = False
    """Whether `base.safety` has to be in the manifest."""

    def decide(self, statistics: ModuleStatistics) -> Decision:
        """Whether this module is edited. Pure; reads no weights."""
        raise NotImplementedError

    def edit(self, delta: Delta, safety: Delta | None) -> Delta:
        """The realigned task vector of a module that `decide` chose.

        Args:
            delta: the fine-tuned model's ΔW, (d_out, d_in), relative to the aligned model.
            safety: the safety adapter's ΔW in the same module, or None where it has none (then it is zero).
        """
        raise NotImplementedError
