"""The survey: V = W_aligned − W_unaligned is read once, tensor by tensor, and serves every model of the catalogue.

    both base models ─▶ blocks of rows, read ahead ─▶ V of one tensor, float32 ─┬▶ V's own part: norm, probes, basis
    LoRA factors ─▶ one tensor ahead ──────────────────────────────────────────┴▶ every model's statistics

Threads read ahead over tensors, and the first product with V runs block by block, as the blocks come. V's own part is a
step of its own (`displacement`): done once for a pair of base models, read back every later night. A tensor's V is in
memory only while it is measured, and not even then if it is larger than `RESIDENT_BYTES`.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple, TypeAlias

import torch

from fleet.algebra import linalg
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.products import dot, row_ranges
from fleet.algebra.random_edits import named_generator
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import Triplets, leading_triplets
from fleet.algebra.statistics import (
    UNDEFINED_NORM,
    Displacement,
    delta_statistics,
    probe_triples,
    projected_factor,
)
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import TensorInfo, read_headers
from fleet.checkpoint.model import Model, touched_tensors
from fleet.checkpoint.modules import ModuleView, is_transposed, module_views
from fleet.checkpoint.opened import open_full, open_model
from fleet.checkpoint.shards import Output
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_weight
from fleet.checkpoint.tensors import read_rows, read_tensor
from fleet.checkpoint.write import write_file
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json
from fleet.methods import ModuleStatistics
from fleet.store import Folder, open_folder
from fleet.work.scratch import Memory, Scratch, Slot, ring
from fleet.work.tensor_worker import TensorWorker
from fleet.work.unit import PoolName, UnitRecord

READERS = 2
"""Threads that read them; one does not keep a fast disk busy."""

CACHED_NUMBERS = 1 << 17
"""Numbers that are converted, subtracted and squared at a time: they stay in cache from one to the next."""

RESIDENT_BYTES = 1 << 30
"""A larger V, float32, is read again from storage for each product instead of being kept; not of stacked experts."""


@dataclass(frozen=True)
class SurveyUnit:
    """Measure many models in a group of tensors."""

    aligned: str
    unaligned: str
    models: dict[str, str]
    """Key of its survey step -> URI of the model."""
    tensors: tuple[str, ...]
    file: str
    """What this unit's files are called, in the folder of V's own part and in those of projections."""
    rho: bool
    """Whether ρ, gain and their nulls are measured, which takes twice the flops."""
    directions: int
    """How many of V's leading singular triplets are kept."""
    displacement_key: str
    """Key of the step of V's own part."""
    displacement: str | Output
    """V's own part: where it is, or where this unit leaves it."""
    projections: dict[str, Output] = field(default_factory=dict[str, Output])
    """Model's key -> where the B factors of its VVᵀΔW/‖V‖ go; empty unless a method asks for them."""

    pool: ClassVar[PoolName] = "tensor"

    def run(self, host: TensorWorker) -> dict[str, UnitRecord]:
        """A record per step: of each model its rows and what of it isn't finite, and of V's own part its files."""
        models = {key: open_model(uri) for key, uri in self.models.items()}
        found = survey(self, open_full(self.aligned), open_full(self.unaligned), models, host.scratch)
        records = {self.displacement_key: found.displacement}
        for key, rows in found.statistics.items():
            files = found.projections[key].files if key in found.projections else {}
            result: dict[str, Json] = {
                "modules": [row.model_dump(mode="json") for row in rows],
                "non_finite": [*found.non_finite[key]],
            }
            records[key] = UnitRecord(files=files, result=result)
        return records


class SurveyResult(NamedTuple):
    """What one unit found."""

    statistics: dict[str, list[ModuleStatistics]]
    """Model -> its modules in this unit."""
    non_finite: dict[str, list[str]]
    """Model -> tensors that hold NaN or Inf."""
    displacement: UnitRecord
    projections: dict[str, UnitRecord]


Rows: TypeAlias = tuple[int, int]
Pair: TypeAlias = tuple[Rows, torch.Tensor, torch.Tensor]
"""A range of rows, and their values in the aligned and the unaligned model."""


def survey(
    unit: SurveyUnit, aligned: FullModel, unaligned: FullModel, models: Mapping[str, Model], scratch: Scratch
) -> SurveyResult:
    """Statistics of every model in the unit's modules; every tensor read is checked for NaN and Inf.

    Raises:
        CheckpointError: NaN or Inf in the base models, which would poison every model alike.
    """
    result = SurveyResult({n: [] for n in models}, {n: [] for n in models}, UnitRecord(), {})
    touched = {name: set(touched_tensors(model)) for name, model in models.items()}
    own = _OwnPart(unit)
    projected: dict[str, dict[str, torch.Tensor]] = {name: {} for name in unit.projections}
    loras = {name: model for name, model in models.items() if isinstance(model, Adapter) and model.is_lora}
    factors = _one_ahead(lambda tensor: _finite_factors(tensor, loras, result.non_finite), unit.tensors)
    displaced = _displacements(aligned, unaligned, unit.tensors, scratch)
    for v, tensor, low_rank in zip(displaced, unit.tensors, factors, strict=True):
        others = {n: model for n, model in models.items() if n not in loras and tensor in touched[n]}
        views = module_views(aligned, tensor)
        deltas = low_rank | _finite_deltas(aligned, tensor, others, bool(views), result.non_finite)
        for view in views:
            v_view = _view(v, view, aligned.tensors[tensor], is_transposed(aligned, tensor))
            displacement = own.of(view.module, v_view, v.norm if view.index is None else None)
            in_view = {n: d if view.index is None else Dense(d.dense()[view.index]) for n, d in deltas.items()}
            for name, statistics in delta_statistics(v_view, displacement, in_view, unit.rho).items():
                delta = in_view[name]
                rank = delta.rank if isinstance(delta, LowRank) else None
                row = ModuleStatistics(module=view.module, shape=v_view.shape, rank=rank, **statistics._asdict())
                result.statistics[name].append(row)
                if name in projected and isinstance(delta, LowRank) and row.rho is not None:
                    projected[name][view.module] = projected_factor(v_view, displacement.norm, delta)
    for name, by_module in projected.items():
        result.projections[name] = UnitRecord(files=write_file(unit.projections[name], unit.file, by_module))
    return result._replace(displacement=own.write())


class StoredDisplacement:
    """V's own part as the displacement step left it: `{module}.norm`, `.probes`, `.left`, `.singular`, `.right`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._tensors = read_headers(folder, "model")

    def of(self, module: str, rho: bool) -> Displacement:
        """One module's part, without the probes where ρ is not asked for."""
        has_probes = rho and f"{module}.probes" in self._tensors
        probes = self._read(f"{module}.probes") if has_probes else None
        return Displacement(float(self._read(f"{module}.norm")), probes, self.basis(module))

    def basis(self, module: str) -> Triplets | None:
        """V's leading singular triplets; None if no directions were asked for."""
        if f"{module}.left" not in self._tensors:
            return None
        return Triplets(*(self._read(f"{module}.{part}") for part in ("left", "singular", "right")))

    def _read(self, name: str) -> torch.Tensor:
        return read_tensor(self._folder, self._tensors[name])


@lru_cache(maxsize=4)
def stored_displacement(uri: str) -> StoredDisplacement:
    """Its headers, of as many files as there are units, are kept between the units of one worker."""
    return StoredDisplacement(open_folder(uri))


class _OwnPart:
    """V's own part of one unit: read back, or measured and written."""

    def __init__(self, unit: SurveyUnit) -> None:
        self._unit = unit
        self._stored = None
        if isinstance(unit.displacement, str):
            self._stored = stored_displacement(unit.displacement)
        self._measured: dict[str, Displacement] = {}

    def of(self, module: str, v: RowBlocks, whole_norm: Callable[[], float] | None) -> Displacement:
        """One module's part.

        Args:
            whole_norm: gives ‖V‖ if the module is the whole of its tensor.
        """
        if self._stored is not None:
            return self._stored.of(module, self._unit.rho)
        norm = linalg.norm(v.dense()) if whole_norm is None else whole_norm()
        probes = basis = None
        if norm >= UNDEFINED_NORM:
            probes = probe_triples(v, norm, named_generator(0, f"{module}.probes"))
        if self._unit.directions:
            basis = leading_triplets(v, self._unit.directions, named_generator(0, f"{module}.basis"))
        self._measured[module] = Displacement(norm, probes, basis)
        return self._measured[module]

    def write(self) -> UnitRecord:
        if not isinstance(self._unit.displacement, Output):
            return UnitRecord()
        tensors: dict[str, torch.Tensor] = {}
        for module, part in self._measured.items():
            tensors[f"{module}.norm"] = torch.tensor([part.norm], dtype=torch.float64)
            if part.probes is not None:
                tensors[f"{module}.probes"] = part.probes
            if part.basis is not None:
                names = (f"{module}.left", f"{module}.singular", f"{module}.right")
                tensors |= dict(zip(names, part.basis, strict=True))
        return UnitRecord(files=write_file(self._unit.displacement, self._unit.file, tensors))


def _view(v: _Displaced, view: ModuleView, info: TensorInfo, transposed: bool) -> RowBlocks:
    """V of one module, (d_out, d_in), from V of its tensor as the file holds it: stacked experts are stacked rows."""
    if view.index is None and not transposed:
        return v.matrix
    stored = v.dense()
    if view.index is not None:
        rows = info.shape[-2]
        stored = stored[view.index * rows : (view.index + 1) * rows]
    return RowBlocks.of(stored.T if transposed else stored)


# -- task vectors ------------------------------------------------------------------------------------------------


def _finite_factors(tensor: str, adapters: Mapping[str, Adapter], non_finite: dict[str, list[str]]) -> dict[str, Delta]:
    """ΔW of one tensor of every plain LoRA that changes it."""
    deltas: dict[str, Delta] = {}
    for name, adapter in adapters.items():
        factors = read_factors(adapter, tensor)
        if factors is None:
            continue
        if _is_finite_delta(factors):
            deltas[name] = factors
        else:
            non_finite[name].append(tensor)
    return deltas


def _one_ahead(read: Callable[[str], dict[str, Delta]], tensors: tuple[str, ...]) -> Iterator[dict[str, Delta]]:
    """`read` of each tensor; a thread does the next one's meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        started = (reader.submit(read, tensor) for tensor in tensors)
        ahead = next(started, None)
        while ahead is not None:
            found = ahead.result()
            ahead = next(started, None)
            yield found


def _finite_deltas(
    aligned: FullModel, tensor: str, models: Mapping[str, Model], is_module: bool, non_finite: dict[str, list[str]]
) -> dict[str, Delta]:
    """ΔW of one tensor of models that hold weights whole; what is no module is only checked, block by block."""
    deltas: dict[str, Delta] = {}
    weight = read_weight(aligned, tensor) if is_module and models else torch.empty(0)
    for name, model in models.items():
        if not is_module:
            if not all(_is_finite(model.folder, info) for info in _stored_tensors(model, tensor)):
                non_finite[name].append(tensor)
            continue
        delta = read_delta(model, tensor, weight)
        assert delta is not None
        if _is_finite_delta(delta):
            deltas[name] = delta
        else:
            non_finite[name].append(tensor)
    return deltas


def _is_finite_delta(delta: Delta) -> bool:
    parts = (delta.a, delta.b) if isinstance(delta, LowRank) else (delta.value,)
    return all(math.isfinite(_squares(part)) for part in parts)


def _stored_tensors(model: Model, tensor: str) -> list[TensorInfo]:
    """The tensors of a model's files that decide its ΔW of one base tensor."""
    if isinstance(model, FullModel):
        return [model.tensors[tensor]]
    module = model.modules.get(tensor.rpartition(".")[0])
    replaced = model.replaced.get(tensor)
    return [*(module.tensors if module else ()), *([replaced] if replaced else [])]


def _is_finite(folder: Folder, info: TensorInfo) -> bool:
    return all(math.isfinite(_squares(read_rows(folder, info, *rows).float())) for rows in _row_ranges(info))


def _squares(block: torch.Tensor) -> float:
    """Σ x²; NaN or Inf where a value is (float32: values beyond 1e19 count as infinite)."""
    return float(dot(block, block))


# -- V, tensor by tensor -----------------------------------------------------------------------------------------


class _Displaced:
    """V of one tensor, as its file holds it. Its first use reads it, block by block, and checks it.

    Args:
        pairs: the blocks of both models, being read.
        memory: where V is kept.
        keep: whether the whole of it is; if not, each use but the first reads it again.
    """

    def __init__(
        self,
        aligned: FullModel,
        unaligned: FullModel,
        tensor: str,
        pairs: Iterator[Pair],
        memory: Memory,
        keep: bool,
    ) -> None:
        self._models = aligned, unaligned
        self._tensor = tensor
        self._pairs = pairs
        self._memory = memory
        self._squares = 0.0
        self._is_read = False
        self.matrix = RowBlocks(_matrix_shape(aligned.tensors[tensor]), torch.float32, self._blocks)
        self._resident = _float32(memory, *self.matrix.shape) if keep else None

    def norm(self) -> float:
        """‖V‖.

        Raises:
            CheckpointError: NaN or Inf.
        """
        if not self._is_read:
            for _ in self._blocks():
                pass
        if not math.isfinite(self._squares):
            raise _not_finite(*self._models, self._tensor)
        return self._squares**0.5

    def dense(self) -> torch.Tensor:
        """The whole of V."""
        self.norm()
        return self.matrix.dense() if self._resident is None else self._resident

    def _blocks(self) -> Iterator[torch.Tensor]:
        if not self._is_read:
            for (start, stop), a, u in self._pairs:
                block = _float32(self._memory, *a.shape) if self._resident is None else self._resident[start:stop]
                self._squares += _subtract(a, u, block)
                yield block
            self._is_read = True
        elif self._resident is not None:
            yield from (self._resident[start:stop] for start, stop in row_ranges(*self.matrix.shape))
        else:
            for _, pairs in _blocks_ahead(*self._models, (self._tensor,), ring()):
                for _, a, u in pairs:
                    block = torch.empty(a.shape)
                    _subtract(a, u, block)
                    yield block


def _displacements(
    aligned: FullModel, unaligned: FullModel, tensors: tuple[str, ...], scratch: Scratch
) -> Iterator[_Displaced]:
    """V of each tensor. Each is gone when the next one comes; what of it nobody used is read and checked then.

    Raises:
        CheckpointError: NaN or Inf.
    """
    for tensor, pairs in _blocks_ahead(aligned, unaligned, tensors, scratch.ring):
        rows, columns = _matrix_shape(aligned.tensors[tensor])
        views = module_views(aligned, tensor)
        # Of stacked experts each is looked at apart: reading all of them for each would take E passes.
        keep = bool(views) and (len(views) > 1 or rows * columns * 4 <= RESIDENT_BYTES)
        v = _Displaced(aligned, unaligned, tensor, pairs, scratch.v, keep)
        yield v
        v.norm()


def _float32(memory: Memory, rows: int, columns: int) -> torch.Tensor:
    return memory.take(rows * columns * 4).view(torch.float32).view(rows, columns)


def _subtract(a: torch.Tensor, u: torch.Tensor, out: torch.Tensor) -> float:
    """out = a − u in float32, and Σ out²; NaN or Inf where a value is."""
    squares = 0.0
    parts = (torch.split(x.view(-1), CACHED_NUMBERS) for x in (a, u, out))
    for a_part, u_part, part in zip(*parts, strict=True):
        squares += _squares(part.copy_(a_part).sub_(u_part))
    return squares


def _not_finite(aligned: FullModel, unaligned: FullModel, tensor: str) -> CheckpointError:
    where = [m.folder.uri for m in (aligned, unaligned) if not _is_finite(m.folder, m.tensors[tensor])]
    return CheckpointError(
        f"{' and '.join(where) or 'the difference of the base models'}: tensor {tensor} holds NaN or Inf; "
        "no task vector against it has meaning"
    )


def _blocks_ahead(
    aligned: FullModel, unaligned: FullModel, tensors: tuple[str, ...], slots: list[Slot]
) -> Iterator[tuple[str, Iterator[Pair]]]:
    """Per tensor, its blocks of rows in both models; threads read the next ones, over tensors, meanwhile.

    A pair is gone when the next one comes: blocks go round the slots, of which there is one more than is read ahead.
    """
    jobs = [(name, rows) for name in tensors for rows in _row_ranges(aligned.tensors[name])]

    with ThreadPoolExecutor(READERS) as readers:

        def read(model: FullModel, name: str, rows: Rows, memory: Memory) -> Future[torch.Tensor]:
            info = model.tensors[name]
            taken = memory.take(info.num_bytes // max(_matrix_shape(info)[0], 1) * (rows[1] - rows[0]))
            return readers.submit(read_rows, model.folder, info, *rows, taken)

        def start(index: int) -> None:
            if index < len(jobs):
                of_aligned, of_unaligned = slots[index % len(slots)]
                name, rows = jobs[index]
                ahead.append((read(aligned, name, rows, of_aligned), read(unaligned, name, rows, of_unaligned)))

        ahead: deque[tuple[Future[torch.Tensor], Future[torch.Tensor]]] = deque()
        for index in range(len(slots) - 1):
            start(index)
        following = itertools.count(len(slots) - 1)

        def of_tensor(name: str) -> Iterator[Pair]:
            for rows in _row_ranges(aligned.tensors[name]):
                a, u = (future.result() for future in ahead.popleft())
                start(next(following))
                yield rows, a, u

        for name in tensors:
            yield name, of_tensor(name)


def _matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """A tensor of any rank as a matrix: its last axis, and everything before it as rows."""
    columns = info.shape[-1] if info.shape else 1
    return math.prod(info.shape) // max(columns, 1), columns


def _row_ranges(info: TensorInfo) -> list[Rows]:
    return row_ranges(*_matrix_shape(info))
