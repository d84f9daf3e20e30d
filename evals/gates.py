"""The gate: from eval logs to pass, fail, or not enough evidence. Pure functions.

Each suite is one check of one bound, and every bound is one-sided at the gates' confidence:

    harmfulness, over_refusal   rate of the candidate                    against a largest rate
    task                        accuracy of candidate minus reference    against a largest drop

A check passes if the whole range the data leave open is allowed, fails if none of it is, and otherwise there is
not enough evidence. Unscored samples count against a verdict in either direction: the upper bound takes them
for harmful (refused, or wrong where that is worse), the lower bound for the opposite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from evals.logs import EvalLog
from evals.rates import Interval, clopper_pearson, is_binary, mean_bounds
from evals.suites import Suite, SuiteKind

if TYPE_CHECKING:
    from fleet.manifest import Gates

Outcome = Literal["pass", "fail", "not enough evidence"]


@dataclass(frozen=True)
class Check:
    """One suite's part of the verdict."""

    suite: str
    kind: SuiteKind
    outcome: Outcome
    low: float | None
    """Lower bound of the rate, or of the accuracy gained (negative: lost)."""
    high: float | None
    limit: float
    """The largest rate, or the smallest gain (a drop of 0.02 is -0.02), that passes."""
    reason: str


@dataclass(frozen=True)
class GateResult:
    """The verdict on a candidate: fail if a check fails, pass if all pass."""

    outcome: Outcome
    checks: tuple[Check, ...]

    @property
    def reasons(self) -> list[str]:
        """One line per check, in the order of the suites."""
        return [check.reason for check in self.checks]


def gate(
    candidate: Mapping[str, EvalLog],
    references: Mapping[str, EvalLog],
    suites: Sequence[Suite],
    gates: Gates,
) -> GateResult:
    """The verdict on one candidate.

    Args:
        candidate: Suite name -> the candidate's log.
        references: Task suite name -> the log that its accuracy is compared with.
        suites: Everything the candidate has to be scored on; a suite without its logs is missing evidence.
        gates: The limits and the confidence.
    """
    checks = tuple(
        _check_task(suite, candidate.get(suite.name), references.get(suite.name), gates)
        if suite.kind == "task"
        else _check_rate(suite, candidate.get(suite.name), gates)
        for suite in suites
    )
    outcomes = {check.outcome for check in checks}
    if "fail" in outcomes:
        return GateResult("fail", checks)
    return GateResult("pass" if outcomes == {"pass"} else "not enough evidence", checks)


def _check_rate(suite: Suite, log: EvalLog | None, gates: Gates) -> Check:
    limit = gates.harmfulness_max if suite.kind == "harmfulness" else gates.over_refusal_max
    what = "harmful" if suite.kind == "harmfulness" else "refused"
    if log is None:
        return _missing(suite, limit, "was not scored")
    bounds = rate_bounds(log.rate.numerator, log.rate.denominator, log.rate.unscored, gates.confidence)
    outcome: Outcome = "not enough evidence"
    if bounds.high <= limit:
        outcome = "pass"
    elif bounds.low > limit:
        outcome = "fail"
    reason = (
        f"{suite.name}: {log.rate.numerator:g} of {log.rate.denominator} {what}, {log.rate.unscored} unscored: "
        f"between {bounds.low:.4f} and {bounds.high:.4f}, limit {limit:g}: {outcome}"
    )
    return Check(suite.name, suite.kind, outcome, bounds.low, bounds.high, limit, reason)


def _check_task(suite: Suite, log: EvalLog | None, reference: EvalLog | None, gates: Gates) -> Check:
    limit = -gates.task_drop_max
    if log is None or reference is None:
        who = "the candidate" if log is None else "its reference"
        return _missing(suite, limit, f"{who} was not scored")
    bounds = difference_bounds(_oriented(log), _oriented(reference), gates.confidence)
    if bounds is None:
        return _missing(suite, limit, f"{log.metric} has no bounds: its scores are too few or no mean")
    outcome: Outcome = "not enough evidence"
    if bounds.low >= limit:
        outcome = "pass"
    elif bounds.high < limit:
        outcome = "fail"
    reason = (
        f"{suite.name}: {log.metric} {_shown(log)} against {_shown(reference)}: gained between "
        f"{bounds.low:.4f} and {bounds.high:.4f}, limit {limit:g}: {outcome}"
    )
    return Check(suite.name, suite.kind, outcome, bounds.low, bounds.high, limit, reason)


def _missing(suite: Suite, limit: float, why: str) -> Check:
    outcome: Outcome = "not enough evidence"
    reason = f"{suite.name}: {why}: {outcome}"
    return Check(suite.name, suite.kind, outcome, None, None, limit, reason)


def _oriented(log: EvalLog) -> dict[str, float | None]:
    """Sample id -> score, higher being better; empty if the scores are no evidence of the rate."""
    if log.rate.denominator == 0 or log.rate.low is None:
        return {}
    if log.rate.higher_is_better:
        return log.scores()
    # 1 - score keeps a 0/1 score one.
    return {key: None if score is None else 1.0 - score for key, score in log.scores().items()}


def _shown(log: EvalLog) -> str:
    return "nothing scored" if log.rate.value is None else f"{log.rate.value:.4f}"


def rate_bounds(numerator: float, denominator: int, unscored: int, confidence: float) -> Interval:
    """One-sided bounds of a rate; the unscored are 1 in the upper bound and 0 in the lower one.

    Without samples they are 0 and 1.
    """
    successes, trials = round(numerator), denominator + unscored
    return Interval(
        clopper_pearson(successes, trials, confidence).low,
        clopper_pearson(successes + unscored, trials, confidence).high,
    )


def difference_bounds(
    candidate: Mapping[str, float | None],
    reference: Mapping[str, float | None],
    confidence: float,
) -> Interval | None:
    """One-sided bounds of mean(candidate) - mean(reference), higher scores being better; None without evidence.

    With the same sample ids on both sides the samples are paired, which tells far smaller drops apart: for 0/1
    scores only the samples that one side gets right and the other wrong count. Either way each bound is the sum of
    two bounds at half the error rate, which holds whatever the dependence between them: conservative, and exact
    for 0/1 scores.
    """
    if not candidate or not reference:
        return None
    half = 1 - (1 - confidence) / 2
    paired = candidate.keys() == reference.keys()
    if is_binary([*candidate.values(), *reference.values()]):
        worst = _binary_bounds(_filled(candidate, 0.0), _filled(reference, 1.0), paired, half)
        best = _binary_bounds(_filled(candidate, 1.0), _filled(reference, 0.0), paired, half)
        return Interval(worst.low, best.high)
    if None in candidate.values() or None in reference.values():
        # Nothing bounds what an unscored sample of an unbounded metric could have been.
        return None
    known = {key: float(score or 0.0) for key, score in candidate.items()}
    other = {key: float(score or 0.0) for key, score in reference.items()}
    if paired:
        return mean_bounds([known[key] - other[key] for key in known], confidence)
    ours, theirs = mean_bounds(list(known.values()), half), mean_bounds(list(other.values()), half)
    if ours is None or theirs is None:
        return None
    return Interval(ours.low - theirs.high, ours.high - theirs.low)


def _binary_bounds(
    candidate: Mapping[str, float], reference: Mapping[str, float], paired: bool, half: float
) -> Interval:
    if paired:
        gains = [candidate[key] > reference[key] for key in candidate]
        losses = [candidate[key] < reference[key] for key in candidate]
    else:
        gains = [score == 1.0 for score in candidate.values()]
        losses = [score == 1.0 for score in reference.values()]
    up = clopper_pearson(sum(gains), len(gains), half)
    down = clopper_pearson(sum(losses), len(losses), half)
    return Interval(up.low - down.high, up.high - down.low)


def _filled(scores: Mapping[str, float | None], unscored: float) -> dict[str, float]:
    return {key: unscored if score is None else score for key, score in scores.items()}
