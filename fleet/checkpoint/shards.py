"""Which files a model is written to, and where: known from headers alone, so that planning needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

ADAPTER_FILE = "adapter_model.safetensors"
"""The file of a whole adapter."""

LORA_VALUE_BYTES = 4
"""Adapters we write are float32: a sum of products is then exact to rounding, and they are small."""


@dataclass(frozen=True)
class Output:
    """Where files are written: a store's URI, and a prefix of keys in it."""

    store: str
    prefix: str


@dataclass(frozen=True)
class Shard:
    """One output file: which base tensors it holds, and whether this unit also writes the files beside the weights."""

    file: str
    tensors: tuple[str, ...]
    weight_map: dict[str, str] | None
    """Tensor -> file of the whole model, on the one shard that writes the small files; None on the others."""
