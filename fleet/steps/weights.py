"""How a model is written, LoRA or full, and what that costs: realign and fuse steps ask the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from evals.engine import MAX_SERVED_RANK, unserved_modules
from fleet.checkpoint.shards import LORA_VALUE_BYTES
from fleet.core.identity import Json
from fleet.steps.context import PlanContext


class WrittenSize(NamedTuple):
    """How a model is written, and what that costs."""

    as_lora: bool
    rank: int
    spec: dict[str, Json]
    """What of it decides the bytes."""
    read_bytes: int
    """Of the aligned model, which a full model is written on."""
    write_bytes: int


def written_size(context: PlanContext, tensors: Iterable[str], rank: int, is_lora: bool) -> WrittenSize:
    """A LoRA where it is one and some engine serves its rank and modules; else a full model, in shards.

    Args:
        rank: the largest of any module.
        is_lora: whether all that it is made of are LoRAs.
    """
    aligned, served = context.bases.aligned_model, context.bases.aligned.architecture.lora_modules
    tensors = tuple(tensors)
    modules = [tensor.removesuffix(".weight") for tensor in tensors]
    if is_lora and rank <= MAX_SERVED_RANK and not unserved_modules(modules, served):
        values = sum(rank * sum(aligned.tensors[tensor].shape) for tensor in tensors)
        return WrittenSize(True, rank, {}, 0, values * LORA_VALUE_BYTES)
    spec: dict[str, Json] = {"shard_bytes": context.manifest.checkpoint.shard_bytes}
    size = context.bases.aligned.model.num_bytes
    return WrittenSize(False, 0, spec, size, size)
