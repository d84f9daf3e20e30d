"""A model's tables of tokens: its embedding, and the output head, which may be the embedding again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fleet.checkpoint.headers import KNOWN_DTYPE_BYTES, TensorInfo
from fleet.store import Folder

TOKEN_TABLES = frozenset({"embed_tokens", "embed_in", "word_embeddings", "wte", "tokens_embed"})
HEADS = frozenset({"lm_head", "embed_out"})

_CHUNK_VALUES = 1 << 21
"""Values that are compared at once."""


def output_head(tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The output head's weight among a model's tensors; None where there is none, or there are several."""
    return _only(tensors, HEADS)


def token_table(tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The embedding among a model's tensors; None where there is none, or there are several."""
    return _only(tensors, TOKEN_TABLES)


def _only(tensors: Mapping[str, TensorInfo], modules: frozenset[str]) -> TensorInfo | None:
    ends = {f"{module}.weight" for module in modules}
    found = [info for name, info in tensors.items() if ".".join(name.split(".")[-2:]) in ends]
    return found[0] if len(found) == 1 else None


def same_values(folder: Folder, first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors of a checkpoint hold the same, value by value; of one dtype, bit by bit.

    Reads both once, a few MB at a time, and stops at the first difference. Needs no torch.
    """
    if first.shape != second.shape:
        return False
    count = first.num_bytes // KNOWN_DTYPE_BYTES[first.dtype]
    for start in range(0, count, _CHUNK_VALUES):
        stop = min(start + _CHUNK_VALUES, count)
        ours, theirs = _bytes(folder, first, start, stop), _bytes(folder, second, start, stop)
        if first.dtype == second.dtype:
            if ours != theirs:
                return False
        elif not (_numbers(ours, first.dtype) == _numbers(theirs, second.dtype)).all():
            return False
    return True


def _bytes(folder: Folder, info: TensorInfo, start: int, stop: int) -> bytearray:
    size = KNOWN_DTYPE_BYTES[info.dtype]
    data = bytearray((stop - start) * size)
    folder.read_into(info.file, info.start + start * size, memoryview(data))
    return data


def _numbers(data: bytearray, dtype: str) -> Any:
    """Values of one of `DTYPE_BYTES`, float32; a bfloat16 is the upper half of a float32."""
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float16 if dtype == "F16" else np.float32).astype(np.float32)
