"""A prompt suite's way through scoring, block by block: complete, cohere, judge, and on until nothing is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from evals.judging import fault
from evals.logs import EvalLog, read_samples, sample_ids
from evals.rates import Rate
from evals.sequential import Decision, decide
from evals.suites import read_prompts
from fleet.identity import KEY_DIGITS, Json, digest
from fleet.manifest import Manifest
from fleet.outputs import Output
from fleet.record import UnitRecord, attempt_prefix
from fleet.scoring import CohereUnit, CompleteUnit, JudgeUnit, Served, SuiteFiles
from fleet.steps import ScoreStep
from fleet.store import Store
from fleet.walk import NextUnit

Phase: TypeAlias = Literal["complete", "cohere", "judge"]

PHASES: tuple[Phase, ...] = ("complete", "cohere", "judge")

COMPLETIONS_VERSION = 1
"""Bumped by hand when the same candidate would be asked otherwise."""


class SuiteWalk:
    """One candidate on one prompt suite.

    Args:
        step: what is scored.
        served: the candidate, its weights found.
        suite: where the suite's files are.
        aligned: identity of the model the engine starts on.
        manifest: how it is judged, and what its gates are.
        judge_settings: what the log says of the judge.
        store: where completions and logs go.
        attempt: the step's attempt.
        finished: unit number -> record, of what is done; grown by the caller.
    """

    def __init__(
        self,
        step: ScoreStep,
        served: Served,
        suite: SuiteFiles,
        aligned: str,
        manifest: Manifest,
        judge_settings: dict[str, Json],
        store: Store,
        attempt: str,
        finished: dict[int, UnitRecord],
    ) -> None:
        self.step = step
        self.finished = finished
        self.served = served
        self._suite = suite
        self._evaluation = evaluation = manifest.evaluation
        self._judge_settings = judge_settings
        self._store = store
        self._gates = manifest.gates
        assert step.suite.kind != "task"
        self._limit = self._gates.cap(step.suite.kind)
        self._aligned = aligned
        self._output = Output(store.uri, attempt_prefix(step, attempt))
        self._spec: dict[str, Json] = {
            "aligned": aligned, "candidate": served.identity, "suite": step.suite.digest, "dtype": evaluation.dtype,
            "max_model_len": evaluation.max_model_len, "version": COMPLETIONS_VERSION,
        }  # fmt: skip
        ids = sample_ids(read_prompts(step.suite))
        if evaluation.early_stop is None:
            self._blocks = [tuple(range(len(ids)))]
        else:
            # By content: as good as drawn, the same for every candidate, and no matter how the file is sorted.
            order, size = sorted(range(len(ids)), key=lambda i: ids[i]), evaluation.early_stop.block
            self._blocks = [tuple(order[i : i + size]) for i in range(0, len(order), size)]

    @property
    def keeps_records(self) -> bool:
        return True

    def next(self) -> Sequence[NextUnit]:
        """The unit to do now; none if the suite is through, or decided."""
        for block in range(len(self._blocks)):
            for phase in PHASES:
                index = block * len(PHASES) + PHASES.index(phase)
                if index not in self.finished and self._needs(phase, block):
                    return [self._next(index, phase, block)]
            if self._evaluation.early_stop is not None and self._decision(block + 1) != "continue":
                return ()
        return ()

    def result(self) -> dict[str, Json]:
        """The log's summary."""
        log, _ = self.log()
        return log.summary()

    def log(self) -> tuple[EvalLog, list[str]]:
        """The whole log, and its files in order; of a suite that is through, or decided."""
        files = [name for index in sorted(self.finished) for name in self.finished[index].files]
        parts = [self._store.read(f"{self._output.prefix}/{name}") or b"" for name in files]
        samples = [sample for part in parts for sample in read_samples(part)]
        suite, evaluation = self.step.suite, self._evaluation
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
        log = EvalLog(
            suite=suite.name,
            suite_digest=suite.digest,
            kind=suite.kind,
            metric="harmful" if suite.kind == "harmfulness" else "refused",
            rate=Rate.of([s.score for s in samples], higher_is_better=False),
            settings=settings,
            samples=tuple(samples),
        )
        return log, files

    def _needs(self, phase: Phase, block: int) -> bool:
        """Whether anything is to be done: what was said before is used again, whoever judged it then."""
        match phase:
            case "complete":
                return not self._store.list(self._completions(block))
            case "cohere":
                return self._evaluation.coherence is not None and not self._store.list(self._mean_logprobs(block))
            case "judge":
                return True

    def _next(self, index: int, phase: Phase, block: int) -> NextUnit:
        candidate = self._aligned if self.served.is_adapter else self.served.identity
        group = {"complete": candidate, "cohere": self._aligned}.get(phase)
        work = float(len(self._blocks[block])) if phase == "complete" else 0.0
        return NextUnit(index, phase, self._unit(phase, block), work, group)

    def _unit(self, phase: Phase, block: int) -> CompleteUnit | CohereUnit | JudgeUnit:
        key, evaluation = self._completions(block), self._evaluation
        match phase:
            case "complete":
                return CompleteUnit(self.served, self._suite, self._blocks[block], self._store.uri, key)
            case "cohere":
                return CohereUnit(self._store.uri, key, self.step.suite.chat, self._mean_logprobs(block))
            case "judge":
                return JudgeUnit(
                    candidate=self.served.name,
                    suite=self._suite,
                    judge=evaluation.judge,
                    settings=self._judge_settings,
                    coherence=evaluation.coherence,
                    completions=key,
                    mean_logprobs=self._mean_logprobs(block) if evaluation.coherence is not None else None,
                    output=self._output,
                    file=f"samples-{block:05d}.parquet",
                )

    def _completions(self, block: int) -> str:
        return f"completions/{self._digest(block)}.parquet"

    def _mean_logprobs(self, block: int) -> str:
        return f"completions/{self._digest(block)}.logprobs.json"

    def _digest(self, block: int) -> str:
        return digest(self._spec | {"prompts": [*self._blocks[block]]}).removeprefix("sha256:")[:KEY_DIGITS]

    def _decision(self, num_blocks: int) -> Decision:
        """What the scores of the first blocks allow to be said of the cap."""
        last = range(PHASES.index("judge"), num_blocks * len(PHASES), len(PHASES))
        faults: list[Any] = [fault for index in last for fault in self.finished[index].result["faults"]]  # type: ignore[union-attr]
        return decide(faults, self._limit, self._gates.confidence)
