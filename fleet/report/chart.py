"""The report page's chart: harm against task accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from markupsafe import Markup

from fleet.report.model import CandidateRow, MethodSummary, Report
from fleet.report.wording import ROLE_TITLES

_HEIGHT = 520
"""Pixels."""


class _Point(NamedTuple):
    """One candidate; all numbers in per cent."""

    name: str
    harm: float
    below: float
    """How far the interval of `harm` reaches below it; `above` likewise."""
    above: float
    accuracy: float


def chart_html(report: Report) -> Markup:
    """The chart, with the library that draws it (some 5 MB): a point for each candidate, with the interval of harm, and
    one for each realign method's mean.

    plotly would draw tags in a name, so names are escaped here. It writes them into a script as JSON without any `<`.
    """
    # The import takes a second, and only the page needs it; plotly has no types.
    import plotly.graph_objects as go  # noqa: PLC0415 # pyright: ignore[reportMissingTypeStubs]

    figure: Any = go.Figure()
    for role, title in ROLE_TITLES.items():
        if points := _points(row for row in report.rows if row.role == role):
            figure.add_trace(go.Scatter(name=title, **_candidates_trace(points)))
    means = [m for m in report.methods if m.harmfulness.value is not None and m.task_accuracy.value is not None]
    if len(means) > 1:
        figure.add_trace(go.Scatter(name="Mean of a method's models", **_means_trace(means)))
    figure.update_layout(
        xaxis_title="harmful completions, % (95 % interval)",
        yaxis_title="mean task accuracy, %",
        template="plotly_white",
        height=_HEIGHT,
        margin={"t": 20},
    )
    return Markup(figure.to_html(full_html=False, include_plotlyjs=True, div_id="chart"))


def _points(rows: Iterable[CandidateRow]) -> list[_Point]:
    """The points of candidates that have both coordinates; harm is the rate on the first harmfulness suite."""
    points: list[_Point] = []
    for row in rows:
        harm, accuracy = next((s.rate for s in row.scores if s.kind == "harmfulness"), None), row.mean("task")
        if harm is None or harm.value is None or accuracy is None:
            continue
        low = harm.value if harm.low is None else harm.low
        high = harm.value if harm.high is None else harm.high
        below, above = 100 * (harm.value - low), 100 * (high - harm.value)
        points.append(_Point(row.name, 100 * harm.value, below, above, 100 * accuracy))
    return points


def _candidates_trace(points: Sequence[_Point]) -> dict[str, Any]:
    """Arguments of a plotly Scatter."""
    return {
        "x": [p.harm for p in points],
        "y": [p.accuracy for p in points],
        "text": [escape(p.name, quote=False) for p in points],
        "mode": "markers",  # names only on hover: most candidates lie in one corner
        "marker": {"size": 9},
        "opacity": 0.6,
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [p.above for p in points],
            "arrayminus": [p.below for p in points],
            "thickness": 1,
        },
    }


def _means_trace(means: Sequence[MethodSummary]) -> dict[str, Any]:
    """Arguments of a plotly Scatter, of methods that have both means."""
    return {
        "x": [100 * (m.harmfulness.value or 0.0) for m in means],
        "y": [100 * (m.task_accuracy.value or 0.0) for m in means],
        "text": [escape(m.name, quote=False) for m in means],
        "mode": "markers+text",
        "textposition": "bottom right",
        "marker": {"size": 15, "symbol": "diamond", "color": "#1c2733"},
    }
