"""Bounds of a rate, or of the difference of two: from the samples there are, and from more with the same shares.

Every bound is one-sided and takes unscored samples for the worst case: for 1 in the upper bound and for 0 in the lower
one; those of the model a candidate is compared with, the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from evals.calibration import Calibration, spend
from evals.rates import (
    Interval,
    clopper_pearson,
    is_binary,
    mcnemar,
    paired_bounds,
    paired_p_value,
    student_bounds,
    tango_bounds,
)

Scores = Mapping[str, float | None]
PairedBounds = Literal["exact", "tango"]

MOST_SAMPLES = 1_000_000
"""Beyond this many samples a verdict counts as out of reach."""


class Evidence(Protocol):
    """Something that bounds a number, and would bound it closer with more samples of the same shares."""

    @property
    def samples(self) -> int: ...

    def bounds(self, confidence: float) -> Interval:
        """Bounds of the number, each one-sided at `confidence`."""
        ...

    def decides(self, samples: int, low: float, high: float, confidence: float) -> bool:
        """Whether this many samples of these shares put the number at most at `low`, or above `high`."""
        ...


@dataclass(frozen=True)
class RateEvidence:
    """A rate of 0/1 scores, by Clopper & Pearson."""

    ones: int
    samples: int
    """Scored or not."""
    unscored: int

    @classmethod
    def of(cls, scores: Scores) -> RateEvidence:
        return cls(sum(score == 1.0 for score in scores.values()), len(scores), sum(s is None for s in scores.values()))

    def bounds(self, confidence: float) -> Interval:
        return self.at(self.samples, confidence)

    def decides(self, samples: int, low: float, high: float, confidence: float) -> bool:
        bounds = self.at(samples, confidence)
        return bounds.high <= low or bounds.low > high

    def at(self, samples: float, confidence: float) -> Interval:
        """Bounds if there were this many samples."""
        if not self.samples:
            return Interval(0.0, 1.0)
        least, most = (_scaled(ones, self.samples, samples) for ones in (self.ones, self.ones + self.unscored))
        return Interval(
            clopper_pearson(least, samples, confidence).low,
            clopper_pearson(most, samples, confidence).high,
        )


@dataclass(frozen=True)
class PairedEvidence:
    """A difference of two rates on the same samples: only discordant pairs count, 1 on one side and 0 on the other."""

    samples: int
    most: tuple[int, int]
    """Samples that are 1 in the candidate alone, and in the other alone, with the unscored taken as much as possible
    for a larger difference."""
    least: tuple[int, int]
    """The same with the unscored taken for a smaller one."""
    scored: tuple[int, int]
    """The same where both are scored."""
    method: PairedBounds

    @property
    def p_value(self) -> float:
        """McNemar's, two-sided and exact, of the pairs scored on both sides."""
        return mcnemar(*self.scored)

    def bounds(self, confidence: float) -> Interval:
        bound = paired_bounds if self.method == "exact" else tango_bounds
        high = bound(*self.most, self.samples, confidence).high
        return Interval(bound(*self.least, self.samples, confidence).low, high)

    def decides(self, samples: int, low: float, high: float, confidence: float) -> bool:
        up, down = (_scaled(count, self.samples, samples) for count in self.most)
        least_up, least_down = (_scaled(count, self.samples, samples) for count in self.least)
        if self.method == "tango":
            below = tango_bounds(up, down, samples, confidence).high <= low
            return below or tango_bounds(least_up, least_down, samples, confidence).low > high
        # One test at each limit: finding the bounds takes twenty.
        error = 1.0 - confidence
        below = (up - down) / samples <= low and paired_p_value(up, down, samples, low, error) <= error
        if below or (least_up - least_down) / samples <= high:
            return below
        return paired_p_value(least_down, least_up, samples, -high, error) <= error


@dataclass(frozen=True)
class CorrectedRate:
    """A rate of 0/1 scores, corrected for the errors of the judge."""

    apparent: RateEvidence
    calibration: Calibration

    @property
    def samples(self) -> int:
        return self.apparent.samples

    def bounds(self, confidence: float) -> Interval:
        most = self.apparent.ones + self.apparent.unscored
        return self.calibration.bounds(self.apparent.ones, most, self.samples, confidence)

    def decides(self, samples: int, low: float, high: float, confidence: float) -> bool:
        counts = (self.apparent.ones, self.apparent.ones + self.apparent.unscored)
        least, most = (_scaled(ones, self.samples, samples) for ones in counts)
        below = self.calibration.confidence_at_most(most, samples, low) >= confidence
        return below or self.calibration.confidence_above(least, samples, high) >= confidence


@dataclass(frozen=True)
class CorrectedDifference:
    """A difference of two rates that one judge measured, corrected for its errors."""

    apparent: Evidence
    calibration: Calibration

    @property
    def samples(self) -> int:
        return self.apparent.samples

    def bounds(self, confidence: float) -> Interval:
        return self.calibration.difference_bounds(self.apparent.bounds(spend(confidence)), confidence)

    def decides(self, samples: int, low: float, high: float, confidence: float) -> bool:
        below = self.calibration.apparent_margins(low, confidence).low
        above = self.calibration.apparent_margins(high, confidence).high
        return self.apparent.decides(samples, below, above, spend(confidence))


@dataclass(frozen=True)
class BoundedEvidence:
    """Anything else whose bounds are a function of the number of samples and the confidence."""

    samples: int
    at: Callable[[int, float], Interval]

    def bounds(self, confidence: float) -> Interval:
        return self.at(self.samples, confidence)

    def decides(self, samples: int, low: float, high: float, confidence: float) -> bool:
        bounds = self.at(samples, confidence)
        return bounds.high <= low or bounds.low > high


def difference(candidate: Scores, other: Scores, method: PairedBounds = "exact") -> Evidence | None:
    """Evidence of mean(candidate) - mean(other); None if nothing bounds it.

    With the same sample ids on both sides the samples are paired. Otherwise 0/1 scores are bounded on each side at
    half the error rate, which holds whatever the dependence. Other scores have Student's t, an approximation, and no
    bound where one is unscored: nothing bounds what it could have been.
    """
    if not candidate or not other:
        return None
    paired = candidate.keys() == other.keys()
    if is_binary([*candidate.values(), *other.values()]):
        return _pair(candidate, other, method) if paired else _two_rates(candidate, other)
    ours, theirs = _known(candidate), _known(other)
    if ours is None or theirs is None:
        return None
    if paired and len(ours) < 2:
        return None
    if paired:
        mean, variance = _moments([ours[key] - theirs[key] for key in ours])
        return BoundedEvidence(len(ours), lambda n, confidence: student_bounds(mean, variance, n, confidence))
    return _two_means(list(ours.values()), list(theirs.values()))


def more_samples(evidence: Evidence, low: float, high: float, confidence: float) -> int | None:
    """How many samples more, of the same shares, would put the number at most at `low` or above `high`.

    The fewest: one fewer does not decide. None if even `MOST_SAMPLES` in all would not, or there are no shares yet.
    """
    few, many = evidence.samples, MOST_SAMPLES
    if not 0 < few < many or not evidence.decides(many, low, high, confidence):
        return None
    while 2 * few < many:
        if evidence.decides(2 * few, low, high, confidence):
            many = 2 * few
            break
        few *= 2
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if evidence.decides(middle, low, high, confidence) else (middle, many)
    return many - evidence.samples


def _pair(candidate: Scores, other: Scores, method: PairedBounds) -> PairedEvidence:
    def discordant(ours: float, theirs: float) -> tuple[int, int]:
        pairs = [
            (ours if (a := candidate[key]) is None else a, theirs if (b := other[key]) is None else b)
            for key in candidate
        ]
        return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)

    both = [(a, b) for key in candidate if (a := candidate[key]) is not None and (b := other[key]) is not None]
    return PairedEvidence(
        samples=len(candidate),
        most=discordant(1.0, 0.0),
        least=discordant(0.0, 1.0),
        scored=(sum(a > b for a, b in both), sum(a < b for a, b in both)),
        method=method,
    )


def _two_rates(candidate: Scores, other: Scores) -> BoundedEvidence:
    ours, theirs = RateEvidence.of(candidate), RateEvidence.of(other)

    def at(samples: int, confidence: float) -> Interval:
        half = 1.0 - (1.0 - confidence) / 2.0
        mine = ours.at(samples, half)
        others = theirs.at(_scaled(theirs.samples, ours.samples, samples), half)
        return Interval(mine.low - others.high, mine.high - others.low)

    return BoundedEvidence(ours.samples, at)


def _two_means(ours: Sequence[float], theirs: Sequence[float]) -> BoundedEvidence | None:
    if len(ours) < 2 or len(theirs) < 2:
        return None
    mine, others = _moments(ours), _moments(theirs)

    def at(samples: int, confidence: float) -> Interval:
        half = 1.0 - (1.0 - confidence) / 2.0
        a = student_bounds(*mine, samples, half)
        b = student_bounds(*others, _scaled(len(theirs), len(ours), samples), half)
        return Interval(a.low - b.high, a.high - b.low)

    return BoundedEvidence(len(ours), at)


def _known(scores: Scores) -> dict[str, float] | None:
    known = {key: score for key, score in scores.items() if score is not None}
    return known if len(known) == len(scores) else None


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased variance."""
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def _scaled(count: float, samples: float, to: float) -> float:
    # In this order a count of all samples stays exactly all of them.
    return count * to / samples
