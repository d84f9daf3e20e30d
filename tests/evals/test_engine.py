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
    engine_length,
    engine_rank,
    lora_id,
    model_length,
    unservable,
    unserved_modules,
)
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.model import read_model
from fleet.core.errors import EvalError, InputError
from fleet.store import open_folder
from tests.pico import write_adapter

Q, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


def lora_of(folder: Path, rank: int, *modules: str, **config: Any) -> Adapter:
    import torch

    tensors = {
        f"{module}.{factor}.weight": torch.zeros(shape)
        for module in modules
        for factor, shape in (("lora_A", (rank, 4)), ("lora_B", (4, rank)))
    }
    if config.get("use_dora"):
        tensors |= {f"{module}.lora_magnitude_vector": torch.ones(4) for module in modules}
    adapter = read_model(open_folder(str(write_adapter(folder, {"r": rank, **config}, tensors))))
    assert isinstance(adapter, Adapter)
    return adapter


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "gaussian"},
        {"bias": "all"},  # of a model without biases: nothing was trained beside the factors
        {"r": 64, "rank_pattern": {"q_proj": 8}},
        {"r": 8.0},
    ],
)
def test_unservable_plain_lora_is_served_whatever_its_config_says_beside_it(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    assert unservable(lora_of(tmp_path, 8, Q, **config), 8, LORA_MODULES) is None


def test_unservable_names_every_reason(tmp_path: Path) -> None:
    head = lora_of(tmp_path / "head", 16, Q, "lm_head")
    assert "output head" in (unservable(head, 16) or "")
    assert "rank 16 is above the engine's 8" in (unservable(lora_of(tmp_path / "q", 16, Q), 8) or "")
    dora = unservable(lora_of(tmp_path / "dora", 4, Q, use_dora=True), 0) or ""
    assert "DoRA" in dora and "without LoRA" in dora


def test_unserved_modules_are_those_no_engine_has_and_experts() -> None:
    inside = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert unserved_modules(inside, LORA_MODULES) == set()
    assert unserved_modules([*inside, "model.layers.0.mlp.gate"], LORA_MODULES) == {"gate"}
    assert unserved_modules([*inside, "model.layers.0.mlp.gate"], None) == set()
    assert unserved_modules(["model.layers.0.mlp.experts.3.down_proj"], None) == {"experts.3.down_proj"}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 256}, 256),
        ({"n_ctx": 512}, 512),
        ({"max_seq_len": 300}, 300),
        ({"seq_length": 300, "max_position_embeddings": 200}, 200),
        ({"text_config": {"max_position_embeddings": 128}}, 128),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 4.0}}, 400),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 100),
        ({}, None),
    ],
)
def test_model_length_is_found_under_every_name(config: dict[str, Any], length: int | None) -> None:
    assert model_length(config) == length


def test_engine_length_is_the_models_own_up_to_the_default_and_refuses_more() -> None:
    assert engine_length({"max_position_embeddings": 131072}, None, "m") == 4096
    assert engine_length({"max_position_embeddings": 131072}, 8192, "m") == 8192
    assert engine_length({}, None, "m") == 2048
    with pytest.raises(InputError, match=r"max_model_len is 512, but m has 256 positions"):
        engine_length({"n_positions": 256}, 512, "m")


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
