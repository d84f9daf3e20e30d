from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fleet.checkpoint.models import Adapter, check_belongs, read_model, require_full_model
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.errors import CheckpointError
from fleet.store import open_folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def adapter_copy(catalogue: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(catalogue / "lora", tmp_path / "lora"))


@pytest.mark.parametrize("name", ["lora", "rslora", "full"])
def test_task_vector_of_each_kind_equals_the_library(catalogue: Path, name: str) -> None:
    aligned = require_full_model(read_model(open_folder(str(catalogue / "aligned"))), "aligned")
    model = read_model(open_folder(str(catalogue / name)))
    base = AutoModelForCausalLM.from_pretrained(catalogue / "aligned", dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    if isinstance(model, Adapter):
        tuned = PeftModel.from_pretrained(base, str(catalogue / name)).merge_and_unload()
    else:
        tuned = AutoModelForCausalLM.from_pretrained(catalogue / name, dtype=torch.float32)
    for tensor, value in tuned.named_parameters():
        delta = read_delta(model, tensor, read_weight(aligned, tensor))
        expected = value.detach() - before[tensor]
        found = torch.zeros_like(expected) if delta is None else delta.dense()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_adapter_scale_rslora_and_patterns_follow_peft(catalogue: Path) -> None:
    rslora = read_model(open_folder(str(catalogue / "rslora")))
    lora = read_model(open_folder(str(catalogue / "lora")))
    assert isinstance(rslora, Adapter)
    assert isinstance(lora, Adapter)
    assert {m.scale for m in rslora.modules.values()} == {8 / math.sqrt(8)}
    assert lora.modules["model.layers.1.self_attn.q_proj"].scale == 8 / 2
    assert lora.modules["model.layers.0.self_attn.q_proj"].scale == 8 / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
        ({"r": 16}, "says rank 16"),
    ],
)
def test_adapter_config_asking_for_more_refused(adapter_copy: Path, changes: dict[str, Any], message: str) -> None:
    change_config(adapter_copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_model(open_folder(str(adapter_copy)))


def test_adapter_with_lone_factor_refused(adapter_copy: Path) -> None:
    path = adapter_copy / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj has only lora_A"):
        read_model(open_folder(str(adapter_copy)))


def test_adapter_of_another_base_lists_every_module(adapter_copy: Path, catalogue: Path) -> None:
    path = adapter_copy / "adapter_model.safetensors"
    tensors = {
        (k.replace("v_proj", "w_proj") if "layers.0" in k else k): (
            v[:, :16].contiguous() if "q_proj.lora_A" in k else v
        )
        for k, v in load_file(path).items()
    }
    save_file(tensors, path)
    aligned = require_full_model(read_model(open_folder(str(catalogue / "aligned"))), "aligned")
    with pytest.raises(CheckpointError) as e:
        check_belongs(read_model(open_folder(str(adapter_copy))), aligned)
    assert "module model.layers.0.self_attn.w_proj is not in the base" in str(e.value)
    assert "module model.layers.1.self_attn.q_proj is (128, 16), but the base's is (128, 32)" in str(e.value)


def test_full_model_missing_extra_and_misshaped_tensors_listed(catalogue: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(catalogue / "full", tmp_path / "full"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.ones(1)
    tensors["model.embed_tokens.weight"] = torch.ones(7, 32)
    save_file(tensors, folder / "model.safetensors")
    aligned = require_full_model(read_model(open_folder(str(catalogue / "aligned"))), "aligned")
    with pytest.raises(CheckpointError) as e:
        check_belongs(read_model(open_folder(str(folder))), aligned)
    for part in ("missing tensors: model.norm.weight", "extra tensors: model.extra", "embed_tokens.weight is (7, 32)"):
        assert part in str(e.value)


def test_model_quantised_refused_by_name(catalogue: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(catalogue / "full", tmp_path / "full"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(I8\)"):
        read_model(open_folder(str(folder)))


def test_folder_without_a_model_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"neither config\.json.*found: notes\.txt"):
        read_model(open_folder(str(tmp_path)))


def test_full_model_of_an_older_transformers_fits(catalogue: Path, tmp_path: Path) -> None:
    """Version 4 wrote `rope_theta` beside the other fields, version 5 puts it into `rope_parameters`."""
    folder = Path(shutil.copytree(catalogue / "full", tmp_path / "full"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    del config["hidden_act"]
    (folder / "config.json").write_text(json.dumps(config))
    aligned = require_full_model(read_model(open_folder(str(catalogue / "aligned"))), "aligned")
    check_belongs(read_model(open_folder(str(folder))), aligned)
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    with pytest.raises(CheckpointError, match=r"rope_theta is 7\.0"):
        check_belongs(read_model(open_folder(str(folder))), aligned)
