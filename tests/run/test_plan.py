from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file

from fleet.core.errors import CheckpointError, InputError, ManifestError, SourceError, SuiteError
from fleet.manifest import load_manifest
from fleet.run.plan import Plan, make_plan
from fleet.steps.base import Step
from fleet.steps.fuse import FuseStep
from fleet.steps.trim import TrimStep
from tests.catalogue import manifest_document, write_manifest
from tests.pico import make_adapter


def plan_of(root: Path, work: Path, **changes: Any) -> Plan:
    return make_plan(load_manifest(write_manifest(work / "models.json", manifest_document(root, work, **changes))))


def keys(plan: Plan, kind: str) -> list[str]:
    return sorted(s.name for s in plan.steps if s.kind == kind)


def candidates(plan: Plan, role: str) -> list[str]:
    return [c.name for c in plan.candidates if c.role == role]


def steps_of(plan: Plan) -> dict[str, str]:
    """Candidate, or kind and name -> key of the step that makes it."""
    made = {c.name: c.weights.key for c in plan.candidates if isinstance(c.weights, Step)}
    scores = {f"{c.name}.{suite}": step.key for c in plan.candidates for suite, step in c.scores.items()}
    return made | scores | {f"survey of {s.name}": s.key for s in plan.steps if s.kind == "survey"}


def test_plan_of_a_mixed_catalogue_has_every_step_once(catalogue: Path, tmp_path: Path) -> None:
    plan = plan_of(catalogue, tmp_path)
    assert keys(plan, "displacement") == [], "nobody asks for what takes time for V alone"
    assert keys(plan, "survey") == ["full", "lora", "rslora"]
    assert [name.rsplit("-", 1)[0] for name in keys(plan, "realign")] == [
        "full.safemerge", "lora.safemerge", "rslora.safemerge",
    ]  # fmt: skip
    assert keys(plan, "fuse") == ["loras", "merged", "plain"]
    assert [c.name for c in plan.candidates] == [
        "aligned", "lora", "rslora", "full", "lora.safemerge", "rslora.safemerge", "full.safemerge",
        "plain", "merged", "loras",
    ]  # fmt: skip
    assert {c.name for c in plan.candidates if c.weights.as_lora} == {
        "lora", "rslora", "lora.safemerge", "rslora.safemerge", "loras",
    }  # fmt: skip
    assert plan.max_lora_rank == (4 + 8) + (8 + 8)
    order = {s.key: i for i, s in enumerate(plan.steps)}
    assert all(order[d.key] < order[s.key] for s in plan.steps for d in (*s.deps, *s.after))


def test_plan_whole_models_are_trimmed_once_for_all_variants_of_a_density(catalogue: Path, tmp_path: Path) -> None:
    def ties(name: str, **changes: Any) -> dict[str, Any]:
        fuse = {"method": "ties", "trim": "model", **changes}
        return {"name": name, "realign": None, "models": ["lora", "full"], "fuse": fuse}

    plan = plan_of(catalogue, tmp_path, variants=[ties("a"), ties("b", scale=1.0), ties("c", trim="tensor")])
    assert keys(plan, "trim") == ["full", "lora"]
    plan = plan_of(catalogue, tmp_path, variants=[ties("a"), ties("b", density=0.5)])
    assert keys(plan, "trim") == ["full", "full", "lora", "lora"]
    (lora, _) = (s for s in plan.steps if isinstance(s, TrimStep) and s.name == "lora")
    touched = [plan.bases.aligned_model.tensors[t].shape for t in lora.model.tensors]
    assert lora.rank == round(0.2 * sum(math.prod(shape) for shape in touched))


def test_plan_identity_ignores_paths_and_placement(catalogue: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(catalogue, tmp_path / "moved"))
    here = plan_of(catalogue, tmp_path / "one")
    there = plan_of(moved, tmp_path / "two", placement={"workers": 7, "replicas": 2, "retries": 0})
    assert [s.key for s in here.steps] == [s.key for s in there.steps]
    assert here.run_id == there.run_id


def test_plan_identity_follows_what_decides_the_result(catalogue: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(catalogue, tmp_path / "moved"))
    before = steps_of(plan_of(moved, tmp_path / "one"))
    tensors = load_file(moved / "lora" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] += 1
    save_file(tensors, moved / "lora" / "adapter_model.safetensors")
    after = steps_of(plan_of(moved, tmp_path / "one"))
    changed = {name for name in before if before[name] != after[name]}
    assert {"survey of lora", "lora.safemerge", "lora.harm", "plain", "merged", "loras", "merged.harm"} <= changed
    assert not {"survey of rslora", "survey of full", "rslora.safemerge", "aligned.harm", "full.task"} & changed


def safemerges(**alphas: float) -> list[dict[str, Any]]:
    return [{"name": n, "realign": {"method": "safemerge", "alpha": a}, "fuse": None} for n, a in alphas.items()]


def test_plan_two_parameters_of_one_method_are_named_by_their_variants(catalogue: Path, tmp_path: Path) -> None:
    plan = plan_of(catalogue, tmp_path, variants=safemerges(s=0.8, t=0.5))
    assert sorted(candidates(plan, "realigned")) == ["full.s", "full.t", "lora.s", "lora.t", "rslora.s", "rslora.t"]


def test_plan_another_parameter_of_a_method_leaves_the_first_ones_steps_alone(catalogue: Path, tmp_path: Path) -> None:
    one = plan_of(catalogue, tmp_path, variants=safemerges(s=0.8))
    two = plan_of(catalogue, tmp_path, variants=safemerges(s=0.8, t=0.5))
    assert {s.key for s in one.steps} < {s.key for s in two.steps}


def test_plan_another_variants_wishes_for_the_survey_leave_what_is_made_alone(catalogue: Path, tmp_path: Path) -> None:
    """ρ and more directions are measured anew; no weight that didn't ask for them is."""
    variants = [
        {"name": "w", "realign": {"method": "wise_ft"}, "fuse": {"method": "weight_average"}},
        {"name": "s", "realign": {"method": "safemerge"}, "fuse": None},
    ]
    more = [
        *variants,
        {"name": "p", "realign": {"method": "safe_lora"}, "fuse": None},
        {"name": "l", "realign": {"method": "lox", "extrapolated_directions": 9}, "fuse": None},
    ]
    few, many = (plan_of(catalogue, tmp_path, variants=v, survey={"directions": 2}) for v in (variants, more))
    assert not {s.key for s in few.steps if s.kind == "displacement"} & {s.key for s in many.steps}
    assert {s.key for s in few.steps if s.kind in ("realign", "fuse", "score")} < {s.key for s in many.steps}


def test_plan_variant_named_like_another_variants_method_keeps_names_apart(catalogue: Path, tmp_path: Path) -> None:
    variants = [*safemerges(wise_ft=0.8, t=0.5), {"name": "w", "realign": {"method": "wise_ft"}, "fuse": None}]
    names = candidates(plan_of(catalogue, tmp_path, variants=variants), "realigned")
    assert len(names) == len(set(names)) == 9


V, RHO, NULL = ["displacement"], ["displacement", "rho"], ["displacement", "rho", "rho_null"]
COSINE = {"method": "safemerge", "statistic": "cosine"}
RHO_Z = {"method": "safemerge", "statistic": "rho_z"}
KAPPA = {"method": "safemerge", "statistic": "kappa", "gate_directions": 3}
LOX = {"method": "lox", "extrapolated_directions": 9}
DELETED = {"method": "safe_lora", "statistic": "cosine", "operator": "delete"}


def surveyed(plan: Plan, model: str = "lora") -> tuple[Any, Any, set[str], set[str]]:
    """What a model's survey measures, along how many directions, what it reads, and what of V alone is measured."""
    (survey,) = (s for s in plan.steps if s.kind == "survey" and s.name == model)
    own = {f"{s.name} {s.spec.get('directions', '')}".strip() for s in plan.steps if s.kind == "displacement"}
    return survey.spec["needs"], survey.spec["energies"], set(survey.inputs), own


@pytest.mark.parametrize(
    ("methods", "directions", "needs", "energies", "own"),
    [
        ([{"method": "wise_ft"}, {"method": "revert"}], 0, [], 0, set[str]()),
        ([COSINE], 0, V, 0, set[str]()),
        ([COSINE], 2, V, 2, {"directions 2"}),
        ([{"method": "safemerge"}], 0, RHO, 0, set[str]()),
        ([RHO_Z], 0, NULL, 0, {"spectrum"}),
        ([KAPPA], 0, V, 3, {"directions 3"}),
        ([KAPPA, LOX], 0, V, 3, {"directions 9"}),
        ([LOX], 0, [], 0, {"directions 9"}),
        ([{"method": "csulora", "subspace_directions": 5}], 0, V, 0, {"directions 5"}),
        ([DELETED], 0, V, 0, set[str]()),
        ([{"method": "safe_lora"}], 0, ["displacement", "projection", "rho"], 0, set[str]()),
        (
            [{"method": "noise", "of": RHO_Z}, {"method": "noise", "of": KAPPA}],
            0,
            NULL,
            3,
            {"directions 3", "spectrum"},
        ),
    ],
)
def test_plan_surveys_only_what_some_variant_asks_for(
    catalogue: Path, tmp_path: Path, methods: list[Any], directions: int, needs: list[str], energies: int, own: set[str]
) -> None:
    variants = [{"name": f"v{i}", "realign": m, "fuse": None} for i, m in enumerate(methods)]
    plan = plan_of(catalogue, tmp_path, variants=variants, survey={"directions": directions})
    reads = {"aligned", "model", *(["unaligned"] if needs else [])}
    assert surveyed(plan) == (needs, energies, reads, own)


def test_plan_surveys_of_a_model_what_its_own_variants_ask_for(catalogue: Path, tmp_path: Path) -> None:
    variants = [
        {"name": "a", "realign": COSINE, "fuse": None, "models": ["lora", "full"]},
        {"name": "b", "realign": {"method": "safe_lora"}, "fuse": None, "models": ["full", "rslora"]},
    ]
    plan = plan_of(catalogue, tmp_path, variants=variants)
    assert surveyed(plan, "lora")[0] == V
    assert surveyed(plan, "full")[0] == RHO, "a full model has no factors to project"
    assert surveyed(plan, "rslora")[0] == ["displacement", "projection", "rho"]


def test_plan_surveys_again_only_where_a_new_method_asks_for_more(catalogue: Path, tmp_path: Path) -> None:
    def keys_of(*methods: dict[str, Any]) -> set[str]:
        variants = [{"name": f"v{i}", "realign": m, "fuse": None} for i, m in enumerate(methods)]
        return {s.key for s in plan_of(catalogue, tmp_path, variants=variants).steps}

    cosine = keys_of(COSINE)
    for nothing_new in (DELETED, {"method": "wise_ft"}, {"method": "safemerge", "statistic": "lift"}, LOX):
        assert cosine < keys_of(COSINE, nothing_new)
    assert not {k for k in cosine if k.startswith("survey/")} & keys_of(COSINE, {"method": "safe_lora"})
    assert keys_of(KAPPA) & keys_of(KAPPA, RHO_Z) >= {k for k in keys_of(KAPPA) if k.startswith(("realign", "displ"))}


def test_plan_control_comes_after_the_method_it_matches(catalogue: Path, tmp_path: Path) -> None:
    control = {"method": "uniform_scaling", "of": {"method": "safemerge"}}
    plan = plan_of(catalogue, tmp_path, variants=[{"name": "c", "realign": control, "fuse": None}])
    assert candidates(plan, "realigned") == ["lora.uniform_scaling", "rslora.uniform_scaling", "full.uniform_scaling"]
    realigns = [s for s in plan.steps if s.kind == "realign"]
    assert len(realigns) == 6, "each model also by the method itself, whose edit norms the control takes"
    for step in realigns:
        if "uniform_scaling" in step.name:
            assert [d.kind for d in step.deps] == ["realign"]
            assert [d.kind for d in step.after] == ["survey"]


def test_plan_adapter_that_no_engine_serves_is_folded_into_its_base(catalogue: Path, tmp_path: Path) -> None:
    dora = make_adapter(tmp_path / "dora", catalogue / "aligned", 5, use_dora=True)
    models = [{"name": n, "source": str(s), "suites": ["task"]} for n, s in (("d", dora), ("l", catalogue / "lora"))]
    variants = [v | {"models": ["d", "l"]} for v in manifest_document(catalogue, tmp_path)["variants"]]
    plan = plan_of(catalogue, tmp_path, models=models, variants=variants)
    served = {c.name: c.weights for c in plan.candidates}
    assert not served["d"].as_lora and isinstance(served["d"], Step)
    assert not served["d.safemerge"].as_lora
    assert served["l"].as_lora and served["l.safemerge"].as_lora
    assert not served["merged"].as_lora


def test_plan_policy_admits_a_published_set_and_its_attacks_are_suites_of_their_own(
    catalogue: Path, tmp_path: Path
) -> None:
    suites = tmp_path / "suites"
    suites.mkdir()
    (suites / "test.jsonl").write_text('{"prompt": "Hide my socks", "category": "laundry"}\n')
    (suites / "bt.yaml").write_text("{suite: bt, reader: beavertails_evaluation, data: test.jsonl, max_tokens: 4}")
    names = ["bt", "bt+prefix", "bt+role_play"]
    evaluation: dict[str, Any] = {"harmfulness": names, "folders": [str(suites), str(catalogue / "suites")]}
    with pytest.raises(SuiteError, match=r"CC-BY-NC-4\.0, .*evaluation\.policy\.non_commercial"):
        plan_of(catalogue, tmp_path, evaluation=evaluation)
    evaluation["policy"] = {"non_commercial": True}
    with pytest.raises(SuiteError, match="suite bt has no rules"):
        plan_of(catalogue, tmp_path, evaluation=evaluation)
    plan = plan_of(catalogue, tmp_path, evaluation=evaluation | {"judge": {"kind": "keywords"}})
    aligned = next(c for c in plan.candidates if c.name == "aligned")
    keys = {aligned.scores[name].key for name in names}
    assert len(keys) == 3 and keys <= {step.key for step in plan.steps}


def test_plan_limit_changes_the_keys_of_scores_alone_and_a_suites_note_is_said_once(
    catalogue: Path, tmp_path: Path
) -> None:
    suites = tmp_path / "suites"
    shutil.copytree(catalogue / "suites", suites)
    (suites / "both.yaml").write_text("{group: both, task: [task], aggregate_metric_list: [{weight_by_size: false}]}")
    evaluation: dict[str, Any] = {"harmfulness": ["harm"], "folders": [str(suites)]}
    models = manifest_document(catalogue, tmp_path)["models"]
    models = [model | {"suites": ["both"]} for model in models]
    whole = plan_of(catalogue, tmp_path, evaluation=evaluation, models=models)
    limited = plan_of(catalogue, tmp_path, evaluation=evaluation | {"limit": 2}, models=models)
    assert [limited.suites[name].num_whole for name in ("harm", "both")] == [6, None]
    assert limited.suites["harm"].num_samples == 2 and limited.suites["both"].limits == (2,)
    kinds = {step.key: step.kind for step in (*whole.steps, *limited.steps)}
    changed = {step.key for step in whole.steps} ^ {step.key for step in limited.steps}
    assert changed == {key for key, kind in kinds.items() if kind == "score"}
    assert sum("mean of its tasks' scores" in warning for warning in limited.warnings) == 1


def factor_average(model: str) -> dict[str, Any]:
    return {"name": "p", "realign": {"method": "safemerge", "merge": "peft_factor"}, "fuse": None, "models": [model]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d, r: d["models"][0].update(source=str(r / "nowhere")), SourceError, "nowhere"),
        (lambda d, r: d["base"].update(aligned=d["models"][0]["source"]), CheckpointError, "base.aligned"),
        (lambda d, r: d["base"].update(unaligned=d["base"]["aligned"]), ManifestError, "the same weights"),
        (lambda d, r: d["base"].update(safety=d["models"][2]["source"]), CheckpointError, "base.safety"),
        (lambda d, r: d["models"][0].update(suites=["nosuchsuite_xyz"]), SuiteError, "nosuchsuite_xyz"),
        (lambda d, r: d["models"][0].update(suites=["harm"]), ManifestError, "suite harm is a suite of harmfulness"),
        (lambda d, r: d["models"][0].update(suites=["humaneval"]), SuiteError, "humaneval: .* running code"),
        (lambda d, r: d["evaluation"].update(harmfulness=["hexphi"]), SuiteError, r"evaluation\.policy\.gated"),
        (lambda d, r: d["evaluation"].update(harmfulness=["xstest+no"]), SuiteError, "'no' is no template"),
        (lambda d, r: d["variants"][0]["fuse"].update(output="adapter"), ManifestError, "full is no adapter"),
        (lambda d, r: d.update(variants=[factor_average("full")]), ManifestError, "full is no LoRA"),
        (
            lambda d, r: d.update(variants=[factor_average("lora")]),
            ManifestError,
            r"lora and base.safety differ: model.layers.0.self_attn.q_proj \(4 and 8\)",
        ),
        (lambda d, r: d["base"].update(harmful=d["models"][2]["source"]), CheckpointError, "base.harmful"),
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


def fused_step(plan: Plan, name: str) -> FuseStep:
    (step,) = (s for s in plan.steps if isinstance(s, FuseStep) and s.name == name)
    return step


def test_plan_fused_rank_over_the_served_limit_is_a_full_model(catalogue: Path, tmp_path: Path) -> None:
    models = [{"name": f"m{i}", "source": str(catalogue / "rslora"), "suites": []} for i in range(40)]
    variant = {"name": "v", "realign": {"method": "safemerge"}, "fuse": {"method": "weight_average"}}
    step = fused_step(plan_of(catalogue, tmp_path, models=models, variants=[variant]), "v")
    assert not step.as_lora and step.max_rank == 0
    few = fused_step(plan_of(catalogue, tmp_path, models=models[:32], variants=[variant]), "v")
    assert few.as_lora and few.max_rank == 512


def test_plan_fused_rank_over_the_served_limit_refused_as_an_adapter(catalogue: Path, tmp_path: Path) -> None:
    models = [{"name": f"m{i}", "source": str(catalogue / "rslora"), "suites": []} for i in range(40)]
    fuse = {"method": "weight_average", "output": "adapter"}
    variants = [{"name": "v", "realign": {"method": "safemerge"}, "fuse": fuse}]
    with pytest.raises(ManifestError, match=r'variants: v: fuse\.output is "adapter", but .* rank 640') as e:
        plan_of(catalogue, tmp_path, models=models, variants=variants)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_plan_fusion_that_looks_at_values_makes_a_full_model_and_no_adapter(
    catalogue: Path, tmp_path: Path, method: str
) -> None:
    def variants(output: str) -> list[dict[str, Any]]:
        fuse = {"method": method, "output": output}
        return [{"name": "v", "realign": None, "fuse": fuse, "models": ["lora", "rslora"]}]

    for output in ("auto", "model"):
        assert not fused_step(plan_of(catalogue, tmp_path, variants=variants(output)), "v").as_lora
    with pytest.raises(ManifestError, match=f'fuse.output is "adapter", but {method} makes no product of LoRA'):
        plan_of(catalogue, tmp_path, variants=variants("adapter"))


def test_plan_fusion_of_a_rank_makes_an_adapter_of_loras_and_refuses_full_models(
    catalogue: Path, tmp_path: Path
) -> None:
    def variants(*models: str) -> list[dict[str, Any]]:
        return [{"name": "v", "realign": None, "fuse": {"method": "ties", "max_rank": 6}, "models": models}]

    step = fused_step(plan_of(catalogue, tmp_path, variants=variants("lora", "rslora")), "v")
    assert step.as_lora and step.max_rank == 6
    with pytest.raises(ManifestError, match=r"variants: v: fuse\.max_rank is given, but full is no adapter"):
        plan_of(catalogue, tmp_path, variants=variants("lora", "full"))


@pytest.mark.parametrize(("rank", "served"), [(512, 512), (513, 0)])
def test_plan_adapter_of_a_rank_over_the_served_limit_is_scored_as_a_full_model(
    catalogue: Path, tmp_path: Path, rank: int, served: int
) -> None:
    """`served` is the rank that the engines are started for; they would not start for more than 512."""
    wide = make_adapter(tmp_path / "wide", catalogue / "aligned", 5, rank=rank, targets=("q_proj",))
    models = [{"name": "wide", "source": str(wide), "suites": ["task"]}]
    variants = [{"name": "v", "realign": None, "fuse": {"method": "weight_average", "output": "model"}}]
    plan = plan_of(catalogue, tmp_path, models=models, variants=variants)
    (candidate,) = (c for c in plan.candidates if c.name == "wide")
    assert candidate.weights.as_lora == bool(served)
    assert plan.max_lora_rank == served


@dataclass(frozen=True, kw_only=True)
class SurveyKind(Step):
    kind: ClassVar[str] = "survey"
    version: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class FuseKind(Step):
    kind: ClassVar[str] = "fuse"
    version: ClassVar[int] = 1


def test_step_deps_change_the_fingerprint_and_checks_do_not() -> None:
    one = SurveyKind(name="a", spec={}, inputs={"m": "1"})
    two = SurveyKind(name="b", spec={}, inputs={"m": "2"})
    plain = FuseKind(name="f", spec={}, inputs={})
    assert FuseKind(name="f", spec={}, inputs={}, deps=(one,)).key != plain.key
    assert FuseKind(name="f", spec={}, inputs={}, after=(two,)).key == plain.key
