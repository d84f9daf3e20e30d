"""A kind of step that exists in this file alone goes all the way: plan, coordinator, progress, record, resume, report.

What a new kind touches is here: a file with its classes, a line that registers it, and a call where the builder turns a
manifest into steps.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

import fleet.run.plan
from fleet.checkpoint.opened import open_full
from fleet.checkpoint.shards import Output
from fleet.manifest import load_manifest
from fleet.report.gather import make_report
from fleet.run.coordinator import Coordinator, RunResult
from fleet.run.plan import Plan, make_plan
from fleet.run.progress import RunProgress
from fleet.steps import KINDS, Step, register
from fleet.steps.base import NextUnit, UnitList, Walk
from fleet.steps.builder import Candidate, build
from fleet.steps.context import PlanContext
from fleet.steps.fuse import FuseStep
from fleet.steps.record import Result, record_key, unit_key
from fleet.steps.view import RunView
from fleet.store import open_store
from fleet.store.entry import FileEntry
from fleet.work.unit import Found, PoolName, UnitRecord, Worker
from tests.catalogue import manifest_document, write_manifest
from tests.inline import InlinePools

# -- the kind ----------------------------------------------------------------------------------------------------------


class CensusResult(Result):
    """How many entries the first and the last tensor have."""

    first: int
    last: int


@dataclass(frozen=True)
class CensusUnit:
    """Count one tensor's entries, and write the number down."""

    which: str
    model: str
    tensor: str
    output: Output

    pool: ClassVar[PoolName] = "tensor"

    def run(self, host: Worker) -> UnitRecord:
        count = math.prod(open_full(self.model).tensors[self.tensor].shape)
        file, data = f"{self.which}.txt", f"{count}\n".encode()
        open_store(self.output.store).replace(f"{self.output.prefix}/{file}", data)
        return UnitRecord(files={file: FileEntry.of(data)}, result={self.which: count})


@dataclass(frozen=True, kw_only=True)
class CensusStep(Step):
    """Count entries of a fused model."""

    kind: ClassVar[str] = "census"
    version: ClassVar[int] = 1

    model: FuseStep

    @classmethod
    def make(cls, context: PlanContext, model: FuseStep) -> CensusStep:
        return context.add(cls(name=model.name, spec={}, inputs={}, deps=(model,), read_bytes=1000, model=model))

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        tensors = sorted(run.aligned.tensors)
        output, model = run.output(self, attempt), run.uri(self.model)
        units = [CensusUnit("first", model, tensors[0], output), CensusUnit("last", model, tensors[-1], output)]
        coming = [NextUnit(i, unit, self.read_bytes / 2, keeps_record=True) for i, unit in enumerate(units)]
        return UnitList(coming, finished, CensusResult)


# -- the registry's line and the builder's call ------------------------------------------------------------------------


def build_with_census(context: PlanContext) -> tuple[Candidate, ...]:
    candidates = build(context)
    for step in [*context.steps.values()]:
        if isinstance(step, FuseStep) and not step.as_lora:
            CensusStep.make(context, step)
    return candidates


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fleet.run.plan, "build", build_with_census)
    register(CensusStep)
    yield
    del KINDS[CensusStep.kind]


# -- a run ---------------------------------------------------------------------------------------------------------


def plan_of(catalogue: Path, work: Path) -> Plan:
    """A night without scoring steps, which need an engine."""
    plan = make_plan(load_manifest(write_manifest(work / "models.json", manifest_document(catalogue, work))))
    return dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.kind != "score"))


def walk(plan: Plan, pools: InlinePools) -> RunResult:
    with RunProgress(plan.steps, set(plan.done), Console(file=io.StringIO())) as progress:
        return Coordinator(plan, progress, pools).run()


def test_new_kind_goes_through_plan_coordinator_progress_record_resume_and_report(
    census: None, catalogue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fleet.run.progress")
    plan = plan_of(catalogue, tmp_path)
    mine = [step for step in plan.steps if step.kind == "census"]
    assert {step.name for step in mine} == {"plain", "merged"}
    result = walk(plan, InlinePools())
    assert not result.failures and {step.key for step in mine} <= set(result.computed)
    assert f"done {mine[1].key}" in caplog.text and "(2 of 2)" in caplog.text

    shapes = {name: info.shape for name, info in plan.bases.aligned_model.tensors.items()}
    for step in mine:
        record = result.records[step.key]
        found = record.read(CensusResult)
        assert (found.first, found.last) == (math.prod(shapes[min(shapes)]), math.prod(shapes[max(shapes)]))
        assert plan.store.read(f"{record.prefix}/first.txt") == f"{found.first}\n".encode()
        assert record.deps == (step.deps[0].key,) and record.algorithm_version == 1 and record.processors
    assert make_report(plan, result).computed == len(result.computed)

    assert plan_of(catalogue, tmp_path).pending == ()
    interrupted, attempt = mine[0], result.records[mine[0].key].attempt
    for key in (record_key(interrupted), unit_key(interrupted, attempt, 1)):
        (tmp_path / "artifacts" / key).unlink()
    pools = InlinePools()
    resumed = walk(plan_of(catalogue, tmp_path), pools)
    assert resumed.computed == [interrupted.key]
    assert [unit.which for unit in pools.done if isinstance(unit, CensusUnit)] == ["last"] and len(pools.done) == 1
    assert resumed.records[interrupted.key].result == result.records[interrupted.key].result


def test_kind_whose_name_is_taken_is_refused() -> None:
    class Impostor(CensusStep):
        kind: ClassVar[str] = "fuse"

    with pytest.raises(ValueError, match="step kind fuse: FuseStep has this name already"):
        register(Impostor)
    assert KINDS["fuse"] is FuseStep
