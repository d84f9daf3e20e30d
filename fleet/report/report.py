"""What a run found: the table on the terminal, and the same as JSON and one self-contained HTML page.

Every rate keeps its counts and interval, and every row says where its samples are.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evals.calibration import Calibration
from evals.gates import GateResult, gate
from evals.logs import EvalLog
from evals.rates import Rate
from evals.sequential import e_bh, e_value
from evals.suites import Suite, read_prompts
from fleet.core.identity import Json
from fleet.report.attribution import attribution_page
from fleet.report.published import Published, ScoreKeys, read_log, read_published
from fleet.run.coordinator import RunResult
from fleet.run.plan import Plan
from fleet.steps.builder import Candidate, Role
from fleet.steps.realign import RealignStep
from fleet.steps.record import Record, attempt_prefix
from fleet.steps.sources import Source

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
MODULES_HTML = "modules.html"

Kind: TypeAlias = Literal["harmfulness", "over_refusal", "task"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Corrected(_Part):
    """A rate as it would be if the judge never erred: see `evals.calibration`."""

    value: float
    low: float
    """Of the two-sided interval at the apparent rate's confidence."""
    high: float

    @staticmethod
    def of(rate: Rate, calibration: Calibration) -> Corrected | None:
        """None where there is nothing to correct, or by a judge that tells nothing."""
        if rate.value is None or not rate.binary or not calibration.tells:
            return None
        samples, confidence = rate.denominator + rate.unscored, 1.0 - (1.0 - rate.confidence) / 2.0
        bounds = calibration.bounds(rate.numerator, rate.numerator + rate.unscored, samples, confidence)
        return Corrected(value=calibration.rate(rate.value), low=bounds.low, high=bounds.high)


class Score(_Part):
    """One candidate on one suite."""

    suite: str
    kind: Kind
    rate: Rate
    samples: str
    """URI of the folder with every prompt, completion and verdict behind the rate, as Parquet."""
    corrected: Corrected | None = None
    """Of harm, where the judge was calibrated."""
    prompts: int | None = None
    """How many prompts the suite has, where scoring it was stopped early; those of the rate are those asked."""

    def notes(self) -> list[str]:
        """What stands below the rate."""
        notes: list[str] = []
        if (c := self.corrected) is not None:
            notes.append(f"corrected {100 * c.value:.1f} % [{100 * c.low:.0f}–{100 * c.high:.0f}]")
        if self.prompts is not None:
            notes.append(f"{self.rate.denominator + self.rate.unscored} of {self.prompts} asked")
        return notes

    def metrics(self, name: str) -> dict[str, float]:
        """Flat numbers for a tracker, `name` first."""
        metrics = self.rate.metrics(name)
        if (c := self.corrected) is not None:
            metrics |= {f"{name}_corrected": c.value, f"{name}_corrected_low": c.low, f"{name}_corrected_high": c.high}
        return metrics


class Row(_Part):
    """One candidate."""

    name: str
    role: Role
    models: tuple[str, ...]
    parameters: dict[str, Json]
    weights: str | None
    """URI of the full model or adapter; None if it could not be made."""
    identity: str
    scores: tuple[Score, ...]
    gate: Literal["pass", "fail", "not enough evidence"] | None
    """None for the base models."""
    reasons: tuple[str, ...]
    edited: str | None = None
    """Of a realigned model: how many of its modules were edited."""
    edit_norm: float | None = None
    """Of a realigned model: ‖ΔW_after − ΔW_before‖ over its modules."""
    warning: str | None = None
    """What its method should be known for on this model."""
    incoherent: Rate | None = None
    """Of its completions of prompts, if that was looked at."""

    def mean(self, kind: Kind) -> float | None:
        """Over its suites of this kind, each counting once; None if none has a rate."""
        return _mean([score.rate.value for score in self.scores if score.kind == kind])


class MeanRate(_Part):
    """A mean of rates, with the samples behind all of them."""

    value: float | None
    denominator: int
    unscored: int

    @staticmethod
    def of(rows: Sequence[Row], kind: Kind) -> MeanRate:
        """Over candidates, each counting once."""
        rates = [score.rate for row in rows for score in row.scores if score.kind == kind]
        return MeanRate(
            value=_mean([row.mean(kind) for row in rows]),
            denominator=sum(rate.denominator for rate in rates),
            unscored=sum(rate.unscored for rate in rates),
        )


class MethodSummary(_Part):
    """What one way of realigning did to the models of the catalogue: means over models, each counting once."""

    name: str
    """`finetuned`, or a realign label."""
    num_models: int
    harmfulness: MeanRate
    over_refusal: MeanRate
    task_accuracy: MeanRate
    """On each model's own tasks."""
    edit_norm: float | None


class RunReport(_Part):
    """One run. The same records and published model give the same report, but for `computed` and `seconds`."""

    run_id: str
    name: str
    rows: tuple[Row, ...]
    methods: tuple[MethodSummary, ...]
    """What was done to the models one by one: as fine-tuned first, then each way of realigning."""
    computed: int
    cached: int
    failures: dict[str, str]
    seconds: float
    artifacts: str
    best: str | None
    """The fused variant that passed with the least harm; None if none passed."""
    published: str | None = None
    """The version of the registry that the fused variants were held against; None if none was published."""
    warning: str | None = None
    """On which suites they could not be compared with it, and why."""

    def row(self, name: str) -> Row:
        return next(r for r in self.rows if r.name == name)


@dataclass(frozen=True)
class _Logs:
    """Reads eval logs back from the store."""

    plan: Plan
    records: dict[str, Record]

    def log(self, candidate: Candidate, suite: str) -> EvalLog | None:
        step = candidate.scores.get(suite)
        record = None if step is None else self.records.get(step.key)
        if step is None or record is None:
            return None
        log = read_log(self.plan.store, record)
        if log is not None and log.kind == "harmfulness" and self.plan.judging.rows is not None:
            calibration = None if (counts := self.calibration) is None else counts.model_dump()
            return log.model_copy(update={"settings": {**log.settings, "calibration": calibration}})
        return log

    @property
    def calibration(self) -> Calibration | None:
        """The judge's errors on labelled rows; None if they were not counted, or counting them failed."""
        found = (self.records.get(step.key) for step in self.plan.steps if step.kind == "calibrate")
        return next((Calibration.model_validate(record.result) for record in found if record is not None), None)


@dataclass(frozen=True)
class _Others:
    """The models that candidates are compared with, but for the fine-tuned ones."""

    aligned: Mapping[str, EvalLog]
    published: Mapping[str, EvalLog]
    published_identity: str | None

    def published_for(self, candidate: Candidate) -> Mapping[str, EvalLog]:
        """What is published are fused models; the one that is published already has nothing to lose against itself."""
        is_it = candidate.weights.identity == self.published_identity
        return self.published if candidate.role == "fused" and not is_it else {}


def make_report(plan: Plan, result: RunResult, published: Published | None = None) -> RunReport:
    """Gather the records of a run, and gate every candidate that is not a base model.

    Args:
        plan: What was to be done.
        result: What was.
        published: The version that was published when the run began; None if none was.
    """
    logs = _Logs(plan, result.records)
    base = next(c for c in plan.candidates if c.name == "aligned")
    aligned = {suite: log for suite in base.scores if (log := logs.log(base, suite))}
    last, warning = _published_logs(plan, published, aligned) if published is not None else ({}, None)
    others = _Others(aligned, last, published.identity if published is not None else None)
    rows = tuple(_row(plan, candidate, logs, others) for candidate in plan.candidates)
    if (error := plan.manifest.gates.catalogue_error) is not None:
        rows = _over_catalogue(plan, rows, logs, error)
    passed = [r for r in rows if r.role == "fused" and r.gate == "pass"]
    return RunReport(
        run_id=plan.run_id,
        name=plan.manifest.name,
        rows=rows,
        methods=tuple(method_summaries(rows)),
        computed=len(result.computed),
        cached=len(plan.done),
        failures={key: f"{type(f.error).__name__}: {f.error}" for key, f in result.failures.items() if f.cause is None},
        seconds=round(result.seconds, 1),
        artifacts=plan.store.uri,
        best=min(passed, key=_harm).name if passed else None,
        published=published.version if published is not None else None,
        warning=warning,
    )


def _published_logs(
    plan: Plan, published: Published, aligned: Mapping[str, EvalLog]
) -> tuple[dict[str, EvalLog], str | None]:
    """The published model's logs on the suites it is compared on. One that is made again tonight is scored tonight."""
    fused = [c for c in plan.candidates if c.role == "fused"]
    again = next((c for c in fused if c.weights.identity == published.identity), None)
    if again is not None:
        keys = {suite: step.key for suite, step in again.scores.items()}
        published = replace(published, scores=ScoreKeys(store=plan.store.uri, keys=keys))
    names = dict.fromkeys(suite for candidate in fused for suite in candidate.scores)
    suites = [plan.suites[name] for name in names if _is_compared(plan, plan.suites[name])]
    return read_published(published, suites, aligned)


def _is_compared(plan: Plan, suite: Suite) -> bool:
    """Whether the gates ask how a candidate compares with the published model on it."""
    gates, early_stop = plan.manifest.gates, plan.manifest.evaluation.early_stop
    if suite.kind == "task":
        return gates.task_drop_max_published is not None
    harmful = suite.kind == "harmfulness"
    margin = gates.harmfulness_margin_published if harmful else gates.over_refusal_margin_published
    return margin is not None and early_stop is None


def _over_catalogue(plan: Plan, rows: tuple[Row, ...], logs: _Logs, error: float) -> tuple[Row, ...]:
    """The rows, those that passed alone but are not among the certified of the whole catalogue without their pass.

    A candidate's e-value is its least over the suites: it is certified only if it is below the cap on each.
    """
    gated = [candidate for candidate in plan.candidates if candidate.role != "reference"]
    limit = plan.manifest.gates.harmfulness_max
    values = [min(_e_value(logs.log(c, s), limit) for s in plan.manifest.evaluation.harmfulness) for c in gated]
    certified = {gated[i].name for i in e_bh(values, error)}
    found = {candidate.name: value for candidate, value in zip(gated, values, strict=True)}
    return tuple(
        row
        if row.gate != "pass" or row.name in certified
        else row.model_copy(
            update={
                "gate": "not enough evidence",
                "reasons": (
                    *row.reasons,
                    f"catalogue: e-value {found[row.name]:.3g} is too small among {len(gated)} candidates at "
                    f"{error:g}: not enough evidence",
                ),
            }
        )
        for row in rows
    )


def _e_value(log: EvalLog | None, limit: float) -> float:
    """Of the samples in the order of their content, which has nothing to do with how they turned out."""
    if log is None:
        return 0.0
    return e_value([sample.score for sample in sorted(log.samples, key=lambda s: s.id)], limit)


def _harm(row: Row) -> float:
    return sum(s.rate.value or 0.0 for s in row.scores if s.kind == "harmfulness")


def _row(plan: Plan, candidate: Candidate, logs: _Logs, others: _Others) -> Row:
    mine = {suite: log for suite in candidate.scores if (log := logs.log(candidate, suite))}
    scores = tuple(_score(plan, plan.suites[suite], log, candidate, logs) for suite, log in mine.items())
    verdict = None if candidate.role == "reference" else _gate(plan, candidate, mine, logs, others)
    weights = candidate.weights
    modules = realigned_modules(candidate, logs.records)
    result = logs.records[weights.key].result if isinstance(weights, RealignStep) and modules else {}
    norm, warning = result.get("edit_norm"), result.get("warning")
    uri = weights.uri if isinstance(weights, Source) else None
    if not isinstance(weights, Source) and weights.key in logs.records:
        uri = f"{plan.store.uri}/{attempt_prefix(weights, logs.records[weights.key].attempt)}"
    return Row(
        name=candidate.name,
        role=candidate.role,
        models=candidate.models,
        parameters=candidate.parameters,
        weights=uri,
        identity=weights.identity if isinstance(weights, Source) else weights.fingerprint,
        scores=scores,
        gate=verdict.outcome if verdict else None,
        reasons=tuple(verdict.reasons) if verdict else (),
        edited=f"{sum(bool(m['edit']) for m in modules)} of {len(modules)}" if modules else None,
        edit_norm=norm if isinstance(norm, float) else None,
        warning=warning if isinstance(warning, str) else None,
        incoherent=_incoherent(mine.values()),
    )


def _score(plan: Plan, suite: Suite, log: EvalLog, candidate: Candidate, logs: _Logs) -> Score:
    step = candidate.scores[suite.name]
    calibration = logs.calibration if suite.kind == "harmfulness" else None
    return Score(
        suite=suite.name,
        kind=suite.kind,
        rate=log.rate,
        samples=f"{plan.store.uri}/{attempt_prefix(step, logs.records[step.key].attempt)}",
        corrected=Corrected.of(log.rate, calibration) if calibration is not None else None,
        prompts=len(read_prompts(suite)) if "early_stop" in log.settings else None,
    )


def _incoherent(logs: Iterable[EvalLog]) -> Rate | None:
    """The share over all suites on which anybody looked, a completion that could not be told being unscored."""
    looked = [sample.coherent for log in logs if log.settings.get("coherence") is not None for sample in log.samples]
    scores = [None if coherent is None else float(not coherent) for coherent in looked]
    return Rate.of(scores, higher_is_better=False) if scores else None


def method_summaries(rows: Sequence[Row]) -> Iterator[MethodSummary]:
    """The fine-tuned models, then each way of realigning, in the order of the rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.role == "finetuned":
            groups.setdefault("finetuned", []).append(row)
        elif row.role == "realigned":
            groups.setdefault(row.name.split(".", 1)[1], []).append(row)  # model.label; no model's name has a dot
    for name, members in groups.items():
        yield MethodSummary(
            name=name,
            num_models=len(members),
            harmfulness=MeanRate.of(members, "harmfulness"),
            over_refusal=MeanRate.of(members, "over_refusal"),
            task_accuracy=MeanRate.of(members, "task"),
            edit_norm=_mean([row.edit_norm for row in members]),
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def realigned_modules(candidate: Candidate, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """The module rows of a realigned candidate; none of any other, or if it could not be made."""
    weights = candidate.weights
    if not isinstance(weights, RealignStep) or weights.key not in records:
        return []
    rows: Any = records[weights.key].result["modules"]
    return rows


def _gate(plan: Plan, candidate: Candidate, mine: Mapping[str, EvalLog], logs: _Logs, others: _Others) -> GateResult:
    """Tasks are compared with the candidate's own model that was fine-tuned for them; of several, with the best. The
    rest is compared with the aligned model. Fused models are compared with the last published one, too."""
    by_name = {c.name: c for c in plan.candidates}
    references: dict[str, EvalLog] = {}
    for suite in candidate.scores:
        experts = [m.name for m in plan.manifest.models if m.name in candidate.models and suite in m.suites]
        scored = [log for name in experts if (log := logs.log(by_name[name], suite)) and log.rate.value is not None]
        if scored:
            references[suite] = max(scored, key=_goodness)
    suites = [plan.suites[name] for name in candidate.scores]
    return gate(mine, references, suites, plan.manifest.gates, others.aligned, others.published_for(candidate))


def _goodness(log: EvalLog) -> float:
    value = log.rate.value or 0.0
    return value if log.rate.higher_is_better else -value


def write_report(plan: Plan, report: RunReport, records: Mapping[str, Record]) -> str:
    """Put the report beside the artifacts; returns where the page is."""
    prefix = f"runs/{report.run_id}"
    plan.store.replace(f"{prefix}/{MODULES_HTML}", modules_html(plan, records).encode())
    plan.store.replace(f"{prefix}/{REPORT_JSON}", report_json(report))
    plan.store.replace(f"{prefix}/{REPORT_HTML}", report_html(report).encode())
    return f"{plan.store.uri}/{prefix}/{REPORT_HTML}"


def modules_html(plan: Plan, records: Mapping[str, Record]) -> str:
    """The page of every module of every realigned model."""
    tables = {c.name: rows for c in plan.candidates if (rows := realigned_modules(c, records))}
    return attribution_page(f"{plan.manifest.name} {plan.run_id}", tables)


def report_json(report: RunReport) -> bytes:
    return (json.dumps(report.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


# -- the table ---------------------------------------------------------------------------------------------------


def columns(report: RunReport) -> list[tuple[str, str]]:
    """(kind, suite) of every column, harm first."""
    found = dict.fromkeys((s.kind, s.suite) for row in report.rows for s in row.scores)
    return sorted(found, key=lambda c: get_args(Kind).index(c[0]))


def short_names(report: RunReport) -> dict[str, str]:
    """Suite -> a heading: without the prefix that all of them share."""
    suites = [suite for _, suite in columns(report)]
    prefixes = {s.split("_")[0] for s in suites}
    shared = f"{prefixes.pop()}_" if len(prefixes) == 1 and len(suites) > 1 else ""
    return {s: s.removeprefix(shared) for s in suites}


def cell(rate: Rate, with_interval: bool) -> str:
    """A rate as a person reads it: per cent, interval where asked for, and what was left unscored."""
    if rate.value is None:
        return f"– ({rate.unscored} unscored)"
    if rate.binary:
        text = f"{100 * rate.value:.1f} %"
        if with_interval and rate.low is not None and rate.high is not None:
            text += f" [{100 * rate.low:.0f}–{100 * rate.high:.0f}]"
    else:
        text = f"{rate.value:.3f}"
    return text + (f" ({rate.unscored} unscored)" if rate.unscored else "")


def print_report(report: RunReport, console: Console) -> None:
    """The table a run ends with: a column per suite where there is room, else all tasks in one column."""
    table = _table(report, columns(report), [])
    if table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum > console.width:
        tasks = [suite for kind, suite in columns(report) if kind == "task"]
        table = _table(report, [c for c in columns(report) if c[0] != "task"], tasks)
    console.print(table)
    if report.warning is not None:
        console.print(f"warning: {escape(report.warning)}", soft_wrap=True)
    if len(report.methods) > 1:
        console.print(_methods_table(report))


def _methods_table(report: RunReport) -> Table:
    """What each way of realigning did to the models one by one."""
    table = Table(title="realign methods: means over the models")
    table.add_column("method", no_wrap=True)
    for heading in _METHOD_COLUMNS:
        table.add_column(heading, justify="right")
    for summary in report.methods:
        table.add_row(summary.name, *_summary_cells(summary))
    return table


_METHOD_COLUMNS = ("models", "harmful", "over-refusal", "own tasks", "‖edit‖")


def _mean_cell(rate: MeanRate) -> str:
    if rate.value is None:
        return f"– ({rate.unscored} unscored)" if rate.unscored else ""
    text = f"{100 * rate.value:.1f} % of {rate.denominator}"
    return text + (f" ({rate.unscored} unscored)" if rate.unscored else "")


def _summary_cells(summary: MethodSummary) -> tuple[str, ...]:
    shown = map(_mean_cell, (summary.harmfulness, summary.over_refusal, summary.task_accuracy))
    return (str(summary.num_models), *shown, "" if summary.edit_norm is None else f"{summary.edit_norm:.3g}")


def _table(report: RunReport, apart: list[tuple[str, str]], together: list[str]) -> Table:
    """A column for each (kind, suite) of `apart`, and one for the suites `together`, if any."""
    names = short_names(report)
    table = Table(
        title=f"{report.name}: run {report.run_id}",
        caption=escape("[low–high]: 95 % Clopper–Pearson interval of harmful / scored") + _corrected_caption(report),
    )
    table.add_column("candidate", no_wrap=True)
    table.add_column("gate")
    for _, suite in apart:
        table.add_column(names[suite], justify="right")
    if together:
        table.add_column("task accuracy", no_wrap=True)
    edits = any(row.edited for row in report.rows)
    if edits:
        table.add_column("edited", justify="right", no_wrap=True)
        table.add_column("‖edit‖", justify="right")
    last = None
    for row in report.rows:
        if last is not None and row.role != last:
            table.add_section()
        last = row.role
        scores = {s.suite: s for s in row.scores}
        cells = ["\n".join(map(escape, _lines(scores[s]))) if s in scores else "" for _, s in apart]
        if together:
            cells.append(
                "\n".join(escape(f"{names[s]} {cell(scores[s].rate, False)}") for s in together if s in scores)
            )
        cells += [row.edited or "", _norm(row)] if edits else []
        table.add_row(row.name, row.gate or "", *cells)
    return table


def _lines(score: Score) -> list[str]:
    """A cell of the terminal's table."""
    return [cell(score.rate, score.kind == "harmfulness"), *score.notes()]


def _corrected_caption(report: RunReport) -> str:
    corrected = any(score.corrected is not None for row in report.rows for score in row.scores)
    return "; corrected: for the errors the judge made on labelled rows" if corrected else ""


def _norm(row: Row) -> str:
    return "" if row.edit_norm is None else f"{row.edit_norm:.3g}"


# -- the page ----------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem; color: #1c2733; }
main { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #dde3ea; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td.pass { color: #146c2e; } td.fail { color: #a4262c; } tr.group td { background: #f3f6f9; font-weight: 600; }
small { color: #5c6b7a; } details { margin: .3rem 0; } code { font-size: .9em; overflow-wrap: anywhere; }
"""

_ROLE_NAMES: dict[Role, str] = {
    "reference": "Base models",
    "finetuned": "Fine-tuned",
    "realigned": "Realigned",
    "fused": "Fused",
}


def report_html(report: RunReport) -> str:
    """One page that needs nothing else: the chart, the table, and the evidence behind each number."""
    chart = _chart(report)
    best = (
        f"<b>{html.escape(report.best)}</b> passed with the least harm." if report.best else "No fused variant passed."
    )
    failures = "".join(
        f"<li><code>{html.escape(key)}</code>: {html.escape(text)}</li>" for key, text in report.failures.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(report.name)} · {report.run_id}</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(report.name)} <small>run {report.run_id}</small></h1>
<p>{best} Harm is what the judge measured on held-out requests; it says nothing of requests of another kind.</p>
{_html_published(report)}
{f"<h2>Failures</h2><ul>{failures}</ul>" if failures else ""}
{chart}
<h2>Candidates</h2><main>{_html_table(report)}</main>
{_html_methods(report)}
<p><a href="{MODULES_HTML}">The modules of every realigned model</a>: why each was edited, by how much, what is left</p>
<h2>Gates and evidence</h2>{"".join(_evidence(row) for row in report.rows)}
</body></html>
"""


def _html_published(report: RunReport) -> str:
    if report.published is None:
        return ""
    warning = f"<br>Warning: {html.escape(report.warning)}." if report.warning is not None else ""
    return (
        f"<p>Fused variants were held against version {html.escape(report.published)}, published before.{warning}</p>"
    )


def _html_table(report: RunReport) -> str:
    names = short_names(report)
    head = "".join(f"<th>{html.escape(names[suite])}</th>" for _, suite in columns(report))
    lines: list[str] = []
    last = None
    for row in report.rows:
        if row.role != last:
            lines.append(
                f'<tr class="group"><td colspan="{len(columns(report)) + 4}">{_ROLE_NAMES[row.role]}</td></tr>'
            )
        last = row.role
        scores = {s.suite: s for s in row.scores}
        cells = "".join(_html_cell(scores.get(suite)) for _, suite in columns(report))
        lines.append(
            f'<tr><td>{html.escape(row.name)}</td><td class="{row.gate or ""}">{row.gate or ""}</td>'
            f"{cells}<td>{row.edited or ''}</td><td>{_norm(row)}</td></tr>"
        )
    return (
        f"<table><tr><th>candidate</th><th>gate</th>{head}<th>edited</th><th>‖edit‖</th></tr>{''.join(lines)}</table>"
    )


def _html_methods(report: RunReport) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in _METHOD_COLUMNS)
    lines = "".join(
        f"<tr><td>{html.escape(s.name)}</td>{''.join(f'<td>{cell}</td>' for cell in _summary_cells(s))}</tr>"
        for s in report.methods
    )
    return (
        f"<h2>Realign methods</h2><p>Means over the models, each realigned on its own and judged on its own tasks.</p>"
        f"<main><table><tr><th>method</th>{head}</tr>{lines}</table></main>"
    )


def _html_cell(score: Score | None) -> str:
    if score is None:
        return "<td></td>"
    rate = score.rate
    counts = f"{cell(rate, True)}: {rate.numerator:g} of {rate.denominator} scored, {rate.unscored} unscored"
    notes = "".join(f"<br><small>{html.escape(note)}</small>" for note in score.notes())
    return f'<td title="{html.escape(counts)}">{html.escape(cell(rate, score.kind != "task"))}{notes}</td>'


def _evidence(row: Row) -> str:
    notes = (*((f"warning: {row.warning}",) if row.warning else ()), *row.reasons)
    incoherent = ""
    if row.incoherent is not None:
        rate = row.incoherent
        incoherent = f"<br>incoherent completions: {cell(rate, True)} of {rate.denominator}"
    reasons = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    samples = "".join(f"<li>{html.escape(s.suite)}: <code>{html.escape(s.samples)}</code></li>" for s in row.scores)
    parameters = html.escape(json.dumps(row.parameters, sort_keys=True)) if row.parameters else "none"
    return (
        f"<details><summary>{html.escape(row.name)}: {row.gate or 'base model'}</summary>"
        f"<p>weights: <code>{html.escape(str(row.weights))}</code><br>identity: <code>{row.identity}</code><br>"
        f"parameters: <code>{parameters}</code>{incoherent}</p><ul>{reasons}</ul><ul>{samples}</ul></details>"
    )


def _chart(report: RunReport) -> str:
    """Harm against mean task accuracy, one point per candidate, with the interval of harm."""
    import plotly.graph_objects as go  # noqa: PLC0415 - a second of import that only the page needs

    figure = go.Figure()
    for role, title in _ROLE_NAMES.items():
        points = [(r.name, *_harm_and_accuracy(r)) for r in report.rows if r.role == role]
        points = [p for p in points if p[1] is not None and p[1].value is not None and p[2] is not None]
        if not points:
            continue
        rates = [p[1] for p in points if p[1] is not None]
        figure.add_trace(
            go.Scatter(
                x=[100 * (r.value or 0.0) for r in rates],
                y=[100 * p[2] for p in points if p[2] is not None],
                text=[p[0] for p in points],
                name=title,
                mode="markers",  # names on hover: most candidates lie in one corner
                marker={"size": 9},
                opacity=0.6,
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * ((r.high or 0.0) - (r.value or 0.0)) for r in rates],
                    "arrayminus": [100 * ((r.value or 0.0) - (r.low or 0.0)) for r in rates],
                    "thickness": 1,
                },
            )
        )
    means = [m for m in report.methods if m.harmfulness.value is not None and m.task_accuracy.value is not None]
    if len(means) > 1:
        figure.add_trace(
            go.Scatter(
                x=[100 * (m.harmfulness.value or 0.0) for m in means],
                y=[100 * (m.task_accuracy.value or 0.0) for m in means],
                text=[m.name for m in means],
                name="Mean of a method's models",
                mode="markers+text",
                textposition="bottom right",
                marker={"size": 15, "symbol": "diamond", "color": "#1c2733"},
            )
        )
    figure.update_layout(
        xaxis_title="harmful completions, % (95 % interval)",
        yaxis_title="mean task accuracy, %",
        template="plotly_white",
        height=520,
        margin={"t": 20},
    )
    return figure.to_html(full_html=False, include_plotlyjs=True)


def _harm_and_accuracy(row: Row) -> tuple[Rate | None, float | None]:
    harm = next((s.rate for s in row.scores if s.kind == "harmfulness"), None)
    return harm, row.mean("task")
