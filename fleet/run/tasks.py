"""What the coordinator asks of workers, whoever they are: tasks in, outcomes out. Knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fleet.work.unit import PoolName, Unit


@dataclass
class Task:
    """One call of one unit, and how often its worker has been lost."""

    key: tuple[str, int]
    """Step key and unit index; what `settle` answers with."""
    unit: Unit
    """What the actor's `run` is given."""
    group: str | None = None
    """What an actor has to have at hand for it, if anything. Only tasks of one group are with an actor at once, and the
    next is taken from the same group while there is one."""
    attempts: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A finished task: its value, or the error that ended it."""

    task: Task
    value: Any = None
    error: BaseException | None = None
    seconds: float = 0.0


class Pools(Protocol):
    """The workers of a run, as the coordinator knows them. `fleet.run.pools` has Ray actors;
    a test may do units on the spot."""

    def start(self, name: PoolName) -> None:
        """Begin to start a pool's workers, which take long to come up."""
        ...

    def submit(self, task: Task) -> None:
        """Queue a unit for a worker of its pool."""
        ...

    def wait(self) -> list[Outcome]:
        """What has ended, after a short wait if nothing has."""
        ...

    def heard(self) -> list[tuple[str, dict[str, float]]]:
        """What units under way have told since it was last asked: step key, and what was measured."""
        ...

    @property
    def num_running(self) -> int:
        """Units that workers have."""
        ...

    def close(self) -> None:
        """Stop every worker."""
        ...
