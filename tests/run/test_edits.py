"""What a record says of edits: measured on what was stored, said where they come to nothing, and known without V."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fleet.manifest import load_manifest
from fleet.run.coordinator import RunResult
from fleet.run.plan import Plan, make_plan
from fleet.steps.realign import RealignResult, RealignStep
from tests.catalogue import manifest_document, write_manifest
from tests.inline import InlinePools
from tests.run.test_coordinator_inline import digests, tensor_plan, walk
from tests.work.test_workers import weights_of

Results = dict[str, tuple[Path, RealignResult]]
"""Candidate -> its files' folder, and what its record says."""

MERGED = {"method": "safemerge", "threshold": 2.0}
"""ρ is at most 1: every module is merged."""
SHRUNK = {"method": "wise_ft", "alpha": 0.8}
"""A fifth of ΔW is about half a step of bfloat16."""
CONTROLS = ("uniform_scaling", "random_modules", "random_subspace", "noise")
WITHOUT_V: dict[str, Any] = {
    "halved": {"method": "wise_ft"},
    "reverted": {"method": "revert"},
    "restored": {"method": "resta"},
    "scaled": {"method": "uniform_scaling", "of": {"method": "wise_ft", "alpha": 0.75}},
    "noisy": {"method": "noise", "of": {"method": "resta"}},
    "drawn": {"method": "random_modules", "of": {"method": "wise_ft"}},
}


def variants(methods: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "realign": method, "fuse": None} for name, method in methods.items()]


def near(root: Path, folder: Path, scale: float) -> Path:
    """Write the aligned model with every weight moved by about `scale` of itself, in bfloat16; return `folder`."""
    shutil.copytree(root / "unaligned", folder)
    generator = torch.Generator().manual_seed(9)
    moved = {
        n: w * (1.0 + scale * torch.randn(w.shape, generator=generator))
        for n, w in weights_of(root / "aligned").items()
    }
    save_file({n: w.bfloat16() for n, w in moved.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def results(plan: Plan, run: RunResult) -> Results:
    found: Results = {}
    assert not run.failures
    for candidate in plan.candidates:
        if isinstance(candidate.weights, RealignStep):
            record = run.records[candidate.weights.key]
            folder = Path(plan.store.folder(record.prefix).uri.removeprefix("file://"))
            found[candidate.name] = folder, record.read(RealignResult)
    return found


# -- as stored -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """A bfloat16 full model a few steps of its dtype away from the aligned one, by a method and its controls."""
    work = tmp_path_factory.mktemp("stored")
    source = near(catalogue, work / "near", 0.01)
    methods = {"merged": MERGED, "shrunk": SHRUNK} | {c: {"method": c, "of": SHRUNK} for c in CONTROLS}
    plan = tensor_plan(catalogue, work, models=[{"name": "near", "source": str(source)}], variants=variants(methods))
    return source, results(plan, walk(plan, InlinePools()))


@pytest.mark.parametrize("label", ["safemerge", "wise_ft", *CONTROLS])
def test_record_of_a_full_model_has_the_edit_norms_of_its_files(stored: tuple[Path, Results], label: str) -> None:
    source, found = stored
    folder, result = found[f"near.{label}"]
    before, after = weights_of(source), weights_of(folder)
    squares = 0.0
    for row in result.modules:
        change = after[f"{row.module}.weight"].double() - before[f"{row.module}.weight"].double()
        assert row.edit_norm == pytest.approx(float(change.norm()), rel=1e-4, abs=1e-6)
        squares += float(change.square().sum())
    assert result.edit_norm == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("label", CONTROLS)
def test_control_has_its_methods_norm_once_stored(stored: tuple[Path, Results], label: str) -> None:
    _, found = stored
    assert found[f"near.{label}"][1].edit_norm == pytest.approx(found["near.wise_ft"][1].edit_norm, rel=5e-3)


def test_edit_that_rounding_distorts_is_said(stored: tuple[Path, Results]) -> None:
    _, found = stored
    result = found["near.wise_ft"][1]
    asked = sum((row.asked_norm or row.edit_norm or 0.0) ** 2 for row in result.modules) ** 0.5
    whole = sum((row.delta_norm or 0.0) ** 2 for row in result.modules) ** 0.5
    assert asked == pytest.approx(0.2 * whole, rel=1e-3)
    assert abs(result.edit_norm - asked) > 0.01 * asked
    assert f"was to have the norm {asked:.3g}"[:-1] in (result.warning or "")


# -- edits that come to nothing ------------------------------------------------------------------------------------


NONE = "none of its 4 modules is edited, so they are as they were fine-tuned"


@pytest.mark.parametrize(
    ("method", "warning"),
    [
        ({"method": "safemerge", "threshold": 0.0}, rf"{NONE} \(model\.layers\.0\S+: rho \S+ ≥ 0\)"),
        ({"method": "wise_ft", "alpha": 1.0}, f"{NONE}.*nothing changed"),
        ({"method": "wise_ft", "alpha": 0.995}, "its edit is nearly nothing: 0.005 of the task vector's norm"),
        ({"method": "noise", "of": {"method": "wise_ft", "alpha": 1.0}}, f"{NONE}.*control: not edited"),
        ({"method": "wise_ft", "alpha": 0.98}, None),
        ({"method": "wise_ft", "max_rank": 1}, "^max_rank 1 cuts away [3-9][0-9]% of the edited"),
        ({"method": "wise_ft", "max_rank": 4}, None),
    ],
)
def test_record_says_where_an_edit_is_none_or_nearly(
    catalogue: Path, tmp_path: Path, method: dict[str, Any], warning: str | None
) -> None:
    models = [{"name": "lora", "source": str(catalogue / "lora")}]
    plan = tensor_plan(catalogue, tmp_path, models=models, variants=variants({"v": method}))
    ((_, result),) = results(plan, walk(plan, InlinePools())).values()
    assert result.warning is None if warning is None else re.search(warning, result.warning or "")


def test_record_says_where_an_edit_is_lost_in_the_dtype(catalogue: Path, tmp_path: Path) -> None:
    source = near(catalogue, tmp_path / "near", 0.01)
    models = [{"name": "near", "source": str(source)}]
    plan = tensor_plan(
        catalogue, tmp_path, models=models, variants=variants({"v": {"method": "wise_ft", "alpha": 0.9999}})
    )
    ((folder, result),) = results(plan, walk(plan, InlinePools())).values()
    assert result.edit_norm == 0.0 and "is lost in the dtype of its files" in (result.warning or "")
    assert all(row.reason.endswith("lost in the file's dtype") for row in result.modules)
    before, after = weights_of(source), weights_of(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("models", "fuse", "told"),
    [
        (["lora"], {"method": "task_arithmetic", "scale": 0.0}, True),
        (["lora"], {"method": "task_arithmetic", "scale": 1e-3}, False),
        (["lora", "full"], {"method": "task_arithmetic", "scale": 1e-12}, True),
        (["lora", "full"], {"method": "task_arithmetic", "scale": 0.1}, False),
        (["lora"], {"method": "task_arithmetic", "scale": 0.1, "output": "model"}, False),
    ],
)
def test_fusion_that_leaves_nothing_says_so(
    catalogue: Path, tmp_path: Path, models: list[str], fuse: dict[str, Any], told: bool
) -> None:
    fused = [{"name": "fused", "realign": None, "fuse": fuse, "models": models}]
    plan = tensor_plan(catalogue, tmp_path, variants=fused)
    run = walk(plan, InlinePools())
    (record,) = (record for record in run.records.values() if record.kind == "fuse")
    warning = record.result.get("warning")
    assert ("it is the aligned model" in str(warning)) == told == (warning is not None)
    assert "changed" not in record.result


# -- without V -------------------------------------------------------------------------------------------------------


def test_run_without_unaligned_makes_the_same_models_and_reads_no_v(catalogue: Path, tmp_path: Path) -> None:
    base = {"aligned": str(catalogue / "aligned"), "harmful": str(catalogue / "rslora")}
    fused = [{"name": "fused", "realign": {"method": "wise_ft"}, "fuse": {"method": "ties", "trim": "model"}}]
    asked = [*variants(WITHOUT_V), *fused, {"name": "plain", "realign": None, "fuse": {"method": "weight_average"}}]
    found: dict[str, tuple[Plan, RunResult]] = {}
    for name, unaligned in {"without": {}, "with": {"unaligned": str(catalogue / "unaligned")}}.items():
        plan = tensor_plan(catalogue, tmp_path / name, base=base | unaligned, variants=asked)
        found[name] = plan, walk(plan, InlinePools())
    assert {step.kind for step in found["without"][0].steps} == {"survey", "realign", "trim", "fuse"}
    theirs, ours = (results(*found[name]) for name in ("with", "without"))
    assert ours.keys() == theirs.keys() and len(ours) == 3 * len(WITHOUT_V)
    for name, (folder, result) in ours.items():
        other, expected = theirs[name]
        weights, same = weights_of(folder), weights_of(other)
        for tensor, value in same.items():  # ‖ΔW‖ of a scaled one is known to six digits
            torch.testing.assert_close(weights[tensor], value, rtol=1e-2, atol=1e-5)
            assert name.endswith(".uniform_scaling") or torch.equal(weights[tensor], value)
        assert result.edit_norm == pytest.approx(expected.edit_norm, rel=1e-5) and result.edit_norm > 0.0
        for row, known in zip(result.modules, expected.modules, strict=True):
            assert (row.module, row.edit, row.reason) == (known.module, known.edit, known.reason)
            assert row.lift is None
            if row.edit:
                assert row.delta_norm == pytest.approx(known.delta_norm, rel=1e-5)
    for candidate in ("fused", "plain"):
        bytes_of = [
            {key.rsplit("/", 1)[1]: sha for key, sha in digests(r).items() if key.startswith(f"fuse/{candidate}/")}
            for _, r in found.values()
        ]
        assert bytes_of[0] == bytes_of[1] and bytes_of[0]


def test_models_alone_are_scored_without_variants_or_unaligned(catalogue: Path, tmp_path: Path) -> None:
    document = manifest_document(catalogue, tmp_path, variants=[])
    document["base"] = {"aligned": str(catalogue / "aligned")}
    plan = make_plan(load_manifest(write_manifest(tmp_path / "models.json", document)))
    assert {step.kind for step in plan.steps} == {"survey", "score"}, "weights are checked, too"
    assert [c.name for c in plan.candidates] == ["aligned", "lora", "rslora", "full"]
