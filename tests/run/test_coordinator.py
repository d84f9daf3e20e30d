"""The coordinator on a real Ray: what dies is done again, what fails takes only its dependents along."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load

import fleet.run.pools
import fleet.steps.trim
from fleet.algebra.sparsify import at_least, elected
from fleet.checkpoint.model import read_model, touched_tensors
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.core.errors import StepFailedError
from fleet.manifest import load_manifest
from fleet.run.coordinator import Coordinator, RunResult
from fleet.run.plan import Plan, make_plan
from fleet.run.pools import RayPools
from fleet.run.progress import RunProgress
from fleet.steps.record import attempt_prefix, record_key, unit_key
from fleet.store import open_folder
from fleet.work.fusing import FuseUnit
from fleet.work.tensor_worker import TensorWorker
from fleet.work.unit import Found, Unit
from tests.catalogue import manifest_document, write_manifest

pytestmark = pytest.mark.usefixtures("local_ray")


def tensor_plan(root: Path, work: Path, **changes: Any) -> Plan:
    """A plan without its scoring steps, which need an engine; everything else is whole."""
    document = manifest_document(root, work, **changes)
    plan = make_plan(load_manifest(write_manifest(work / "models.json", document)))
    return dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.kind != "score"))


def walk(plan: Plan) -> RunResult:
    with RunProgress(plan.steps, set(plan.done), Console(file=io.StringIO())) as progress:
        return Coordinator(plan, progress, RayPools(plan)).run()


def again(plan: Plan, root: Path, work: Path, **changes: Any) -> Plan:
    """The plan as the next night would make it."""
    return dataclasses.replace(tensor_plan(root, work, **changes), steps=plan.steps)


def contents(plan: Plan, result: RunResult) -> dict[str, bytes]:
    """Name of step and file -> bytes, of everything a run left, wherever it was put."""
    found: dict[str, bytes] = {}
    for step in plan.steps:
        record = result.records[step.key]
        for name in record.files:
            data = plan.store.read(f"{attempt_prefix(step, record.attempt)}/{name}")
            assert data is not None
            found[f"{step.key}/{name}"] = data
    return found


class DyingWorker(TensorWorker):
    """Dies in its first fuse of `merged`, after the file is begun; leaves a mark so that it happens once."""

    def run(self, unit: Unit) -> Found:
        mark = Path(os.environ.get("FLEET_TEST_MARK", "/nonexistent"), "died")
        merges = isinstance(unit, FuseUnit) and "/merged/" in unit.output.prefix
        if merges and mark.parent.exists() and not mark.exists():
            mark.touch()
            os._exit(1)
        return super().run(unit)


class BrokenWorker(TensorWorker):
    """Cannot fuse `plain`."""

    def run(self, unit: Unit) -> Found:
        if isinstance(unit, FuseUnit) and "/plain/" in unit.output.prefix:
            raise ZeroDivisionError("broken on purpose")
        return super().run(unit)


@pytest.fixture(scope="module")
def undisturbed(
    catalogue: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> tuple[Path, Plan, RunResult]:
    """A run in which nothing goes wrong, by one worker: its folder (read-only for tests), plan and result."""
    work = tmp_path_factory.mktemp("undisturbed")
    plan = tensor_plan(catalogue, work, placement={"workers": 1})
    return work, plan, walk(plan)


@pytest.fixture(scope="module")
def expected(undisturbed: tuple[Path, Plan, RunResult]) -> dict[str, bytes]:
    return contents(*undisturbed[1:])


def test_run_fresh_and_again_computes_everything_once(
    catalogue: Path, undisturbed: tuple[Path, Plan, RunResult]
) -> None:
    work, plan, result = undisturbed
    assert not result.failures
    assert sorted(result.computed) == sorted(s.key for s in plan.steps)
    second = again(plan, catalogue, work)
    assert second.pending == ()
    assert walk(second).computed == []


def test_run_with_three_workers_leaves_the_same_bytes(
    catalogue: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan = tensor_plan(catalogue, tmp_path, placement={"workers": 3, "worker_cpus": 0.5})
    assert contents(plan, walk(plan)) == expected


def test_run_on_s3_leaves_the_same_bytes_as_a_folder(
    catalogue: Path, tmp_path: Path, s3_bucket: str, expected: dict[str, bytes]
) -> None:
    plan = tensor_plan(catalogue, tmp_path, artifacts=f"s3://{s3_bucket}/night")
    assert contents(plan, walk(plan)) == expected


def test_worker_dying_in_a_shard_is_replaced_and_the_bytes_are_the_same(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    monkeypatch.setattr(fleet.run.pools, "TensorWorker", DyingWorker)
    monkeypatch.setattr(fleet.run.pools, "WORKER_ENV", {"FLEET_TEST_MARK": str(tmp_path)})
    plan = tensor_plan(catalogue, tmp_path / "b")
    result = walk(plan)
    assert (tmp_path / "died").exists()
    assert contents(plan, result) == expected


def test_worker_dying_without_retries_fails_the_step(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.run.pools, "TensorWorker", DyingWorker)
    monkeypatch.setattr(fleet.run.pools, "WORKER_ENV", {"FLEET_TEST_MARK": str(tmp_path)})
    plan = tensor_plan(catalogue, tmp_path / "w", placement={"workers": 1, "retries": 0})
    result = walk(plan)
    assert [f.step.name for f in result.failures.values()] == ["merged"]
    with pytest.raises(StepFailedError, match="fuse/merged"):
        result.raise_failures()


def test_step_failing_leaves_no_record_and_the_others_finish(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.run.pools, "TensorWorker", BrokenWorker)
    plan = tensor_plan(catalogue, tmp_path)
    result = walk(plan)
    assert [f.step.name for f in result.failures.values()] == ["plain"]
    (failed,) = (s for s in plan.steps if s.name == "plain")
    assert plan.store.read(record_key(failed)) is None
    assert {s.name for s in plan.steps if s.key in result.records} == {s.name for s in plan.steps} - {"plain"}
    with pytest.raises(StepFailedError, match="broken on purpose"):
        result.raise_failures()


def test_interrupted_step_continues_its_attempt(
    catalogue: Path, tmp_path: Path, undisturbed: tuple[Path, Plan, RunResult]
) -> None:
    """Units that have a record are not done again: a changed one would show."""
    shutil.copytree(undisturbed[0], tmp_path / "first")
    records = undisturbed[2].records
    first = dataclasses.replace(tensor_plan(catalogue, tmp_path / "first"), steps=undisturbed[1].steps)
    (fused,) = (s for s in first.steps if s.name == "plain")
    record = records[fused.key]
    shards = sorted(n for n in record.files if n.startswith("model-"))
    assert len(shards) > 2

    units = list(first.store.list(f"{fused.key}/units-"))
    assert len(units) == len(shards)
    marked = json.loads(first.store.read(unit_key(fused, record.attempt, 0)) or b"")
    marked["result"] = {"kept": True}
    (tmp_path / "first" / "artifacts" / record_key(fused)).unlink()
    (tmp_path / "first" / "artifacts" / unit_key(fused, record.attempt, 1)).unlink()
    first.store.replace(unit_key(fused, record.attempt, 0), json.dumps(marked).encode())

    result = walk(again(first, catalogue, tmp_path / "first"))
    assert result.computed == [fused.key]
    assert result.records[fused.key].attempt == record.attempt
    assert result.records[fused.key].result == {"kept": True}
    assert result.records[fused.key].files == record.files


def test_fusion_trims_whole_models_by_one_threshold_each(
    catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.steps.trim, "UNIT_BYTES", 20_000)  # several units for each model
    ties = {"method": "ties", "trim": "model", "density": 0.1, "scale": 1.0}
    variants = [{"name": "t", "realign": None, "models": ["lora", "full"], "fuse": ties}]
    plan = tensor_plan(catalogue, tmp_path, variants=variants, checkpoint={"shard_bytes": 20_000})
    result = walk(plan)
    assert not result.failures
    records = {s.name: result.records[s.key] for s in plan.steps if s.kind in ("trim", "fuse")}
    aligned = plan.bases.aligned_model
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("lora", "full"):
        model = read_model(open_folder(str(catalogue / name)))
        found = {t: read_delta(model, t, read_weight(aligned, t)) for t in touched_tensors(model)}
        deltas[name] = {t: delta.dense() for t, delta in found.items() if delta is not None}
        magnitudes = torch.cat([delta.abs().flatten() for delta in deltas[name].values()]).sort(descending=True).values
        assert records[name].result["threshold"] == float(magnitudes[round(0.1 * len(magnitudes)) - 1])
    for shard in plan.store.folder(attempt_prefix(step := plan.steps[-1], records["t"].attempt)).files():
        assert step.name == "t"
        if not shard.endswith(".safetensors"):
            continue
        data = plan.store.read(f"{attempt_prefix(step, records['t'].attempt)}/{shard}")
        for tensor, value in load(data or b"").items():
            present = [
                at_least(d[tensor], float(str(records[n].result["threshold"])))
                for n, d in deltas.items()
                if tensor in d
            ]
            expected = read_weight(aligned, tensor) + elected(present, [1.0] * len(present), "sum")
            torch.testing.assert_close(value, expected.bfloat16(), rtol=8e-3, atol=1e-4)


def test_record_of_another_run_wins(undisturbed: tuple[Path, Plan, RunResult]) -> None:
    """Two runs may do one step at once; the record that was first is the step's."""
    _, plan, theirs = undisturbed
    assert walk(dataclasses.replace(plan, done={})).records == theirs.records


def test_node_dying_in_the_middle_changes_nothing(catalogue: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """A cluster of its own, in a process of its own: see `tests/node_death.py`."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.node_death", str(catalogue), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    disturbed = tensor_plan(catalogue, tmp_path / "disturbed")
    assert disturbed.pending == ()
    assert contents(disturbed, RunResult(records=dict(disturbed.done))) == expected
