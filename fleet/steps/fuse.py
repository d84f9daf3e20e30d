"""Fuse steps: one variant's models -> one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from fleet.checkpoint.curvature import check_curvature
from fleet.core.errors import CheckpointError, ManifestError
from fleet.core.identity import Json
from fleet.fusion import AnyFusionMethod
from fleet.fusion.member import Member, fused_rank
from fleet.fusion.place import places
from fleet.steps.base import Step, UnitList, Walk, WeightsStep, unit_per_shard
from fleet.steps.context import PlanContext
from fleet.steps.record import Result
from fleet.steps.sources import CurvatureSource, Source, Weights
from fleet.steps.survey import SurveyStep
from fleet.steps.trim import TrimResult, TrimStep
from fleet.steps.view import RunView
from fleet.steps.weights import written_size
from fleet.work.unit import Found

NOTHING_LEFT = (
    "it is the aligned model: nothing of its members' task vectors is left in the dtype of its files; look at their "
    "edits, and at the fusion's weights, scale and density"
)


class FuseResult(Result):
    """What a fusion says beside its files."""

    max_rank: int = 0
    """Of what was written as a LoRA."""
    recompression_residual: Mapping[str, float] = {}
    """Module -> ‖ΔW − ΔW_k‖, what cutting the rank lost."""


@dataclass(frozen=True, kw_only=True)
class FuseStep(WeightsStep):
    """Fuse one variant's models into one."""

    kind: ClassVar[str] = "fuse"
    version: ClassVar[int] = 2

    members: Mapping[str, Weights]
    trims: Mapping[str, TrimStep]
    """Of each member, if the method's thresholds are of whole models."""
    curvature: Mapping[str, CurvatureSource]
    """Of each member, if the method asks for it: a realigned one's is that of its fine-tuned model."""
    method: AnyFusionMethod

    @classmethod
    def make(
        cls, context: PlanContext, name: str, method: AnyFusionMethod, members: Mapping[str, Weights], as_lora: bool
    ) -> FuseStep:
        """
        Args:
            members: model of the catalogue -> its weights, realigned or not.
            as_lora: whether a LoRA is written.

        Raises:
            ManifestError: the method's weights can't be used.
            CheckpointError: what the method has to know of a model doesn't fit.
        """
        _check_weights(context, name, method, members)
        aligned = context.bases.aligned
        tensors = tuple(sorted({tensor for m in members.values() for tensor in m.tensors}))
        curvature = _curvature(context, name, method, members, tensors)
        spec: dict[str, Json] = {"method": method.identity(), "models": [*members]}
        size = written_size(context, tensors, largest_rank(method, members), as_lora)
        inputs = {"aligned": aligned.identity}
        inputs |= {n: m.identity for n, m in members.items() if isinstance(m, Source)}
        inputs |= {f"{method.curvature}.{n}": found.identity for n, found in curvature.items()}
        read = sum(context.models[n].model.num_bytes for n in members)
        read += sum(found.curvature.num_bytes for found in curvature.values())
        trims = {n: TrimStep.make(context, n, m, method) for n, m in members.items()} if method.is_global else {}
        return context.add(
            cls(
                name=name,
                spec=spec | size.spec,
                inputs=inputs,
                deps=(*(m for m in members.values() if isinstance(m, Step)), *trims.values()),
                after=SurveyStep.of_models(context, (n for n, m in members.items() if isinstance(m, Source))),
                read_bytes=read + size.read_bytes,
                write_bytes=size.write_bytes,
                members=members,
                trims=trims,
                curvature=curvature,
                method=method,
                tensors=tensors,
                as_lora=size.as_lora,
                max_rank=size.rank,
            )
        )

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        from fleet.work.fusing import FuseUnit

        known = {name: source.uri for name, source in self.curvature.items()}
        members = tuple(Member(name, run.uri(m), known.get(name)) for name, m in self.members.items())
        thresholds = {name: (run.result(trim, TrimResult).threshold,) for name, trim in self.trims.items()}
        output = run.output(self, attempt)
        units = [
            FuseUnit(run.bases.aligned.uri, members, self.method, self.as_lora, thresholds or None, shard, output)
            for shard in run.shards(self)
        ]
        return FuseWalk(unit_per_shard(units, self.read_bytes), finished, FuseResult)


class FuseWalk(UnitList):
    """A unit per shard; the result also says if none of them changed anything."""

    def result(self, step: Step) -> FuseResult:
        merged: dict[str, Json] = {}
        for record in self.records(step):
            merged |= record.result
        merged.pop("changed", None)
        if not any(record.result.get("changed", True) for record in self.records(step)):
            merged["warning"] = NOTHING_LEFT
        return FuseResult.model_validate(merged)


def largest_rank(method: AnyFusionMethod, members: Mapping[str, Weights]) -> int:
    """Of a fused LoRA, at most."""
    return fused_rank(method, (m.max_rank for m in members.values()))


def _check_weights(context: PlanContext, name: str, method: AnyFusionMethod, members: Iterable[str]) -> None:
    for place in places(context.bases.aligned_model.tensors).values():
        try:
            method.coefficients([*members], place)
        except ManifestError as e:
            raise ManifestError(f"variants: {name}: {e}") from e


def _curvature(
    context: PlanContext, name: str, method: AnyFusionMethod, members: Iterable[str], tensors: Iterable[str]
) -> dict[str, CurvatureSource]:
    """Of each member, checked against the tensors that any of them changes; nothing where none is asked for."""
    if method.curvature is None:
        return {}
    uris = {m.name: m.curvature(method.curvature) for m in context.manifest.models if m.name in members}
    found = {model: context.curvatures[uri] for model, uri in uris.items() if uri is not None}
    curvatures = {model: source.curvature for model, source in found.items()}
    aligned = context.bases.aligned_model
    problems = check_curvature(method.curvature, curvatures, aligned, tensors, method.may_lack_curvature)
    if problems:
        raise CheckpointError(f"variants: {name}: {'; '.join(problems)}{method.without_curvature}")
    return found
