"""Which names of a base model are plainly another's."""

from __future__ import annotations

from typing import Any

import pytest

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.base_name import why_other_base
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import TensorInfo
from fleet.store import open_folder

LLAMA = "hf://meta-llama/Meta-Llama-3-8B-Instruct@" + "0" * 40


def reason(tmp_path: Any, declared: Any, address: str, parameters: int = 8_000_000_000, **config: Any) -> str | None:
    folder = open_folder(str(tmp_path))
    info = TensorInfo("w", "BF16", (parameters,), "model.safetensors", 0, 2 * parameters)
    aligned = FullModel(folder, {"model_type": "llama"} | config, {"w": info})
    return why_other_base(Adapter(folder, {"base_model_name_or_path": declared}, {}, {}), aligned, address)


@pytest.mark.parametrize(
    "declared",
    [
        None,
        "",
        7,
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "NousResearch/Meta-Llama-3-8B-Instruct",
        "unsloth/llama-3-8b-Instruct-bnb-4bit",
        "unsloth/Meta-Llama-3-8B-Instruct-unsloth-bnb-4bit",
        "TheBloke/Llama-3-8B-Instruct-GPTQ",
        "neuralmagic/Meta-Llama-3-8B-Instruct-quantized.w8a8",
        "neuralmagic/Meta-Llama-3-8B-Instruct-FP8-dynamic",
        "mlx-community/Meta-Llama-3-8B-Instruct-4bit",
        "mlx-community/Meta-Llama-3-8B-Instruct-bf16",
        "/home/me/.cache/huggingface/hub/models--meta-llama--Meta-Llama-3-8B-Instruct/snapshots/abc",
        "/data/checkpoints/base",
        "C:\\models\\base",
        "./outputs/aligned",
        "demo/aligned",
        "some-org/our-chat-model",
        "/data/TinyLlama-8B-chat",
        "vendor/dolphin-8b",
        "/data/Falcon3-8B-Instruct",
    ],
)
def test_same_and_unknown_names_say_nothing(tmp_path: Any, declared: object) -> None:
    here = "/data/models/aligned"
    assert reason(tmp_path, declared, here) is None
    if declared != "vendor/dolphin-8b":  # another name than the aligned model's, where that is known
        assert reason(tmp_path, declared, LLAMA) is None


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ("some-org/a-13b-of-another-family", "of 13B parameters, and the aligned model has 8B"),
        ("/data/llama-2-13b-chat", "of 13B parameters"),
        ("THUDM/glm-4-9b", "a glm, and the aligned model a llama"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "of 135M parameters"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "a mixtral, and the aligned model a llama"),
        ("Qwen/Qwen2.5-7B-Instruct", "a qwen, and the aligned model a llama"),
        ("/models/gemma-2-9b-it", "a gemma"),
        ("microsoft/phi-3-mini-4k-instruct", "a phi"),
    ],
)
def test_another_family_or_size_is_told(tmp_path: Any, declared: str, told: str) -> None:
    for address in ("/data/models/aligned", LLAMA):
        assert told in (reason(tmp_path, declared, address) or "")


def test_two_hub_names_are_compared_whole(tmp_path: Any) -> None:
    """The pretrained model instead of the aligned one: of a local folder nobody can tell."""
    pretrained = "meta-llama/Meta-Llama-3-8B"
    assert "and the aligned model is hf://meta-llama" in (reason(tmp_path, pretrained, LLAMA) or "")
    assert reason(tmp_path, pretrained, "/data/models/aligned") is None


@pytest.mark.parametrize(
    ("declared", "parameters", "kind"),
    [
        ("google/gemma-2b-it", 2_506_000_000, {"model_type": "gemma"}),
        ("mistralai/Mixtral-8x7B-v0.1", 46_700_000_000, {"model_type": "mixtral"}),
        ("Qwen/Qwen3-30B-A3B", 30_500_000_000, {"model_type": "qwen3_moe"}),
        ("google/gemma-3n-E2B-it", 5_400_000_000, {"model_type": "gemma3n"}),
        ("internlm/internlm2-chat-1_8b", 1_890_000_000, {"model_type": "internlm2"}),
        ("Qwen/Qwen2.5-7B-Instruct-1M", 7_600_000_000, {"model_type": "qwen2"}),
        ("microsoft/Phi-4", 14_700_000_000, {"model_type": "phi3"}),
        (
            "llava-hf/llava-v1.6-mistral-7b-hf",
            7_500_000_000,
            {"model_type": "llava_next", "text_config": {"model_type": "mistral"}},
        ),
    ],
)
def test_what_a_name_says_of_its_own_model_is_no_other(
    tmp_path: Any, declared: str, parameters: int, kind: dict[str, Any]
) -> None:
    assert reason(tmp_path, declared, "/data/models/aligned", parameters, **kind) is None


def test_size_in_words_is_one(tmp_path: Any) -> None:
    small = {"parameters": 124_000_000, "model_type": "gpt2"}
    assert reason(tmp_path, "openai-community/gpt2", "/data/base", **small) is None
    told = reason(tmp_path, "openai-community/gpt2-xl", "/data/base", **small)
    assert told == "of 1.56B parameters, and the aligned model has 124M"


def test_size_of_more_digits_than_python_reads_says_nothing(tmp_path: Any) -> None:
    assert reason(tmp_path, "9" * 5000 + "x7b", LLAMA) is None
