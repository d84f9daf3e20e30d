"""Whether an engine computes the model that it was given: log-probabilities of a few fixed tokens beside a reference's.

The reference computes in float32 (`evals.reference`), the engine in its own dtype, so the two differ by rounding. How
much that is depends on the model: on its depth, the size of its logits, how often a rounding sends a token to another
expert. So it is measured, on the same model and tokens: the reference is computed once more with what each layer gives
rounded to the engine's dtype, and an engine may be a few times as far from the reference as that.

A small change of weights can be smaller than that rounding. Whether it was made at all shows in differences: what the
engine says now minus what it said of the weights before, beside the same of the reference. Were the old weights still
there, the engine's would be nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT32_TOLERANCE = 1e-3
"""Root mean square in nats. Sums of float32 in another order make a few 1e-6 to 1e-5 at the logits of real models and
of the tests'; other weights make 1e-2 to several nats, or are caught as a change that was not made."""

ROUNDINGS = 5.0
"""How many times its measured rounding an engine may be off. It rounds in more places than the reference does (inside
attention, at residual sums): 1.3 to 2.3 times as much in bfloat16 and float16 on a CPU; the rest is room for the
kernels of other processors."""

SMALLEST_CHANGE = 1e-4
"""Root mean square in nats: what float32 tells from nothing on every processor, with room to spare."""


@dataclass(frozen=True)
class Reference:
    """What a model's files compute, at one sequence of tokens."""

    logprobs: tuple[float, ...]
    """Of each token but the first after those before it, in nats."""
    rounding: float
    """Root mean square in nats of what rounding to the engine's dtype changes; 0 where both compute in float32."""


@dataclass(frozen=True)
class Answer:
    """What an engine said of one sequence, and what it should have said."""

    token_ids: tuple[int, ...]
    """The fixed prompt and what the engine itself went on with, so that prefill and decoding are both seen."""
    num_prompt: int
    """How many of them are the prompt, which is the same for all weights."""
    logprobs: tuple[float, ...]
    reference: Reference


def disagreement(now: Answer, before: Answer | None) -> str | None:
    """Why an engine doesn't compute the weights it was given last, or None if it does.

    Args:
        now: of those weights.
        before: of the weights that were there before, if there were any.
    """
    allowed = FLOAT32_TOLERANCE + ROUNDINGS * now.reference.rounding
    off = _rms([a - b for a, b in zip(now.logprobs, now.reference.logprobs, strict=True)])
    if not off <= allowed:  # NaN is off, too
        return (
            f"its log-probabilities are {off:.2g} nats off those of transformers on the same files, where rounding "
            f"explains {allowed:.2g}"
        )
    if before is None:
        return None
    asked = _change(now.reference.logprobs, before.reference.logprobs, now.num_prompt)
    if _rms(asked) <= SMALLEST_CHANGE + 2 * max(now.reference.rounding, before.reference.rounding):
        return None
    made = _change(now.logprobs, before.logprobs, now.num_prompt)
    share = sum(a * b for a, b in zip(made, asked, strict=True)) / sum(b * b for b in asked)
    if share > 0.5:
        return None
    return (
        f"it is nearer to the weights that it held before than to these: of a change of {_rms(asked):.2g} nats in its "
        f"log-probabilities it made {share:.0%}"
    )


def _change(now: Sequence[float], before: Sequence[float], num_prompt: int) -> list[float]:
    """At the prompt's tokens, which both have."""
    return [a - b for a, b in zip(now[: num_prompt - 1], before[: num_prompt - 1], strict=True)]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0
