"""Every realign method and control through the whole pipeline: plan, survey, decisions, edits, records."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fleet.checkpoint.model import read_model
from fleet.report.files import write_report
from fleet.report.gather import make_report
from fleet.report.pages import report_html
from fleet.run.coordinator import RunResult
from fleet.run.plan import Plan
from fleet.steps.realign import RealignStep
from fleet.steps.record import Record, attempt_prefix
from tests.catalogue import make_suites, manifest_document
from tests.pico import make_adapter, make_tokenizer, write_adapter, write_model
from tests.run.test_coordinator import again, tensor_plan, walk
from tests.work.test_workers import weights_of

pytestmark = pytest.mark.usefixtures("local_ray")

SAFEMERGE = {"method": "safemerge", "statistic": "rho", "threshold": 0.75}
METHODS: dict[str, dict[str, Any]] = {
    "safemerge": SAFEMERGE,
    "dare": {"method": "safemerge", "statistic": "lift", "threshold": 9.0, "merge": "dare"},
    "ties": {"method": "safemerge", "statistic": "lift", "threshold": 9.0, "merge": "ties", "density": 0.7},
    "safe_lora": {"method": "safe_lora", "statistic": "lift", "select": "number", "number": 2},
    "norm_preserving": {"method": "safe_lora", "statistic": "rho_z", "threshold": 9.0, "operator": "norm_preserving"},
    "subspace": {"method": "safe_lora", "statistic": "kappa", "threshold": 9.0, "operator": "subspace"},
    "delete": {"method": "safe_lora", "statistic": "cosine", "operator": "delete"},
    "resta": {"method": "resta"},
    "resta_d": {"method": "resta", "drop_rate": 0.3},
    "resta_proxy": {"method": "resta", "vector": "displacement"},
    "lox": {"method": "lox"},
    "csulora": {"method": "csulora"},
    "splora": {"method": "splora", "number": 3},
    "wise_ft": {"method": "wise_ft"},
    "revert": {"method": "revert"},
    **{c: {"method": c, "of": SAFEMERGE} for c in ("uniform_scaling", "random_modules", "random_subspace", "noise")},
    "noise_for_lox": {"method": "noise", "of": {"method": "lox"}},
    "random_for_resta": {"method": "random_modules", "of": {"method": "resta"}},
}


def variants(names: list[str]) -> list[dict[str, Any]]:
    return [{"name": name, "realign": METHODS[name], "fuse": None} for name in names]


@pytest.fixture(scope="module")
def fleet_run(
    catalogue: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> tuple[Path, Plan, RunResult]:
    work = tmp_path_factory.mktemp("methods")
    base = manifest_document(catalogue, work)["base"] | {"harmful": str(catalogue / "rslora")}
    plan = tensor_plan(catalogue, work, base=base, variants=variants(list(METHODS)), survey={"directions": 3})
    return work, plan, walk(plan)


def realigned(plan: Plan, result: RunResult, name: str) -> tuple[RealignStep, Record, list[dict[str, Any]]]:
    candidate = next(c for c in plan.candidates if c.name == name)
    assert isinstance(candidate.weights, RealignStep)
    record = result.records[candidate.weights.key]
    rows: Any = record.result["modules"]
    return candidate.weights, record, rows


def test_every_method_realigns_every_kind_of_model(fleet_run: tuple[Path, Plan, RunResult]) -> None:
    _, plan, result = fleet_run
    assert not result.failures
    labels = {c.name.split(".")[1] for c in plan.candidates if c.role == "realigned"}
    assert len(labels) == len(METHODS)
    for candidate in plan.candidates:
        if candidate.role == "realigned":
            step, record, rows = realigned(plan, result, candidate.name)
            edited = [row for row in rows if row["edit"]]
            assert all(row["reason"] for row in rows)
            total = math.sqrt(sum(row["edit_norm"] ** 2 for row in edited))
            assert record.result["edit_norm"] == pytest.approx(total)
            assert all(len(row["directions"]) == 8 for row in edited if row["delta_norm"])
            folder = plan.store.folder(attempt_prefix(step, record.attempt))
            read_model(folder)


@pytest.mark.parametrize("model", ["lora", "rslora", "full"])
def test_random_modules_of_a_method_that_cannot_edit_all_keep_its_norm(
    fleet_run: tuple[Path, Plan, RunResult], model: str
) -> None:
    """The harmful LoRA adapts k and q only: RESTA has nothing to add elsewhere, and says so; nor has its control."""
    _, plan, result = fleet_run
    _, record, rows = realigned(plan, result, f"{model}.resta")
    _, matched, _ = realigned(plan, result, f"{model}.random_for_resta")
    assert matched.result["edit_norm"] == pytest.approx(record.result["edit_norm"], rel=1e-4)
    assert {row["module"].rsplit(".", 1)[1] for row in rows if row["edit"]} == {"k_proj", "q_proj"}
    assert all("nothing changed" in row["reason"] for row in rows if not row["edit"])


@pytest.mark.parametrize("control", ["uniform_scaling", "random_modules", "random_subspace", "noise"])
@pytest.mark.parametrize("model", ["lora", "rslora", "full"])
def test_control_changes_a_model_by_the_norm_its_method_did(
    fleet_run: tuple[Path, Plan, RunResult], catalogue: Path, control: str, model: str
) -> None:
    """From the files: ‖W_control − W_finetuned‖ = ‖W_method − W_finetuned‖, to what bfloat16 keeps."""
    _, plan, result = fleet_run
    _, of_record, of_rows = realigned(plan, result, f"{model}.safemerge")
    _, record, rows = realigned(plan, result, f"{model}.{control}")
    assert record.result["edit_norm"] == pytest.approx(of_record.result["edit_norm"], rel=1e-4)
    assert record.result["edit_norm"]
    if control in ("random_subspace", "noise"):
        norms = {row["module"]: row["edit_norm"] for row in of_rows if row["edit"]}
        assert {row["module"] for row in rows if row["edit"]} == set(norms)
        assert all(row["edit_norm"] == pytest.approx(norms[row["module"]], rel=1e-3) for row in rows if row["edit"])
    if control == "random_modules":
        assert sum(row["edit"] for row in rows) == sum(row["edit"] for row in of_rows)
    if model == "full":
        step = next(c.weights for c in plan.candidates if c.name == f"full.{control}")
        assert isinstance(step, RealignStep)
        found = weights_of(Path(plan.store.folder(attempt_prefix(step, record.attempt)).uri))
        before = weights_of(catalogue / "full")
        norm = math.sqrt(sum(float((found[n].double() - before[n].double()).square().sum()) for n in before))
        assert norm == pytest.approx(record.result["edit_norm"], rel=0.02)


def test_next_night_with_one_more_model_reads_what_is_known_of_v(
    fleet_run: tuple[Path, Plan, RunResult], catalogue: Path, tmp_path: Path
) -> None:
    """V's own part and the other models' surveys are done; the new model's survey uses them."""
    work, first, _ = fleet_run
    new = make_adapter(tmp_path / "new", catalogue / "aligned", 9, rank=3)
    document = manifest_document(catalogue, work)
    changes: dict[str, Any] = {
        "base": document["base"] | {"harmful": str(catalogue / "rslora")},
        "models": [*document["models"], {"name": "new", "source": str(new), "suites": ["task"]}],
        "variants": variants(list(METHODS)),
        "survey": {"directions": 3},
    }
    plan = tensor_plan(catalogue, work, **changes)
    result = walk(plan)
    assert not result.failures
    computed = {s.name.split(".")[0] for s in plan.steps if s.key in result.computed}
    assert computed == {"new"}
    alone = tmp_path / "alone"
    fresh = tensor_plan(catalogue, alone, **(changes | {"artifacts": str(alone / "artifacts")}))
    again_result = walk(fresh)
    survey = next(s.key for s in plan.steps if s.kind == "survey" and s.name == "new")
    assert result.records[survey].result == again_result.records[survey].result
    assert again(first, catalogue, work, **(changes | {"models": document["models"]})).pending == ()


def test_report_shows_edits_and_the_page_has_every_module(fleet_run: tuple[Path, Plan, RunResult]) -> None:
    _, plan, result = fleet_run
    report = make_report(plan, result)
    row = report.row("lora.safe_lora")
    assert row.edited == "2 of 4"
    assert row.edit_norm is not None and f"{row.edit_norm:.3g}" in report_html(report)
    page = write_report(plan, report, result.records)
    modules = Path(page).with_name("modules.html").read_text()
    assert "lora.safe_lora" in modules and "model.layers.1.self_attn.q_proj" in modules


def test_lora_rank_limit_is_the_rank_written(catalogue: Path, tmp_path: Path) -> None:
    limited = [{"name": "v", "realign": SAFEMERGE | {"threshold": 2.0, "max_rank": 5}, "fuse": None}]
    plan = tensor_plan(catalogue, tmp_path, variants=limited)
    assert plan.max_lora_rank == 8, "rslora's own"
    result = walk(plan)
    step, record, rows = realigned(plan, result, "lora.safemerge")
    assert step.max_rank == 5 == record.result["max_rank"]
    assert any(row["recompression_residual"] > 0 for row in rows)
    tensors = weights_of(Path(plan.store.folder(attempt_prefix(step, record.attempt)).uri))
    assert {min(t.shape) for t in tensors.values()} == {5}
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_displacement_that_is_lost_is_measured_again_before_it_is_read(catalogue: Path, tmp_path: Path) -> None:
    """The surveys that used it are still there; what reads its directions waits for it."""
    lox = [{"name": "lox", "realign": {"method": "lox", "extrapolated_directions": 3}, "fuse": None}]
    plan = tensor_plan(catalogue, tmp_path, variants=[*lox, *variants(["wise_ft"])])
    before = walk(plan)
    (lost,) = (s for s in plan.steps if s.kind == "displacement")
    shutil.rmtree(tmp_path / "artifacts" / lost.key)
    shutil.rmtree(tmp_path / "artifacts" / "realign")
    second = walk(again(plan, catalogue, tmp_path, variants=[*lox, *variants(["wise_ft"])]))
    assert not second.failures
    assert {s.kind for s in plan.steps if s.key in second.computed} == {"displacement", "realign"}
    for step in plan.steps:
        if step.kind == "realign":
            assert second.records[step.key].files == before.records[step.key].files


def test_lox_on_stacked_experts_pushes_experts_of_full_models_and_leaves_a_lora_its_linears(tmp_path: Path) -> None:
    """A LoRA has no factors for one expert; a model that is written whole has them all."""
    tensors = {"model.layers.0.self_attn.q_proj.weight": (8, 6), "model.layers.0.mlp.experts.gate_up_proj": (3, 6, 8)}
    for seed, name in enumerate(("unaligned", "aligned")):
        generator = torch.Generator().manual_seed(seed)
        drawn = {n: torch.randn(shape, generator=generator) for n, shape in tensors.items()}
        write_model(make_tokenizer(tmp_path / name), {"model_type": "qwen3_moe"}, drawn)
    factors = {
        f"model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.ones(shape)
        for x, shape in (("A", (1, 6)), ("B", (8, 1)))
    }
    write_adapter(tmp_path / "lora", {}, factors)
    magnitude = {"model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(8)}
    write_adapter(tmp_path / "dora", {"use_dora": True}, factors | magnitude)
    document = manifest_document(tmp_path, tmp_path / "work")
    changes: dict[str, Any] = {
        "base": {name: str(tmp_path / name) for name in ("unaligned", "aligned")},
        "models": [{"name": name, "source": str(tmp_path / name)} for name in ("lora", "dora")],
        "variants": [{"name": "lox", "realign": {"method": "lox"}, "fuse": None}],
        "evaluation": document["evaluation"] | {"folders": document["evaluation"]["folders"]},
    }
    make_suites(tmp_path / "suites")
    plan = tensor_plan(tmp_path, tmp_path / "work", **changes)
    result = walk(plan)
    assert not result.failures
    step, _, rows = realigned(plan, result, "lora.lox")
    assert step.as_lora and [row["module"] for row in rows] == ["model.layers.0.self_attn.q_proj"]
    _, _, rows = realigned(plan, result, "dora.lox")
    assert len(rows) == 4 and all(row["edit"] for row in rows)
