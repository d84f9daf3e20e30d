"""Where a tensor is in its model, and schedules: parameters that depend on it.

A schedule is written as mergekit's users write it: a number; a gradient, whose numbers lie evenly over the depth of the
model and are interpolated; or rules, of which the first one applies whose filter is part of the tensor's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, NamedTuple, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EMBEDDINGS = re.compile(r"embed(?!_out)|wte|wpe")

Gradient: TypeAlias = Annotated[tuple[float, ...], Field(min_length=1)]


class Rule(BaseModel):
    """A value for the tensors whose names contain a text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    filter: str | None = None
    """Part of a tensor's name; without it, the rule is for every tensor."""
    value: float | Gradient
    """The number, or numbers over the depth of the model."""


def _ends_for_all(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    if rules[-1].filter is not None:
        raise ValueError("the last rule has to be one without a filter, for all other tensors")
    return rules


Rules: TypeAlias = Annotated[tuple[Rule, ...], Field(min_length=1), AfterValidator(_ends_for_all)]
Schedule: TypeAlias = float | Gradient | Rules


class Place(NamedTuple):
    """Where a tensor is."""

    tensor: str
    depth: float
    """From 0, the embeddings and the first layer, to 1, the last layer and the head."""


def at(schedule: Schedule, place: Place) -> float:
    """A schedule's value for one tensor."""
    if isinstance(schedule, int | float):
        return schedule
    first = schedule[0]
    if isinstance(first, Rule):
        rules = (r for r in schedule if isinstance(r, Rule))
        return at(next(r.value for r in rules if r.filter is None or r.filter in place.tensor), place)
    numbers = [float(value) for value in schedule if not isinstance(value, Rule)]
    scaled = place.depth * (len(numbers) - 1)
    below = min(int(scaled), len(numbers) - 1)
    above = min(below + 1, len(numbers) - 1)
    share = scaled - below
    return (1.0 - share) * numbers[below] + share * numbers[above]


def places(tensors: Iterable[str]) -> dict[str, Place]:
    """Tensor -> its place. The first number in a name is the layer; without one, an embedding has depth 0, others 1."""
    layers = {name: int(found[1]) if (found := _LAYER.search(name)) else None for name in tensors}
    last = max((layer for layer in layers.values() if layer is not None), default=0)
    return {name: Place(name, _depth(name, layer, last)) for name, layer in layers.items()}


def _depth(name: str, layer: int | None, last: int) -> float:
    if layer is None:
        return 0.0 if _EMBEDDINGS.search(name) else 1.0
    return layer / last if last else 1.0
