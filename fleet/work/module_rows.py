"""What a realign step's record says of each module: what was measured, what was decided, what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from fleet.core.identity import Json
from fleet.methods import Decision, ModuleStatistics


class ModuleRow(BaseModel):
    """One module of a realigned model. A field that isn't named is kept: records of other nights are read, too."""

    model_config = ConfigDict(frozen=True, extra="allow")

    module: str
    edit: bool
    """Whether the module was changed."""
    reason: str
    lift: float | None = None
    rho: float | None = None
    rho_z: float | None = None
    cosine: float | None = None
    delta_norm: float | None = None
    edit_norm: float | None = None
    energy_kept: float | None = None
    rank: int | None = None
    recompression_residual: float | None = None
    directions: tuple[tuple[float, float], ...] = ()
    """Before and after the edit, for each leading direction of V: its share of ‖ΔW_before‖²."""


def module_rows(
    modules: Sequence[ModuleStatistics], decisions: Sequence[Decision], edits: Mapping[str, Mapping[str, Json]]
) -> list[dict[str, Json]]:
    """One row per module of a realigned model, in the order of `modules`: the fields of `ModuleRow`.

    Args:
        modules: What the survey measured. The statistics are rounded to six digits.
        decisions: What the method decided about each of `modules`, in the same order.
        edits: Module -> what the worker wrote of its edit, which goes into the row as it is; none for a module that was
            left alone.

    Raises:
        ValueError: there are not as many decisions as modules.
    """
    rows: list[dict[str, Json]] = []
    for statistics, decision in zip(modules, decisions, strict=True):
        edit, reason = edits.get(statistics.module, {}), decision.reason
        if decision.edit and not edit.get("edit_norm"):
            reason += "; nothing changed"
        row: dict[str, Json] = {"module": statistics.module, "edit": bool(edit.get("edit_norm")), "reason": reason}
        for name in ("lift", "rho", "rho_z", "cosine", "delta_norm"):
            value = getattr(statistics, name)
            row[name] = None if value is None else float(f"{value:.6g}")
        rows.append(row | dict(edit))
    return rows
