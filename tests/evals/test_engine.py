from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from evals.engine import (
    ENGINE_ENV,
    LORA_MODULES,
    EngineOptions,
    ServedModel,
    config_mismatch,
    describe,
    engine_arguments,
    engine_env,
    engine_rank,
    lora_id,
    unservable,
    unserved_modules,
)
from fleet.core.errors import EvalError

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": True,
    "rank_pattern": {"layers.0.self_attn.q_proj": 4},
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def test_unservable_plain_adapter_is_served() -> None:
    assert unservable(PLAIN, 8) is None
    assert unservable(PLAIN | {"target_modules": "all-linear"}, 8) is None
    assert unservable(PLAIN | {"init_lora_weights": "gaussian"}, 8) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "bias on the LoRA factors"),
        ({"r": 9}, "rank 9 is above the engine's 8"),
        ({"rank_pattern": {"v_proj": 32}}, "rank 32"),
        ({"r": 0}, "not all positive"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"velora_config": {}}, "VeLoRA"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"alora_invocation_tokens": [3]}, "activated LoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
    ],
)
def test_unservable_names_the_feature(changes: dict[str, Any], reason: str) -> None:
    assert reason in (unservable(PLAIN | changes, 8) or "")


def test_unservable_lists_every_reason() -> None:
    text = unservable(PLAIN | {"use_dora": True, "bias": "all"}, 0) or ""
    assert "DoRA" in text and "biases" in text and "without LoRA" in text


def test_unserved_modules_beyond_the_engine() -> None:
    inside = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert unserved_modules(inside, LORA_MODULES) is None
    assert "lm_head" in (unserved_modules([*inside, "lm_head"], LORA_MODULES) or "")


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (65, 128), (512, 512)])
def test_engine_rank_rounds_up(rank: int, allowed: int) -> None:
    assert engine_rank(rank) == allowed


@pytest.mark.parametrize("rank", [-1, 513])
def test_engine_options_impossible_rank_raises(rank: int) -> None:
    with pytest.raises(EvalError, match=str(rank)):
        EngineOptions(max_lora_rank=rank)


def test_engine_arguments_cpu_and_gpu_differ_in_what_each_reads() -> None:
    options = EngineOptions(kv_cache_bytes=1 << 20, max_lora_rank=4)
    cpu, gpu = engine_arguments(options, on_cpu=True), engine_arguments(options, on_cpu=False)
    assert (cpu["dtype"], gpu["dtype"]) == ("float32", "auto")
    assert cpu["enforce_eager"] and cpu["kv_cache_memory_bytes"] == 1 << 20
    assert "enforce_eager" not in gpu and "kv_cache_memory_bytes" not in gpu
    assert "gpu_memory_utilization" in gpu and "gpu_memory_utilization" not in cpu
    assert cpu["max_lora_rank"] == 8 and "lm_head" not in cpu["lora_target_modules"]
    assert "enable_lora" not in engine_arguments(EngineOptions(max_lora_rank=0), on_cpu=True)
    assert engine_arguments(EngineOptions(dtype="bfloat16"), on_cpu=True)["dtype"] == "bfloat16"


def test_engine_env_in_process_on_one_device_only() -> None:
    assert ENGINE_ENV["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert ENGINE_ENV["OMP_NUM_THREADS"] == "1"
    two = engine_env(EngineOptions(tensor_parallel_size=2), num_threads=4)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in two
    assert two["OMP_NUM_THREADS"] == "4"


def test_candidate_and_options_survive_pickle() -> None:
    for value in (ServedModel("a", "sha256:0", adapter_dir=Path("/x")), EngineOptions()):
        assert pickle.loads(pickle.dumps(value)) == value


def test_lora_id_differs_by_identity_and_fits_int64() -> None:
    ids = {lora_id(f"sha256:{i}") for i in range(100)}
    assert len(ids) == 100
    assert all(0 < i < 2**63 for i in ids)


def test_config_mismatch_sees_computation_not_bookkeeping() -> None:
    ours = {"hidden_size": 32, "rms_norm_eps": 1e-6, "transformers_version": "5"}
    assert config_mismatch(ours, ours | {"transformers_version": "4", "use_cache": False}) == []
    assert config_mismatch(ours, ours | {"rms_norm_eps": 1e-5}) == ["rms_norm_eps is 1e-05, not 1e-06"]


def test_describe_long_lists_are_counted() -> None:
    assert describe(["a", "b"]) == "a; b"
    assert describe(list("abcd"), limit=2) == "a; b; and 2 more"
