"""Workers without Ray: units are done in this process, one at a time, for tests of what drives them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fleet.run.tasks import Outcome, Task
from fleet.work.unit import PoolName, Unit, Worker


class InlinePools:
    """Does a unit each time it is waited for.

    Args:
        host: who does a unit; by default a tensor worker.
        before: called with each unit before it is done; what it raises is the unit's error.
        last_first: whether the unit that was submitted last is done first.
    """

    def __init__(
        self,
        host: Worker | None = None,
        before: Callable[[Unit], None] = lambda unit: None,
        last_first: bool = False,
    ) -> None:
        self._host = host
        self._before = before
        self._last_first = last_first
        self._queue: list[Task] = []
        self._told: list[tuple[str, dict[str, float]]] = []
        self.started: list[PoolName] = []
        """Pools that were asked to come up early."""
        self.done: list[Unit] = []
        """Units, in the order they were done."""
        self.closed = False

    def tell(self, key: str, measured: dict[str, float]) -> None:
        """As a unit of the step with this key would, under way."""
        self._told.append((key, measured))

    def start(self, name: PoolName) -> None:
        self.started.append(name)

    def submit(self, task: Task) -> None:
        self._queue.append(task)

    def wait(self) -> list[Outcome]:
        if not self._queue:
            return []
        task = self._queue.pop(-1 if self._last_first else 0)
        started = time.monotonic()
        try:
            self._before(task.unit)
            value = self._worker().run(task.unit)
        except Exception as e:  # noqa: BLE001 - whatever a unit raises is its outcome, as on an actor
            return [Outcome(task, error=e)]
        self.done.append(task.unit)
        return [Outcome(task, value, seconds=time.monotonic() - started)]

    def heard(self) -> list[tuple[str, dict[str, float]]]:
        told, self._told = self._told, []
        return told

    @property
    def num_running(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        self.closed = True

    def _worker(self) -> Any:
        if self._host is None:
            from fleet.work.tensor_worker import TensorWorker

            self._host = TensorWorker()
        return self._host
