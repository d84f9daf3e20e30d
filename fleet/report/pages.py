"""The pages of a report, from `templates/`: each is one file that needs no other.

Everything that a template shows is escaped (jinja2's autoescape), and a name it lacks is an error (StrictUndefined).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from fleet.report.chart import chart_html
from fleet.report.model import CandidateRow, Report
from fleet.report.wording import (
    METHOD_HEADINGS,
    ROLE_TITLES,
    counts_text,
    method_cells,
    norm_text,
    parameters_text,
    rate_text,
    score_notes,
    suite_columns,
    suite_headings,
)
from fleet.steps.builder import Role
from fleet.work.module_rows import ModuleRow

MODULES_HTML = "modules.html"
"""Name of the modules page, which lies beside the report's."""


class Column(NamedTuple):
    """A column of the modules page."""

    field: str
    """A field of `ModuleRow`."""
    heading: str
    help: str
    """What a reader sees who points at the heading."""


MODULE_COLUMNS = (
    Column("module", "module", "The weight that was judged"),
    Column("edit", "edited", "Whether the method changed it"),
    Column("reason", "why", "The rule that decided"),
    Column("lift", "lift", "d_out‖VᵀΔW‖² / (‖V‖²‖ΔW‖²); 1 where ΔW is indifferent to V"),
    Column("rho", "ρ", "cos(VVᵀΔW, ΔW)"),
    Column("rho_z", "ρ, z", "Standard deviations of ρ from its null"),
    Column("cosine", "cos", "⟨ΔW, V⟩ / (‖ΔW‖‖V‖); below 0, ΔW undoes what alignment did"),
    Column("delta_norm", "‖ΔW‖", "Size of the task vector before"),
    Column("edit_norm", "‖edit‖", "‖ΔW_after − ΔW_before‖"),
    Column("energy_kept", "energy kept", "‖ΔW_after‖² / ‖ΔW_before‖²"),
    Column("rank", "rank", "LoRA rank after the edit"),
    Column("recompression_residual", "residual", "What cutting the rank lost: ‖ΔW − ΔW_k‖, by Eckart and Young"),
)
"""The columns of a modules page; one for each leading direction of V comes after them."""

MEASURED = MODULE_COLUMNS[3:7]
"""Those that are shown only where some variant asked for the statistic."""

_WORDING: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (counts_text, method_cells, norm_text, parameters_text, rate_text, score_notes)
}
"""Name -> function, for what the report's template calls."""


def report_html(report: Report) -> str:
    """The report: the chart, the table, and what is behind each number. A link leads to the modules page beside it."""
    template = _templates().get_template("report.html.j2")
    return template.render(
        **_WORDING,
        report=report,
        chart=chart_html(report),
        suites=[suite for _, suite in suite_columns(report)],
        headings=suite_headings(report),
        groups=[(ROLE_TITLES[role], list(rows)) for role, rows in groupby(report.rows, _role)],
        method_headings=METHOD_HEADINGS,
        modules_page=MODULES_HTML,
    )


def modules_html(title: str, tables: Mapping[str, Sequence[ModuleRow]]) -> str:
    """Why each module was edited, by how much, and what is left of it.

    A reader chooses a candidate, and sorts by a click on a heading; the page holds all rows as JSON.

    Args:
        title: The report's name and run id.
        tables: Name of a realigned candidate -> its modules.
    """
    depth = max((len(row.directions) for rows in tables.values() for row in rows), default=0)
    directions = [Column("directions", f"u{i + 1}", "Share of ‖ΔW‖² along it, % before → after") for i in range(depth)]
    shown = [column for column in MODULE_COLUMNS if column not in MEASURED or _is_measured(column, tables)]
    template = _templates().get_template("modules.html.j2")
    return template.render(
        title=title,
        columns=[*shown, *directions],
        has_directions=depth > 0,
        tables={name: [_module_cells(row, shown) for row in rows] for name, rows in tables.items()},
    )


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("fleet.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    return templates


def _role(row: CandidateRow) -> Role:
    return row.role


def _is_measured(column: Column, tables: Mapping[str, Sequence[ModuleRow]]) -> bool:
    return any(getattr(row, column.field) is not None for rows in tables.values() for row in rows)


def _module_cells(row: ModuleRow, columns: Sequence[Column]) -> list[str | float | None]:
    """A module's cells in the order of the columns; without directions where they were not measured, as where nothing
    was edited."""
    cells: list[str | float | None] = [getattr(row, column.field) for column in columns]
    cells[1] = "yes" if row.edit else "no"
    return [*cells, *(f"{100 * before:.1f} → {100 * after:.1f}" for before, after in row.directions)]
