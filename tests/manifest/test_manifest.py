from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.judges import RuleJudge, make_judge
from evals.model_judges import LlamaGuard3
from fleet.core.errors import ManifestError
from fleet.manifest import Manifest, load_manifest, manifest_schema

MINIMAL: dict[str, Any] = {
    "schema": 1,
    "name": "m",
    "base": {"unaligned": "u", "aligned": "a"},
    "models": [{"name": "x", "source": "x"}, {"name": "y", "source": "s3://b/y"}],
    "variants": [{"name": "v", "realign": None, "fuse": {"method": "weight_average"}}],
    "evaluation": {"harmfulness": ["h"]},
    "artifacts": "artifacts",
}


def write(folder: Path, document: Any) -> Path:
    path = folder / "models.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_manifest_relative_paths_are_the_manifests_own(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, MINIMAL | {"tracking": {"uri": "sqlite:///mlflow.db"}}))
    assert manifest.base.aligned == str(tmp_path / "a")
    assert manifest.models[1].source == "s3://b/y"
    assert manifest.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "colour: unknown field"),
        ({"base": {"unaligned": "u"}}, r"base\.aligned: missing"),
        ({"schema": 2}, "schema: should be 1"),
        ({"models": []}, "models: "),
        ({"models": [{"name": "x", "source": "1"}, {"name": "x", "source": "2"}]}, "models: duplicate names: x"),
        ({"models": [{"name": "aligned", "source": "1"}]}, "aligned names a base model"),
        ({"models": [{"name": "a/b", "source": "1"}]}, r"models\.0\.name: "),
        ({"variants": [MINIMAL["variants"][0]] * 2}, "variants: duplicate names: v"),
        ({"variants": [{"name": "v", "realign": None, "fuse": {"method": "blend"}}]}, "blend"),
        ({"variants": [MINIMAL["variants"][0] | {"models": ["z"]}]}, "no model is named z"),
        ({"variants": [MINIMAL["variants"][0] | {"models": []}]}, "models is empty"),
        ({"variants": [{"name": "v", "realign": {"method": "safemerge"}, "fuse": None}]}, r"set base\.safety"),
        (
            {
                "variants": [
                    {"name": "v", "realign": None, "fuse": {"method": "task_arithmetic", "weights": {"x": 0, "y": 0}}}
                ]
            },
            r"fuse\.weights are all 0",
        ),
        (
            {"variants": [{"name": "v", "realign": None, "fuse": {"method": "weight_average", "weights": {"q": 1}}}]},
            r"fuse\.weights names q",
        ),
        ({"evaluation": {"harmfulness": ["h"], "references": ["unaligned"]}}, "must contain 'aligned'"),
        ({"gates": {"confidence": 2}}, r"gates\.confidence"),
        ({"gates": {"harmfulness_margin": -0.1}}, r"gates\.harmfulness_margin"),
        ({"gates": {"paired_bounds": "wald"}}, r"gates\.paired_bounds"),
    ],
)
def test_manifest_mistake_names_field_and_fix(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message) as e:
        load_manifest(write(tmp_path, MINIMAL | changes))
    assert "\n" not in str(e.value)


READS_V = {"name": "pushed", "realign": {"method": "lox"}, "fuse": None}
NO_V = {"aligned": "a", "safety": "s", "harmful": "h"}


@pytest.mark.parametrize(
    "realign",
    [
        None,
        {"method": "wise_ft"},
        {"method": "revert"},
        {"method": "somf", "reuse": "mask"},
        {"method": "resta"},
        {"method": "noise", "of": {"method": "resta"}},
    ],
)
def test_manifest_without_unaligned_is_taken_where_nothing_reads_v(tmp_path: Path, realign: Any) -> None:
    variants = [{"name": "v", "realign": realign, "fuse": {"method": "weight_average"}}]
    assert load_manifest(write(tmp_path, MINIMAL | {"base": NO_V, "variants": variants})).base.unaligned is None
    assert load_manifest(write(tmp_path, MINIMAL | {"base": NO_V, "variants": []})).variants == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": [READS_V]}, r"variants: pushed \(lox\): set it to the model"),
        (
            {"variants": [READS_V, READS_V | {"name": "merged", "realign": {"method": "safemerge"}}]},
            r"variants: pushed \(lox\), merged \(safemerge\): set it",
        ),
        ({"variants": [READS_V | {"realign": {"method": "noise", "of": {"method": "splora"}}}]}, r"pushed \(noise\)"),
        ({"variants": [READS_V | {"realign": {"method": "resta", "vector": "displacement"}}]}, r"pushed \(resta\)"),
        ({"evaluation": {"harmfulness": ["h"], "references": ["aligned", "unaligned"]}}, r"references: unaligned: set"),
        ({"survey": {"directions": 2}}, r"survey\.directions: 2: set it"),
        ({"variants": [READS_V], "survey": {"directions": 2}}, r"pushed \(lox\); survey\.directions: 2: set it"),
    ],
)
def test_manifest_without_unaligned_names_all_that_reads_v_at_once(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ManifestError, match=rf"base\.unaligned is not given, but is read for .*{message}") as e:
        load_manifest(write(tmp_path, MINIMAL | {"base": NO_V} | changes))
    assert str(e.value).count("base.unaligned") == 1


def test_manifest_not_json_or_missing_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        load_manifest(tmp_path / "none.json")
    with pytest.raises(ManifestError, match="not valid JSON"):
        load_manifest(write(tmp_path, "{"))


def test_manifest_key_given_twice_refused(tmp_path: Path) -> None:
    text = json.dumps(MINIMAL)[:-1] + ', "name": "other"}'
    with pytest.raises(ManifestError, match="'name' is there twice; leave one"):
        load_manifest(write(tmp_path, text))


def test_manifest_is_frozen(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "other"  # type: ignore[misc]


def test_manifest_schema_shipped_is_the_types_own() -> None:
    shipped = Path("fleet/manifest/manifest.schema.json").read_text()
    assert shipped == manifest_schema(), "run `make schema`"


def test_manifest_round_trips_through_its_own_json(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, MINIMAL))
    assert Manifest.model_validate_json(manifest.model_dump_json(by_alias=True)) == manifest


def test_manifest_judge_model_and_calibration_are_addresses(tmp_path: Path) -> None:
    judge = {"kind": "llama_guard_3", "model": "judges/guard", "calibration": "labelled.jsonl", "threshold": 0.4}
    evaluation = MINIMAL["evaluation"] | {"judge": judge}
    manifest = load_manifest(write(tmp_path, MINIMAL | {"evaluation": evaluation}))
    made = manifest.evaluation.judge
    assert isinstance(made, LlamaGuard3)
    assert (made.model, made.calibration) == (str(tmp_path / "judges/guard"), str(tmp_path / "labelled.jsonl"))
    assert make_judge(made.model_dump(mode="json")) == made
    assert load_manifest(write(tmp_path, MINIMAL)).evaluation.judge == RuleJudge()


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"kind": "oracle"}, "evaluation.judge: no kind is called 'oracle'; there are rule"),
        ({"model": "m"}, r"evaluation\.judge: "),
        ({"kind": "harmbench"}, r"evaluation\.judge\.model: missing"),
        ({"kind": "keywords", "threshold": 1}, r"evaluation\.judge\.threshold: unknown field"),
        ({"kind": "shield_gemma", "model": "m", "policies": ["politics"]}, r"judge\.policies\.0: "),
    ],
)
def test_manifest_judge_mistake_names_the_field(tmp_path: Path, judge: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        load_manifest(write(tmp_path, MINIMAL | {"evaluation": {"harmfulness": ["h"], "judge": judge}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "1"}, "schema: should be 1$"),
        ({"models": []}, "models: is empty; it needs at least one$"),
        ({"name": "x" * 81}, "name: has 81 characters; at most 80"),
        ({"eval": {}}, r"eval: unknown field; did you mean evaluation\?$"),
        ({"artifacts": " a"}, "artifacts: ' a': has a space around it"),
        ({"artifacts": "a\0"}, "artifacts: .*control character"),
        *(
            ({"evaluation": {"harmfulness": ["h"], "date": day}}, "evaluation.date: is .*, written as 2026-11-25$")
            for day in (20251125, "26.11.2025", "2025-11-25T10:00:00", "1764028800", True)
        ),
        ({"tracking": {"uri": "file:///tmp/x"}}, "write sqlite:////tmp/x/mlflow.db$"),
        ({"tracking": {"uri": "databricks-uc"}}, "write databricks$"),
        ({"tracking": {"uri": "postgres://h/d"}}, "write postgresql://h/d$"),
        ({"tracking": {"uri": "mlruns/"}}, "write sqlite:///mlruns/mlflow.db$"),
        ({"tracking": {"uri": "localhost:5000"}}, "write http://localhost:5000$"),
        ({"tracking": {"uri": "http:/host"}}, "write http://HOST:5000$"),
        ({"tracking": {"uri": "sqlite+aiosqlite:///x.db"}}, "no driver aiosqlite of SQLite"),
    ],
)
def test_manifest_mistake_says_what_to_write_instead(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    document = {k: v for k, v in (MINIMAL | changes).items() if not ("eval" in changes and k == "evaluation")}
    with pytest.raises(ManifestError, match=message):
        load_manifest(write(tmp_path, document))


@pytest.mark.parametrize("uri", ["databricks", "HTTP://host:1", "SQLITE:///x.db"])
def test_manifest_tracking_address_in_capitals_or_of_databricks_is_taken(tmp_path: Path, uri: str) -> None:
    assert load_manifest(write(tmp_path, MINIMAL | {"tracking": {"uri": uri}})).tracking.uri.islower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("// a note\n{}", "JSON has no comments"),
        ('{"a": 1 # a note\n}', "JSON has no comments"),
        ('{"a": 1,}', "take out the comma before it"),
        ("{'a': 1}", "double quotes"),
        ('{"a": True}', "JSON writes true"),
        ("", "the file is empty"),
        ('{"a": "\\ud800"}', "half of a character"),
    ],
)
def test_manifest_that_is_no_json_says_what_to_change(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        load_manifest(write(tmp_path, text))
