"""Pico models for tests: real Hugging Face folders, small enough that vLLM loads one in a second.

A pico Llama has hidden size 32, two layers, four heads, two key-value heads and a tokenizer of one token per
character. Its weights are drawn from a wide normal, so greedy decoding has clear winners and does not depend
on the last bit of a sum. Heads are 32 wide, the smallest that vLLM's CPU attention takes.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
HIDDEN_SIZE = 32
NUM_LAYERS = 2

# The template writes the BOS itself, as Llama 3's does: encoding its text with special tokens doubles it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder: Path) -> Path:
    """Writes a character-level tokenizer with a chat template into `folder`, and returns `folder`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def make_model(
    folder: Path,
    seed: int,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    shards: int = 1,
    tie: bool = True,
    attention_bias: bool = False,
) -> Path:
    """Writes a pico Llama with its tokenizer into `folder`, and returns `folder`.

    `shards` > 1 writes that many safetensors files and their index; with `tie` there is no lm_head tensor; with
    `attention_bias` the projections of the attention have biases.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        attention_bias=attention_bias,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        pad_token_id=SPECIAL_TOKENS.index("</s>"),
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    model = LlamaForCausalLM(config)
    model.float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "embed" in name or "lm_head" in name:
                # Special tokens, the EOS among them, stay improbable: completions run to their limit.
                parameter[: len(SPECIAL_TOKENS)] *= 0.1
    model.to(dtype=getattr(torch, dtype))  # type: ignore[call-arg]  # transformers' decorator hides `self`
    # One saved generation config, greedy and without limits of its own.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    make_tokenizer(folder)
    if shards == 1:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tensors = dict(model.state_dict())
        if tie:
            del tensors["lm_head.weight"]
        _save_shards(folder, tensors, shards)
    return folder


def make_gpt2(folder: Path, seed: int, heads: int = 4) -> Path:
    """Writes a pico GPT-2, whose modules are Conv1Ds and whose head is tied, into `folder`, and returns `folder`.

    With one of `heads` an engine on a CPU takes it.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=HIDDEN_SIZE, n_layer=2, n_head=heads)
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    model_dir: Path,
    seed: int,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **options: Any,
) -> Path:
    """Writes a PEFT LoRA adapter of the model at `model_dir` into `folder`, and returns `folder`.

    PEFT itself writes it; both factors are drawn, so that the adapter changes the model visibly. `targets` as a string
    is PEFT's regular expression or shorthand; `options` are more fields of LoraConfig, and whatever they make trainable
    is moved too.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT multiplies by it; floats are fine
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
        **options,
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft_model.named_parameters()):
            if not parameter.requires_grad:
                continue
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            # A magnitude, a bias or a saved module starts from the base's; a factor does not.
            parameter.copy_(
                drawn if "lora_A" in name or "lora_B" in name or "lora_embedding" in name else parameter + drawn
            )
    peft_model.save_pretrained(str(folder), safe_serialization=True)
    return folder


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Writes a checkpoint of these tensors and this `config.json` into `folder`, and returns `folder`."""
    return _write(folder, "config.json", config, "model.safetensors", tensors)


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Writes an adapter of these tensors, named without PEFT's prefix, into `folder`, and returns `folder`.

    `config` is what differs from a LoRA of rank 1 and alpha 1.
    """
    full = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, **config}
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return _write(folder, "adapter_config.json", full, "adapter_model.safetensors", named)


def _write(
    folder: Path, config_file: str, config: Mapping[str, Any], file: str, tensors: Mapping[str, torch.Tensor]
) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / config_file).write_text(json.dumps(config))
    save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    return folder


def _save_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    """Splits the tensors, in name order, into `shards` files with a Hugging Face index."""
    from safetensors.torch import save_file

    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
