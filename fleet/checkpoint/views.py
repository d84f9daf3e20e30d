"""Checkpoints read as if they had been converted: no copy is made, values are computed as they are read.

A `ViewFolder` is a folder like any other. Its safetensors files have the names of the ones it is made from, headers of
their own, and data that is either another file's bytes or computed, row by row, from them. So whatever reads, fuses or
serves a model does that with a view, too.

Here are the files of fp8 models, dequantised; `fleet.checkpoint.vocabulary` has those in another vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fleet.checkpoint.headers import (
    FP8_DTYPES,
    INDEX_FILE,
    KNOWN_DTYPE_BYTES,
    TensorInfo,
    TensorLayout,
    header_bytes,
    json_bytes,
)
from fleet.core.errors import CheckpointError, SourceError
from fleet.core.identity import Json, digest
from fleet.store import Folder
from fleet.store.download import download
from fleet.store.local import LocalFolder

if TYPE_CHECKING:
    import torch

BLOCK = (128, 128)
"""Rows and columns that share a scale where `quantization_config` doesn't say: what DeepSeek and Qwen publish."""

VIEW_BYTES = 800
"""Memory of one tensor's view, with its place in a file and the header entry it reads (measured with tracemalloc)."""

_SCALE = re.compile(r"(?P<weight>.+)(_scale_inv|_scale)")
"""Scales are multiplied by, whatever they are called: DeepSeek's `weight_scale_inv` is the quantiser's inverse."""
_ACTIVATION_SCALE = re.compile(r"(^|\.)(input_scale|activation_scale|k_scale|v_scale|q_scale)$")
"""What engines quantise activations and caches with; no part of the weights."""


class TensorView(Protocol):
    """A tensor that a view's file holds."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def row_bytes(self) -> int:
        """Bytes of what can be read at the least."""
        ...

    @property
    def memory_bytes(self) -> int:
        """About how much memory the view itself takes, before anything is read."""
        ...

    def read_rows(self, start: int, stop: int, buffer: memoryview) -> None:
        """Fill `buffer`, of exactly their bytes, with rows [start, stop)."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor as it is in a file, its first axis as rows."""

    folder: Folder
    info: TensorInfo

    @property
    def dtype(self) -> str:
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * KNOWN_DTYPE_BYTES[self.dtype]

    @property
    def memory_bytes(self) -> int:
        return VIEW_BYTES

    def read_rows(self, start: int, stop: int, buffer: memoryview) -> None:
        self.folder.read_into(self.info.file, self.info.start + start * self.row_bytes, buffer)


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
        """How many rows and columns share a scale; None where the scales' shape doesn't fit the tensor's."""
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
    """How many of `size` share one of `count` scales; 0 where that is no way to share them."""
    if count == 1:
        return size
    if count == size:
        return 1
    return block if count == -(-size // block) else 0


def is_local(folder: Folder) -> bool:
    """Whether what is read comes from this machine's own disk, or the cache of its pages."""
    return (
        all(is_local(f) for f in folder.sources) if isinstance(folder, ViewFolder) else isinstance(folder, LocalFolder)
    )


class _Placed(NamedTuple):
    start: int
    stop: int
    tensor: TensorView | bytes


@dataclass(frozen=True)
class ViewFolder:
    """Files of tensor views, and small files beside them.

    Args:
        uri: what messages call it; where it is no view that `open_folder` opens, the address of what it is made from.
        identity: gives all that its contents follow from; asked only where digests are, which may read every byte.
        tensors: file -> tensor name -> the tensor, in the file's order.
        passed: file -> the folder that has it as it is.
        small: file -> contents.
        sources: where tensors are read from.
    """

    uri: str
    identity: Callable[[], Json]
    tensors: Mapping[str, Mapping[str, TensorView]]
    passed: Mapping[str, Folder]
    small: Mapping[str, bytes]
    sources: tuple[Folder, ...]

    @property
    def memory_bytes(self) -> int:
        """About how much memory the views take, beside the folders they read."""
        return sum(view.memory_bytes for tensors in self.tensors.values() for view in tensors.values())

    def files(self) -> dict[str, int]:
        sizes = {file: layout[-1].stop for file, layout in self._layouts.items()}
        sizes |= {file: folder.files()[file] for file, folder in self.passed.items()}
        sizes |= {file: len(data) for file, data in self._small.items()}
        return dict(sorted(sizes.items()))

    def digests(self) -> dict[str, str]:
        identity = self.identity()
        return {file: digest([identity, file]) for file in self.files()}

    def read(self, name: str) -> bytes:
        if name in self.passed:
            return self.passed[name].read(name)
        data = bytearray(self._file(name)[-1].stop)
        self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        if name in self.passed:
            self.passed[name].read_into(name, start, buffer)
            return
        layout, stop = self._file(name), start + len(buffer)
        if stop > layout[-1].stop:
            raise SourceError(f"{self.uri}: {name} ends before byte {stop}")
        first = bisect_right([placed.start for placed in layout], start) - 1
        for placed in layout[max(first, 0) :]:
            if placed.start >= stop:
                break
            lower, upper = max(start, placed.start), min(stop, placed.stop)
            if lower < upper:
                _read(placed, lower, upper, buffer[lower - start : upper - start])

    def local(self, scratch: Path) -> Path:
        return download(self, scratch)

    def _file(self, name: str) -> list[_Placed]:
        """What a file consists of, in order."""
        if name in self._layouts:
            return self._layouts[name]
        if name not in self._small:
            raise SourceError(f"{self.uri}: {name} is missing")
        return [_Placed(0, len(self._small[name]), self._small[name])]

    @cached_property
    def _small(self) -> dict[str, bytes]:
        """The small files, with an index where there are several of tensors."""
        if len(self.tensors) == 1:
            return dict(self.small)
        where = {name: file for file, tensors in self.tensors.items() for name in tensors}
        total = sum(p.stop - p.start for layout in self._layouts.values() for p in layout[1:])
        index = {"metadata": {"total_size": total}, "weight_map": where}
        return {**self.small, INDEX_FILE: json_bytes(index)}

    @cached_property
    def _layouts(self) -> dict[str, list[_Placed]]:
        return {file: list(_layout(tensors)) for file, tensors in self.tensors.items()}


def _layout(tensors: Mapping[str, TensorView]) -> Iterator[_Placed]:
    entries = [TensorLayout(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    header = header_bytes(entries)
    yield _Placed(0, len(header), header)
    at = len(header)
    for entry, tensor in zip(entries, tensors.values(), strict=True):
        yield _Placed(at, at + entry.num_bytes, tensor)
        at += entry.num_bytes


def _read(placed: _Placed, start: int, stop: int, buffer: memoryview) -> None:
    """Bytes [start, stop) of the file, which are within one tensor or the header."""
    start, stop, tensor = start - placed.start, stop - placed.start, placed.tensor
    if isinstance(tensor, bytes):
        buffer[:] = tensor[start:stop]
        return
    size = tensor.row_bytes
    first, last = start // size, -(-stop // size)
    if start == first * size and stop == last * size:
        tensor.read_rows(first, last, buffer)
        return
    whole = memoryview(bytearray((last - first) * size))
    tensor.read_rows(first, last, whole)
    buffer[:] = whole[start - first * size : stop - first * size]


def fp8_method(quantisation: Json) -> bool:
    """Whether a `quantization_config` says that weights are fp8 times scales: `fp8`, and compressed-tensors' own."""
    if not isinstance(quantisation, dict):
        return False
    method, layout = quantisation.get("quant_method"), quantisation.get("format")
    return method == "fp8" or (method == "compressed-tensors" and layout == "float-quantized")


def dequantised(folder: Folder, config: Mapping[str, Json], tensors: Mapping[str, TensorInfo]) -> ViewFolder:
    """An fp8 checkpoint with its weights in float32, without scales and `quantization_config`.

    Raises:
        CheckpointError: scales that are missing, belong to nothing, or don't fit their weights.
    """
    quantisation = config.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    shared = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else BLOCK  # type: ignore[arg-type]
    weights = {name for name, info in tensors.items() if info.dtype in FP8_DTYPES}
    scales = {
        m["weight"]: info for name, info in tensors.items() if (m := _SCALE.fullmatch(name)) and m["weight"] in weights
    }
    if quantisation and (bare := sorted(weights - scales.keys())):
        raise CheckpointError(
            f"{folder.uri}: fp8 tensors without scales, though config.json speaks of some: {bare[:8]}"
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
