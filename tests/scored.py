"""Nights whose scores are given by hand: the records and logs that a run leaves, without the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evals.logs import EvalLog, Origin, Sample, write_samples
from evals.rates import Rate
from evals.suites import Suite
from fleet.run.plan import Plan
from fleet.steps.base import Step
from fleet.steps.builder import Candidate
from fleet.steps.fuse import FuseStep
from fleet.steps.record import Record, attempt_prefix, package_versions, record_key, to_bytes
from fleet.store.entry import FileEntry

ATTEMPT = "a"
FILE = "samples-00000.parquet"

Scores = Callable[[Candidate, Suite], Sequence[float | None]]


def log_of(
    suite: Suite,
    scores: Sequence[float | None],
    settings: Mapping[str, Any] | None = None,
    coherent: bool | None = None,
) -> EvalLog:
    """A log of samples numbered from 0, each as coherent as the others."""
    samples = tuple(
        Sample(
            id=str(i), prompt="p", input="p", completion="c", target="", score=s, label="l", reason="r",
            coherent=coherent,
        )
        for i, s in enumerate(scores)
    )  # fmt: skip
    return EvalLog(
        suite=suite.name, suite_digest=suite.digest, kind=suite.kind, metric="m",
        rate=Rate.of(scores, higher_is_better=suite.kind == "task"), settings=settings or {}, samples=samples,
    )  # fmt: skip


def settle(plan: Plan, step: Step, result: dict[str, Any], **files: bytes) -> Record:
    """Write a step's record as a run would, and return it."""
    record = Record(
        kind=step.kind, name=step.name, fingerprint=step.fingerprint, algorithm_version=1, spec=step.spec,
        inputs=step.inputs, deps=(), attempt=ATTEMPT, files={n: FileEntry.of(data) for n, data in files.items()},
        result=result, finished_at="", seconds=0.0, versions=package_versions(),
    )  # fmt: skip
    plan.store.replace(record_key(step), to_bytes(record))
    return record


def write_log(plan: Plan, step: Step, log: EvalLog) -> Record:
    origin = Origin(candidate="c", identity="i", suite=log.suite, suite_digest=log.suite_digest, engine="{}")
    data = write_samples(log.samples, origin)
    plan.store.replace(f"{attempt_prefix(step, ATTEMPT)}/{FILE}", data)
    return settle(plan, step, log.summary(), **{FILE: data})


def write_scores(plan: Plan, scores: Scores) -> dict[str, Record]:
    """A log of every candidate on every suite, judged by the plan's judge, and that every fusion is done."""
    records: dict[str, Record] = {}
    for candidate in plan.candidates:
        if isinstance(candidate.weights, FuseStep):
            records[candidate.weights.key] = settle(plan, candidate.weights, {})
        for name, step in candidate.scores.items():
            suite = plan.suites[name]
            settings = None if suite.kind == "task" else {"judge": plan.judging.settings}
            records[step.key] = write_log(plan, step, log_of(suite, scores(candidate, suite), settings))
    return records
