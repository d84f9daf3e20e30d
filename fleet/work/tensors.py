"""What workers do: one unit of one step, from the store to the store.

A unit is a small frozen value that names everything by URI, so it travels as a message and any worker can do it again
and write the same bytes. Weights are read here and written here; what goes back to the coordinator is a record of
kilobytes. These are plain classes: `fleet.run.coordinator` makes Ray actors of them.
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from fleet.algebra.delta import Delta, Dense, LowRank, zero
from fleet.algebra.factors import Factors
from fleet.algebra.random_edits import named_generator
from fleet.algebra.ranks import WindowCounts
from fleet.algebra.sparsify import WHOLE
from fleet.algebra.spectral import Triplets, truncated
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.curvature import Curvature, read_curvature
from fleet.checkpoint.curvature_tensors import CurvatureOf
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import read_headers
from fleet.checkpoint.model import Model, lora_rank, read_model, require_full_model, written_like
from fleet.checkpoint.modules import ModuleView, canonical_shape, is_transposed, module_views
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_unscaled_factors, read_weight, to_stored
from fleet.checkpoint.tensors import read_tensor
from fleet.checkpoint.write import Output, Shard, of_rank, write_adapter, write_shard
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json
from fleet.fusion import AnyFusionMethod
from fleet.fusion.base import Thresholds
from fleet.fusion.place import places
from fleet.fusion.streaming import StreamedFusion, count_task_vector, sample_task_vector
from fleet.masks.learned import open_mask
from fleet.methods import AnyRealignMethod, Ranks, Somf
from fleet.steps.record import UnitRecord
from fleet.store import open_folder
from fleet.work.survey import Scratch, StoredDisplacement, SurveyResult, SurveyUnit, stored_displacement, survey


@dataclass(frozen=True)
class RealignUnit:
    """Realign one model in one shard; an adapter is one shard."""

    aligned: str
    unaligned: str
    model: str
    safety: str | None
    harmful: str | None
    displacement: str
    """V's own part, of which methods use leading directions."""
    projections: str | None
    """The B factors of the model's VVᵀΔW/‖V‖, where the method uses them."""
    method: AnyRealignMethod
    edited: frozenset[str]
    """Modules the method decided to edit, from the survey."""
    targets: Mapping[str, float]
    """For a control: module -> the norm of its edit."""
    mask: str | None
    """Folder of a learned mask, where the method applies one."""
    name: str
    """The model's, of which a mask may hold logits of its own."""
    as_adapter: bool
    shard: Shard
    output: Output


@dataclass(frozen=True)
class Member:
    """One model in a fusion."""

    name: str
    uri: str
    curvature: str | None = None
    """Folder of what the method has to know of it beside the weights."""


@dataclass(frozen=True)
class FuseUnit:
    """Fuse all members in one shard."""

    aligned: str
    members_M: tuple[Member, ...]
    method: AnyFusionMethod
    as_adapter: bool
    thresholds: Thresholds | None
    """Those of whole models, where the method asks for them; else each tensor has its own."""
    shard: Shard
    output: Output


@dataclass(frozen=True)
class SampleUnit:
    """Draw entries of one model's task vector, spread over some tensors."""

    aligned: str
    model: str
    tensors: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class CountUnit:
    """Count the entries of one model's task vector, in some tensors, whose bit patterns are in [low, high)."""

    aligned: str
    model: str
    tensors: tuple[str, ...]
    low: int
    high: int


def packed(values: torch.Tensor) -> str:
    """(n,) numbers as text, for a record; a window's counts are small numbers, and take some 100 kB."""
    return b64encode(zlib.compress(values.numpy().tobytes(), level=1)).decode()


def unpacked(text: str, dtype: torch.dtype) -> torch.Tensor:
    """The numbers again: (n,), of their dtype."""
    data = zlib.decompress(b64decode(text))
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


@lru_cache(maxsize=256)
def open_model(uri: str) -> Model:
    """A model's headers, kept between the units of one worker; artifacts and pinned sources don't change."""
    return read_model(open_folder(uri))


@lru_cache(maxsize=256)
def open_curvature(uri: str) -> Curvature:
    """A model's Fisher or Gram matrices, kept likewise."""
    return read_curvature(open_folder(uri))


def open_full(uri: str) -> FullModel:
    """The same, of a model that has to be a full one."""
    return require_full_model(open_model(uri), uri)


def _adapter(uri: str) -> Adapter:
    model = open_model(uri)
    if not isinstance(model, Adapter):
        raise CheckpointError(f"{uri}: a full model, but this has to be a LoRA adapter")
    return model


class TensorWorker:
    """Does tensor work, one unit at a time, in memory for a few tensors × models."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def ready(self) -> bool:
        """True once the worker runs."""
        return True

    def survey(self, unit: SurveyUnit) -> SurveyResult:
        """Statistics of every model in the unit's modules; see `fleet.work.survey`."""
        models = {name: open_model(uri) for name, uri in unit.models.items()}
        return survey(unit, open_full(unit.aligned), open_full(unit.unaligned), models, self._scratch)

    def realign(self, unit: RealignUnit) -> UnitRecord:
        """Write one shard of a realigned model, or a whole realigned adapter, with a row per edited module."""
        work = _Realigning(unit)
        if unit.as_adapter:
            ranks, sources = work.ranks(), [_adapter(unit.model)]
            record = write_adapter(unit.output, unit.shard, work.aligned, ranks, work.factors, sources)
            for tensor in (t for t, rank in ranks.items() if not rank and t.removesuffix(".weight") in unit.edited):
                work.factors(tensor)  # removed: not in the file, but the record says by how much that was an edit
        else:
            like = written_like(work.model, work.aligned)
            record = write_shard(unit.output, unit.shard, like, work.pieces)
        return UnitRecord(files=record.files, result={**record.result, "edits": work.edits})

    def sample(self, unit: SampleUnit) -> UnitRecord:
        """The record holds the sample, packed, and of how many entries it is one."""
        aligned, model = open_full(unit.aligned), open_model(unit.model)
        with ThreadPoolExecutor(1) as reader:
            sample, size = sample_task_vector(aligned, model, unit.tensors, unit.share, reader)
        return UnitRecord(result={"sample": packed(sample), "size": size})

    def count(self, unit: CountUnit) -> UnitRecord:
        """The record holds the counts, packed; see `WindowCounts`."""
        counts = WindowCounts(unit.low, unit.high)
        with ThreadPoolExecutor(1) as reader:
            count_task_vector(open_full(unit.aligned), open_model(unit.model), unit.tensors, counts, reader)
        return UnitRecord(result={"counts": packed(counts.counts)})

    def fuse(self, unit: FuseUnit) -> UnitRecord:
        """Write one shard of a fused model, or a whole fused adapter."""
        aligned = open_full(unit.aligned)
        members = {m.name: open_model(m.uri) for m in unit.members_M}
        curvatures = {m.name: open_curvature(m.curvature) for m in unit.members_M if m.curvature is not None}
        if not unit.as_adapter:
            with ThreadPoolExecutor(1) as reader:
                fusion = StreamedFusion(aligned, members, unit.method, unit.thresholds, reader, curvatures)
                return write_shard(unit.output, unit.shard, aligned, fusion.tensor)

        where = places(aligned.tensors)
        adapters = {name: m for name, m in members.items() if isinstance(m, Adapter)}
        modules = {name: name.removesuffix(".weight") for name in unit.shard.tensors}
        ranks = {name: sum(lora_rank(a, module) for a in adapters.values()) for name, module in modules.items()}
        if (limit := unit.method.max_rank) is not None:
            ranks = {name: min(rank, limit, *canonical_shape(aligned, name)) for name, rank in ranks.items()}
        lost: dict[str, float] = {}

        def factors(name: str) -> LowRank:
            found = {member: read_factors(adapter, name) for member, adapter in adapters.items()}
            deltas = {member: delta for member, delta in found.items() if delta is not None}
            weights = unit.method.coefficients([*members], where[name])
            known = CurvatureOf(unit.method.curvature, curvatures, aligned, name)
            fused = unit.method.fuse(deltas, weights, where[name], WHOLE, unit.thresholds, known)
            delta, lost[modules[name]] = truncated(fused, ranks[name], named_generator(0, modules[name]))
            return of_rank(delta, ranks[name])

        record = write_adapter(unit.output, unit.shard, aligned, ranks, factors, [*adapters.values()])
        residuals: dict[str, Json] = {module: _short(value) for module, value in lost.items() if value}
        return UnitRecord(files=record.files, result={**record.result, "recompression_residual": residuals})


class _Realigning:
    """One realign unit under way: what it reads, and the rows of what it edited."""

    def __init__(self, unit: RealignUnit) -> None:
        self.unit = unit
        self.aligned = open_full(unit.aligned)
        self.model = open_model(unit.model)
        self.safety = _adapter(unit.safety) if unit.safety is not None else None
        self.harmful = _adapter(unit.harmful) if unit.harmful is not None else None
        self.edits: list[Json] = []
        self._whole: Delta | None = None
        """The task vector of the tensor under way, all its modules."""

    def masked(self, view: ModuleView) -> Delta:
        """The module's task vector under the learned mask, which is rescaled over its whole tensor."""
        method = self.unit.method.controlled
        assert isinstance(method, Somf) and self.unit.mask is not None and self._whole is not None
        origin = read_factors(self.safety, view.tensor) if self.safety is not None else None
        turned = is_transposed(self.aligned, view.tensor)
        whole, start = (d.transposed() if turned and d is not None else d for d in (self._whole, origin))
        assert whole is not None
        masked = open_mask(self.unit.mask).apply(method, self.unit.name, view.tensor, whole, start)
        masked = masked.transposed() if turned else masked
        return masked if view.index is None else Dense(masked.dense()[view.index])

    @property
    def displacement(self) -> StoredDisplacement:
        return stored_displacement(self.unit.displacement)

    @cached_property
    def projections(self) -> Mapping[str, torch.Tensor]:
        assert self.unit.projections is not None
        folder = open_folder(self.unit.projections)
        return {name: read_tensor(folder, info) for name, info in read_headers(folder, "model").items()}

    def ranks(self) -> dict[str, int]:
        """Of an adapter's modules as they will be written, from headers alone."""
        return {name: self._rank(name) for name in self.unit.shard.tensors}

    def _rank(self, tensor: str) -> int:
        module = tensor.removesuffix(".weight")
        own, safety, harmful = (lora_rank(m, module) for m in (self.model, self.safety, self.harmful))
        limit = min(canonical_shape(self.aligned, tensor))
        return self.unit.method.written_rank(Ranks(own, safety, harmful, limit)) if module in self.unit.edited else own

    def factors(self, tensor: str) -> LowRank:
        """ΔW of one module of an adapter, edited or not, of the rank that `ranks` says."""
        assert isinstance(self.model, Adapter)
        view = ModuleView(tensor.removesuffix(".weight"), tensor, None)
        delta = read_factors(self.model, tensor) or zero(canonical_shape(self.aligned, tensor))
        if view.module not in self.unit.edited:
            return delta
        self._whole = delta
        edited = self._edited(view, delta, self._rank(tensor))
        assert isinstance(edited, LowRank)
        return edited

    def pieces(self, tensor: str) -> list[torch.Tensor]:
        """One tensor of a full model as its files hold it."""
        return [to_stored(self.aligned, tensor, self.weight(tensor))]

    def weight(self, tensor: str) -> torch.Tensor:
        """One tensor of a full model; what is not edited stays bit for bit as it was."""
        base = read_weight(self.aligned, tensor)
        delta = read_delta(self.model, tensor, base)
        views = module_views(self.aligned, tensor)
        edited = [view for view in views if view.module in self.unit.edited]
        self._whole = delta
        rest = delta
        if not views and delta is not None:
            rest = self.unit.method.edit_rest(_Module(self, ModuleView(tensor, tensor, None), delta))
        if not edited and rest is delta:
            if isinstance(self.model, FullModel):
                return read_weight(self.model, tensor)
            return base if delta is None else base + delta.dense()
        if not views:
            assert rest is not None
            return base + rest.dense()
        if edited[0].index is None:
            delta = zero(canonical_shape(self.aligned, tensor)) if delta is None else delta
            return base + self._edited(edited[0], delta, None).dense()
        total = torch.zeros_like(base) if delta is None else delta.dense().clone()
        for view in edited:
            total[view.index] = self._edited(view, Dense(total[view.index]), None).dense()
        return base + total

    def _edited(self, view: ModuleView, delta: Delta, rank: int | None) -> Delta:
        """The method's edit of one module, of exactly this rank if it goes into an adapter, and its row."""
        module = _Module(self, view, delta)
        edited, lost = self.unit.method.edit(module), 0.0
        if rank is not None:
            edited, lost = truncated(edited, rank, module.generator(0))
        self.edits.append(self._row(view.module, delta, edited, lost))
        return edited if rank is None or not isinstance(edited, LowRank) else of_rank(edited, rank)

    def _row(self, module: str, before: Delta, after: Delta, lost: float) -> dict[str, Json]:
        """What a reviewer reads of one edit: norms, energies as shares of ‖ΔW_before‖², and what recompression lost."""
        energy = before.norm() ** 2
        row: dict[str, Json] = {
            "module": module,
            "edit_norm": _short(after.minus(before).norm()),
            "energy_kept": _short(after.norm() ** 2 / energy) if energy else None,
            "rank": after.rank if isinstance(after, LowRank) else None,
            "recompression_residual": _short(lost),
        }
        basis = self.displacement.basis(module)
        if basis is not None and energy:
            shares = zip(before.energies(basis.left) / energy, after.energies(basis.left) / energy, strict=True)
            row["directions"] = [[_short(float(b)), _short(float(a))] for b, a in shares]
        return row


def _short(value: float) -> float:
    """Six digits: more says nothing in a table, and takes room in every record."""
    return float(f"{value:.6g}")


@dataclass
class _Module:
    """`fleet.methods.base.Module` over checkpoints: each part is read when a method asks for it."""

    work: _Realigning
    view: ModuleView
    delta: Delta

    @property
    def safety(self) -> Delta | None:
        return self._merged_with(self.work.safety)

    @property
    def harmful(self) -> Delta | None:
        return self._merged_with(self.work.harmful)

    @property
    def factors(self) -> tuple[Factors, Factors]:
        assert isinstance(self.work.model, Adapter) and self.work.safety is not None
        own, safety = (read_unscaled_factors(m, self.view.tensor) for m in (self.work.model, self.work.safety))
        assert own is not None and safety is not None
        return own, safety

    @property
    def projected(self) -> Delta:
        if isinstance(self.delta, LowRank):
            return LowRank(self.work.projections[self.view.module], self.delta.a)
        v = read_weight(self.work.aligned, self.view.tensor) - read_weight(
            open_full(self.work.unit.unaligned), self.view.tensor
        )
        v = v if self.view.index is None else v[self.view.index]
        norm = float(torch.linalg.vector_norm(v, dtype=torch.float64))
        return Dense(v @ (v.T @ self.delta.value) / norm)

    @property
    def target_norm(self) -> float:
        return self.work.unit.targets[self.view.module]

    def masked(self) -> Delta:
        return self.work.masked(self.view)

    def displacement(self, k: int) -> Triplets:
        basis = self.work.displacement.basis(self.view.module)
        assert basis is not None
        return basis.head(k)

    def generator(self, seed: int) -> torch.Generator:
        return named_generator(seed, self.view.module)

    def _merged_with(self, adapter: Adapter | None) -> LowRank | None:
        return read_factors(adapter, self.view.tensor) if adapter is not None and self.view.index is None else None
