"""What the steps of a run left, as a report reads it. In `fleet.report`, only this module knows the kinds of steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evals.calibration import Calibration
from evals.logs import EvalLog
from fleet.steps.base import Step
from fleet.steps.builder import Candidate
from fleet.steps.calibrate import CalibrateResult, CalibrateStep
from fleet.steps.fuse import FuseStep
from fleet.steps.mask import MaskStep
from fleet.steps.realign import RealignResult, RealignStep
from fleet.steps.record import Record, Result
from fleet.steps.score import ScoreResult
from fleet.steps.sources import Source
from fleet.store import Store
from fleet.work.module_rows import ModuleRow


@dataclass(frozen=True)
class Edit:
    """What a realign step did to one model."""

    modules: tuple[ModuleRow, ...]
    norm: float
    """‖ΔW_after − ΔW_before‖, Frobenius, over all modules."""


def edit_of(candidate: Candidate, records: Mapping[str, Record]) -> Edit | None:
    """What a candidate's realign step did; None if it is not realigned, its step failed, or it has no module."""
    weights = candidate.weights
    record = records.get(weights.key) if isinstance(weights, RealignStep) else None
    if record is None:
        return None
    result = record.read(RealignResult)
    return Edit(result.modules, result.edit_norm) if result.modules else None


def warning_of(candidate: Candidate, records: Mapping[str, Record]) -> str | None:
    """What the steps that made a candidate's weights say a person should know of them; None if nothing."""
    made = candidate.weights
    steps: list[Step] = [made] if isinstance(made, Step) else []
    if isinstance(made, RealignStep) and isinstance(made.mask, MaskStep):
        steps.insert(0, made.mask)
    if isinstance(made, FuseStep):
        steps = [*made.trims.values(), made]
    found = [records[step.key].read(Result).warning for step in steps if step.key in records]
    return "; ".join(text for text in found if text) or None


def module_tables(candidates: Iterable[Candidate], records: Mapping[str, Record]) -> dict[str, Sequence[ModuleRow]]:
    """Name of each realigned candidate -> its modules."""
    return {c.name: edit.modules for c in candidates if (edit := edit_of(c, records)) is not None}


def weights_uri(candidate: Candidate, records: Mapping[str, Record], store: Store) -> str | None:
    """Where a candidate's weights are; None if the step that makes them failed."""
    weights = candidate.weights
    if isinstance(weights, Source):
        return weights.uri
    record = records.get(weights.key)
    return None if record is None else f"{store.uri}/{record.prefix}"


def read_log(store: Store, record: Record) -> EvalLog | None:
    """The log of a score step, with all its samples; None if one of its files is gone.

    Raises:
        EvalError: a file is damaged.
        pydantic.ValidationError: the record is not of a score step.
    """
    files = [data for name in sorted(record.files) if (data := store.read(f"{record.prefix}/{name}")) is not None]
    return EvalLog.read(record.read(ScoreResult).literals(), files) if len(files) == len(record.files) else None


def judge_calibration(steps: Iterable[Step], records: Mapping[str, Record]) -> Calibration | None:
    """The judge's errors on labelled rows; None if nobody asked for them to be counted, or counting them failed."""
    found = (records.get(step.key) for step in steps if isinstance(step, CalibrateStep))
    results = (record.read(CalibrateResult) for record in found if record is not None)
    return next((Calibration.model_validate(result.literals()) for result in results), None)


def own_steps(candidate: Candidate) -> list[Step]:
    """The steps that are about this candidate: its survey, its mask, what makes its weights, and its scores."""
    made = [candidate.weights] if isinstance(candidate.weights, Step) else []
    realigned = [step for step in made if isinstance(step, RealignStep)]
    surveys = [step.survey for step in realigned]
    masks = [step.mask for step in realigned if isinstance(step.mask, MaskStep)]
    return [*surveys, *masks, *made, *candidate.scores.values()]
