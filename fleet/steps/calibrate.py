"""Calibrate steps: how often the judge is wrong, on labelled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evals.suites import Suite
from fleet.core.identity import Json
from fleet.steps.base import NextUnit, Step, UnitList, Walk
from fleet.steps.context import PlanContext
from fleet.steps.record import Result
from fleet.steps.view import RunView
from fleet.work.unit import Found


class CalibrateResult(Result):
    """The counts of an `evals.calibration.Calibration`."""

    positives: int
    true_positives: int
    negatives: int
    true_negatives: int


@dataclass(frozen=True, kw_only=True)
class CalibrateStep(Step):
    """Count how often the judge is wrong."""

    kind: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 1

    rows: str
    """Key of the rows in the store."""
    suite: Suite
    """Whose rules a rule judge goes by."""

    @classmethod
    def make(cls, context: PlanContext, rows: str) -> CalibrateStep:
        """Of the run's judge, on the rows under this key."""
        evaluation = context.manifest.evaluation
        suite = context.suites[evaluation.harmfulness[0]]
        spec: dict[str, Json] = {"judge": context.judging.settings, "rows": rows, "dtype": evaluation.dtype}
        if evaluation.judge.kind == "rule":
            spec["suite"] = suite.digest
        return context.add(cls(name="judge", spec=spec, inputs={}, rows=rows, suite=suite))

    def walk(self, run: RunView, attempt: str, finished: dict[int, Found]) -> Walk:
        from fleet.work.judging import CalibrateUnit

        rows = run.place_texts(self.rows)
        unit = CalibrateUnit(run.suite_files(self.suite), run.judging.judge, run.store.uri, rows)
        return UnitList([NextUnit(0, unit, 0.0)], finished, CalibrateResult)
