from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from fleet.core.errors import CheckpointError, InputError, ManifestError
from fleet.core.identity import canonical_json
from fleet.manifest import load_manifest
from fleet.masks.files import MASK_FILE, MASK_JSON
from fleet.methods import Somf
from fleet.run.plan import Plan, make_plan
from fleet.steps.fuse import FuseStep
from fleet.steps.mask import LogProbsStep, MaskStep
from fleet.steps.realign import RealignStep
from fleet.steps.sources import MaskSource
from tests.catalogue import manifest_document, write_manifest
from tests.pico import make_adapter

LORAS = ["lora", "rslora"]
USES_PROMPTS = {"utility_weight": 1.0}


def somf(**changes: Any) -> Somf:
    return Somf.model_validate({"method": "somf", "preferences": "/some/p.jsonl", **changes})


# -- the parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": None}, "give either preferences to learn a mask from, or reuse"),
        ({"reuse": "/mask"}, "give either preferences to learn a mask from, or reuse"),
        ({"preferences": None, "reuse": "/mask", "learn_on": "fusion"}, "leave out reuse and learned_on"),
        ({"learned_on": "lora", "learn_on": "fusion"}, "leave out reuse and learned_on"),
        ({"mask": "rank", "preferences": None, "reuse": "/mask"}, "a rank mask means something only for the adapter"),
        ({"mask": "factor", "preferences": None, "reuse": "/mask"}, "a factor mask means something only for the"),
        ({"mask": "rank", "learned_on": "lora"}, "a rank mask means something only for the adapter"),
        ({"mask": "factor", "learned_on": "lora"}, "a factor mask means something only for the adapter"),
        ({"mask": "rank", "learn_on": "fusion"}, "a rank mask can't be shared"),
        ({"temperature": 0.0}, "temperature"),
        ({"preferences": ""}, "preferences"),
        ({"mask": "columns"}, "mask"),
        ({"training": {"steps": 0}}, "steps"),
        ({"training": {"held_out": 1.0}}, "held_out"),
        ({"training": {"learning_rate": 0.0}}, "learning_rate"),
        ({"training": {"epochs": 3}}, "epochs"),
    ],
)
def test_somf_that_asks_for_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        somf(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"preferences": None, "reuse": "/mask"},
        {"preferences": None, "reuse": "/mask", "mask": "rows_and_columns"},
        {"learned_on": "lora"},
        {"mask": "rank", "learn_on": "fusion", "shared": False},
        {"mask": "factor", "learn_on": "fusion"},
        {"mask": "rank"},
        {"training": {"held_out": 0.0, "warmup_steps": 0}},
    ],
)
def test_somf_that_can_be_is_accepted(changes: dict[str, Any]) -> None:
    assert somf(**changes).method == "somf"


def test_somf_defaults_are_the_published_ones() -> None:
    method = somf()
    assert (method.initial_logit, method.temperature, method.shared) == (0.0, 0.5, True)
    training = method.training
    assert (training.beta, training.batch_size, training.learning_rate) == (0.1, 16, 5e-3)
    assert (training.utility_weight, training.sparsity_weight) == (0.0, 0.0)


def test_somf_identity_holds_no_path() -> None:
    learned = somf(preferences="/some/where/p.jsonl", learned_on="lora")
    reused = somf(preferences=None, reuse="/some/where/mask")
    for method in (learned, reused):
        text = canonical_json(method.identity()) + canonical_json(method.mask_identity())
        assert "where" not in text and "preferences" not in text and "reuse" not in text
    assert somf(preferences="/other.jsonl", learned_on="lora").identity() == learned.identity()


@pytest.mark.parametrize(
    "changes",
    [{"hardening": "sample"}, {"arrangement": "random"}, {"seed": 3}, {"max_rank": 4}, {"preferences": "/q.jsonl"}],
)
def test_somf_mask_identity_is_blind_to_how_the_mask_is_applied(changes: dict[str, Any]) -> None:
    assert somf(**changes).mask_identity() == somf().mask_identity()


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "rows_and_columns"}, {"initial_logit": 3.0}, {"temperature": 1.0}, {"independent_adapters": True},
        {"training": {"seed": 1}}, {"training": {"steps": 9}}, {"training": {"utility_weight": 0.1}},
    ],
)  # fmt: skip
def test_somf_mask_identity_follows_what_decides_the_logits(changes: dict[str, Any]) -> None:
    assert somf(**changes).mask_identity() != somf().mask_identity()


@pytest.mark.parametrize("changes", [{"hardening": "sample"}, {"arrangement": "random"}, {"seed": 3}, {"max_rank": 4}])
def test_somf_identity_follows_how_the_mask_is_applied(changes: dict[str, Any]) -> None:
    assert somf(**changes).identity() != somf().identity()


def test_somf_needs_a_safety_adapter_only_where_factors_revert_to_it() -> None:
    assert somf().needs == somf(mask="rank").needs == somf(mask="factor", independent_adapters=True).needs == {"mask"}
    assert somf(mask="factor").needs == {"mask", "safety"}
    assert [somf(mask=m).adapters_only for m in ("dense", "rows_and_columns", "rank", "factor")] == [
        False, False, True, True,
    ]  # fmt: skip
    assert somf(mask="factor").pairs_factors and not somf(mask="factor", independent_adapters=True).pairs_factors


@pytest.mark.parametrize(
    ("training", "uses"),
    [({}, False), ({"utility_weight": 0.1}, True), ({"divergence_max": 0.5}, True), ({"sparsity_weight": 1.0}, False)],
)
def test_somf_uses_prompts_where_it_measures_the_divergence(training: dict[str, float], uses: bool) -> None:
    assert somf(training=training).training.uses_prompts == uses


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """With `p.jsonl`, preferences, and `prompts.jsonl`, task prompts."""
    rows = [{"prompt": f"do {i}", "chosen": "No.", "rejected": "Yes."} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def variant(name: str, *, models: list[str] | None = None, fuse: Any = None, **changes: Any) -> dict[str, Any]:
    realign = {"method": "somf", "preferences": "p.jsonl", **changes}
    return {"name": name, "realign": realign, "fuse": fuse} | ({"models": models} if models else {})


def plan_of(root: Path, work: Path, *variants: dict[str, Any], **changes: Any) -> Plan:
    document = manifest_document(root, work, variants=list(variants), **changes)
    return make_plan(load_manifest(write_manifest(work / "models.json", document)))


def masks(plan: Plan) -> list[MaskStep]:
    return [s for s in plan.steps if isinstance(s, MaskStep)]


def with_prompts(root: Path, *names: str) -> list[dict[str, Any]]:
    """The catalogue's models, of which these have task prompts."""
    models = manifest_document(root, root)["models"]
    return [m | ({"prompts": "prompts.jsonl"} if m["name"] in names else {}) for m in models]


def test_plan_of_masks_has_one_reference_and_one_mask_per_model(catalogue: Path, work: Path) -> None:
    plan = plan_of(catalogue, work, variant("v"))
    (reference,) = (s for s in plan.steps if isinstance(s, LogProbsStep))
    assert sorted(s.name for s in masks(plan)) == ["full", "lora", "rslora"]
    for step in masks(plan):
        assert step.deps == (reference,) and list(step.members) == [step.name] and step.fusion is None
        assert [s.kind for s in step.after] == ["survey"]
    realigned = [s for s in plan.steps if isinstance(s, RealignStep)]
    assert {s.model.uri: s.mask for s in realigned} == {m.members[m.name].uri: m for m in masks(plan)}
    for step in realigned:
        assert step.mask in step.deps
    order = {s.key: i for i, s in enumerate(plan.steps)}
    assert all(order[d.key] < order[s.key] for s in plan.steps for d in (*s.deps, *s.after))
    (content,) = plan.texts.values()
    assert content == (work / "p.jsonl").read_bytes()


def test_plan_other_ways_to_apply_a_mask_share_its_training(catalogue: Path, work: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "t": {"hardening": "threshold"},
        "e": {"hardening": "expected"},
        "s": {"hardening": "sample", "seed": 4},
        "r": {"arrangement": "random"},
    }
    plan = plan_of(catalogue, work, *(variant(n, models=["lora"], **c) for n, c in changes.items()))
    assert len(masks(plan)) == 1
    assert len([s for s in plan.steps if isinstance(s, RealignStep)]) == 4
    assert sorted(c.name for c in plan.candidates if c.role == "realigned") == ["lora.e", "lora.r", "lora.s", "lora.t"]


def test_plan_masks_of_other_parameters_share_only_the_reference(catalogue: Path, work: Path) -> None:
    variants = [
        variant("a", models=["lora"]),
        variant("b", models=["lora"], mask="rank"),
        variant("c", models=["lora"], training={"sparsity_weight": 1.0}),
        variant("d", models=["lora"], training={"dtype": "float32"}),
    ]
    plan = plan_of(catalogue, work, *variants)
    assert len(masks(plan)) == 4
    assert len([s for s in plan.steps if isinstance(s, LogProbsStep)]) == 2, "one per precision"


def test_plan_fusion_learns_one_mask_for_all_its_models(catalogue: Path, work: Path) -> None:
    average = {"method": "weight_average"}
    plan = plan_of(catalogue, work, variant("f", models=LORAS, fuse=average, learn_on="fusion"))
    (mask,) = masks(plan)
    assert list(mask.members) == LORAS and mask.fusion is not None and mask.fusion.method == "weight_average"
    assert [s.mask for s in plan.steps if isinstance(s, RealignStep)] == [mask, mask]
    (fuse,) = (s for s in plan.steps if isinstance(s, FuseStep) and s.name == "f")
    assert sorted(d.kind for d in fuse.deps) == ["realign", "realign"]


def test_plan_fusions_realigned_models_are_named_apart(catalogue: Path, work: Path) -> None:
    variants = [
        variant("avg", models=LORAS, fuse={"method": "weight_average"}, learn_on="fusion"),
        variant("ties", models=LORAS, fuse={"method": "ties"}, learn_on="fusion"),
        variant("all", fuse={"method": "ties"}, learn_on="fusion"),
    ]
    plan = plan_of(catalogue, work, *variants)
    names = {c.name: c.weights for c in plan.candidates if c.role == "realigned"}
    assert sorted(names) == sorted(
        [f"{m}.{v}" for v in ("avg", "ties") for m in LORAS] + [f"{m}.all" for m in (*LORAS, "full")]
    )
    assert len({w.key for w in names.values() if isinstance(w, RealignStep)}) == 7
    assert sorted(s.name for s in masks(plan)) == ["ties-of-2", "ties-of-3", "weight_average-of-2"]
    assert len({s.key for s in masks(plan)}) == 3


def test_plan_fusions_way_of_writing_is_no_part_of_its_mask(catalogue: Path, work: Path) -> None:
    one, two = (
        plan_of(catalogue, work, variant("f", models=LORAS, learn_on="fusion",
                                         fuse={"method": "weight_average", "output": output}))
        for output in ("model", "auto")
    )  # fmt: skip
    assert [s.key for s in masks(one)] == [s.key for s in masks(two)]


def test_plan_shared_and_own_masks_of_a_fusion_are_other_masks(catalogue: Path, work: Path) -> None:
    variants = [
        variant(n, models=LORAS, fuse={"method": "ties"}, learn_on="fusion", shared=s)
        for n, s in (("one", True), ("each", False))
    ]
    assert len(masks(plan_of(catalogue, work, *variants))) == 2


def test_plan_mask_learned_on_one_model_serves_all(catalogue: Path, work: Path) -> None:
    plan = plan_of(catalogue, work, variant("v", learned_on="lora"))
    (mask,) = masks(plan)
    assert mask.name == "lora" and list(mask.members) == ["lora"]
    assert [s.mask for s in plan.steps if isinstance(s, RealignStep)] == [mask] * 3
    own = plan_of(catalogue, work, variant("v", models=["lora"]))
    assert [s.key for s in masks(own)] == [mask.key]


def test_plan_preferences_of_the_same_content_change_no_key(catalogue: Path, work: Path) -> None:
    one = plan_of(catalogue, work, variant("v"))
    (work / "moved.jsonl").write_bytes((work / "p.jsonl").read_bytes())
    two = plan_of(catalogue, work, variant("v", preferences="moved.jsonl"))
    assert [s.key for s in one.steps] == [s.key for s in two.steps]
    assert one.texts == two.texts


def test_plan_preferences_of_other_content_change_everything_made_of_them(catalogue: Path, work: Path) -> None:
    one = plan_of(catalogue, work, variant("v"))
    row = {"prompt": "more", "chosen": "No.", "rejected": "Yes."}
    with (work / "p.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    two = plan_of(catalogue, work, variant("v"))
    changed = {s.kind for s in one.steps if s.key not in {t.key for t in two.steps}}
    assert changed == {"logprobs", "mask", "realign", "score"}
    assert not {s.key for s in two.steps if s.kind in ("logprobs", "mask", "realign")} & {s.key for s in one.steps}


def test_plan_mask_follows_its_models_content_not_their_path(catalogue: Path, work: Path) -> None:
    moved = Path(shutil.copytree(catalogue / "lora", work / "moved"))
    models = [{"name": "lora", "source": str(source)} for source in (catalogue / "lora", moved, catalogue / "rslora")]
    one, two, other = (masks(plan_of(catalogue, work, variant("v"), models=[m])) for m in models)
    assert [s.key for s in one] == [s.key for s in two] != [s.key for s in other]


def test_plan_control_of_a_mask_matches_the_masks_own_step(catalogue: Path, work: Path) -> None:
    of = variant("m", models=["lora"])["realign"]
    control = {"name": "c", "models": ["lora"], "realign": {"method": "random_modules", "of": of}, "fuse": None}
    plan = plan_of(catalogue, work, variant("m", models=["lora"]), control)
    (mask,) = masks(plan)
    own, matched = (s for s in plan.steps if isinstance(s, RealignStep))
    assert matched.matched is not None and matched.matched.key == own.key
    assert isinstance(own.mask, MaskStep) and isinstance(matched.mask, MaskStep)
    assert own.mask.key == matched.mask.key == mask.key
    assert str(work) not in canonical_json(matched.spec)


# -- task prompts ----------------------------------------------------------------------------------------------------


def test_plan_prompts_are_read_where_the_mask_uses_them(catalogue: Path, work: Path) -> None:
    models = with_prompts(catalogue, "lora")
    without, used = (
        plan_of(catalogue, work, variant("v", models=["lora"], training=t), models=models) for t in ({}, USES_PROMPTS)
    )
    assert [s.prompts for s in masks(without)] == [()] and len(without.texts) == 1
    (mask,) = masks(used)
    assert [t.what for t in mask.prompts] == ["prompts"] and len(used.texts) == 2
    assert mask.inputs["prompts.lora"] == mask.prompts[0].identity


def test_plan_prompts_that_are_no_prompts_refused(catalogue: Path, work: Path) -> None:
    models = [m | ({"prompts": "p.jsonl"} if m["name"] == "lora" else {}) for m in with_prompts(catalogue)]
    with pytest.raises(ManifestError, match=r"models: lora: prompts: .*p\.jsonl: line 1: needs prompt, response"):
        plan_of(catalogue, work, variant("v", models=["lora"], training=USES_PROMPTS), models=models)


@pytest.mark.parametrize("training", [USES_PROMPTS, {"divergence_max": 0.5}])
def test_manifest_mask_that_needs_prompts_names_the_models_without(
    catalogue: Path, work: Path, training: dict[str, float]
) -> None:
    models = with_prompts(catalogue, "lora")
    with pytest.raises(ManifestError, match=r"variants: v: .* but rslora, full has none; set models\.prompts"):
        plan_of(catalogue, work, variant("v", training=training), models=models)
    # Only the models that a mask is learned on have to have them.
    plan_of(catalogue, work, variant("v", models=["lora"], training=training), models=models)
    plan_of(catalogue, work, variant("v", learned_on="lora", training=training), models=models)
    with pytest.raises(ManifestError, match="but full has none"):
        plan_of(catalogue, work, variant("v", models=["lora"], learned_on="full", training=training), models=models)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_manifest_mask_on_a_fusion_that_is_none_refused(catalogue: Path, work: Path) -> None:
    with pytest.raises(ManifestError, match=r"variants: v: realign\.learn_on is fusion, but fuse is null"):
        plan_of(catalogue, work, variant("v", learn_on="fusion"))


@pytest.mark.parametrize(
    ("fuse", "why"),
    [
        ({"method": "tsv"}, "tsv needs whole matrices"),
        ({"method": "model_stock", "filter_wise": True}, "model_stock needs whole matrices"),
        ({"method": "nuslerp", "vectors": "rows"}, "nuslerp needs whole matrices"),
        ({"method": "ties", "trim": "model"}, r"fuse\.trim is model"),
    ],
)
def test_manifest_mask_on_a_fusion_of_more_than_rows_refused(
    catalogue: Path, work: Path, fuse: dict[str, Any], why: str
) -> None:
    with pytest.raises(ManifestError, match=rf"variants: v: realign\.learn_on is fusion, but .*{why}"):
        plan_of(catalogue, work, variant("v", learn_on="fusion", fuse=fuse))


def test_manifest_mask_learned_on_a_stranger_refused(catalogue: Path, work: Path) -> None:
    with pytest.raises(ManifestError, match=r"variants: v: realign\.learned_on: no model is named stranger"):
        plan_of(catalogue, work, variant("v", learned_on="stranger"))


def test_manifest_control_of_a_bad_mask_is_checked_like_the_mask(catalogue: Path, work: Path) -> None:
    of = variant("v", learn_on="fusion")["realign"]
    with pytest.raises(ManifestError, match=r"variants: c: realign\.learn_on is fusion, but fuse is null"):
        plan_of(catalogue, work, {"name": "c", "realign": {"method": "noise", "of": of}, "fuse": None})


def test_manifest_factor_mask_without_a_safety_adapter_refused(catalogue: Path, work: Path) -> None:
    base = {n: uri for n, uri in manifest_document(catalogue, work)["base"].items() if n != "safety"}
    with pytest.raises(ManifestError, match=r"variants: v: somf needs a safety adapter; set base\.safety"):
        plan_of(catalogue, work, variant("v", models=["lora"], mask="factor"), base=base)
    plan_of(catalogue, work, variant("v", models=["lora"], mask="factor", independent_adapters=True), base=base)


def test_manifest_unknown_mask_parameter_names_the_field(catalogue: Path, work: Path) -> None:
    with pytest.raises(ManifestError, match=r"variants\.0\.realign\.colour: unknown field"):
        plan_of(catalogue, work, variant("v", colour=1))


@pytest.mark.parametrize("mask", ["rank", "factor"])
def test_plan_mask_of_factors_on_a_full_model_refused(catalogue: Path, work: Path, mask: str) -> None:
    with pytest.raises(ManifestError, match="on LoRA factors, but full is no LoRA") as e:
        plan_of(catalogue, work, variant("v", models=["full"], mask=mask, independent_adapters=True))
    assert "\n" not in str(e.value)


def test_plan_fusions_rank_masks_name_the_model_that_has_none(catalogue: Path, work: Path) -> None:
    fuse = {"method": "weight_average"}
    with pytest.raises(ManifestError, match="full is no LoRA"):
        plan_of(catalogue, work, variant("v", fuse=fuse, mask="rank", learn_on="fusion", shared=False))


def test_plan_factor_mask_needs_the_safety_adapters_ranks(catalogue: Path, work: Path) -> None:
    with pytest.raises(ManifestError, match=r"the ranks of lora and base\.safety differ"):
        plan_of(catalogue, work, variant("v", models=["lora"], mask="factor"))
    same = make_adapter(work / "same", catalogue / "aligned", 5, rank=8)
    models = [{"name": "same", "source": str(same), "suites": ["task"]}]
    (mask,) = masks(plan_of(catalogue, work, variant("v", mask="factor"), models=models))
    assert mask.safety is not None and mask.inputs["safety"] == mask.safety.identity
    alone = plan_of(catalogue, work, variant("v", models=["lora"], mask="factor", independent_adapters=True))
    assert [s.safety for s in masks(alone)] == [None]


@pytest.mark.parametrize(
    ("files", "missing"),
    [((), f"{MASK_FILE}, {MASK_JSON} is missing"), ((MASK_FILE,), MASK_JSON), ((MASK_JSON,), MASK_FILE)],
)
def test_plan_reuse_of_a_folder_without_a_mask_refused(
    catalogue: Path, work: Path, files: tuple[str, ...], missing: str
) -> None:
    folder = work / "mask"
    folder.mkdir()
    for name in ("README.md", *files):
        (folder / name).write_text("x")
    with pytest.raises(CheckpointError, match=rf"{folder}: no learned mask, {missing}"):
        plan_of(catalogue, work, variant("v", preferences=None, reuse="mask"))


def test_plan_reuse_of_another_kind_of_mask_refused(catalogue: Path, work: Path) -> None:
    folder = work / "mask"
    folder.mkdir()
    (folder / MASK_FILE).write_bytes(b"x")
    (folder / MASK_JSON).write_text('{"mask": "rank"}')
    with pytest.raises(ManifestError, match=r"is a rank mask, but realign\.mask says dense"):
        plan_of(catalogue, work, variant("v", preferences=None, reuse="mask"))


def test_plan_reuse_of_a_folder_that_is_not_there_is_an_input_error(catalogue: Path, work: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        plan_of(catalogue, work, variant("v", preferences=None, reuse="nowhere"))


def test_plan_reused_mask_is_told_by_its_content(catalogue: Path, work: Path) -> None:
    for name, value in (("one", 0.0), ("two", 0.0), ("other", 1.0)):
        (work / name).mkdir()
        save_file({"*/x/entries": torch.full((2,), value)}, work / name / MASK_FILE)
        (work / name / MASK_JSON).write_text('{"mask": "dense"}')
        (work / name / "notes.txt").write_text(name)
    one, two, other = (
        plan_of(catalogue, work, variant("v", preferences=None, reuse=name)) for name in ("one", "two", "other")
    )
    assert not masks(one) and not one.texts
    assert all(isinstance(s.mask, MaskSource) for s in one.steps if isinstance(s, RealignStep))
    assert [s.key for s in one.steps] == [s.key for s in two.steps]
    realigned = [{s.key for s in plan.steps if s.kind == "realign"} for plan in (one, other)]
    assert len(realigned[0]) == 3 and not realigned[0] & realigned[1]


def test_plan_preferences_that_are_not_there_are_an_input_error(catalogue: Path, work: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        plan_of(catalogue, work, variant("v", preferences="none.jsonl"))


def test_plan_bad_preferences_name_the_field_the_file_and_the_line(catalogue: Path, work: Path) -> None:
    (work / "bad.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(ManifestError, match=r"variants: realign\.preferences: .*bad\.jsonl: line 1: needs prompt, ch"):
        plan_of(catalogue, work, variant("v", preferences="bad.jsonl"))
