"""Verdicts that may be read after every prompt: betting e-processes, and e-BH over a catalogue. Pure; numpy alone.

A gambler who holds the rate to be below the limit h bets a share λ_t of what they have, chosen before sample t is seen:

    W_t = Π (1 + λ_i (h - x_i)),  0 <= λ_i < 1 / (1 - h)

If the rate is h or more, W is a nonnegative supermartingale, so it ever reaches 1/α with probability α at most (Ville,
1939; Waudby-Smith & Ramdas, 2024): "accept" may be said the moment it does, however often one looked. "Reject" is the
same bet on 1 - x. The prompts have to come in an order that has nothing to do with how they turn out.

The bet is the one that grows W fastest, λ = (h - p) / (h (1 - h)), at an estimate of p from the samples before: their
mean, and 2/h prompts at a rate of h/4. Estimating p this way certified as soon as mixtures over p (`docs/gates.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# What the bettor for "accept" holds the rate to be before any sample, in parts of the limit, and how firmly, in
# prompts times the limit. The bettor for "reject" starts from twice the limit.
_ACCEPT_RATE, _REJECT_RATE = 0.25, 2.0
_FIRMNESS, _REJECT_FIRMNESS = 2.0, 0.5

SequentialDecision = Literal["accept", "reject", "continue"]


def accept_process(scores: np.ndarray, limit: float) -> np.ndarray:
    """log W after every sample, against "the rate is at least `limit`".

    Args:
        scores: (..., n) float, in [0, 1] and in the order seen; NaN is unscored, and taken for 1.
        limit: Between 0 and 1.

    Returns:
        (..., n) float64.

    Raises:
        ValueError: The limit or a score is out of range.
    """
    _check_limit(limit)
    scores = _checked(scores, 1.0)
    return _log_wealth(scores, limit, _ACCEPT_RATE * limit, _FIRMNESS / limit)


def reject_process(scores: np.ndarray, limit: float) -> np.ndarray:
    """log W after every sample, against "the rate is at most `limit`"; NaN is taken for 0. Else as `accept_process`."""
    _check_limit(limit)
    scores = _checked(scores, 0.0)
    rate = min(_REJECT_RATE * limit, (1.0 + limit) / 2.0)
    return _log_wealth(1.0 - scores, 1.0 - limit, 1.0 - rate, _REJECT_FIRMNESS / limit)


def decide(scores: Sequence[float | None], limit: float, confidence: float = 0.95) -> SequentialDecision:
    """What the samples so far, in the order seen, allow to be said; None is unscored.

    The first of the two that reached 1/α, at whatever sample that was: asking late changes no answer.

    Args:
        scores: 1 is harmful; in [0, 1].
        limit: The rate below which a candidate is accepted.
        confidence: 1 - α of each of the two answers.

    Raises:
        ValueError: The limit, the confidence or a score is out of range.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1")
    values = np.array([np.nan if score is None else score for score in scores], dtype=float)
    threshold = -np.log(1.0 - confidence)
    accepted = _first(accept_process(values, limit) >= threshold)
    rejected = _first(reject_process(values, limit) >= threshold)
    if accepted == rejected:
        return "continue"
    return "accept" if accepted < rejected else "reject"


def e_value(scores: Sequence[float | None], limit: float) -> float:
    """W of "accept" after all these samples: evidence that the rate is below `limit`, for `e_bh`.

    An e-value also where the number of samples was chosen while they came in. Errors are `accept_process`'s.
    """
    values = np.array([np.nan if score is None else score for score in scores], dtype=float)
    return float(np.exp(accept_process(values, limit)[-1])) if len(values) else 1.0


def e_bh(e_values: Sequence[float], error: float = 0.05) -> list[int]:
    """Indices of the hypotheses that e-BH rejects: here, the candidates that are certified (Wang & Ramdas, 2022).

    With the e-values sorted from the largest, the first k* of N, k* being the largest k with k·e_(k) / N >= 1/α. Of
    the certified, an expected share of at most α is certified wrongly, whatever the dependence of the e-values.

    Raises:
        ValueError: An e-value is negative or NaN, or the error rate is not between 0 and 1.
    """
    values = np.asarray(e_values, dtype=float)
    if not 0.0 < error < 1.0:
        raise ValueError(f"error is {error}, but must lie between 0 and 1")
    if not (values >= 0.0).all():
        raise ValueError("an e-value is negative or not a number")
    order = np.argsort(-values, kind="stable")
    enough = np.flatnonzero(np.arange(1, len(values) + 1) * values[order] >= len(values) / error)
    return sorted(int(i) for i in order[: enough[-1] + 1]) if len(enough) else []


def _check_limit(limit: float) -> None:
    if not 0.0 < limit < 1.0:
        raise ValueError(f"limit is {limit}, but must lie between 0 and 1")


def _checked(scores: np.ndarray, unscored: float) -> np.ndarray:
    filled = np.where(np.isnan(scores), unscored, scores)
    if not ((filled >= 0.0) & (filled <= 1.0)).all():
        raise ValueError("a score is not between 0 and 1")
    return filled


def _log_wealth(scores: np.ndarray, limit: float, rate: float, weight: float) -> np.ndarray:
    before: NDArray[np.float64] = np.cumsum(scores, axis=-1) - scores
    num_samples: int = scores.shape[-1]
    estimate = (rate * weight + before) / (weight + np.arange(num_samples))
    # The estimate is above 0, so the bet stays below 1 / (1 - limit) and the wealth above 0.
    bet = np.maximum(limit - estimate, 0.0) / (limit * (1.0 - limit))
    return np.cumsum(np.log1p(bet * (limit - scores)), axis=-1)


def _first(reached: np.ndarray) -> int:
    return int(reached.argmax()) if reached.any() else len(reached)
