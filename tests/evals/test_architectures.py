"""What vLLM's sources say of architectures, against vLLM itself."""

from __future__ import annotations

import pytest

from evals.architectures import architecture_of, has_experts
from evals.engine import LORA_MODULES
from fleet.core.errors import InputError
from fleet.core.identity import Json


def config(architecture: str, model_type: str, **fields: Json) -> dict[str, Json]:
    return {"architectures": [architecture], "model_type": model_type, **fields}


def test_architecture_of_llama_takes_lora_on_every_linear_of_its_layers() -> None:
    found = architecture_of(config("LlamaForCausalLM", "llama"), "m", on_cpu=True)
    assert found.why_no_lora == ""
    assert found.lora_modules is not None and set(LORA_MODULES) <= found.lora_modules
    assert not {"lm_head", "embed_tokens", "qkv_proj", "gate"} & found.lora_modules


def test_architecture_of_phi3_takes_lora_on_the_modules_that_it_fuses_itself() -> None:
    found = architecture_of(config("Phi3ForCausalLM", "phi3"), "m", on_cpu=True).lora_modules
    assert found is not None and {"qkv_proj", "gate_up_proj", "o_proj"} <= found and "q_proj" not in found


def test_architecture_of_gpt2_takes_no_lora() -> None:
    assert "no LoRA on GPT2LMHeadModel" in architecture_of(config("GPT2LMHeadModel", "gpt2"), "m", True).why_no_lora
    unnamed: dict[str, Json] = {"model_type": "gpt2"}
    assert architecture_of(unnamed, "m", True) == architecture_of(config("GPT2LMHeadModel", "gpt2"), "m", True)


def test_architecture_with_experts_takes_no_lora_on_a_cpu() -> None:
    mixtral = config("MixtralForCausalLM", "mixtral", num_local_experts=4)
    assert "mixture of experts" in architecture_of(mixtral, "m", on_cpu=True).why_no_lora
    assert architecture_of(mixtral, "m", on_cpu=False).why_no_lora == ""
    assert has_experts({"text_config": {"n_routed_experts": 8}})
    assert not has_experts({"num_experts": None, "num_experts_per_tok": 0})


def test_architecture_that_only_transformers_implements_is_served_if_its_attention_can_be_exchanged() -> None:
    assert architecture_of(config("BioGptForCausalLM", "biogpt"), "m", True).why_no_lora == ""
    with pytest.raises(InputError, match=r"^m: vLLM generates no text with XGLMForCausalLM"):
        architecture_of(config("XGLMForCausalLM", "xglm"), "m", on_cpu=True)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("BertForMaskedLM", "bert"),
        ("T5ForConditionalGeneration", "t5"),
        ("LlamaForSequenceClassification", "llama"),
        ("LlamaModel", "llama"),
        ("MyOwnForCausalLM", "mine"),
    ],
)
def test_architecture_that_writes_no_text_or_is_unknown_is_refused(architecture: str, model_type: str) -> None:
    with pytest.raises(InputError, match=architecture):
        architecture_of(config(architecture, model_type), "base.aligned: here", on_cpu=True)


@pytest.mark.vllm
def test_architectures_are_what_vllm_says() -> None:
    """Each class is loaded, which takes a while; vLLM's own answer for the architectures people bring most."""
    from vllm.model_executor.models import ModelRegistry, supports_lora

    names = {
        "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3", "Phi3ForCausalLM": "phi3", "Gemma2ForCausalLM": "gemma2",
        "Gemma3ForCausalLM": "gemma3", "GPT2LMHeadModel": "gpt2", "GPTJForCausalLM": "gptj",
        "MixtralForCausalLM": "mixtral", "Qwen3MoeForCausalLM": "qwen3_moe", "OPTForCausalLM": "opt",
        "BloomForCausalLM": "bloom", "FalconForCausalLM": "falcon",
    }  # fmt: skip
    for name, kind in names.items():
        model = ModelRegistry.models[name].load_model_cls()
        found = architecture_of(config(name, kind), "m", on_cpu=False)
        assert (name, not found.why_no_lora) == (name, supports_lora(model))
