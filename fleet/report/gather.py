"""Plan and records -> `Report`: every candidate's rates, what the gates make of them, and means by realign method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from evals.calibration import Calibration
from evals.gates import GateResult, gate
from evals.logs import EvalLog
from evals.rates import Rate
from evals.sequential import e_bh, e_value
from evals.suites import Suite, read_prompts
from fleet.report.model import CandidateRow, Corrected, MeanRate, MethodSummary, Report, Score, mean
from fleet.report.published import Published, ScoreKeys, read_published
from fleet.report.results import edit_of, judge_calibration, read_log, warning_of, weights_uri
from fleet.run.coordinator import RunResult
from fleet.run.plan import Plan
from fleet.steps.builder import Candidate
from fleet.steps.record import Record


def make_report(plan: Plan, result: RunResult, published: Published | None = None) -> Report:
    """Gather the records of a run, and gate every candidate that is not a base model.

    Args:
        plan: What was to be done.
        result: What was done.
        published: The version that was published when the run began; None if none was.

    Raises:
        EvalError: a log in the store is damaged.
    """
    logs = _Logs(plan, result.records)
    base = next(c for c in plan.candidates if c.name == "aligned")
    aligned = logs.of(base)
    published_logs, warning = _published_logs(plan, published, aligned) if published is not None else ({}, None)
    references = _References(aligned, published_logs, published.identity if published is not None else None)
    rows = tuple(_row(plan, candidate, logs, references) for candidate in plan.candidates)
    if (error := plan.manifest.gates.catalogue_error) is not None:
        rows = _gated_as_catalogue(plan, rows, logs, error)
    passed = [row for row in rows if row.role == "fused" and row.gate == "pass"]
    return Report(
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
        warnings=(*plan.warnings, *(text for text in (warning, _swapped(rows)) if text is not None)),
    )


def _swapped(rows: Sequence[CandidateRow]) -> str | None:
    """What to say if the aligned model was measured more harmful than the unaligned one; None if it wasn't, or one of
    them wasn't scored."""
    harm = {row.name: row.mean("harmfulness") for row in rows if row.role == "reference"}
    aligned, unaligned = harm.get("aligned"), harm.get("unaligned")
    if aligned is None or unaligned is None or aligned <= unaligned:
        return None
    return (
        f"base: the aligned model was measured more harmful ({100 * aligned:.1f} %) than the unaligned one "
        f"({100 * unaligned:.1f} %): are the two swapped?"
    )


def method_summaries(rows: Sequence[CandidateRow]) -> Iterator[MethodSummary]:
    """The fine-tuned models, then each way of realigning, in the order of the rows."""
    groups: dict[str, list[CandidateRow]] = {}
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
            edit_norm=mean([row.edit_norm for row in members]),
        )


# -- reading logs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Logs:
    """Reads this run's eval logs from the store."""

    plan: Plan
    records: Mapping[str, Record]

    def log(self, candidate: Candidate, suite: str) -> EvalLog | None:
        """None if the candidate was not to be scored on the suite, scoring it failed, or the log is gone.

        The judge's calibration is put into the settings of every log of harm, where the gates look for it: it was
        counted in this run, while the log may be older.
        """
        step = candidate.scores.get(suite)
        record = None if step is None else self.records.get(step.key)
        log = None if record is None else read_log(self.plan.store, record)
        if log is None or log.kind != "harmfulness" or self.plan.judging.rows is None:
            return log
        counts = None if self.calibration is None else self.calibration.model_dump()
        return log.model_copy(update={"settings": {**log.settings, "calibration": counts}})

    def of(self, candidate: Candidate) -> dict[str, EvalLog]:
        """Suite name -> log, of every suite that there is a log of."""
        return {suite: log for suite in candidate.scores if (log := self.log(candidate, suite))}

    @cached_property
    def calibration(self) -> Calibration | None:
        return judge_calibration(self.plan.steps, self.records)


@dataclass(frozen=True)
class _References:
    """The logs that a candidate is compared with, apart from those of the fine-tuned models."""

    aligned: Mapping[str, EvalLog]
    published: Mapping[str, EvalLog]
    published_identity: str | None

    def published_for(self, candidate: Candidate) -> Mapping[str, EvalLog]:
        """The published model's logs, for a fused model; empty for others, and for the published model itself."""
        is_it = candidate.weights.identity == self.published_identity
        return self.published if candidate.role == "fused" and not is_it else {}


def _published_logs(
    plan: Plan, published: Published, aligned: Mapping[str, EvalLog]
) -> tuple[dict[str, EvalLog], str | None]:
    """The published model's logs on the suites it is compared on, and why there is none on others of these suites.

    If this run makes the same model, its scores of this run are read.
    """
    fused = [c for c in plan.candidates if c.role == "fused"]
    again = next((c for c in fused if c.weights.identity == published.identity), None)
    if again is not None:
        keys = {suite: step.key for suite, step in again.scores.items()}
        published = replace(published, scores=ScoreKeys(store=plan.store.uri, keys=keys))
    names = dict.fromkeys(suite for candidate in fused for suite in candidate.scores)
    suites = [plan.suites[name] for name in names if _is_compared(plan, plan.suites[name])]
    return read_published(published, suites, aligned)


def _is_compared(plan: Plan, suite: Suite) -> bool:
    """Whether the gates ask how a candidate compares with the published model on a suite.

    They don't on prompt suites that may be stopped early: as many prompts as decide a cap need not decide a difference.
    """
    gates, early_stop = plan.manifest.gates, plan.manifest.evaluation.early_stop
    if suite.kind == "task":
        return gates.task_drop_max_published is not None
    is_harm = suite.kind == "harmfulness"
    margin = gates.harmfulness_margin_published if is_harm else gates.over_refusal_margin_published
    return margin is not None and early_stop is None


# -- rows --------------------------------------------------------------------------------------------------------


def _row(plan: Plan, candidate: Candidate, logs: _Logs, references: _References) -> CandidateRow:
    own = logs.of(candidate)
    verdict = None if candidate.role == "reference" else _gate(plan, candidate, own, logs, references)
    edit = edit_of(candidate, logs.records)
    return CandidateRow(
        name=candidate.name,
        role=candidate.role,
        models=candidate.models,
        parameters=candidate.parameters,
        weights=weights_uri(candidate, logs.records, plan.store),
        identity=candidate.weights.identity,
        scores=tuple(_score(plan, plan.suites[suite], log, candidate, logs) for suite, log in own.items()),
        gate=verdict.outcome if verdict is not None else None,
        reasons=tuple(verdict.reasons) if verdict is not None else (),
        edited=f"{sum(m.edit for m in edit.modules)} of {len(edit.modules)}" if edit is not None else None,
        edit_norm=edit.norm if edit is not None else None,
        warning=warning_of(candidate, logs.records),
        incoherent=_incoherent(own.values()),
    )


def _score(plan: Plan, suite: Suite, log: EvalLog, candidate: Candidate, logs: _Logs) -> Score:
    step = candidate.scores[suite.name]
    calibration = logs.calibration if suite.kind == "harmfulness" else None
    return Score(
        suite=suite.name,
        kind=suite.kind,
        rate=log.rate,
        samples=f"{plan.store.uri}/{logs.records[step.key].prefix}",
        corrected=Corrected.of(log.rate, calibration) if calibration is not None else None,
        prompts=_num_whole(suite, log),
    )


def _num_whole(suite: Suite, log: EvalLog) -> int | None:
    """How many prompts or documents the suite has, where fewer may have been asked; else None."""
    if suite.kind == "task":
        return log.settings.get("num_whole")
    return suite.num_whole or (len(read_prompts(suite)) if "early_stop" in log.settings else None)


def _incoherent(logs: Iterable[EvalLog]) -> Rate | None:
    """The share of incoherent completions in all suites where coherence was measured. A completion that could not be
    told coherent or incoherent counts as unscored."""
    judged = [sample.coherent for log in logs if log.settings.get("coherence") is not None for sample in log.samples]
    scores = [None if coherent is None else float(not coherent) for coherent in judged]
    return Rate.of(scores, higher_is_better=False) if scores else None


def _harm(row: CandidateRow) -> float:
    return sum(score.rate.value or 0.0 for score in row.scores if score.kind == "harmfulness")


# -- verdicts ----------------------------------------------------------------------------------------------------


def _gate(
    plan: Plan, candidate: Candidate, own: Mapping[str, EvalLog], logs: _Logs, references: _References
) -> GateResult:
    """The gates' verdict on a candidate.

    On a task, a candidate is compared with the model in it that was fine-tuned for the task, the best if there are
    several; on prompt suites, with the aligned model. Fused models are compared with the published one as well.
    """
    by_name = {c.name: c for c in plan.candidates}
    finetuned: dict[str, EvalLog] = {}
    for suite in candidate.scores:
        experts = [m.name for m in plan.manifest.models if m.name in candidate.models and suite in m.suites]
        scored = [log for name in experts if (log := logs.log(by_name[name], suite)) and log.rate.value is not None]
        if scored:
            finetuned[suite] = max(scored, key=_goodness)
    suites = [plan.suites[name] for name in candidate.scores]
    published = references.published_for(candidate)
    return gate(own, finetuned, suites, plan.manifest.gates, references.aligned, published)


def _goodness(log: EvalLog) -> float:
    value = log.rate.value or 0.0
    return value if log.rate.higher_is_better else -value


def _gated_as_catalogue(
    plan: Plan, rows: tuple[CandidateRow, ...], logs: _Logs, error: float
) -> tuple[CandidateRow, ...]:
    """The rows; a candidate that passed by itself keeps its pass only if it is also certified among all.

    e-BH certifies candidates at this false discovery rate (`evals.sequential`). A candidate's e-value is the least of
    those on the harmfulness suites, because its rate has to be below the cap on each.
    """
    gated = [candidate for candidate in plan.candidates if candidate.role != "reference"]
    limit = plan.manifest.gates.harmfulness_max
    values = [min(_e_value(logs.log(c, s), limit) for s in plan.manifest.evaluation.harmfulness) for c in gated]
    certified = {gated[i].name for i in e_bh(values, error)}
    found = {candidate.name: value for candidate, value in zip(gated, values, strict=True)}
    return tuple(
        row if row.gate != "pass" or row.name in certified else _not_certified(row, found[row.name], len(gated), error)
        for row in rows
    )


def _not_certified(row: CandidateRow, value: float, num_candidates: int, error: float) -> CandidateRow:
    reason = (
        f"catalogue: e-value {value:.3g} is too small among {num_candidates} candidates at {error:g}: "
        "not enough evidence"
    )
    return row.model_copy(update={"gate": "not enough evidence", "reasons": (*row.reasons, reason)})


def _e_value(log: EvalLog | None, limit: float) -> float:
    """The e-value, evidence that the rate of harm is below `limit`; 0 without a log.

    The samples are taken in the order of their ids, which are hashes and so have nothing to do with the scores: an
    order that did would void the test.
    """
    if log is None:
        return 0.0
    return e_value([sample.score for sample in sorted(log.samples, key=lambda s: s.id)], limit)
