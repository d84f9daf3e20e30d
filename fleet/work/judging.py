"""Judging: what candidates said is judged by rules, over an endpoint, or by a model on an engine of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from evals.calibration import Calibration
from evals.coherence import Coherence
from evals.engine import EngineOptions
from evals.judges import AnyJudge, Judge
from evals.judging import ask_model, fault, judged_sample
from evals.labelled import read_labelled
from evals.logs import read_origin, read_samples, write_samples
from evals.suites import Suite
from evals.verdicts import Exchange, Verdict
from fleet.checkpoint.shards import Output
from fleet.core.identity import Json
from fleet.work.scoring import get, put, read_suite, resident, start_replica
from fleet.work.served import SuiteFiles
from fleet.work.unit import PoolName, UnitRecord, Worker


@dataclass(frozen=True)
class JudgeUnit:
    """Judge completions; the log goes to `file` in `output`."""

    candidate: str
    """The candidate's name in this run; the run that made the completions may have called it otherwise."""
    suite: SuiteFiles
    judge: AnyJudge
    settings: Mapping[str, Json]
    """What identifies the judge, for the log."""
    coherence: Coherence | None
    completions: str
    mean_logprobs: str | None
    """Key of a `CohereUnit`'s result; None if coherence is not measured."""
    output: Output
    file: str

    pool: ClassVar[PoolName] = "judge"

    def run(self, host: JudgingWorker) -> UnitRecord:
        """The record holds what counts against the candidate, sample by sample."""
        suite = read_suite(self.suite, host.scratch)
        data = get(self.output.store, self.completions)
        samples = read_samples(data)
        verdicts = host.verdicts(self.judge, [Exchange(s.prompt, s.completion) for s in samples], suite)
        means = [None] * len(samples)
        if self.mean_logprobs is not None:
            means = json.loads(get(self.output.store, self.mean_logprobs))
        judged = [
            judged_sample(suite, sample, verdict, self.coherence, mean)
            for sample, verdict, mean in zip(samples, verdicts, means, strict=True)
        ]
        settings = json.dumps(self.settings, sort_keys=True)
        origin = read_origin(data).model_copy(update={"candidate": self.candidate, "judge": settings})
        entry = put(self.output, self.file, write_samples(judged, origin))
        return UnitRecord(files={self.file: entry}, result={"faults": [fault(s) for s in judged]})


@dataclass(frozen=True)
class CalibrateUnit:
    """Count how often a judge is wrong on labelled rows."""

    suite: SuiteFiles
    judge: AnyJudge
    store: str
    rows: str
    """Key of the rows."""

    pool: ClassVar[PoolName] = "judge"

    def run(self, host: JudgingWorker) -> UnitRecord:
        """The record holds the counts.

        Raises:
            InputError: The judge does no better than chance, or the rows are all of one kind.
        """
        rows = read_labelled(get(self.store, self.rows), self.rows)
        exchanges = [Exchange(row.prompt, row.completion) for row in rows]
        verdicts = host.verdicts(self.judge, exchanges, read_suite(self.suite, host.scratch))
        said = [None if v.label is None else v.label == "harmful" for v in verdicts]
        counts = Calibration.of(zip(said, [row.harmful for row in rows], strict=True))
        return UnitRecord(result=counts.model_dump(mode="json"))


class JudgingWorker(Worker):
    """A judge, with a replica on its own model if it is one.

    Args:
        scratch: a folder of the node for what is fetched.
        model: URI of a judge model; None if the judge is none.
        options: how its engine is built.
        date: what the model's chat template writes, if it writes one.
    """

    def __init__(
        self, scratch: str, model: str | None = None, options: EngineOptions | None = None, date: str | None = None
    ) -> None:
        self.scratch = Path(scratch)
        self._date = date
        self.replica = None
        if model is not None:
            assert options is not None, "a judge model has an engine"
            self.replica = start_replica(self.scratch, model, options)

    def verdicts(self, judge: AnyJudge, exchanges: list[Exchange], suite: Suite) -> list[Verdict]:
        """One verdict per exchange."""
        if isinstance(judge, Judge):
            return judge.judge(exchanges, suite)
        assert self.replica is not None, "a judge model has a replica"
        with self.replica.serving(resident(self.replica, self._date)) as session:
            return ask_model(session, judge, exchanges, suite)
