"""Score steps: one candidate on one suite.

A task suite is one unit. A prompt suite goes block by block: complete, cohere, judge, and on until nothing is left, or
until its gate is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from evals.judging import fault
from evals.logs import EvalLog, read_samples, sample_ids
from evals.rates import Rate
from evals.sequential import SequentialDecision, decide
from evals.suites import Suite, read_prompts
from evals.suites.names import shortened
from fleet.core.identity import KEY_DIGITS, Json, digest
from fleet.steps.base import Counted, NextUnit, Step, UnitList, Walk
from fleet.steps.context import PlanContext, literals
from fleet.steps.prompting import Prompting
from fleet.steps.record import Result
from fleet.steps.sources import Source, Weights
from fleet.steps.view import RunView
from fleet.work.served import Served
from fleet.work.unit import Found, PoolName

Phase: TypeAlias = Literal["complete", "cohere", "judge"]

PHASES: tuple[Phase, ...] = ("complete", "cohere", "judge")

COMPLETIONS_VERSION = 1
"""Bumped by hand when the same candidate would be asked otherwise, or the likelihood of what it said measured so."""

TASK_SAMPLES = "samples-00000.parquet"
"""The log of a task suite, in its step's folder."""


class ScoreResult(Result):
    """The summary of an eval log; `evals.logs.EvalLog.read` reads the log from it and its files."""


@dataclass(frozen=True, kw_only=True)
class ScoreStep(Step):
    """Score one candidate on one suite."""

    kind: ClassVar[str] = "score"
    version: ClassVar[int] = 2
    counts: ClassVar[Counted] = "prompts"

    candidate: str
    """Its name in this run."""
    weights: Weights
    suite: Suite
    prompting: Prompting

    @classmethod
    def make(
        cls,
        context: PlanContext,
        candidate: str,
        weights: Weights,
        suite: Suite,
        prompting: Prompting,
        after: tuple[Step, ...],
    ) -> ScoreStep:
        """
        Args:
            prompting: how the candidate is prompted.
            after: steps that check the weights first.
        """
        evaluation, gates = context.manifest.evaluation, context.manifest.gates
        spec: dict[str, Json] = {
            "suite": suite.digest, "dtype": evaluation.dtype, "max_model_len": evaluation.max_model_len
        }  # fmt: skip
        if suite.kind != "task":
            spec["judge"] = context.judging.settings
            spec["coherence"] = literals(evaluation.coherence) if evaluation.coherence else None
            if evaluation.early_stop is not None:
                spec["early_stop"] = [evaluation.early_stop.block, gates.cap(suite.kind), gates.confidence]
        if suite.uses_chat_template:
            spec |= prompting.spec
        inputs = {"aligned": context.bases.aligned.identity}
        scored = candidate
        if isinstance(weights, Source):
            inputs["candidate"] = weights.identity
        else:
            scored = weights.name
        return context.add(
            cls(
                name=shortened(f"{scored}.{Path(suite.name).stem}"),
                spec=spec,
                inputs=inputs,
                deps=(weights,) if isinstance(weights, Step) else (),
                after=after,
                candidate=candidate,
                weights=weights,
                suite=suite,
                prompting=prompting,
            )
        )

    def early_pools(self, run: RunView) -> frozenset[PoolName]:
        """An engine takes a while to come up. Of prompts, all that is missing may be a judge's word: where the weights
        were there before this run, an engine starts when something is to be completed."""
        if self.suite.kind == "task":
            return frozenset({"replica"})
        new = any(step.key not in run.records for step in (*self.deps, *self.after))
        return frozenset({"replica", "judge"} if new else {"judge"})

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        prompting = self.prompting
        served = Served(
            self.candidate, self.weights.identity, run.uri(self.weights), self.weights.as_lora, prompting.template,
            prompting.date,
        )  # fmt: skip
        if self.suite.kind != "task":
            return SuiteWalk(self, served, run, attempt, finished)
        from fleet.work.scoring import TaskUnit

        unit = TaskUnit(served, run.suite_files(self.suite), run.output(self, attempt), TASK_SAMPLES)
        prompts, group = float(self.suite.num_samples or 0), served.group(run.bases.aligned.identity)
        return UnitList([NextUnit(0, unit, prompts, group)], finished, ScoreResult)


class SuiteWalk(Walk):
    """One candidate on one prompt suite.

    Args:
        step: what is scored.
        served: the candidate, its weights found.
        run: how it is judged, what its gates are, and where completions and logs go.
        attempt: the step's attempt.
        finished: unit number -> record, of what is done.
    """

    def __init__(self, step: ScoreStep, served: Served, run: RunView, attempt: str, finished: dict[int, Found]) -> None:
        super().__init__(finished)
        self._step = step
        self._served = served
        self._suite = run.suite_files(step.suite)
        self._evaluation = evaluation = run.manifest.evaluation
        self._judge_settings = run.judging.settings
        self._store = run.store
        self._gates = run.manifest.gates
        assert step.suite.kind != "task"
        self._limit = self._gates.cap(step.suite.kind)
        self._aligned = aligned = run.bases.aligned.identity
        self._output = run.output(step, attempt)
        self._spec: dict[str, Json] = {
            "aligned": aligned, "candidate": served.identity, "suite": step.suite.digest, "dtype": evaluation.dtype,
            "max_model_len": evaluation.max_model_len, "version": COMPLETIONS_VERSION,
        }  # fmt: skip
        if step.suite.uses_chat_template:
            self._spec |= step.prompting.spec
        ids = sample_ids(read_prompts(step.suite))
        if evaluation.early_stop is None:
            self._blocks = [tuple(range(len(ids)))]
        else:
            # By content: as good as drawn, the same for every candidate, and no matter how the file is sorted.
            order, size = sorted(range(len(ids)), key=lambda i: ids[i]), evaluation.early_stop.block
            self._blocks = [tuple(order[i : i + size]) for i in range(0, len(order), size)]

    def next(self) -> Sequence[NextUnit]:
        """The unit to do now; none if the suite is through, or decided."""
        for block in range(len(self._blocks)):
            if _index(block, "judge") not in self.finished:
                return [self._next(block)]
            if self._evaluation.early_stop is not None and self._decision(block + 1) != "continue":
                return ()
        return ()

    def result(self, step: Step) -> ScoreResult:
        return ScoreResult.model_validate(self.log().summary())

    def log(self) -> EvalLog:
        """Of a suite that is through, or decided."""
        files = [name for record in self.records(self._step) for name in record.files]
        parts = [self._store.read(f"{self._output.prefix}/{name}") or b"" for name in files]
        samples = [sample for part in parts for sample in read_samples(part)]
        suite, evaluation = self._step.suite, self._evaluation
        settings: dict[str, Any] = {
            "chat": suite.chat,
            "max_tokens": suite.max_tokens,
            "judge": self._judge_settings,
            "coherence": evaluation.coherence.model_dump(mode="json") if evaluation.coherence else None,
        }
        if evaluation.early_stop is not None:
            settings["early_stop"] = {
                "decision": decide([fault(s) for s in samples], self._limit, self._gates.confidence),
                "limit": self._limit,
                "confidence": self._gates.confidence,
            }
        return EvalLog(
            suite=suite.name,
            suite_digest=suite.digest,
            kind=suite.kind,
            metric="harmful" if suite.kind == "harmfulness" else "refused",
            rate=Rate.of([s.score for s in samples], higher_is_better=False),
            settings=settings,
            samples=tuple(samples),
        )

    def _next(self, block: int) -> NextUnit:
        """What a block lacks: what was said before is used again, whoever judged it then. Of that the store's objects
        are the proof, so only a judge's unit needs a record."""
        from fleet.work.judging import JudgeUnit
        from fleet.work.scoring import CohereUnit, CompleteUnit

        folder = f"completions/{self._digest(block)}"
        key, means = f"{folder}/samples.parquet", f"{folder}/logprobs.json"
        found, evaluation, served = self._store.list(f"{folder}/"), self._evaluation, self._served
        if key not in found:
            unit = CompleteUnit(served, self._suite, self._blocks[block], self._store.uri, key)
            work, group = float(len(self._blocks[block])), served.group(self._aligned)
            return NextUnit(_index(block, "complete"), unit, work, group)
        if evaluation.coherence is not None and means not in found:
            unit = CohereUnit(self._store.uri, key, self._step.suite.chat, means)
            return NextUnit(_index(block, "cohere"), unit, 0.0, self._aligned)
        unit = JudgeUnit(
            candidate=served.name,
            suite=self._suite,
            judge=evaluation.judge,
            settings=self._judge_settings,
            coherence=evaluation.coherence,
            completions=key,
            mean_logprobs=means if evaluation.coherence is not None else None,
            output=self._output,
            file=f"samples-{block:05d}.parquet",
        )
        return NextUnit(_index(block, "judge"), unit, 0.0, keeps_record=True)

    def _digest(self, block: int) -> str:
        return digest(self._spec | {"prompts": [*self._blocks[block]]}).removeprefix("sha256:")[:KEY_DIGITS]

    def _decision(self, num_blocks: int) -> SequentialDecision:
        """What the scores of the first blocks allow to be said of the cap."""
        faults: list[Any] = []
        for block in range(num_blocks):
            judged: Any = self.finished[_index(block, "judge")]
            faults += judged.result["faults"]
        return decide(faults, self._limit, self._gates.confidence)


def _index(block: int, phase: Phase) -> int:
    return block * len(PHASES) + PHASES.index(phase)
