"""Checkpoints of real models' shapes with random weights, and LoRA adapters on them, for measuring speed.

One block of Gaussian numbers serves every tensor, each from an offset of its own, so that writing is as fast as the
disk. The aligned model is the base plus noise of `DISPLACEMENT` times its norm, so V has full rank in every module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fleet.checkpoint.adapter import PEFT_PREFIX
from fleet.checkpoint.tensors import TensorLayout, write_tensors
from fleet.store.local import LocalStore


@dataclass(frozen=True)
class Shapes:
    """A Llama's sizes."""

    name: str
    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    """Whether the embedding is the output head, too."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module within a layer -> (d_out, d_in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, in the file's order."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.{module}.weight": shape for module, shape in self.linears.items()}
            shapes |= {f"{prefix}.{n}.weight": (self.hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocabulary, self.hidden)}


LLAMA_2_7B = Shapes("llama-2-7b", 4096, 11008, 32000, 32, 32, 32, tied=False)
SMOLLM2_135M = Shapes("smollm2-135m", 576, 1536, 49152, 30, 9, 3, tied=True)

RANK = 16
WEIGHT_SCALE = 0.02
DISPLACEMENT = 0.05
"""‖V‖/‖W‖."""

_BLOCK = 1 << 26
"""Numbers in a block; more than the largest module has, so that no module repeats itself."""

_STEP = 7_919_003
"""Offset from one tensor to the next within the block: a prime."""

_SHARD_LAYERS = 8
"""Layers in a shard: about 3 GB in bf16 of a 7B model."""


class Values:
    """Slices of blocks of random numbers, bf16."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(_BLOCK, generator=generator).mul_(WEIGHT_SCALE)
        moved = torch.randn(_BLOCK, generator=generator).mul_(DISPLACEMENT * WEIGHT_SCALE).add_(base)
        self.blocks = {"base": base.bfloat16(), "aligned": moved.bfloat16()}

    def of(self, block: str, index: int, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        """The tensor with this index, from the block `base` or `aligned`, times `scale`: of this shape, bf16."""
        count, start = torch.Size(shape).numel(), index * _STEP % _BLOCK
        values = self.blocks[block]
        parts: list[torch.Tensor] = []
        while count > 0:
            parts.append(values[start : start + count])
            count -= parts[-1].numel()
            start = 0
        whole = torch.cat(parts).reshape(shape)
        return whole if scale == 1.0 else whole.mul_(scale)


def write_model(folder: Path, block: str, values: Values, sizes: Shapes) -> None:
    """A full model: shards, their index and config.json, which is written last and says that the rest is there."""
    store = LocalStore(folder)
    shapes = sizes.tensors
    count = -(-sizes.layers // _SHARD_LAYERS)
    files: dict[str, list[str]] = {}
    for name in shapes:
        shard = int(name.split(".")[2]) // _SHARD_LAYERS if ".layers." in name else 0 if "embed" in name else count - 1
        files.setdefault(f"model-{shard + 1:05d}-of-{count:05d}.safetensors", []).append(name)
    index = {name: i for i, name in enumerate(shapes)}

    def tensors(names: list[str]) -> Iterator[list[torch.Tensor]]:
        for name in names:
            yield [torch.ones(sizes.hidden) if len(shapes[name]) == 1 else values.of(block, index[name], shapes[name])]

    for file, names in files.items():
        write_tensors(store, file, [TensorLayout(name, "BF16", shapes[name]) for name in names], tensors(names))
    weight_map = {name: file for file, names in files.items() for name in names}
    store.replace("model.safetensors.index.json", _json({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": sizes.tied,
        "torch_dtype": "bfloat16",
    }
    store.replace("config.json", _json(config))


def write_adapter(folder: Path, number: int, values: Values, sizes: Shapes) -> None:
    """A PEFT adapter of rank `RANK` on every linear module, bf16; adapter_config.json is written last."""
    store = LocalStore(folder)
    layout: list[TensorLayout] = []
    for layer in range(sizes.layers):
        for module, (d_out, d_in) in sizes.linears.items():
            name = f"{PEFT_PREFIX}model.layers.{layer}.{module}"
            layout.append(TensorLayout(f"{name}.lora_A.weight", "BF16", (RANK, d_in)))
            layout.append(TensorLayout(f"{name}.lora_B.weight", "BF16", (d_out, RANK)))
    first = (number + 1) * len(layout)
    # Training starts B at zero, so it is smaller than A.
    tensors = (
        [values.of("base", first + i, entry.shape, 0.1 if "lora_B" in entry.name else 1.0)]
        for i, entry in enumerate(layout)
    )
    write_tensors(store, "adapter_model.safetensors", layout, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "aligned",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rpartition(".")[2] for module in sizes.linears}),
        "bias": "none",
    }
    store.replace("adapter_config.json", _json(config))


def generate(folder: Path, sizes: Shapes, adapters: int) -> None:
    """Write `base`, `aligned` and `adapter-00`… of these sizes to a folder; what is there already stays."""
    values: Values | None = None
    for name in ("base", "aligned", *(f"adapter-{i:02d}" for i in range(adapters))):
        is_adapter = name.startswith("adapter")
        if (folder / name / ("adapter_config.json" if is_adapter else "config.json")).exists():
            continue
        values = values or Values()
        if is_adapter:
            write_adapter(folder / name, int(name.partition("-")[2]), values, sizes)
        else:
            write_model(folder / name, name, values, sizes)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
