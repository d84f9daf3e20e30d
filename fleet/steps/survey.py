"""Survey steps: V's own part, and every model's statistics. All that wait are done in one pass over V."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json
from fleet.methods import ModuleStatistics
from fleet.steps.base import NextUnit, Step, Walk
from fleet.steps.context import PlanContext
from fleet.steps.record import Result
from fleet.steps.sources import Source
from fleet.steps.view import UNIT_BYTES, RunView

PASS = "survey"
"""The pass over V that does both kinds."""

_SHOWN = 8
"""Names in a message."""


class DisplacementResult(Result):
    """V's own part says nothing beside its files."""


class SurveyResult(Result):
    """What the survey found of one model."""

    modules: tuple[ModuleStatistics, ...]
    """Of every module it has a task vector in, in name order."""


@dataclass(frozen=True, kw_only=True)
class DisplacementStep(Step):
    """Measure V's own part: what every survey of this pair of base models uses, tonight and later."""

    kind: ClassVar[str] = "displacement"
    version: ClassVar[int] = 1
    joint: ClassVar[str | None] = PASS

    unaligned: Source
    directions: int
    """How many of V's leading singular triplets are kept."""

    @classmethod
    def make(cls, context: PlanContext, unaligned: Source) -> DisplacementStep:
        """The step of the run's base models, with all that any variant uses."""
        methods = [v.realign for v in context.manifest.variants if v.realign is not None]
        directions = max((context.manifest.survey.directions, *(m.directions for m in methods)))
        bases = {"aligned": context.bases.aligned, "unaligned": unaligned}
        return context.add(
            cls(
                name="base",
                spec={"directions": directions},
                inputs={name: s.identity for name, s in bases.items()},
                read_bytes=sum(s.model.num_bytes for s in bases.values()),
                unaligned=unaligned,
                directions=directions,
            )
        )

    @classmethod
    def walk_together(cls, steps: Sequence[Step], run: RunView, attempt: str) -> Walk:
        return SurveyWalk(steps, run, attempt)


@dataclass(frozen=True, kw_only=True)
class SurveyStep(Step):
    """Measure one model's task vector."""

    kind: ClassVar[str] = "survey"
    version: ClassVar[int] = 2
    joint: ClassVar[str | None] = PASS

    model: Source
    displacement: DisplacementStep
    rho: bool
    """Whether ρ and gain are measured, which takes twice the flops."""
    projection: bool
    """Whether the B factors of VVᵀΔW/‖V‖ are kept."""

    @classmethod
    def make(cls, context: PlanContext, name: str) -> SurveyStep | None:
        """The survey of one model of the catalogue; None where there is no V to survey it against."""
        source, bases = context.models[name], context.bases
        if bases.unaligned is None:
            return None
        needs = {need for v in context.manifest.variants if v.realign is not None for need in v.realign.needs}
        rho, projection = "rho" in needs, "projection" in needs and isinstance(source.model, Adapter)
        sources = {"aligned": bases.aligned, "unaligned": bases.unaligned, "model": source}
        displacement = DisplacementStep.make(context, bases.unaligned)
        return context.add(
            cls(
                name=name,
                spec={"rho": rho, "projection": projection},
                inputs={role: s.identity for role, s in sources.items()},
                deps=(displacement,),
                read_bytes=sum(s.model.num_bytes for s in sources.values()),
                model=source,
                displacement=displacement,
                rho=rho,
                projection=projection,
            )
        )

    @classmethod
    def of_models(cls, context: PlanContext, names: Iterable[str]) -> tuple[SurveyStep, ...]:
        """The surveys of some models of the catalogue, which check their weights; none where there is no V."""
        found = (cls.make(context, name) for name in names)
        return tuple(step for step in found if step is not None)

    @classmethod
    def walk_together(cls, steps: Sequence[Step], run: RunView, attempt: str) -> Walk:
        return SurveyWalk(steps, run, attempt)


class SurveyWalk(Walk):
    """One pass over V for all steps that wait for it.

    Its units leave no records: a pass that is interrupted starts over, and a unit that fails fails all its models.
    """

    def __init__(self, steps: Sequence[Step], run: RunView, attempt: str) -> None:
        super().__init__({})
        self._surveys = [step for step in steps if isinstance(step, SurveyStep)]
        self._own = [step for step in steps if isinstance(step, DisplacementStep)]
        self._displacement = self._own[0] if self._own else self._surveys[0].displacement
        self._run = run
        self._attempt = attempt
        self._groups = plan_shards(run.aligned.tensors.values(), UNIT_BYTES)

    def next(self) -> Sequence[NextUnit]:
        bases = (self._run.bases.aligned, self._displacement.unaligned)
        read = sum(s.model.model.num_bytes for s in self._surveys) + sum(base.model.num_bytes for base in bases)
        missing = [index for index in range(len(self._groups)) if index not in self.finished]
        return [self._unit(index, read / len(self._groups)) for index in missing]

    def result(self, step: Step) -> Result:
        """
        Raises:
            CheckpointError: the model holds NaN or Inf.
        """
        records = self.records(step)
        if not isinstance(step, SurveyStep):
            return DisplacementResult()
        bad = sorted(str(name) for record in records for name in _list(record.result["non_finite"]))
        if bad:
            where = f"models: {step.name}: {len(bad)} tensors hold NaN or Inf"
            raise CheckpointError(f"{where}: {', '.join(bad[:_SHOWN])}; train or copy it again")
        rows = [ModuleStatistics.model_validate(row) for r in records for row in _list(r.result["modules"])]
        return SurveyResult(modules=tuple(sorted(rows, key=lambda row: row.module)))

    def _unit(self, index: int, work: float) -> NextUnit:
        from fleet.work.survey import SurveyUnit

        run, attempt, displacement = self._run, self._attempt, self._displacement
        unit = SurveyUnit(
            aligned=run.bases.aligned.uri,
            unaligned=displacement.unaligned.uri,
            models={s.key: s.model.uri for s in self._surveys},
            tensors=tuple(self._groups[index]),
            file=shard_name(index, len(self._groups)),
            rho=any(s.rho for s in self._surveys),
            directions=displacement.directions,
            displacement_key=displacement.key,
            displacement=run.output(displacement, attempt) if self._own else run.folder(displacement),
            projections={s.key: run.output(s, attempt) for s in self._surveys if s.projection},
        )
        return NextUnit(index, unit, work)


def _list(value: Json) -> list[Json]:
    assert isinstance(value, list)
    return value
