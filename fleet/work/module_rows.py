"""What a realign step's record says of each module: what was measured, what was decided, what was done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from fleet.core.identity import Json
from fleet.methods import Decision, ModuleStatistics

NEARLY_NOTHING = 0.01
"""An edit below this share of its task vector is nearly none."""

NORM_LOSS = 0.01
"""By more than this share, what is stored of an edit has another norm than the edit was to have."""

RANK_LOSS = 0.25
"""A cut to `max_rank` that takes more than this share of the squared norm leaves another task vector."""


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
    """‖ΔW_after − ΔW_before‖, ΔW_after as the written file holds it."""
    asked_norm: float | None = None
    """The norm that the edit was to have, where it has another: before it was rounded to the file's dtype; of a
    control, its method's."""
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
            reason += "; lost in the file's dtype" if edit.get("asked_norm") else "; nothing changed"
        row: dict[str, Json] = {"module": statistics.module, "edit": bool(edit.get("edit_norm")), "reason": reason}
        for name in ("lift", "rho", "rho_z", "cosine", "delta_norm"):
            value = getattr(statistics, name)
            if value is not None:
                row[name] = float(f"{value:.6g}")
        rows.append(row | dict(edit))
    return rows


def edit_warnings(rows: Sequence[Mapping[str, Any]], max_rank: int | None = None) -> list[str]:
    """What a person should know of a realigned model's edits by their size alone.

    Args:
        rows: as `module_rows` gives them.
        max_rank: what edited modules were cut to, if the method says so.
    """
    if not rows:
        return ["it has no module that can be edited"]
    whole, stored = (_norm(row.get(name) for row in rows) for name in ("delta_norm", "edit_norm"))
    asked = _norm(row.get("asked_norm", row.get("edit_norm")) for row in rows)
    if not stored and asked:
        return [f"all of its edit, of norm {asked:.3g}, is lost in the dtype of its files: it is as it was fine-tuned"]
    if not stored:
        example = f"{rows[0]['module']}: {rows[0]['reason']}"
        return [f"none of its {len(rows)} modules is edited, so they are as they were fine-tuned ({example})"]
    found: list[str] = []
    if stored < NEARLY_NOTHING * whole:
        found.append(f"its edit is nearly nothing: {stored / whole:.2g} of the task vector's norm")
    if abs(stored - asked) > NORM_LOSS * asked:
        found.append(f"its edit was to have the norm {asked:.4g}, and in the dtype of its files has {stored:.4g}")
    if max_rank is not None and (lost := _share_cut(rows)) > RANK_LOSS:
        found.append(f"max_rank {max_rank} cuts away {lost:.0%} of the edited task vector's squared norm; raise it")
    return found


def _share_cut(rows: Sequence[Mapping[str, Any]]) -> float:
    """How much of the edited modules' squared norm recompression lost."""
    edited = [row for row in rows if row.get("recompression_residual") is not None]
    lost = sum(row["recompression_residual"] ** 2 for row in edited)
    kept = sum((row.get("energy_kept") or 0.0) * (row.get("delta_norm") or 0.0) ** 2 for row in edited)
    return lost / (lost + kept) if lost else 0.0


def _norm(norms: Iterable[float | None]) -> float:
    """Of the whole, from those of its parts."""
    return math.sqrt(sum(norm**2 for norm in norms if norm))
