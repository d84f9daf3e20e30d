"""Fusing: all members of a variant, in one shard of what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import torch

from fleet.algebra.delta import LowRank
from fleet.algebra.random_edits import named_generator
from fleet.algebra.sparsify import WHOLE
from fleet.algebra.spectral import truncated
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.curvature import Curvature
from fleet.checkpoint.curvature_tensors import CurvatureOf
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.model import Model, lora_rank, touched_tensors
from fleet.checkpoint.modules import canonical_shape
from fleet.checkpoint.opened import open_curvature, open_full, open_model
from fleet.checkpoint.shards import Output, Shard
from fleet.checkpoint.task_vectors import read_factors
from fleet.checkpoint.tensors import read_rows
from fleet.checkpoint.write import of_rank, write_adapter, write_shard
from fleet.core.identity import Json
from fleet.fusion import AnyFusionMethod
from fleet.fusion.base import Thresholds
from fleet.fusion.member import Member, fused_rank
from fleet.fusion.place import places
from fleet.fusion.streaming import StreamedFusion
from fleet.work.unit import PoolName, UnitRecord, Worker, short


@dataclass(frozen=True)
class FuseUnit:
    """Fuse all members in one shard; a fused LoRA is one shard."""

    aligned: str
    members_M: tuple[Member, ...]
    method: AnyFusionMethod
    as_lora: bool
    thresholds: Thresholds | None
    """Thresholds of whole models, if the method asks for them; else None, and each tensor has its own."""
    shard: Shard
    output: Output

    pool: ClassVar[PoolName] = "tensor"

    def run(self, host: Worker) -> UnitRecord:
        """Write the shard; the record says whether anything in it is other than in the aligned model."""
        aligned = open_full(self.aligned)
        members = {m.name: open_model(m.uri) for m in self.members_M}
        curvatures = {m.name: open_curvature(m.curvature) for m in self.members_M if m.curvature is not None}
        if self.as_lora:
            return self._lora(aligned, members, curvatures)
        with ThreadPoolExecutor(1) as reader:
            fusion = StreamedFusion(aligned, members, self.method, self.thresholds, reader, curvatures)
            watch = _Watch(aligned, {name for member in members.values() for name in touched_tensors(member)})

            def pieces(name: str) -> Iterable[torch.Tensor]:
                return watch.seen(name, fusion.tensor(name))

            files = write_shard(self.output, self.shard, aligned, aligned, pieces)
            return UnitRecord(files=files, result={"changed": watch.changed})

    def _lora(self, aligned: FullModel, members: dict[str, Model], curvatures: dict[str, Curvature]) -> UnitRecord:
        """Write a whole LoRA; the record says what recompression lost in each module."""
        where = places(aligned.tensors)
        adapters = {name: m for name, m in members.items() if isinstance(m, Adapter)}
        ranks: dict[str, int] = {}
        for name in self.shard.tensors:
            ranks_M = [lora_rank(adapter, _module(name)) for adapter in adapters.values()]
            ranks[name] = fused_rank(self.method, ranks_M, canonical_shape(aligned, name))
        lost: dict[str, float] = {}
        changed = False

        def factors(name: str) -> LowRank:
            found = {member: read_factors(adapter, name) for member, adapter in adapters.items()}
            deltas = {member: delta for member, delta in found.items() if delta is not None}
            weights = self.method.coefficients([*members], where[name])
            known = CurvatureOf(self.method.curvature, curvatures, aligned, name)
            fused = self.method.fuse(deltas, weights, where[name], WHOLE, self.thresholds, known)
            delta, lost[_module(name)] = truncated(fused, ranks[name], named_generator(0, _module(name)))
            nonlocal changed
            changed = changed or delta.norm() > 0.0
            return of_rank(delta, ranks[name])

        written = write_adapter(self.output, self.shard, aligned, ranks, factors, [*adapters.values()])
        residuals: dict[str, Json] = {module: short(value) for module, value in lost.items() if value}
        result: dict[str, Json] = {
            "max_rank": written.max_rank, "recompression_residual": residuals, "changed": changed
        }  # fmt: skip
        return UnitRecord(files=written.files, result=result)


class _Watch:
    """Looks whether what is written is other than the aligned model, in the dtype of its files; until it is, once.

    Args:
        touched: the tensors that some member changes.
    """

    def __init__(self, aligned: FullModel, touched: Set[str]) -> None:
        self._aligned = aligned
        self._touched = touched
        self.changed = False

    def seen(self, name: str, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The pieces of one tensor, in the order of its entries, as they are."""
        if self.changed or name not in self._touched:
            yield from pieces
            return
        start = 0
        for piece in pieces:
            if not self.changed:
                aligned = self._entries(name, start, start + piece.numel())
                self.changed = not torch.equal(piece.to(aligned.dtype).flatten(), aligned)
                start += piece.numel()
            yield piece

    def _entries(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) of one tensor of the aligned model, in its files' dtype and order."""
        info = self._aligned.tensors[name]
        columns = info.shape[-1] if info.shape else 1
        first, last = start // columns, -(-stop // columns)
        return read_rows(self._aligned.folder, info, first, last).flatten()[start - first * columns :][: stop - start]


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")
