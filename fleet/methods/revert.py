"""Revert: take the whole task vector out, ΔW ← 0. The model becomes the aligned one, in every tensor.

The last fallback: no more harmful than the aligned model, by construction, but without what was learned for the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fleet.methods.base import Decision, Module, ModuleStatistics, Ranks, RealignMethod

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class Revert(RealignMethod):
    """Reverting has no parameters."""

    method: Literal["revert"]

    def rank(self, ranks: Ranks) -> int:
        return 0

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        return [Decision(module=m.module, edit=True, reason="reverted to the aligned model") for m in modules]

    def edit(self, module: Module) -> Delta:
        return module.delta.scaled(0.0)

    def edit_rest(self, module: Module) -> Delta:
        return module.delta.scaled(0.0)
