"""The survey: V = W_aligned − W_unaligned is read once, tensor by tensor, and serves every model of the catalogue.

    both base models ─▶ blocks of rows, read ahead ─▶ V of one tensor, float32 ─┬▶ V's own part: norm, probes, basis
                                                                               └▶ every model's statistics

V's own part is a step of its own (`displacement`): done once for a pair of base models, read back every later night. A
tensor's V is in memory only while it is measured, and not even then if it is larger than `RESIDENT_BYTES`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.random_edits import named_generator
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import Triplets, leading_triplets
from fleet.algebra.statistics import Displacement, delta_statistics, probe_triples
from fleet.checkpoint.headers import TensorInfo, read_headers
from fleet.checkpoint.models import (
    Adapter,
    FullModel,
    Model,
    ModuleView,
    is_transposed,
    module_views,
    touched_tensors,
)
from fleet.checkpoint.task_vectors import read_delta, read_weight
from fleet.checkpoint.tensors import read_rows, read_tensor
from fleet.errors import CheckpointError
from fleet.methods import ModuleStatistics
from fleet.outputs import Output, write_file
from fleet.record import UnitRecord
from fleet.store import Folder, open_folder

BLOCK_BYTES = 4 << 20
"""Rows are read this many bytes at a time: small enough to stay in cache until they are subtracted."""

READ_AHEAD = 4
"""Blocks of each base model that are read while earlier ones are used."""

RESIDENT_BYTES = 1 << 30
"""A larger V, float32, is read again from storage for each product instead of being kept."""


@dataclass(frozen=True)
class SurveyUnit:
    """Measure many models in a group of tensors."""

    aligned: str
    unaligned: str
    models: dict[str, str]
    """Model name -> URI."""
    tensors: tuple[str, ...]
    file: str
    """What this unit's files are called, in the folder of V's own part and in those of projections."""
    rho: bool
    """Whether ρ, gain and their nulls are measured, which takes twice the flops."""
    directions: int
    """How many of V's leading singular triplets are kept."""
    displacement: str | Output
    """V's own part: where it is, or where this unit leaves it."""
    projections: dict[str, Output] = field(default_factory=dict)
    """Model -> where the B factors of its VVᵀΔW/‖V‖ go; empty unless a method asks for them."""


class SurveyResult(NamedTuple):
    """What one unit found."""

    statistics: dict[str, list[ModuleStatistics]]
    """Model -> its modules in this unit."""
    non_finite: dict[str, list[str]]
    """Model -> tensors that hold NaN or Inf."""
    displacement: UnitRecord
    projections: dict[str, UnitRecord]


class Scratch:
    """Memory that one worker keeps between tensors: fresh pages cost as much as the subtraction."""

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns), float32, uninitialised; the last one's memory."""
        if self._values.numel() < rows * columns:
            self._values = torch.empty(rows * columns)
        return self._values[: rows * columns].view(rows, columns)


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
    for tensor, v, norm in _displacements(aligned, unaligned, unit.tensors, scratch):
        here = {name: model for name, model in models.items() if tensor in touched[name]}
        views = module_views(aligned, tensor)
        deltas = _finite_deltas(aligned, tensor, here, bool(views), result.non_finite)
        for view in views:
            v_view = _view(v, view, aligned.tensors[tensor], is_transposed(aligned, tensor))
            displacement = own.of(view.module, v_view, norm if view.index is None else None)
            in_view = {n: d if view.index is None else Dense(d.dense()[view.index]) for n, d in deltas.items()}
            for name, (statistics, projected_b) in delta_statistics(v_view, displacement, in_view).items():
                delta = in_view[name]
                rank = delta.rank if isinstance(delta, LowRank) else None
                row = ModuleStatistics(module=view.module, shape=v_view.shape, rank=rank, **statistics._asdict())
                result.statistics[name].append(row)
                if projected_b is not None and name in projected:
                    projected[name][view.module] = projected_b
    for name, factors in projected.items():
        result.projections[name] = write_file(unit.projections[name], unit.file, factors)
    return result._replace(displacement=own.write())


class StoredDisplacement:
    """V's own part as the displacement step left it: `{module}.norm`, `.probes`, `.left`, `.singular`, `.right`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._tensors = read_headers(folder, "model")

    def of(self, module: str) -> Displacement:
        norm = float(self._read(f"{module}.norm"))
        has_probes = f"{module}.probes" in self._tensors
        return Displacement(norm, self._read(f"{module}.probes") if has_probes else None, self.basis(module))

    def basis(self, module: str) -> Triplets | None:
        """V's leading singular triplets; None if no directions were asked for."""
        if f"{module}.left" not in self._tensors:
            return None
        return Triplets(*(self._read(f"{module}.{part}") for part in ("left", "singular", "right")))

    def _read(self, name: str) -> torch.Tensor:
        return read_tensor(self._folder, self._tensors[name])


class _OwnPart:
    """V's own part of one unit: read back, or measured and written."""

    def __init__(self, unit: SurveyUnit) -> None:
        self._unit = unit
        self._stored = None
        if isinstance(unit.displacement, str):
            self._stored = StoredDisplacement(open_folder(unit.displacement))
        self._measured: dict[str, Displacement] = {}

    def of(self, module: str, v: RowBlocks, norm: float | None) -> Displacement:
        if self._stored is not None:
            return self._stored.of(module)
        generator = named_generator(0, module)
        if norm is None:
            norm = float(torch.linalg.vector_norm(v.dense(), dtype=torch.float64))
        probes = probe_triples(v, generator) if self._unit.rho else None
        basis = leading_triplets(v, self._unit.directions, generator) if self._unit.directions else None
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
        return write_file(self._unit.displacement, self._unit.file, tensors)


def _view(v: RowBlocks, view: ModuleView, info: TensorInfo, transposed: bool) -> RowBlocks:
    """V of one module, (d_out, d_in), from V of its tensor as the file holds it: stacked experts are stacked rows."""
    if view.index is None and not transposed:
        return v
    stored = v.dense()
    if view.index is not None:
        rows = info.shape[-2]
        stored = stored[view.index * rows : (view.index + 1) * rows]
    return RowBlocks.of(stored.T if transposed else stored)


# -- task vectors ------------------------------------------------------------------------------------------------


def _finite_deltas(
    aligned: FullModel, tensor: str, models: Mapping[str, Model], is_module: bool, non_finite: dict[str, list[str]]
) -> dict[str, Delta]:
    """Every model's ΔW of one tensor; what is no module is only checked, block by block, and has none here."""
    deltas: dict[str, Delta] = {}
    weight: torch.Tensor | None = None
    for name, model in models.items():
        if not all(_is_finite(model.folder, info) for info in _stored_tensors(model, tensor)):
            non_finite[name].append(tensor)
        elif is_module:
            if weight is None and not (isinstance(model, Adapter) and model.is_lora):
                weight = read_weight(aligned, tensor)
            delta = read_delta(model, tensor, torch.empty(0) if weight is None else weight)
            assert delta is not None
            deltas[name] = delta
    return deltas


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
    flat = block.reshape(-1)
    return float(torch.dot(flat, flat))


# -- V, tensor by tensor -----------------------------------------------------------------------------------------


def _displacements(
    aligned: FullModel, unaligned: FullModel, tensors: tuple[str, ...], scratch: Scratch
) -> Iterator[tuple[str, RowBlocks, float]]:
    """V of each tensor as (rows, columns) of its file, and ‖V‖. Each is gone when the next one comes.

    Raises:
        CheckpointError: NaN or Inf.
    """
    for tensor, blocks in _blocks_ahead(aligned, unaligned, tensors):
        info = aligned.tensors[tensor]
        rows, columns = _matrix_shape(info)
        keep = rows * columns * 4 <= RESIDENT_BYTES and bool(module_views(aligned, tensor))
        resident = scratch.matrix(rows, columns) if keep else None
        squares = 0.0
        for (start, stop), (a, u) in blocks:
            block = torch.empty(stop - start, columns) if resident is None else resident[start:stop]
            block.copy_(a).sub_(u.float())
            squares += _squares(block)
        if not math.isfinite(squares):
            raise _not_finite(aligned, unaligned, tensor)
        if resident is not None:
            yield tensor, RowBlocks.of(resident), squares**0.5
        else:
            yield tensor, _streamed(aligned, unaligned, tensor), squares**0.5


def _streamed(aligned: FullModel, unaligned: FullModel, tensor: str) -> RowBlocks:
    def blocks() -> Iterator[torch.Tensor]:
        for _, pairs in _blocks_ahead(aligned, unaligned, (tensor,)):
            for _, (a, u) in pairs:
                yield a.float().sub_(u.float())

    return RowBlocks(_matrix_shape(aligned.tensors[tensor]), torch.float32, blocks)


def _not_finite(aligned: FullModel, unaligned: FullModel, tensor: str) -> CheckpointError:
    where = [m.folder.uri for m in (aligned, unaligned) if not _is_finite(m.folder, m.tensors[tensor])]
    return CheckpointError(
        f"{' and '.join(where) or 'the difference of the base models'}: tensor {tensor} holds NaN or Inf; "
        "no task vector against it has meaning"
    )


_Rows = tuple[int, int]
_Pair = tuple[torch.Tensor, torch.Tensor]


def _blocks_ahead(
    aligned: FullModel, unaligned: FullModel, tensors: tuple[str, ...]
) -> Iterator[tuple[str, Iterator[tuple[_Rows, _Pair]]]]:
    """Per tensor, its blocks of rows in both models; a thread reads the next ones, over tensors, meanwhile."""
    jobs = [(name, rows) for name in tensors for rows in _row_ranges(aligned.tensors[name])]

    def read(name: str, rows: _Rows) -> _Pair:
        a, u = (read_rows(model.folder, model.tensors[name], *rows) for model in (aligned, unaligned))
        return a, u

    with ThreadPoolExecutor(1) as reader:
        ahead: deque[Future[_Pair]] = deque(reader.submit(read, *job) for job in jobs[:READ_AHEAD])
        following = iter(jobs[READ_AHEAD:])

        def of_tensor(name: str) -> Iterator[tuple[_Rows, _Pair]]:
            for rows in _row_ranges(aligned.tensors[name]):
                pair = ahead.popleft().result()
                if (job := next(following, None)) is not None:
                    ahead.append(reader.submit(read, *job))
                yield rows, pair

        for name in tensors:
            yield name, of_tensor(name)


def _matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """A tensor of any rank as a matrix: its last axis, and everything before it as rows."""
    columns = info.shape[-1] if info.shape else 1
    return math.prod(info.shape) // max(columns, 1), columns


def _row_ranges(info: TensorInfo) -> list[_Rows]:
    rows, _ = _matrix_shape(info)
    step = max(BLOCK_BYTES // max(info.num_bytes // max(rows, 1), 1), 1)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
