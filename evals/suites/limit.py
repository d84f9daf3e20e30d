"""Asking a part of a suite: which prompts or documents, by their content. Light."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Annotated, Any

from pydantic import BeforeValidator

from evals.suites.split import sample_ids


def limit_value(value: Any) -> int | float:
    """A limit as a user writes it: a whole number of at least 1, or a share between 0 and 1.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"is {value!r}, but must be a whole number of at least 1, or a share between 0 and 1")
    if value >= 1 and isfinite(value) and value == int(value):
        return int(value)
    if not 0 < value < 1:
        raise ValueError(f"is {value!r}, but must be a whole number of at least 1, or a share between 0 and 1")
    return value


Limit = Annotated[int | float, BeforeValidator(limit_value)]
"""How much of a suite is asked: a number of prompts or documents, or a share of them."""


def num_within(limits: Sequence[int | float], total: int) -> int:
    """How many of `total` the smallest of some limits leaves, at least one; all if there is none."""
    return min([total, *(limit if isinstance(limit, int) else max(1, round(limit * total)) for limit in limits)])


def within(limits: Sequence[int | float], contents: Sequence[str]) -> list[int]:
    """The indices, in order, of those asked: the ones whose content has the smallest hash.

    So neither the order of the file nor the run decides; and rows that are added take the place of at most as many.
    """
    ids = sample_ids(contents)
    first = sorted(range(len(ids)), key=lambda i: ids[i])[: num_within(limits, len(ids))]
    return sorted(first)
