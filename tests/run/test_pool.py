"""The pool on a real Ray, with small actors: what an actor is given, and what becomes of that when it dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import ray

from evals.engine import UnservableError
from fleet.core.errors import EvalError, FleetError, InputError, StoreError
from fleet.run.pool import Pool
from fleet.run.tasks import Outcome, Task

pytestmark = pytest.mark.usefixtures("local_ray")

PATIENCE_SECONDS = 60.0
HOLD_SECONDS = 0.1
"""Long enough for whatever is with the actor already to come in."""


@dataclass(frozen=True)
class Held:
    """What an actor saw of one unit."""

    name: str
    pid: int
    order: int
    """The how-manieth unit of its actor this was."""
    beside: frozenset[str]
    """Names of the units that were in the actor at some time together with this one."""
    at_once: int
    """How many were in the actor when this one came, itself among them."""


@dataclass(frozen=True)
class Unit:
    """A unit that stays in its actor until `together` units are there, when it is asked for the first time."""

    name: str
    together: int = 1
    error: FleetError | ZeroDivisionError | None = None
    """Raised then, instead of an answer."""
    first_time: Literal["dies", "stays"] | None = None
    """What it does then, when it is asked for the first time: kill its process, or stay for good."""


class Worker:
    """Keeps a unit a while, and says who was there with it."""

    def __init__(self, notes: str) -> None:
        self._notes = Path(notes)
        self._changed = threading.Condition()
        self._inside: dict[str, set[str]] = {}
        self._num_units = 0
        _note(self._notes, "started", str(os.getpid()))

    def ready(self) -> bool:
        return True

    def run(self, unit: Unit) -> Held:
        is_first = not (self._notes / "asked").exists() or not noted(self._notes, "asked")[unit.name]
        _note(self._notes, "asked", unit.name)
        together = unit.together if is_first else 1
        with self._changed:
            order, self._num_units = self._num_units, self._num_units + 1
            for others in self._inside.values():
                others.add(unit.name)
            beside = self._inside[unit.name] = set(self._inside)
            at_once = len(self._inside)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(beside) + 1 >= together, PATIENCE_SECONDS)
        time.sleep(HOLD_SECONDS)
        if is_first and unit.first_time == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if is_first and unit.first_time == "stays":
            time.sleep(2 * PATIENCE_SECONDS)
        with self._changed:
            del self._inside[unit.name]
        if unit.error is not None:
            raise unit.error
        return Held(unit.name, os.getpid(), order, frozenset(beside), at_once)


def _note(notes: Path, kind: str, what: str) -> None:
    with (notes / kind).open("a") as file:
        file.write(f"{what}\n")


def noted(notes: Path, kind: str) -> Counter[str]:
    return Counter((notes / kind).read_text().split())


class CountingClass:
    """A Ray class that counts its actors."""

    def __init__(self, actor_class: Any) -> None:
        self._actor_class = actor_class
        self.count = 0

    def remote(self, *arguments: Any) -> Any:
        self.count += 1
        return self._actor_class.remote(*arguments)


def pool_of(notes: Path, **options: Any) -> tuple[Pool, CountingClass]:
    """A pool of one actor, unless the options say otherwise, and its class."""
    settings: dict[str, Any] = {"size": 1, "retries": 0, "unit_timeout_seconds": PATIENCE_SECONDS} | options
    # More threads than slots: it is the pool that must not give an actor more.
    actor_class: Any = CountingClass(ray.remote(Worker).options(num_cpus=0, max_restarts=0, max_concurrency=8))
    return Pool("tiny", actor_class, (str(notes),), **settings), actor_class


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the actor of `pool` writes; names of units are of one test each."""
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def pool(notes: Path, local_ray: None) -> Iterator[Pool]:
    """One actor of two slots for all tests that kill none: nothing they do may make another one start."""
    pool, actor_class = pool_of(notes, slots=2, retries=1, restart_on_error=True)
    yield pool
    pool.close()
    assert actor_class.count == 1


def submit(pool: Pool, *units: Unit | tuple[Unit, str]) -> None:
    for index, given in enumerate(units):
        unit, group = given if isinstance(given, tuple) else (given, None)
        pool.submit(Task((unit.name, index), unit, group))


def drive(pool: Pool) -> dict[str, Outcome]:
    """Until nothing is left; every unit has one outcome."""
    outcomes: dict[str, Outcome] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while pool.busy:
        assert time.monotonic() < deadline, "the pool never ends"
        ready, _ = ray.wait(pool.refs, num_returns=1, timeout=0.2) if pool.refs else ([], time.sleep(0.05))
        for outcome in (*(o for ref in ready for o in pool.settle(ref)), *pool.reap()):
            assert outcome.task.key[0] not in outcomes
            outcomes[outcome.task.key[0]] = outcome
    return outcomes


def run(pool: Pool, *units: Unit | tuple[Unit, str]) -> dict[str, Outcome]:
    submit(pool, *units)
    return drive(pool)


def held(outcomes: dict[str, Outcome]) -> dict[str, Held]:
    assert not [o for o in outcomes.values() if o.error is not None]
    return {name: outcome.value for name, outcome in outcomes.items()}


def test_pool_gives_an_actor_as_many_units_at_once_as_it_has_slots(pool: Pool) -> None:
    """Each stays until two are there, so fewer would never end."""
    found = held(run(pool, *(Unit(f"pair{i}", together=2) for i in range(6))))
    assert len(found) == 6
    assert all(h.beside for h in found.values())
    assert max(h.at_once for h in found.values()) == 2


def test_pool_units_of_one_group_alone_are_together_and_the_actors_group_comes_first(pool: Pool) -> None:
    """The first is with the actor at once, whatever else comes; then its group's go before an older one."""
    groups = {"b0": "b", "a0": "a", "b1": "b", "a1": "a", "b2": "b", "a2": "a"}
    found = held(run(pool, *((Unit(name), group) for name, group in groups.items())))
    assert all(groups[other] == groups[name] for name, h in found.items() for other in h.beside)
    assert any(h.beside for h in found.values())
    assert [groups[name] for name in sorted(found, key=lambda n: found[n].order)] == [*"bbbaaa"]


@pytest.mark.parametrize("free_first", [True, False])
@pytest.mark.parametrize("group", ["mine", "another"])
def test_pool_unit_of_no_group_goes_beside_any(pool: Pool, group: str, free_first: bool) -> None:
    """Each stays until the other is there, whether the actor was on that group before or not."""
    case = f"{group}-{free_first}"
    run(pool, (Unit(f"before-{case}"), "mine"))
    units = [(Unit(f"of-{case}", together=2), group), Unit(f"free-{case}", together=2)]
    found = held(run(pool, *(reversed(units) if free_first else units)))
    assert found[f"free-{case}"].beside == {f"of-{case}"}


@pytest.mark.parametrize("error", [UnservableError("a"), InputError("a"), StoreError("a")])
def test_pool_error_that_is_not_the_actors_leaves_it_alone(pool: Pool, notes: Path, error: FleetError) -> None:
    """An engine takes minutes to start again; nothing is wrong with it if the user's file is, or the store was away."""
    kind = type(error).__name__
    outcomes = run(pool, Unit(f"bad-{kind}", together=2, error=error), Unit(f"good-{kind}", together=2))
    assert type(outcomes.pop(f"bad-{kind}").error) is type(error)
    assert held(outcomes).keys() == {f"good-{kind}"}
    asked = noted(notes, "asked")
    assert (asked[f"bad-{kind}"], asked[f"good-{kind}"]) == (2 if isinstance(error, StoreError) else 1, 1)
    assert noted(notes, "started").total() == 1


def test_pool_actor_killed_for_one_units_error_gives_the_others_back_uncounted(tmp_path: Path) -> None:
    """`bad` raises once `good` is there, too; an error that nobody made on purpose is tried once more."""
    pool, actor_class = pool_of(tmp_path, slots=2, retries=3, restart_on_error=True)
    outcomes = run(pool, Unit("bad", together=2, error=EvalError("broken")), Unit("good", first_time="stays"))
    assert isinstance(outcomes.pop("bad").error, EvalError)
    assert held(outcomes).keys() == {"good"}
    assert outcomes["good"].task.attempts == 0
    assert noted(tmp_path, "asked") == {"bad": 1, "good": 2}
    assert actor_class.count == 2
    assert isinstance(run(pool, Unit("odd", error=ZeroDivisionError()))["odd"].error, ZeroDivisionError)
    assert noted(tmp_path, "asked")["odd"] == 2
    assert actor_class.count == 3
    pool.close()


def test_pool_actor_that_died_is_replaced_and_one_unit_alone_pays(tmp_path: Path) -> None:
    """Nobody can tell which of the two killed it."""
    pool, actor_class = pool_of(tmp_path, slots=2, retries=1)
    outcomes = run(pool, Unit("deadly", together=2, first_time="dies"), Unit("other", first_time="stays"))
    assert held(outcomes).keys() == {"deadly", "other"}
    assert sorted(outcome.task.attempts for outcome in outcomes.values()) == [0, 1]
    assert actor_class.count == 2
    pool.close()


def test_pool_starts_no_more_actors_than_the_work_needs(tmp_path: Path) -> None:
    pool, actor_class = pool_of(tmp_path, slots=2, size=3)
    counts: list[int] = []
    for i in range(8):
        submit(pool, Unit(f"u{i}"))
        counts.append(actor_class.count)
    assert counts == [1, 1, 2, 2, 3, 3, 3, 3]
    assert len(held(drive(pool))) == 8
    submit(pool, Unit("one more"))
    assert len(held(drive(pool))) == 1
    assert actor_class.count == 3
    pool.close()
