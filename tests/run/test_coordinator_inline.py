"""The coordinator alone: what it asks for, in which order, and what it makes of what comes back. No Ray."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

import fleet.steps.survey
from fleet.core.errors import CheckpointError, StepFailedError
from fleet.manifest import load_manifest
from fleet.run.coordinator import Coordinator, RunResult
from fleet.run.plan import Plan, make_plan
from fleet.run.progress import RunProgress
from fleet.steps.base import Step
from fleet.steps.record import record_key, unit_key
from fleet.work.fusing import FuseUnit
from fleet.work.unit import Unit
from tests.catalogue import manifest_document, write_manifest
from tests.inline import InlinePools


def tensor_plan(root: Path, work: Path, **changes: Any) -> Plan:
    """A plan without its scoring steps, which need an engine; in shards so small that every full model has several."""
    document = manifest_document(root, work, checkpoint={"shard_bytes": 20_000}, **changes)
    plan = make_plan(load_manifest(write_manifest(work / "models.json", document)))
    return dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.kind != "score"))


def walk(plan: Plan, pools: InlinePools) -> RunResult:
    with RunProgress(plan.steps, set(plan.done), Console(file=io.StringIO())) as progress:
        return Coordinator(plan, progress, pools).run()


def digests(result: RunResult) -> dict[str, str]:
    return {f"{key}/{name}": e.sha256 for key, record in result.records.items() for name, e in record.files.items()}


def step_of(plan: Plan, name: str, kind: str = "fuse") -> Step:
    (step,) = (s for s in plan.steps if s.kind == kind and s.name == name)
    return step


@pytest.fixture(scope="module")
def undisturbed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, RunResult]:
    """A run in which nothing goes wrong: its folder (read-only for tests), plan and result."""
    work = tmp_path_factory.mktemp("inline")
    plan = tensor_plan(catalogue, work)
    return work, plan, walk(plan, InlinePools())


def test_coordinator_computes_every_step_once_and_closes_its_pools(
    catalogue: Path, undisturbed: tuple[Path, Plan, RunResult]
) -> None:
    work, plan, result = undisturbed
    assert not result.failures
    assert sorted(result.computed) == sorted(s.key for s in plan.steps)
    assert all(record.processors for record in result.records.values())
    pools = InlinePools()
    second = dataclasses.replace(tensor_plan(catalogue, work), steps=plan.steps)
    assert walk(second, pools).computed == [] and pools.closed and not pools.done


def test_units_done_in_the_opposite_order_leave_the_same_bytes(
    catalogue: Path, tmp_path: Path, undisturbed: tuple[Path, Plan, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.steps.survey, "UNIT_BYTES", 20_000)  # several units of the survey, too
    result = walk(tensor_plan(catalogue, tmp_path), InlinePools(last_first=True))
    expected = digests(undisturbed[2])
    # V's own part is in a file per unit of the survey: the same tensors, cut otherwise.
    found = {k: v for k, v in digests(result).items() if not k.startswith("displacement/")}
    assert found == {k: v for k, v in expected.items() if not k.startswith("displacement/")}


def test_unit_that_fails_fails_its_step_and_the_others_finish(catalogue: Path, tmp_path: Path) -> None:
    def broken(unit: Unit) -> None:
        if isinstance(unit, FuseUnit) and "/plain/" in unit.output.prefix:
            raise ZeroDivisionError("broken on purpose")

    plan = tensor_plan(catalogue, tmp_path)
    result = walk(plan, InlinePools(before=broken))
    assert [f.step.name for f in result.failures.values()] == ["plain"]
    assert plan.store.read(record_key(step_of(plan, "plain"))) is None
    assert {s.name for s in plan.steps if s.key in result.records} == {s.name for s in plan.steps} - {"plain"}
    with pytest.raises(StepFailedError, match="broken on purpose"):
        result.raise_failures()


def test_one_cause_of_many_failures_is_told_once(catalogue: Path, tmp_path: Path) -> None:
    def broken(unit: Unit) -> None:
        if isinstance(unit, FuseUnit):
            raise ZeroDivisionError("broken on purpose")

    result = walk(tensor_plan(catalogue, tmp_path), InlinePools(before=broken))
    with pytest.raises(StepFailedError) as failure:
        result.raise_failures()
    assert str(failure.value).count("broken on purpose") == 1
    assert all(f"fuse/{name}/" in str(failure.value) for name in ("plain", "merged", "loras"))


def test_model_with_nan_fails_alone_in_the_joint_pass(catalogue: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(catalogue / "rslora", tmp_path / "bad"))
    tensors = load_file(bad / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors")
    document = manifest_document(catalogue, tmp_path)
    models = [m | ({"source": str(bad)} if m["name"] == "rslora" else {}) for m in document["models"]]
    plan = tensor_plan(catalogue, tmp_path, models=models)
    result = walk(plan, InlinePools())
    done = {s.name.split("-")[0] for s in plan.steps if s.key in result.records}
    assert done == {"lora", "full", "lora.safemerge", "full.safemerge"}
    failed = {f.step.name.split("-")[0] for f in result.failures.values()}
    assert failed == {"rslora", "rslora.safemerge", "plain", "merged", "loras"}
    assert [f.step.name for f in result.failures.values() if f.cause is None] == ["rslora"]
    with pytest.raises(CheckpointError, match=r"models: rslora: 1 tensors hold NaN or Inf.*4 steps that depend"):
        result.raise_failures()


def test_interrupted_step_asks_for_its_missing_units_alone(
    catalogue: Path, tmp_path: Path, undisturbed: tuple[Path, Plan, RunResult]
) -> None:
    shutil.copytree(undisturbed[0], tmp_path / "first")
    plan = tensor_plan(catalogue, tmp_path / "first")
    fused = step_of(plan, "plain")
    record = undisturbed[2].records[fused.key]
    store = tmp_path / "first" / "artifacts"
    (store / record_key(fused)).unlink()
    (store / unit_key(fused, record.attempt, 1)).unlink()
    pools = InlinePools()
    result = walk(tensor_plan(catalogue, tmp_path / "first"), pools)
    assert result.computed == [fused.key]
    (again,) = pools.done
    assert isinstance(again, FuseUnit) and again.shard.file in record.files
    assert result.records[fused.key].attempt == record.attempt
    assert result.records[fused.key].files == record.files


def test_engines_start_early_where_new_weights_will_be_scored_and_not_where_all_is_there(
    catalogue: Path, tmp_path: Path, undisturbed: tuple[Path, Plan, RunResult]
) -> None:
    def stop(unit: Unit) -> None:
        raise CheckpointError("no unit is done here")

    whole = make_plan(load_manifest(write_manifest(tmp_path / "m.json", manifest_document(catalogue, tmp_path))))
    pools = InlinePools(before=stop)
    walk(whole, pools)
    assert sorted(pools.started) == ["judge", "replica"]

    shutil.copytree(undisturbed[0], tmp_path / "there")
    there = tensor_plan(catalogue, tmp_path / "there")
    pools = InlinePools(before=stop)
    prompts = [s for c in there.candidates for n, s in c.scores.items() if there.suites[n].kind != "task"]
    walk(dataclasses.replace(there, steps=(*there.steps, *prompts)), pools)
    assert pools.started == ["judge"]


def test_what_a_unit_tells_is_told_with_its_step(catalogue: Path, tmp_path: Path) -> None:
    plan = tensor_plan(catalogue, tmp_path)
    fused, pools = step_of(plan, "plain"), InlinePools()
    told: list[tuple[str, float]] = []
    pools._before = lambda unit: (  # pyright: ignore[reportPrivateUsage]
        pools.tell(fused.key, {"step": 3.0})
        if isinstance(unit, FuseUnit) and "/plain/" in unit.output.prefix and not told
        else None
    )
    with RunProgress(plan.steps, set(plan.done), Console(file=io.StringIO())) as progress:
        Coordinator(plan, progress, pools, lambda step, measured: told.append((step.key, measured["step"]))).run()
    assert (fused.key, 3.0) in told
