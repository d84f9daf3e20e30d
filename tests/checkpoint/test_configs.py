from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fleet.checkpoint import configs
from fleet.checkpoint.belongs import check_belongs
from fleet.checkpoint.configs import (
    TIED_BY_DEFAULT,
    differences,
    text_field,
    ties_head,
    with_text_fields,
    without_text_fields,
)
from fleet.checkpoint.full_model import read_full_model
from fleet.core.errors import CheckpointError
from fleet.store import open_folder
from tests.pico import write_model

LLAMA = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
GEMMA = {"model_type": "gemma3_text"}
QWEN = {"model_type": "qwen2"}
LINEAR = {"factor": 2.0, "rope_theta": 5e5}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
PHI3 = {"model_type": "phi3", "max_position_embeddings": 131072}


def unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [str(found) for found in differences(ours, theirs)]


ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope as version 4 writes it": (
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": None},
        {**LLAMA, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}},
    ),
    "scaling under its old name": (
        {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {**LLAMA, "rope_parameters": {"rope_type": "linear", **LINEAR}},
    ),
    "a default written out": ({**LLAMA, "rope_theta": 10000.0, "mlp_bias": False, "hidden_act": "silu"}, LLAMA),
    "a head's width that follows": ({**LLAMA, "head_dim": 32}, LLAMA),
    "a head's width that only an engine reads": ({**QWEN, "head_dim": 128}, QWEN),
    "an activation's other name": ({**LLAMA, "hidden_act": "swish"}, LLAMA),
    "a number that went through float32": ({**LLAMA, "rms_norm_eps": 9.999999974752427e-07}, LLAMA),
    "a limit on length": ({**LLAMA, "max_position_embeddings": 64}, LLAMA),
    "bookkeeping": (
        {**LLAMA, "architectures": ["X"], "torch_dtype": "float16", "eos_token_id": 7, "use_cache": False,
         "attention_dropout": 0.1, "initializer_range": 1.0, "transformers_version": "4.1", "_name_or_path": "x"},
        LLAMA,
    ),
    "fields that no class reads": ({**LLAMA, "unsloth_fixed": True, "notes": "x", "is_causal": True}, LLAMA),
    "a window that is not used": (
        {**QWEN, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        {**QWEN, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21},
    ),
    "two ropes as version 4 writes them": (
        {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {**GEMMA, "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }},
    ),
    "a share of the rope in either place": (
        {"model_type": "phi", "partial_rotary_factor": 0.4},
        {"model_type": "phi", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}},
    ),
    "a nested default written out": (
        {"model_type": "gemma3", "text_config": {**GEMMA, "rms_norm_eps": 1e-6}},
        {"model_type": "gemma3", "text_config": GEMMA},
    ),
    "tied or not, which tensors say": ({**LLAMA, "tie_word_embeddings": True}, LLAMA),
    "remote code's bookkeeping": ({"model_type": "mine", "dtype": "x", "w": 1}, {"model_type": "mine", "w": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), ALIKE.values(), ids=ALIKE)
def test_configs_that_compute_alike_do_not_differ(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert unlike(ours, theirs) == unlike(theirs, ours) == []


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "rope theta in version 5's place": (
        {**LLAMA, "rope_parameters": {"rope_theta": 1e3, "rope_type": "default"}},
        {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        ["rope_parameters.rope_theta is 1000.0, not 10000.0"],
    ),
    "rope theta against the default": (
        {**LLAMA, "rope_theta": 1e3}, LLAMA, ["rope_parameters.rope_theta is 1000.0, not 10000.0"],
    ),
    "rope scaling": (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ["rope_parameters.factor is 2.0, not 4.0"],
    ),
    "a length that the rope follows": (
        {**LLAMA, "max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {**LLAMA, "max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ["max_position_embeddings is 64, not 128"],
    ),
    "one factor of a long rope": (
        {**PHI3, "original_max_position_embeddings": 4096, "rope_scaling": LONG},
        {**PHI3, "original_max_position_embeddings": 4096,
         "rope_scaling": {**LONG, "long_factor": [1.0] * 47 + [2.0]}},
        ["rope_parameters.long_factor[47] is 1.0, not 2.0"],
    ),
    "epsilon": ({**LLAMA, "rms_norm_eps": 1e-5}, LLAMA, ["rms_norm_eps is 1e-05, not 1e-06"]),
    "heads of another width": ({**LLAMA, "head_dim": 16}, LLAMA, ["head_dim is 16, not 32"]),
    "heads' width by class, not by division": (
        {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16},
        {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 64},
        ["head_dim is 128, not 64"],
    ),
    "activation": ({**LLAMA, "hidden_act": "gelu"}, LLAMA, ["hidden_act is 'gelu', not 'silu'"]),
    "what only an engine reads": ({**LLAMA, "logit_scale": 0.5}, LLAMA, ["logit_scale is 0.5, not None"]),
    "no window": ({"model_type": "mistral", "sliding_window": None}, {"model_type": "mistral"},
                  ["sliding_window is None, not 4096"]),
    "a window in later layers": (
        {**QWEN, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 10}, QWEN,
        ["layer_types[10] is 'sliding_attention', not 'full_attention'", "sliding_window is 4096, not None"],
    ),
    "types of layers": (
        {**GEMMA, "sliding_window_pattern": 4}, GEMMA,
        ["layer_types[3] is 'full_attention', not 'sliding_attention'"],
    ),
    "the rope of some layers": (
        {**GEMMA, "rope_local_base_freq": 2e4}, GEMMA,
        ["rope_parameters.sliding_attention.rope_theta is 20000.0, not 10000.0"],
    ),
    "attention's scale": ({**GEMMA, "query_pre_attn_scalar": 64}, GEMMA, ["query_pre_attn_scalar is 64, not 256"]),
    "soft caps": ({"model_type": "gemma2", "attn_logit_softcapping": None}, {"model_type": "gemma2"},
                  ["attn_logit_softcapping is None, not 50.0"]),
    "below text_config": (
        {"model_type": "gemma3", "text_config": {**GEMMA, "rope_theta": 5e5}},
        {"model_type": "gemma3", "text_config": GEMMA},
        ["text_config.rope_parameters.full_attention.rope_theta is 500000.0, not 1000000.0"],
    ),
    "experts per token": ({"model_type": "mixtral", "num_experts_per_tok": 1}, {"model_type": "mixtral"},
                          ["num_experts_per_tok is 1, not 2"]),
    "experts' weights": ({"model_type": "qwen3_moe", "norm_topk_prob": True}, {"model_type": "qwen3_moe"},
                         ["norm_topk_prob is True, not False"]),
    "multipliers": ({"model_type": "granite", "logits_scaling": 8.0, "residual_multiplier": 0.2},
                    {"model_type": "granite"},
                    ["logits_scaling is 8.0, not 1.0", "residual_multiplier is 0.2, not 1.0"]),
    "model_type": (QWEN, LLAMA, ["model_type is 'qwen2', not 'llama'"]),
    "remote code": ({"model_type": "mine", "theta": 1.0}, {"model_type": "mine", "theta": 2.0},
                    ["theta is 1.0, not 2.0"]),
    "what the class refuses": ({**LLAMA, "hidden_size": "x"}, LLAMA, ["hidden_size is 'x', not 128"]),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "found"), DIFFERENT.values(), ids=DIFFERENT)
def test_configs_that_compute_otherwise_differ_by_field_and_values(
    ours: dict[str, Any], theirs: dict[str, Any], found: list[str]
) -> None:
    assert unlike(ours, theirs) == found


def test_model_of_another_rope_refused_with_both_values_and_addresses(tmp_path: Path) -> None:
    """Its weights are the very same: only the config tells that it computes something else."""
    models = [
        read_full_model(
            open_folder(str(write_model(tmp_path / name, {**LLAMA, "rope_theta": theta}, {"w": torch.ones(2, 2)})))
        )
        for name, theta in (("aligned", 1e4), ("tuned", 1e3))
    ]
    with pytest.raises(CheckpointError, match=r"rope_parameters\.rope_theta is 1000\.0, not 10000\.0") as e:
        check_belongs(models[1], models[0])
    assert str(tmp_path / "aligned") in str(e.value)
    assert str(tmp_path / "tuned") in str(e.value)


@pytest.mark.slow
def test_configs_compared_without_torch_say_the_same() -> None:
    """Planning imports no torch: a program of its own reads the classes there."""
    ours, theirs, found = DIFFERENT["the rope of some layers"]
    code = (
        "import json, sys\n"
        "from fleet.checkpoint.configs import differences\n"
        "ours, theirs = json.load(sys.stdin)\n"
        "print([str(d) for d in differences(ours, theirs)])\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2], input=json.dumps([ours, theirs]), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == f"{found}\n[]\n", done.stderr


def test_equal_configs_are_read_by_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading one through its class may take a program of its own: not where there is nothing to see."""

    def refuse(read: list[str]) -> list[None]:
        raise AssertionError(read)

    monkeypatch.setattr(configs, "_read_configs", refuse)
    assert unlike({**LLAMA, "dtype": "float32", "transformers_version": "5.1"}, {**LLAMA, "use_cache": False}) == []


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma3_text"}, True),
        ({"model_type": "gemma3_text", "tie_word_embeddings": False}, False),
        ({"model_type": "llava", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"model_type": "mine", "llm_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "mine"}, False),
    ],
)
def test_head_is_tied_by_the_config_or_its_classs_default(config: dict[str, Any], tied: bool) -> None:
    assert ties_head(config) is tied


@pytest.mark.slow
def test_table_of_tied_classes_is_that_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kinds: set[str] = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known = {kind for kind in kinds if kind in CONFIG_MAPPING}
    assert {k for k in known if getattr(CONFIG_MAPPING[k], "tie_word_embeddings", None) is True} == TIED_BY_DEFAULT


def test_fields_are_read_and_written_where_a_config_has_them() -> None:
    nested = {"model_type": "llava", "text_config": {"vocab_size": 5, "eos_token_id": 1}, "eos_token_id": 1}
    assert text_field(nested, "vocab_size") == 5
    assert text_field({"n_layer": 3}, "num_hidden_layers", "n_layer") == 3
    assert with_text_fields(nested, {"vocab_size": 7, "eos_token_id": 2, "bos_token_id": 0}) == {
        "model_type": "llava",
        "text_config": {"vocab_size": 7, "eos_token_id": 2, "bos_token_id": 0},
        "eos_token_id": 2,
    }
    assert without_text_fields(nested, ["eos_token_id"]) == {"model_type": "llava", "text_config": {"vocab_size": 5}}
    assert with_text_fields({"vocab_size": 5}, {"vocab_size": 7}) == {"vocab_size": 7}


def test_yarns_defaults_left_out_on_one_side_are_filled_in() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    silent = LLAMA | {"rope_parameters": yarn}
    assert unlike(LLAMA | {"rope_parameters": {**yarn, "beta_fast": 32, "beta_slow": 1.0}}, silent) == []
    assert unlike(LLAMA | {"rope_parameters": {**yarn, "beta_fast": 16}}, silent) == [
        "rope_parameters.beta_fast is 16, not 32"
    ]


def test_number_that_no_float_holds_is_a_difference() -> None:
    (found,) = unlike(LLAMA | {"rms_norm_eps": 10**400}, LLAMA | {"rms_norm_eps": 1e-6})
    assert found.startswith("rms_norm_eps is 1000000")


def test_config_nested_deeper_than_its_class_can_copy_is_compared_as_written() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    assert any(found.startswith("note is [[[") for found in unlike(LLAMA | {"note": deep}, LLAMA))
