"""The survey: V = W_aligned − W_unaligned is read once, tensor by tensor, and serves every model of the catalogue.

    both base models ─▶ blocks of rows, read ahead ─▶ V of one tensor, float32 ─┬▶ V's own parts: directions, spectrum
    LoRA factors ─▶ one tensor ahead ──────────────────────────────────────────┴▶ every model's statistics

Threads read ahead over tensors, and the first product with V runs block by block, as the blocks come. Each of V's own
parts is a step of its own (`displacement`): done once for a pair of base models, and only if it is asked for, and read
back every later night. A tensor's V is in memory only while it is measured, and not even then if it is larger than
`RESIDENT_BYTES`. Where no model is compared with V the base models are left alone, and task vectors only checked.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, TypeAlias

import torch

from fleet.algebra import linalg
from fleet.algebra.delta import Delta, Dense, LowRank
from fleet.algebra.products import dot, row_ranges
from fleet.algebra.random_edits import named_generator
from fleet.algebra.row_blocks import RowBlocks
from fleet.algebra.spectral import Triplets, leading_directions, squared_singular_values
from fleet.algebra.statistics import Asked, Displacement, delta_statistics, projected_factor
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import TensorInfo, read_headers
from fleet.checkpoint.model import Model, touched_tensors
from fleet.checkpoint.modules import ModuleView, is_transposed, module_views
from fleet.checkpoint.opened import open_full, open_model
from fleet.checkpoint.shards import Output
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_weight
from fleet.checkpoint.tensors import is_finite, read_rows, read_tensor
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
class Surveyed:
    """One model of a pass."""

    uri: str
    asked: Asked
    """What is measured of it."""
    projection: Output | None = None
    """Where the B factors of its VVᵀΔW/‖V‖ go; None unless a method asks for them."""


@dataclass(frozen=True)
class OwnPart:
    """What belongs to V alone, of one kind."""

    key: str
    """Of its step."""
    place: str | Output
    """Where it is, or where this unit leaves it."""


@dataclass(frozen=True)
class SurveyUnit:
    """Measure many models in a group of tensors."""

    aligned: str
    unaligned: str | None
    """None where nothing of V is asked for."""
    models: dict[str, Surveyed]
    """Key of its survey step -> a model."""
    tensors: tuple[str, ...]
    file: str
    """What this unit's files are called, in the folders of V's own parts and in those of projections."""
    directions: int = 0
    """How many leading singular triplets `basis` has."""
    basis: OwnPart | None = None
    """V's leading singular triplets; None where nobody asks for them."""
    spectrum: OwnPart | None = None
    """V's squared singular values; None where nobody asks for them."""

    pool: ClassVar[PoolName] = "tensor"

    def run(self, host: TensorWorker) -> dict[str, UnitRecord]:
        """A record per step: of each model its rows and what of it isn't finite, and of V's own parts their files."""
        models = {key: open_model(model.uri) for key, model in self.models.items()}
        unaligned = open_full(self.unaligned) if self.unaligned is not None else None
        found = survey(self, open_full(self.aligned), unaligned, models, host.scratch)
        records = dict(found.own)
        for key, rows in found.statistics.items():
            files = found.projections[key].files if key in found.projections else {}
            result: dict[str, Json] = {
                # What was not asked for is left out; what is undefined is null.
                "modules": [row.model_dump(mode="json", exclude_unset=True) for row in rows],
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
    own: dict[str, UnitRecord]
    """Key of the step of a part of V's own that was measured -> its files."""
    projections: dict[str, UnitRecord]


Rows: TypeAlias = tuple[int, int]
Pair: TypeAlias = tuple[Rows, torch.Tensor, torch.Tensor]
"""A range of rows, and their values in the aligned and the unaligned model."""


def survey(
    unit: SurveyUnit, aligned: FullModel, unaligned: FullModel | None, models: Mapping[str, Model], scratch: Scratch
) -> SurveyResult:
    """Statistics of every model in the unit's modules; every tensor read is checked for NaN and Inf.

    Raises:
        CheckpointError: NaN or Inf in the base models, which would poison every model alike.
    """
    result = SurveyResult({n: [] for n in models}, {n: [] for n in models}, {}, {})
    touched = {name: set(touched_tensors(model)) for name, model in models.items()}
    asked = {name: unit.models[name].asked for name in models}
    own = _OwnParts(unit)
    outputs = {name: model.projection for name, model in unit.models.items() if model.projection is not None}
    projected: dict[str, dict[str, torch.Tensor]] = {name: {} for name in outputs}
    loras = {name: model for name, model in models.items() if isinstance(model, Adapter) and model.is_lora}
    factors = _one_ahead(lambda tensor: _finite_factors(tensor, loras, result.non_finite), unit.tensors)
    displaced = _displacements(aligned, unaligned, unit.tensors, scratch)
    for v, tensor, low_rank in zip(displaced, unit.tensors, factors, strict=True):
        others = {n: model for n, model in models.items() if n not in loras and tensor in touched[n]}
        views = module_views(aligned, tensor)
        deltas = low_rank | _finite_deltas(aligned, tensor, others, bool(views), result.non_finite)
        for view in views:
            displacement = None
            if v is not None:
                displacement = _of_module(v, view, aligned.tensors[tensor], is_transposed(aligned, tensor), own)
            in_view = {n: d if view.index is None else Dense(d.dense()[view.index]) for n, d in deltas.items()}
            for name, statistics in delta_statistics(displacement, in_view, asked).items():
                delta = in_view[name]
                rank = delta.rank if isinstance(delta, LowRank) else None
                measured = {field: getattr(statistics, field) for field in asked[name].fields}
                d_out, d_in = delta.shape
                row = ModuleStatistics(module=view.module, shape=(d_out, d_in), rank=rank, **measured)
                result.statistics[name].append(row)
                if name in projected and isinstance(delta, LowRank) and row.is_defined:
                    assert displacement is not None
                    projected[name][view.module] = projected_factor(displacement.v, displacement.norm(), delta)
    for name, by_module in projected.items():
        result.projections[name] = UnitRecord(files=write_file(outputs[name], unit.file, by_module))
    return result._replace(own=own.write())


def _of_module(v: _Displaced, view: ModuleView, info: TensorInfo, transposed: bool, own: _OwnParts) -> Displacement:
    """V of one module, with what of it alone is asked for."""
    matrix = _view(v, view, info, transposed)
    whole = view.index is None
    if own.measures:
        v.norm()  # reads V: what is measured of it alone goes over its rows more than once, or not to the end
    spectrum, basis = own.of(view.module, matrix)
    return Displacement(matrix, v.norm if whole else lambda: linalg.norm(matrix.dense()), spectrum, basis)


class StoredDisplacement:
    """A part of V's own as its step left it: `{module}.left`, `.singular`, `.right` or `.spectrum`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._tensors = read_headers(folder, "model")

    def basis(self, module: str) -> Triplets | None:
        """V's leading singular triplets; None if they were not measured here."""
        if f"{module}.left" not in self._tensors:
            return None
        return Triplets(*(self._read(f"{module}.{part}") for part in ("left", "singular", "right")))

    def spectrum(self, module: str) -> torch.Tensor:
        """σ² of all of V's singular values: (min(d_out, d_in),), float64."""
        return self._read(f"{module}.spectrum")

    def _read(self, name: str) -> torch.Tensor:
        return read_tensor(self._folder, self._tensors[name])


@lru_cache(maxsize=4)
def stored_displacement(uri: str) -> StoredDisplacement:
    """Its headers, of as many files as there are units, are kept between the units of one worker."""
    return StoredDisplacement(open_folder(uri))


class _OwnParts:
    """V's own parts of one unit: read back, or measured and written."""

    def __init__(self, unit: SurveyUnit) -> None:
        self._unit = unit
        self._spectra: dict[str, torch.Tensor] = {}
        self._bases: dict[str, torch.Tensor] = {}

    @property
    def measures(self) -> bool:
        parts = (self._unit.spectrum, self._unit.basis)
        return any(part is not None and isinstance(part.place, Output) for part in parts)

    def of(self, module: str, v: RowBlocks) -> tuple[torch.Tensor | None, Triplets | None]:
        """One module's spectrum and basis, each None where nobody asks for it."""
        unit = self._unit
        return (
            self._spectrum(module, v, unit.spectrum) if unit.spectrum is not None else None,
            self._basis(module, v, unit.basis) if unit.basis is not None else None,
        )

    def _spectrum(self, module: str, v: RowBlocks, part: OwnPart) -> torch.Tensor:
        if isinstance(part.place, str):
            return stored_displacement(part.place).spectrum(module)
        return self._spectra.setdefault(f"{module}.spectrum", squared_singular_values(v))

    def _basis(self, module: str, v: RowBlocks, part: OwnPart) -> Triplets | None:
        if isinstance(part.place, str):
            return stored_displacement(part.place).basis(module)
        basis = leading_directions(v, self._unit.directions, named_generator(0, f"{module}.basis"))
        names = (f"{module}.left", f"{module}.singular", f"{module}.right")
        self._bases |= dict(zip(names, basis, strict=True))
        return basis

    def write(self) -> dict[str, UnitRecord]:
        """Key of a part's step -> its files, of the parts that were measured."""
        found: dict[str, UnitRecord] = {}
        for part, tensors in ((self._unit.spectrum, self._spectra), (self._unit.basis, self._bases)):
            if part is not None and isinstance(part.place, Output):
                found[part.key] = UnitRecord(files=write_file(part.place, self._unit.file, tensors))
        return found


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
    """Reads all of it, so little at a time that it is checked in the cache."""
    rows, columns = _matrix_shape(info)
    step = max(CACHED_NUMBERS // max(columns, 1), 1)
    memory = torch.empty(step * (info.num_bytes // max(rows, 1)), dtype=torch.uint8)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        taken = memory[: info.num_bytes // rows * (stop - start)]
        if not is_finite(read_rows(folder, info, start, stop, taken)):
            return False
    return True


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
    aligned: FullModel, unaligned: FullModel | None, tensors: tuple[str, ...], scratch: Scratch
) -> Iterator[_Displaced | None]:
    """V of each tensor; None without an unaligned model, and of what is no module, which is only checked. Each is gone
    when the next one comes; what of it nobody used is read and checked then.

    Raises:
        CheckpointError: NaN or Inf.
    """
    if unaligned is None:
        yield from itertools.repeat(None, len(tensors))
        return
    is_module = {tensor: bool(module_views(aligned, tensor)) for tensor in tensors}
    modules = tuple(tensor for tensor in tensors if is_module[tensor])
    displaced = _module_displacements(aligned, unaligned, modules, scratch)
    with ThreadPoolExecutor(1) as checker:
        others = checker.submit(_check_finite, aligned, unaligned, [t for t in tensors if not is_module[t]])
        for tensor in tensors:
            yield next(displaced) if is_module[tensor] else None
        for _ in displaced:
            pass  # the last one is checked
        others.result()


def _module_displacements(
    aligned: FullModel, unaligned: FullModel, modules: tuple[str, ...], scratch: Scratch
) -> Iterator[_Displaced]:
    for tensor, pairs in _blocks_ahead(aligned, unaligned, modules, scratch.ring):
        rows, columns = _matrix_shape(aligned.tensors[tensor])
        # Of stacked experts each is looked at apart: reading all of them for each would take E passes.
        keep = len(module_views(aligned, tensor)) > 1 or rows * columns * 4 <= RESIDENT_BYTES
        v = _Displaced(aligned, unaligned, tensor, pairs, scratch.v, keep)
        yield v
        v.norm()


def _check_finite(aligned: FullModel, unaligned: FullModel, tensors: list[str]) -> None:
    """
    Raises:
        CheckpointError: NaN or Inf.
    """
    for tensor in tensors:
        if not all(_is_finite(model.folder, model.tensors[tensor]) for model in (aligned, unaligned)):
            raise _not_finite(aligned, unaligned, tensor)


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
