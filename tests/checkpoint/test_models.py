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

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.belongs import check_belongs
from fleet.checkpoint.model import read_model, require_full_model
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.core.errors import CheckpointError
from fleet.store import open_folder
from tests.pico import write_adapter, write_model


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
        ({"use_dora": True}, r"q_proj lacks the magnitude tensor, but adapter_config.json says use_dora=True"),
        ({"lora_bias": True}, r"q_proj lacks the bias tensor, but adapter_config.json says lora_bias=True"),
        ({"bias": "norms_only"}, "bias='norms_only'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
        ({"init_lora_weights": "olora"}, "changed base"),
        ({"init_lora_weights": "loftq"}, "changed base"),
        ({"init_lora_weights": "lora_ga"}, "changed base"),
        ({"init_lora_weights": "of_next_year"}, "changed base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\].*merge_and_unload"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens="),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters=.*merge_and_unload"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"kasa_config": {}}, "kasa_config={}"),
        ({"r": 16}, "says rank 16"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
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


def test_adapter_without_an_alpha_refused(adapter_copy: Path) -> None:
    path = adapter_copy / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lora_alpha is None, not a number"):
        read_model(open_folder(str(adapter_copy)))


FACTORS = {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(3, 1)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (
            {"r": 0},
            {"m.lora_A.weight": torch.ones(0, 2), "m.lora_B.weight": torch.ones(3, 0)},
            r"module m: lora_A is \(0, 2\), an update of rank 0",
        ),
        ({}, {"m.weight": torch.ones(3, 2)}, "has no LoRA factors"),
        ({}, FACTORS | {"m.lora_magnitude_vector": torch.ones(3)}, "has a magnitude tensor, but .* use_dora=None"),
        ({"use_dora": True}, FACTORS | {"m.lora_magnitude_vector": torch.ones(2)}, r"the magnitude is \(2,\)"),
        ({"lora_bias": True}, FACTORS | {"m.lora_B.bias": torch.ones(1)}, r"the bias is \(1,\)"),
        ({}, FACTORS | {"m.lora_A.default.weight": torch.ones(1, 2)}, r"there twice: .*m\.lora_A"),
        ({}, FACTORS | {"m.bias": torch.ones(3), "m.base_layer.bias": torch.ones(3)}, r"there twice: .*bias"),
        ({}, FACTORS | {"c.lora_A.weight": torch.ones(1, 2, 3, 3)}, r"no LoRA factor .*c\.lora_A"),
        ({}, FACTORS | {"m.lora_E": torch.ones(1, 1)}, r"no LoRA factor .*lora_E.*merge_and_unload"),
        (
            {},
            FACTORS | {"e.token_adapter.trainable_tokens_delta": torch.ones(1, 2)},
            "no LoRA factor .*trainable_tokens",
        ),
        (
            {},
            {"e.lora_embedding_A": torch.ones(1, 2)},
            "module e has only lora_embedding_A; lora_embedding_B is missing",
        ),
    ],
)
def test_adapter_with_tensors_that_say_no_update_refused(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    write_adapter(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=message):
        read_model(open_folder(str(tmp_path)))


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_model_with_quantised_tensors_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    write_model(tmp_path, {"model_type": "llama"}, {"m.weight": torch.ones(2, 2).to(dtype), "norm": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"1 tensors .*quantised; give the unquantised.*: m\.weight \("):
        read_model(open_folder(str(tmp_path)))


def test_model_of_float64_refused_without_calling_it_quantised(tmp_path: Path) -> None:
    write_model(tmp_path, {"model_type": "llama"}, {"m.weight": torch.ones(2, 2).double()})
    with pytest.raises(CheckpointError, match=r"save the model in float32: m\.weight \(F64\)"):
        read_model(open_folder(str(tmp_path)))


def test_model_whose_config_says_quantised_refused_with_the_method(tmp_path: Path) -> None:
    """Even where every tensor is a float: the scales or the packing are in other files or in the config."""
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}
    write_model(tmp_path, config, {"m.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"quant_method 'awq'.*give the unquantised checkpoint"):
        read_model(open_folder(str(tmp_path)))


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


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.attention.bias", (1, 1, 8, 8)),
        ("transformer.h.0.attn.bias", (8, 8)),
        ("transformer.h.0.attn.attention.bias", (1, 1, 8, 8)),
        ("transformer.h.0.crossattention.bias", (1, 1, 8, 8)),
        ("h.0.attn.masked_bias", ()),
        ("gpt_neox.layers.0.attention.masked_bias", (1,)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)),
        ("model.rotary_emb.original_inv_freq", (4,)),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 8, 4)),
        ("transformer.h.0.attn.causal_mask", (1, 1, 8, 8)),
        ("embeddings.position_ids", (1, 8)),
        ("transformer.h.0.attn.embed_positions", (8, 4)),
        ("model.embed_positions.weights", (8, 4)),
    ],
)
def test_buffer_of_any_dtype_is_no_tensor_of_a_model(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    write_model(tmp_path, {"model_type": "gpt_neox"}, {"m.weight": torch.ones(2, 2), name: torch.ones(shape).to(dtype)})
    model = require_full_model(read_model(open_folder(str(tmp_path))), "model")
    assert set(model.tensors) == {"m.weight"}
    assert model.left_out == (() if name.endswith("rotary_emb.inv_freq") else (name,))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.h.0.attn.c_attn.bias", (24,)),
        ("model.layers.0.attention.bias", (8,)),
        ("model.layers.0.attn.bias", (8, 4)),
        ("model.embed_positions.weight", (8, 4)),
        ("encoder.relative_attention_bias.weight", (8, 8)),
    ],
)
def test_parameter_that_is_called_like_a_buffer_stays(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    write_model(tmp_path, {"model_type": "gpt2"}, {name: torch.ones(shape)})
    assert set(require_full_model(read_model(open_folder(str(tmp_path))), "model").tensors) == {name}


def test_tensors_that_zero_3_left_empty_are_refused_with_the_setting(adapter_copy: Path, tmp_path: Path) -> None:
    file = adapter_copy / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(file)}, file)
    write_model(tmp_path / "full", {"model_type": "llama"}, {"m.weight": torch.empty(0), "n.weight": torch.ones(2)})
    for folder in (adapter_copy, tmp_path / "full"):
        message = r"tensors are empty \(.*ZeRO-3.*stage3_gather_16bit_weights_on_model_save"
        with pytest.raises(CheckpointError, match=message):
            read_model(open_folder(str(folder)))


def test_adapter_file_with_an_adapters_own_name_is_read_and_with_two_names_refused(tmp_path: Path) -> None:
    named = {name.replace(".weight", ".sft.weight"): tensor for name, tensor in FACTORS.items()}
    adapter = read_model(open_folder(str(write_adapter(tmp_path / "one", {}, named))))
    assert isinstance(adapter, Adapter)
    assert set(adapter.modules) == {"m"}
    both = named | {name.replace(".sft.", ".dpo."): tensor.clone() for name, tensor in named.items()}
    write_adapter(tmp_path / "two", {}, both)
    with pytest.raises(CheckpointError, match=r"holds 2 adapters \(dpo, sft\); save one .*selected_adapters"):
        read_model(open_folder(str(tmp_path / "two")))


def test_model_saved_with_its_adapter_unmerged_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers.0.q"
    names = [f"{prefix}.{part}.weight" for part in ("base_layer", "lora_A.default", "lora_B.default")]
    write_model(tmp_path, {"model_type": "llama"}, {name: torch.ones(2, 2) for name in names})
    with pytest.raises(
        CheckpointError, match=r"a base and a LoRA on it side by side .*save_pretrained.*merge_and_unload"
    ):
        read_model(open_folder(str(tmp_path)))


def test_state_that_transformer_engine_leaves_empty_is_no_ungathered_weight(tmp_path: Path) -> None:
    tensors = {"model.w": torch.ones(1), "model.layers.0._extra_state": torch.zeros(0, dtype=torch.uint8)}
    model = read_model(open_folder(str(write_model(tmp_path, {"model_type": "llama"}, tensors))))
    assert set(require_full_model(model, "full").tensors) == {"model.w"}
