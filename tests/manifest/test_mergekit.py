from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fleet.algebra.delta import Delta, Dense
from fleet.algebra.sparsify import WHOLE
from fleet.core.errors import ManifestError, SourceError
from fleet.fusion.place import Place, at
from fleet.manifest import Manifest, VocabularyOf, load_manifest
from fleet.manifest.mergekit import Conversion, from_mergekit
from fleet.realign import main, parse_arguments
from fleet.store import open_folder

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

TIES = """
models:
  - model: ./base
  - model: ./math
    parameters: {density: 0.5, weight: 0.3}
  - model: ./code
    parameters: {density: 0.5, weight: [0, 0.5, 1]}
merge_method: ties
base_model: ./base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
# As in mergekit's README.
README_TIES = """
models:
  - model: ./psmathanur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: ./garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: ./WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: ./TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
SLERP = """
slices:
  - sources:
      - {model: ./math, layer_range: [0, 32]}
      - {model: ./chat, layer_range: [0, 32]}
merge_method: slerp
base_model: ./chat
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""


def convert(folder: Path, text: str, **arguments: str) -> Conversion:
    path = folder / "config.yml"
    path.write_text(text)
    return from_mergekit(path, **arguments)


def merge(method: str, shared: str = "", a: str = "weight: 1", b: str = "weight: 1", rest: str = "") -> str:
    """A merge of two models, on a base model if the method doesn't merge that as well."""
    base = "" if method in ("linear", "karcher") else "base_model: ./base"
    return f"""
merge_method: {method}
{base}
models:
  - {{model: ./a, parameters: {{{a}}}}}
  - {{model: ./b, parameters: {{{b}}}}}
parameters: {{{shared}}}
{rest}
"""


def fuse(folder: Path, text: str) -> dict[str, Any]:
    (variant,) = convert(folder, text).manifest["variants"]
    return variant["fuse"]


def written(folder: Path, conversion: Conversion) -> Manifest:
    path = folder / "models.json"
    path.write_text(json.dumps(conversion.manifest))
    return load_manifest(path)


def refused(folder: Path, text: str) -> str:
    """The message; one line that begins with the file."""
    with pytest.raises(ManifestError) as e:
        convert(folder, text)
    assert str(e.value).startswith(str(folder / "config.yml"))
    assert "\n" not in str(e.value)
    return str(e.value)


# -- the manifest --------------------------------------------------------------------------------------------------


def test_manifest_of_a_merge_is_whole_and_loads(tmp_path: Path) -> None:
    conversion = convert(tmp_path, TIES, unaligned="./pretrained")
    assert conversion.manifest == {
        "schema": 1,
        "name": "config",
        "base": {"unaligned": "./pretrained", "aligned": "./base"},
        "models": [{"name": "math", "source": "./math"}, {"name": "code", "source": "./code"}],
        "variants": [
            {
                "name": "ties",
                "realign": None,
                "fuse": {
                    "method": "ties",
                    "weights": {"math": 0.3, "code": [0, 0.5, 1]},
                    "consensus": "mean",
                    "scale": 1.0,
                    "density": 0.5,
                    "trim": "tensor",
                },
            }
        ],
        "evaluation": {"harmfulness": ["demo_harmful"], "judge": {"kind": "rule"}},
        "artifacts": "artifacts",
    }
    manifest = written(tmp_path, conversion)
    assert manifest.base.aligned == str(tmp_path / "base")
    method = manifest.variants[0].fuse
    assert method is not None
    assert method.weight("code", Place("any", 0.75)) == 0.75


def test_manifest_of_a_pure_fusion_needs_no_unaligned_model(tmp_path: Path) -> None:
    conversion = convert(tmp_path, TIES)
    assert conversion.manifest["base"] == {"aligned": "./base"}
    assert not any("unaligned" in remark for remark in conversion.remarks)
    assert written(tmp_path, conversion).base.unaligned is None


def test_what_changes_nothing_is_left_out_with_a_remark(tmp_path: Path) -> None:
    remarks = convert(tmp_path, TIES + "tokenizer_source: base\nchat_template: auto\n").remarks
    for word in ("parameters.int8_mask", "dtype", "chat_template", "evaluation"):
        assert any(remark.startswith(word) or word in remark.split(":")[0] for remark in remarks), word
    assert not any("density" in remark or "normalize" in remark for remark in remarks)


def test_parameter_the_method_does_not_have_is_left_out_with_a_remark(tmp_path: Path) -> None:
    found = convert(tmp_path, merge("linear", a="weight: 1, density: 0.5"))
    assert "models: ./a: parameters.density: changes nothing here; left out" in found.remarks


def test_models_of_the_hub_keep_their_commit_and_one_without_is_remarked_on(tmp_path: Path) -> None:
    text = TIES.replace("./base", f"org/base@{COMMIT}").replace("./math", "org/math-v0.1").replace("./code", "s3://b/c")
    found = convert(tmp_path, text)
    assert found.manifest["base"]["aligned"] == f"hf://org/base@{COMMIT}"
    assert [m["source"] for m in found.manifest["models"]] == ["hf://org/math-v0.1@main", "s3://b/c"]
    (pin,) = (remark for remark in found.remarks if "pinned" in remark)
    assert pin.startswith("org/math-v0.1: ")
    with pytest.raises(SourceError, match="not pinned to a commit"):
        open_folder("hf://org/math-v0.1@main")


def test_folder_that_looks_like_a_hub_model_stays_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "math").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = convert(tmp_path, TIES.replace("./math", "out/math").replace("./code", "out/code"))
    assert [m["source"] for m in found.manifest["models"]] == ["out/math", "hf://out/code@main"]


def test_lora_on_the_base_model_is_the_source(tmp_path: Path) -> None:
    found = convert(tmp_path, TIES.replace("./math", "./base+./lora"))
    assert found.manifest["models"][0] == {"name": "lora", "source": "./lora"}
    assert "set base_model: ./other" in refused(tmp_path, TIES.replace("./math", "./other+./lora"))


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ("org/x", "other/x", ["x", "x-2"]),
        ("org/Mistral-7B-v0.1", "./_x y/", ["Mistral-7B-v0-1", "x-y"]),
        ("./aligned", "./safety", ["aligned-2", "safety-2"]),
        ("./" + "y" * 99, "./z/" + "y" * 99, ["y" * 80, "y" * 76 + "-2"]),
        ("./x-2", "./x", ["x-2", "x"]),
    ],
)
def test_names_are_made_from_paths_and_unique(tmp_path: Path, a: str, b: str, names: list[str]) -> None:
    found = convert(tmp_path, merge("linear").replace("./a,", f'"{a}",').replace("./b,", f'"{b}",'))
    assert [m["name"] for m in found.manifest["models"]] == names
    assert [*found.manifest["variants"][0]["fuse"]["weights"]] == names


# -- parameters ----------------------------------------------------------------------------------------------------


def schedule(folder: Path, shared: str, own: str = "") -> Any:
    return fuse(folder, merge("ties", f"density: 1, {shared}", a=own, b="weight: 1"))["weights"]["a"]


def test_parameter_in_each_of_its_forms(tmp_path: Path) -> None:
    assert schedule(tmp_path, "", "weight: 0.5") == 0.5
    assert schedule(tmp_path, "", "weight: [0, 1]") == [0, 1]
    assert schedule(tmp_path, "", "weight: [{value: 2}]") == 2
    assert schedule(tmp_path, "", "weight: {filter: '*', value: 2}") == 2
    assert schedule(tmp_path, "", "weight: [{filter: mlp, value: [0, 1]}, {filter: null, value: 2}]") == [
        {"filter": "mlp", "value": [0, 1]},
        {"value": 2},
    ]


def test_parameter_of_a_model_comes_before_that_of_all(tmp_path: Path) -> None:
    assert schedule(tmp_path, "weight: 0.1", "weight: 0.5") == 0.5
    assert schedule(tmp_path, "weight: 0.1") == 0.1


def test_parameter_that_no_rule_matches_falls_to_that_of_all_and_then_to_the_default(tmp_path: Path) -> None:
    own = "weight: [{filter: mlp, value: 1}]"
    assert schedule(tmp_path, "weight: 0.1", own) == [{"filter": "mlp", "value": 1}, {"value": 0.1}]
    both = "density: [{filter: mlp, value: 0.5}]"
    text = merge("ties", "density: [{filter: attn, value: 0.2}]", a=f"weight: 1, {both}", b=f"weight: 1, {both}")
    rules = [{"filter": "mlp", "value": 0.5}, {"filter": "attn", "value": 0.2}, {"value": 1.0}]
    assert fuse(tmp_path, text)["density"] == rules


def test_rules_after_one_for_all_tensors_are_never_reached(tmp_path: Path) -> None:
    own = "weight: [{filter: mlp, value: 1}, {value: 2}, {filter: attn, value: 3}]"
    assert schedule(tmp_path, "weight: 0.1", own) == [{"filter": "mlp", "value": 1}, {"value": 2}]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("", "models: ./a: parameters.weight: missing"),
        ("weight: [{filter: mlp, value: 1}]", "its rules leave tensors out"),
        ("weight: half", "half: a number"),
        ("weight: true", "True: a number"),
        ("weight: []", "a number"),
        ("weight: .inf", "inf: a number"),
        ("weight: [{filter: mlp}]", "a rule is a value and perhaps a filter"),
        ("weight: 1, normalize: false", "parameters.normalize: ties has one for all models; move it to parameters"),
        ("weight: -1", "negative"),
    ],
)
def test_parameter_written_wrong_is_refused(tmp_path: Path, own: str, message: str) -> None:
    assert message in refused(tmp_path, merge("ties", a=own))


@pytest.mark.parametrize(
    ("method", "a", "b", "name"),
    [
        ("breadcrumbs", "gamma: 0.1", "gamma: 0.2", "gamma"),
        ("della", "density: 0.5, epsilon: 0.1", "density: 0.5, epsilon: 0.2", "epsilon"),
    ],
)
def test_parameter_we_have_once_but_differs_by_model_is_refused(
    tmp_path: Path, method: str, a: str, b: str, name: str
) -> None:
    message = refused(tmp_path, merge(method, a=f"weight: 1, {a}", b=f"weight: 1, {b}"))
    assert f"models: ./b: parameters.{name}" in message
    assert "./a" in message and "make them the same" in message


@pytest.mark.parametrize(
    ("method", "shared", "a", "b", "expected"),
    [
        ("ties", "", "density: 0.5", "density: [0.1, 0.3]", {"density": {"a": 0.5, "b": [0.1, 0.3]}}),
        ("ties", "density: 0.3", "density: 0.5", "", {"density": {"a": 0.5, "b": 0.3}}),
        ("ties", "density: 0.3", "density: 0.3", "", {"density": 0.3}),
        ("breadcrumbs", "", "density: 0.5", "", {"density": {"a": 0.5, "b": 1.0}, "outliers": 0.01}),
        ("della", "epsilon: 0.1", "density: 0.5", "", {"density": {"a": 0.5, "b": 1.0}, "epsilon": 0.1}),
        ("dare_ties", "", "density: 0.53", "", {"drop_rate": {"a": 0.47, "b": 0.0}}),
        ("dare_linear", "density: [0.53, 1]", "", "", {"drop_rate": [0.47, 0.0]}),
        (
            "dare_ties", "", "density: [{filter: mlp, value: [0.9, 1]}, {value: 0.2}]", "density: 0.2",
            {"drop_rate": {"a": [{"filter": "mlp", "value": [0.1, 0.0]}, {"value": 0.8}], "b": 0.8}},
        ),
    ],
)  # fmt: skip
def test_density_is_given_by_model_where_it_differs(
    tmp_path: Path, method: str, shared: str, a: str, b: str, expected: dict[str, Any]
) -> None:
    found = convert(tmp_path, merge(method, shared, f"weight: 1, {a}".rstrip(", "), f"weight: 1, {b}".rstrip(", ")))
    fuse = found.manifest["variants"][0]["fuse"]
    assert {name: fuse[name] for name in expected} == expected
    read = written(tmp_path, found).variants[0].fuse
    assert read is not None and read.coefficients(["a", "b"], Place("q", 0.0)) == {"a": 1.0, "b": 1.0}


def test_ties_of_mergekits_readme_is_what_it_says_there(tmp_path: Path) -> None:
    found = convert(tmp_path, README_TIES)
    names = ["orca_mini_v3_13b", "Platypus2-13B", "WizardMath-13B-V1-0"]
    fuse = found.manifest["variants"][0]["fuse"]
    assert fuse["density"] == dict(zip(names, [[1, 0.7, 0.1], 0.5, 0.33], strict=True))
    assert fuse["weights"] == dict(
        zip(names, [1.0, [0, 0.3, 0.7, 1], [{"filter": "mlp", "value": 0.5}, {"value": 0}]], strict=True)
    )
    method = written(tmp_path, found).variants[0].fuse
    assert method is not None
    vectors = [
        [10.0, -9.0, 8.0, -7.0, 6.0, -5.0, 4.0, 3.0, 2.0, 1.0],
        [1.0, 12.0, -2.0, 14.0, 3.0, 16.0, 4.0, 18.0, 5.0, 20.0],
        [6.0, 1.0, 2.0, -30.0, 3.0, 4.0, -5.0, 40.0, 2.0, -8.0],
    ]
    deltas: dict[str, Delta] = {n: Dense(torch.tensor(v)) for n, v in zip(names, vectors, strict=True)}

    def fused(place: Place) -> torch.Tensor:
        return method.fuse(deltas, method.coefficients(names, place), place, WHOLE).dense()

    # In the middle of an mlp: 7, 5 and 3 of the entries stay, weighted with 1, 0.5 and 0.5.
    #   10 -9  8  -7  6 -5  4  .  .  .
    #    . 12  .  14  . 16  . 18  . 20
    #    .  .  . -30  .  .  . 40  . -8
    # The second entry's sum is −3, the fourth's −15, the sixth's 3, the last's 6.
    expected = [10.0, -9.0, 8.0, -22.0 / 1.5, 6.0, 16.0, 4.0, 29.0, 0.0, 20.0]
    torch.testing.assert_close(fused(Place("model.layers.1.mlp.up_proj.weight", 0.5)), torch.tensor(expected))
    # In the last attention: 1 and 5 stay, weighted with 1 and 1; the third model has no weight.
    expected = [10.0, 12.0, 0.0, 14.0, 0.0, 16.0, 0.0, 18.0, 0.0, 20.0]
    torch.testing.assert_close(fused(Place("model.layers.2.self_attn.q_proj.weight", 1.0)), torch.tensor(expected))


def test_a_number_of_all_tensors_is_no_schedule(tmp_path: Path) -> None:
    assert "not a schedule" in refused(tmp_path, merge("ties", "lambda: [0.5, 0.6]"))


# -- the methods ---------------------------------------------------------------------------------------------------

WEIGHTS = {"weights": {"a": 1, "b": 1}}


@pytest.mark.parametrize(
    ("method", "shared", "expected"),
    [
        ("linear", "", {"method": "weight_average", **WEIGHTS}),
        ("task_arithmetic", "", {"method": "task_arithmetic", **WEIGHTS, "scale": 1.0}),
        ("task_arithmetic", "lambda: [0, 1]", {"method": "task_arithmetic", **WEIGHTS, "scale": [0, 1]}),
        (
            "task_arithmetic", "normalize: true",
            {"method": "task_arithmetic", "weights": {"a": 0.5, "b": 0.5}, "scale": 1.0},
        ),
        (
            "ties", "density: [0.2, 0.4], lambda: 0.7",
            {
                "method": "ties", **WEIGHTS, "consensus": "mean", "scale": 0.7, "density": [0.2, 0.4],
                "trim": "tensor",
            },
        ),
        (
            "ties", "normalize: false",
            {"method": "ties", **WEIGHTS, "consensus": "sum", "scale": 1.0, "density": 1.0, "trim": "tensor"},
        ),
        (
            "dare_linear", "density: 0.53",
            {"method": "dare", **WEIGHTS, "consensus": "none", "scale": 1.0, "drop_rate": 0.47},
        ),
        (
            "dare_ties", "density: 0.53, normalize: true, rescale: true",
            {"method": "dare", **WEIGHTS, "consensus": "mean", "scale": 1.0, "drop_rate": 0.47},
        ),
        ("dare_ties", "", {"method": "dare", **WEIGHTS, "consensus": "sum", "scale": 1.0, "drop_rate": 0.0}),
        (
            "breadcrumbs", "density: 0.9, gamma: 0.02",
            {"method": "breadcrumbs", **WEIGHTS, "consensus": "none", "scale": 1.0, "density": 0.9, "outliers": 0.02},
        ),
        (
            "breadcrumbs_ties", "density: 0.9, gamma: 0.3",
            {"method": "breadcrumbs", **WEIGHTS, "consensus": "sum", "scale": 1.0, "density": 0.9, "outliers": 0.3},
        ),
        (
            "della", "density: 0.6, epsilon: 0.1",
            {"method": "della", **WEIGHTS, "consensus": "mean", "scale": 1.0, "density": 0.6, "epsilon": 0.1},
        ),
        (
            "della_linear", "density: 0.6",
            {"method": "della", **WEIGHTS, "consensus": "none", "scale": 1.0, "density": 0.6, "epsilon": 0.15},
        ),
        ("multislerp", "eps: 1e-8", {"method": "multi_slerp", **WEIGHTS}),
        ("karcher", "max_iter: 20, tol: 1e-6", {"method": "karcher", "max_iter": 20, "tol": 1e-6}),
        ("model_stock", "filter_wise: false", {"method": "model_stock"}),
        ("model_stock", "filter_wise: true", {"method": "model_stock", "filter_wise": True}),
        ("multislerp", "normalize_weights: false", {"method": "multi_slerp", **WEIGHTS, "normalize_weights": False}),
        (
            "ties", "rescale: 1.0, normalize: 0",
            {
                "method": "ties", **WEIGHTS, "rescale": True, "consensus": "sum", "scale": 1.0, "density": 1.0,
                "trim": "tensor",
            },
        ),
        (
            "dare_ties", "density: 0.5, rescale: false",
            {"method": "dare", **WEIGHTS, "rescale": False, "consensus": "sum", "scale": 1.0, "drop_rate": 0.5},
        ),
        (
            "breadcrumbs", "density: 0.9, rescale: true",
            {
                "method": "breadcrumbs", **WEIGHTS, "rescale": True, "consensus": "none", "scale": 1.0,
                "density": 0.9, "outliers": 0.01,
            },
        ),
        (
            "della_linear", "density: 0.6, rescale: no",
            {
                "method": "della", **WEIGHTS, "rescale": False, "consensus": "none", "scale": 1.0, "density": 0.6,
                "epsilon": 0.15,
            },
        ),
        ("nuslerp", "", {"method": "nuslerp", **WEIGHTS}),
        ("nuslerp", "nuslerp_row_wise: true", {"method": "nuslerp", **WEIGHTS}),
        ("nuslerp", "nuslerp_flatten: false", {"method": "nuslerp", **WEIGHTS, "vectors": "rows"}),
        (
            "nuslerp", "nuslerp_flatten: false, nuslerp_row_wise: true",
            {"method": "nuslerp", **WEIGHTS, "vectors": "columns"},
        ),
        ("ram", "epsilon: 1e-4", {"method": "ram", "epsilon": 1e-4}),
        ("ramplus_tl", "r: 0.2", {"method": "ramplus_tl", "epsilon": 1e-5, "r": 0.2, "alpha": 0.2}),
        ("sce", "select_topk: 0.1", {"method": "sce", "select": 0.1}),
    ],
)  # fmt: skip
def test_method_becomes_ours(tmp_path: Path, method: str, shared: str, expected: dict[str, Any]) -> None:
    found = convert(tmp_path, merge(method, shared))
    assert found.manifest["variants"] == [{"name": method, "realign": None, "fuse": expected}]
    assert [m.name for m in written(tmp_path, found).models] == ["a", "b"]


@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("weight", [-1, -0.5])
def test_task_vectors_may_be_subtracted(tmp_path: Path, method: str, weight: float) -> None:
    """Nothing is divided by the sum of the weights, so it may be 0 or less, as in mergekit."""
    found = convert(tmp_path, merge(method, a=f"weight: {weight}", b="weight: 0.5"))
    (variant,) = written(tmp_path, found).variants
    assert variant.fuse is not None and variant.fuse.weights == {"a": weight, "b": 0.5}


@pytest.mark.parametrize(
    ("method", "remark"),
    [("multislerp", "mean, since its tangents"), ("model_stock", "cosine of the task vectors is under")],
)
def test_method_that_mergekit_computes_otherwise_is_remarked_on(tmp_path: Path, method: str, remark: str) -> None:
    assert sum(remark in said for said in convert(tmp_path, merge(method)).remarks) == 1


def test_arcee_fusion_puts_one_model_into_the_base_model(tmp_path: Path) -> None:
    found = convert(tmp_path, merge("arcee_fusion", "normalize: true").replace("base_model: ./base", "base_model: ./b"))
    fuse = {"method": "arcee_fusion"}
    assert found.manifest["variants"] == [{"name": "arcee_fusion", "realign": None, "fuse": fuse}]
    assert [m.name for m in written(tmp_path, found).models] == ["a"]
    assert any("quartiles of all entries" in remark for remark in found.remarks)
    with pytest.raises(ManifestError, match="arcee_fusion puts one model into base_model, not 2"):
        convert(tmp_path, merge("arcee_fusion"))


def test_linear_without_base_model_takes_every_model_and_asks_for_one(tmp_path: Path) -> None:
    found = convert(tmp_path, merge("linear"))
    assert found.manifest["base"]["aligned"] == "unset://base.aligned"
    assert any(remark.startswith("base_model: ") for remark in found.remarks)


def test_linear_counts_the_base_model_where_it_is_listed(tmp_path: Path) -> None:
    found = fuse(tmp_path, merge("linear", a="weight: 3", rest="base_model: ./b"))
    assert found == {"method": "weight_average", "weights": {"a": 3, "b": 1}}


UNLISTED = "base_model: ./base"


def test_linear_merges_a_base_model_that_is_not_listed_as_mergekit_does(tmp_path: Path) -> None:
    """mergekit adds it to the models, and its weight is that of all."""
    text = merge("linear", "weight: 2", a="weight: 3", b="", rest=UNLISTED)
    found = convert(tmp_path, text)
    assert found.manifest["variants"][0]["fuse"] == {"method": "weight_average", "weights": {"a": 3, "b": 2, "base": 2}}
    assert found.manifest["base"]["aligned"] == "./base"
    assert [m["source"] for m in found.manifest["models"]] == ["./a", "./b", "./base"]
    assert any(remark.startswith("base_model: not listed, but") for remark in found.remarks)
    message = refused(tmp_path, merge("linear", rest=UNLISTED))
    assert "base_model: mergekit adds ./base to the models" in message and "leave base_model out" in message


def test_karcher_merges_a_base_model_that_is_not_listed_as_mergekit_does(tmp_path: Path) -> None:
    found = convert(tmp_path, merge("karcher", rest=UNLISTED))
    assert [m["name"] for m in found.manifest["models"]] == ["a", "b", "base"]
    method = written(tmp_path, found).variants[0].fuse
    assert method is not None and method.coefficients([*"abc"], Place("q", 0.0)) == dict.fromkeys("abc", 1.0 / 3)
    listed = convert(tmp_path, merge("karcher", rest="base_model: ./b"))
    assert [m["name"] for m in listed.manifest["models"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("method", "merged"),
    [
        *((m, ["a", "b"]) for m in ("ties", "multislerp", "nuslerp", "model_stock", "sce", "ram", "ramplus_tl")),
        ("slerp", None),
        ("nearswap", None),
        ("arcee_fusion", None),
    ],
)
def test_base_model_listed_or_not_is_the_base_alone(tmp_path: Path, method: str, merged: list[str] | None) -> None:
    """Of the methods that take one model beside it, two are too many, but a base model and one are two."""
    weights = "weight: 1, t: 0.5"
    listed = f"{merge(method, weights, '', '')}".replace("models:", "models:\n  - {model: ./base}")
    if merged is None:
        refused(tmp_path, merge(method, weights, "", ""))
        one = merge(method, weights, "", "", "").replace("base_model: ./base", "base_model: ./b")
        names = [m["name"] for m in convert(tmp_path, one).manifest["models"]]
        assert names == (["b", "a"] if method == "slerp" else ["a"])
        return
    for text in (merge(method, weights, "", ""), listed):
        assert [m["name"] for m in convert(tmp_path, text).manifest["models"]] == merged


@pytest.mark.parametrize(("method", "merged"), [("linear", ["a", "b"]), ("karcher", ["a", "b"]), ("ties", None)])
def test_slice_without_its_base_model_is_what_it_is_to_mergekit(
    tmp_path: Path, method: str, merged: list[str] | None
) -> None:
    """Nothing is added to a slice: two methods don't need a base model there, the others refuse to run."""
    sources = "".join(f"      - {{model: ./{m}, layer_range: [0, 2]}}\n" for m in "ab")
    text = f"merge_method: {method}\nbase_model: ./base\nparameters: {{weight: 1}}\nslices:\n  - sources:\n{sources}"
    if merged is None:
        assert "slices.0.sources: ./base isn't among them" in refused(tmp_path, text)
    else:
        assert [m["name"] for m in convert(tmp_path, text).manifest["models"]] == merged


def test_nearswap_is_given_t_and_ram_its_numbers_for_all_models(tmp_path: Path) -> None:
    text = merge("nearswap", "t: [0.001, 0.0001]", "", "").replace("base_model: ./base", "base_model: ./b")
    assert fuse(tmp_path, text) == {"method": "nearswap", "t": [0.001, 0.0001]}
    assert "parameters.t: missing" in refused(tmp_path, text.replace("t: [0.001, 0.0001]", ""))
    assert "not a schedule" in refused(tmp_path, merge("ram", "epsilon: [0, 1]", "", ""))


def test_gradient_is_remarked_on_because_the_last_tensors_take_its_other_end(tmp_path: Path) -> None:
    assert any(remark.startswith("gradients: ") for remark in convert(tmp_path, TIES).remarks)
    assert not any(remark.startswith("gradients: ") for remark in convert(tmp_path, merge("ties")).remarks)


def test_multislerp_of_one_model_is_that_model_whatever_its_weight(tmp_path: Path) -> None:
    one = merge("multislerp", "normalize_weights: false", b="weight: 3").replace(
        "base_model: ./base", "base_model: ./a"
    )
    assert fuse(tmp_path, one) == {"method": "multi_slerp", "weights": {"b": 3}}


def test_linear_not_normalised_has_an_equal_if_weights_add_up_to_1(tmp_path: Path) -> None:
    text = merge("linear", "normalize: false", "weight: [0, 1]", "weight: [1, 0]")
    assert fuse(tmp_path, text) == {
        "method": "task_arithmetic",
        "scale": 1.0,
        "weights": {"a": [0, 1], "b": [1, 0]},
    }
    listed = merge("linear", "normalize: false", "weight: 0.3", "weight: 0.7", "base_model: ./b")
    assert fuse(tmp_path, listed) == {"method": "task_arithmetic", "scale": 1.0, "weights": {"a": 0.3}}


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("weight: 1", "weight: 1"),
        ("weight: [0, 1]", "weight: [1, 1]"),
        ("weight: [0, 1]", "weight: [1, 0.5, 0]"),
        ("weight: [{filter: mlp, value: 0.3}, {value: 0.6}]", "weight: [{filter: attn, value: 0.7}, {value: 0.4}]"),
    ],
)
def test_linear_not_normalised_is_refused_otherwise(tmp_path: Path, a: str, b: str) -> None:
    assert "parameters.normalize" in refused(tmp_path, merge("linear", "normalize: false", a, b))


def test_slerp_counts_t_from_the_base_model(tmp_path: Path) -> None:
    found = convert(tmp_path, SLERP)
    manifest = written(tmp_path, found)
    assert manifest.base.aligned == str(tmp_path / "chat")
    assert [m.name for m in manifest.models] == ["chat", "math"]
    (variant,) = manifest.variants
    assert variant.fuse is not None
    place = Place("model.layers.3.self_attn.q_proj.weight", 0.25)
    assert variant.fuse.coefficients(["chat", "math"], place) == {"chat": 0.5, "math": 0.5}
    place = Place("model.layers.0.mlp.up_proj.weight", 0.0)
    assert variant.fuse.coefficients(["chat", "math"], place) == {"chat": 0.0, "math": 1.0}
    assert at(getattr(variant.fuse, "t"), Place("model.norm.weight", 1.0)) == 0.5  # noqa: B009 - of Slerp alone


def test_slerp_needs_t_and_two_models(tmp_path: Path) -> None:
    assert "parameters.t: missing" in refused(tmp_path, merge("slerp").replace("./base", "./a"))
    assert "one other model, not to 2" in refused(tmp_path, merge("slerp", "t: 0.5"))


@pytest.mark.parametrize(
    ("method", "shared", "message"),
    [
        ("passthrough", "", "put together from layers"),
        ("nearswap", "t: 1", "nearswap moves base_model towards one other model, not 2"),
        ("blend", "", "unknown here; there are linear, task_arithmetic, "),
        ("ties", "normalize: [{filter: mlp, value: true}, {value: false}]", "true or false is expected, for all"),
        ("ties", "normalize: 3", "true or false"),
        ("task_arithmetic", "normalize: true, weight: [0, 1]", "merge_method linear"),
        ("dare_linear", "density: 0", "1 is no drop rate"),
        ("della", "density: 0.95", "density + epsilon at most 1"),
        ("ties", "density: 0", "0 is no share"),
    ],
)
def test_method_without_an_equal_is_refused(tmp_path: Path, method: str, shared: str, message: str) -> None:
    own = "" if "weight" in shared else "weight: 1"
    assert message in refused(tmp_path, merge(method, shared, a=own, b=own))


@pytest.mark.parametrize(
    "method",
    ["task_arithmetic", "ties", "dare_linear", "slerp", "model_stock", "sce", "arcee_fusion", "nearswap", "ram"],
)
def test_method_on_task_vectors_needs_a_base_model(tmp_path: Path, method: str) -> None:
    assert "base_model: missing" in refused(tmp_path, merge(method).replace("base_model: ./base", ""))


@pytest.mark.parametrize(
    ("rest", "vocabulary"),
    [
        ("", "refuse"),
        ("tokenizer_source: base", "aligned"),
        ("tokenizer_source: ./base", "aligned"),
        ("tokenizer_source: union", "union"),
        ("tokenizer: {}", "union"),
        ("tokenizer_source: ./b", VocabularyOf(model="b")),
        ("tokenizer: {source: 'model:./a'}", VocabularyOf(model="a")),
    ],
)
def test_tokenizer_becomes_the_vocabulary(tmp_path: Path, rest: str, vocabulary: str | VocabularyOf) -> None:
    manifest = written(tmp_path, convert(tmp_path, merge("task_arithmetic", rest=rest)))
    assert manifest.checkpoint.vocabulary == vocabulary


# -- the rest of a configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("tokenizer_source: ./c", "tokenizer: ./c is no model of this merge; say base, union, or ./a, ./b"),
        ("tokenizer: {source: base, tokens: {x: {source: ./a}}}", "tokens and pad_to_multiple_of"),
        ("tokenizer: {source: base, pad_to_multiple_of: 8}", "tokens and pad_to_multiple_of"),
        ("chat_template: chatml", "chat_template: "),
        ("modules: {decoder: {}}", "modules: "),
        ("slices: [{sources: [{model: ./a, layer_range: [0, 2]}]}]", "models: give models, or slices"),
        ("density: 0.5", "density: unknown field"),
        ("models: []", "no YAML"),
    ],
)
def test_what_would_change_the_result_is_refused(tmp_path: Path, rest: str, message: str) -> None:
    text = merge("linear", rest=rest)
    if rest == "models: []":
        text += "  - [unclosed"
    assert message in refused(tmp_path, text)


def test_model_listed_twice_or_only_the_base_is_refused(tmp_path: Path) -> None:
    assert "./a is listed twice" in refused(tmp_path, merge("linear").replace("./b", "./a"))
    assert "none but the base" in refused(tmp_path, "{merge_method: ties, base_model: b, models: [{model: b}]}")


@pytest.mark.parametrize("text", ["", "just text", "[1]", "{models: []}", "{merge_method: linear}"])
def test_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


def test_file_missing_or_of_several_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such configuration"):
        from_mergekit(tmp_path / "none.yml")
    assert "one document" in refused(tmp_path, TIES + "---" + TIES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0, 32]}\n      - {model: ./chat", "[0, 16]}\n      - {model: ./chat", "slices.0: "),
        ("[0, 32]", "[8, 32]", "from 0 to"),
        ("merge_method", "  - sources: [{model: ./math, layer_range: [0, 2]}]\nmerge_method", "one slice"),
        ("    - sources", "    - residual_weight: 1\n      sources", "residual_weight"),
    ],
)
def test_slices_that_are_not_whole_models_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = SLERP.replace("  - sources", "    - sources").replace("      - {", "        - {")
    text = text if "    - sources" in old else SLERP
    assert old in text
    assert message in refused(tmp_path, text.replace(old, new))


def test_slice_shorter_than_a_local_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math").mkdir()
    config = tmp_path / "math" / "config.json"
    config.write_text(json.dumps({"num_hidden_layers": 32}))
    convert(tmp_path, SLERP)
    config.write_text(json.dumps({"num_hidden_layers": 33}))
    assert "./math has 33 layers, not 32" in refused(tmp_path, SLERP)


def test_parameters_of_a_slice_come_between_the_models_and_all(tmp_path: Path) -> None:
    text = """
slices:
  - sources:
      - {model: ./a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: ./b, layer_range: [0, 2]}
      - {model: ./base, layer_range: [0, 2]}
    base_model: ./base
    parameters: {weight: 2, density: 0.5}
merge_method: ties
parameters: {weight: 3, density: 0.6, lambda: 0.7}
"""
    found = convert(tmp_path, text).manifest
    method = found["variants"][0]["fuse"]
    assert (method["weights"], method["density"], method["scale"]) == ({"a": 1, "b": 2}, 0.5, 0.7)
    assert found["base"]["aligned"] == "./base"


# -- the command ---------------------------------------------------------------------------------------------------


def test_command_prints_the_manifest_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yml"
    path.write_text(TIES)
    assert main(["--from-mergekit", str(path), "--unaligned", "org/pretrained"]) == 0
    printed = capsys.readouterr()
    assert printed.out == json.dumps(from_mergekit(path, "org/pretrained").manifest, indent=2) + "\n"
    assert "remark: evaluation: " in printed.err
    (tmp_path / "models.json").write_text(printed.out)
    assert load_manifest(tmp_path / "models.json").base.unaligned == "hf://org/pretrained@main"


def test_command_refuses_in_one_line_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-mergekit", str(tmp_path / "none.yml")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: {tmp_path}/none.yml: no such configuration\n"


@pytest.mark.parametrize(
    "arguments", [[], ["--manifest", "m", "--from-mergekit", "c"], ["--manifest", "m", "--unaligned", "u"]]
)
def test_command_takes_a_manifest_or_a_configuration(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)


@pytest.mark.slow
def test_conversion_imports_no_heavy_library() -> None:
    code = (
        "import sys, fleet.manifest.mergekit\n"
        "heavy = {'torch', 'ray', 'vllm', 'mlflow', 'transformers', 'boto3', 'huggingface_hub', 'numba'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
