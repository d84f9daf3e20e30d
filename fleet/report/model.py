"""The values a report is made of. `report.json` is a `Report` as JSON, so field names are part of that format."""

from __future__ import annotations

from collections.abc import Sequence

from evals.calibration import Calibration
from evals.gates import GateOutcome
from evals.rates import Rate
from evals.suites import SuiteKind
from fleet.core.frozen import Frozen
from fleet.core.identity import Json
from fleet.steps.builder import Role


class Corrected(Frozen):
    """A measured rate as it would be if the judge never erred (see `evals.calibration`)."""

    value: float
    low: float
    """Lower bound of the two-sided interval, at the confidence of the measured rate's interval."""
    high: float
    """Upper bound of the same interval."""

    @staticmethod
    def of(rate: Rate, calibration: Calibration) -> Corrected | None:
        """None where nothing was scored, the scores are not 0 or 1, or the judge is no better than chance."""
        if rate.value is None or not rate.binary or not calibration.tells:
            return None
        samples, confidence = rate.denominator + rate.unscored, 1.0 - (1.0 - rate.confidence) / 2.0
        bounds = calibration.bounds(rate.numerator, rate.numerator + rate.unscored, samples, confidence)
        return Corrected(value=calibration.rate(rate.value), low=bounds.low, high=bounds.high)


class Score(Frozen):
    """One candidate on one suite."""

    suite: str
    kind: SuiteKind
    rate: Rate
    samples: str
    """URI of the folder with every prompt, completion and verdict behind the rate, as Parquet."""
    corrected: Corrected | None = None
    """Only for harmfulness suites whose judge was calibrated."""
    prompts: int | None = None
    """How many prompts the whole suite has, if a limit or an early stop may have left the rate to fewer; else None."""

    def metrics(self, name: str) -> dict[str, float]:
        """Flat numbers for a tracker; the keys begin with `name`."""
        metrics = self.rate.metrics(name)
        if (c := self.corrected) is not None:
            metrics |= {f"{name}_corrected": c.value, f"{name}_corrected_low": c.low, f"{name}_corrected_high": c.high}
        return metrics


class CandidateRow(Frozen):
    """One candidate: a row of the table."""

    name: str
    role: Role
    models: tuple[str, ...]
    """The models of the catalogue it is made of."""
    parameters: dict[str, Json]
    """The realign and fuse settings it was made with."""
    weights: str | None
    """URI of the full model or adapter; None if making it failed."""
    identity: str
    """Digest of the weights' content, or of the step that makes them."""
    scores: tuple[Score, ...]
    gate: GateOutcome | None
    """None for base models, which are not gated."""
    reasons: tuple[str, ...]
    """One line for each check of the gates."""
    edited: str | None = None
    """Only for a realigned model: how many of its modules were edited, as "9 of 42"."""
    edit_norm: float | None = None
    """Only for a realigned model: ‖ΔW_after − ΔW_before‖, Frobenius, over all its modules."""
    warning: str | None = None
    """What the steps that made its weights say a person should know of them."""
    incoherent: Rate | None = None
    """Share of its completions that are incoherent; None if coherence was not measured."""

    def score(self, suite: str) -> Score | None:
        """Its score on a suite; None if it was not scored on it."""
        return next((score for score in self.scores if score.suite == suite), None)

    def mean(self, kind: SuiteKind) -> float | None:
        """Mean rate over its suites of this kind, each counting once; None if none has a rate."""
        return mean([score.rate.value for score in self.scores if score.kind == kind])


class MeanRate(Frozen):
    """A mean of candidates' rates, and how many samples are behind all of them."""

    value: float | None
    """None if no candidate has a rate."""
    denominator: int
    """Scored samples."""
    unscored: int
    """Samples without a score."""

    @staticmethod
    def of(rows: Sequence[CandidateRow], kind: SuiteKind) -> MeanRate:
        """Over candidates, each counting once, on their suites of one kind."""
        rates = [score.rate for row in rows for score in row.scores if score.kind == kind]
        return MeanRate(
            value=mean([row.mean(kind) for row in rows]),
            denominator=sum(rate.denominator for rate in rates),
            unscored=sum(rate.unscored for rate in rates),
        )


class MethodSummary(Frozen):
    """What one way of realigning did to the models of the catalogue: means over models, each counting once."""

    name: str
    """`finetuned` for the models before any realigning, else the label in the realigned models' names."""
    num_models: int
    harmfulness: MeanRate
    over_refusal: MeanRate
    task_accuracy: MeanRate
    """On each model's own tasks."""
    edit_norm: float | None


class Report(Frozen):
    """One run. The same records and published model give the same report, except for `computed`, `cached` and
    `seconds`."""

    run_id: str
    name: str
    """The manifest's name."""
    rows: tuple[CandidateRow, ...]
    """Every candidate, in the order of the plan: base models, fine-tuned, realigned, fused."""
    methods: tuple[MethodSummary, ...]
    """Means over the fine-tuned models, then over the models as each way of realigning makes them."""
    computed: int
    """Steps that this run did."""
    cached: int
    """Steps that were done before it began."""
    failures: dict[str, str]
    """Step key -> error, of the steps that failed by themselves; those that depend on them are not listed."""
    seconds: float
    """The run's wall time."""
    artifacts: str
    """URI of the store."""
    best: str | None
    """The fused variant that passed with the least harm; None if none passed."""
    published: str | None = None
    """The registry's version that the fused variants were compared with; None if none was published."""
    warnings: tuple[str, ...] = ()
    """What a reviewer should know of the whole run: what planning found odd in the input, on which suites the fused
    variants could not be compared with the published version, and whether the base models look swapped."""

    def row(self, name: str) -> CandidateRow:
        """The candidate with this name.

        Raises:
            KeyError: no candidate has this name.
        """
        return {row.name: row for row in self.rows}[name]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
