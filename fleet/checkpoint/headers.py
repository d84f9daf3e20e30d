"""safetensors headers, read as bytes: every dtype, shape and offset is checked before a weight is read."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fleet.checkpoint.advice import advice
from fleet.core.errors import CheckpointError, shown, some
from fleet.core.identity import Json
from fleet.core.json_lines import decode_text, json_value
from fleet.store import Folder

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""The dtypes we compute with. fp8 is read as float32; anything else (quantised, integer) is refused by name."""

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})

KNOWN_DTYPE_BYTES = {
    **DTYPE_BYTES, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

_QUANTISED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "I32"})

INDEX_FILE = "model.safetensors.index.json"
"""The file beside several files of weights that says which holds which tensor."""

TENSOR_BYTES = 450
"""Memory of one `TensorInfo` under its name in a dict (measured with tracemalloc: 426 bytes for long names)."""

HEADERS_CACHE_BYTES = 256 << 20
"""Memory in which one cache keeps headers: those of half a million tensors."""

_LFS_POINTER = b"version https://git-lfs"
_LFS_ADVICE = "is Git LFS's pointer to a file, not the file itself; run `git lfs pull` where it was cloned"

HEADER_LIMIT_BYTES = 100_000_000
"""The format's own limit; a larger claim is a lie or damage, and is refused before it is allocated."""

_ALIGNMENT_BYTES = 8
_MAX_AXES = 64
_MAX_SIZE = 2**63
_VARIANT = re.compile(r"model\.(?!safetensors)[\w-]+\.safetensors|model\.[\w-]+-\d{5}-of-\d{5}\.safetensors")
"""Copies in another dtype: transformers reads `model.fp16.safetensors` where `variant="fp16"` is asked for."""
_SHARD = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_OTHER_COPY = re.compile(r"consolidated.*\.safetensors|adapter_model\.safetensors")
"""Mistral's own layout beside transformers', and an adapter beside the model it was merged into."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is: `start` and `stop` are byte offsets in the file, not in its data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


class TensorLayout(NamedTuple):
    """One tensor of a file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * KNOWN_DTYPE_BYTES[self.dtype]


def header_bytes(layout: Iterable[TensorLayout]) -> bytes:
    """The header of a file that holds these tensors one after the other; their data follows it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in layout:
        stop = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, stop]}
        offset = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT_BYTES)
    return len(raw).to_bytes(8, "little") + raw


def read_header(folder: Folder, file: str, size: int) -> dict[str, TensorInfo]:
    """Name -> info of every tensor in one file, checked against the file's size.

    Raises:
        CheckpointError: truncated file, damaged JSON, unknown dtype, offsets that lie outside the file, overlap, leave
            gaps or disagree with the shape.
    """
    where = f"{folder.uri}/{file}"
    if size < 8:
        raise CheckpointError(f"{where}: {size} bytes is too short for a safetensors file; it was truncated")
    prefix = bytearray(8)
    folder.read_into(file, 0, memoryview(prefix))
    if bytes(prefix) == _LFS_POINTER[:8]:
        raise CheckpointError(f"{where}: {_LFS_ADVICE}")
    (length,) = struct.unpack("<Q", prefix)
    if length > HEADER_LIMIT_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{where}: the header claims {length} bytes but the file has {size}; it is truncated or no safetensors file"
        )
    raw = bytearray(length)
    folder.read_into(file, 8, memoryview(raw))
    try:
        header: Json = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{where}: the safetensors header is not valid JSON ({e}); copy the file again") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(where, file, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(where, sorted(tensors.values(), key=lambda t: (t.start, t.stop)), 8 + length, size)
    return tensors


def read_file_header(folder: Folder, file: str) -> dict[str, TensorInfo]:
    """`read_header` of a file by its name alone.

    Raises:
        CheckpointError: as `read_header`, and if there is no such file.
    """
    files = folder.files()
    if file not in files:
        raise CheckpointError(f"{folder.uri}: {file} is missing")
    return read_header(folder, file, files[file])


def _tensor_info(where: str, file: str, name: str, entry: Json, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise CheckpointError(f"{where}: tensor {name}: malformed header entry {shown(entry)}")
    if dtype not in KNOWN_DTYPE_BYTES:
        raise CheckpointError(f"{where}: tensor {name}: dtype {dtype} is not supported")
    sizes = tuple(size for size in shape if isinstance(size, int) and 0 <= size < _MAX_SIZE)
    if len(sizes) < len(shape) or len(shape) > _MAX_AXES:
        raise CheckpointError(f"{where}: tensor {name}: malformed shape {shown(shape)}")
    expected = math.prod(sizes) * KNOWN_DTYPE_BYTES[dtype]
    if stop - start != expected or start < 0:
        raise CheckpointError(
            f"{where}: tensor {name}: {dtype} {shape} needs {expected} bytes but the header gives {stop - start}"
        )
    return TensorInfo(name, dtype, sizes, file, data_start + start, data_start + stop)


def _check_layout(where: str, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(f"{where}: tensor {tensor.name}: the data before it overlaps or leaves a gap")
        end = tensor.stop
    if end != size:
        raise CheckpointError(f"{where}: the header describes {end} bytes but the file has {size}; it was truncated")


def read_headers(folder: Folder, what: str) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint, over all its files.

    Args:
        folder: the checkpoint.
        what: `model` or `adapter`: which file names to read.

    Raises:
        CheckpointError: no safetensors files (with the way to get some), a tensor in two files, an index that is
            damaged or names a file or tensor that is not there.
    """
    sizes = folder.files()
    files = weight_files(folder, what, sizes)
    if not files:
        kind = "an adapter" if what == "adapter" else "a model"
        raise CheckpointError(f"{folder.uri}: no safetensors weights of {kind}: {advice(what, sizes)}")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder, file, sizes[file]).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder.uri}: tensor {name} is in both {tensors[name].file} and {file}; keep the files of one "
                    f"checkpoint, or write a {INDEX_FILE} that names them"
                )
            tensors[name] = info
    if INDEX_FILE in sizes and what == "model":
        _check_index(folder, tensors)
    return tensors


def weight_files(folder: Folder, what: str, sizes: Mapping[str, int]) -> list[str]:
    """The files that hold a checkpoint's weights: what its index names, else all safetensors files, as vLLM does.

    Without an index, copies in another layout or dtype are no part of it where there is a plain one.

    Args:
        folder: the checkpoint.
        what: `model` or `adapter`.
        sizes: the folder's files; a listing costs a request where they are remote.

    Raises:
        CheckpointError: the index is damaged, names what is not there, or leaves out a `model.safetensors`; without an
            index, one of a numbered set of files is not there.
    """
    if what == "adapter":
        return [f for f in sizes if f == "adapter_model.safetensors"]
    if INDEX_FILE in sizes:
        return _indexed_files(folder, sizes)
    found = [f for f in sizes if f.endswith(".safetensors") and "/" not in f and not _OTHER_COPY.fullmatch(f)]
    found = [f for f in found if not _VARIANT.fullmatch(f)] or found
    if missing := _missing_shards(found):
        raise CheckpointError(f"{folder.uri}: {some(missing)} is not there; copy the checkpoint again, whole")
    return found


def _missing_shards(files: Iterable[str]) -> set[str]:
    """The files of a numbered set that are not there: of model-00001-of-00002.safetensors, the second."""
    shards = [m for file in files if (m := _SHARD.fullmatch(file))]
    asked = {f"{m['name']}-{i:05d}-of-{m['count']}.safetensors" for m in shards for i in range(1, int(m["count"]) + 1)}
    return asked - {m[0] for m in shards}


def _indexed_files(folder: Folder, sizes: Mapping[str, int]) -> list[str]:
    where = f"{folder.uri}/{INDEX_FILE}"
    named = sorted(set(_weight_map(folder).values()))
    if paths := [file for file in named if "/" in file]:
        raise CheckpointError(
            f"{where}: names {some([shown(f) for f in paths])} by a path, which vLLM doesn't find; put the files "
            "beside the index and name them alone"
        )
    if missing := [file for file in named if file not in sizes]:
        raise CheckpointError(f"{where}: names {some(missing)}, which is not there; copy the checkpoint again, whole")
    if "model.safetensors" in sizes and "model.safetensors" not in named:
        raise CheckpointError(
            f"{where}: doesn't name model.safetensors, which is there too: transformers would read that one, and vLLM "
            "the files of the index; keep the files of one checkpoint"
        )
    return named


def _weight_map(folder: Folder) -> dict[str, str]:
    """Tensor -> file, as the index says; `read_headers` compares it with the files.

    Raises:
        CheckpointError: it is no index.
    """
    where = f"{folder.uri}/{INDEX_FILE}"
    found = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"{where}: weight_map is {shown(found)}, not an object of tensors and files; save the model again"
        )
    weight_map = {tensor: file for tensor, file in found.items() if isinstance(file, str)}
    if wrong := [tensor for tensor in found if tensor not in weight_map]:
        raise CheckpointError(f"{where}: weight_map names no file for {some(wrong)}; save the model again")
    return weight_map


def _check_index(folder: Folder, tensors: dict[str, TensorInfo]) -> None:
    weight_map = _weight_map(folder)
    wrong = sorted(name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file)
    extra = sorted(set(tensors) - set(weight_map))
    problems = [f"missing or elsewhere: {some(wrong)}"] if wrong else []
    problems += [f"not listed: {some(extra)}"] if extra else []
    if problems:
        raise CheckpointError(f"{folder.uri}/{INDEX_FILE}: disagrees with the files ({'; '.join(problems)})")


def plan_shards(tensors: Iterable[TensorInfo], shard_bytes: int) -> list[list[str]]:
    """Group tensors, in name order, into shards of at most `shard_bytes` unless one tensor alone is larger."""
    shards: list[list[str]] = []
    room = 0
    for tensor in sorted(tensors, key=lambda t: t.name):
        if not shards or tensor.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor.name)
        room -= tensor.num_bytes
    return shards


def shard_name(index: int, count: int) -> str:
    """The file name of a shard in the layout transformers and vLLM read."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def read_json(folder: Folder, name: str) -> dict[str, Json]:
    """A small file that holds a JSON object.

    Raises:
        SourceError: it is missing.
        CheckpointError: it holds something else, is no UTF-8, or has a key twice.
    """
    return parse_json(f"{folder.uri}/{name}", folder.read(name))


def parse_json(where: str, data: bytes) -> dict[str, Json]:
    """What `read_json` makes of a file's bytes; its errors begin with `where`."""
    if data.startswith(_LFS_POINTER):
        raise CheckpointError(f"{where}: {_LFS_ADVICE}")
    if not data.strip():
        raise CheckpointError(f"{where}: is empty; save or copy it again")
    value = json_value(decode_text(data, where, CheckpointError), where, CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return value


def json_bytes(value: Mapping[str, object]) -> bytes:
    """A small file beside weights that we write: the same bytes for the same value, whatever its order."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def check_gathered(where: str, tensors: Iterable[TensorInfo]) -> None:
    """
    Raises:
        CheckpointError: tensors have no values, as DeepSpeed's ZeRO-3 leaves them; begins with `where`.
    """
    if empty := [t.name for t in tensors if t.shape == (0,)]:
        raise CheckpointError(
            f"{where}: {len(empty)} tensors are empty ({some(empty)}): DeepSpeed ZeRO-3 saved them without gathering; "
            'save again with "stage3_gather_16bit_weights_on_model_save": true in its "zero_optimization" settings, or '
            "get the weights from its own checkpoint: run `python zero_to_fp32.py . OUT --safe_serialization` where "
            "global_step* is"
        )


def check_dtypes(where: str, tensors: dict[str, TensorInfo]) -> None:
    """
    Raises:
        CheckpointError: a tensor is in a dtype that we don't compute with (`DTYPE_BYTES`); begins with `where`.
    """
    wrong = [t for t in tensors.values() if t.dtype not in DTYPE_BYTES]
    if wrong:
        quantised = any(t.dtype in _QUANTISED_DTYPES for t in wrong)
        way_out = "they are quantised; give the unquantised checkpoint" if quantised else "save the model in float32"
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors are neither float32, float16 nor bfloat16, so no exact task vector exists; "
            f"{way_out}: {some([f'{t.name} ({t.dtype})' for t in wrong])}"
        )
