"""The worker that scores: a vLLM replica fed from the store, its logs written back to the store.

A plain class, made a Ray actor by `fleet.coordinator`. The engine is imported in the constructor, in the actor's own
process: the driver holds this class too, and must not load vLLM.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evals.engine import Candidate, EngineOptions
from evals.judges import make_judge
from evals.suites import Suite, load_suite
from fleet.identity import Json
from fleet.record import FileEntry, UnitRecord
from fleet.store import open_folder, open_store

if TYPE_CHECKING:
    from evals.replicas import Replica

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class ScoreUnit:
    """Score one candidate on one suite."""

    candidate: str
    identity: str
    weights: str
    """URI of the full model or adapter."""
    is_adapter: bool
    suite: str
    """The YAML file in `suite_folder`, or the name of one of lm-eval's own tasks."""
    suite_folder: str | None
    """URI of the folder the coordinator put the suite's files in: this node may not have the driver's disk."""
    judge: dict[str, Json]
    store: str
    prefix: str


class ScoringWorker:
    """A replica on the aligned model. Candidates come as URIs and are fetched to the node once per content.

    Args:
        aligned: URI of the aligned model the engine starts on.
        options: how the engine is built.
        scratch: a folder of the node for what is fetched.
    """

    def __init__(self, aligned: str, options: EngineOptions, scratch: str) -> None:
        from evals.replicas import Replica  # noqa: PLC0415 - loads vLLM, which only the actor's process may

        self._scratch = Path(scratch)
        self._replica: Replica = Replica(open_folder(aligned).local(self._scratch), options)

    def ready(self) -> bool:
        """True once the engine is up."""
        return True

    def score(self, unit: ScoreUnit) -> UnitRecord:
        """Load the candidate, run the suite, write every sample; the record holds the rate with its counts."""
        from evals.harness import run_prompts, run_task  # noqa: PLC0415 - loads lm-eval and datasets

        suite = self._suite(unit)
        self._replica.load(self._candidate(unit))
        if suite.kind == "task":
            log = run_task(self._replica, suite)
        else:
            log = run_prompts(self._replica, suite, make_judge(unit.judge))
        data = log.samples_jsonl().encode()
        open_store(unit.store).replace(f"{unit.prefix}/{SAMPLES_FILE}", data)
        entry = FileEntry(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        return UnitRecord(files={SAMPLES_FILE: entry}, result=log.summary())

    def _suite(self, unit: ScoreUnit) -> Suite:
        if unit.suite_folder is None:
            return load_suite(unit.suite)
        return load_suite(open_folder(unit.suite_folder).local(self._scratch) / unit.suite)

    def _candidate(self, unit: ScoreUnit) -> Candidate:
        folder = open_folder(unit.weights).local(self._scratch)
        if unit.is_adapter:
            return Candidate(unit.candidate, unit.identity, adapter_dir=folder)
        return Candidate(unit.candidate, unit.identity, model_dir=folder)
