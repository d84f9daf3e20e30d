from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fleet.errors import CheckpointError, InputError, ManifestError, SourceError, SuiteError
from fleet.manifest import load_manifest
from fleet.plan import Plan, make_plan
from fleet.record import Step
from tests.catalogue import manifest_document, write_manifest


def plan_of(root: Path, work: Path, **changes: Any) -> Plan:
    return make_plan(load_manifest(write_manifest(work / "models.json", manifest_document(root, work, **changes))))


def keys(plan: Plan, kind: str) -> list[str]:
    return sorted(s.name for s in plan.steps if s.kind == kind)


def test_plan_of_a_mixed_catalogue_has_every_step_once(catalogue: Path, tmp_path: Path) -> None:
    plan = plan_of(catalogue, tmp_path)
    assert keys(plan, "survey") == ["full", "lora", "rslora"]
    assert keys(plan, "realign") == ["full.safemerge", "lora.safemerge", "rslora.safemerge"]
    assert keys(plan, "fuse") == ["loras", "merged", "plain"]
    assert [c.name for c in plan.candidates] == [
        "aligned", "lora", "rslora", "full", "lora.safemerge", "rslora.safemerge", "full.safemerge",
        "plain", "merged", "loras",
    ]  # fmt: skip
    assert {c.name for c in plan.candidates if c.weights.is_adapter} == {
        "lora", "rslora", "lora.safemerge", "rslora.safemerge", "loras",
    }  # fmt: skip
    assert plan.max_lora_rank == (4 + 8) + (8 + 8)
    order = {s.key: i for i, s in enumerate(plan.steps)}
    assert all(order[d.key] < order[s.key] for s in plan.steps for d in (*s.deps, *s.after))


def test_plan_identity_ignores_paths_and_placement(catalogue: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(catalogue, tmp_path / "moved"))
    here = plan_of(catalogue, tmp_path / "one")
    there = plan_of(moved, tmp_path / "two", placement={"workers": 7, "replicas": 2, "retries": 0})
    assert [s.key for s in here.steps] == [s.key for s in there.steps]
    assert here.run_id == there.run_id


def test_plan_identity_follows_what_decides_the_result(catalogue: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(catalogue, tmp_path / "moved"))
    before = {s.name: s.key for s in plan_of(moved, tmp_path / "one").steps}
    tensors = load_file(moved / "lora" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] += 1
    save_file(tensors, moved / "lora" / "adapter_model.safetensors")
    after = {s.name: s.key for s in plan_of(moved, tmp_path / "one").steps}
    changed = {name for name in before if before[name] != after[name]}
    assert {"lora", "lora.safemerge", "lora.harm", "plain", "merged", "loras", "merged.harm"} <= changed
    assert not {"rslora", "full", "rslora.safemerge", "aligned.harm", "full.task"} & changed


def test_plan_two_parameters_of_one_method_are_named_by_their_variants(catalogue: Path, tmp_path: Path) -> None:
    variants = [
        {"name": n, "realign": {"method": "safemerge", "alpha": a}, "fuse": None} for n, a in (("s", 0.8), ("t", 0.5))
    ]
    plan = plan_of(catalogue, tmp_path, variants=variants)
    assert keys(plan, "realign") == ["full.s", "full.t", "lora.s", "lora.t", "rslora.s", "rslora.t"]


def broken(changes: dict[str, Any]) -> Any:
    return pytest.param(changes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d, r: d["models"][0].update(source=str(r / "nowhere")), SourceError, "nowhere"),
        (lambda d, r: d["base"].update(aligned=d["models"][0]["source"]), CheckpointError, "base.aligned"),
        (lambda d, r: d["base"].update(unaligned=d["base"]["aligned"]), ManifestError, "the same weights"),
        (lambda d, r: d["base"].update(safety=d["models"][2]["source"]), CheckpointError, "base.safety"),
        (lambda d, r: d["models"][0].update(suites=["nosuchsuite_xyz"]), SuiteError, "nosuchsuite_xyz"),
        (lambda d, r: d["models"][0].update(suites=["harm"]), ManifestError, "suite harm is a suite of harmfulness"),
        (lambda d, r: d["variants"][0]["fuse"].update(output="adapter"), ManifestError, "full is no adapter"),
    ],
)
def test_plan_bad_input_is_an_input_error(
    catalogue: Path, tmp_path: Path, change: Any, error: type[InputError], message: str
) -> None:
    document = manifest_document(catalogue, tmp_path)
    document = json.loads(json.dumps(document))
    change(document, catalogue)
    with pytest.raises(error, match=message) as e:
        make_plan(load_manifest(write_manifest(tmp_path / "models.json", document)))
    assert "\n" not in str(e.value)


def test_plan_fused_rank_over_the_served_limit_refused(catalogue: Path, tmp_path: Path) -> None:
    models = [{"name": f"m{i}", "source": str(catalogue / "rslora"), "suites": []} for i in range(40)]
    variants = [{"name": "v", "realign": {"method": "safemerge"}, "fuse": {"method": "weight_average"}}]
    with pytest.raises(ManifestError, match=r'rank 640.*set fuse\.output to "model"'):
        plan_of(catalogue, tmp_path, models=models, variants=variants)


def test_step_deps_change_the_fingerprint_and_checks_do_not() -> None:
    one = Step(kind="survey", name="a", spec={}, inputs={"m": "1"})
    two = Step(kind="survey", name="b", spec={}, inputs={"m": "2"})
    plain = Step(kind="fuse", name="f", spec={}, inputs={})
    assert Step(kind="fuse", name="f", spec={}, inputs={}, deps=(one,)).key != plain.key
    assert Step(kind="fuse", name="f", spec={}, inputs={}, after=(two,)).key == plain.key
