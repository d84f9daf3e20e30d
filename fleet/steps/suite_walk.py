"""A prompt suite's way through scoring, block by block: complete, cohere, judge, and on until nothing is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from evals.judging import fault
from evals.logs import EvalLog, read_samples, sample_ids
from evals.rates import Rate
from evals.sequential import SequentialDecision, decide
from evals.suites import read_prompts
from fleet.checkpoint.write import Output
from fleet.core.identity import KEY_DIGITS, Json, digest
from fleet.manifest import Manifest
from fleet.steps.builder import ScoreStep
from fleet.steps.record import UnitRecord, attempt_prefix
from fleet.steps.walk import NextUnit
from fleet.store import Store
from fleet.work.scoring import CohereUnit, CompleteUnit, JudgeUnit, Served, SuiteFiles

Phase: TypeAlias = Literal["complete", "cohere", "judge"]

PHASES: tuple[Phase, ...] = ("complete", "cohere", "judge")

COMPLETIONS_VERSION = 1
"""Bumped by hand when the same candidate would be asked otherwise, or the likelihood of what it said measured so."""


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
        self._step = step
        self.finished = finished
        self._served = served
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

    def next(self) -> Sequence[NextUnit]:
        """The unit to do now; none if the suite is through, or decided."""
        for block in range(len(self._blocks)):
            if _index(block, "judge") not in self.finished:
                return [self._next(block)]
            if self._evaluation.early_stop is not None and self._decision(block + 1) != "continue":
                return ()
        return ()

    def result(self) -> dict[str, Json]:
        """The log's summary."""
        return self.log().summary()

    def log(self) -> EvalLog:
        """Of a suite that is through, or decided."""
        files = [name for index in sorted(self.finished) for name in self.finished[index].files]
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
        folder = f"completions/{self._digest(block)}"
        key, means = f"{folder}/samples.parquet", f"{folder}/logprobs.json"
        found, evaluation, served = self._store.list(f"{folder}/"), self._evaluation, self._served
        if key not in found:
            unit = CompleteUnit(served, self._suite, self._blocks[block], self._store.uri, key)
            work, group = float(len(self._blocks[block])), served.group(self._aligned)
            return NextUnit(_index(block, "complete"), "complete", unit, work, group)
        if evaluation.coherence is not None and means not in found:
            unit = CohereUnit(self._store.uri, key, self._step.suite.chat, means)
            return NextUnit(_index(block, "cohere"), "cohere", unit, 0.0, self._aligned)
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
        return NextUnit(_index(block, "judge"), "judge", unit, 0.0, keeps_record=True)

    def _digest(self, block: int) -> str:
        return digest(self._spec | {"prompts": [*self._blocks[block]]}).removeprefix("sha256:")[:KEY_DIGITS]

    def _decision(self, num_blocks: int) -> SequentialDecision:
        """What the scores of the first blocks allow to be said of the cap."""
        judged = [self.finished[_index(block, "judge")].result for block in range(num_blocks)]
        faults: list[Any] = [fault for result in judged for fault in result["faults"]]  # type: ignore[union-attr]
        return decide(faults, self._limit, self._gates.confidence)


def _index(block: int, phase: Phase) -> int:
    return block * len(PHASES) + PHASES.index(phase)
