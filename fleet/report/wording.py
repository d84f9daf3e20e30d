"""How a report's numbers read: shared by the terminal's table and the pages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import get_args

from evals.rates import Rate
from evals.suites import SuiteKind
from fleet.core.identity import Json
from fleet.report.model import MeanRate, MethodSummary, Report, Score
from fleet.steps.builder import Role

ROLE_TITLES: dict[Role, str] = {
    "reference": "Base models",
    "finetuned": "Fine-tuned",
    "realigned": "Realigned",
    "fused": "Fused",
}
"""What a group of candidates is called, in the order of the table."""

METHOD_HEADINGS = ("models", "harmful", "over-refusal", "own tasks", "‖edit‖")
"""The headings of what `method_cells` gives."""


def suite_columns(report: Report) -> list[tuple[SuiteKind, str]]:
    """Every suite that some candidate was scored on, with its kind: harm first, then over-refusal, then tasks."""
    found: list[tuple[SuiteKind, str]] = [(score.kind, score.suite) for row in report.rows for score in row.scores]
    kinds = get_args(SuiteKind)
    return sorted(dict.fromkeys(found), key=lambda column: kinds.index(column[0]))


def suite_headings(report: Report) -> dict[str, str]:
    """Suite -> its name without the prefix up to `_`, if all suites share that prefix."""
    suites = [suite for _, suite in suite_columns(report)]
    prefixes = {suite.split("_")[0] for suite in suites}
    shared = f"{prefixes.pop()}_" if len(prefixes) == 1 and len(suites) > 1 else ""
    return {suite: suite.removeprefix(shared) for suite in suites}


def rate_text(rate: Rate, with_interval: bool) -> str:
    """As in "64.7 % [55–73] (1 unscored)"; scores other than 0 and 1 are no percentage and have no interval here."""
    if rate.value is None:
        return f"– ({rate.unscored} unscored)"
    if not rate.binary:
        return f"{rate.value:.3f}{_unscored_text(rate.unscored)}"
    text = f"{100 * rate.value:.1f} %"
    if with_interval and rate.low is not None and rate.high is not None:
        text += f" [{100 * rate.low:.0f}–{100 * rate.high:.0f}]"
    return text + _unscored_text(rate.unscored)


def counts_text(rate: Rate) -> str:
    """A rate with its interval and all its counts."""
    counts = f"{rate.numerator:g} of {rate.denominator} scored, {rate.unscored} unscored"
    return f"{rate_text(rate, with_interval=True)}: {counts}"


def mean_text(rate: MeanRate) -> str:
    """As in "60.7 % of 713 (7 unscored)"; empty if there are no samples."""
    if rate.value is None:
        return f"– ({rate.unscored} unscored)" if rate.unscored else ""
    return f"{100 * rate.value:.1f} % of {rate.denominator}{_unscored_text(rate.unscored)}"


def norm_text(norm: float | None) -> str:
    return "" if norm is None else f"{norm:.3g}"


def parameters_text(parameters: Mapping[str, Json]) -> str:
    return json.dumps(parameters, sort_keys=True) if parameters else "none"


def score_notes(score: Score) -> list[str]:
    """The lines below a rate."""
    notes: list[str] = []
    if (c := score.corrected) is not None:
        notes.append(f"corrected {100 * c.value:.1f} % [{100 * c.low:.0f}–{100 * c.high:.0f}]")
    if score.prompts is not None:
        notes.append(f"{score.rate.denominator + score.rate.unscored} of {score.prompts} asked")
    return notes


def method_cells(summary: MethodSummary) -> tuple[str, ...]:
    """A row of the table of realign methods, after the method's name."""
    means = map(mean_text, (summary.harmfulness, summary.over_refusal, summary.task_accuracy))
    return (str(summary.num_models), *means, norm_text(summary.edit_norm))


def _unscored_text(count: int) -> str:
    return f" ({count} unscored)" if count else ""
