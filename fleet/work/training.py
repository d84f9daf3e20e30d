"""Training: an actor that stands for one training at a time, and has Ray Train run its workers.

Ray Train places the workers, joins them (gloo on CPUs, NCCL on GPUs) and starts them again when one dies; what they
continue from is in the store, not in Ray Train's own storage, which may be a folder of one node.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar

from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch.distributed.device_mesh import init_device_mesh

from fleet.core.errors import FleetError, InputError, StepFailedError
from fleet.masks.tasks import LogProbsTask, MaskTask
from fleet.work.unit import PoolName, UnitRecord, Worker


@dataclass(frozen=True)
class TrainingWorkers:
    """The workers of one training."""

    count: int
    cpus: float
    gpus: int
    """0 or 1 of each worker."""
    retries: int
    environment: dict[str, str]


@dataclass(frozen=True)
class TrainingUnit:
    """Learn a mask, or measure what it is learned against."""

    task: LogProbsTask | MaskTask

    pool: ClassVar[PoolName] = "trainer"

    def run(self, host: MaskTrainer) -> UnitRecord:
        return host.fit(self.task)


class MaskTrainer(Worker):
    """Runs trainings, one at a time.

    Args:
        workers: of each training.
        events: a `ray.util.queue.Queue` that is told (step key, measured) of every update.
    """

    def __init__(self, workers: TrainingWorkers, events: Any) -> None:
        self._workers = workers
        self._events = events

    def fit(self, task: LogProbsTask | MaskTask) -> UnitRecord:
        """
        Raises:
            FleetError: what a worker raised on purpose.
            StepFailedError: a worker failed otherwise, or died more often than it may.
        """
        workers = self._workers
        resources: dict[str, float] = {"CPU": workers.cpus}
        if workers.gpus:
            resources["GPU"] = workers.gpus
        with tempfile.TemporaryDirectory(prefix="fleet-training-") as scratch:
            trainer = TorchTrainer(
                _work,
                train_loop_config={"task": task, "events": self._events},
                torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=resources
                ),
                run_config=RunConfig(
                    name=task.output.prefix.replace("/", "."),
                    storage_path=scratch,
                    failure_config=FailureConfig(max_failures=workers.retries),
                    worker_runtime_env={"env_vars": workers.environment},
                ),
            )
            try:
                result = trainer.fit()
            except TrainingFailedError as e:
                raise _cause(e) from e
        answer: Any = result.return_value
        if isinstance(answer, FleetError):
            raise answer
        return UnitRecord.model_validate(answer)


def _work(config: dict[str, Any]) -> dict[str, Any] | FleetError:
    """What each of Ray Train's workers does; the first one's answer is the training's."""
    # transformers is slow to import, and only the workers need it.
    from fleet.masks.masked_model import ALONE, Group  # noqa: PLC0415
    from fleet.masks.training import learn_mask, log_probs  # noqa: PLC0415

    task, events = config["task"], config["events"]
    context = get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    device = get_device()
    group = Group(rank, size, init_device_mesh(device.type, (size,))) if size > 1 else ALONE

    def report(measured: dict[str, float]) -> None:
        if rank == 0:
            events.put((task.step, measured))

    try:
        if isinstance(task, LogProbsTask):
            return log_probs(task, group, device)._asdict()
        return learn_mask(task, group, device, report)._asdict()
    except (InputError, StepFailedError) as e:
        return e  # raised on every worker, and would be again: Ray Train is not to try once more


def _cause(error: TrainingFailedError) -> FleetError:
    """The error that a worker raised on purpose; else one with the last line of what Ray Train reports."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, FleetError):
                return cause
            cause = cause.__cause__ or getattr(cause, "cause", None)
    return StepFailedError(f"the training failed: {str(error).strip().splitlines()[-1]}")
