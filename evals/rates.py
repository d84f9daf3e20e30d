"""Rates with their evidence: counts and an interval, for 0/1 scores and for means of other scores.

Light and pure: the driver and the gates use it, and only scipy's special functions are imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from scipy.special import betaincinv, stdtrit


class Interval(NamedTuple):
    """Bounds of an unknown rate or mean."""

    low: float
    high: float


class Rate(BaseModel):
    """A share of samples, or a mean score, with everything needed to judge it.

    `value` is numerator / denominator. Bounds are None where the scores support none: a single score that is
    not 0 or 1, or a metric that is no mean over samples (perplexity, corpus BLEU).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    numerator: float
    """Sum of the scores; for 0/1 scores, how many are 1."""
    denominator: int
    """Scored samples."""
    unscored: int
    """Samples without a score. They are in neither count: see `evals.gates` for what they are held to be."""
    value: float | None
    """None if nothing was scored."""
    low: float | None
    high: float | None
    confidence: float
    """Of the two-sided interval [low, high]."""
    binary: bool
    """Whether every score is 0 or 1, so that the bounds are Clopper-Pearson's."""
    higher_is_better: bool = True

    @classmethod
    def of(
        cls,
        scores: Sequence[float | None],
        confidence: float = 0.95,
        higher_is_better: bool = True,
    ) -> Rate:
        """The rate of these scores; None is unscored.

        Raises:
            ValueError: A score is NaN or infinite, or the confidence is not between 0 and 1.
        """
        scored = [float(s) for s in scores if s is not None]
        if not all(map(math.isfinite, scored)):
            raise ValueError("a score is not finite; an unusable one must be None")
        binary = is_binary(scores)
        bounds = mean_bounds(scored, 1 - (1 - confidence) / 2)
        numerator = math.fsum(scored)
        return cls(
            numerator=numerator,
            denominator=len(scored),
            unscored=len(scores) - len(scored),
            value=numerator / len(scored) if scored else None,
            low=bounds.low if bounds else None,
            high=bounds.high if bounds else None,
            confidence=confidence,
            binary=binary,
            higher_is_better=higher_is_better,
        )

    def metrics(self, name: str) -> dict[str, float]:
        """Flat numbers for a tracker, `name` first; what is None is left out."""
        fields: dict[str, Any] = {
            name: self.value,
            f"{name}_low": self.low,
            f"{name}_high": self.high,
            f"{name}_numerator": self.numerator,
            f"{name}_denominator": self.denominator,
            f"{name}_unscored": self.unscored,
        }
        return {key: float(value) for key, value in fields.items() if value is not None}


def is_binary(scores: Sequence[float | None]) -> bool:
    """Whether every score there is, is 0 or 1."""
    return all(s is None or s in (0.0, 1.0) for s in scores)


def clopper_pearson(successes: int, trials: int, confidence: float) -> Interval:
    """Exact bounds of a binomial rate, each one-sided at `confidence` (Clopper & Pearson, 1934).

    As an interval they hold with 2 * confidence - 1. Without trials they say nothing: [0, 1].

    Raises:
        ValueError: Counts or confidence out of range.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1")
    failures = trials - successes
    low = float(betaincinv(successes, failures + 1, 1 - confidence)) if successes else 0.0
    high = float(betaincinv(successes + 1, failures, confidence)) if failures else 1.0
    return Interval(low, high)


def mean_bounds(scores: Sequence[float], confidence: float) -> Interval | None:
    """Bounds of the mean the scores are drawn from, each one-sided at `confidence`.

    Clopper-Pearson for 0/1 scores, Student's t for others (at least two needed, else None).
    """
    if is_binary(scores):
        return clopper_pearson(sum(s == 1.0 for s in scores), len(scores), confidence)
    if len(scores) < 2:
        return None
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((s - mean) ** 2 for s in scores) / (len(scores) - 1)
    reach = float(stdtrit(len(scores) - 1, confidence)) * math.sqrt(variance / len(scores))
    return Interval(mean - reach, mean + reach)
