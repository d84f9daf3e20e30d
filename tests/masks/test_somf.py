"""SOMF through the whole pipeline on a real Ray: masks are learned once, applied by the equation, and survive kills."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from rich.console import Console
from safetensors.torch import load_file

import fleet.run.pools
import fleet.work.training
from fleet.algebra.delta import Delta, Dense
from fleet.algebra.sparsify import WHOLE
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import read_model, require_full_model
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.core.errors import CheckpointError
from fleet.fusion import Ties
from fleet.fusion.place import Place
from fleet.masks.files import MASK_FILE, MASK_JSON
from fleet.masks.tasks import LogProbsTask, MaskTask
from fleet.run.coordinator import Coordinator, RunResult
from fleet.run.plan import Plan
from fleet.run.pools import RayPools
from fleet.run.progress import RunProgress
from fleet.steps.fuse import FuseStep
from fleet.steps.mask import MaskStep
from fleet.steps.realign import RealignStep
from fleet.steps.record import Record, attempt_prefix
from fleet.store import open_folder
from fleet.work.training import MaskTrainer
from fleet.work.training import _work as work_undisturbed  # pyright: ignore[reportPrivateUsage]
from fleet.work.unit import UnitRecord
from tests.catalogue import manifest_document, preference_rows, write_rows
from tests.pico import make_adapter
from tests.run.test_coordinator import tensor_plan, walk
from tests.tracking import make_tracker, mlflow_client

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]  # Ray Train starts afresh for each mask

STEPS = 6
TRAINING: dict[str, Any] = {
    "steps": STEPS, "batch_size": 4, "learning_rate": 0.3, "warmup_steps": 0, "held_out": 0.25, "evaluate_every": 3,
    "max_tokens": 32, "dtype": "float32",
}  # fmt: skip
TIES = {"method": "ties", "density": 0.5}
PLACEMENT = {"workers": 1, "trainings": 2, "checkpoint_every": 2}


def somf(preferences: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "somf", "preferences": str(preferences), "training": TRAINING, "hardening": "expected", **changes
    }  # fmt: skip


def variants(preferences: Path) -> list[dict[str, Any]]:
    """Three masks, applied in six ways."""
    alone: dict[str, dict[str, Any]] = {
        "expected": {},
        "threshold": {"hardening": "threshold"},
        "random": {"arrangement": "random"},
        "magnitude": {"arrangement": "magnitude"},
        "transfer": {"learned_on": "lora"},
    }
    fused = {"name": "ties", "realign": somf(preferences, learn_on="fusion"), "fuse": TIES}
    return [*({"name": n, "realign": somf(preferences, **c), "fuse": None} for n, c in alone.items()), fused]


def mask_plan(catalogue: Path, work: Path, **changes: Any) -> Plan:
    """A plan over an adapter and a full fine-tune."""
    work.mkdir(parents=True, exist_ok=True)
    document = manifest_document(catalogue, work)
    rows = work.parent / "preferences.jsonl" if (work.parent / "preferences.jsonl").exists() else work / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, preference_rows(24))
    settings: dict[str, Any] = {
        "models": [m for m in document["models"] if m["name"] in ("lora", "full")],
        "variants": variants(rows),
        "placement": PLACEMENT,
    }
    return tensor_plan(catalogue, work, **(settings | changes))


def one_mask(catalogue: Path, work: Path, **changes: Any) -> Plan:
    """A plan that learns the full fine-tune's mask alone, the same step as in the large plan."""
    plan = mask_plan(catalogue, work)
    realign = plan.manifest.variants[0].model_dump(mode="json") | {"models": ["full"]}
    return mask_plan(catalogue, work, **({"variants": [realign]} | changes))


@dataclass(frozen=True)
class Run:
    catalogue: Path
    work: Path
    plan: Plan
    result: RunResult
    told: list[tuple[str, dict[str, float]]]

    def realigned(self, name: str) -> tuple[RealignStep, Record, Path]:
        candidate = next(c for c in self.plan.candidates if c.name == name)
        assert isinstance(candidate.weights, RealignStep)
        return candidate.weights, *self.left(candidate.weights)

    def left(self, step: Any) -> tuple[Record, Path]:
        record = self.result.records[step.key]
        return record, self.work / "artifacts" / attempt_prefix(step, record.attempt)

    def mask(self, name: str) -> tuple[MaskStep, Record, Path]:
        (step,) = (s for s in self.plan.steps if isinstance(s, MaskStep) and s.name == name)
        return step, *self.left(step)

    @property
    def aligned(self) -> FullModel:
        return require_full_model(read_model(open_folder(str(self.catalogue / "aligned"))), "aligned")

    def deltas(self, folder: Path) -> dict[str, torch.Tensor]:
        """The task vector of whatever is in a folder, tensor by tensor, dense."""
        model, aligned = read_model(open_folder(str(folder))), self.aligned
        found = {name: read_delta(model, name, read_weight(aligned, name)) for name in aligned.tensors}
        return {name: delta.dense() for name, delta in found.items() if delta is not None}


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Run:
    """Everything once, with MLflow listening."""
    work = tmp_path_factory.mktemp("somf") / "first"
    plan = mask_plan(catalogue, work)
    told: list[tuple[str, dict[str, float]]] = []
    tracker = make_tracker(plan)
    tracker.start()

    def hear(step: MaskStep, measured: dict[str, float]) -> None:
        told.append((step.name, measured))
        tracker.training(step, measured)

    with RunProgress(plan.steps, set(plan.done), Console(file=io.StringIO())) as progress:
        return Run(catalogue, work, plan, Coordinator(plan, progress, RayPools(plan), hear).run(), told)


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Path:
    """A folder whose store has what comes before a mask: another night on the same catalogue."""
    shutil.copytree(run.work / "artifacts", tmp_path / "work" / "artifacts")
    shutil.copy(run.work / "rows.jsonl", tmp_path / "work" / "rows.jsonl")
    for kind in ("mask", "realign", "fuse"):
        shutil.rmtree(tmp_path / "work" / "artifacts" / kind)
    return tmp_path / "work"


# -- the pipeline ------------------------------------------------------------------------------------------------------


def test_every_step_is_done_and_a_mask_is_learned_once_however_it_is_applied(run: Run) -> None:
    assert not run.result.failures
    assert {s.key for s in run.plan.steps} == set(run.result.records)
    masks = [s.name for s in run.plan.steps if s.kind == "mask"]
    assert sorted(masks) == ["full", "lora", "ties-of-2"]
    assert sum(s.kind == "logprobs" for s in run.plan.steps) == 1
    assert sum(s.kind == "realign" for s in run.plan.steps) == 12


def test_run_again_computes_nothing(run: Run) -> None:
    plan = mask_plan(run.catalogue, run.work)
    second = dataclasses.replace(plan, steps=run.plan.steps)
    assert second.pending == ()
    assert walk(second).computed == []


@pytest.mark.parametrize("model", ["lora", "full"])
@pytest.mark.parametrize("variant", ["expected", "threshold", "transfer"])
def test_realigned_weights_are_the_equation_on_the_stored_logits(run: Run, model: str, variant: str) -> None:
    """θ = W + m ⊙ δ / mean(m) of each tensor; tensors that a mask of another model has no logits for keep their δ."""
    _, _, folder = run.realigned(f"{model}.{variant}")
    found, before = run.deltas(folder), run.deltas(run.catalogue / model)
    logits = load_file(run.mask("lora" if variant == "transfer" else model)[2] / MASK_FILE)
    masked = {name: before[name] for name in before}
    for name, value in logits.items():
        tensor = name.split("/")[1]
        kept = (value >= 0).float() if variant == "threshold" else torch.sigmoid(value)
        masked[tensor] = before[tensor] * kept / kept.mean()
    assert {n for n, d in found.items() if d.any()} == {n for n, d in masked.items() if d.any()}
    for tensor, expected in masked.items():
        assert _relative(found[tensor], expected) < 0.02, tensor
    assert any(_relative(found[t], before[t]) > 0.05 for t in masked)


def test_fused_weights_are_the_fusion_of_task_vectors_under_one_mask(run: Run) -> None:
    """F({m ⊙ δ_t / mean(m)}) by hand, member by member and then of what the members were written as.

    In one go, bfloat16 between the two would move entries over TIES' threshold.
    """
    (step,) = (s for s in run.plan.steps if isinstance(s, FuseStep) and s.name == "ties")
    found = run.deltas(run.left(step)[1])
    logits = load_file(run.mask("ties-of-2")[2] / MASK_FILE)
    written: dict[str, dict[str, torch.Tensor]] = {}
    for name, member in step.members.items():
        assert isinstance(member, RealignStep)
        written[name], before = run.deltas(run.left(member)[1]), run.deltas(run.catalogue / name)
        for tensor, delta in before.items():
            kept = torch.sigmoid(logits.get(f"*/{tensor}/entries", torch.zeros(1)))
            assert _relative(written[name][tensor], delta * kept / kept.mean()) < 0.02, tensor
    fusion = Ties(method="ties", density=0.5)
    for tensor, value in found.items():
        masked: dict[str, Delta] = {name: Dense(w[tensor]) for name, w in written.items() if tensor in w}
        place = Place(tensor, 0.0)
        expected = fusion.fuse(masked, fusion.coefficients(["lora", "full"], place), place, WHOLE).dense()
        assert _relative(value, expected) < 0.01, tensor


@pytest.mark.parametrize("arrangement", ["random", "magnitude"])
def test_control_arrangement_keeps_the_masks_values_and_moves_them(run: Run, arrangement: str) -> None:
    """What each entry was multiplied with, from the weights: the same values, elsewhere."""
    before = run.deltas(run.catalogue / "full")
    found, learned = (run.deltas(run.realigned(f"full.{v}")[2]) for v in (arrangement, "expected"))
    tensor = "model.layers.0.mlp.up_proj.weight"
    size = before[tensor].abs()
    large = size > size.median()  # bfloat16 leaves their ratios two digits or more
    factors = found[tensor][large] / before[tensor][large]
    expected = learned[tensor][large] / before[tensor][large]
    assert not torch.allclose(factors, expected, rtol=0.05)
    if arrangement == "random":
        assert float(factors.mean()) == pytest.approx(float(expected.mean()), rel=0.05)
        assert float(factors.std()) == pytest.approx(float(expected.std()), rel=0.1)
    else:
        assert float(torch.corrcoef(torch.stack((factors, size[large])))[0, 1]) > 0.5
        assert float(factors.mean()) > float(expected.mean())


def test_mask_reused_in_another_store_gives_the_same_bytes_without_a_training(run: Run, tmp_path: Path) -> None:
    _, _, folder = run.mask("full")
    shutil.copytree(folder, tmp_path / "kept")
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {MASK_FILE, MASK_JSON}
    method = {"method": "somf", "reuse": str(tmp_path / "kept"), "hardening": "expected"}
    changes = {"variants": [{"name": "again", "realign": method, "fuse": None, "models": ["full"]}]}
    plan = mask_plan(run.catalogue, tmp_path / "other", **changes)
    assert not {s.kind for s in plan.steps} & {"mask", "logprobs"}
    result = walk(plan)
    assert not result.failures
    (step,) = (s for s in plan.steps if s.kind == "realign")
    assert result.records[step.key].files == run.realigned("full.expected")[1].files


# -- what is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["lora", "full", "ties-of-2"])
def test_every_update_is_told_while_it_is_learned(run: Run, model: str) -> None:
    mine = [measured for name, measured in run.told if name == model]
    updates = [m for m in mine if "loss" in m]
    assert [m["step"] for m in updates] == [*range(1, STEPS + 1)]
    assert all({"loss", "accuracy", "margin", "density", "learning_rate"} <= set(m) for m in updates)
    assert [m["step"] for m in mine if "held_out.loss" in m] == [3, 6]
    evaluations: Any = run.mask(model)[1].result["evaluations"]
    assert [m["held_out.loss"] for m in mine if "held_out.loss" in m] == [e["loss"] for e in evaluations]


def test_mlflow_has_a_curve_per_metric_of_every_training(run: Run) -> None:
    client = mlflow_client(run.plan.manifest.tracking.uri)
    experiment = client.get_experiment_by_name("pico")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], filter_string="tags.`fleet.role` = 'mask'")
    assert sorted(r.info.run_name or "" for r in runs) == ["mask full", "mask lora", "mask ties-of-2"]
    for found in runs:
        name = (found.info.run_name or "").removeprefix("mask ")
        mine = [m for told, m in run.told if told == name]
        for metric in ("loss", "density", "held_out.loss"):
            history = client.get_metric_history(found.info.run_id, metric)
            expected = [(int(m["step"]), m[metric]) for m in mine if metric in m]
            assert sorted((p.step, p.value) for p in history) == expected
        assert found.data.params["mask"] == "dense"
        assert found.data.tags["mlflow.parentRunId"]


# -- workers and kills -------------------------------------------------------------------------------------------------


class DisturbedTrainer(MaskTrainer):
    """Its workers do what files beside the store say: `die` once at that update, or be `slow` after the second."""

    def fit(self, task: LogProbsTask | MaskTask) -> UnitRecord:
        if isinstance(task, MaskTask):
            fleet.work.training._work = _disturbed_work  # pyright: ignore[reportPrivateUsage]
        return super().fit(task)


class _Events:
    def __init__(self, events: Any, beside: Path) -> None:
        self._events = events
        self._beside = beside

    def put(self, item: tuple[str, dict[str, float]]) -> None:
        step, die, died = item[1]["step"], self._beside / "die", self._beside / "died"
        if die.exists() and step == float(die.read_text()) and not died.exists():
            died.touch()
            os._exit(1)
        if (self._beside / "slow").exists() and step > 2:
            time.sleep(20.0)
        self._events.put(item)


def _disturbed_work(config: dict[str, Any]) -> dict[str, Any]:
    beside = Path(config["task"].output.store).parent
    return work_undisturbed(config | {"events": _Events(config["events"], beside)})


def test_two_training_workers_learn_the_mask_of_one(run: Run, copied: Path) -> None:
    plan = one_mask(run.catalogue, copied, placement=PLACEMENT | {"training_workers": 2})
    result = walk(plan)
    assert not result.failures
    two = dataclasses.replace(run, work=copied, plan=plan, result=result)
    found = two.deltas(two.realigned("full.somf")[2])
    before = run.deltas(run.catalogue / "full")
    for tensor, expected in run.deltas(run.realigned("full.expected")[2]).items():
        # Adam moves an entry whose gradient is mere rounding either way, as far as any other.
        apart = float((found[tensor] - expected).norm())
        assert apart < 0.1 * float((before[tensor] - expected).norm()) + 1e-6, tensor
    best: Any = result.records[next(s.key for s in plan.steps if s.kind == "mask")].result["best"]
    expected_best: Any = run.mask("full")[1].result["best"]
    assert best["step"] == expected_best["step"] and best["loss"] == pytest.approx(expected_best["loss"], rel=0.02)


def test_training_worker_that_dies_is_started_again_and_learns_the_same_bytes(
    run: Run, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.run.pools, "MaskTrainer", DisturbedTrainer)
    (copied / "die").write_text("4")
    plan = one_mask(run.catalogue, copied)
    result = walk(plan)
    assert (copied / "died").exists() and not result.failures
    (step,) = (s for s in plan.steps if s.kind == "mask")
    assert result.records[step.key].files == run.mask("full")[1].files


@pytest.mark.timeout(600)
def test_driver_that_is_killed_and_started_again_learns_the_same_bytes(run: Run, copied: Path) -> None:
    """The second command continues the training from the first one's checkpoint."""
    (copied / "slow").touch()
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    program = (
        "import sys; from pathlib import Path; from tests.masks.test_somf import drive; drive(*map(Path, sys.argv[1:]))"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(run.catalogue), str(copied)], env=environment, stderr=subprocess.PIPE
    )
    state = copied / "artifacts" / run.mask("full")[0].key / "state" / "state.json"
    deadline = time.monotonic() + 300.0
    while not state.exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    reached = driver.poll() is None and state.exists()
    workers = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    # A worker lives on for a moment, and without `slow` it would learn the rest in that moment.
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(workers, timeout=30)
    assert reached, "the driver ended before its training's first checkpoint"
    assert json.loads(state.read_text())["step"] == 2
    (copied / "slow").unlink()
    told: list[float] = []
    plan = one_mask(run.catalogue, copied)
    with RunProgress(plan.steps, set(plan.done), Console(file=io.StringIO())) as progress:
        result = Coordinator(plan, progress, RayPools(plan), lambda _, measured: told.append(measured["step"])).run()
    assert not result.failures
    (step,) = (s for s in plan.steps if s.kind == "mask")
    assert min(told) == 3.0
    assert result.records[step.key].files == run.mask("full")[1].files


def drive(catalogue: Path, work: Path) -> None:
    """What the process that is killed does."""
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    fleet.run.pools.MaskTrainer = DisturbedTrainer
    walk(one_mask(catalogue, work))


def test_what_a_training_worker_raises_on_purpose_arrives_as_it_is(run: Run, copied: Path) -> None:
    """An adapter of the safety adapter's shape that never started from it."""
    stranger = make_adapter(copied / "stranger", run.catalogue / "aligned", 9, rank=8)
    method = somf(copied / "rows.jsonl", mask="factor")
    changes: dict[str, Any] = {
        "models": [{"name": "stranger", "source": str(stranger)}],
        "variants": [{"name": "factor", "realign": method, "fuse": None}],
    }
    plan = mask_plan(run.catalogue, copied, **changes)
    result = walk(plan)
    roots = {f.step.kind: f.error for f in result.failures.values() if f.cause is None}
    assert set(roots) == {"mask"}
    assert isinstance(roots["mask"], CheckpointError)
    with pytest.raises(CheckpointError, match=r"stranger did not start from base\.safety.*1 steps that depend"):
        result.raise_failures()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
