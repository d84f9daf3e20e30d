"""The coordinator: walks a Plan until every step has a record or has failed.

    steps whose inputs are done ──▶ walks ──▶ units ──▶ pools of workers
            ▲                        ▲                      │
            │                        └── unit records ◀─────┘  kilobytes
            └──── record.json, created last ◀── a walk that is through

It is the only scheduler and the only one who writes records. It knows no kind of step: each says itself what it asks of
workers and what its record says (`fleet.steps`). Weights never come here: workers read them from the store and write
them to it. When something fails, what doesn't depend on it goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fleet.core.errors import FleetError, InputError, StepFailedError, some
from fleet.run.plan import Plan
from fleet.run.progress import RunProgress
from fleet.run.tasks import Outcome, Pools, Task
from fleet.steps.base import NextUnit, Step, Walk
from fleet.steps.record import (
    Record,
    new_attempt,
    package_versions,
    read_record,
    read_units,
    record_key,
    to_bytes,
    unit_key,
)
from fleet.store.entry import FileEntry
from fleet.work.unit import PoolName, UnitRecord

logger = logging.getLogger(__name__)


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
    computed: list[str] = field(default_factory=list[str])
    """Keys of the steps this run did."""
    failures: dict[str, Failure] = field(default_factory=dict[str, Failure])
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
        causes: dict[str, list[str]] = {}  # what an engine refuses, it refuses for every suite
        for f in roots:
            causes.setdefault(f"{type(f.error).__name__}: {f.error}", []).append(f.step.key)
        lines = [f"{some(keys, 3)}: {cause}" for cause, keys in causes.items()]
        skipped = len(self.failures) - len(roots)
        message = "; ".join(lines) + (f" ({skipped} steps that depend on it were not run)" if skipped else "")
        if all(isinstance(f.error, InputError) for f in roots):
            raise type(roots[0].error)(message)
        raise StepFailedError(f"{len(roots)} steps failed: {message}") from roots[0].error


@dataclass
class _Active:
    """A walk under way: of one step, or of all steps of a joint pass."""

    steps: tuple[Step, ...]
    attempt: str
    walk: Walk
    pending: dict[int, NextUnit] = field(default_factory=dict[int, NextUnit])
    """The units that workers have, or that wait for one."""
    seconds: float = 0.0
    """Spent by workers on the units of this run, without waiting."""

    @property
    def key(self) -> str:
        """What its units' outcomes are told by."""
        return self.steps[-1].key


class Coordinator:
    """One walk of one plan.

    Args:
        plan: what to do; steps with a record are not done again.
        progress: told of every step.
        pools: who does the units; closed at the end.
        on_measured: told what units measure while they are under way, with their step.
    """

    def __init__(
        self,
        plan: Plan,
        progress: RunProgress,
        pools: Pools,
        on_measured: Callable[[Step, dict[str, float]], None] = lambda step, measured: None,
    ) -> None:
        self._store = plan.store
        self._progress = progress
        self._pools = pools
        self._on_measured = on_measured
        self._result = RunResult(records=dict(plan.done))
        self._run = plan.view(self._result.records)
        self._waiting: dict[str, Step] = {s.key: s for s in plan.pending}
        self._active: dict[str, _Active] = {}

    def run(self) -> RunResult:
        """Walk the plan. Failures are in the result; only a broken store or cluster raises."""
        started = time.monotonic()
        try:
            for name in frozenset[PoolName]().union(*(s.early_pools(self._run) for s in self._waiting.values())):
                self._pools.start(name)
            while self._waiting or self._active:
                self._start_ready()
                self._wait()
        finally:
            self._pools.close()
        self._result.seconds = time.monotonic() - started
        return self._result

    # -- starting steps ------------------------------------------------------------------------------------------

    def _start_ready(self) -> None:
        for step in list(self._waiting.values()):
            broken = next((n for n in _needs(step) if n.key in self._result.failures), None)
            if broken is not None:
                del self._waiting[step.key]
                root = self._result.failures[broken.key]
                self._result.failures[step.key] = Failure(step, root.error, cause=root.cause or broken.key)
        for name in dict.fromkeys(step.joint for step in self._waiting.values()):
            if name is not None:
                self._start_joint(name)
        for step in list(self._waiting.values()):
            if step.joint is None and all(n.key in self._result.records for n in _needs(step)):
                self._start(step)

    def _start(self, step: Step) -> None:
        attempt, finished = read_units(self._store, step)
        attempt = attempt or new_attempt()
        self._begin(_Active((step,), attempt, step.walk(self._run, attempt, dict(finished))))

    def _start_joint(self, name: str) -> None:
        """All steps of a pass that wait begin together, once what they need of others is done."""
        steps = tuple(step for step in self._waiting.values() if step.joint == name)
        there = self._result.records.keys() | {step.key for step in steps}
        if all(n.key in there for step in steps for n in _needs(step)):
            attempt = new_attempt()
            self._begin(_Active(steps, attempt, type(steps[-1]).walk_together(steps, self._run, attempt)))

    def _begin(self, active: _Active) -> None:
        for step in active.steps:
            del self._waiting[step.key]
            self._progress.started(step)
        self._active[active.key] = active
        self._go_on(active)

    def _go_on(self, active: _Active) -> None:
        """Ask for the next units once none is under way, or end the walk."""
        if active.pending:
            return
        for coming in active.walk.next():
            active.pending[coming.index] = coming
            self._pools.submit(Task((active.key, coming.index), coming.unit, coming.group))
        if not active.pending:
            self._finish(active)

    # -- ending units and steps ----------------------------------------------------------------------------------

    def _wait(self) -> None:
        outcomes = self._pools.wait()
        for key, measured in self._pools.heard():  # before what has ended: what a unit told is its own
            active = self._active.get(key)
            if active is not None:
                self._progress.measured(active.steps[-1], measured)
                self._on_measured(active.steps[-1], measured)
        for outcome in outcomes:
            self._settle(outcome)
        self._progress.tick(self._pools.num_running)

    def _settle(self, outcome: Outcome) -> None:
        key, index = outcome.task.key
        active = self._active.get(key)
        if active is None:
            return  # another unit of this walk has failed already
        if outcome.error is not None:
            del self._active[key]
            for step in active.steps:
                self._fail(step, outcome.error)
            return
        active.walk.finished[index] = outcome.value
        active.seconds += outcome.seconds
        done = active.pending.pop(index)
        if done.work:
            self._progress.worked(active.steps[-1], done.work, outcome.seconds)
        if done.keeps_record:
            self._store.replace(unit_key(active.steps[-1], active.attempt, index), to_bytes(outcome.value))
        self._go_on(active)

    def _finish(self, active: _Active) -> None:
        del self._active[active.key]
        for step in active.steps:
            try:
                result = active.walk.result(step)
            except FleetError as e:
                self._fail(step, e)
                continue
            units = active.walk.records(step)
            self._complete(
                step,
                Record(
                    kind=step.kind,
                    name=step.name,
                    fingerprint=step.fingerprint,
                    algorithm_version=step.version,
                    spec=step.spec,
                    inputs=step.inputs,
                    deps=tuple(d.key for d in step.deps),
                    attempt=active.attempt,
                    files=merged_files(units),
                    result=result.literals(),
                    finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    seconds=round(active.seconds, 3),
                    versions=package_versions(),
                    processors=tuple(sorted({unit.processor for unit in units if unit.processor})),
                ),
            )

    def _complete(self, step: Step, record: Record) -> None:
        if not self._store.create(record_key(step), to_bytes(record)):
            theirs = read_record(self._store, step)  # another run was faster; its record is the step's
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


def merged_files(units: Iterable[UnitRecord]) -> dict[str, FileEntry]:
    """The files of all units of a step."""
    return {name: entry for unit in units for name, entry in unit.files.items()}


def _needs(step: Step) -> tuple[Step, ...]:
    """What has to be done before it."""
    return (*step.deps, *step.after)
