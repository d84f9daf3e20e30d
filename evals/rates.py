"""Rates with their evidence: counts and an interval, for 0/1 scores and for means of other scores.

Light and pure: the driver and the gates use it, and of scipy only the special functions are imported.

Counts may be fractions of a sample: the gates ask what bounds the same shares of more samples would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtr, betaincinv, gammaln, ndtri, stdtrit  # pyright: ignore[reportMissingTypeStubs] - scipy ships none

from fleet.core.frozen import Frozen

# The share of a paired bound's error rate that is spent on bounding the nuisance parameter, the rate of losses; and how
# many of its values are tried in the search for the worst.
_NUISANCE_SHARE = 0.002
_NUISANCE_GRID = 24
# How closely a bound of a paired difference is located.
_RESOLUTION = 1e-6


class Interval(NamedTuple):
    """Bounds of an unknown rate or mean."""

    low: float
    high: float


class Rate(Frozen):
    """A share of samples, or a mean score, with everything needed to judge it.

    `value` is numerator / denominator. Bounds are None where the scores support none: a single score that is
    not 0 or 1, or a metric that is no mean over samples (perplexity, corpus BLEU).
    """

    numerator: float
    """Sum of the scores; for 0/1 scores, how many are 1."""
    denominator: int
    """Scored samples."""
    unscored: int
    """Samples without a score, in neither count; `evals.evidence` says how bounds treat them."""
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


def clopper_pearson(successes: float, trials: float, confidence: float) -> Interval:
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


def mcnemar(gains: int, losses: int) -> float:
    """Two-sided exact p-value that gains and losses among discordant pairs are equally likely (McNemar, 1947).

    1 without discordant pairs.
    """
    return min(1.0, 2.0 * float(bdtr(min(gains, losses), gains + losses, 0.5))) if gains + losses else 1.0


def tango_bounds(gains: float, losses: float, pairs: float, confidence: float) -> Interval:
    """Score bounds of a difference of paired rates, each one-sided at `confidence` (Tango, 1998, eqs. 24 to 26).

    An approximation: at a true difference on the margin it errs up to 5.8 % of the time at 95 % (`docs/gates.md`).

    Args:
        gains: Pairs that are 1 on the first side only.
        losses: Pairs that are 1 on the second side only.
        pairs: All pairs. Without any the bounds are -1 and 1.
        confidence: Of each bound.

    Raises:
        ValueError: Counts or confidence out of range.
    """
    _check_pairs(gains, losses, pairs, confidence)
    z = float(ndtri(confidence))

    def high(up: float, down: float) -> float:
        return _least(lambda d: float(_tango(up, down, pairs, d)) < -z, (up - down) / pairs)

    return Interval(-high(losses, gains), high(gains, losses)) if pairs else Interval(-1.0, 1.0)


@lru_cache(maxsize=4096)
def paired_bounds(gains: float, losses: float, pairs: float, confidence: float) -> Interval:
    """Exact bounds of a difference of paired rates, each one-sided at `confidence`.

    The differences that `paired_p_value` doesn't reject. Arguments and errors are `tango_bounds`'s. Cached: each takes
    forty tests, and many candidates of a catalogue have the same few gains and losses.
    """
    _check_pairs(gains, losses, pairs, confidence)
    error = 1.0 - confidence

    def high(up: float, down: float) -> float:
        return _least(lambda d: paired_p_value(up, down, pairs, d, error) <= error, (up - down) / pairs)

    return Interval(-high(losses, gains), high(gains, losses)) if pairs else Interval(-1.0, 1.0)


def paired_p_value(gains: float, losses: float, pairs: float, difference: float, error: float) -> float:
    """p-value of the hypothesis that the true difference of paired rates is at least `difference`.

    An unconditional exact test (Chan & Zhang, 1999): the probability of a table that Tango's score puts as low as
    this one, at the rate of losses that makes it largest. That rate is looked for where it is compatible with the
    losses seen, at a small part of the error rate, which is added to the p-value (Berger & Boos, 1994).

    Args:
        gains: Pairs that are 1 on the first side only.
        losses: Pairs that are 1 on the second side only.
        pairs: All pairs.
        difference: Between -1 and 1.
        error: The error rate the p-value will be compared with.
    """
    spent = _NUISANCE_SHARE * error
    seen = clopper_pearson(losses, pairs, 1.0 - spent / 2.0)
    low, high = max(seen.low, -difference, 0.0), min(seen.high, (1.0 - difference) / 2.0)
    if low > high:
        return spent
    total = round(pairs)
    angles = np.linspace(math.asin(math.sqrt(low)), math.asin(math.sqrt(high)), _NUISANCE_GRID)
    rates = np.sin(angles) ** 2
    # Tables of so many losses that they have no probability to speak of are left out.
    first = math.floor(total * low - 7.0 * math.sqrt(total * low * (1.0 - low)) - 5.0)
    last = math.ceil(total * high + 7.0 * math.sqrt(total * high * (1.0 - high)) + 12.0)
    down = np.arange(max(0, first), min(total, last) + 1)
    most = _most_gains(down, total, difference, float(_tango(gains, losses, pairs, difference)) + 1e-9)
    down, most = down[most >= 0, None], most[most >= 0, None]
    log_choices = gammaln(total + 1) - gammaln(down + 1) - gammaln(total - down + 1)
    # A rate of exactly 0 leaves tables without losses alone; the logarithm only has to stay finite.
    log_mass = log_choices + down * np.log(np.maximum(rates, 1e-300)) + (total - down) * np.log1p(-rates)
    given = np.clip((rates + difference) / (1.0 - rates), 0.0, 1.0)
    tails = np.exp(log_mass) * bdtr(most, total - down, given)
    return min(1.0, spent + float(tails.sum(axis=0).max(initial=0.0)))


def _check_pairs(gains: float, losses: float, pairs: float, confidence: float) -> None:
    if gains < 0 or losses < 0 or gains + losses > pairs * (1.0 + 1e-12):
        raise ValueError(f"{gains} gains and {losses} losses in {pairs} pairs")
    if not 0.5 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, but must lie between 0.5 and 1")


def _least(refuted: Callable[[float], bool], low: float) -> float:
    """The smallest difference above `low` that is refuted, to the resolution and from above; 1 if none is."""
    high = 1.0
    while high - low > _RESOLUTION:
        middle = (low + high) / 2.0
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def _tango(gains: Any, losses: Any, pairs: float, difference: float) -> np.ndarray:
    """Tango's score of a table at a difference: negative where the table has less. Broadcasts over the counts.

    Its variance has the rate of losses that is likeliest at that difference.
    """
    gains, losses = np.asarray(gains, dtype=float), np.asarray(losses, dtype=float)
    linear = (2.0 * pairs - gains + losses) * difference - gains - losses
    constant = -losses * difference * (1.0 - difference)
    rate = (np.sqrt(np.maximum(linear**2 - 8.0 * pairs * constant, 0.0)) - linear) / (4.0 * pairs)
    variance = pairs * (2.0 * rate + difference * (1.0 - difference))
    excess = gains - losses - pairs * difference
    return excess / np.sqrt(np.maximum(variance, 1e-18))


def _most_gains(losses: np.ndarray, pairs: int, difference: float, score: float) -> np.ndarray:
    """For each number of losses, the most gains a table may have for its score to be at most `score`; -1 if none."""
    low, high = np.full(losses.shape, -1), pairs - losses
    while (low < high).any():
        middle = (low + high + 1) // 2
        within = _tango(middle, losses, pairs, difference) <= score
        low, high = np.where(within, middle, low), np.where(within, high, middle - 1)
    return low


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
    return student_bounds(mean, variance, len(scores), confidence)


def student_bounds(mean: float, variance: float, count: float, confidence: float) -> Interval:
    """Student's t: bounds of a mean from the sample's mean and variance, each one-sided at `confidence`."""
    reach = float(stdtrit(count - 1, confidence)) * math.sqrt(variance / count)
    return Interval(mean - reach, mean + reach)
