"""Fusion into a full model: each tensor in runs of rows, computed in cache, written as they come.

A tensor is never in memory whole, so a worker needs some megabytes per model, whatever the models' size. A method that
makes several passes reads a tensor several times; one that is not entrywise gets whole tensors.

Linear methods on full models are exact where they can be: a single model with the coefficient 1 is copied, and where
the coefficients add up to 1, the aligned model isn't read: θ = θ_1 + Σ_t λ_t (θ_t − θ_1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol, TypeVar

import numpy as np
import torch

from fleet.algebra.delta import Delta, LowRank
from fleet.algebra.products import product
from fleet.algebra.ranks import RankSearch, WindowCounts
from fleet.algebra.sparsify import WHOLE, thresholds_of
from fleet.checkpoint.curvature import Curvature
from fleet.checkpoint.curvature_tensors import CurvatureOf, read_fisher_rows
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, touched_tensors
from fleet.checkpoint.modules import is_transposed
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_weight, to_stored
from fleet.checkpoint.tensors import read_rows
from fleet.checkpoint.views import is_local
from fleet.fusion import AnyFusionMethod
from fleet.fusion.base import Entries, FusionMethod, Thresholds, weighted_sum
from fleet.fusion.place import Place, places

RUN_ENTRIES = 1 << 16
"""Entries of a run: so few that a core's own cache holds float32 copies of a few models."""

FIXED_ENTRIES = 1 << 16
"""Entries of the blocks of rows in which LoRAs are multiplied out and sums are made, whatever the size of a run: the
blocks decide the last bits of what is written, so they follow from the tensor's shape alone."""

COMPILED_RUNS = 8
"""How many runs a compiled loop over bfloat16 files does per call. It makes no copies, so fewer calls are faster."""

SAMPLE_ENTRIES = 1 << 16
"""Entries of the sample that a search for a threshold begins with; a tensor of at most 16 times as many needs none."""

_SAMPLE_ROWS = 256
"""About how many rows the sample is taken from."""

_T = TypeVar("_T")


class _Rows(Protocol):
    """A model's part of one tensor, in the files' orientation; all axes but the last are flattened to rows."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop): (stop − start, columns), any floating dtype."""
        ...


@dataclass(frozen=True)
class _Stored:
    """A full model's weights."""

    model: FullModel
    tensor: str

    @property
    def is_bfloat16(self) -> bool:
        return self.model.tensors[self.tensor].dtype == "BF16"

    def read(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop), (stop − start, columns), read into `memory` if given, which is exactly their bytes."""
        return read_rows(self.model.folder, self.model.tensors[self.tensor], start, stop, memory)


class _Product:
    """A LoRA's task vector, multiplied out in fixed blocks of rows, whichever rows are read."""

    def __init__(self, factors: LowRank) -> None:
        self._factors = factors
        self._step = _rows_of(FIXED_ENTRIES, factors.shape[1])
        self._block = lru_cache(maxsize=1)(self._multiplied)

    def read(self, start: int, stop: int) -> torch.Tensor:
        firsts = range(start - start % self._step, stop, self._step)
        parts = [self._block(first)[max(start - first, 0) : stop - first] for first in firsts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _multiplied(self, first: int) -> torch.Tensor:
        return product(self._factors.b[first : first + self._step], self._factors.a)


@dataclass(frozen=True)
class _Held:
    """A task vector in memory, computed from whole tensors: DoRA's, or of a tensor that an adapter saved whole."""

    values: torch.Tensor

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.values[start:stop]


@dataclass(frozen=True)
class _Fisher:
    """A model's Fisher, in the orientation of its files, which is the aligned model's."""

    curvature: Curvature
    tensor: str

    def read(self, start: int, stop: int) -> torch.Tensor:
        return read_fisher_rows(self.curvature, self.tensor, start, stop)


class StreamedFusion:
    """The fusion of full models, or of adapters, into a full model.

    Args:
        members: model -> its headers, in the manifest's order.
        thresholds: those over whole models, for a global method; None for each tensor's own.
        reader: a thread that reads ahead.
        curvatures: model -> its curvature, if the method needs any.
    """

    def __init__(
        self,
        aligned: FullModel,
        members: Mapping[str, Model],
        method: AnyFusionMethod,
        thresholds: Thresholds | None,
        reader: Executor,
        curvatures: Mapping[str, Curvature] = MappingProxyType({}),
    ) -> None:
        self._aligned = aligned
        self._curvatures = curvatures
        self._members = members
        self._method = method
        self._thresholds = thresholds
        self._reader = reader
        self._places = places(aligned.tensors)
        self._touched = {name: frozenset(touched_tensors(model)) for name, model in members.items()}

    def tensor(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor of the fused model, run by run, as the aligned model's files hold it; any floating dtype."""
        method, place = self._method, self._places[name]
        weights = method.coefficients([*self._members], place)
        used = [m for m in self._members if weights[m] or not method.is_linear]
        members = {m: self._members[m] for m in used if name in self._touched[m]}
        if not method.is_entrywise:
            yield self._whole(members, weights, place)
            return
        fishers = {m: _Fisher(c, name) for m, c in self._curvatures.items() if members}
        tensor = _Tensor(self._aligned, members, place, self._reader, fishers, [*self._members])
        if not tensor.parts or not tensor.size:
            yield from tensor.aligned()
        elif method.is_linear and len(tensor.stored) == len(used) and math.isclose(sum(weights.values()), 1.0):
            yield from tensor.averaged(weights)
        elif method.is_linear:
            yield from tensor.linear(weights)
        else:
            thresholds = tensor.thresholds(method) if self._thresholds is None else self._thresholds
            yield from tensor.fused(method, weights, thresholds)

    def _whole(self, members: Mapping[str, Model], weights: Mapping[str, float], place: Place) -> torch.Tensor:
        base = read_weight(self._aligned, place.tensor)
        found = {name: read_delta(model, place.tensor, base) for name, model in members.items()}
        deltas = {name: delta for name, delta in found.items() if delta is not None}
        if deltas:
            known = CurvatureOf(self._method.curvature, self._curvatures, self._aligned, place.tensor)
            base = base + self._method.fuse(deltas, weights, place, WHOLE, None, known).dense()
        return to_stored(self._aligned, place.tensor, base)


def sample_task_vector(
    aligned: FullModel, model: Model, tensors: Sequence[str], share: float, reader: Executor
) -> tuple[torch.Tensor, int]:
    """About this share of a task vector's entries in some tensors, (m,) float32, and the number of all of them."""
    parts, size = [torch.empty(0)], 0
    for tensor in _vectors(aligned, model, tensors, reader):
        parts.append(_thinned(tensor.sample().values[""], int(share * tensor.size) + 1))
        size += tensor.size
    return torch.cat(parts), size


def count_task_vector(
    aligned: FullModel, model: Model, tensors: Sequence[str], counts: WindowCounts, reader: Executor
) -> None:
    """Add all entries of a task vector in some tensors to `counts`."""
    for tensor in _vectors(aligned, model, tensors, reader):
        tensor.count([("", counts)])


def _vectors(aligned: FullModel, model: Model, tensors: Sequence[str], reader: Executor) -> Iterator[_Tensor]:
    """The tensors in which the model has a task vector, opened one at a time: a DoRA's is held in memory whole."""
    where, touched = places(aligned.tensors), frozenset(touched_tensors(model))
    found = (_Tensor(aligned, {"": model}, where[name], reader) for name in tensors if name in touched)
    return (tensor for tensor in found if tensor.size)


class _Tensor:
    """One tensor of the aligned model and of the members that have a task vector in it."""

    def __init__(
        self,
        aligned: FullModel,
        members: Mapping[str, Model],
        place: Place,
        reader: Executor,
        fishers: Mapping[str, _Fisher] = MappingProxyType({}),
        models: Sequence[str] = (),
    ) -> None:
        shape = aligned.tensors[place.tensor].shape
        self._place = place
        self._reader = reader
        self._columns = shape[-1] if shape else 1
        self._num_rows = math.prod(shape) // self._columns if self._columns else 0
        self._base = _Stored(aligned, place.tensor)
        # A local file is best read by the thread that uses it, into its core's cache; a remote one is read ahead.
        folders = [*(m.folder for m in (aligned, *members.values())), *(f.curvature.folder for f in fishers.values())]
        self._is_local = all(is_local(folder) for folder in folders)
        self._fishers = fishers
        self._models = models
        parts = {name: _part(aligned, model, place.tensor) for name, model in members.items()}
        self.parts: dict[str, _Rows] = {name: part for name, part in parts.items() if part is not None}

    @property
    def stored(self) -> dict[str, _Stored]:
        """Those of the parts that are full models' weights."""
        return {name: part for name, part in self.parts.items() if isinstance(part, _Stored)}

    @property
    def is_bfloat16(self) -> bool:
        """Whether the compiled loops can take it: all parts are full models' local files in bfloat16."""
        stored = [*self.stored.values(), self._base]
        return self._is_local and len(stored) == len(self.parts) + 1 and all(part.is_bfloat16 for part in stored)

    @property
    def size(self) -> int:
        return self._num_rows * self._columns

    def averaged(self, weights: Mapping[str, float]) -> Iterator[torch.Tensor]:
        """The weighted mean of full models; the aligned one isn't read."""
        (_, first), *others = self.stored.items()
        return self._linear(first, dict(others), weights)

    def linear(self, weights: Mapping[str, float]) -> Iterator[torch.Tensor]:
        """The aligned model plus the weighted sum of the task vectors."""
        return self._linear(self._base, self.parts, weights)

    def fused(
        self, method: AnyFusionMethod, weights: Mapping[str, float], thresholds: Thresholds
    ) -> Iterator[torch.Tensor]:
        """The aligned model plus the fused task vector."""
        merge = method.compiled([*self.parts], weights, self._place, thresholds) if self.is_bfloat16 else None
        if merge is not None:
            for at, rows in self._bfloat16_rows([self._base, *self.stored.values()]):
                merge(rows, at)
                yield rows[-1]
            return
        sums = self.sums(method, thresholds)
        for base, entries in self.entries():
            yield method.combine(entries, weights, thresholds, sums).view_as(base).add_(base)

    def aligned(self) -> Iterator[torch.Tensor]:
        """The aligned model's weights as they are."""
        return (base for base, _ in self._read(self._base, {}))

    def entries(self, run_entries: int | None = None) -> Iterator[tuple[torch.Tensor, Entries]]:
        """Every run: the aligned model's weights, (rows, columns) float32, and the task vectors.

        Args:
            run_entries: about how many entries a run has; `RUN_ENTRIES` by default.
        """
        at = 0
        fishers = {f"fisher of {name}": fisher for name, fisher in self._fishers.items()}
        for base, found in self._read(self._base, {**self.parts, **fishers}, run_entries):
            values = {name: found[name] for name in self.parts}
            known = {name: found[f"fisher of {name}"].view(-1) for name in self._fishers}
            yield self._entries(at, base, values, known)
            at += base.numel()

    def thresholds(self, method: AnyFusionMethod) -> Thresholds:
        """The method's thresholds over this tensor alone."""
        ranks = method.ranks([*self.parts], self._place, self.size)
        if not ranks:
            return {}
        if self.size <= 16 * SAMPLE_ENTRIES:
            runs = [method.scores(entries) for _, entries in self.entries()]
            return thresholds_of({name: torch.cat([scores[name] for scores in runs]) for name in ranks}, ranks)
        sample = {name: _thinned(score, SAMPLE_ENTRIES) for name, score in method.scores(self.sample()).items()}
        searches = {
            name: [RankSearch(rank, self.size, sample[name]) for rank in wanted] for name, wanted in ranks.items()
        }
        pending = [(name, search) for name, found in searches.items() for search in found]
        while pending:
            self.count([(name, search.window) for name, search in pending], method)
            pending = [(name, search) for name, search in pending if not search.finish_pass()]
        return {name: [search.value for search in found] for name, found in searches.items()}

    def count(self, counts: Sequence[tuple[str, WindowCounts]], method: AnyFusionMethod | None = None) -> None:
        """Add all entries of each score to its counts; without a method, a score is a model's task vector."""
        of_vectors = method is None or type(method).scores is FusionMethod.scores
        if of_vectors and self.is_bfloat16:
            numbers = {name: number for number, name in enumerate(self.parts, start=1)}
            for _, rows in self._bfloat16_rows([self._base, *self.stored.values()]):
                for name, window in counts:
                    window.add_differences(rows[numbers[name]], rows[0])
            return
        for _, entries in self.entries():
            scores = entries.values if method is None else method.scores(entries)
            for name, window in counts:
                window.add(scores[name])

    def sums(self, method: AnyFusionMethod, thresholds: Thresholds) -> torch.Tensor | None:
        """The method's terms over all entries, if it has any; added up in order."""
        if not method.has_sums:
            return None
        terms = (method.terms(entries, thresholds) for _, entries in self.entries(FIXED_ENTRIES))
        return torch.stack([t for t in terms if t is not None]).sum(dim=0)

    def sample(self) -> Entries:
        """Rows that lie spread over the tensor, or all if they are few; here `start` and `curvature` mean nothing."""
        stride = max(self._num_rows // _SAMPLE_ROWS, 1)
        rows = range(stride // 2, self._num_rows, stride)

        def read(part: _Rows) -> torch.Tensor:
            return torch.cat([part.read(row, row + 1) for row in rows])

        _, entries = self._entries(0, read(self._base), {name: read(part) for name, part in self.parts.items()})
        return entries

    def _entries(
        self,
        at: int,
        base: torch.Tensor,
        values: Mapping[str, torch.Tensor],
        curvature: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> tuple[torch.Tensor, Entries]:
        start = base.float()
        stored = self.stored
        deltas = {n: v.float().sub_(start) if n in stored else v for n, v in values.items()}
        vectors = {n: d.view(-1) for n, d in deltas.items()}
        return start, Entries(vectors, self._place, at, self._columns, curvature, self._models, start.view(-1))

    def _linear(
        self, base: _Stored, parts: Mapping[str, _Rows], weights: Mapping[str, float]
    ) -> Iterator[torch.Tensor]:
        """W + Σ_t λ_t τ_t, where W is `base`, and τ_t = θ_t − W for a part that is stored."""
        if parts and self.is_bfloat16:
            stored = [part for part in parts.values() if isinstance(part, _Stored)]
            yield from self._linear_bfloat16([base, *stored], [weights[name] for name in parts])
            return
        for start, values in self._read(base, parts):
            if not values:
                yield start
                continue
            origin, entries = self._entries(0, start, values)
            yield weighted_sum(entries.values, weights).view_as(origin).add_(origin)

    def _linear_bfloat16(self, models_M: Sequence[_Stored], weights_M: Sequence[float]) -> Iterator[torch.Tensor]:
        """The same for bfloat16 files, the first of which is W, by a compiled loop."""
        from fleet.algebra.kernels import linear

        coefficients = np.array(weights_M, np.float32)
        for _, rows in self._bfloat16_rows(models_M):
            bits = rows.view(torch.uint16).numpy()
            linear(bits[:-1], coefficients, bits[-1])
            yield rows[-1]

    def _bfloat16_rows(self, models_M: Sequence[_Stored]) -> Iterator[tuple[int, torch.Tensor]]:
        """Every run: its first entry, and the models' weights, (M + 1, entries), with a last row for a result.

        Each run overwrites the one before.
        """
        step = min(max(COMPILED_RUNS * RUN_ENTRIES // self._columns, 1), self._num_rows)
        memory = torch.empty((len(models_M) + 1) * step * self._columns, dtype=torch.bfloat16)
        for at in range(0, self._num_rows, step):
            stop = min(at + step, self._num_rows)
            count = (stop - at) * self._columns
            rows = memory[: (len(models_M) + 1) * count].view(-1, count)
            for row, model in zip(rows, models_M, strict=False):
                model.read(at, stop, row.view(torch.uint8))
            yield at * self._columns, rows

    def _read(
        self, base: _Rows, parts: Mapping[str, _Rows], run_entries: int | None = None
    ) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """The rows of one part and of others, run by run."""
        step = _rows_of(run_entries or RUN_ENTRIES, self._columns)
        spans = (range(at, min(at + step, self._num_rows)) for at in range(0, self._num_rows, step))
        runs = (
            (base.read(s.start, s.stop), {name: part.read(s.start, s.stop) for name, part in parts.items()})
            for s in spans
        )
        return runs if self._is_local else _ahead(runs, self._reader)


def _part(aligned: FullModel, model: Model, tensor: str) -> _Rows | None:
    """A model's part of one tensor, in the orientation of the aligned model's files; None if it has none."""
    if isinstance(model, FullModel):
        return _Stored(model, tensor)
    turned = is_transposed(aligned, tensor)
    delta: Delta | None = read_factors(model, tensor) if model.is_lora else None
    if delta is None:
        delta = read_delta(model, tensor, read_weight(aligned, tensor))
    if delta is None:
        return None
    delta = delta.transposed() if turned else delta
    if isinstance(delta, LowRank):
        return _Product(delta)
    shape = aligned.tensors[tensor].shape
    return _Held(delta.value.reshape(-1, shape[-1] if shape else 1))


def _rows_of(entries: int, columns: int) -> int:
    """How many whole rows have about this many entries; at least one."""
    return max(entries // max(columns, 1), 1)


def _thinned(values: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` of the values, evenly spaced."""
    return values[:: max(values.numel() // count, 1)]


def _ahead(items: Iterator[_T], reader: Executor) -> Iterator[_T]:
    """The items, each fetched by `reader` while the one before is worked on."""
    future = reader.submit(next, items, None)
    while (item := future.result()) is not None:
        future = reader.submit(next, items, None)
        yield item
