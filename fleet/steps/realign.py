"""Realign steps: one model, one method -> a realigned adapter or full model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.model import lora_rank
from fleet.checkpoint.modules import canonical_shape, module_views
from fleet.core.errors import ManifestError
from fleet.core.identity import Json, digest
from fleet.manifest import Variant
from fleet.methods import AnyRealignMethod, ModuleStatistics
from fleet.methods.ranks import Parts
from fleet.steps.base import NextUnit, Step, Walk, WeightsStep, unit_per_shard
from fleet.steps.context import PlanContext
from fleet.steps.mask import MaskStep
from fleet.steps.record import Result
from fleet.steps.sources import MaskSource, Source
from fleet.steps.survey import DisplacementStep, SurveyResult, SurveyStep
from fleet.steps.view import RunView
from fleet.steps.weights import written_size
from fleet.work.module_rows import ModuleRow, edit_warnings, module_rows
from fleet.work.unit import Found

logger = logging.getLogger(__name__)

AS_STORED = "as stored"
"""In the spec of what is written as a full model, whose edits are measured after they were rounded to its dtypes, and a
control's matched so."""


class RealignResult(Result):
    """What a realignment did."""

    modules: tuple[ModuleRow, ...] = ()
    edit_norm: float = 0.0
    """‖ΔW_after − ΔW_before‖ over all modules, ΔW_after as its files hold it."""
    max_rank: int = 0
    """Of what was written as a LoRA."""

    @property
    def edit_norms(self) -> dict[str, float]:
        """Module -> ‖ΔW_after − ΔW_before‖, of those that were edited."""
        return {row.module: row.edit_norm for row in self.modules if row.edit and row.edit_norm is not None}


@dataclass(frozen=True, kw_only=True)
class RealignStep(WeightsStep):
    """Realign one model with one method."""

    kind: ClassVar[str] = "realign"
    version: ClassVar[int] = 2

    model: Source
    survey: SurveyStep
    basis: DisplacementStep | None
    """V's leading directions, if any variant asks for them: a record says how an edit changed the energy in each."""
    method: AnyRealignMethod
    safety: Source | None
    harmful: Source | None
    matched: RealignStep | None
    """For a control: the step whose edit norms it matches."""
    mask: MaskStep | MaskSource | None

    @classmethod
    def make(cls, context: PlanContext, name: str, method: AnyRealignMethod, variant: Variant) -> RealignStep:
        """One model of the catalogue under a method, as a variant asks for it.

        Raises:
            ManifestError: the method can't have this model.
        """
        survey, source = SurveyStep.make(context, name), context.models[name]
        basis = DisplacementStep.of_directions(context)
        _check_method(context, name, source, method)
        matched = cls.make(context, name, method.matched, variant) if method.matched is not None else None  # type: ignore[arg-type]
        mask = MaskStep.of_method(context, name, method, variant)
        merged = _merged_with(context, method)
        tensors = _touched(context, source, method)
        rank = _highest_rank(context, source, method, tensors)
        spec: dict[str, Json] = {"method": method.identity(), "survey": SurveyStep.version}
        size = written_size(context, tensors, rank, source.as_lora)
        spec |= size.spec if size.as_lora else {**size.spec, "edits": AS_STORED}
        deps: tuple[Step | None, ...] = (
            basis if method.directions else None, survey.spectrum if "rho_null" in method.needs else None, matched,
            mask if isinstance(mask, MaskStep) else None,
        )  # fmt: skip
        read = source.model.num_bytes + sum(s.model.num_bytes for s in merged.values())
        return context.add(
            cls(
                name=f"{name}.{method.method}-{digest(spec).removeprefix('sha256:')[:6]}",
                spec=spec,
                inputs=_inputs(context, source, merged, mask),
                deps=tuple(step for step in deps if step is not None),
                after=(survey, *((basis,) if basis is not None else ())),
                read_bytes=read + size.read_bytes,
                write_bytes=size.write_bytes,
                model=source,
                survey=survey,
                basis=basis,
                method=method,
                safety=merged.get("safety"),
                harmful=merged.get("harmful"),
                matched=matched,
                mask=mask,
                tensors=tensors,
                as_lora=size.as_lora,
                max_rank=size.rank,
            )
        )

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        return RealignWalk(self, run, attempt, finished)


class RealignWalk(Walk):
    """What the method decides of every module, then a unit per shard."""

    def __init__(self, step: RealignStep, run: RunView, attempt: str, finished: dict[int, Found]) -> None:
        super().__init__(finished)
        self._step = step
        self._modules = _modules(step, run)
        norms = run.result(step.matched, RealignResult).edit_norms if step.matched is not None else {}
        self._decisions, self._targets = step.method.choose(self._modules, norms)
        self._units = self._make_units(run, attempt)

    def next(self) -> Sequence[NextUnit]:
        return [unit for unit in self._units if unit.index not in self.finished]

    def result(self, step: Step) -> RealignResult:
        merged: dict[str, Any] = {}
        edits: dict[str, dict[str, Any]] = {}
        for record in self.records(step):
            merged |= record.result
            edits |= {row["module"]: row for row in merged.pop("edits")}
        merged["edit_norm"] = math.sqrt(sum(edit["edit_norm"] ** 2 for edit in edits.values()))
        merged["modules"] = rows = module_rows(self._modules, self._decisions, edits)
        found = [
            self._step.method.warning(self._modules, edits.keys()),
            *edit_warnings(rows, self._step.method.max_rank),
        ]
        if warning := "; ".join(text for text in found if text):
            logger.warning("%s: %s", step.name, warning)
            merged["warning"] = warning
        return RealignResult.model_validate(merged)

    def _make_units(self, run: RunView, attempt: str) -> list[NextUnit]:
        from fleet.work.realigning import RealignUnit

        step = self._step
        mask = step.mask.uri if isinstance(step.mask, MaskSource) else run.folder(step.mask) if step.mask else None
        unaligned = run.bases.unaligned
        units = [
            RealignUnit(
                aligned=run.bases.aligned.uri,
                unaligned=unaligned.uri if unaligned else None,
                model=step.model.uri,
                safety=step.safety.uri if step.safety else None,
                harmful=step.harmful.uri if step.harmful else None,
                displacement=run.folder(step.basis) if step.basis else None,
                projections=run.folder(step.survey) if "projection" in step.method.needs else None,
                method=step.method,
                edited=frozenset(d.module for d in self._decisions if d.edit),
                targets=self._targets,
                mask=mask,
                name=step.survey.name,
                as_lora=step.as_lora,
                shard=shard,
                output=run.output(step, attempt),
            )
            for shard in run.shards(step)
        ]
        return unit_per_shard(units, step.read_bytes)


def _modules(step: RealignStep, run: RunView) -> list[ModuleStatistics]:
    """The survey's rows, and for a method that edits untouched modules one for each of these."""
    found = {row.module: row for row in run.result(step.survey, SurveyResult).modules}
    if step.method.edits_untouched:
        for tensor in step.tensors:
            for view in module_views(run.aligned, tensor):
                d_out, d_in = canonical_shape(run.aligned, tensor)[-2:]
                untouched = ModuleStatistics(module=view.module, shape=(d_out, d_in), rank=0, delta_norm=0.0)
                found.setdefault(view.module, untouched)
    return [found[name] for name in sorted(found)]


def _check_method(context: PlanContext, name: str, source: Source, method: AnyRealignMethod) -> None:
    if method.adapters_only and not source.as_lora:
        raise ManifestError(
            f"variants: {method.method} with these parameters works on LoRA factors, but {name} is no LoRA "
            "that can be served as one; leave it out of the variant's models"
        )
    if method.pairs_factors:
        _require_equal_ranks(context, name, source)


def _require_equal_ranks(context: PlanContext, name: str, source: Source) -> None:
    """Averaging factors needs as many of them on both sides."""
    safety = context.bases.safety.model if context.bases.safety else None
    for adapter in (source.model, safety):
        if isinstance(adapter, Adapter) and any(m.scale < 0 for m in adapter.modules.values()):
            raise ManifestError(
                f"variants: {adapter.folder.uri}: lora_alpha is negative, and averaging LoRA factors takes its "
                'root; use "merge": "exact"'
            )
    modules = [tensor.removesuffix(".weight") for tensor in source.tensors]
    ranks = {m: (lora_rank(source.model, m), lora_rank(safety, m)) for m in modules}
    if unequal := [f"{m} ({own} and {theirs})" for m, (own, theirs) in ranks.items() if theirs not in (0, own)]:
        raise ManifestError(
            f"variants: LoRA factors are taken entry by entry, but the ranks of {name} and base.safety differ: "
            f'{", ".join(unequal[:4])}; use "merge": "exact", or a mask in product space'
        )


def _merged_with(context: PlanContext, method: AnyRealignMethod) -> dict[str, Source]:
    """The adapters beside the model that the method uses, by their role."""
    offered = {"safety": context.bases.safety, "harmful": context.bases.harmful}
    return {role: source for role, source in offered.items() if role in method.needs and source is not None}


def _inputs(
    context: PlanContext, source: Source, merged: Mapping[str, Source], mask: MaskStep | MaskSource | None
) -> dict[str, str]:
    """Identities of what decides the result.

    What a method decides follows from the three models; the survey only measured it. So the survey comes before, and
    another variant's wishes for the survey don't change what this one makes.
    """
    sources = {"aligned": context.bases.aligned, "unaligned": context.bases.unaligned, **merged, "model": source}
    inputs = {role: s.identity for role, s in sources.items() if s is not None}
    return inputs | ({"mask": mask.identity} if isinstance(mask, MaskSource) else {})


def _touched(context: PlanContext, source: Source, method: AnyRealignMethod) -> tuple[str, ...]:
    """The base tensors a realigned model may have a task vector in."""
    if not method.edits_untouched:
        return source.tensors
    aligned, harmful = context.bases.aligned_model, context.bases.harmful
    views = [view for tensor in aligned.tensors for view in module_views(aligned, tensor)]
    # A LoRA has no factors for one expert of a stacked tensor: there nothing is added.
    added = {view.tensor for view in views if view.index is None or not source.as_lora}
    if "harmful" in method.needs and harmful is not None:
        added &= set(harmful.tensors)
    return tuple(sorted({*source.tensors, *added}))


def _highest_rank(context: PlanContext, source: Source, method: AnyRealignMethod, tensors: tuple[str, ...]) -> int:
    """The largest rank a module can be written with, edited or not; 0 of what is no LoRA."""
    if not source.as_lora:
        return 0
    bases = context.bases
    safety, harmful = (s.model if s is not None else None for s in (bases.safety, bases.harmful))
    parts = Parts(bases.aligned_model, source.model, safety, harmful)
    return max((source.max_rank, *(parts.edited_rank(method, tensor) for tensor in tensors)))
