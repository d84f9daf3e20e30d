"""Realigning: one model, one method, one shard of what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from fleet.algebra import linalg
from fleet.algebra.delta import Delta, Dense, LowRank, zero
from fleet.algebra.factors import Factors
from fleet.algebra.products import product
from fleet.algebra.random_edits import named_generator
from fleet.algebra.rounding import NORM_TOLERANCE, rounded, stored_with_norm
from fleet.algebra.spectral import Triplets, truncated
from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.full_model import FullModel
from fleet.checkpoint.headers import read_headers
from fleet.checkpoint.model import written_like
from fleet.checkpoint.modules import ModuleView, canonical_shape, is_transposed, module_views
from fleet.checkpoint.opened import open_full, open_model
from fleet.checkpoint.shards import Output, Shard
from fleet.checkpoint.task_vectors import read_delta, read_factors, read_unscaled_factors, read_weight, to_stored
from fleet.checkpoint.tensors import TORCH_DTYPES, read_tensor
from fleet.checkpoint.write import of_rank, write_adapter, write_shard
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json
from fleet.masks.learned import open_mask
from fleet.methods import AnyRealignMethod
from fleet.methods.ranks import Parts
from fleet.store import open_folder
from fleet.work.survey import StoredDisplacement, stored_displacement
from fleet.work.unit import PoolName, UnitRecord, Worker, short


@dataclass(frozen=True)
class RealignUnit:
    """Realign one model in one shard; an adapter is one shard."""

    aligned: str
    unaligned: str | None
    """None where the method reads no V."""
    model: str
    safety: str | None
    harmful: str | None
    displacement: str | None
    """Folder of V's own part; methods use its leading directions. None without V."""
    projections: str | None
    """Folder of the B factors of the model's VVᵀΔW/‖V‖; None where the method doesn't use them."""
    method: AnyRealignMethod
    edited: frozenset[str]
    """Modules the method decided to edit, from the survey."""
    targets: Mapping[str, float]
    """For a control: module -> the norm of its edit."""
    mask: str | None
    """Folder of a learned mask, where the method applies one."""
    name: str
    """The model's name: a mask may hold logits per model."""
    as_lora: bool
    shard: Shard
    output: Output

    pool: ClassVar[PoolName] = "tensor"

    def run(self, host: Worker) -> UnitRecord:
        """The record has a row per edited module."""
        work = _Realigning(self)
        if not self.as_lora:
            files = write_shard(self.output, self.shard, work.like, work.aligned, work.pieces)
            return UnitRecord(files=files, result={"edits": work.edits})
        ranks = work.ranks()
        written = write_adapter(self.output, self.shard, work.aligned, ranks, work.factors, [_adapter(self.model)])
        for tensor in (t for t, rank in ranks.items() if not rank and t.removesuffix(".weight") in self.edited):
            work.factors(tensor)  # removed: not in the file, but the record says by how much that was an edit
        return UnitRecord(files=written.files, result={"max_rank": written.max_rank, "edits": work.edits})


def _adapter(uri: str) -> Adapter:
    model = open_model(uri)
    if not isinstance(model, Adapter):
        raise CheckpointError(f"{uri}: a full model, but this has to be a LoRA adapter")
    return model


class _Realigning:
    """One realign unit under way: what it reads, and the rows of what it edited."""

    def __init__(self, unit: RealignUnit) -> None:
        self.unit = unit
        self.aligned = open_full(unit.aligned)
        self.model = open_model(unit.model)
        self.like = written_like(self.model, self.aligned)
        """What a full model is written like."""
        self.safety = _adapter(unit.safety) if unit.safety is not None else None
        self.harmful = _adapter(unit.harmful) if unit.harmful is not None else None
        self._parts = Parts(self.aligned, self.model, self.safety, self.harmful)
        self.edits: list[Json] = []
        self._whole: Delta | None = None
        """The whole task vector of the tensor that is being realigned: a mask is rescaled over all its modules."""

    def masked(self, view: ModuleView) -> Delta:
        """The module's task vector under the learned mask, which is rescaled over its whole tensor."""
        spec = self.unit.method.mask_spec
        assert spec is not None and self.unit.mask is not None and self._whole is not None
        origin = read_factors(self.safety, view.tensor) if self.safety is not None else None
        turned = is_transposed(self.aligned, view.tensor)
        whole, start = (d.transposed() if turned and d is not None else d for d in (self._whole, origin))
        assert whole is not None
        masked = open_mask(self.unit.mask).apply(spec, self.unit.name, view.tensor, whole, start)
        masked = masked.transposed() if turned else masked
        return masked if view.index is None else Dense(masked.dense()[view.index])

    @property
    def displacement(self) -> StoredDisplacement | None:
        return stored_displacement(self.unit.displacement) if self.unit.displacement is not None else None

    @cached_property
    def projections(self) -> Mapping[str, torch.Tensor]:
        assert self.unit.projections is not None
        folder = open_folder(self.unit.projections)
        return {name: read_tensor(folder, info) for name, info in read_headers(folder, "model").items()}

    def ranks(self) -> dict[str, int]:
        """Tensor -> the rank that the adapter's module is written with, from headers alone; 0 leaves it out."""
        return {name: self._rank(name) for name in self.unit.shard.tensors}

    def _rank(self, tensor: str) -> int:
        if tensor.removesuffix(".weight") not in self.unit.edited:
            return self._parts.own_rank(tensor)
        return self._parts.edited_rank(self.unit.method, tensor)

    def factors(self, tensor: str) -> LowRank:
        """ΔW of one module of an adapter, edited or not, of the rank that `ranks` says."""
        assert isinstance(self.model, Adapter)
        view = ModuleView(tensor.removesuffix(".weight"), tensor, None)
        delta = read_factors(self.model, tensor) or zero(canonical_shape(self.aligned, tensor))
        if view.module not in self.unit.edited:
            return delta
        self._whole = delta
        rank, module = self._rank(tensor), _Module(self, view, delta)
        edited, lost = truncated(self.unit.method.edit(module), rank, module.generator(0))
        self._keep_row(view.module, delta, edited, lost)
        return of_rank(edited, rank)

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
            return self._stored(
                edited[0], base, zero(canonical_shape(self.aligned, tensor)) if delta is None else delta
            )
        values = torch.zeros_like(base) if delta is None else delta.dense()
        weight = base + values
        for view in edited:
            weight[view.index] = self._stored(view, base[view.index], Dense(values[view.index]))
        return weight

    def _stored(self, view: ModuleView, base: torch.Tensor, delta: Delta) -> torch.Tensor:
        """One edited module of a full model, float32, with the values that its file will hold; and its row."""
        edited, dtype = (
            self.unit.method.edit(_Module(self, view, delta)),
            TORCH_DTYPES[self.like.tensors[view.tensor].dtype],
        )
        if (target := self.unit.targets.get(view.module)) is None:
            asked, stored = edited.minus(delta).norm(), rounded(base + edited.dense(), dtype)
        else:
            edit, draw = edited.minus(delta).dense(), named_generator(0, f"{view.module}.rounding")
            asked, stored = target, stored_with_norm(base + delta.dense(), edit, target, dtype, draw)
        self._keep_row(view.module, delta, Dense(stored - base), 0.0, asked)
        return stored

    def _keep_row(self, module: str, before: Delta, after: Delta, lost: float, asked: float | None = None) -> None:
        """Note what a reviewer reads of one edit: norms, energies as shares of ‖ΔW_before‖², what recompression lost.

        Args:
            after: as it is written.
            asked: the norm that the edit was to have; of a control, its method's.
        """
        norm, found = before.norm(), after.minus(before).norm()
        asked = self.unit.targets.get(module, asked)
        row: dict[str, Json] = {
            "module": module,
            "delta_norm": short(norm),
            "edit_norm": short(found),
            "energy_kept": short(after.norm() ** 2 / norm**2) if norm else None,
            "rank": after.rank if isinstance(after, LowRank) else None,
            "recompression_residual": short(lost),
        }
        if asked is not None and abs(found - asked) > NORM_TOLERANCE * asked:
            row["asked_norm"] = short(asked)
        basis = self.displacement.basis(module) if self.displacement is not None else None
        if basis is not None and norm:
            shares = zip(before.energies(basis.left) / norm**2, after.energies(basis.left) / norm**2, strict=True)
            row["directions"] = [[short(float(b)), short(float(a))] for b, a in shares]
        self.edits.append(row)


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
        assert self.work.unit.unaligned is not None, "a method that projects on V reads it"
        unaligned = open_full(self.work.unit.unaligned)
        v = read_weight(self.work.aligned, self.view.tensor) - read_weight(unaligned, self.view.tensor)
        v = v if self.view.index is None else v[self.view.index]
        norm = linalg.norm(v)
        return Dense(product(v, product(v.T, self.delta.value)) / norm)

    @property
    def target_norm(self) -> float:
        return self.work.unit.targets[self.view.module]

    def masked(self) -> Delta:
        return self.work.masked(self.view)

    def displacement(self, k: int) -> Triplets:
        displacement = self.work.displacement
        basis = displacement.basis(self.view.module) if displacement is not None else None
        assert basis is not None
        return basis.head(k)

    def generator(self, seed: int) -> torch.Generator:
        return named_generator(seed, self.view.module)

    def _merged_with(self, adapter: Adapter | None) -> LowRank | None:
        return read_factors(adapter, self.view.tensor) if adapter is not None and self.view.index is None else None
