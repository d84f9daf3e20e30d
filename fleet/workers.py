"""What workers do: one unit of one step, from the store to the store.

A unit is a small frozen value that names everything by URI, so it travels as a message and any worker can do it again
and write the same bytes. Weights are read here and written here; what goes back to the coordinator is a record of
kilobytes. These are plain classes: `fleet.coordinator` makes Ray actors of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.statistics import delta_statistics
from fleet.checkpoint.models import (
    PEFT_PREFIX,
    Adapter,
    FullModel,
    Model,
    is_companion,
    is_module,
    read_model,
    require_full_model,
    touched_tensors,
)
from fleet.checkpoint.task_vectors import FactorReader, factor_shapes, read_delta, read_factors, read_weight
from fleet.checkpoint.tensors import TensorLayout, write_tensors
from fleet.errors import CheckpointError
from fleet.fusion import AnyFusionMethod
from fleet.identity import Json
from fleet.methods import AnyRealignMethod, ModuleStatistics
from fleet.record import FileEntry, UnitRecord
from fleet.store import Store, open_folder, open_store


@dataclass(frozen=True)
class Output:
    """Where a unit writes: a prefix in a store."""

    store: str
    prefix: str


@dataclass(frozen=True)
class SurveyUnit:
    """Measure the task vectors of many models in a group of tensors; V is read once for all of them."""

    aligned: str
    unaligned: str
    models: dict[str, str]
    """Model name -> URI."""
    tensors: tuple[str, ...]


class SurveyResult(NamedTuple):
    """Per model: the statistics of its modules, and the tensors that hold NaN or Inf."""

    statistics: dict[str, list[ModuleStatistics]]
    non_finite: dict[str, list[str]]


@dataclass(frozen=True)
class Shard:
    """One output file: which base tensors it holds, and whether this unit also writes the files beside the weights."""

    file: str
    tensors: tuple[str, ...]
    index: dict[str, str] | None
    """Tensor -> file of the whole model, on the one shard that writes the small files; None on the others."""


@dataclass(frozen=True)
class RealignUnit:
    """Realign one model in one shard; an adapter is one shard."""

    aligned: str
    model: str
    safety: str | None
    method: AnyRealignMethod
    edited: frozenset[str]
    """Modules the method decided to edit, from the survey."""
    shard: Shard
    output: Output


@dataclass(frozen=True)
class Member:
    """One model in a fusion."""

    uri: str
    coefficient: float


@dataclass(frozen=True)
class FuseUnit:
    """Fuse all members in one shard."""

    aligned: str
    members_M: tuple[Member, ...]
    method: AnyFusionMethod
    as_adapter: bool
    shard: Shard
    output: Output


TensorUnit: TypeAlias = SurveyUnit | RealignUnit | FuseUnit


@lru_cache(maxsize=256)
def _open_model(uri: str) -> Model:
    """A model's headers, kept between the units of one worker; artifacts and pinned sources don't change."""
    return read_model(open_folder(uri))


class TensorWorker:
    """Does tensor work, one unit at a time, in memory for a few tensors × models."""

    def ready(self) -> bool:
        """True once the worker runs."""
        return True

    def survey(self, unit: SurveyUnit) -> SurveyResult:
        """Statistics of every model in the unit's modules; checks every tensor it reads for NaN and Inf.

        Raises:
            CheckpointError: NaN or Inf in the base models, which would poison every model alike.
        """
        aligned, unaligned = _full(unit.aligned), _full(unit.unaligned)
        models = {name: _open_model(uri) for name, uri in unit.models.items()}
        touched = {name: set(touched_tensors(model)) for name, model in models.items()}
        result = SurveyResult({name: [] for name in models}, {name: [] for name in models})
        for tensor in unit.tensors:
            base = _finite_weight(aligned, tensor)
            direction = base - _finite_weight(unaligned, tensor)
            for name, model in models.items():
                if tensor not in touched[name]:
                    continue
                delta = read_delta(model, tensor, base)
                assert delta is not None
                if not _is_finite(delta):
                    result.non_finite[name].append(tensor)
                elif is_module(aligned.tensors[tensor]):
                    rank = delta.rank if isinstance(delta, LowRank) else None
                    statistics = delta_statistics(direction, delta)._asdict()
                    module = tensor.removesuffix(".weight")
                    result.statistics[name].append(ModuleStatistics(module=module, rank=rank, **statistics))
        return result

    def realign(self, unit: RealignUnit) -> UnitRecord:
        """Write one shard of a realigned model, or a whole realigned adapter."""
        model = _open_model(unit.model)
        safety = _adapter(unit.safety) if unit.safety is not None else None
        edited = {f"{module}.weight" for module in unit.edited}

        def factors(name: str, read: FactorReader) -> Delta:
            assert isinstance(model, Adapter)
            delta = read(model, name)
            assert delta is not None
            return unit.method.edit(delta, read(safety, name) if safety else None) if name in edited else delta

        def weight(name: str) -> torch.Tensor:
            assert isinstance(model, FullModel)
            if name not in edited:
                return read_weight(model, name)  # what is not edited stays bit for bit
            base = read_weight(_full(unit.aligned), name)
            delta = Dense(read_weight(model, name) - base)
            return base + unit.method.edit(delta, read_factors(safety, name) if safety else None).dense()

        if isinstance(model, Adapter):
            return _write_adapter(unit.output, unit.shard, factors, [model])
        return _write_shard(unit.output, unit.shard, model, weight)

    def fuse(self, unit: FuseUnit) -> UnitRecord:
        """Write one shard of a fused model, or a whole fused adapter."""
        members_M = [_open_model(m.uri) for m in unit.members_M]

        def fused(deltas_M: Sequence[Delta | None]) -> Delta | None:
            present = [(d, m.coefficient) for d, m in zip(deltas_M, unit.members_M, strict=True) if d is not None]
            return unit.method.fuse([d for d, _ in present], [c for _, c in present]) if present else None

        def factors(name: str, read: FactorReader) -> Delta:
            delta = fused([read(m, name) for m in members_M if isinstance(m, Adapter)])
            assert delta is not None
            return delta

        def weight(name: str) -> torch.Tensor:
            base = read_weight(aligned, name)
            delta = fused([read_delta(m, name, base) for m in members_M])
            return base if delta is None else base + delta.dense()

        if unit.as_adapter:
            return _write_adapter(unit.output, unit.shard, factors, [m for m in members_M if isinstance(m, Adapter)])
        aligned = _full(unit.aligned)
        return _write_shard(unit.output, unit.shard, aligned, weight)


def _full(uri: str) -> FullModel:
    return require_full_model(_open_model(uri), uri)


def _adapter(uri: str) -> Adapter:
    model = _open_model(uri)
    if not isinstance(model, Adapter):
        raise CheckpointError(f"{uri}: a full model, but this has to be a LoRA adapter")
    return model


def _is_finite(delta: Delta) -> bool:
    parts = (delta.a, delta.b) if isinstance(delta, LowRank) else (delta.value,)
    return all(bool(torch.isfinite(p).all()) for p in parts)


def _finite_weight(model: FullModel, name: str) -> torch.Tensor:
    weight = read_weight(model, name)
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"{model.folder.uri}: tensor {name} holds NaN or Inf; no task vector against it has meaning"
        )
    return weight


def _write_shard(output: Output, shard: Shard, like: FullModel, weight: Callable[[str], torch.Tensor]) -> UnitRecord:
    """One shard of a full model with `like`'s names, shapes, dtypes and small files, and `weight`'s values."""
    store = open_store(output.store)
    layout = [TensorLayout(n, like.tensors[n].dtype, like.tensors[n].shape) for n in shard.tensors]
    written = write_tensors(store, f"{output.prefix}/{shard.file}", layout, (weight(n) for n in shard.tensors))
    files = {shard.file: FileEntry(num_bytes=written.num_bytes, sha256=written.sha256)}
    if shard.index is not None:
        for name in like.folder.files():
            if is_companion(name, like):
                files[name] = _write_file(store, output, name, like.folder.read(name))
        if len(set(shard.index.values())) > 1:
            total = sum(like.tensors[n].num_bytes for n in shard.index)
            index = {"metadata": {"total_size": total}, "weight_map": shard.index}
            files["model.safetensors.index.json"] = _write_file(
                store, output, "model.safetensors.index.json", _json_bytes(index)
            )
    return UnitRecord(files=files)


def _write_adapter(
    output: Output,
    shard: Shard,
    delta_of: Callable[[str, FactorReader], Delta],
    sources: list[Adapter],
) -> UnitRecord:
    """A whole PEFT adapter with scale 1 in every module: nothing is left to a config."""
    store = open_store(output.store)
    layout: list[TensorLayout] = []
    ranks: dict[str, int] = {}
    for name in shard.tensors:
        shapes = delta_of(name, factor_shapes)
        assert isinstance(shapes, LowRank)
        module = name.removesuffix(".weight")
        ranks[module] = shapes.rank
        layout.append(TensorLayout(f"{PEFT_PREFIX}{module}.lora_A.weight", "F32", tuple(shapes.a.shape)))
        layout.append(TensorLayout(f"{PEFT_PREFIX}{module}.lora_B.weight", "F32", tuple(shapes.b.shape)))

    def factors() -> Iterator[torch.Tensor]:
        for name in shard.tensors:
            delta = delta_of(name, read_factors)
            assert isinstance(delta, LowRank)
            yield delta.a
            yield delta.b

    written = write_tensors(store, f"{output.prefix}/{shard.file}", layout, factors())
    config = _write_file(store, output, "adapter_config.json", _json_bytes(_adapter_config(ranks, sources)))
    weights = FileEntry(num_bytes=written.num_bytes, sha256=written.sha256)
    return UnitRecord(
        files={shard.file: weights, "adapter_config.json": config}, result={"max_rank": max(ranks.values())}
    )


def _adapter_config(ranks: dict[str, int], sources: list[Adapter]) -> dict[str, Json]:
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
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": targets,
    }


def _write_file(store: Store, output: Output, name: str, data: bytes) -> FileEntry:
    store.replace(f"{output.prefix}/{name}", data)
    return FileEntry(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
