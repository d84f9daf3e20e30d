"""Checkpoints read as if they had been converted: no copy is made, values are computed as they are read.

A `ViewFolder` is a folder like any other. Its safetensors files have the names of the ones it is made from, headers of
their own, and data that is either another file's bytes or computed, row by row, from them. So whatever reads, fuses or
serves a model does that with a view, too.

`fleet.checkpoint.fp8` makes views of fp8 models, `fleet.checkpoint.vocabulary` of models in another vocabulary.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

from fleet.checkpoint.headers import (
    INDEX_FILE,
    KNOWN_DTYPE_BYTES,
    TensorInfo,
    TensorLayout,
    header_bytes,
    json_bytes,
)
from fleet.core.errors import SourceError
from fleet.core.identity import Json, digest
from fleet.store import Folder
from fleet.store.download import download
from fleet.store.local import LocalFolder

VIEW_BYTES = 800
"""Memory of one tensor's view, with its place in a file and the header entry it reads (measured with tracemalloc)."""


class TensorView(Protocol):
    """A tensor of a view's file: rows that are computed, or copied from another file, when they are asked for."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the least that can be read."""
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


def is_local(folder: Folder) -> bool:
    """Whether all is read from files of this machine, likely from its page cache: no need to read ahead."""
    return (
        all(is_local(f) for f in folder.sources) if isinstance(folder, ViewFolder) else isinstance(folder, LocalFolder)
    )


class _Placed(NamedTuple):
    """Bytes [start, stop) of a file: its header, or one tensor's data."""

    start: int
    stop: int
    tensor: TensorView | bytes


@dataclass(frozen=True)
class ViewFolder:
    """Files of tensor views, and small files beside them.

    Args:
        uri: what messages call it; where it is no view that `open_folder` opens, the address of what it is made from.
        identity: gives the JSON that decides the contents, for `digests`; it may have to read every byte.
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

    @property
    def is_computed(self) -> bool:
        """Whether some values are not a file's own, and may be in another dtype than there."""
        return any(not isinstance(view, Stored) for tensors in self.tensors.values() for view in tensors.values())

    def files(self) -> dict[str, int]:
        sizes = {file: layout[-1].stop for file, layout in self._layouts.items()}
        sizes |= {file: folder.files()[file] for file, folder in self.passed.items()}
        sizes |= {file: len(data) for file, data in self._small.items()}
        return dict(sorted(sizes.items()))

    def only(self, names: Collection[str]) -> ViewFolder:
        chosen = set(names)
        return replace(
            self,
            tensors={file: tensors for file, tensors in self.tensors.items() if file in chosen},
            passed={file: folder for file, folder in self.passed.items() if file in chosen},
            small={file: data for file, data in self.small.items() if file in chosen},
        )

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
        """The small files, and the index where the weights are in several files."""
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
    """Fill `buffer` with bytes [start, stop) of the file, all within `placed`; whole rows are read straight into it."""
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
