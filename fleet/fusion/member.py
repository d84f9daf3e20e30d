"""The members of a fusion, and the rank of the fused LoRA where all are LoRAs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fleet.fusion.base import FusionMethod


@dataclass(frozen=True)
class Member:
    """One model in a fusion, as a unit of work names it."""

    name: str
    uri: str
    curvature: str | None = None
    """URI of the folder with the model's curvature; None if the method needs none."""


def fused_rank(method: FusionMethod, ranks_M: Iterable[int], shape: tuple[int, ...] = ()) -> int:
    """The rank that a fused LoRA is written with in one module; without a shape, at most in any.

    Args:
        ranks_M: the members' ranks in the module; without a shape, their largest ranks.
        shape: the module's, which bounds the rank of what is recompressed to `max_rank`.
    """
    rank = sum(ranks_M)
    return rank if method.max_rank is None else min(rank, method.max_rank, *shape)
