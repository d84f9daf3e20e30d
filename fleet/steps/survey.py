"""Survey steps: V's own parts, and every model's statistics. All that wait are done in one pass over V.

Of each model what some variant with it, or the manifest, asks for is measured, and nothing else: V is read where
something of it is asked for, its leading directions and its spectrum are taken where a method uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fleet.checkpoint.adapter import Adapter
from fleet.checkpoint.headers import plan_shards, shard_name
from fleet.core.errors import CheckpointError
from fleet.core.identity import Json
from fleet.methods import AnyRealignMethod, ModuleStatistics
from fleet.methods.base import Need, measured_needs
from fleet.steps.base import NextUnit, Step, Walk
from fleet.steps.context import PlanContext
from fleet.steps.record import Result
from fleet.steps.sources import Source
from fleet.steps.view import UNIT_BYTES, RunView

if TYPE_CHECKING:
    from fleet.work.survey import OwnPart, Surveyed

PASS = "survey"
"""The pass over V that does both kinds."""

_SHOWN = 8
"""Names in a message."""


class DisplacementResult(Result):
    """A part of V's own says nothing beside its files."""


class SurveyResult(Result):
    """What the survey found of one model."""

    modules: tuple[ModuleStatistics, ...]
    """Of every module it has a task vector in, in name order."""


@dataclass(frozen=True, kw_only=True)
class DisplacementStep(Step):
    """Measure a part of V's own: what every survey of this pair of base models uses, tonight and later.

    Its leading directions and its spectrum are steps apart, so that asking for one leaves the other alone.
    """

    kind: ClassVar[str] = "displacement"
    version: ClassVar[int] = 2
    joint: ClassVar[str | None] = PASS

    directions: int
    """How many of V's leading singular triplets are kept; 0 for the spectrum."""

    @classmethod
    def of_directions(cls, context: PlanContext) -> DisplacementStep | None:
        """V's leading directions, as many as any variant or the manifest asks for; None if nobody does."""
        asked = [context.manifest.survey.directions, *(m.directions for m in _methods(context))]
        return cls._make(context, "directions", max(asked)) if max(asked) else None

    @classmethod
    def of_spectrum(cls, context: PlanContext) -> DisplacementStep:
        """V's singular values, which ρ's null takes."""
        return cls._make(context, "spectrum", 0)

    @classmethod
    def _make(cls, context: PlanContext, name: str, directions: int) -> DisplacementStep:
        bases = {"aligned": context.bases.aligned, "unaligned": context.bases.unaligned}
        sources = {role: source for role, source in bases.items() if source is not None}
        return context.add(
            cls(
                name=name,
                spec={"directions": directions} if directions else {},
                inputs={role: s.identity for role, s in sources.items()},
                read_bytes=sum(s.model.num_bytes for s in sources.values()),
                directions=directions,
            )
        )

    @classmethod
    def walk_together(cls, steps: Sequence[Step], run: RunView, attempt: str) -> Walk:
        return SurveyWalk(steps, run, attempt)


@dataclass(frozen=True, kw_only=True)
class SurveyStep(Step):
    """Measure one model's task vector, and check it for NaN and Inf."""

    kind: ClassVar[str] = "survey"
    version: ClassVar[int] = 2
    joint: ClassVar[str | None] = PASS

    model: Source
    needs: frozenset[Need]
    """What is measured beside ‖ΔW‖."""
    energies: int
    """Along how many of V's leading directions its energy is measured."""
    basis: DisplacementStep | None
    """V's leading directions; None where they are not asked for."""
    spectrum: DisplacementStep | None
    """V's singular values; None where they are not asked for."""

    @classmethod
    def make(cls, context: PlanContext, name: str) -> SurveyStep:
        """The survey of one model of the catalogue."""
        source, bases, methods = context.models[name], context.bases, _methods(context, name)
        needs = _needs(context, source, methods)
        energies = max((context.manifest.survey.directions, *(m.energies for m in methods)))
        basis = DisplacementStep.of_directions(context) if energies else None
        spectrum = DisplacementStep.of_spectrum(context) if "rho_null" in needs else None
        offered = {"aligned": bases.aligned, "unaligned": bases.unaligned if needs else None, "model": source}
        sources = {role: s for role, s in offered.items() if s is not None}
        return context.add(
            cls(
                name=name,
                spec={"needs": [*sorted(needs)], "energies": energies},
                inputs={role: s.identity for role, s in sources.items()},
                deps=tuple(step for step in (basis, spectrum) if step is not None),
                read_bytes=sum(s.model.num_bytes for s in sources.values()),
                model=source,
                needs=needs,
                energies=energies,
                basis=basis,
                spectrum=spectrum,
            )
        )

    @classmethod
    def of_models(cls, context: PlanContext, names: Iterable[str]) -> tuple[SurveyStep, ...]:
        """The surveys of some models of the catalogue, which check their weights."""
        return tuple(cls.make(context, name) for name in names)

    @classmethod
    def walk_together(cls, steps: Sequence[Step], run: RunView, attempt: str) -> Walk:
        return SurveyWalk(steps, run, attempt)


def _methods(context: PlanContext, model: str | None = None) -> list[AnyRealignMethod]:
    """The methods of all variants, or of those that a model takes part in."""
    manifest = context.manifest
    return [
        variant.realign
        for variant in manifest.variants
        if variant.realign is not None and (model is None or model in {m.name for m in manifest.members(variant)})
    ]


def _needs(context: PlanContext, source: Source, methods: Sequence[AnyRealignMethod]) -> frozenset[Need]:
    """What is measured of one model; the factors of VVᵀΔW are kept of adapters alone."""
    asked: set[Need] = {"displacement"} if context.manifest.survey.directions else set()
    asked |= {need for method in methods for need in method.needs}
    found = measured_needs(asked)
    return found if isinstance(source.model, Adapter) else found - {"projection"}


class SurveyWalk(Walk):
    """One pass over V for all steps that wait for it.

    Its units leave no records: a pass that is interrupted starts over, and a unit that fails fails all its models.
    """

    def __init__(self, steps: Sequence[Step], run: RunView, attempt: str) -> None:
        super().__init__({})
        self._surveys = [step for step in steps if isinstance(step, SurveyStep)]
        self._own = [step for step in steps if isinstance(step, DisplacementStep)]
        self._run = run
        self._attempt = attempt
        self._groups = plan_shards(run.aligned.tensors.values(), UNIT_BYTES)
        reads_v = bool(self._own) or any(step.needs for step in self._surveys)
        self._unaligned = run.bases.unaligned if reads_v else None

    def next(self) -> Sequence[NextUnit]:
        bases = (self._run.bases.aligned, self._unaligned) if self._unaligned is not None else ()
        read = sum(source.model.num_bytes for source in (*bases, *(s.model for s in self._surveys)))
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

        bases = [step for step in (*self._own, *(s.basis for s in self._surveys)) if step and step.directions]
        spectra = [step for step in (*self._own, *(s.spectrum for s in self._surveys)) if step and not step.directions]
        unit = SurveyUnit(
            aligned=self._run.bases.aligned.uri,
            unaligned=self._unaligned.uri if self._unaligned is not None else None,
            models={s.key: self._surveyed(s) for s in self._surveys},
            tensors=tuple(self._groups[index]),
            file=shard_name(index, len(self._groups)),
            directions=bases[0].directions if bases else 0,
            basis=self._part(bases[0]) if bases else None,
            spectrum=self._part(spectra[0]) if spectra else None,
        )
        return NextUnit(index, unit, work)

    def _surveyed(self, step: SurveyStep) -> Surveyed:
        from fleet.algebra.statistics import Asked
        from fleet.work.survey import Surveyed

        return Surveyed(
            uri=step.model.uri,
            asked=Asked(
                displacement="displacement" in step.needs,
                rho="rho" in step.needs,
                rho_null="rho_null" in step.needs,
                energies=step.energies,
            ),
            projection=self._run.output(step, self._attempt) if "projection" in step.needs else None,
        )

    def _part(self, step: DisplacementStep) -> OwnPart:
        from fleet.work.survey import OwnPart

        is_new = step.key in {own.key for own in self._own}
        return OwnPart(step.key, self._run.output(step, self._attempt) if is_new else self._run.folder(step))


def _list(value: Json) -> list[Json]:
    assert isinstance(value, list)
    return value
