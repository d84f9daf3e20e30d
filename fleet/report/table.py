"""The table that a run ends with on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.suites import SuiteKind
from fleet.report.model import CandidateRow, Report, Score
from fleet.report.wording import (
    METHOD_HEADINGS,
    method_cells,
    norm_text,
    rate_text,
    score_notes,
    suite_columns,
    suite_headings,
)

MARK = " !"
"""After the name of a candidate of which there is a warning below the table."""

_UNLIMITED = 10_000
"""Characters; wider than any table."""


def print_report(report: Report, console: Console, said: Collection[str] = ()) -> None:
    """Print the candidates, and the realign methods if there are any.

    Each suite has a column where the console is wide enough; else all tasks share one.

    Args:
        said: warnings that were printed before the work, and aren't again.
    """
    columns = suite_columns(report)
    table = _candidates_table(report, columns, ())
    if table.__rich_measure__(console, console.options.update(max_width=_UNLIMITED)).maximum > console.width:
        tasks = [suite for kind, suite in columns if kind == "task"]
        table = _candidates_table(report, [column for column in columns if column[0] != "task"], tasks)
    console.print(table)
    for warning in (*(w for w in report.warnings if w not in said), *_row_warnings(report)):
        console.print(f"warning: {escape(warning)}", soft_wrap=True)
    if len(report.methods) > 1:
        console.print(_methods_table(report))


def _candidates_table(report: Report, columns: Sequence[tuple[SuiteKind, str]], together: Sequence[str]) -> Table:
    """A column for each suite of `columns`, and one for the suites `together`, if there are any."""
    headings = suite_headings(report)
    table = Table(
        title=f"{report.name}: run {report.run_id}",
        caption=escape("[low–high]: 95 % Clopper–Pearson interval of harmful / scored") + _corrected_caption(report),
    )
    table.add_column("candidate", no_wrap=True)
    table.add_column("gate")
    for _, suite in columns:
        table.add_column(headings[suite], justify="right")
    if together:
        table.add_column("task accuracy", no_wrap=True)
    has_edits = any(row.edited for row in report.rows)
    if has_edits:
        table.add_column("edited", justify="right", no_wrap=True)
        table.add_column("‖edit‖", justify="right")
    last = None
    for row in report.rows:
        if last is not None and row.role != last:
            table.add_section()
        last = row.role
        cells = [_score_cell(row.score(suite)) for _, suite in columns]
        if together:
            cells.append(_tasks_cell(row, together, headings))
        cells += [row.edited or "", norm_text(row.edit_norm)] if has_edits else []
        table.add_row(row.name + MARK * (row.warning is not None), row.gate or "", *cells)
    return table


def _row_warnings(report: Report) -> list[str]:
    """What the marks in the table stand for; rows of which the same is said share a line."""
    rows: dict[str, list[str]] = {}
    for row in report.rows:
        if row.warning is not None:
            rows.setdefault(row.warning, []).append(row.name)
    return [f"{', '.join(names)}: {warning}" for warning, names in rows.items()]


def _score_cell(score: Score | None) -> str:
    if score is None:
        return ""
    return _cell([rate_text(score.rate, with_interval=score.kind == "harmfulness"), *score_notes(score)])


def _tasks_cell(row: CandidateRow, suites: Sequence[str], headings: dict[str, str]) -> str:
    scores = [score for suite in suites if (score := row.score(suite)) is not None]
    return _cell(f"{headings[score.suite]} {rate_text(score.rate, with_interval=False)}" for score in scores)


def _cell(lines: Iterable[str]) -> str:
    return "\n".join(map(escape, lines))


def _corrected_caption(report: Report) -> str:
    corrected = any(score.corrected is not None for row in report.rows for score in row.scores)
    return "; corrected: for the errors the judge made on labelled rows" if corrected else ""


def _methods_table(report: Report) -> Table:
    table = Table(title="realign methods: means over the models")
    table.add_column("method", no_wrap=True)
    for heading in METHOD_HEADINGS:
        table.add_column(heading, justify="right")
    for summary in report.methods:
        table.add_row(summary.name, *method_cells(summary))
    return table
