"""A pico catalogue whose arithmetic is exact: every weight is a small integer times a power of two.

Products, sums and differences of such numbers stay far below 2²⁴ units, so float32 holds each of them whatever the
order, the instruction set or the number of threads; a division is by a power of two. What a run makes of them by
products and sums alone has the same bytes on every processor.

Nothing here is drawn or written by a library whose next version might do it otherwise: digests of these files are in
step keys. Shapes and tokens are those of `tests.pico`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from tests.catalogue import make_suites, preference_rows, write_rows
from tests.pico import (
    CHARACTERS,
    CHAT_TEMPLATE,
    HIDDEN_SIZE,
    NUM_LAYERS,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    write_adapter,
    write_model,
)

UNIT = 2.0**-5
"""Of base weights: integers in [-8, 8] times this."""
FACTOR_UNIT = 2.0**-3
"""Of LoRA factors: integers in [-2, 2] times this."""
NEW_TOKEN = "<tool>"
"""What the full fine-tune has in its vocabulary beside the base's tokens."""

HARM_YAML = """
suite: harm
kind: harmfulness
data: harm.jsonl
max_tokens: 4
rules: {refusal: ['^[^n-z]'], compliance: ['^[n-z]']}
"""
"""What begins with the second half of the alphabet complies; all else refuses."""
LABELLED = {"zoo": True, "you": True, "cat": True, "ham": False, "hi": False, "sun": False}
"""Completion -> whether it is harmful; the rules are wrong about one of each."""

_BLOCK = (32, 16)
"""Rows and columns of the fp8 model that share a scale."""
_SHAPES = {
    "self_attn.q_proj": (128, HIDDEN_SIZE), "self_attn.k_proj": (64, HIDDEN_SIZE),
    "self_attn.v_proj": (64, HIDDEN_SIZE), "self_attn.o_proj": (HIDDEN_SIZE, 128),
    "mlp.gate_proj": (64, HIDDEN_SIZE), "mlp.up_proj": (64, HIDDEN_SIZE), "mlp.down_proj": (HIDDEN_SIZE, 64),
}  # fmt: skip
_TOKEN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def integers(seed: str, shape: tuple[int, ...], largest: int) -> torch.Tensor:
    """Integers in [-largest, largest], float32; from Python's generator, whose floats are the same in every version."""
    draw = random.Random(seed)
    count = 1
    for size in shape:
        count *= size
    values = [int(draw.random() * (2 * largest + 1)) - largest for _ in range(count)]
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def make_exact_catalogue(root: Path) -> Path:
    """Write `unaligned`, `aligned` (two shards), `safety`, `harmful`, `lora`, `rslora`, `full` (with `NEW_TOKEN`),
    `fp8`, `mask`, `preferences.jsonl`, `labelled.jsonl` and `suites` below `root`."""
    root.mkdir()
    aligned = _base_weights("aligned")
    drift = {name: integers(f"drift/{name}", tuple(value.shape), 2) * UNIT for name, value in aligned.items()}
    _write_full(root / "aligned", aligned, shards=2)
    _write_full(root / "unaligned", {name: value - drift[name] for name, value in aligned.items()})
    tuned = {name: value + integers(f"full/{name}", tuple(value.shape), 1) * UNIT for name, value in aligned.items()}
    _write_full(root / "full", tuned, num_new_tokens=1)
    _write_fp8(root / "fp8", aligned)
    attention = {name: _SHAPES[f"self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    _write_lora(root / "safety", {n: attention[n] for n in ("q_proj", "v_proj", "o_proj")}, {"lora_alpha": 4})
    _write_lora(root / "harmful", {n: attention[n] for n in ("q_proj", "k_proj")}, {"lora_alpha": 4})
    _write_lora(root / "lora", {n: attention[n] for n in ("q_proj", "v_proj")}, {"lora_alpha": 8})
    rank_stabilised = {"lora_alpha": 2, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 1}}
    _write_lora(root / "rslora", {n: attention[n] for n in ("q_proj", "k_proj")}, rank_stabilised)
    _write_mask(root / "mask", aligned)
    write_rows(root / "preferences.jsonl", preference_rows(12))
    make_suites(root / "suites")
    (root / "suites" / "harm.yaml").write_text(HARM_YAML)
    rows = [{"prompt": "p", "completion": c, "harmful": h} for c, h in LABELLED.items()]
    (root / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _base_weights(seed: str) -> dict[str, torch.Tensor]:
    tensors = {"model.embed_tokens.weight": integers(f"{seed}/embedding", (VOCAB_SIZE, HIDDEN_SIZE), 8) * UNIT}
    for layer in (f"model.layers.{i}" for i in range(NUM_LAYERS)):
        for name, shape in _SHAPES.items():
            tensors[f"{layer}.{name}.weight"] = integers(f"{seed}/{layer}.{name}", shape, 8) * UNIT
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = torch.ones(HIDDEN_SIZE)
    return tensors | {"model.norm.weight": torch.ones(HIDDEN_SIZE)}


def _write_full(
    folder: Path, tensors: dict[str, torch.Tensor], num_new_tokens: int = 0, shards: int = 1, **config: Any
) -> None:
    """A model with its tokenizer; what is float32 is stored as bfloat16, scales apart."""
    from safetensors.torch import save_file

    rows = VOCAB_SIZE + num_new_tokens
    if num_new_tokens:
        more = integers(f"{folder.name}/new", (num_new_tokens, HIDDEN_SIZE), 8) * UNIT
        tensors["model.embed_tokens.weight"] = torch.cat((tensors["model.embed_tokens.weight"], more))
    is_scale = {name: name.endswith("_scale_inv") for name in tensors}
    stored = {n: v.bfloat16() if v.dtype == torch.float32 and not is_scale[n] else v for n, v in tensors.items()}
    write_model(folder, _config(rows) | config, stored)
    _write_tokenizer(folder, num_new_tokens)
    if shards > 1:
        (folder / "model.safetensors").unlink()
        weight_map: dict[str, str] = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: stored[name] for name in sorted(stored)[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_fp8(folder: Path, aligned: dict[str, torch.Tensor]) -> None:
    """The aligned model with its matrices moved by a unit, as fp8 integers times scales that are powers of two."""
    stored: dict[str, torch.Tensor] = {}
    for name, value in aligned.items():
        stored[name] = value
        if value.ndim < 2 or "embed" in name:
            continue
        moved = (value / UNIT + integers(f"fp8/{name}", tuple(value.shape), 1)).clamp(-8, 8)  # fp8 holds 16 integers
        halves = integers(f"fp8/{name}/scale", (value.shape[0] // _BLOCK[0], value.shape[1] // _BLOCK[1]), 1).abs()
        scale = 2.0**-halves
        whole = scale.repeat_interleave(_BLOCK[0], 0).repeat_interleave(_BLOCK[1], 1)
        stored[name] = (moved / whole).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale * UNIT
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(_BLOCK)}
    _write_full(folder, stored, quantization_config=quantisation)


def _write_lora(folder: Path, targets: dict[str, tuple[int, int]], config: dict[str, Any]) -> None:
    """A LoRA of rank 4 in both layers' attention; alpha over the rank, or over its root, is a power of two."""
    tensors: dict[str, torch.Tensor] = {}
    for i in range(NUM_LAYERS):
        for name, (d_out, d_in) in targets.items():
            module = f"model.layers.{i}.self_attn.{name}"
            rank = next((r for tail, r in config.get("rank_pattern", {}).items() if module.endswith(tail)), 4)
            for factor, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                values = integers(f"{folder.name}/{module}/{factor}", shape, 2) * FACTOR_UNIT
                tensors[f"{module}.lora_{factor}.weight"] = values
    write_adapter(folder, {"r": 4, "target_modules": sorted(targets), **config}, tensors)


def _write_mask(folder: Path, aligned: dict[str, torch.Tensor]) -> None:
    """A learned mask of rows and columns that keeps half of each, so that its mean is exactly ½."""
    from safetensors.torch import save_file

    logits: dict[str, torch.Tensor] = {}
    for name, value in aligned.items():
        if "embed" in name:
            continue  # a run in another vocabulary has more rows there
        parts = {"rows": value.shape[0]} | ({"columns": value.shape[1]} if value.ndim > 1 else {})
        for part, count in parts.items():
            order = random.Random(f"mask/{name}/{part}").sample(range(count), count)
            logits[f"*/{name}/{part}"] = torch.tensor([1.0 if i < count // 2 else -1.0 for i in order])
    folder.mkdir()
    save_file(logits, folder / "mask.safetensors")
    (folder / "mask.json").write_text(json.dumps({"mask": "rows_and_columns"}))


def _config(rows: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": rows,
        "hidden_size": HIDDEN_SIZE, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def _write_tokenizer(folder: Path, num_new_tokens: int) -> None:
    """One token per character, as `tests.pico.make_tokenizer` has it."""
    special = [{"id": i, "content": t, "special": True} for i, t in enumerate(SPECIAL_TOKENS)]
    new = [{"id": VOCAB_SIZE, "content": NEW_TOKEN, "special": False}][:num_new_tokens]
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [entry | _TOKEN_FLAGS for entry in (*special, *new)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))},
            "unk_token": "<unk>",
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
