"""What planning finds odd: said once, in the plan's warnings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fleet.manifest import load_manifest
from fleet.run.plan import make_plan
from tests.catalogue import manifest_document, write_manifest

ANOTHER = "{{ messages[0]['content'] }}"


def warnings(root: Path, work: Path, **changes: Any) -> tuple[str, ...]:
    document = manifest_document(root, work, **changes)
    return make_plan(load_manifest(write_manifest(work / "models.json", document))).warnings


def test_ordinary_catalogue_has_no_warnings(catalogue: Path, tmp_path: Path) -> None:
    assert warnings(catalogue, tmp_path) == ()


def test_models_without_suites_are_named_once(catalogue: Path, tmp_path: Path) -> None:
    models = [
        {"name": "lora", "source": str(catalogue / "lora"), "suites": ["task"]},
        *({"name": name, "source": str(catalogue / name)} for name in ("rslora", "full")),
    ]
    (warning,) = warnings(catalogue, tmp_path, models=models)
    assert warning.startswith("models: rslora, full: no suites are given")


def test_adapters_that_name_one_other_base_are_said_together(catalogue: Path, tmp_path: Path) -> None:
    for name in ("lora", "rslora", "safety"):
        shutil.copytree(catalogue / name, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "some-org/a-13b-of-another-family"
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    models = [{"name": name, "source": str(tmp_path / name), "suites": ["task"]} for name in ("lora", "rslora")]
    base = {name: str(catalogue / name) for name in ("aligned", "unaligned")} | {"safety": str(tmp_path / "safety")}
    (warning,) = warnings(catalogue, tmp_path, models=models, base=base)
    assert warning.startswith(
        "models: lora; models: rslora; base.safety: adapter_config.json names the base model some-"
    )


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_fusion_with_another_template_than_a_members_is_said(catalogue: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(catalogue / "full", tmp_path / "full"))
    if file == "chat_template.jinja":
        (folder / file).write_text(ANOTHER)
    else:
        config = json.loads((folder / file).read_text()) | {"chat_template": ANOTHER}
        (folder / file).write_text(json.dumps(config))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    models = [{"name": "full", "source": str(folder), "suites": ["task"]}]
    fused = [{"name": name, "realign": None, "fuse": {"method": name}} for name in ("weight_average", "ties")]
    (warning,) = warnings(catalogue, tmp_path, models=models, variants=fused)
    assert warning.startswith("models: full: their chat template is another than the aligned model's")
    apart = [{"name": "apart", "realign": {"method": "revert"}, "fuse": None}]
    assert warnings(catalogue, tmp_path, models=models, variants=apart) == ()


def test_adapter_beside_a_template_of_its_own_is_a_member_too(catalogue: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(catalogue / "lora", tmp_path / "lora"))
    models = [{"name": "lora", "source": str(folder), "suites": ["task"]}]
    fused = [{"name": "fused", "realign": None, "fuse": {"method": "weight_average"}}]
    same = catalogue / "aligned" / "chat_template.jinja"
    (folder / "chat_template.jinja").write_text(same.read_text() + "\n")
    assert warnings(catalogue, tmp_path, models=models, variants=fused) == ()
    (folder / "chat_template.jinja").write_text(ANOTHER)
    scored, warning = warnings(catalogue, tmp_path, models=models, variants=fused)
    assert scored.startswith("lora: the adapter brings a chat template")
    assert warning.startswith("models: lora: their chat template")


def test_full_model_beside_an_adapter_is_said_to_be_left_out(catalogue: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(catalogue / "lora", tmp_path / "both"))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(catalogue / "full" / name, both)
    models = [{"name": "both", "source": str(both), "suites": ["task"]}]
    variants = [{"name": "one", "realign": None, "fuse": {"method": "weight_average"}}]
    (warning,) = warnings(catalogue, tmp_path, models=models, variants=variants)
    assert "holds an adapter and a full model (model.safetensors); the adapter is read" in warning
