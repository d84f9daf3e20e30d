"""How often a judge is wrong, from labelled rows, and what that makes of a rate it measured. Pure and light.

A judge that calls a share `a` of the completions harmful, with sensitivity s and specificity c, leaves a true share of
p = (a + c - 1) / (s + c - 1) (Rogan & Gladen, 1978). s and c are known from finitely many rows. The bounds of p meld
the three: each of a, s and c is drawn from its Clopper-Pearson bounds at a random confidence, on the side that is worse
for p, and the bound is the quantile of the p's that come out (Fay, Proschan & Brittain, 2015; Bayer, Fay & Graubard,
2023). In simulation this holds its level where Lang & Reiczigel's interval (2014) misses it, and is about as short
(`docs/gates.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from pydantic import Field, model_validator
from scipy.special import betainc, betaincc, betaincinv  # pyright: ignore[reportMissingTypeStubs] - scipy ships none

from evals.rates import Interval, clopper_pearson
from fleet.core.errors import InputError
from fleet.core.frozen import Frozen

# Points of sensitivity, and of specificity, over which melded distributions are averaged; and how closely a bound is
# located.
_GRID = 32
_RESOLUTION = 1e-6


class Calibration(Frozen):
    """Counts of a judge's verdicts on rows whose truth is known; positive is what scores 1: harmful, or refused."""

    positives: int = Field(ge=1)
    """Rows that are truly positive and were judged."""
    true_positives: int = Field(ge=0)
    """Of these, judged positive."""
    negatives: int = Field(ge=1)
    """Rows that are truly negative and were judged."""
    true_negatives: int = Field(ge=0)
    """Of these, judged negative."""
    unscored: int = Field(default=0, ge=0)
    """Rows the judge could not tell: left out of the other counts, as unscored samples are left out of rates."""

    @model_validator(mode="after")
    def _counts_fit(self) -> Calibration:
        if self.true_positives > self.positives or self.true_negatives > self.negatives:
            raise ValueError("more rows were judged rightly than there are")
        return self

    @classmethod
    def of(cls, rows: Iterable[tuple[bool | None, bool]]) -> Calibration:
        """Count rows of (the judge's verdict, the truth); None is a verdict the judge could not reach.

        Raises:
            InputError: No judged row is positive, or none is negative, or the judge is no better than chance.
        """
        rows = list(rows)
        judged = [(verdict, truth) for verdict, truth in rows if verdict is not None]
        on_positives = [verdict for verdict, truth in judged if truth]
        on_negatives = [verdict for verdict, truth in judged if not truth]
        if not on_positives or not on_negatives:
            lacking = "negative" if on_positives else "positive"
            raise InputError(f"calibration: no judged row is truly {lacking}; label some of both kinds")
        calibration = cls(
            positives=len(on_positives),
            true_positives=sum(on_positives),
            negatives=len(on_negatives),
            true_negatives=len(on_negatives) - sum(on_negatives),
            unscored=len(rows) - len(judged),
        )
        calibration.check()
        return calibration

    @property
    def sensitivity(self) -> float:
        return self.true_positives / self.positives

    @property
    def specificity(self) -> float:
        return self.true_negatives / self.negatives

    @property
    def tells(self) -> bool:
        """Whether sensitivity and specificity add up to more than 1, which a coin's do not."""
        # In whole counts: fractions that add up to exactly 1 need not in floating point.
        rightly = self.true_positives * self.negatives + self.true_negatives * self.positives
        return rightly > self.positives * self.negatives

    @property
    def complaint(self) -> str:
        """Why a judge that doesn't tell is refused."""
        return (
            f"calibration: sensitivity {self.sensitivity:.3f} and specificity {self.specificity:.3f} add up to at most "
            "1, so the judge tells nothing; take another judge or correct the labels"
        )

    def check(self) -> None:
        """Refuse a judge that tells nothing.

        Raises:
            InputError: It does not.
        """
        if not self.tells:
            raise InputError(self.complaint)

    def rate(self, apparent: float) -> float:
        """The true rate behind a share judged positive, within [0, 1].

        Raises:
            InputError: The judge tells nothing.
        """
        self.check()
        return min(1.0, max(0.0, (apparent + self.specificity - 1.0) / (self.sensitivity + self.specificity - 1.0)))

    def bounds(self, least: float, most: float, samples: float, confidence: float) -> Interval:
        """Bounds of the true rate, each one-sided at `confidence`.

        Args:
            least: Samples judged positive, with the unscored taken for negative. It makes the lower bound.
            most: The same with the unscored taken for positive. It makes the upper bound.
            samples: All samples.
            confidence: Of each bound.

        Raises:
            InputError: The judge tells nothing.
        """
        self.check()
        low, high = 0.0, 1.0
        if self.confidence_above(least, samples, 0.0) >= confidence:
            low = _largest(lambda rate: self.confidence_above(least, samples, rate) >= confidence)
        if self.confidence_at_most(most, samples, 1.0 - _RESOLUTION) >= confidence:
            high = 1.0 - _largest(lambda rate: self.confidence_at_most(most, samples, 1.0 - rate) >= confidence)
        return Interval(low, high)

    def confidence_at_most(self, ones: float, samples: float, rate: float) -> float:
        """At which confidence the upper bound, of this many judged positive, is `rate`."""
        hits = _quantiles(self.true_positives, self.positives - self.true_positives + 1)
        passes = _quantiles(self.true_negatives + 1, self.negatives - self.true_negatives)
        apparent, tells = _apparent(rate, hits, passes)
        confidence = betainc(ones + 1, samples - ones, apparent) if ones < samples else apparent >= 1.0
        return float(np.where(tells, confidence, 0.0).mean())

    def confidence_above(self, ones: float, samples: float, rate: float) -> float:
        """At which confidence the lower bound, of this many judged positive, is `rate`."""
        if ones == 0:
            return 0.0
        hits = _quantiles(self.true_positives + 1, self.positives - self.true_positives)
        passes = _quantiles(self.true_negatives, self.negatives - self.true_negatives + 1)
        apparent, tells = _apparent(rate, hits, passes)
        return float(np.where(tells, betaincc(ones, samples - ones + 1, apparent), 0.0).mean())

    def difference_bounds(self, apparent: Interval, confidence: float) -> Interval:
        """Bounds of the difference of two true rates that one judge, equally wrong on both, measured.

        The difference is the apparent one divided by s + c - 1; each bound is the worst of three, of the apparent
        difference, s and c, each at a third of the error rate.

        Args:
            apparent: Bounds of the apparent difference, each one-sided at `spend(confidence)`.
            confidence: Of each bound of the result.

        Raises:
            InputError: The judge tells nothing.
        """
        self.check()
        least, most = self._gains(confidence)
        if least <= 0.0:
            return Interval(-1.0, 1.0)
        low = apparent.low / (least if apparent.low < 0.0 else most)
        high = apparent.high / (most if apparent.high < 0.0 else least)
        return Interval(min(1.0, max(-1.0, low)), min(1.0, max(-1.0, high)))

    def apparent_margins(self, margin: float, confidence: float) -> Interval:
        """What `difference_bounds` at a margin of at least 0 comes to for the apparent difference: the true one's upper
        bound is at most `margin` if the apparent one's is at most `low`, and its lower bound is above `margin` if the
        apparent one's is above `high`.
        """
        least, most = self._gains(confidence)
        return Interval(margin * least, margin * most) if least > 0.0 else Interval(-math.inf, math.inf)

    def _gains(self, confidence: float) -> tuple[float, float]:
        """Bounds of s + c - 1."""
        each = spend(confidence)
        hits = clopper_pearson(self.true_positives, self.positives, each)
        passes = clopper_pearson(self.true_negatives, self.negatives, each)
        return hits.low + passes.low - 1.0, hits.high + passes.high - 1.0


def spend(confidence: float) -> float:
    """The confidence of each of three bounds that together hold at `confidence`."""
    return 1.0 - (1.0 - confidence) / 3.0


def _quantiles(a: float, b: float) -> np.ndarray:
    """Evenly spaced quantiles of a beta distribution; where a parameter is 0, all of it is at 0 or 1."""
    if a == 0 or b == 0:
        return np.full(_GRID, 0.0 if a == 0 else 1.0)
    return betaincinv(a, b, (np.arange(_GRID) + 0.5) / _GRID)


def _apparent(rate: float, sensitivity: np.ndarray, specificity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(s, c) the shares a judge would call positive, and whether a judge of that s and c tells anything."""
    share = rate * sensitivity[:, None] + (1.0 - rate) * (1.0 - specificity)
    return np.clip(share, 0.0, 1.0), sensitivity[:, None] + specificity > 1.0


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest number in [0, 1] for which `holds` is true, to the resolution and from below; it is false beyond."""
    low, high = 0.0, 1.0
    while high - low > _RESOLUTION:
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
