"""The pools of one run on Ray: which kinds of actors there are, with which resources, environment and arguments."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evals.engine import LORA_MODULES, EngineOptions, engine_env, engine_length
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import require_full_model
from fleet.manifest import Placement
from fleet.run.plan import Plan
from fleet.run.pool import Pool, Ref
from fleet.run.tasks import Outcome, Task
from fleet.work.judging import JudgingWorker
from fleet.work.scoring import ScoringWorker
from fleet.work.tensor_worker import TensorWorker
from fleet.work.training import MaskTrainer, TrainingWorkers
from fleet.work.unit import PoolName

MAX_NUM_SEQS = 256
"""Sequences an engine decodes at once: a step costs a small model the same for one as for dozens."""

WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment of the tensor workers. One thread each: there is a worker per core. The allocator keeps one tensor's
memory for the next, in huge pages: fresh pages cost a tenth of a survey and a quarter of a mask's update."""

_SCRATCH = str(Path(tempfile.gettempdir(), "fleet-scratch"))
"""Folder of each node for files fetched from the store."""

_WAIT_SECONDS = 0.5

_ray: Any = ray
"""Ray types some calls in part."""


class RayPools:
    """Pools of Ray actors, as the plan's placement has them. A pool has no actor before there is work for it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pools: dict[PoolName, Pool] = {}
        self._events: Queue | None = None

    def start(self, name: PoolName) -> None:
        placement = self._plan.manifest.placement
        self._pool(name).start(placement.replicas if name == "replica" else 1)

    def submit(self, task: Task) -> None:
        self._pool(task.unit.pool).submit(task)

    def wait(self) -> list[Outcome]:
        pools = [*self._pools.values()]
        refs = [ref for pool in pools for ref in pool.refs]
        ready: Sequence[Ref] = ()
        if refs:
            ready, _ = _ray.wait(refs, num_returns=1, timeout=_WAIT_SECONDS)
        else:
            time.sleep(_WAIT_SECONDS if any(p.busy for p in pools) else 0.0)
        outcomes: list[Outcome] = []
        for pool in pools:
            mine = set(pool.refs)
            outcomes += [o for ref in ready if ref in mine for o in pool.settle(ref)]
            outcomes += pool.reap()
        return outcomes

    def heard(self) -> list[tuple[str, dict[str, float]]]:
        return [] if self._events is None else self._events.get_nowait_batch(self._events.qsize())

    @property
    def num_running(self) -> int:
        return sum(pool.num_running for pool in self._pools.values())

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        if self._events is not None:
            self._events.shutdown(force=True)

    def _pool(self, name: PoolName) -> Pool:
        if name not in self._pools:
            self._pools[name] = self._make(name)
        return self._pools[name]

    def _make(self, name: PoolName) -> Pool:
        placement = self._plan.manifest.placement
        match name:
            case "tensor":
                return _tensor_pool(placement)
            case "replica":
                return _scoring_pool(self._plan)
            case "judge":
                return _judge_pool(self._plan)
            case "trainer":
                self._events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": _here()})
                return _training_pool(placement, self._events)


def engine_options(plan: Plan) -> EngineOptions:
    """How the replicas' engines are built; the same for every candidate, so one engine serves all."""
    evaluation, placement = plan.manifest.evaluation, plan.manifest.placement
    targets = {module.rsplit(".", 1)[-1] for module in plan.lora_modules}
    return EngineOptions(
        max_model_len=engine_length(plan.bases.aligned_model.config, evaluation.max_model_len, "base.aligned"),
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
        max_model_len=engine_length(model.config, None, "evaluation.judge.model"),
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
        date = (plan.judging.date,)
        return _replicas("judge", JudgingWorker, source.uri, options, placement, placement.judges, date)
    slots = placement.candidates_per_replica
    # Next to nothing, so it asks for no CPU, and never waits for one that a replica has.
    actor_class = ray.remote(JudgingWorker).options(
        num_cpus=0, max_restarts=0, max_concurrency=slots, runtime_env={"env_vars": WORKER_ENV},
        scheduling_strategy=_here(),
    )  # fmt: skip
    return Pool("judge", actor_class, (_SCRATCH,), 1, placement.retries, placement.unit_timeout_seconds, slots=slots)


def _replicas(
    name: str,
    worker: type[Any],
    model: str,
    options: EngineOptions,
    placement: Placement,
    count: int,
    more: tuple[Any, ...] = (),
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
        name, actor_class, (_SCRATCH, model, options, *more), count, placement.retries,
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
