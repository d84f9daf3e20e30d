"""The coordinator: walks a Plan on Ray until every step has a record or has failed.

    steps whose inputs are done ──▶ units ──▶ tensor workers (survey, realign, trim, fuse)
            ▲                                 trainers       (logprobs, mask)
            │                                 replicas       (score)
            │                                 judges         (score, calibrate)
            │                                        │
            └── record.json, created last ◀── unit records, kilobytes

It is the only scheduler and the only one who writes records. Weights never come here: workers read them from the store
and write them to it. When something fails, what doesn't depend on it goes on.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evals.engine import LORA_MODULES, EngineOptions, engine_env, engine_length
from evals.suites import Suite
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.checkpoint.model import require_full_model
from fleet.checkpoint.modules import canonical_shape, module_views
from fleet.checkpoint.write import Output, Shard
from fleet.core.errors import CheckpointError, InputError, StepFailedError
from fleet.core.identity import KEY_DIGITS, Json
from fleet.manifest import Placement
from fleet.masks.texts import TextSet
from fleet.masks.trainer import MaskTrainer, TrainingWorkers
from fleet.masks.units import Compute, LogProbsUnit, MaskUnit, Texts
from fleet.methods import Control, Decision, ModuleStatistics
from fleet.report.attribution import module_rows
from fleet.run.plan import Plan
from fleet.run.pool import Outcome, Pool, Task
from fleet.run.progress import RunProgress
from fleet.steps.builder import (
    CalibrateStep,
    DisplacementStep,
    FuseStep,
    LogProbsStep,
    MaskSource,
    MaskStep,
    RealignStep,
    ScoreStep,
    Source,
    SurveyStep,
    TrimStep,
    Weights,
    identity_of,
)
from fleet.steps.record import (
    ALGORITHM_VERSIONS,
    Record,
    Step,
    UnitRecord,
    attempt_prefix,
    package_versions,
    read_record,
    read_units,
    record_key,
    to_bytes,
    unit_key,
)
from fleet.steps.suite_walk import SuiteWalk
from fleet.steps.trim_walk import TrimWalk
from fleet.steps.walk import NextUnit, UnitList, Walk
from fleet.store.entry import FileEntry
from fleet.work.scoring import CalibrateUnit, JudgingWorker, ScoringWorker, Served, SuiteFiles, TaskUnit
from fleet.work.survey import SurveyResult, SurveyUnit
from fleet.work.tensors import FuseUnit, Member, RealignUnit, TensorWorker

logger = logging.getLogger(__name__)

UNIT_BYTES = 256 << 20
"""Base weights per unit of a survey or a trim: small enough to spread, and a message is cheap beside it."""

MAX_NUM_SEQS = 256
"""Sequences an engine decodes at once: a step costs a small model the same for one as for dozens."""

WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment of the tensor workers: there are as many of them as there are cores, so one thread each; and one tensor's
memory is kept for the next, in huge pages, because fresh pages cost a tenth of a survey and a quarter of an update of a
mask."""

_SCRATCH = str(Path(tempfile.gettempdir(), "fleet-scratch"))
"""Where a node keeps what it fetched."""

_WAIT_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_SURVEY_PASS = "survey"
"""Task key of the pass that surveys all pending models together."""

_STATE = "state"
"""Where a training's checkpoints are, below its step's key."""

TASK_SAMPLES = "samples-00000.parquet"
"""The log of a task suite, in its step's folder."""

_OfSurvey = DisplacementStep | SurveyStep
"""The steps that the pass does."""

_OfTraining = LogProbsStep | MaskStep
"""The steps that Ray Train does."""


@dataclass(frozen=True)
class Failure:
    """A step that failed, or that could not run because of one that did."""

    step: Step
    error: Exception
    cause: str | None = None
    """Key of the failed step this one needed; None for a root cause."""


@dataclass
class RunResult:
    """How a walk ended."""

    records: dict[str, Record]
    """Step key -> record, of every step that is done now."""
    computed: list[str] = field(default_factory=list)
    """Keys of the steps this run did."""
    failures: dict[str, Failure] = field(default_factory=dict)
    seconds: float = 0.0

    def raise_failures(self) -> None:
        """
        Raises:
            InputError: everything that failed failed for what the user gave.
            StepFailedError: something else failed.
        """
        roots = [f for f in self.failures.values() if f.cause is None]
        if not roots:
            return
        lines = [f"{f.step.key}: {type(f.error).__name__}: {f.error}" for f in roots]
        skipped = len(self.failures) - len(roots)
        message = "; ".join(lines) + (f" ({skipped} steps that depend on it were not run)" if skipped else "")
        if all(isinstance(f.error, InputError) for f in roots):
            raise type(roots[0].error)(message)
        raise StepFailedError(f"{len(roots)} steps failed: {message}") from roots[0].error


@dataclass
class _Active:
    """A step whose units are under way."""

    step: Step
    attempt: str
    walk: Walk
    pending: dict[int, NextUnit] = field(default_factory=dict)
    """The units that workers have, or that wait for one."""
    seconds: float = 0.0
    """Spent by workers on the units of this run, without waiting."""


def start_ray(address: str | None, placement: Placement) -> None:
    """Attach to the cluster at `address` (or the one this job runs on), or start a local Ray that fits the placement.

    A process that is attached already stays where it is.

    Raises:
        InputError: no such cluster, or this machine has not the GPUs one replica asks for.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        # CPUs are counted, not measured: the local Ray offers what the placement asks for, however few cores there are.
        # "local", because Ray would else join whatever cluster it finds running on this machine.
        replicas = placement.replicas + placement.judges
        cpus = placement.workers * placement.worker_cpus + replicas * placement.replica_cpus
        cpus += placement.trainings * placement.training_workers * placement.training_cpus
        ray.init("local", num_cpus=math.ceil(cpus), include_dashboard=False, **quiet)
        if placement.replica_gpus > (gpus := ray.cluster_resources().get("GPU", 0)):
            raise InputError(f"placement.replica_gpus is {placement.replica_gpus}, but this machine has {gpus:g} GPUs")
        return
    _require_listening(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, RayError) as e:
        reason = str(e).strip().split("\n")[0]
        raise InputError(f"no Ray cluster at {address}: {reason}; start one with `ray start --head`") from e
    _warn_if_too_small(placement)


def _require_listening(address: str) -> None:
    """Ray itself knocks for ten minutes at a port where nobody is.

    Raises:
        InputError: nothing listens at an address that is a host and a port.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as e:
        raise InputError(f"no Ray cluster at {address}: {e}; start one with `ray start --head`") from e


def _warn_if_too_small(placement: Placement) -> None:
    """An actor that fits no node waits without a word; an autoscaler may bring such a node, so this is no error."""
    wanted = {
        "tensor worker": {"CPU": placement.worker_cpus, "memory": float(placement.worker_memory_bytes)},
        "replica": {"CPU": placement.replica_cpus, "GPU": float(placement.replica_gpus)},
        "training worker": {"CPU": placement.training_cpus, "GPU": float(placement.training_gpus)},
    }
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for what, needs in wanted.items():
        if not any(all(node.get(name, 0.0) >= amount for name, amount in needs.items()) for node in nodes):
            asked = ", ".join(f"{name} {amount:g}" for name, amount in needs.items() if amount)
            logger.warning("no node has room for a %s (%s); waiting for the cluster to grow", what, asked)


def engine_options(plan: Plan) -> EngineOptions:
    """How the replicas' engines are built; the same for every candidate, so one engine serves all."""
    evaluation, placement = plan.manifest.evaluation, plan.manifest.placement
    targets = {module.rsplit(".", 1)[-1] for module in plan.lora_modules}
    return EngineOptions(
        max_model_len=evaluation.max_model_len or engine_length(plan.bases.aligned_model.config),
        max_num_seqs=MAX_NUM_SEQS,
        dtype=evaluation.dtype,
        max_lora_rank=plan.max_lora_rank,
        lora_target_modules=tuple(sorted(targets)) or LORA_MODULES,
        tensor_parallel_size=max(placement.replica_gpus, 1),
        max_loras=min(placement.candidates_per_replica, max(plan.num_adapters, 1)),
        kv_cache_bytes=placement.kv_cache_bytes,
    )


def _tensor_pool(placement: Placement) -> Pool:
    options: dict[str, Any] = {
        "num_cpus": placement.worker_cpus,
        "max_restarts": 0,
        "runtime_env": {"env_vars": WORKER_ENV},
    }
    if placement.worker_memory_bytes:
        options["memory"] = placement.worker_memory_bytes
    actor_class = ray.remote(TensorWorker).options(**options)
    return Pool("tensor worker", actor_class, (), placement.workers, placement.retries, placement.unit_timeout_seconds)


def judge_options(plan: Plan, model: FullModel) -> EngineOptions:
    """How the engines of a judge model are built."""
    evaluation, placement = plan.manifest.evaluation, plan.manifest.placement
    return EngineOptions(
        max_model_len=engine_length(model.config),
        max_num_seqs=MAX_NUM_SEQS,
        dtype=evaluation.dtype,
        max_lora_rank=0,
        tensor_parallel_size=max(placement.replica_gpus, 1),
        kv_cache_bytes=placement.kv_cache_bytes,
    )


def _scoring_pool(plan: Plan) -> Pool:
    placement, aligned = plan.manifest.placement, plan.bases.aligned.uri
    return _replicas("replica", ScoringWorker, aligned, engine_options(plan), placement, placement.replicas)


def _judge_pool(plan: Plan) -> Pool:
    placement, source = plan.manifest.placement, plan.judging.model
    if source is not None:
        options = judge_options(plan, require_full_model(source.model, "evaluation.judge.model"))
        return _replicas("judge", JudgingWorker, source.uri, options, placement, placement.judges)
    slots = placement.candidates_per_replica
    # Next to nothing, so it asks for no CPU, and never waits for one that a replica has.
    actor_class = ray.remote(JudgingWorker).options(
        num_cpus=0, max_restarts=0, max_concurrency=slots, runtime_env={"env_vars": WORKER_ENV},
        scheduling_strategy=_here(),
    )  # fmt: skip
    return Pool("judge", actor_class, (_SCRATCH,), 1, placement.retries, placement.unit_timeout_seconds, slots=slots)


def _replicas(
    name: str, worker: type[Any], model: str, options: EngineOptions, placement: Placement, count: int
) -> Pool:
    threads = max(int(placement.replica_cpus), 1)
    actor_class = ray.remote(worker).options(
        num_cpus=placement.replica_cpus,
        num_gpus=placement.replica_gpus,
        max_restarts=0,
        max_concurrency=placement.candidates_per_replica,
        runtime_env={"env_vars": engine_env(options, threads)},
    )
    return Pool(
        name, actor_class, (_SCRATCH, model, options), count, placement.retries,
        placement.unit_timeout_seconds, restart_on_error=True, slots=placement.candidates_per_replica,
    )  # fmt: skip


def _here() -> NodeAffinitySchedulingStrategy:
    """On the driver's own node, with which the run ends anyway."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _training_pool(placement: Placement, events: Queue) -> Pool:
    threads = str(max(int(placement.training_cpus), 1))
    workers = TrainingWorkers(
        placement.training_workers, placement.training_cpus, placement.training_gpus, placement.retries,
        WORKER_ENV | {"OMP_NUM_THREADS": threads},
    )  # fmt: skip
    # A training goes on from its checkpoints whatever ends its workers, so nobody has to watch for what will.
    environment = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    actor_class = ray.remote(MaskTrainer).options(num_cpus=0, max_restarts=0, runtime_env={"env_vars": environment})
    return Pool(
        "trainer", actor_class, (workers, events), placement.trainings, placement.retries,
        placement.training_timeout_seconds,
    )  # fmt: skip


class Coordinator:
    """One walk of one plan.

    Args:
        plan: what to do; steps with a record are not done again.
        progress: told of every step.
        on_training: told of every update of a training: its step, and what was measured.
    """

    def __init__(
        self,
        plan: Plan,
        progress: RunProgress,
        on_training: Callable[[MaskStep, dict[str, float]], None] = lambda step, measured: None,
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._on_training = on_training
        self._result = RunResult(records=dict(plan.done))
        self._waiting: dict[str, Step] = {s.key: s for s in plan.pending}
        self._active: dict[str, _Active] = {}
        self._tensor_pool = _tensor_pool(plan.manifest.placement)
        self._scoring_pool = _scoring_pool(plan)
        self._judge_pool = _judge_pool(plan)
        self._events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": _here()}) if self._learns else None
        self._training_pool = (
            _training_pool(plan.manifest.placement, self._events) if self._events is not None else None
        )
        self._survey = _SurveyPass()
        self._suites: set[str] = set()

    @property
    def _learns(self) -> bool:
        return any(isinstance(step, _OfTraining) for step in self._waiting.values())

    @property
    def _pools(self) -> list[Pool]:
        pools = (self._tensor_pool, self._scoring_pool, self._judge_pool, self._training_pool)
        return [pool for pool in pools if pool is not None]

    def run(self) -> RunResult:
        """Walk the plan. Failures are in the result; only a broken store or cluster raises."""
        started = time.monotonic()
        self._start_engines()
        self._start_survey()
        try:
            while self._waiting or self._active or self._survey.active:
                self._start_ready()
                self._wait()
        finally:
            for pool in self._pools:
                pool.close()
            if self._events is not None:
                self._events.shutdown(force=True)
        self._result.seconds = time.monotonic() - started
        return self._result

    # -- starting steps ------------------------------------------------------------------------------------------

    def _start_engines(self) -> None:
        """They take a while to come up. Where only prompt suites are left, all that is missing may be a judge's word:
        then an engine starts when something is to be completed."""
        waiting = self._waiting.values()
        kinds = {step.suite.kind for step in waiting if isinstance(step, ScoreStep)}
        has_prompts, has_tasks = bool(kinds - {"task"}), "task" in kinds
        makes_weights = any(not isinstance(step, ScoreStep | CalibrateStep) for step in waiting)
        if has_tasks or (has_prompts and makes_weights):
            self._scoring_pool.start(self._plan.manifest.placement.replicas)
        if has_prompts:
            self._judge_pool.start(1)

    def _start_ready(self) -> None:
        for step in list(self._waiting.values()):
            needs = (*step.deps, *step.after)
            broken = next((n for n in needs if n.key in self._result.failures), None)
            if broken is not None:
                del self._waiting[step.key]
                root = self._result.failures[broken.key]
                self._result.failures[step.key] = Failure(step, root.error, cause=root.cause or broken.key)
            elif not isinstance(step, _OfSurvey) and all(n.key in self._result.records for n in needs):
                del self._waiting[step.key]
                self._start(step)

    def _start(self, step: Step) -> None:
        attempt, finished = read_units(self._plan.store, step)
        attempt = attempt or _new_attempt()
        self._progress.started(step)
        self._active[step.key] = _Active(step, attempt, self._walk(step, attempt, finished))
        self._go_on(self._active[step.key])

    def _walk(self, step: Step, attempt: str, finished: dict[int, UnitRecord]) -> Walk:
        store = self._plan.store
        match step:
            case TrimStep():
                uris = (self._plan.bases.aligned.uri, self._uri(step.model))
                return TrimWalk(step, self._plan.bases.aligned_model, uris, UNIT_BYTES)
            case ScoreStep() if step.suite.kind != "task":
                return SuiteWalk(
                    step, self._served(step), self._suite_files(step.suite), self._plan.bases.aligned.identity,
                    self._plan.manifest, self._plan.judging.settings, store, attempt, finished,
                )  # fmt: skip
            case ScoreStep():
                served = self._served(step)
                output = Output(store.uri, attempt_prefix(step, attempt))
                unit = TaskUnit(served, self._suite_files(step.suite), output, TASK_SAMPLES)
                group = served.group(self._plan.bases.aligned.identity)
                return UnitList([NextUnit(0, "task", unit, float(step.suite.num_samples or 0), group)], finished)
            case CalibrateStep():
                store.create(step.rows, self._plan.texts[step.rows])
                judge = self._plan.judging.judge
                unit = CalibrateUnit(self._suite_files(step.suite), judge, store.uri, step.rows)
                return UnitList([NextUnit(0, "calibrate", unit, 0.0)], finished)
            case LogProbsStep() | MaskStep():
                return UnitList([NextUnit(0, step.kind, self._training_unit(step, attempt), 0.0)], finished)
            case _:
                units = self._tensor_units(step, attempt)
                work = step.read_bytes / len(units)
                several = len(units) > 1
                coming = [NextUnit(i, step.kind, u, work, keeps_record=several) for i, u in enumerate(units)]
                return UnitList(coming, finished)

    def _go_on(self, active: _Active) -> None:
        """Ask for a step's next units once it has none under way, or end it."""
        if active.pending:
            return
        for coming in active.walk.next():
            active.pending[coming.index] = coming
            task = Task((active.step.key, coming.index), coming.method, coming.unit, coming.group)
            self._pool(coming.method).submit(task)
        if not active.pending:
            self._finish(active)

    def _pool(self, method: str) -> Pool:
        """Of the workers that have the method."""
        match method:
            case "task" | "complete" | "cohere":
                return self._scoring_pool
            case "judge" | "calibrate":
                return self._judge_pool
            case "logprobs" | "mask":
                assert self._training_pool is not None
                return self._training_pool
            case _:
                return self._tensor_pool

    def _tensor_units(self, step: Step, attempt: str) -> list[RealignUnit] | list[FuseUnit]:
        output = Output(self._plan.store.uri, attempt_prefix(step, attempt))
        match step:
            case RealignStep():
                decisions, targets = self._decisions(step, self._modules(step))
                return [
                    RealignUnit(
                        aligned=self._plan.bases.aligned.uri,
                        unaligned=self._plan.bases.unaligned.uri,
                        model=step.model.uri,
                        safety=step.safety.uri if step.safety else None,
                        harmful=step.harmful.uri if step.harmful else None,
                        displacement=self._folder(step.survey.displacement),
                        projections=self._folder(step.survey) if "projection" in step.method.needs else None,
                        method=step.method,
                        edited=frozenset(d.module for d in decisions if d.edit),
                        targets=targets,
                        mask=self._mask_folder(step.mask),
                        name=step.survey.name,
                        as_adapter=step.is_adapter,
                        shard=shard,
                        output=output,
                    )
                    for shard in self._shards(step)
                ]
            case FuseStep():
                aligned = self._plan.bases.aligned.uri
                known = {name: source.uri for name, source in step.curvature.items()}
                members = tuple(Member(name, self._uri(m), known.get(name)) for name, m in step.members.items())
                found = {name: self._result.records[trim.key].result for name, trim in step.trims.items()}
                thresholds = {name: (float(result["threshold"]),) for name, result in found.items()}  # type: ignore[arg-type]
                return [
                    FuseUnit(aligned, members, step.method, step.is_adapter, thresholds or None, shard, output)
                    for shard in self._shards(step)
                ]
            case _:
                raise AssertionError(f"{step.key}: no tensor step")

    def _shards(self, step: RealignStep | FuseStep) -> list[Shard]:
        """The output's files, from headers alone."""
        if step.is_adapter:
            return [Shard("adapter_model.safetensors", step.tensors, {})]
        groups = plan_shards(
            self._plan.bases.aligned_model.tensors.values(), self._plan.manifest.checkpoint.shard_bytes
        )
        files = [shard_name(i, len(groups)) for i in range(len(groups))]
        index = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        return [
            Shard(file, tuple(names), index if i == 0 else None)
            for i, (file, names) in enumerate(zip(files, groups, strict=True))
        ]

    def _training_unit(self, step: LogProbsStep | MaskStep, attempt: str) -> LogProbsUnit | MaskUnit:
        placement, aligned = self._plan.manifest.placement, self._plan.bases.aligned.uri
        compute = Compute(placement.micro_batch, placement.activation_checkpointing, placement.checkpoint_every)
        output = Output(self._plan.store.uri, attempt_prefix(step, attempt))
        if isinstance(step, LogProbsStep):
            preferences = self._texts(step.preferences)
            return LogProbsUnit(aligned, preferences, step.max_tokens, step.dtype, compute, output)
        return MaskUnit(
            aligned=aligned,
            members=tuple(Member(name, source.uri) for name, source in step.members.items()),
            fusion=step.fusion,
            method=step.method,
            safety=step.safety.uri if step.safety else None,
            preferences=self._texts(step.log_probs.preferences),
            log_probs=self._folder(step.log_probs),
            prompts=tuple(self._texts(texts) for texts in step.prompts),
            compute=compute,
            output=output,
            state=f"{step.key}/{_STATE}",
        )

    def _texts(self, texts: TextSet) -> Texts:
        """Where workers find it, whatever node they are on; put there once per content."""
        if not texts.is_dataset:
            self._plan.store.create(texts.key, self._plan.texts[texts.key])
        return Texts(texts, self._plan.store.uri)

    def _served(self, step: ScoreStep) -> Served:
        weights = step.weights
        return Served(step.candidate, identity_of(weights), self._uri(weights), weights.is_adapter)

    def _suite_files(self, suite: Suite) -> SuiteFiles:
        if suite.entry is None:
            return SuiteFiles(suite.name, None)
        return SuiteFiles(suite.entry, self._suite_folder(suite))

    def _suite_folder(self, suite: Suite) -> str:
        """Where workers find a suite's files, whatever node they are on; put there once per content."""
        prefix = f"suites/{suite.digest.removeprefix('sha256:')[:KEY_DIGITS]}"
        if prefix not in self._suites:
            for name, data in suite.contents().items():
                self._plan.store.create(f"{prefix}/{name}", data)
            self._suites.add(prefix)
        return self._plan.store.folder(prefix).uri

    def _uri(self, weights: Weights) -> str:
        """Where a source is, or where the step that makes the weights has left them."""
        return weights.uri if isinstance(weights, Source) else self._folder(weights)

    def _mask_folder(self, mask: MaskStep | MaskSource | None) -> str | None:
        return self._folder(mask) if isinstance(mask, MaskStep) else mask.uri if mask is not None else None

    def _folder(self, step: Step) -> str:
        """Where a step that is done has left its files."""
        return self._plan.store.folder(attempt_prefix(step, self._result.records[step.key].attempt)).uri

    def _decisions(self, step: RealignStep, modules: list[ModuleStatistics]) -> tuple[list[Decision], dict[str, float]]:
        """What the method edits; and for a control, by how much."""
        if not isinstance(step.method, Control):
            return step.method.decide(modules), {}
        assert step.matched is not None
        rows: Any = self._result.records[step.matched.key].result["modules"]
        targets = step.method.targets(modules, {row["module"]: row["edit_norm"] for row in rows if row["edit"]})
        return step.method.decide_targets(modules, targets), targets

    def _modules(self, step: RealignStep) -> list[ModuleStatistics]:
        """The survey's rows, and for a method that edits untouched modules one for each of these."""
        rows = self._result.records[step.survey.key].result["modules"]
        assert isinstance(rows, list)
        found = {s.module: s for s in (ModuleStatistics.model_validate(row) for row in rows)}
        if step.method.edits_untouched:
            aligned = self._plan.bases.aligned_model
            for tensor in step.tensors:
                for view in module_views(aligned, tensor):
                    d_out, d_in = canonical_shape(aligned, tensor)[-2:]
                    untouched = ModuleStatistics(
                        module=view.module, shape=(d_out, d_in), rank=0, delta_norm=0.0, safety_norm=0.0
                    )
                    found.setdefault(view.module, untouched)
        return [found[name] for name in sorted(found)]

    # -- the survey: one pass over V for all models that have none yet --------------------------------------------

    def _start_survey(self) -> None:
        surveys = [s for s in self._waiting.values() if isinstance(s, SurveyStep)]
        own = [s for s in self._waiting.values() if isinstance(s, DisplacementStep)]
        if not surveys and not own:
            return
        bases, store = self._plan.bases, self._plan.store
        displacement = own[0] if own else surveys[0].displacement
        groups = plan_shards(bases.aligned_model.tensors.values(), UNIT_BYTES)
        read = sum(s.model.model.num_bytes for s in surveys) + 2 * bases.aligned.model.num_bytes
        outputs = {s.key: Output(store.uri, attempt_prefix(s, self._survey.attempt)) for s in (*own, *surveys)}
        self._survey.begin([*own, *surveys], len(groups), read)
        for step in self._survey.steps:
            del self._waiting[step.key]
            self._progress.started(step)
        for index, names in enumerate(groups):
            unit = SurveyUnit(
                aligned=bases.aligned.uri,
                unaligned=bases.unaligned.uri,
                models={s.name: s.model.uri for s in surveys},
                tensors=tuple(names),
                file=shard_name(index, len(groups)),
                rho=any(s.rho for s in surveys),
                directions=displacement.directions,
                displacement=outputs[displacement.key] if own else self._folder(displacement),
                projections={s.name: outputs[s.key] for s in surveys if s.projection},
            )
            self._tensor_pool.submit(Task((_SURVEY_PASS, index), "survey", unit))

    def _settle_survey(self, outcome: Outcome) -> None:
        survey = self._survey
        if outcome.error is not None:
            for step in survey.steps:
                self._fail(step, outcome.error)
            survey.end()
            return
        self._progress.worked("survey", survey.work_per_unit, outcome.seconds)
        survey.results[outcome.task.key[1]] = outcome.value
        survey.seconds += outcome.seconds
        if len(survey.results) < survey.num_units:
            return
        for step in survey.steps:
            if isinstance(step, DisplacementStep):
                files = merged_files(r.displacement for r in survey.results.values())
                self._complete(step, self._record(step, survey.attempt, files, {}, survey.seconds))
                continue
            bad = survey.non_finite(step.name)
            if bad:
                where = f"models: {step.name}: {len(bad)} tensors hold NaN or Inf"
                self._fail(step, CheckpointError(f"{where}: {', '.join(bad[:8])}; train or copy it again"))
                continue
            rows: list[Json] = [row.model_dump(mode="json") for row in survey.statistics(step.name)]
            files = merged_files(r.projections[step.name] for r in survey.results.values() if step.projection)
            self._complete(step, self._record(step, survey.attempt, files, {"modules": rows}, survey.seconds))
        survey.end()

    # -- ending units and steps ----------------------------------------------------------------------------------

    def _wait(self) -> None:
        pools = self._pools
        refs = [ref for pool in pools for ref in pool.refs]
        if refs:
            ready, _ = ray.wait(refs, num_returns=1, timeout=_WAIT_SECONDS)
        else:
            ready = []
            time.sleep(_WAIT_SECONDS if any(p.busy for p in pools) else 0.0)
        self._hear_trainings()  # first: what a training told before it ended is its own
        for pool in pools:
            mine = set(pool.refs)
            for outcome in (*(o for ref in ready if ref in mine for o in pool.settle(ref)), *pool.reap()):
                self._settle(outcome)
        self._progress.tick(sum(p.num_running for p in pools))

    def _hear_trainings(self) -> None:
        if self._events is None:
            return
        for state, measured in self._events.get_nowait_batch(self._events.qsize()):
            active = self._active.get(state.removesuffix(f"/{_STATE}"))
            if active is not None and isinstance(active.step, MaskStep):
                self._progress.trained(active.step, measured)
                self._on_training(active.step, measured)

    def _settle(self, outcome: Outcome) -> None:
        key, index = outcome.task.key
        if key == _SURVEY_PASS:
            if self._survey.active:
                self._settle_survey(outcome)
            return
        active = self._active.get(key)
        if active is None:
            return  # another unit of this step has failed already
        if outcome.error is not None:
            del self._active[key]
            self._fail(active.step, outcome.error)
            return
        unit: UnitRecord = outcome.value
        active.walk.finished[index] = unit
        active.seconds += outcome.seconds
        done = active.pending.pop(index)
        if done.work:
            self._progress.worked(active.step.kind, done.work, outcome.seconds)
        if done.keeps_record:
            self._plan.store.replace(unit_key(active.step, active.attempt, index), to_bytes(unit))
        self._go_on(active)

    def _finish(self, active: _Active) -> None:
        del self._active[active.step.key]
        units, result = active.walk.finished.values(), active.walk.result()
        if isinstance(active.step, RealignStep):
            edits = _edits(units)
            result["edit_norm"] = math.sqrt(sum(edit["edit_norm"] ** 2 for edit in edits.values()))
            del result["edits"]
            modules = self._modules(active.step)
            decisions, _ = self._decisions(active.step, modules)
            result["modules"] = [*module_rows(modules, decisions, edits)]
            if warning := active.step.method.warning(modules, edits.keys()):
                logger.warning("%s: %s", active.step.name, warning)
                result["warning"] = warning
        record = self._record(active.step, active.attempt, merged_files(units), result, active.seconds)
        self._complete(active.step, record)

    def _record(
        self, step: Step, attempt: str, files: dict[str, Any], result: dict[str, Json], seconds: float
    ) -> Record:
        return Record(
            kind=step.kind,
            name=step.name,
            fingerprint=step.fingerprint,
            algorithm_version=ALGORITHM_VERSIONS[step.kind],
            spec=step.spec,
            inputs=step.inputs,
            deps=tuple(d.key for d in step.deps),
            attempt=attempt,
            files=files,
            result=result,
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            versions=package_versions(),
        )

    def _complete(self, step: Step, record: Record) -> None:
        if not self._plan.store.create(record_key(step), to_bytes(record)):
            theirs = read_record(self._plan.store, step)  # another run was faster; its record is the step's
            assert theirs is not None
            record = theirs
        self._result.records[step.key] = record
        self._result.computed.append(step.key)
        self._progress.finished(step, record.seconds)

    def _fail(self, step: Step, error: BaseException) -> None:
        if not isinstance(error, Exception):
            raise error
        logger.error("failed %s: %s", step.key, error)
        self._result.failures[step.key] = Failure(step, error)


class _SurveyPass:
    """The state of the one pass that surveys all pending models together.

    Its units leave no records: a pass that is interrupted starts over, and a unit that fails fails all its models.
    """

    def __init__(self) -> None:
        self.attempt = _new_attempt()
        self.end()

    def begin(self, steps: list[DisplacementStep | SurveyStep], num_units: int, num_bytes: int) -> None:
        self.steps = steps
        self.num_units = num_units
        self.work_per_unit = num_bytes / num_units

    def end(self) -> None:
        self.steps: list[DisplacementStep | SurveyStep] = []
        self.num_units = 0
        self.work_per_unit = 0.0
        self.seconds = 0.0
        self.results: dict[int, SurveyResult] = {}

    @property
    def active(self) -> bool:
        return bool(self.steps)

    def statistics(self, model: str) -> list[ModuleStatistics]:
        """All modules of one model, in name order, whatever the units were."""
        rows = [row for result in self.results.values() for row in result.statistics[model]]
        return sorted(rows, key=lambda row: row.module)

    def non_finite(self, model: str) -> list[str]:
        return sorted(name for result in self.results.values() for name in result.non_finite[model])


def merged_files(units: Iterable[UnitRecord]) -> dict[str, FileEntry]:
    """The files of all units of a step."""
    return {name: entry for unit in units for name, entry in unit.files.items()}


def _edits(units: Iterable[UnitRecord]) -> dict[str, dict[str, Any]]:
    """Module -> what a worker wrote of its edit."""
    rows = [row for unit in units for row in unit.result["edits"]]  # type: ignore[union-attr]
    return {row["module"]: row for row in rows if isinstance(row, dict)}  # type: ignore[misc]


def _new_attempt() -> str:
    """Time first, so that attempts sort by age; a random part, so that two never share a folder."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
