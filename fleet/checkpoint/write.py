"""How weights are written: a file of tensors, one shard of a full model, or a whole PEFT adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from fleet.algebra.delta import LowRank, zero
from fleet.checkpoint.adapter import PEFT_PREFIX, Adapter
from fleet.checkpoint.companions import is_companion, prompting_files
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import INDEX_FILE, TensorLayout, json_bytes
from fleet.checkpoint.modules import canonical_shape
from fleet.checkpoint.shards import Output, Shard
from fleet.checkpoint.tensors import TORCH_DTYPES, write_tensors
from fleet.core.identity import Json
from fleet.store import Folder, Store, open_store
from fleet.store.entry import FileEntry


class WrittenAdapter(NamedTuple):
    """The files of an adapter, by name, and the largest rank in it."""

    files: dict[str, FileEntry]
    max_rank: int


def write_file(output: Output, file: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, FileEntry]:
    """A safetensors file of tensors that are in memory, float32 or float64; none, if there are no tensors."""
    if not tensors:
        return {}
    dtypes = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    layout = [TensorLayout(name, dtypes[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    pieces = ([tensor] for tensor in tensors.values())
    return {file: _write_tensors(open_store(output.store), output, file, layout, pieces)}


def write_shard(
    output: Output,
    shard: Shard,
    like: FullModel,
    aligned: FullModel,
    pieces: Callable[[str], Iterable[torch.Tensor]],
) -> dict[str, FileEntry]:
    """One shard of a full model with `like`'s names, shapes, dtypes and small files.

    Args:
        aligned: whose tokenizer it gets, if `like` has none.
        pieces: a base tensor's name -> its values in the orientation of `like`'s files, piece by piece, any floating
            dtype.
    """
    store = open_store(output.store)
    layout = [TensorLayout(n, like.tensors[n].dtype, like.tensors[n].shape) for n in shard.tensors]
    files = {shard.file: _write_tensors(store, output, shard.file, layout, map(pieces, shard.tensors))}
    if shard.weight_map is not None:
        small = {name: like.folder for name in like.folder.files() if is_companion(name)}
        files |= _copy(store, output, prompting_files(like.folder, aligned.folder) | small)
        if len(set(shard.weight_map.values())) > 1:
            total = sum(like.tensors[n].num_bytes for n in shard.weight_map)
            index = {"metadata": {"total_size": total}, "weight_map": shard.weight_map}
            files[INDEX_FILE] = _write_bytes(store, output, INDEX_FILE, json_bytes(index))
    return files


def write_adapter(
    output: Output,
    shard: Shard,
    like: FullModel,
    ranks: Mapping[str, int],
    factors: Callable[[str], LowRank],
    sources: Sequence[Adapter],
) -> WrittenAdapter:
    """A whole PEFT adapter with scale 1 in every module: nothing is left to a config.

    A module of rank 0 is left out; if all are, the first is written as zeros of rank 1: PEFT reads no empty adapter.

    Args:
        ranks: tensor -> its rank, known before a weight is read.
        factors: tensor -> ΔW of exactly that rank.
        sources: the adapters this one is made of; their configs name the base, and one alone gives its tokenizer.
    """
    present = [name for name in shard.tensors if ranks[name]]
    empty = [] if present else [shard.tensors[0]]
    layout: list[TensorLayout] = []
    written_ranks: dict[str, int] = {}
    for name in (*present, *empty):
        d_out, d_in = canonical_shape(like, name)
        module, rank = name.removesuffix(".weight"), ranks[name] or 1
        written_ranks[module] = rank
        layout.append(TensorLayout(f"{PEFT_PREFIX}{module}.lora_A.weight", "F32", (rank, d_in)))
        layout.append(TensorLayout(f"{PEFT_PREFIX}{module}.lora_B.weight", "F32", (d_out, rank)))

    def tensors() -> Iterator[list[torch.Tensor]]:
        for name in present:
            delta = factors(name)
            yield [delta.a]
            yield [delta.b]
        for entry in layout if empty else ():
            yield [torch.zeros(entry.shape)]

    store = open_store(output.store)
    files = {shard.file: _write_tensors(store, output, shard.file, layout, tensors())}
    config = json_bytes(_adapter_config(written_ranks, sources))
    files["adapter_config.json"] = _write_bytes(store, output, "adapter_config.json", config)
    owner = sources[0].folder if len(sources) == 1 else like.folder
    files |= _copy(store, output, prompting_files(owner, like.folder))
    return WrittenAdapter(files, max(written_ranks.values()))


def of_rank(delta: LowRank, rank: int) -> LowRank:
    """The same ΔW with zero factors added up to this rank: where a method needed less than was laid out."""
    if delta.rank == rank:
        return delta
    added = zero(tuple(delta.shape), rank - delta.rank)
    return LowRank(torch.cat((delta.b, added.b), dim=1), torch.cat((delta.a, added.a), dim=0))


def _adapter_config(ranks: Mapping[str, int], sources: Sequence[Adapter]) -> dict[str, Json]:
    """PEFT's config with alpha equal to the rank and rsLoRA off: the written factors are the whole update."""
    rank = max(ranks.values())
    pattern: dict[str, Json] = {module: r for module, r in ranks.items() if r != rank}
    targets: list[Json] = [*sorted(ranks)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": sources[0].config.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(source.config.get("fan_in_fan_out") for source in sources),
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": targets,
    }


def _write_tensors(
    store: Store, output: Output, file: str, layout: Sequence[TensorLayout], tensors: Iterable[Iterable[torch.Tensor]]
) -> FileEntry:
    written = write_tensors(store, f"{output.prefix}/{file}", layout, tensors)
    return FileEntry(num_bytes=written.num_bytes, sha256=written.sha256)


def _copy(store: Store, output: Output, files: Mapping[str, Folder]) -> dict[str, FileEntry]:
    """Write files as their folders have them."""
    return {name: _write_bytes(store, output, name, folder.read(name)) for name, folder in files.items()}


def _write_bytes(store: Store, output: Output, name: str, data: bytes) -> FileEntry:
    store.replace(f"{output.prefix}/{name}", data)
    return FileEntry.of(data)
