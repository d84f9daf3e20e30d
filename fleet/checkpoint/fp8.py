"""fp8 checkpoints, read as the float32 weights that their engines multiply with: a view, so no copy is made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fleet.checkpoint.headers import FP8_DTYPES, INDEX_FILE, KNOWN_DTYPE_BYTES, TensorInfo
from fleet.checkpoint.views import VIEW_BYTES, Stored, TensorView, ViewFolder
from fleet.core.errors import CheckpointError, shown, some
from fleet.core.identity import Json
from fleet.store import Folder

if TYPE_CHECKING:
    import torch

BLOCK = (128, 128)
"""Rows and columns that share a scale where `quantization_config` doesn't say: what DeepSeek and Qwen publish."""

_SCALE = re.compile(r"(?P<weight>.+)(_scale_inv|_scale)")
"""Scales are multiplied by, whatever they are called: DeepSeek's `weight_scale_inv` is the quantiser's inverse."""
_SCALE_DTYPES = frozenset({"F32", "F16", "BF16", "F64"})
_ACTIVATION_SCALE = re.compile(r"(^|\.)(input_scale|activation_scale|k_scale|v_scale|q_scale)$")
"""What engines quantise activations and caches with; no part of the weights."""


def fp8_method(quantisation: Json) -> bool:
    """Whether a `quantization_config` says that weights are fp8 times scales: `fp8`, and compressed-tensors' own."""
    if not isinstance(quantisation, dict):
        return False
    method, layout = quantisation.get("quant_method"), quantisation.get("format")
    return method == "fp8" or (method == "compressed-tensors" and layout == "float-quantized")


def dequantised(folder: Folder, config: Mapping[str, Json], tensors: Mapping[str, TensorInfo]) -> ViewFolder:
    """An fp8 checkpoint with its weights in float32, without scales and `quantization_config`.

    Raises:
        CheckpointError: scales that are missing, belong to nothing, aren't floating-point numbers, or don't fit their
            weights; a `weight_block_size` that is none.
    """
    quantisation = config.get("quantization_config")
    shared = _block_size(folder.uri, quantisation)
    weights = {name for name, info in tensors.items() if info.dtype in FP8_DTYPES}
    scales = {
        m["weight"]: info for name, info in tensors.items() if (m := _SCALE.fullmatch(name)) and m["weight"] in weights
    }
    if quantisation and (bare := sorted(weights - scales.keys())):
        raise CheckpointError(
            f"{folder.uri}: fp8 tensors without scales, though config.json speaks of some: {bare[:8]}"
        )
    if wrong := [f"{info.name} ({info.dtype})" for info in scales.values() if info.dtype not in _SCALE_DTYPES]:
        raise CheckpointError(
            f"{folder.uri}: scales that are no floating-point numbers: {some(wrong)}; give the unquantised checkpoint"
        )
    left_out = {info.name for info in scales.values()}
    left_out |= {name for name in tensors if quantisation and _ACTIVATION_SCALE.search(name)}
    files: dict[str, dict[str, TensorView]] = {info.file: {} for info in tensors.values()}
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if name in left_out:
            continue
        view: TensorView = Stored(folder, info)
        if name in weights:
            view = Dequantised(folder, info, scales.get(name), shared)
            if view.scale is not None and view.steps() is None:
                raise CheckpointError(
                    f"{folder.uri}: tensor {name} is {info.shape}, but {view.scale.name} is {view.scale.shape}: no "
                    f"scale of a tensor, of its rows or of blocks of {shared}; give the unquantised checkpoint"
                )
        files[info.file][name] = view
    kept = {name: folder for name in folder.files() if name not in (*files, INDEX_FILE, "config.json")}
    plain = {field: value for field, value in config.items() if field != "quantization_config"}
    small = {"config.json": (json.dumps(plain, indent=2) + "\n").encode()}
    return ViewFolder(folder.uri, lambda: ["dequantised", {**folder.digests()}], files, kept, small, (folder,))


def _block_size(where: str, quantisation: Json) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    size = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    match size:
        case None:
            return BLOCK
        case [int() | float() as rows, int() | float() as columns] if _is_count(rows) and _is_count(columns):
            return int(rows), int(columns)
        case _:
            raise CheckpointError(
                f"{where}: config.json: quantization_config.weight_block_size is {shown(size)}, not two positive whole "
                "numbers; give the block size that the weights were quantised with"
            )


def _is_count(number: float) -> bool:
    return not isinstance(number, bool) and 0 < number < math.inf and number == int(number)


@dataclass(frozen=True)
class Dequantised:
    """An fp8 tensor times its scales, float32, its last axis as a row.

    A scale belongs to the whole tensor, to a row, or to a block of rows and columns; of stacked experts, (E, d_out,
    d_in), to such a part of one expert. The product is rounded once, to float32.
    """

    folder: Folder
    info: TensorInfo
    scale: TensorInfo | None
    block: tuple[int, int]

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def row_bytes(self) -> int:
        return self._matrix[1] * KNOWN_DTYPE_BYTES["F32"]

    @property
    def memory_bytes(self) -> int:
        return VIEW_BYTES

    def read_rows(self, start: int, stop: int, buffer: memoryview) -> None:
        import torch

        from fleet.checkpoint.tensors import read_rows

        values = read_rows(self.folder, self.info, start, stop).float()
        if self._scales is not None:
            steps, scales = self._scales
            rows, columns = self._matrix
            parts, per_matrix = scales.shape[0], -(-rows // steps[0])
            row = torch.arange(start, stop)
            at = (row // rows % parts) * per_matrix + row % rows // steps[0]
            chosen = scales.reshape(-1, scales.shape[-1])[at]
            values *= chosen.repeat_interleave(steps[1], dim=1)[:, :columns]
        torch.frombuffer(buffer, dtype=torch.float32).copy_(values.view(-1))

    @property
    def _matrix(self) -> tuple[int, int]:
        """Rows and columns of one matrix."""
        shape = (1, *self.shape) if len(self.shape) < 2 else self.shape
        return shape[-2], shape[-1] if self.shape else 1

    def steps(self) -> tuple[int, int] | None:
        """How many rows, and how many columns, share one scale; None where the scales' shape fits no way of sharing."""
        assert self.scale is not None
        (rows, columns), shape = self._matrix, self.scale.shape
        if math.prod(shape) == 1:
            return max(rows, 1), max(columns, 1)
        if len(shape) == 1 and len(self.shape) == 2:
            shape = (*shape, 1)
        if len(shape) != len(self.shape) or shape[:-2] != self.shape[:-2]:
            return None
        fits = [
            _step(count, size, block)
            for count, size, block in zip(shape[-2:], (rows, columns), self.block, strict=True)
        ]
        return None if 0 in fits else (fits[0], fits[1])

    @cached_property
    def _scales(self) -> tuple[tuple[int, int], torch.Tensor] | None:
        """Rows and columns that share a scale; the scales, (matrices or 1, rows, columns) float32."""
        from fleet.checkpoint.tensors import read_tensor

        if self.scale is None:
            return None
        steps = self.steps()
        assert steps is not None
        rows, columns = self._matrix
        values = read_tensor(self.folder, self.scale).float()
        return steps, values.reshape(-1, -(-rows // steps[0]), -(-columns // steps[1]))


def _step(count: int, size: int, block: int) -> int:
    """How many of `size` rows or columns share one of `count` scales: all, one, or a block; 0 if none of it fits."""
    if count == 1:
        return size
    if count == size:
        return 1
    return block if count == -(-size // block) else 0
