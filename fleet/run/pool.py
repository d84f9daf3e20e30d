"""A pool of Ray actors of one class: units of work in, results out, whatever dies in between.

Ray's own ActorPool re-raises and forgets; here a unit whose actor died goes back to the queue, the actor is replaced
(Ray places the new one on a node that is alive), and a unit that hangs is taken from its actor by killing it. One
unit is in flight per actor, or as many as it has slots; the rest wait here, so nothing piles up in the object store.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayError, RayTaskError

from evals.engine import UnservableError
from fleet.core.errors import FleetError, InputError, StepFailedError, StoreError
from fleet.run.tasks import Outcome, Task

logger = logging.getLogger(__name__)

_ray: Any = ray
"""Ray types some calls in part."""

_BACKOFF_SECONDS = 1.0
"""Doubled with each attempt of a unit: a node that died takes a moment to be noticed."""

_HARMLESS = (UnservableError, InputError, StoreError)
"""What an actor raises without having been harmed: a candidate, a file or a store was found wanting."""

Actor: TypeAlias = "ActorHandle[Any]"
Ref: TypeAlias = "ray.ObjectRef[Any]"


@dataclass
class _Starting:
    actor: Actor
    started: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Worker:
    actor: Actor
    num_running: int = 0
    num_in_group: int = 0
    """How many of these are of a group."""
    group: str | None = None
    """Of what it did last, or does now."""


@dataclass
class _Running:
    task: Task
    worker: _Worker
    started: float = field(default_factory=time.monotonic)


class Pool:
    """Actors that are started when there is work, given a unit once they are up, and replaced when they die.

    An actor that no node has room for waits while the others work, so a cluster that shrank goes on with fewer.

    Args:
        name: for messages.
        actor_class: the Ray class with its resources set; it has methods `ready` and `run`.
        arguments: of its constructor.
        size: how many actors at most.
        retries: how often a unit is tried again after its actor died, hung, or the store failed; and how often an actor
            that fails to start is started again.
        unit_timeout_seconds: a unit running longer is taken for hung; so is a pool of which no actor starts.
        restart_on_error: an actor that raised is not to be trusted again (a vLLM engine), unless what the user gave or
            the store was at fault: it is replaced, and the unit is tried once more.
        slots: how many units an actor does at once.
    """

    def __init__(
        self,
        name: str,
        actor_class: ActorClass[Any],
        arguments: Sequence[Any],
        size: int,
        retries: int,
        unit_timeout_seconds: float,
        restart_on_error: bool = False,
        slots: int = 1,
    ) -> None:
        self.name = name
        self._actor_class = actor_class
        self._arguments = tuple(arguments)
        self._size = size
        self._retries = retries
        self._unit_timeout_seconds = unit_timeout_seconds
        self._restart_on_error = restart_on_error
        self._slots = slots
        self._queue: deque[Task] = deque()
        self._starting: dict[Ref, _Starting] = {}
        self._num_start_failures = 0
        self._last_up = time.monotonic()
        """When an actor was last there to work; a pool without one for too long gives up."""
        self._workers: list[_Worker] = []
        self._running: dict[Ref, _Running] = {}

    @property
    def refs(self) -> list[Ref]:
        """What is in flight, for `ray.wait`."""
        return [*self._running, *self._starting]

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def start(self, count: int) -> None:
        """Start actors until there are `count`, or the pool is full."""
        while len(self._starting) + len(self._workers) < min(self._size, count):
            actor: Any = self._actor_class.remote(*self._arguments)  # Ray types its handles in more than one way
            self._starting[actor.ready.remote()] = _Starting(actor)

    def submit(self, task: Task) -> None:
        self._queue.append(task)
        self.dispatch()

    def dispatch(self) -> None:
        """Hand queued tasks to actors with a free slot, and start actors for those that are left."""
        now = time.monotonic()
        for worker in sorted(self._workers, key=lambda w: w.num_running):
            while worker.num_running < self._slots and (task := self._next_for(worker, now)) is not None:
                self._queue.remove(task)
                worker.num_running += 1
                if task.group is not None:
                    worker.group = task.group
                    worker.num_in_group += 1
                ref = worker.actor.run.remote(task.unit)
                self._running[ref] = _Running(task, worker)
        if num_waiting := sum(task.not_before <= now for task in self._queue):
            self.start(math.ceil((num_waiting + len(self._running)) / self._slots))

    def _next_for(self, worker: _Worker, now: float) -> Task | None:
        """The oldest task of the worker's group; if there is none and it does no other's, the oldest of all."""
        ready = [task for task in self._queue if task.not_before <= now]
        same = next((task for task in ready if task.group in (None, worker.group)), None)
        return same if same is not None or worker.num_in_group else next(iter(ready), None)

    def settle(self, ref: Ref) -> list[Outcome]:
        """What a ref that is ready brings: nothing if an actor came up, or if its task goes back to the queue."""
        outcomes = self._settle_start(ref) if ref in self._starting else self._settle_task(ref)
        self.dispatch()
        return outcomes

    def _settle_start(self, ref: Ref) -> list[Outcome]:
        actor = self._starting.pop(ref).actor
        try:
            ray.get(ref)
        except RayError as e:
            self._kill(actor)
            self._num_start_failures += 1
            logger.warning("%s: failed to start (%d): %s", self.name, self._num_start_failures, _summary(e))
            alone = not (self._workers or self._starting)
            return self._give_up(e) if alone and self._num_start_failures > self._retries else []
        self._num_start_failures = 0
        self._workers.append(_Worker(actor))
        return []

    def _settle_task(self, ref: Ref) -> list[Outcome]:
        running = self._running.pop(ref)
        running.worker.num_running -= 1
        running.worker.num_in_group -= running.task.group is not None
        task, seconds = running.task, time.monotonic() - running.started
        try:
            value = ray.get(ref)
        except RayTaskError as e:
            cause = e.cause if isinstance(e.cause, Exception) else e
            transient = isinstance(cause, StoreError)
            if self._restart_on_error and not isinstance(cause, _HARMLESS):
                self._lose(running.worker)
                transient = transient or (not isinstance(cause, FleetError) and task.attempts == 0)
            return self._again(task, cause) if transient else [Outcome(task, error=cause, seconds=seconds)]
        except RayError as e:  # its actor died: a crash, a lost node, the memory monitor
            if running.worker not in self._workers:  # killed for what another unit did
                self._queue.append(task)
                return []
            self._lose(running.worker)
            return self._again(task, e)
        return [Outcome(task, value, seconds=seconds)]

    def reap(self) -> list[Outcome]:
        """Take back what has hung; outcomes of those that have hung too often, or that nobody will ever do."""
        outcomes: list[Outcome] = []
        now = time.monotonic()
        for ref, running in list(self._running.items()):
            if now - running.started > self._unit_timeout_seconds:
                del self._running[ref]
                self._lose(running.worker)
                outcomes += self._again(
                    running.task,
                    StepFailedError(
                        f"no result within {self._unit_timeout_seconds:g} s, and its worker was killed; "
                        "if the unit really needs longer, raise placement.unit_timeout_seconds"
                    ),
                )
        if self._workers:
            self._last_up = now
        elif self._starting:
            waited = now - max(min(s.started for s in self._starting.values()), self._last_up)
            if waited > self._unit_timeout_seconds:
                outcomes += self._give_up(
                    StepFailedError(
                        f"no {self.name} came up within {waited:.0f} s: no node has room for what placement asks"
                    )
                )
        self.dispatch()
        return outcomes

    def close(self) -> None:
        """Stop every actor."""
        for actor in (*(w.actor for w in self._workers), *(s.actor for s in self._starting.values())):
            self._kill(actor)
        self._queue.clear()
        self._starting.clear()
        self._workers.clear()
        self._running.clear()

    def _give_up(self, error: Exception) -> list[Outcome]:
        """Nothing that waits will ever be done."""
        outcomes = [Outcome(task, error=error) for task in self._queue]
        self._queue.clear()
        return outcomes

    def _again(self, task: Task, error: Exception) -> list[Outcome]:
        task.attempts += 1
        if task.attempts > self._retries:
            return [Outcome(task, error=error)]
        task.not_before = time.monotonic() + _BACKOFF_SECONDS * 2 ** (task.attempts - 1)
        logger.warning(
            "%s: retry %d of %d: %s: %s", self.name, task.attempts, self._retries, task.key[0], _summary(error)
        )
        self._queue.append(task)
        return []

    def _lose(self, worker: _Worker) -> None:
        """Its other units find out by themselves that it is gone."""
        if worker in self._workers:
            self._workers.remove(worker)
            self._kill(worker.actor)

    def _kill(self, actor: Actor) -> None:
        _ray.kill(actor, no_restart=True)


def _summary(error: Exception) -> str:
    """The last line of a message: of a remote traceback, the error itself."""
    return str(error).strip().split("\n")[-1]
