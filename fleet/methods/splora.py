"""SPLoRA-style removal: take out the modules whose task vector is farthest from its projection.

Source: Ao et al., "Safe pruning LoRA", TACL 2025, arXiv 2506.18931, in spirit: whole LoRA modules are removed, ranked
by a dimension-insensitive distance (DIEM, Tessari and Hogan, arXiv 2407.08623) between ΔW and CΔW, C = VVᵀ/‖V‖:

    D = (d − E[d]) / sd[d],    d = the Euclidean distance of the two, each scaled to unit root mean square.

Between independent Gaussian tensors of n entries d² is 2χ²_n, so E[d] ≈ √(2n) and sd[d] ≈ 1. Between ΔW and CΔW,
d = √(2n(1 − ρ)). So D = √(2n)(√(1 − ρ) − 1), from the survey alone, and at equal ρ the smaller module goes first. The
released code estimates E[d] from fifty copies of the pair itself, so its score is zero but for rounding, and its
numbers cannot be reproduced from the equations. Default: the 10 highest D are removed, as many as Safe LoRA projects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fleet.methods.base import (
    STATISTIC_ROUNDING,
    Decision,
    Module,
    ModuleStatistics,
    Need,
    Ranks,
    RealignMethod,
    around_cut,
    decision,
    lowest,
)

if TYPE_CHECKING:
    from fleet.algebra.delta import Delta


class SpLora(RealignMethod):
    """Parameters of SPLoRA-style removal."""

    method: Literal["splora"]
    number: int = Field(default=10, ge=1)
    """How many modules are removed."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rho"})

    def rank(self, ranks: Ranks) -> int:
        return 0

    def decide(self, modules: Sequence[ModuleStatistics]) -> list[Decision]:
        distances = {m.module: _distance(m.rho, math.prod(m.shape)) for m in modules if m.rho is not None}
        values = {name: -distance for name, distance in distances.items()}
        chosen = lowest(values, self.number)
        roundings = {m.module: _rounding(m.rho, math.prod(m.shape)) for m in modules if m.rho is not None}
        close = around_cut(values, roundings, self.number)
        decisions: list[Decision] = []
        for module in modules:
            distance = distances.get(module.module)
            reason = "rho undefined: kept" if distance is None else f"distance {distance:.1f}"
            decisions.append(decision(module.module, module.module in chosen, reason, module.module in close))
        return decisions

    def edit(self, module: Module) -> Delta:
        return module.delta.scaled(0.0)


def _distance(rho: float, num_entries: int) -> float:
    return math.sqrt(2 * num_entries) * (math.sqrt(1.0 - rho) - 1.0)


def _rounding(rho: float, num_entries: int) -> float:
    """By how much the distance may differ between kinds of processors; most where ρ is nearly 1."""
    below, above = (rho * (1.0 - side * STATISTIC_ROUNDING) for side in (1.0, -1.0))
    return _distance(below, num_entries) - _distance(min(above, 1.0), num_entries)
