"""A pool of Ray actors of one class: units of work in, results out, whatever dies in between.

Ray's own ActorPool re-raises and forgets; here a unit whose actor died goes back to the queue, the actor is replaced
(Ray places the new one on a node that is alive), and a unit that hangs is taken from its actor by killing it. One
unit is in flight per actor; the rest wait here, so nothing piles up in the object store.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from evals.engine import UnservableError
from fleet.errors import FleetError, StepFailedError, StoreError

logger = logging.getLogger(__name__)

_BACKOFF_SECONDS = 1.0
"""Doubled with each attempt of a unit: a node that died takes a moment to be noticed."""

Ref: TypeAlias = "ray.ObjectRef[Any]"


@dataclass
class Task:
    """One call of one unit, and how often its worker has been lost."""

    key: tuple[str, int]
    """Step key and unit index; what `settle` answers with."""
    method: str
    unit: Any
    attempts: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A finished task: its value, or the error that ended it."""

    task: Task
    value: Any = None
    error: BaseException | None = None
    seconds: float = 0.0


@dataclass
class _Running:
    task: Task
    actor: ActorHandle
    started: float = field(default_factory=time.monotonic)


class Pool:
    """Actors that are started when first needed, and replaced when they die.

    Args:
        name: for messages. actor_class: the Ray class with its resources set. arguments: of its constructor. size:
        how many actors at most. retries: how often a unit is tried again after its actor died, hung, or the store
        failed. unit_timeout_seconds: a unit running longer is taken for hung. restart_on_error: an actor that raised
        is not to be trusted again (a vLLM engine): it is replaced, and the unit is
            tried once more.
    """

    def __init__(
        self,
        name: str,
        actor_class: Callable[..., ActorHandle] | ActorClass[Any],
        arguments: Sequence[Any],
        size: int,
        retries: int,
        unit_timeout_seconds: float,
        restart_on_error: bool = False,
    ) -> None:
        self.name = name
        self._actor_class = actor_class
        self._arguments = tuple(arguments)
        self._size = size
        self._retries = retries
        self._unit_timeout_seconds = unit_timeout_seconds
        self._restart_on_error = restart_on_error
        self._idle: list[ActorHandle] = []
        self._queue: deque[Task] = deque()
        self._running: dict[Ref, _Running] = {}

    @property
    def refs(self) -> list[Ref]:
        """What is in flight, for `ray.wait`."""
        return list(self._running)

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def start(self, count: int | None = None) -> None:
        """Begin to start actors before there is work for them; engines take a while."""
        while len(self._idle) + len(self._running) < min(self._size, count or self._size):
            self._idle.append(self._new_actor())

    def submit(self, task: Task) -> None:
        self._queue.append(task)
        self.dispatch()

    def dispatch(self) -> None:
        """Hand queued tasks to idle actors, starting actors up to the pool's size."""
        now = time.monotonic()
        for _ in range(len(self._queue)):
            if not self._idle and len(self._running) >= self._size:
                return
            task = self._queue.popleft()
            if task.not_before > now:
                self._queue.append(task)
                continue
            actor = self._idle.pop() if self._idle else self._new_actor()
            ref = getattr(actor, task.method).remote(task.unit)
            self._running[ref] = _Running(task, actor)

    def settle(self, ref: Ref) -> Outcome | None:
        """The outcome of a ref that is ready; None if its task went back to the queue."""
        running = self._running.pop(ref)
        task, seconds = running.task, time.monotonic() - running.started
        try:
            value = ray.get(ref)
        except RayTaskError as e:
            cause = e.cause if isinstance(e.cause, Exception) else e
            transient = isinstance(cause, StoreError)
            if self._restart_on_error and not isinstance(cause, UnservableError):
                self._kill(running.actor)
                transient = transient or (not isinstance(cause, FleetError) and task.attempts == 0)
            else:
                self._idle.append(running.actor)
            return self._again(task, cause) if transient else Outcome(task, error=cause, seconds=seconds)
        except (RayActorError, WorkerCrashedError) as e:
            self._kill(running.actor)
            return self._again(task, e)
        self._idle.append(running.actor)
        self.dispatch()
        return Outcome(task, value, seconds=seconds)

    def reap(self) -> list[Outcome]:
        """Take back what has hung; outcomes of those that have hung too often."""
        outcomes: list[Outcome] = []
        for ref, running in list(self._running.items()):
            if time.monotonic() - running.started > self._unit_timeout_seconds:
                del self._running[ref]
                self._kill(running.actor)
                error = StepFailedError(
                    f"no result within {self._unit_timeout_seconds:g} s, and its worker was killed; if the unit really "
                    "needs longer, or no node offers what placement asks for, change placement"
                )
                outcome = self._again(running.task, error)
                outcomes.extend([outcome] if outcome else [])
        self.dispatch()
        return outcomes

    def close(self) -> None:
        """Stop every actor."""
        for actor in (*self._idle, *(r.actor for r in self._running.values())):
            self._kill(actor)
        self._idle.clear()
        self._running.clear()
        self._queue.clear()

    def _again(self, task: Task, error: Exception) -> Outcome | None:
        task.attempts += 1
        if task.attempts > self._retries:
            return Outcome(task, error=error)
        task.not_before = time.monotonic() + _BACKOFF_SECONDS * 2 ** (task.attempts - 1)
        first_line = str(error).strip().split("\n")[0]
        logger.warning("%s: retry %d of %d: %s: %s", self.name, task.attempts, self._retries, task.key[0], first_line)
        self._queue.append(task)
        return None

    def _new_actor(self) -> ActorHandle:
        return self._actor_class.remote(*self._arguments)  # pyright: ignore[reportFunctionMemberAccess]

    def _kill(self, actor: ActorHandle) -> None:
        ray.kill(actor, no_restart=True)
